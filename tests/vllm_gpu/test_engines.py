"""Real vLLM engines that need a GPU: quantised experts, LoRA, weights loaded anew.

Needs vLLM and a GPU; gatefuse need not be installed. Each engine is a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm_cpu import tiny
from tests.vllm_cpu.conftest import NO_CACHES, OP
from tests.vllm_gpu import checkpoints

ROOT = Path(__file__).parents[2]
ENGINE = ROOT / "tests" / "vllm_cpu" / "engine.py"
OFF = {"GATEFUSE_DISABLE": "1"}
WAIT = 450
NEAR = 0.03  # of the log-probabilities' spread; other gates make more than five times that
#: Activations of four bits make much of a last bit.
ALLOWED = {"compressed-tensors NVFP4": 0.1}
FUSED = "gatefuse: 2 of 2 shared-expert gates fused (placement inline)"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(2 * WAIT + 100),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@dataclass
class Engine:
    """A running engine; see tests/vllm_cpu/engine.py."""

    process: subprocess.Popen[bytes]
    out: Path

    def finish(self) -> tuple[dict[str, Any], list[str]]:
        """What it did, and gatefuse's lines in its log."""
        code = self.process.wait(timeout=WAIT)
        log = self.out.with_suffix(".log").read_text()
        assert code == 0, log[-8000:]
        return torch.load(self.out, weights_only=False), re.findall(r"gatefuse: .*", log)


Start = Callable[..., Engine]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts an engine of the model in a folder, on a GPU that goes by the worker's number."""
    from benchmarks.vllm.__main__ import write_entry_point  # imports pandas

    (tmp_path / "site").mkdir()
    write_entry_point(tmp_path / "site")
    started: list[subprocess.Popen[bytes]] = []

    def start(model: Path, label: str, variables: dict[str, str], **arguments: Any) -> Engine:
        out = tmp_path / f"{label}.pt"
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        everything = ",".join(map(str, range(torch.cuda.device_count())))
        devices = os.environ.get("CUDA_VISIBLE_DEVICES", everything).split(",")
        path = [str(tmp_path / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        with out.with_suffix(".log").open("w") as log:
            process = subprocess.Popen(
                [
                    sys.executable,
                    str(ENGINE),
                    str(out),
                    json.dumps(
                        {
                            "model": str(model),
                            "compilation_config": {"mode": 3},
                            "kv_cache_memory_bytes": 1 << 28,
                            "gpu_memory_utilization": 0.02,
                        }
                        | arguments
                    ),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ
                | NO_CACHES
                | {
                    "PYTHONPATH": os.pathsep.join(filter(None, path)),
                    "CUDA_VISIBLE_DEVICES": devices[worker % len(devices)],
                    "HF_HUB_OFFLINE": "1",
                    "VLLM_NO_USAGE_STATS": "1",
                    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                    "VLLM_CACHE_ROOT": str(tmp_path / "vllm"),
                    "TORCHINDUCTOR_COMPILE_THREADS": "4",
                }
                | variables,
            )
        started.append(process)
        return Engine(process, out)

    yield start
    for process in started:
        process.kill()
        process.wait()


def distance(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """Of log-probabilities, over their spread about each position's mean."""
    assert mine.isfinite().all()
    return float((mine - theirs).norm() / (theirs - theirs.mean(-1, keepdim=True)).norm())


def pair(
    start: Start,
    model: Path,
    gates: int = 2,
    near: float = NEAR,
    variables: dict[str, str] | None = None,
    **arguments: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The results of engines with the plugin and without, which agree; all gates are fused."""
    variables = variables or {}
    engines = (
        start(model, "fused", variables, **arguments),
        start(model, "plain", variables | OFF, **arguments),
    )
    (fused, lines), (plain, none) = engines[0].finish(), engines[1].finish()
    assert lines == [FUSED.replace("2", str(gates))]
    assert not none
    assert sum(graph.count(OP) for graph in fused["graphs"]) >= gates
    assert not any(OP in graph for graph in plain["graphs"])
    found = distance(torch.cat(fused["prompt"]), torch.cat(plain["prompt"]))
    print(f"distance {found:.4f}")
    assert found <= near
    return fused, plain


@pytest.mark.parametrize("format", checkpoints.FORMATS)
def test_quantised(start: Start, tmp_path: Path, format: str) -> None:
    """Checkpoints whose experts and linears are quantised and whose gates are not."""
    model = checkpoints.build(tmp_path / "model", format)
    pair(start, model, near=ALLOWED.get(format, NEAR), **checkpoints.BACKENDS.get(format, {}))


def test_quantised_as_it_loads(start: Start, tmp_path: Path) -> None:
    """A bfloat16 checkpoint with --quantization fp8."""
    pair(start, checkpoints.build(tmp_path / "model"), quantization="fp8")


def test_lora(start: Start, tmp_path: Path) -> None:
    """An adapter that leaves the gate out, as the engine was told: gates are fused."""
    model = checkpoints.build(tmp_path / "model")
    adapter = checkpoints.build_adapter(tmp_path / "adapter", model)
    fused, plain = pair(
        start,
        model,
        enable_lora=True,
        max_lora_rank=checkpoints.RANK,
        lora_target_modules=checkpoints.ADAPTED,
        adapter=str(adapter),
    )
    assert distance(fused["adapted"], plain["adapted"]) <= NEAR
    assert distance(plain["adapted"], torch.cat(plain["prompt"])) > 5 * NEAR, "it adapts something"


def test_lora_anywhere(start: Start, tmp_path: Path) -> None:
    """An engine in which an adapter may come for the gate: left, with the reason."""
    model = checkpoints.build(tmp_path / "model")
    result, lines = start(model, "left", {}, enable_lora=True).finish()
    assert len(lines) == 1
    assert lines[0].startswith("gatefuse: 2 shared-expert gates left to vLLM: LoRA may adapt")
    assert not any(OP in graph for graph in result["graphs"])


def test_weights_are_loaded_anew(start: Start, tmp_path: Path) -> None:
    """Compiled code, in CUDA graphs, takes new weights of the gates, and then its own again."""
    model = tiny.build(tmp_path / "model", "qwen2_moe", **checkpoints.EXPERTS)
    other = tiny.build(tmp_path / "other", "qwen2_moe", gates=-2.0, **checkpoints.EXPERTS)
    fused, plain = pair(start, model, reload=[str(other), str(model)])
    changed, back = plain["reloaded"]
    assert distance(changed, back) > 5 * NEAR, "gates matter"
    for mine, theirs in zip(fused["reloaded"], plain["reloaded"], strict=True):
        assert distance(mine, theirs) <= NEAR
    assert torch.equal(fused["reloaded"][1], torch.cat(fused["prompt"]))


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_multi_token_prediction(start: Start, tmp_path: Path, runner: str) -> None:
    """The draft's gate is fused as well, by either of vLLM's model runners."""
    model = tiny.build(tmp_path / "model", "qwen3_next", **checkpoints.EXPERTS)
    draft = {"method": "qwen3_next_mtp", "num_speculative_tokens": 1}
    pair(
        start,
        model,
        gates=5,
        variables={"VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "V2"))},
        speculative_config=draft,
        additional_config={"gdn_prefill_backend": "triton"},
    )
