"""`gatefuse bench`: its workloads, timing, check against float64, refusals and command."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gatefuse import cli
from gatefuse.bench import run
from gatefuse.bench.cases import LEAST_TRAFFIC, NO_GATE, TRAINING, Case, Provider
from gatefuse.bench.measure import checker, compile_case, compile_provider, time_providers
from gatefuse.bench.timing import COLD_FACTOR, Replay, cache_bytes, columns, interleaved, plan
from gatefuse.bench.workloads import bytes_of, call, make_set
from gatefuse.inductor import cost_model


def test_the_gate_less_glue_differs_by_the_gate_alone() -> None:
    """With the gate wide open (weights of zero give one half) the outputs are those without."""
    with torch.no_grad():
        module, inputs = make_set("glue", 32, 5, torch.float64, "cpu")
        plain, _ = make_set("glue" + NO_GATE, 32, 5, torch.float64, "cpu")
        plain.load_state_dict(module.state_dict(), strict=False)
        module.gate.weight.zero_()
        doubled = module(*inputs[:2], 2 * inputs[2])
        torch.testing.assert_close(doubled, plain(*inputs))


@pytest.mark.parametrize("name", ["mul", "add", "glue", "glue" + NO_GATE])
def test_byte_count_is_that_of_the_tensors(name: str) -> None:
    module, inputs = make_set(name, 32, 5, torch.bfloat16, "cpu")
    read = sum(t.nbytes for t in (*module.parameters(), *inputs))
    moved = read + sum(t.nbytes for t in module(*inputs))
    assert bytes_of(name, 32, 5, torch.bfloat16) == (read, moved)
    if name in ("mul", "add"):
        roofline = sum(t.nbytes for t in (*inputs, *module.roofline(*inputs)))
        assert moved - module.gate.weight.nbytes == roofline


@pytest.mark.parametrize("name", ["mul", "add"])
def test_the_op_computes_the_workload(name: str) -> None:
    with torch.no_grad():
        module, inputs = make_set(name, 64, 7, torch.bfloat16, "cpu")
        checker(module, inputs)(module.op(*inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["mul", "add", "glue", "glue" + NO_GATE])
def test_reference_accepts_eager_and_nothing_broken(name: str, dtype: torch.dtype) -> None:
    with torch.no_grad():
        module, inputs = make_set(name, 128, 40, dtype, "cpu")
        check = checker(module, inputs)
        outputs = call(module, *inputs)
        check(outputs)
        for i in range(len(outputs)):
            for damage in (math.nan, 0.0):
                broken = [y.clone() for y in outputs]
                flat = broken[i].view(-1)
                flat[flat.abs().argmax()] = damage  # one element unwritten
                with pytest.raises(AssertionError, match=f"output {i}"):
                    check(tuple(broken))
        scaled = tuple(y * 1.02 for y in outputs)
        with pytest.raises(AssertionError):
            check(scaled)


@pytest.mark.parametrize("set_bytes", [1, 10_000, 1 << 20, 1 << 28])
@pytest.mark.parametrize("kernels", [1, 3])
def test_plan_rotates_whole_sets_through_a_long_sample(set_bytes: int, kernels: int) -> None:
    made = plan(set_bytes, 2 * set_bytes, kernels, "cpu")
    sets, calls = made
    assert calls % sets == 0
    assert 2 <= sets <= calls
    cold = sets * set_bytes >= COLD_FACTOR * cache_bytes("cpu")
    assert cold or sets == calls  # else no set is used twice


def test_timing_statistics() -> None:
    timing = columns([5.0, 1.0, 2.0, 3.0, 4.0], calls=7)
    assert timing == {"median_us": 3.0, "p10_us": 1.4, "p90_us": 4.6, "repeats": 5, "calls": 7}


def test_interleaved_takes_one_sample_of_each_provider_in_a_round() -> None:
    order: list[str] = []

    def provider(name: str, seconds: float) -> Replay:
        def run(i: int) -> tuple[torch.Tensor, ...]:
            order.append(f"{name}{i}")
            time.sleep(seconds)
            return ()

        return Replay(run, 2, "cpu", None)

    timings = interleaved({"a": provider("a", 0.001), "b": provider("b", 0.004)}, 20, "cpu")
    rounds = [order[i : i + 4] for i in range(0, len(order), 4)]
    assert len(rounds) == 22
    assert {tuple(r) for r in rounds} == {("a0", "a1", "b0", "b1"), ("b0", "b1", "a0", "a1")}
    # What comes first in a round may be at a disadvantage: each provider does as often.
    assert sum(r[0] == "a0" for r in rounds[2:]) == 10
    assert timings["a"]["repeats"] == 20
    assert 1000 <= timings["a"]["median_us"] < timings["b"]["median_us"]
    assert timings["b"]["median_us"] >= 4000


def test_a_provider_that_fuses_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be Inductor measured against itself."""
    monkeypatch.setenv("GATEFUSE_DISABLE", "1")
    with torch.no_grad():
        hint = make_set("mul", 32, 4, torch.float32, "cpu")
        refused = compile_provider(Provider("mul", "gatefuse-auto", "default"), hint)
        plain = compile_provider(Provider("mul", "inductor", "default"), hint)
        assert "0 gates were fused, not 1" in str(refused.error)
        assert plain.error is None
        case = Case("mul", 32, (4,), dtype="float32", device="cpu")
        rows = time_providers([refused, plain], 4, case, rounds=2)
    assert "0 gates were fused" in rows[0]["error"] and "median_us" not in rows[0]
    assert rows[1]["median_us"] > 0


