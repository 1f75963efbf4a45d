"""vLLM: the plugin that makes ``vllm serve`` fuse its gates, and the pass for those who add it.

vLLM calls :func:`register` (entry point ``vllm.general_plugins``) in each of its processes. It
changes nothing by itself: when a model with a shared-expert gate is built, the gate is hoisted out
of vLLM's opaque MoE op (:mod:`gatefuse.integrations.vllm.moe_runner`) and the pass is added to that
engine's compilation config. Models without such a gate, and engines that do not compile with
Inductor, are not touched.

Importing this module imports neither vLLM nor Inductor.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from gatefuse import compat, settings

__all__ = ["LazyVllmPass", "register"]

# A child of vLLM's logger, so that vLLM's own set-up of levels and handlers applies.
log = logging.getLogger("vllm.gatefuse")


def __getattr__(name: str) -> Any:
    if name == "VllmGateFusionPass":
        from gatefuse.integrations.vllm import passes

        return passes.pass_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class LazyVllmPass:
    """Stands for ``VllmGateFusionPass()`` without importing vLLM.

    A plain function would not do: vLLM wraps one in a pass whose id, part of its cache key, is a
    hash of the function's source alone, so that code compiled with other options, or by another
    gatefuse, would be taken from the cache.

    vLLM resolves the string ``"gatefuse.vllm_pass"`` by a look-up in the module's ``__dict__`` and
    asks ``isinstance(value, InductorPass)``: the attribute has to be there before anyone asks for
    it, and has to be a pass once vLLM is there. Copies and pickles are the pass itself.
    """

    def _pass(self) -> Any:
        from gatefuse.integrations.vllm import passes

        if "_real" not in self.__dict__:
            self.__dict__["_real"] = passes.make_pass()
        return self.__dict__["_real"]

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The pass's own class once vLLM's is imported, for ``isinstance``."""
        if "vllm.compilation.passes.inductor_pass" in sys.modules:
            return self._pass().__class__
        return LazyVllmPass

    def __call__(self, graph: Any) -> None:
        """Run the pass."""
        self._pass()(graph)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._pass(), name)

    def __reduce__(self) -> Any:
        return self._pass().__reduce__()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()

    def __repr__(self) -> str:
        return "gatefuse.vllm_pass"


_registered = False


def register() -> None:
    """Entry point of the plugin. Idempotent; does nothing with ``GATEFUSE_DISABLE=1``."""
    global _registered
    if _registered or settings.disabled_by_environment():
        return
    _registered = True
    if (reason := compat.unsupported_reason()) is not None:
        log.warning("gatefuse: vLLM is left as it is: %s", reason)
        return
    from gatefuse.integrations.vllm import moe_runner

    moe_runner.install()
