"""Stands for torchvision, which vLLM's module of Qwen3.5 imports, for images alone."""

import sys
import types
from typing import Any
from unittest import mock

PARTS = ("io", "transforms", "transforms.functional", "transforms.v2", "transforms.v2.functional")


class Stub(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock(name=name)


for part in PARTS:
    module = sys.modules[f"{__name__}.{part}"] = Stub(part)
    module.__spec__ = __spec__
    parent, _, child = f"{__name__}.{part}".rpartition(".")
    setattr(sys.modules[parent], child, module)