def test_a_fusion_where_there_should_be_none_is_refused() -> None:
    with torch.no_grad():
        hint = make_set("mul", 32, 4, torch.float32, "cpu")
        # By its name the control without a gate; the module has one.
        control = compile_provider(Provider("mul" + NO_GATE, "gatefuse-auto", "default"), hint)
    assert "1 gates were fused, not 0" in str(control.error)


def test_a_gate_that_is_left_alone_for_speed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_model, "LARGE_RESULT", {4: 1})
    case = Case("glue", 32, (4,), dtype="float32", device="cpu")
    with torch.no_grad():
        runs = compile_case(case, 4)
    (fused, *_) = [run for run in runs if run.provider.gates]
    assert fused.error is None
    assert fused.facts["fused"] == 0
    assert "fusing would be slower" in fused.facts["left_alone"]


def test_wrong_outputs_are_not_timed() -> None:
    case = Case("mul", 32, (4,), dtype="float32", device="cpu")
    with torch.no_grad():
        hint = make_set("mul", 32, 4, torch.float32, "cpu")
        wrong = compile_provider(Provider("mul", "eager"), hint)
        wrong.function = lambda module, *inputs: (call(module, *inputs)[0] * 1.02,)
        (row,) = time_providers([wrong], 4, case, rounds=2)
    assert "rms error" in row["error"] and "median_us" not in row


def test_the_command_prints_a_table_and_writes_the_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    assert content["header"]["torch"] == torch.__version__
    assert content["header"]["quick"]
    assert content["not_run"] == []
    assert all(row["median_us"] > 0 for row in content["rows"])
    out = capsys.readouterr().out
    assert run.table(content["rows"], compared=False) in out
    assert [line.split()[0] for line in out.splitlines()[1:4]] == ["add", "glue", "mul"]
    # Times of toys are no reason to use gatefuse, or not to.
    assert not re.search(r"\dx\b|speed-up|roofline|noise", out)
    assert run.TOY in out


def test_the_command_stops_in_time_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main([*arguments, "--time-budget", "-1"]) == 2
    (path,) = tmp_path.glob("*.json")
    assert len(json.loads(path.read_text())["not_run"]) == 3
    first, *_ = capsys.readouterr().out.splitlines()
    assert first == "Nothing was measured: the -1 s of --time-budget were over."


