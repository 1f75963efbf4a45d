"""`gatefuse bench`: marks, merging, tables, plans, the check of outputs, work over processes, and
each question once on the CPU, so that nothing runs for the first time on a GPU."""

from __future__ import annotations

import fnmatch
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import grid
from benchmarks import publish as documents
from benchmarks import store as results
from benchmarks import tables as report
from benchmarks import thresholds as marks
from benchmarks.grid import BlockKey, Key
from benchmarks.run_workloads import Reference
from benchmarks.store import GATEFUSE, INDUCTOR, collect
from benchmarks.sweep import Setting
from benchmarks.vllm import tables as vllm_tables
from benchmarks.vllm.engine import Workload
from benchmarks.vllm.group import EngineError, Group
from benchmarks.workers import DeviceLock, spread
from gatefuse import cli
from gatefuse.bench.timing import COLD_FACTOR, Replay, Timing, cache_bytes, interleaved, plan
from gatefuse.bench.workloads import CHAINS, Glue, call, make_set
from tests.support.programs import run_python

MODES = grid.MODES


def chain_rows(cells: list[grid.Cell]) -> list[dict[str, Any]]:
    """Rows of a complete run that reaches every mark."""
    rows = []
    for cell in cells:
        for key, arm in cell.measured():
            us = {"eager": 9.0, "limit": 1.0, "op": 1.0, "inductor": 5.0}.get(arm.name, 2.0)
            if key.chain.endswith(grid.NO_GATE):
                us = 1.5
            row = {**key._asdict(), "arm": arm.name, "mode": arm.mode, "draw": arm.draw}
            del row["device"]
            row |= {"median_us": us, "p10_us": us - 0.1, "p90_us": us + 0.1, "bytes": 4000}
            if key.chain in ("mul", "add") and cell.static:
                row |= {f"hot_{name}": row[name] for name in ("median_us", "p10_us", "p90_us")}
            rows.append(row)
    return rows


def block_rows() -> list[dict[str, Any]]:
    return [
        {**cell.key._asdict(), "arm": arm, "mode": cell.mode, "kernels": kernels}
        | {"median_us": us, "p10_us": us, "p90_us": us, "compile_s": 10.0, "pass_ms": 20.0}
        for cell in grid.block_cells()
        for arm, kernels, us in (("inductor", 20, 100.0), ("gatefuse-auto", 17, 98.0))
    ]


def peer_rows() -> list[dict[str, Any]]:
    return [
        {"chain": chain, "H": 4096, "N": N, "arm": arm, "median_us": us}
        for chain in ("mul", "add")
        for N in (1, 1024)
        for arm, us in (("op", 1.2), ("peer", 1.15), ("limit", 1.1))
    ]


def host_rows() -> list[dict[str, Any]]:
    call_row = {"what": "call", "chain": "mul", "mode": "default", "H": 2048, "N": 2}
    compiled = {"what": "compile", "chain": "mul", "mode": "default", "cache": "cold"}
    return [
        {**call_row, "arm": "inductor", "median_us": 60.0, "p10_us": 59.0, "p90_us": 61.0},
        {**call_row, "arm": "gatefuse-auto", "median_us": 46.0, "p10_us": 45.0, "p90_us": 47.0},
        {"what": "import", "median_ms": 12.0, "initialises_cuda": False},
        {**compiled, "arm": "inductor", "median_s": 1.0, "pass_ms": 0.0},
        {**compiled, "arm": "gatefuse-auto", "median_s": 1.0, "pass_ms": 9.0},
        {**compiled, "arm": "gatefuse-auto", "median_s": 0.1, "pass_ms": 0.0, "cache": "warm"},
    ]


HEADER = {"device": "a GPU, 1", "torch": "2", "triton": None, "date": "2026-01-01T00:00:00"}


def files() -> list[dict[str, Any]]:
    core = [cell for one in grid.GRIDS.values() for cell in one.cells()]
    rows = {
        "core": chain_rows(core),
        "host": host_rows(),
        "cpu": chain_rows(grid.CPU_GRID.cells()),
        "blocks": block_rows(),
        "peer": peer_rows(),
    }
    return [{"kind": kind, "header": HEADER, "rows": found} for kind, found in rows.items()]


