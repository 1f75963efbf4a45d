"""Engines that take turns, and engines that are not what their provider claims. No vLLM is needed:
where a process imports it, it is a stand-in that loads plugins as vLLM does."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.extra import need

need()

from benchmarks import model_zoo
from benchmarks.vllm import __main__ as vllm_benchmark
from benchmarks.vllm.engine import Workload
from benchmarks.vllm.group import EngineError, Group, Remote, refusal

FUSED = ["gatefuse: 24 of 24 shared-expert gates fused (placement inline)"]
NONE = ["gatefuse: 0 of 24 shared-expert gates fused (placement none)"]


@pytest.mark.parametrize(
    ("provider", "lines", "hand_gates", "problem"),
    [
        ("plugin", FUSED, 0, None),
        ("plugin-no-overlap", FUSED, 0, None),
        ("plugin", [], 0, "no gate was fused"),
        ("plugin", NONE, 0, "no gate was fused"),
        ("vllm", [], 0, None),
        ("vllm", FUSED, 0, "fused 24 gates"),
        ("vllm-no-overlap", FUSED, 0, "fused 24 gates"),
        ("hand-kernel", [], 24, None),
        ("hand-kernel", [], 0, "no gate has the hand-written kernel"),
        ("hand-kernel", FUSED, 24, "fused 24 gates"),
    ],
)
def test_an_engine_is_what_its_provider_claims(
    provider: str, lines: list[str], hand_gates: int, problem: str | None
) -> None:
    found = refusal(provider, {"lines": lines, "hand_gates": hand_gates})
    assert (found is None) if problem is None else problem in str(found)


VLLM = """
import importlib.metadata
from types import SimpleNamespace as Of

__version__ = "0"

class LLM:
    def __init__(self, **arguments):
        for plugin in importlib.metadata.entry_points(group="vllm.general_plugins"):
            if plugin.name == "gatefuse" and plugin.dist.version == "0":  # not an installed one
                print("gatefuse: 2 of 2 shared-expert gates fused (placement inline)")
        mode = Of(name="VLLM_COMPILE")
        compilation = Of(mode=mode, cudagraph_mode="NONE")
        config = Of(compilation_config=compilation, scheduler_config=Of(async_scheduling=False))
        model = Of(get_vocab_size=lambda: 9)
        self.llm_engine = Of(model_config=model, vllm_config=config)
"""


@pytest.mark.parametrize("found", [True, False])
def test_a_spawned_engine_finds_the_plugin_or_is_refused(
    found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder with gatefuse's entry points reaches a spawned process, which takes over its
    parent's sys.path and not PYTHONPATH."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "vllm.py").write_text(VLLM)
    (tmp_path / "site").mkdir()
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: [])  # it is not installed
    vllm_benchmark.write_entry_point(tmp_path / "site")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "fake"), *sys.path])
    content: dict[str, Any] = {"engines": {}, "errors": [], "rows": []}
    site = tmp_path / ("site" if found else "nowhere")
    engine = Remote(
        "plugin",
        {},
        vllm_benchmark.environment_of("plugin", site),
        tmp_path / "log",
        time.monotonic() + 200,
    )
    group = Group([engine], content)
    try:
        group.wait([Workload("decode-16", 16, 32, 128)], 0)
    finally:
        group.close()
    if found:
        assert content["errors"] == []
        assert content["engines"]["plugin"]["lines"]
    else:
        assert content["errors"][0].startswith("plugin: refused, for no gate was fused")
        assert content["rows"] == []


def test_a_refused_engine_is_not_timed() -> None:
    content: dict[str, Any] = {"engines": {}, "errors": [], "rows": []}
    log: list[str] = []
    engines = [FakeEngine("vllm", log), FakeEngine("hand-kernel", log)]
    group = Group(engines, content)  # type: ignore[arg-type]
    group.wait([Workload("decode-16", 16, 32, 128)], 0)
    assert [row["provider"] for row in content["rows"]] == ["vllm"]
    (error,) = content["errors"]
    assert error.startswith("hand-kernel: refused, for no gate has the hand-written kernel")
    assert "hand-kernel is closed" in log
    assert "hand-kernel" not in content["engines"]


class FakeEngine:
    """An engine that answers at once, and notes what it is asked in a log of all."""

    def __init__(self, provider: str, log: list[str], fails: bool = False) -> None:
        self.provider, self.log, self.fails = provider, log, fails

    def ask(self, method: str, workload: Workload) -> None:
        self.log.append(f"{self.provider} begins {workload.name}")

    def answer(self) -> Any:
        self.log.append(f"{self.provider} ends")
        if self.fails:
            raise EngineError(f"{self.provider}: no answer")
        return {"hand_gates": 0}

    def lines(self) -> list[str]:
        return FUSED if self.provider == "plugin" else []

    def close(self) -> None:
        self.log.append(f"{self.provider} is closed")


@pytest.mark.parametrize("at_once", [False, True])
def test_engines_take_turns_or_work_at_once(at_once: bool) -> None:
    log: list[str] = []
    content: dict[str, Any] = {"engines": {}, "errors": [], "rows": []}
    engines = [FakeEngine(provider, log) for provider in ("vllm", "plugin")]
    group = Group(engines, content, at_once=at_once)  # type: ignore[arg-type]
    group.wait([Workload("decode-16", 16, 32, 128)], 0)
    log.clear()
    group.profile()
    first, second = "vllm begins decode-16", "plugin begins decode-16"
    if at_once:
        assert log == [first, second, "vllm ends", "plugin ends"]
    else:
        assert log == [first, "vllm ends", second, "plugin ends"]
    assert [(row["provider"], row["profile"]) for row in content["rows"]] == [
        ("vllm", {"hand_gates": 0}),
        ("plugin", {"hand_gates": 0}),
    ]

    engines[0].fails = True
    log.clear()
    group.profile()
    assert content["errors"] == ["vllm: no answer"]
    assert "vllm is closed" in log and log[-1] == "plugin ends", "the other one goes on"
    assert group.engines == engines[1:]


def test_engines_without_time_for_a_round_are_an_error() -> None:
    content: dict[str, Any] = {"engines": {}, "errors": [], "rows": []}
    group = Group([FakeEngine("vllm", [])], content)  # type: ignore[list-item]
    group.wait([Workload("decode-16", 16, 32, 128)], 0)
    group.measure(5, time.monotonic(), time.monotonic())
    assert content["errors"] == ["vllm: too little time for a round"]


@pytest.mark.parametrize("model", model_zoo.ENGINE_MODELS)
def test_no_engine_is_asked_for_a_longer_context_than_its_model_has(model: str) -> None:
    arguments = vllm_benchmark.engine_arguments(model, Path("model"), tiny=False, layers=12)
    allowed = model_zoo.engine_config(model)["max_position_embeddings"]
    longest = max(w.tokens_in + w.tokens_out for w in vllm_benchmark.WORKLOADS)
    assert longest <= arguments["max_model_len"] <= allowed


def test_a_workload_that_the_model_cannot_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--out", str(tmp_path), "--model", "qwen2_moe", "--workloads", "prefill-heavy-16"]
    with pytest.raises(SystemExit):
        vllm_benchmark.main(asked)
    assert "workloads of this model are decode-16," in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
