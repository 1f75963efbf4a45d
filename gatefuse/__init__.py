"""gatefuse: fuses ``sigmoid(linear(x, w)) * value``, the shared-expert gate, in compiled models."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from gatefuse import ops
from gatefuse.integrations.vllm import LazyVllmPass
from gatefuse.ops import linear_sigmoid_mul, linear_sigmoid_mul_reference
from gatefuse.settings import Options

if TYPE_CHECKING:
    from gatefuse.backend import disable, enable, fusing, options
    from gatefuse.explaining import explain
    from gatefuse.recording import record
    from gatefuse.report import FusionError, Report
    from gatefuse.scanning import ScanError, scan

__version__ = "0.2.0"

__all__ = [
    "FusionError",
    "Options",
    "Report",
    "ScanError",
    "disable",
    "enable",
    "explain",
    "fusing",
    "linear_sigmoid_mul",
    "linear_sigmoid_mul_reference",
    "options",
    "record",
    "scan",
    "vllm_pass",
]

#: For vLLM's ``inductor_passes``: the string "gatefuse.vllm_pass". It is looked up in this module's
#: ``__dict__``, so that it cannot be made on demand.
vllm_pass = LazyVllmPass()

_LAZY = {
    "FusionError": "gatefuse.report",
    "Report": "gatefuse.report",
    "ScanError": "gatefuse.scanning",
    "disable": "gatefuse.backend",
    "enable": "gatefuse.backend",
    "explain": "gatefuse.explaining",
    "fusing": "gatefuse.backend",
    "options": "gatefuse.backend",
    "record": "gatefuse.recording",
    "scan": "gatefuse.scanning",
}


def __getattr__(name: str) -> Any:
    # Inductor is imported when it is needed, not by `import gatefuse`.
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'gatefuse' has no attribute {name!r}")


def _register_lowerings() -> None:
    from gatefuse import compat

    if "torch._inductor.lowering" in sys.modules and compat.unsupported_reason() is None:
        from gatefuse.inductor import lowering

        lowering.register()


ops.before_tracing = _register_lowerings
