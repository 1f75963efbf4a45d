"""The tiny models of the zoo; a test skips where the installed transformers lacks one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import model_zoo
from benchmarks.model_zoo import GATED, HIDDEN, UNGATED, HiddenStates, embeddings, gates

__all__ = ["GATED", "HIDDEN", "UNGATED", "build", "embeddings", "gates"]


def build(name: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> HiddenStates:
    """As :func:`benchmarks.model_zoo.build`."""
    try:
        return model_zoo.build(name, dtype, **overrides)
    except ImportError as error:
        pytest.skip(f"this transformers has no {name}: {error}")
