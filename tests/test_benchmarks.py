"""The benchmark's own logic: marks, merging, plans, the check of outputs, work over processes."""

from __future__ import annotations

import math
import os
import time
from typing import Any

import pytest
import torch

from benchmarks import grid, report
from benchmarks.chains import CHAINS, call, make_set
from benchmarks.core import Reference, arms_of, cells_of
from benchmarks.timing import COLD_FACTOR, Replay, Timing, cache_bytes, interleaved, plan
from benchmarks.workers import DeviceLock, spread

MODES = grid.MODES


def core_rows(shapes: str) -> list[dict[str, Any]]:
    """Rows of a complete run that reaches every mark."""
    rows = []
    modes = MODES if shapes == "static" else MODES[:1]
    for chain in grid.FAMILY:
        for arm in arms_of(chain, modes, shapes == "static"):
            us = {"eager": 9.0, "limit": 1.0, "inductor": 5.0}.get(arm.name, 2.0)
            if chain == "glue_nogate":
                us = 1.5
            for H in grid.WIDTHS:
                for N in grid.ROWS if shapes == "static" else grid.ROWS[1:]:
                    rows.append(
                        {
                            "shapes": shapes,
                            "chain": chain,
                            "arm": arm.name,
                            "mode": arm.mode,
                            "H": H,
                            "N": N,
                            "dtype": grid.DTYPE,
                            "median_us": us,
                        }
                    )
    return rows


def host_rows() -> list[dict[str, Any]]:
    call_row = {"what": "call", "chain": "mul", "mode": "default", "H": 2048, "N": 2}
    return [
        {**call_row, "arm": "inductor", "median_us": 60.0},
        {**call_row, "arm": "gatefuse-auto", "median_us": 46.0},
        {"what": "import", "median_ms": 12.0, "initialises_cuda": False},
        {"what": "compile", "chain": "mul", "arm": "inductor", "median_s": 1.0, "pass_ms": 0.0},
    ]


def files() -> list[dict[str, Any]]:
    rows = [row for shapes in grid.SHAPES for row in core_rows(shapes)]
    return [
        {"kind": "core", "header": {}, "rows": rows},
        {"kind": "host", "header": {}, "rows": host_rows()},
    ]


def edit(contents: list[dict[str, Any]], change: dict[str, Any], **where: Any) -> None:
    """Apply ``change`` to the rows that have the values ``where``; there must be some."""
    found = [
        row
        for content in contents
        for row in content["rows"]
        if all(row.get(name) == value for name, value in where.items())
    ]
    assert found
    for row in found:
        row.update(change)


def test_a_complete_run_reaches_every_mark() -> None:
    assert report.check(report.collect(files())) == []


STATIC = {"shapes": "static", "H": 4096}
AUTO = {"arm": "gatefuse-auto", "mode": "default"}


@pytest.mark.parametrize(
    ("where", "change", "named"),
    [
        pytest.param(
            {**STATIC, **AUTO, "chain": "glue", "N": 8192},
            {"median_us": 5.16},
            ["glue H=4096 N=8192: default: gatefuse 5.16 us is 1.032 of Inductor's 5.00"],
            id="slower-than-inductor",
        ),
        pytest.param(
            {**STATIC, "arm": "gatefuse-auto", "mode": "max-autotune", "chain": "mul", "N": 1},
            {"median_us": 5.16},
            ["mul H=4096 N=1: max-autotune"],
            id="slower-than-max-autotune",
        ),
        pytest.param(
            {**STATIC, "arm": "inductor", "mode": "coordinate-descent", "chain": "add", "N": 64},
            {"median_us": 1.9},
            [
                "add H=4096 N=64: coordinate-descent",
                "add H=4096 N=64: gatefuse 2.00 us is 1.053 of the best arm's",
            ],
            id="best-arm-is-another-mode",
        ),
        pytest.param(
            {**STATIC, "arm": "gatefuse-inline", "mode": "default", "chain": "mul", "N": 2},
            {"median_us": 1.9},
            ["mul H=4096 N=2: gatefuse 2.00 us is 1.053 of the best arm's"],
            id="forced-placement-is-faster",
        ),
        pytest.param(
            {**STATIC, "chain": "glue_nogate", "N": 256, "arm": "inductor", "mode": "default"},
            {"median_us": 1.39},
            ["glue H=4096 N=256: the gate costs 0.61 us", "glue_nogate H=4096 N=256: default"],
            id="gate-cost",
        ),
        pytest.param(
            {"shapes": "dynamic", "H": 2048, **AUTO, "chain": "add", "N": 32768},
            {"median_us": 5.2},
            ["add H=2048 N=32768 dynamic: default"],
            id="dynamic",
        ),
        pytest.param(
            {**STATIC, "chain": "glue", "N": 16, "arm": "gatefuse-kernel"},
            {"error": "AssertionError('output 0')", "median_us": None},
            ["glue H=4096 N=16: gatefuse-kernel, default failed: AssertionError"],
            id="wrong-arm",
        ),
        pytest.param(
            {"what": "call", "arm": "gatefuse-auto"},
            {"median_us": 60.1},
            ["host mul: gatefuse 60.1 us > Inductor 60.0"],
            id="host",
        ),
        pytest.param({"what": "import"}, {"median_ms": 51.0}, ["import: 51.0 ms"], id="import"),
        pytest.param(
            {"what": "import"},
            {"initialises_cuda": True},
            ["import: initialises CUDA"],
            id="import-cuda",
        ),
    ],
)
def test_check_names_what_misses(
    where: dict[str, Any], change: dict[str, Any], named: list[str]
) -> None:
    contents = files()
    edit(contents, change, **where)
    misses = report.check(report.collect(contents))
    for part in named:
        assert any(part in miss for miss in misses), misses
    assert len(misses) == len(named), misses