@pytest.fixture(autouse=True)
def _no_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marks, "reasons", list)


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
    assert marks.check(collect(files())) == []


STATIC = {"shapes": "static", "H": 4096, "dtype": "bfloat16"}
AUTO = {"arm": "gatefuse-auto", "mode": "default"}


@pytest.mark.parametrize(
    ("where", "change", "named"),
    [
        pytest.param(
            {**STATIC, **AUTO, "chain": "glue-opaque", "N": 1024},
            {"median_us": 5.11},
            [
                "glue-opaque H=4096 N=1024: default: gatefuse 5.11 us is 1.022 of Inductor's 5.00",
                "glue-opaque H=4096 N=1024: the gate costs 3.61 us, 1.0 times less",
            ],
            id="slower-than-inductor",
        ),
        pytest.param(
            {**STATIC, "arm": "gatefuse-auto", "mode": "max-autotune", "chain": "mul", "N": 2},
            {"median_us": 5.16},
            ["mul H=4096 N=2: max-autotune"],
            id="slower-than-max-autotune",
        ),
        pytest.param(
            {**STATIC, **AUTO, "chain": "mul", "N": 2},
            {"hot_median_us": 5.16},
            ["mul H=4096 N=2: default, hot: gatefuse 5.16 us"],
            id="hot",
        ),
        pytest.param(
            {**STATIC, "arm": "inductor", "mode": "coordinate-descent", "chain": "add", "N": 2},
            {"median_us": 1.9},
            [
                "add H=4096 N=2: coordinate-descent",
                "add H=4096 N=2: gatefuse 2.00 us is 1.053 of the best arm's",
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
            {**STATIC, "arm": "inductor", "mode": "default", "chain": "mul", "N": 1024},
            {"median_us": 2.9},
            ["mul H=4096 N=1024: gatefuse 2.00 us is 1.45 times as fast as Inductor, not 1.5"],
            id="speed-up",
        ),
        pytest.param(
            {**STATIC, "arm": "op", "chain": "mul", "N": 8192},
            {"median_us": 1.06},
            ["mul H=4096 N=8192: the kernel takes 1.06 us, 1.060 of the limit 1.00"],
            id="limit",
        ),
        pytest.param(
            {"shapes": "static", "H": 7168, "arm": "op", "chain": "add", "N": 16},
            {"median_us": 4.0},
            ["add H=7168 N=16: the kernel takes 4.00 us, the best known one"],
            id="peer",
        ),
        pytest.param(
            {**STATIC, "chain": "glue_nogate", "N": 256, "arm": "inductor", "mode": "default"},
            {"median_us": 1.48},
            ["glue H=4096 N=256: the gate costs 0.52 us > 0.5"],
            id="gate-cost-decode",
        ),
        pytest.param(
            {**STATIC, "chain": "glue", "N": 8192, **AUTO},
            {"median_us": 4.51},
            [
                "glue H=4096 N=8192: the gate costs 3.01 us > 3.0",
                "glue H=4096 N=8192: best arm gatefuse-inline, default 2.00 us, gatefuse 4.51",
            ],
            id="gate-cost-prefill",
        ),
        pytest.param(
            {**STATIC, "chain": "glue", "N": 1024, "arm": "inductor", "mode": "default"},
            {"median_us": 3.9},
            ["glue H=4096 N=1024: the gate costs 0.50 us, 4.8 times less than under Inductor"],
            id="gate-cost-ratio",
        ),
        pytest.param(
            {"shapes": "dynamic", "H": 2048, **AUTO, "chain": "add", "N": 32768},
            {"median_us": 5.2},
            ["add H=2048 N=32768 dynamic: default"],
            id="dynamic",
        ),
        pytest.param(
            {"H": 1024, "N": 4096, "dtype": "float32", **AUTO, "chain": "add"},
            {"median_us": 5.2},
            ["add H=1024 N=4096 float32 CPU: default"],
            id="cpu",
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
            ["host mul: default: gatefuse 60.1 us > Inductor 60.0"],
            id="host",
        ),
        pytest.param({"what": "import"}, {"median_ms": 51.0}, ["import: 51.0 ms"], id="import"),
        pytest.param(
            {"what": "import"},
            {"initialises_cuda": True},
            ["import: initialises CUDA"],
            id="import-cuda",
        ),
        pytest.param(
            {"what": "compile", "arm": "gatefuse-auto", "cache": "cold"},
            {"pass_ms": 10.1},
            ["compile mul: cold: the pass takes 10.1 ms, 1.01 % of the compile"],
            id="pass",
        ),
        pytest.param(
            {"model": "qwen3_next", "part": "layer", "tokens": 16, **AUTO},
            {"median_us": 103.0, "kernels": 21, "pass_ms": 101.0},
            [
                "qwen3_next layer N=16: default: gatefuse 103.0 us is 1.030 of Inductor's 100.0",
                "qwen3_next layer N=16: default: gatefuse launches 21 kernels, Inductor 20",
                "qwen3_next layer N=16: default: the pass takes 101.0 ms, 1.01 %",
            ],
            id="block",
        ),
    ],
)
def test_check_names_what_misses(
    where: dict[str, Any], change: dict[str, Any], named: list[str]
) -> None:
    contents = files()
    edit(contents, change, **where)
    misses = [str(miss) for miss in marks.check(collect(contents))]
    for part in named:
        assert any(miss.startswith(part) for miss in misses), misses
    assert len(misses) == len(named), misses


def test_the_rival_beside_the_op() -> None:
    contents = files()
    edit(contents, {"median_us": 1.26}, chain="add", arm="op", H=4096, N=1, p10_us=None)
    (miss,) = marks.check(collect(contents))
    assert str(miss).startswith("add H=4096 N=1: side by side the op takes 1.26 us")


def test_noise_is_no_miss() -> None:
    contents = files()
    edit(contents, {"median_us": 5.09}, **STATIC, **AUTO, chain="glue", N=4096)  # CPU
    edit(contents, {"median_us": 2.03}, **STATIC, arm="gatefuse-auto", chain="mul", N=2)
    edit(contents, {"median_us": 1.04}, **STATIC, arm="op", chain="mul", N=8192)
    edit(contents, {"median_us": 4.01}, **STATIC, arm="gatefuse-auto", chain="glue", N=32768)
    edit(contents, {"median_us": 4.0}, **STATIC, arm="gatefuse-inline", chain="glue", N=32768)
    edit(contents, {"median_us": 4.0}, **STATIC, arm="gatefuse-kernel", chain="glue", N=32768)
    assert marks.check(collect(contents)) == []


def test_a_loss_with_a_reason_is_shown_and_no_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = files()
    edit(contents, {"median_us": 1.9}, **STATIC, arm="gatefuse-inline", chain="glue", N=1024)
    found = collect(contents)
    (miss,) = marks.check(found)
    assert miss.reason is None
    known = [(["glue H=4096 N=1024: best arm *"], "why")]
    monkeypatch.setattr(marks, "reasons", lambda: known)
    assert marks.check(found) == []
    (loss,) = marks.losses(found)
    assert loss.reason == "why"


def test_a_miss_stays_one_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = files()
    edit(contents, {"median_us": 1.06}, **STATIC, arm="op", chain="mul", N=8192)
    monkeypatch.setattr(marks, "reasons", lambda: [(["mul H=* N=8192: the kernel *"], "why")])
    (miss,) = marks.check(collect(contents))
    assert miss.reason == "why"


def test_what_was_not_measured_is_a_miss_unless_partial() -> None:
    contents = files()
    contents[0]["rows"] = [
        row
        for row in contents[0]["rows"]
        if not (row["chain"] == "add" and row["N"] == 1024 and row["shapes"] == "static")
        and not (row["chain"] == "mul" and row["arm"] == "op" and row["H"] == 7168)
    ]
    (row,) = (
        row
        for row in contents[0]["rows"]
        if (row["chain"], row["arm"], row["H"], row["N"], row["dtype"], row["shapes"])
        == ("mul", "limit", 2048, 2, "bfloat16", "static")
    )
    del row["hot_median_us"]
    del contents[1]["rows"][2]
    contents[3]["rows"] = contents[3]["rows"][1:]
    found = collect(contents)
    misses = [str(miss) for miss in marks.check(found)]
    whole = [miss for miss in misses if fnmatch.fnmatchcase(miss, "add H=* N=1024*: not measured")]
    arms = [m for m in misses if fnmatch.fnmatchcase(m, "mul H=7168 N=*: not measured: op, -")]
    wide = grid.GRIDS["widths"]
    dtypes = len(grid.GRIDS["dtypes"].dtypes)
    assert len(whole) == len(grid.WIDTHS) + len(wide.widths) + dtypes
    assert len(arms) == len(wide.rows)
    rest = set(misses) - set(whole) - set(arms)
    assert rest == {
        "host: not measured: import",
        "qwen3_next block N=16: not measured: inductor, default",
        "mul H=2048 N=2: not measured: limit, -, hot",
    }
    assert marks.check(found, partial=True) == []


def test_the_last_run_of_a_cell_counts_whole() -> None:
    first, second = files()[0], files()[0]
    second["rows"] = [
        {**row, "median_us": 7.0}
        for row in second["rows"]
        if row["chain"] == "mul" and row["N"] == 2 and row["mode"] == "default"
    ]
    found = collect([first, second])
    key = Key("gpu", "static", "mul", 2048, 2, grid.DTYPE)
    assert found.time(key, INDUCTOR) == 7.0
    assert found.time(key, ("inductor", "max-autotune")) is None
    assert found.time(key._replace(N=1), INDUCTOR) == 5.0


def test_of_several_draws_the_mean_counts_unless_one_failed() -> None:
    contents = files()
    where = {**STATIC, "chain": "glue", "N": 64, "arm": "inductor", "mode": "max-autotune"}
    edit(contents, {"median_us": 6.5}, **where, draw=1)
    key = Key("gpu", "static", "glue", 4096, 64, grid.DTYPE)
    arm = ("inductor", "max-autotune")
    assert collect(contents).time(key, arm) == pytest.approx((5.0 + 6.5 + 5.0) / 3)
    row = collect(contents).cells[key][arm]
    assert (row["p10_us"], row["p90_us"]) == (5.0, 6.5), "the range of the draws"
    edit(contents, {"error": "x", "median_us": None}, **where, draw=2)
    assert collect(contents).time(key, arm) is None


def test_of_several_compiles_of_a_module_the_fastest_counts_unless_one_failed() -> None:
    contents = files()
    where = {"model": "qwen2_moe", "part": "block", "tokens": 16, "arm": "inductor"}
    (blocks,) = [content for content in contents if content["kind"] == "blocks"]
    (first,) = [
        row for row in blocks["rows"] if row.items() >= {**where, "mode": "default"}.items()
    ]
    slow, fast = {**first, "draw": 1, "median_us": 130.0}, {**first, "draw": 2, "median_us": 95.0}
    blocks["rows"] += [slow, fast]
    key, arm = BlockKey("qwen2_moe", "block", 16), ("inductor", "default")
    assert collect(contents).blocks[key][arm] == {**fast, "slowest_us": 130.0}
    del slow["median_us"]
    slow["error"] = "x"
    assert collect(contents).blocks[key][arm]["error"] == "x"


def test_arms_of_a_module_are_compiled_in_turns() -> None:
    pytest.importorskip("transformers")
    from benchmarks.run_modules import draws

    cell = grid.BlockCell("qwen2_moe", "block", 16, "default")
    order = [(arm.partition("-")[0], draw) for arm, draw in draws(cell, Setting("cpu", 1))]
    assert order[:4] == [("inductor", 0), ("gatefuse", 0), ("gatefuse", 1), ("inductor", 1)]
    assert order[4:] == [("inductor", 2), ("gatefuse", 2)]


def cells_of_line(text: str, label: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_tables_show_values_spread_and_what_misses() -> None:
    contents = files()
    edit(contents, {"median_us": 1.99}, **STATIC, **AUTO, chain="glue", N=64)
    edit(contents, {"error": "x"}, **STATIC, arm="op", chain="mul", N=64)
    edit(contents, {"median_us": 5.2}, **STATIC, **AUTO, chain="mul", N=1)
    tables = report.Tables(collect(contents))
    cost = "\n".join(tables.gate_costs("glue", 4096))
    values = cells_of_line(cost, "**gatefuse**")
    assert values == ["0.49" if N == 64 else "0.5" for N in grid.ROWS]
    times = "\n".join(tables.times("mul", 4096, spread=True))
    assert cells_of_line(times, "**gatefuse**")[:2] == ["5.2 (1.9..2.1) †", "2 (1.9..2.1)"]
    assert cells_of_line(times, report.ARMS["op", "-"])[grid.ROWS.index(64)] == "failed"
    alone = "\n".join(tables.alone("mul", 4096))
    assert cells_of_line(alone, "**gatefuse**: % of the limit's")[1] == "50"
    assert cells_of_line(alone, "**gatefuse**: GB/s")[1] == "2"
    text = "\n\n".join(tables.all())
    assert "## glue, H = 2048, dynamic, bfloat16" in text
    assert "N = 2, H = 2048, µs" in text  # host
    blocks = "\n".join(tables.blocks())
    assert "| qwen2_moe block | 16 | 20 | 17 | 100 (100..100) | 98 (98..98) | 0.980 |" in blocks


def test_every_document_is_filled_from_complete_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "committed", lambda: collect([*files(), engine_file()]))
    tables = report.Tables(results.committed())
    for name, section in documents.SECTIONS.items():
        text = "\n".join(section(tables))
        assert text, name
        if name not in ("misses", "losses", "unmeasured"):
            assert "\n|---" in text, name


def test_on_the_cpu_each_arm_is_compiled_first_once() -> None:
    arms = grid.arms_of("glue", ("default",), static=True, gpu=False)
    compiled = [(arm.name, arm.draw) for arm in arms if arm.compiled]
    ours, theirs = "gatefuse-auto", "inductor"
    assert compiled == [(theirs, 0), (ours, 0), (ours, 1), (theirs, 1)]


def test_cells_cover_the_grids_once_and_the_most_telling_come_first() -> None:
    measured = [
        pair for one in grid.GRIDS.values() for cell in one.cells() for pair in cell.measured()
    ]
    assert len(measured) == len(set(measured))
    main = grid.GRIDS["main"].cells()
    assert len(main) == len(grid.MAIN) * len(grid.WIDTHS) * len(grid.ROWS)
    assert {cell.rows for cell in main[:6]} == {(2,)}
    assert grid.block_cells()[0].tokens in grid.BLOCK_TUNED_ROWS
    assert grid.block_cells()[-1].mode == "max-autotune"


@pytest.mark.parametrize("name", grid.VARIANTS)
def test_variants_differ_by_the_gate_alone(name: str) -> None:
    """With the gate wide open (weights of zero give one half) the outputs are those without."""
    with torch.no_grad():
        module, inputs = make_set(name, 32, 5, torch.float64, "cpu")
        plain, _ = make_set(name + grid.NO_GATE, 32, 5, torch.float64, "cpu")
        assert isinstance(module, Glue)
        plain.load_state_dict(module.state_dict(), strict=False)
        module.gate.weight.zero_()
        if hasattr(module, "down"):
            module.down.weight.mul_(2)
        else:
            inputs = (*inputs[:2], 2 * inputs[2])
        doubled = module(*inputs)
        if not hasattr(module, "down"):
            inputs = (*inputs[:2], inputs[2] / 2)
        torch.testing.assert_close(doubled, plain(*inputs))


@pytest.mark.parametrize("name", CHAINS)
def test_byte_count_is_that_of_the_tensors(name: str) -> None:
    module, inputs = make_set(name, 32, 5, torch.bfloat16, "cpu")
    tensors = [*module.parameters(), *inputs, *module(*inputs)]
    assert module.byte_count(5) == sum(t.numel() * t.element_size() for t in tensors)
    if name in ("mul", "add"):
        moved = [*inputs, *module.limit(*inputs)]
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
                flat = broken[i].view(-1)
                flat[flat.abs().argmax()] = damage  # one element unwritten
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

    timings = interleaved({"a": arm("a", 0.001), "b": arm("b", 0.004)}, 20, "cpu")
    rounds = [order[i : i + 4] for i in range(0, len(order), 4)]
    assert len(rounds) == 22
    assert {tuple(r) for r in rounds} == {("a0", "a1", "b0", "b1"), ("b0", "b1", "a0", "a1")}
    # What comes first in a round may be at a disadvantage: each arm does as often.
    assert sum(r[0] == "a0" for r in rounds[2:]) == 10
    assert timings["a"].repeats == 20
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


def test_documents_are_those_of_the_committed_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # with the reasons
    for path, text in documents.rendered(results.checkout()).items():
        assert path.read_text() == text, f"{path} is not what `gatefuse bench --update` writes"


def test_every_reason_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = results.committed()
    lines = [str(miss) for miss in (*marks.check(found, partial=True), *marks.losses(found))]
    for patterns, _ in marks.reasons():
        for pattern in patterns:
            assert any(fnmatch.fnmatchcase(line, pattern) for line in lines), pattern


def engine_file() -> dict[str, Any]:
    """Two layers; what a step of each arm holds, as (kernel, calls, µs)."""
    norm, fused = ("triton_norm", 2, 8.0), ("triton_norm_gate", 2, 9.0)
    kernels = {
        "vllm": [("gemv", 2, 10.0), ("sigmoid", 2, 4.0), norm, ("experts", 2, 90.0)],
        "plugin": [fused, ("experts", 2, 88.0)],
        "hand-kernel": [("op", 2, 5.0), norm, ("experts", 2, 91.0)],
    }
    rows = [
        {
            "arm": arm,
            "name": "decode-16",
            "seconds": [1.0],
            "repeats": 1,
            "new_tokens_per_s": speed,
            "spread": 0.01,
            "profile": {
                "kernels": sum(n for _, n, _ in held),
                "kernel_us": sum(us for *_, us in held),
                "busy_us": sum(us for *_, us in held),
                "by_name": [
                    {"name": name, "per_step": n, "us_per_step": us} for name, n, us in held
                ],
            },
        }
        for (arm, held), speed in zip(kernels.items(), (1000.0, 1100.0, 990.0), strict=True)
    ]
    engine = {"vllm": "0.26.0", "lines": []}
    plugin = engine | {"lines": ["gatefuse: 2 of 2 shared-expert gates fused"]}
    return {
        "kind": "vllm",
        "header": {"device": "a GPU", "torch": "2.11.0", "date": "2026-01-01T00:00:00"},
        "model": "qwen2_moe",
        "layers": 2,
        "engines": {"vllm": engine, "plugin": plugin, "hand-kernel": engine},
        "errors": ["plugin-no-overlap: the process died"],
        "rows": rows,
    }


class FakeEngine:
    """An engine that answers at once, and notes what it is asked in a log of all."""

    def __init__(self, arm: str, log: list[str], fails: bool = False) -> None:
        self.arm, self.log, self.fails = arm, log, fails

    def ask(self, method: str, workload: Workload) -> None:
        self.log.append(f"{self.arm} begins {workload.name}")

    def answer(self) -> Any:
        self.log.append(f"{self.arm} ends")
        if self.fails:
            raise EngineError(f"{self.arm}: no answer")
        return {}

    def lines(self) -> list[str]:
        return []

    def close(self) -> None:
        self.log.append(f"{self.arm} is closed")


@pytest.mark.parametrize("at_once", [False, True])
def test_engines_take_turns_or_work_at_once(at_once: bool) -> None:
    log: list[str] = []
    content: dict[str, Any] = {"engines": {}, "errors": [], "rows": []}
    engines = [FakeEngine(arm, log) for arm in ("vllm", "plugin")]
    group = Group(engines, content, at_once=at_once)  # type: ignore[arg-type]
    group.wait([Workload("decode-16", 16, 32, 128)], 0)
    log.clear()
    group.profile()
    first, second = "vllm begins decode-16", "plugin begins decode-16"
    if at_once:
        assert log == [first, second, "vllm ends", "plugin ends"]
    else:
        assert log == [first, "vllm ends", second, "plugin ends"]
    assert [(row["arm"], row["profile"]) for row in content["rows"]] == [
        ("vllm", {}),
        ("plugin", {}),
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


def test_tables_of_vllm() -> None:
    text = vllm_tables.everything(engine_file())
    for line in (
        "| plugin | 1100 (+10.0 %) |",  # tokens
        "| plugin | 4 (-50.0 %) |",  # kernels
        "| vllm | 7 |",  # the gate: 14 us in two layers
        "| plugin | 0.5 |",  # 9 us instead of 8; that the experts took 2 us less is chance
        "| hand-kernel | 2.5 |",
        "| `gemv` | -2 | -10 |",
        "- plugin: gatefuse: 2 of 2 shared-expert gates fused",
        "- failed: plugin-no-overlap: the process died",
    ):
        assert line in text.splitlines(), line


def test_tables_of_vllm_without_a_profile() -> None:
    content = engine_file()
    for row in content["rows"]:
        del row["profile"]
    text = vllm_tables.everything(content)
    assert "| plugin | 1100 (+10.0 %) |" in text
    assert "Kernels per step" not in text


def test_tables_of_vllm_with_several_starts() -> None:
    """Engines of different starts are not compared with each other: a start's gain is taken within
    it, and the middle one counts."""
    content = engine_file()
    first = content["rows"]
    for number, factors in enumerate(((0.9, 0.9), (1.0, 0.97)), 1):
        for row, factor in zip(first[:2], factors, strict=True):
            speed = row["new_tokens_per_s"] * factor
            again = {"arm": row["arm"], "name": row["name"], "start": number, "spread": 0.03}
            content["rows"] = [*content["rows"], again | {"new_tokens_per_s": speed, "repeats": 1}]
    text = vllm_tables.everything(content)
    for line in (
        "qwen2_moe, 2 layers, vLLM 0.26.0, 3 starts of each engine, a GPU",
        "| vllm | 1000 |",
        "| plugin | 1067 (+10.0 %) |",
        "| plugin | +10.0 %, +10.0 %, +6.7 % |",
        "| hand-kernel | -1.0 % |",
        "| plugin | 3.0 % |",  # the spread
        "| plugin | 4 (-50.0 %) |",  # the first start's profile
    ):
        assert line in text.splitlines(), line


def test_header_names_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {(): "GPU A, 580\nGPU B, 580", ("-i", "1"): "GPU B, 580"}
    monkeypatch.setattr(results, "_output", lambda *command: found[command[3:]])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert results._gpu() == "GPU A, 580"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert results._gpu() == "GPU B, 580"


def test_header_keeps_no_folders_of_the_machine(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path / "out"), "--grid", "main"]
    assert results.header("cpu", arguments)["arguments"] == ["--out", "out", "--grid", "main"]


def write(directory: Path, contents: list[dict[str, Any]]) -> list[str]:
    paths = []
    for content in contents:
        paths.append(directory / f"{content['kind']}.json")
        paths[-1].write_text(json.dumps(content))
    return [str(path) for path in paths]


def test_check_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contents = files()
    assert cli.main(["bench", "--check", *write(tmp_path, contents)]) == 0
    assert "All marks are reached." in capsys.readouterr().out
    edit(contents, {"median_us": 5.16}, shapes="dynamic", **AUTO, chain="mul", N=64)
    paths = write(tmp_path, contents)
    assert cli.main(["bench", "--check", *paths]) == 1
    out = capsys.readouterr().out
    assert "MISS mul H=2048 N=64 dynamic: default: gatefuse 5.16 us is 1.032" in out
    assert cli.main(["bench", "--check", paths[0]]) == 1
    assert cli.main(["bench", "--partial", "--report", *paths]) == 0


def test_check_command_without_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert cli.main(["bench", "--check"]) == 2
    assert "checkout" in capsys.readouterr().err


QUICK = ["--quick", "--device", "cpu", "--processes", "1"]


def measured(directory: Path, *arguments: str) -> results.Results:
    """The results of `gatefuse bench` with the arguments."""
    assert cli.main(["bench", *arguments, *QUICK, "--out", str(directory)]) == 0
    (path,) = directory.glob("*.json")
    content = json.loads(path.read_text())
    assert content["header"]["torch"] == torch.__version__
    assert content["rows"] and not content.get("not_run")
    return results.load([path])


@pytest.mark.parametrize(("one", "family"), [("variants", "glue-matmuls"), ("dynamic", "mul")])
def test_chains_are_measured(one: str, family: str, tmp_path: Path) -> None:
    arguments = ["core", "--grid", one, "--chains", family, "--modes", "default"]
    found = measured(tmp_path, *arguments, "--rows", "4")
    keys = [key for key in found.cells if key.chain == family]
    assert {key.shapes for key in keys} == set(grid.GRIDS[one].shapes)
    for key in keys:
        assert found.time(key, GATEFUSE) > 0 and found.time(key, INDUCTOR) > 0
        assert found.cells[key][GATEFUSE]["fused"] == 1
        assert found.cells[key][INDUCTOR]["fused"] == 0


def test_cpu_is_measured_and_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(tmp_path, "cpu", "--chains", "mul", "--rows", "4", "--dtypes", "float32")
    (key,) = found.cells
    assert key == Key("cpu", "static", "mul", 128, 4, "float32")
    assert found.time(key, GATEFUSE, "hot_median_us") > 0
    assert "mul H=128 N=4 float32 CPU" in capsys.readouterr().out


def test_blocks_are_measured(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    arguments = ["--models", "qwen2_moe", "--parts", "layer", "--rows", "4", "--modes", "default"]
    found = measured(tmp_path, "blocks", *arguments)
    arms = found.blocks[BlockKey("qwen2_moe", "layer", 4)]
    assert arms[GATEFUSE]["fused"] == 1
    assert 0 < arms[GATEFUSE]["kernels"] < arms[INDUCTOR]["kernels"]
    assert 0 < arms[GATEFUSE]["pass_ms"] < arms[GATEFUSE]["compile_s"] * 1e3


def test_host_is_measured(tmp_path: Path) -> None:
    found = measured(tmp_path, "host", "--chains", "mul", "--width", "64")
    by_what = {(row["what"], row.get("arm"), row.get("cache")): row for row in found.host}
    assert by_what["call", "gatefuse-auto", None]["median_us"] > 0
    assert by_what["compile", "gatefuse-auto", "cold"]["pass_ms"] > 0
    assert by_what["import", None, None]["median_ms"] > 0


#: SGLang's interface, and what its kernel computes.
SGLANG = """
import torch
from sglang.srt.utils import is_hip

def fused_gate_sigmoid_mul(x, weight, value):
    assert weight.dim() == 1 and not is_hip()
    return torch.sigmoid(x.float() @ weight.float())[:, None].mul(value).to(value.dtype)

def fused_gate_sigmoid_mul_add(x, weight, value, routed):
    gate = torch.sigmoid(x.float() @ weight.float())[:, None]
    routed.copy_(gate * value + routed)
"""


def interpreted(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    """Rows of a question about the Triton kernel, which runs in Triton's interpreter."""
    pytest.importorskip("triton")
    source = tmp_path / "sglang" / "kernels" / "ops" / "elementwise" / "elementwise.py"
    source.parent.mkdir(parents=True)
    source.write_text(SGLANG)
    (tmp_path / "sglang" / "__init__.py").write_text("raise ImportError('not all of sglang')")
    full = ["bench", *arguments, "--out", str(tmp_path / "out"), *QUICK]
    code = f"import sys\nfrom gatefuse import cli\nsys.exit(cli.main({full!r}))"
    run_python(code, TRITON_INTERPRET="1", PYTHONPATH=str(tmp_path))
    (path,) = (tmp_path / "out").glob("*.json")
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    assert not any("error" in row for row in rows)
    return rows


def test_the_launch_rule_is_measured(tmp_path: Path) -> None:
    arguments = ["--widths", "256", "--rows", "2,3", "--dtypes", "float32"]
    rows = interpreted(tmp_path, "launch-rule", *arguments)
    assert {(row["N"], row["block"]) for row in rows} == {(2, 256), (2, 512), (3, 256), (3, 512)}
    assert all(row["median_us"] > 0 for row in rows)


def test_the_op_is_measured_beside_the_rival(tmp_path: Path) -> None:
    rows = interpreted(tmp_path, "peer", "--widths", "64", "--rows", "2")
    assert {(row["chain"], row["arm"]) for row in rows} == {
        (chain, arm) for chain in ("mul", "add") for arm in ("op", "peer", "limit")
    }
