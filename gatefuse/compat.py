"""What differs between PyTorch versions, and which of them are known to work.

The only module that looks at a version. Everything else asks here.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

from gatefuse import settings

__all__ = [
    "TESTED_TORCH",
    "TESTED_VLLM",
    "batch_invariant",
    "drops_rounding_casts",
    "forget_output_code",
    "graph_phase",
    "inductor_options",
    "on_output_code",
    "switched_off",
    "trace_artifact",
    "unsupported_reason",
    "warn_unsupported",
]

TESTED_TORCH = ((2, 11), (2, 15))
"""First and last minor version of PyTorch that the test suite has passed on."""
TESTED_VLLM = ("0.26.0", "0.32.0", "0.33.0")
"""Versions of vLLM with which engines have run. Others are probed by their features."""

log = logging.getLogger("gatefuse")
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


def switched_off() -> str | None:
    """What keeps ``torch.compile`` from compiling anything in this process, or None."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return None
    for variable in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"):
        if os.environ.get(variable) == "1":
            return f"{variable} is set"
    if dynamo.config.disable:
        return "torch._dynamo.config.disable is set"
    if getattr(getattr(dynamo.eval_frame, "_stance", None), "stance", "") == "force_eager":
        return 'torch.compiler.set_stance("force_eager") is in force'
    return None


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Add a text to PyTorch's structured trace (``TORCH_TRACE``), where there is one."""
    try:
        from torch._logging import trace_structured

        trace_structured("artifact", lambda: {"name": name, "encoding": "string"}, payload_fn=text)
    except Exception:
        log.debug("gatefuse: nothing was added to the structured trace", exc_info=True)


_waiting: dict[int, list[tuple[object, Callable[[str], None]]]] = {}
_earlier: Callable[[str], None] | None = None
"""What is on Inductor's hook otherwise."""


def on_output_code(see: Callable[[str], None]) -> None:
    """Call ``see`` once, with the source of the module that Inductor generates next in this thread
    in the same compilation; not at all where that fails before.

    By the hook of ``torch._inductor.utils.run_and_get_code``, which keeps working; where there is
    no such hook, nothing happens.
    """
    global _earlier
    try:
        from torch._inductor.graph import GraphLowering

        current = GraphLowering.save_output_code
    except (ImportError, AttributeError):
        return
    _waiting.setdefault(threading.get_ident(), []).append((_compilation(), see))
    if current is not _save_output_code:
        _earlier = current
        GraphLowering.save_output_code = _save_output_code


def forget_output_code() -> list[tuple[object, Callable[[str], None]]]:
    """Undo :func:`on_output_code` for this thread; returns who waited, in which compilation."""
    global _earlier
    waiting = _waiting.pop(threading.get_ident(), [])
    lowering: Any = getattr(sys.modules.get("torch._inductor.graph"), "GraphLowering", None)
    if not _waiting and getattr(lowering, "save_output_code", None) is _save_output_code:
        lowering.save_output_code, _earlier = _earlier, None
    return waiting


def _save_output_code(code: str) -> None:
    if _earlier is not None:
        _earlier(code)
    now = _compilation()
    for compilation, see in forget_output_code():
        try:
            if compilation == now:
                see(code)
        except Exception:
            log.debug("gatefuse: the generated code was not kept", exc_info=True)


def _compilation() -> object:
    """Identifies what Dynamo is compiling, where it is."""
    try:
        from torch._guards import CompileContext

        return CompileContext.current_compile_id()
    except (ImportError, AttributeError):
        return None


def drops_rounding_casts(device_type: str) -> bool:
    """Whether Inductor's code for the device keeps a value in float32 where its IR converts it to a
    narrower type and back: its C++ did so before PyTorch 2.13."""
    return device_type == "cpu" and _torch_version() < (2, 13)


def batch_invariant() -> bool:
    """Whether Inductor is told that a row's result must not depend on the number of rows."""
    config: Any = sys.modules.get("torch._inductor.config")
    return config is not None and (
        getattr(config, "batch_invariant", False) or getattr(config, "deterministic", False)
    )


def inductor_options(mode: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """What ``torch.compile(mode=mode, options=options)`` sets in Inductor's configuration; raises
    its errors on an unknown mode or option."""
    return dict(torch._TorchCompileInductorWrapper(mode, options or None, None).config)


def graph_phase() -> str:
    """What Inductor's passes are working on, by AOTAutograd's account: ``"inference"``,
    ``"forward"`` (of training) or ``"backward"``; ``"subgraph"`` for the body of a higher-order
    operator, which Inductor visits before the graph that calls it."""
    from torch._dynamo import compiled_autograd
    from torch._functorch.aot_autograd import get_aot_compilation_context

    if _depth_of_subgraph() > 0:
        return "subgraph"
    if compiled_autograd.in_compiled_autograd_region:
        return "backward"
    graphs: list[str] = get_aot_compilation_context()[0]  # such as ["0_forward"]
    phase = graphs[-1].rpartition("_")[2] if graphs else ""
    return phase if phase in ("forward", "backward") else "inference"


def _depth_of_subgraph() -> int:
    # Nothing in a subgraph tells that it is one: the function that runs the passes calls itself.
    # It is found by its code, so that a new name in Inductor is an error here, not a wrong answer.
    from torch._inductor import compile_fx

    code = compile_fx._recursive_post_grad_passes.__code__
    frame: FrameType | None = sys._getframe()
    depth = -1
    while frame is not None:
        depth += frame.f_code is code
        frame = frame.f_back
    return depth
