"""The recipes for several processes: two of them, on the CPU, train for a step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.recipes.page import LAYERS, Model, loss_of
from tests.recipes.ranks import RANKS
from tests.support.comparison import INSTALLED
from tests.support.judge import judge
from tests.support.programs import REPOSITORY

pytestmark = [
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
        reason="this PyTorch has no gloo",
    ),
    pytest.mark.skipif(
        not INSTALLED, reason="gatefuse is not installed, so its backend has no name"
    ),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, by recipe."""
    folder = tmp_path_factory.mktemp("ranks")
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-m", "tests.recipes.ranks"]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder)], env=environment, cwd=REPOSITORY)
        for rank in range(RANKS)
    ]
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * RANKS
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize(("name", "gates"), [("fsdp2", 1), ("ddp", LAYERS)])
def test_a_step(found: list[dict[str, Any]], name: str, gates: int) -> None:
    """FSDP2: the layers share one compilation, so one gate is fused for both."""
    model = Model()
    with torch.no_grad():
        eager, exact = loss_of(model), loss_of(model.double())
    for rank in found:
        assert rank[name]["fused"] == [gates]
        assert rank[name]["gradients"]
        judge("loss", torch.tensor(rank[name]["loss"]), eager, exact)