def test_noise_is_no_miss() -> None:
    contents = files()
    edit(contents, {"median_us": 5.14}, **STATIC, **AUTO, chain="glue", N=8192)
    edit(contents, {"median_us": 0.5}, shapes="static", arm="limit", chain="mul")
    edit(contents, {"median_us": 0.8}, **STATIC, arm="inductor", chain="glue_nogate", N=1024)
    edit(contents, {"median_us": 0.8}, **STATIC, **AUTO, chain="glue_nogate", N=1024)
    assert report.check(report.collect(contents)) == []


def test_what_was_not_measured_is_a_miss_unless_partial() -> None:
    contents = files()
    contents[0]["rows"] = [
        row
        for row in contents[0]["rows"]
        if not (row["chain"] == "add" and row["N"] == 1024 and row["shapes"] == "static")
    ]
    del contents[1]["rows"][2]
    results = report.collect(contents)
    misses = report.check(results)
    assert len(misses) == 2 * len(grid.WIDTHS) * len(MODES) + 1
    assert all("add" in m and "N=1024" in m for m in misses if not m.startswith("host: import"))
    assert report.check(results, partial=True) == []


def test_the_last_run_of_a_cell_counts_whole() -> None:
    first, second = files()[0], files()[0]
    second["rows"] = [
        {**row, "median_us": 7.0}
        for row in second["rows"]
        if row["chain"] == "mul" and row["N"] == 2 and row["mode"] == "default"
    ]
    results = report.collect([first, second])
    key = ("static", "mul", 2048, 2, grid.DTYPE)
    assert results.time(key, ("inductor", "default")) == 7.0
    assert results.time(key, ("inductor", "max-autotune")) is None
    assert results.time(("static", "mul", 2048, 1, grid.DTYPE), ("inductor", "default")) == 5.0


def test_render_shows_every_cell_and_the_cost_of_the_gate() -> None:
    contents = files()
    edit(contents, {"median_us": 1.73}, **STATIC, **AUTO, chain="glue", N=64)
    edit(contents, {"error": "x"}, **STATIC, arm="op", chain="mul", N=64)
    text = report.render(report.collect(contents))
    assert "### glue, H = 4096: cost of the gate, µs" in text
    cost = text.split("### glue, H = 4096: cost of the gate, µs")[1].split("###")[0]
    line = next(x for x in cost.splitlines() if x.startswith("| gatefuse-auto, default"))
    assert [float(x) for x in line.split("|")[2:-1]] == [
        pytest.approx(0.23 if N == 64 else 0.5) for N in grid.ROWS
    ]
    assert "failed" in text
    assert "### host, N = 2" in text


def test_cells_cover_the_grid_once_and_the_most_telling_come_first() -> None:
    cells = cells_of(grid.FAMILIES, grid.SHAPES, grid.WIDTHS, grid.ROWS, MODES)
    seen = [(c.family, c.shapes, c.H, N) for c in cells for N in c.rows]
    assert len(seen) == len(set(seen))
    wanted = len(grid.FAMILIES) * len(grid.WIDTHS) * len(grid.ROWS)
    assert sum(shapes == "static" for _, shapes, _, _ in seen) == wanted
    assert {c.rows for c in cells[:6]} == {(2,)}


def test_required_arms_are_measured() -> None:
    """What the report demands is what the benchmark runs."""
    measured = {(c, a.name, a.mode) for c in grid.FAMILY for a in arms_of(c, MODES, True)}
    empty = report.Results()
    for shapes, key in (("static", "N=2:"), ("dynamic", "N=2 dynamic:")):
        demanded = [m for m in report.missing(empty) if f"H=2048 {key}" in m]
        assert demanded, shapes
        for line in demanded:
            chain, arm = line.split()[0], tuple(line.split(": ")[1].split(", "))
            assert (chain, *arm) in measured


