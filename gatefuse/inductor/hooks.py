"""Inductor's hooks for passes: what a value of one holds, and values with and without gatefuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from gatefuse.inductor.fusion_pass import GateFusionPass

__all__ = [
    "POST_HOOK",
    "PRE_HOOK",
    "PassSequence",
    "append_pass",
    "pass_on",
    "passes_of",
    "remove_pass",
]

POST_HOOK = "post_grad_custom_post_pass"
PRE_HOOK = "post_grad_custom_pre_pass"


class PassSequence(CustomGraphPass):
    """What was on a hook and then one more pass. The former is kept as the very object that it was,
    and read when the passes run: a list may still grow."""

    def __init__(self, before: Any, last: GateFusionPass) -> None:
        self.before = before
        self.last = last

    @property
    def passes(self) -> tuple[Callable[..., Any], ...]:
        """In order; without an earlier pass of gatefuse's, so that a graph is fused once."""
        others = [p for p in passes_of(self.before) if not isinstance(p, GateFusionPass)]
        return (*others, self.last)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PassSequence) and other.passes == self.passes

    def __hash__(self) -> int:
        return hash((PassSequence, self.passes))

    def __repr__(self) -> str:
        return f"PassSequence{self.passes}"

    def __call__(self, graph: Graph) -> None:
        """Run the passes in order."""
        for graph_pass in self.passes:
            graph_pass(graph)

    def uuid(self) -> Any:
        """The passes' own ids, or None (no caching) if any of them has none."""
        ids = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.passes]
        return None if any(i is None for i in ids) else tuple(ids)


def passes_of(hook: Any) -> list[Callable[..., Any]]:
    """The passes that a value of one of Inductor's hooks stands for, in order."""
    if hook is None:
        return []
    if isinstance(hook, (list, tuple)):
        return list(hook)
    if isinstance(hook, PassSequence):
        return list(hook.passes)
    return [hook]


def append_pass(hook: Any, new: GateFusionPass) -> Any:
    """A value for the hook which runs what is on it and then ``new``, instead of an earlier pass of
    gatefuse's."""
    if hook is None or isinstance(hook, GateFusionPass):
        return new
    return PassSequence(hook.before if isinstance(hook, PassSequence) else hook, new)


def remove_pass(hook: Any) -> Any:
    """A value for the hook without gatefuse's pass: the very object that was there before it."""
    if isinstance(hook, PassSequence):
        return remove_pass(hook.before)
    if isinstance(hook, GateFusionPass):
        return None
    others = [p for p in passes_of(hook) if not isinstance(p, GateFusionPass)]
    return hook if len(others) == len(passes_of(hook)) else others or None


def pass_on(hook: Any) -> GateFusionPass | None:
    """gatefuse's pass on the hook."""
    return next((p for p in passes_of(hook) if isinstance(p, GateFusionPass)), None)
