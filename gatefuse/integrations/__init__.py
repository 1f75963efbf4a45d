"""Integrations with other projects. Nothing here imports them before it is needed."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["LazyVllmPass"]


class LazyVllmPass:
    """Stands for ``gatefuse.integrations.vllm.VllmGateFusionPass()`` without importing vLLM.

    vLLM resolves the string ``"gatefuse.vllm_pass"`` by a look-up in the module's ``__dict__`` and
    asks ``isinstance(value, InductorPass)``: the attribute has to be there before anyone asks for
    it, and has to be a pass once vLLM is there. Copies and pickles are the pass itself.
    """

    def _pass(self) -> Any:
        from gatefuse.integrations import vllm

        if "_real" not in self.__dict__:
            self.__dict__["_real"] = vllm.make_pass()
        return self.__dict__["_real"]

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        if "vllm.compilation.passes.inductor_pass" in sys.modules:
            return self._pass().__class__
        return LazyVllmPass

    def __call__(self, graph: Any) -> None:
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
