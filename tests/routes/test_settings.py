"""Settings of PyTorch's that choose other code: deterministic algorithms, the compile modes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import gatefuse
from tests.routes.gates import judge_all, make_expert, make_input, train_step
from tests.support.comparison import compile_and_compare


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_deterministic_algorithms(grad: bool) -> None:
    """The same bits in every run, and the gate fused."""
    runs = [
        compile_and_compare(make_expert(), (make_input(grad=grad),), grad=grad) for _ in range(2)
    ]
    runs[0].check()
    assert all(torch.equal(a, b) for a, b in zip(runs[0].fused, runs[1].fused, strict=True))
    assert sum(g.fused for g in runs[0].report.graphs if g.phase != "backward") == 1


@pytest.mark.parametrize(
    "mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
)
def test_training_in_every_mode(mode: str) -> None:
    model, x = make_expert(), make_input(grad=True)
    eager = train_step(model, x)
    with gatefuse.fusing() as report:
        fused = train_step(torch.compile(model, mode=mode), x)  # type: ignore[arg-type]
    judge_all(fused, eager, train_step(model.double(), x.detach().double().requires_grad_()))
    assert next(g.phase for g in report.graphs if g.fused) == "forward"
