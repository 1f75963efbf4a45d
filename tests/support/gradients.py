"""The rewrite of a gate's gradients, which is that of a GPU, on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import torch

import gatefuse
from gatefuse.inductor import cost_model

_ON_A_GPU = SimpleNamespace(device=torch.device("cuda"))


@contextlib.contextmanager
def rewritten_gradients(on: bool = True) -> Iterator[None]:
    """Compilations rewrite what they would on a GPU, and take no code from a cache. Not ``on``:
    nothing changes."""
    if not on:
        yield
        return
    decides_for_a_gpu = mock.patch.object(cost_model, "tensor_of", return_value=_ON_A_GPU)
    with decides_for_a_gpu, torch._inductor.config.patch(force_disable_caches=True):
        yield


def are_rewritten() -> bool:
    """Whether this is inside of :func:`rewritten_gradients`."""
    return isinstance(cost_model.tensor_of, mock.Mock)


def rewritten(report: gatefuse.Report) -> int:
    """Gates whose gradients were rewritten; all are, or the reason is the failure."""
    found = [gradients for graph in report.graphs for gradients in graph.gradients]
    assert not [g.reason for g in found if g.reason]
    return sum(g.rewritten > 0 for g in found)