def test_the_command_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_the_command_where_nothing_can_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said before anything is measured."""
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "folder"):
        assert cli.main(["bench", "--device", "cpu", "--out", str(out)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{out}" in line and "cannot be written" in line


def measured(times: dict[tuple[str, str], float], spread: float = 0.0) -> list[dict[str, Any]]:
    """Rows with these medians in µs; ``spread`` is from the 10th to the 90th percentile."""
    return [
        {"workload": workload, "provider": provider, "H": 8, "N": 2, "dtype": "float32"}
        | {"median_us": us, "p10_us": us - spread / 2, "p90_us": us + spread / 2}
        for (workload, provider), us in times.items()
    ]


TIMES = {
    ("mul", "inductor"): 4.0,
    ("mul", "gatefuse-auto"): 2.0,
    ("mul", "roofline"): 1.5,
    ("glue", "inductor"): 9.0,
    ("glue", "gatefuse-auto"): 6.0,
    ("glue" + NO_GATE, "inductor"): 5.5,
}


def cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Of the glue and of mul."""
    return [line.split()[4:] for line in run.table(rows).splitlines()[1:]]


def test_the_table_compares_with_inductor_and_without_the_gate() -> None:
    glue, mul = cells(measured(TIMES))
    assert glue == ["9", "(9..9)", "6", "(6..6)", "1.50x", "3.5", "0.5"]
    assert mul == ["4", "(4..4)", "2", "(2..2)", "2.00x", "75"]


def test_a_difference_within_the_spread_is_noise() -> None:
    glue, mul = cells(measured(TIMES, spread=1.0))
    assert glue == ["9", "(8.5..9.5)", "6", "(5.5..6.5)", "1.50x", "3.5", "noise"]
    assert mul == ["4", "(3.5..4.5)", "2", "(1.5..2.5)", "2.00x", "75"]
    glue, mul = cells(measured(TIMES, spread=2.5))
    assert (glue[4:], mul[4:]) == (["1.50x", "3.5", "noise"], ["noise", "75"])
    # A slower gatefuse is told in the same way.
    slower = TIMES | {("mul", "gatefuse-auto"): 5.0}
    assert [cells(measured(slower, spread=s))[1][4] for s in (0.5, 1.5)] == ["0.80x", "noise"]


def test_compiles_that_differ_are_spread_too() -> None:
    again = measured({("mul", "inductor"): 2.5})
    _, mul = cells(measured(TIMES) + again)
    assert mul == ["3.25", "(2.5..4)", "2", "(2..2)", "noise", "75"]


def test_what_failed_is_not_compared() -> None:
    rows = measured(TIMES)
    for row in rows:
        if row["provider"] == "gatefuse-auto":
            row["error"] = "x"
    assert cells(rows) == [["9", "(9..9)", "failed", "3.5"], ["4", "(4..4)", "failed"]]


def test_training_is_checked_and_timed_with_its_gradients() -> None:
    """The gradients of the op pass, a wrong one does not; the roofline moves the least bytes."""
    with torch.no_grad():
        module, inputs = make_set("add" + TRAINING, 64, 7, torch.bfloat16, "cpu")
        outputs = module.op(*inputs)
        check = checker(module, inputs)
        check(outputs)
        assert len(outputs) == 4  # the result; gradients of input, value and weight
        for i in range(1, 4):
            with pytest.raises(AssertionError):
                check([y * 1.05 if i == j else y for j, y in enumerate(outputs)])
        read = sum(t.nbytes for t in (*inputs[:2], *module.roofline(*inputs)))
        elements = 9 * inputs[0].numel() * inputs[0].element_size()
        assert read * LEAST_TRAFFIC["add" + TRAINING] == elements


def test_training_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "training", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main([*command, "--time-budget", "600"]) == 0
    assert "glue-training H=128 N=2" in capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    rows = json.loads(path.read_text())["rows"]
    assert {r["workload"] for r in rows} == {name + TRAINING for name in ("mul", "add", "glue")}
    assert all("error" not in r for r in rows)
