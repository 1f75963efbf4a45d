"""Two processes that train together, on the CPU and on two GPUs: tensor parallelism, DTensors,
FSDP2, DDP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.routes import ranks
from tests.support.programs import REPOSITORY

DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
            reason="this PyTorch has no gloo",
        ),
    ),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(torch.cuda.device_count() < ranks.RANKS, reason="no two GPUs"),
        ],
    ),
]


def run_ranks(folder: Path, device: str, *names: str) -> list[dict[str, Any]]:
    """What each rank found, by case."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "tests.routes.ranks"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(folder), device, *names], env=environment, cwd=REPOSITORY
        )
        for rank in range(ranks.RANKS)
    ]
    try:
        for process in processes:
            process.wait(timeout=400)
    finally:
        for process in processes:
            process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks.RANKS)]


@pytest.fixture(scope="module", params=DEVICES)
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """All cases, one after the other in the same two processes."""
    return run_ranks(tmp_path_factory.mktemp("ranks"), request.param, *ranks.CASES)


def of_case(found: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """What both ranks found in a case; fails with the error of a rank, if there is one."""
    for rank in found:
        assert name in rank, f"an earlier case failed: {list(rank.values())[-1]}"
        assert "error" not in rank[name], rank[name]["error"]
    return [rank[name] for rank in found]


@pytest.mark.parametrize("name", ["tensor_parallel", "dtensors", "fsdp2", "ddp"])
def test_the_gate_is_fused(found: list[dict[str, Any]], name: str) -> None:
    """And its gradients are rewritten."""
    for rank in of_case(found, name):
        assert sum(rank["fused"]) == 1, rank
        assert rank["gradients"] == 1, rank


def test_a_graph_that_ddp_splits(found: list[dict[str, Any]]) -> None:
    """The gate is in another graph than its product: left alone, and the report says why."""
    for rank in of_case(found, "ddp_split"):
        assert len(rank["fused"]) > 1
        assert sum(rank["fused"]) == 0
        (reason,) = rank["reasons"]
        assert "not multiplied with anything in this graph" in reason
        assert "optimize_ddp" in reason
