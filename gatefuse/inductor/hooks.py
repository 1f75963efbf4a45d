"""Inductor's hooks for passes: what a value of one holds, and values with and without gatefuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from gatefuse import compat
from gatefuse.inductor.fusion_pass import GateFusionPass

__all__ = ["POST_HOOK", "PRE_HOOK", "PassSequence", "append_pass", "passes_of", "remove_pass"]

POST_HOOK = "post_grad_custom_post_pass"
PRE_HOOK = "post_grad_custom_pre_pass"


class PassSequence(CustomGraphPass):
    """Several passes on a hook of Inductor's that holds one."""

    def __init__(self, passes: tuple[Callable[..., Any], ...]) -> None:
        self.passes = passes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PassSequence) and other.passes == self.passes

    def __hash__(self) -> int:
        return hash((PassSequence, self.passes))

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


def _hook_of(passes: list[Callable[..., Any]]) -> Any:
    if not passes:
        return None
    if len(passes) == 1:
        return passes[0]
    return passes if compat.hooks_take_lists() else PassSequence(tuple(passes))


def append_pass(hook: Any, new: Callable[..., Any]) -> Any:
    """A value for the hook which runs its passes and then ``new``; an older gatefuse pass among
    them is replaced, so that a graph is fused once."""
    return _hook_of([*passes_of(remove_pass(hook)), new])


def remove_pass(hook: Any) -> Any:
    """A value for the hook without gatefuse's pass: the very same object if it had none."""
    passes = passes_of(hook)
    others = [p for p in passes if not isinstance(p, GateFusionPass)]
    return hook if len(others) == len(passes) else _hook_of(others)
