"""What differs between PyTorch versions, and which of them are known to work.

The only module that looks at a version. Everything else asks here.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

from gatefuse import settings

__all__ = [
    "TESTED_TORCH",
    "append_pass",
    "drops_rounding_casts",
    "graph_phase",
    "inductor_options",
    "passes_of",
    "remove_pass",
    "unsupported_reason",
    "warn_unsupported",
]

TESTED_TORCH = ((2, 11), (2, 15))
"""First and last minor version of PyTorch that the test suite has passed on."""

_warned: set[str] = set()


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def unsupported_reason() -> str | None:
    """Why this PyTorch is not one that gatefuse fuses on, or None if it is."""
    version = _torch_version()
    first, last = TESTED_TORCH
    if first <= version <= last:
        return None
    if version > last and settings.flag("GATEFUSE_ALLOW_UNTESTED_TORCH"):
        return None
    advice = (
        "upgrade PyTorch"
        if version < first
        else "upgrade gatefuse, or set GATEFUSE_ALLOW_UNTESTED_TORCH=1 to fuse all the same"
    )
    return (
        f"PyTorch {torch.__version__} is not among the versions gatefuse was tested on "
        f"({first[0]}.{first[1]} to {last[0]}.{last[1]}): {advice}"
    )


def warn_unsupported(reason: str) -> None:
    """Warn, once per reason and process, that nothing will be fused."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"gatefuse: models compile unfused. {reason}.", stacklevel=3)


def _hooks_take_lists() -> bool:
    # Since 2.13 a hook of Inductor's holds one pass or a list of passes.
    from torch._inductor import custom_graph_pass

    return hasattr(custom_graph_pass, "get_custom_graph_passes")


def passes_of(hook: Any) -> list[Callable[..., Any]]:
    """The passes that a value of one of Inductor's hooks stands for, in order."""
    from gatefuse.fusion_pass import PassSequence

    if hook is None:
        return []
    if isinstance(hook, (list, tuple)):
        return list(hook)
    if isinstance(hook, PassSequence):
        return list(hook.passes)
    return [hook]


def _hook_of(passes: list[Callable[..., Any]]) -> Any:
    from gatefuse.fusion_pass import PassSequence

    if not passes:
        return None
    if len(passes) == 1:
        return passes[0]
    return passes if _hooks_take_lists() else PassSequence(tuple(passes))


def append_pass(hook: Any, new: Callable[..., Any]) -> Any:
    """A value for the hook which runs its passes and then ``new``; an older gatefuse pass among
    them is replaced, so that a graph is fused once."""
    return _hook_of([*passes_of(remove_pass(hook)), new])


def remove_pass(hook: Any) -> Any:
    """A value for the hook without gatefuse's pass: the very same object if it had none."""
    from gatefuse.fusion_pass import GateFusionPass

    passes = passes_of(hook)
    others = [p for p in passes if not isinstance(p, GateFusionPass)]
    return hook if len(others) == len(passes) else _hook_of(others)


def drops_rounding_casts(device_type: str) -> bool:
    """Whether Inductor's code for the device keeps a value in float32 where its IR converts it to a
    narrower type and back: its C++ did so before PyTorch 2.13."""
    return device_type == "cpu" and _torch_version() < (2, 13)


def inductor_options(mode: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """What ``torch.compile(mode=mode, options=options)`` sets in Inductor's configuration; raises
    its errors on an unknown mode or option."""
    return dict(torch._TorchCompileInductorWrapper(mode, options, None).config)


def graph_phase(graph: torch.fx.Graph) -> str:
    """``"inference"``, ``"forward"`` (of training) or ``"backward"``, by the names that AOTAutograd
    gives to the inputs of a graph; ``"subgraph"`` where Inductor is at the body of a higher-order
    operator, which it does before the graph that calls it."""
    if _depth_of_subgraph() > 0:
        return "subgraph"
    from torch._dynamo import compiled_autograd

    if compiled_autograd.in_compiled_autograd_region:
        return "backward"
    phase = "inference"
    for node in graph.find_nodes(op="placeholder"):
        if node.name.startswith("tangents_"):
            return "backward"
        if node.name.startswith("primals_"):
            phase = "forward"
    return phase


def _depth_of_subgraph() -> int:
    # Nothing in a subgraph tells that it is one: the function that runs the passes calls itself.
    frame: FrameType | None = sys._getframe()
    depth = -1
    while frame is not None:
        depth += frame.f_code.co_name == "_recursive_post_grad_passes"
        frame = frame.f_back
    return depth