@pytest.mark.parametrize("name", CHAINS)
def test_byte_count_is_that_of_the_tensors(name: str) -> None:
    module, inputs = make_set(name, 32, 5, torch.bfloat16, "cpu")
    tensors = [*module.parameters(), *inputs, *module(*inputs)]
    assert module.byte_count(5) == sum(t.numel() * t.element_size() for t in tensors)
    limit = module.limit(*inputs) if hasattr(module, "gate") and name != "glue" else None
    if limit is not None:
        moved = [*inputs, *limit]
        gate = module.gate.weight
        assert module.byte_count(5) - gate.numel() * 2 == sum(t.numel() * 2 for t in moved)


@pytest.mark.parametrize("name", ["mul", "add"])
def test_the_op_computes_the_chain(name: str) -> None:
    with torch.no_grad():
        module, inputs = make_set(name, 64, 7, torch.bfloat16, "cpu")
        Reference.of(module, inputs).check(module.op(*inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", CHAINS)
def test_reference_accepts_eager_and_nothing_broken(name: str, dtype: torch.dtype) -> None:
    with torch.no_grad():
        module, inputs = make_set(name, 128, 40, dtype, "cpu")
        reference = Reference.of(module, inputs)
        outputs = call(module, *inputs)
        reference.check(outputs)
        for i in range(len(outputs)):
            for damage in (math.nan, 0.0):
                broken = [y.clone() for y in outputs]
                row = broken[i].abs().amax(-1).argmax()
                broken[i][row, broken[i][row].abs().argmax()] = damage  # one element unwritten
                with pytest.raises(AssertionError, match=f"output {i}"):
                    reference.check(tuple(broken))
        scaled = tuple(y * 1.02 for y in outputs)
        with pytest.raises(AssertionError):
            reference.check(scaled)


@pytest.mark.parametrize("set_bytes", [1, 10_000, 1 << 20, 1 << 28])
@pytest.mark.parametrize("kernels", [1, 3])
def test_plan_rotates_whole_sets_through_a_long_sample(set_bytes: int, kernels: int) -> None:
    made = plan(set_bytes, 2 * set_bytes, kernels, "cpu")
    assert made.calls % made.sets == 0
    assert 2 <= made.sets <= made.calls
    cold = made.sets * set_bytes >= COLD_FACTOR * cache_bytes("cpu")
    assert cold or made.sets == made.calls  # else no set is used twice


def test_timing_statistics() -> None:
    timing = Timing.of([5.0, 1.0, 2.0, 3.0, 4.0], calls=7)
    assert (timing.median_us, timing.repeats, timing.calls) == (3.0, 5, 7)
    assert timing.p10_us == pytest.approx(1.4)
    assert timing.p90_us == pytest.approx(4.6)


def test_interleaved_takes_one_sample_of_each_arm_in_a_round() -> None:
    order: list[str] = []

    def arm(name: str, seconds: float) -> Replay:
        def run(i: int) -> tuple[torch.Tensor, ...]:
            order.append(f"{name}{i}")
            time.sleep(seconds)
            return ()

        return Replay(run, 2, "cpu", None)

    timings = interleaved({"a": arm("a", 0.001), "b": arm("b", 0.004)}, 3, "cpu")
    assert order == ["a0", "a1", "b0", "b1"] * 5
    assert timings["a"].repeats == 3
    assert 1000 <= timings["a"].median_us < timings["b"].median_us
    assert timings["b"].median_us >= 4000


def work(item: str, lock: DeviceLock) -> str:
    """Top-level, for the processes of the test below."""
    if item == "die":
        os._exit(3)
    if item == "raise":
        raise ValueError("a reason")
    if item == "sleep":
        time.sleep(120)
    with lock, lock:
        return f"{item} done"


def test_spread_survives_failing_and_dying_work_and_stops_in_time() -> None:
    items = ["die", "raise", "one", "two"]
    results = {
        item: (result, error)
        for item, result, error in spread(work, items, 2, time.monotonic() + 300)
    }
    assert sorted(results) == sorted(items)
    assert results["one"] == ("one done", None)
    assert results["two"] == ("two done", None)
    assert results["die"] == (None, "the process died")
    assert results["raise"][0] is None
    assert "ValueError: a reason" in str(results["raise"][1])


def test_spread_starts_nothing_after_the_deadline() -> None:
    assert list(spread(work, ["one"], 1, time.monotonic() - 1)) == []


def test_spread_abandons_what_outlasts_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.workers.GRACE_S", 0.5)
    begin = time.monotonic()
    assert list(spread(work, ["sleep", "one"], 1, begin + 1)) == []
    assert time.monotonic() - begin < 60


def test_tables_of_the_readme_are_those_of_the_committed_results() -> None:
    from benchmarks import readme

    assert readme.main(["--check"]) == 0
