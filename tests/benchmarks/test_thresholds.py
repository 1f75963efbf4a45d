"""Which thresholds are violated, what was not measured, and the command that tells."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.extra import need

need()

from benchmarks import __main__ as command
from benchmarks import grid, store, thresholds
from benchmarks.store import collect
from tests.benchmarks.data import AUTO, STATIC, edit, files, write


def check(contents: list[dict[str, Any]], partial: bool = False) -> list[thresholds.Violation]:
    return thresholds.check(collect(contents), partial)


def test_a_complete_run_reaches_every_threshold() -> None:
    assert check(files()) == []


@pytest.mark.parametrize(
    ("where", "change", "named"),
    [
        pytest.param(
            {**STATIC, **AUTO, "workload": "glue-opaque", "N": 1024},
            {"median_us": 5.11},
            [
                "glue-opaque H=4096 N=1024: default: gatefuse 5.11 us is 1.022 of Inductor's 5.00",
                "glue-opaque H=4096 N=1024: the gate costs 3.61 us, 1.0 times less",
            ],
            id="slower-than-inductor",
        ),
        pytest.param(
            {
                **STATIC,
                "provider": "gatefuse-auto",
                "mode": "max-autotune",
                "workload": "mul",
                "N": 2,
            },
            {"median_us": 5.16},
            ["mul H=4096 N=2: max-autotune"],
            id="slower-than-max-autotune",
        ),
        pytest.param(
            {**STATIC, **AUTO, "workload": "mul", "N": 2},
            {"hot_median_us": 5.16},
            ["mul H=4096 N=2: default, hot: gatefuse 5.16 us"],
            id="hot",
        ),
        pytest.param(
            {
                **STATIC,
                "provider": "inductor",
                "mode": "coordinate-descent",
                "workload": "add",
                "N": 2,
            },
            {"median_us": 1.9},
            [
                "add H=4096 N=2: coordinate-descent",
                "add H=4096 N=2: gatefuse 2.00 us is 1.053 of the best provider's",
            ],
            id="best-provider-is-another-mode",
        ),
        pytest.param(
            {**STATIC, "provider": "gatefuse-inline", "mode": "default", "workload": "mul", "N": 2},
            {"median_us": 1.9},
            ["mul H=4096 N=2: gatefuse 2.00 us is 1.053 of the best provider's"],
            id="forced-placement-is-faster",
        ),
        pytest.param(
            {**STATIC, "provider": "inductor", "mode": "default", "workload": "mul", "N": 1024},
            {"median_us": 2.9},
            ["mul H=4096 N=1024: gatefuse 2.00 us is 1.45 times as fast as Inductor, not 1.5"],
            id="speed-up",
        ),
        pytest.param(
            {**STATIC, "provider": "op", "workload": "mul", "N": 8192},
            {"median_us": 1.06},
            ["mul H=4096 N=8192: the kernel takes 1.06 us, 1.060 of the roofline 1.00"],
            id="roofline",
        ),
        pytest.param(
            {"shapes": "static", "H": 7168, "provider": "op", "workload": "add", "N": 16},
            {"median_us": 4.0},
            ["add H=7168 N=16: the kernel takes 4.00 us, the best known one"],
            id="sglang",
        ),
        pytest.param(
            {
                **STATIC,
                "workload": "glue_nogate",
                "N": 256,
                "provider": "inductor",
                "mode": "default",
            },
            {"median_us": 1.48},
            ["glue H=4096 N=256: the gate costs 0.52 us > 0.5"],
            id="gate-cost-decode",
        ),
        pytest.param(
            {**STATIC, "workload": "glue", "N": 8192, **AUTO},
            {"median_us": 4.51},
            [
                "glue H=4096 N=8192: the gate costs 3.01 us > 3.0",
                "glue H=4096 N=8192: best provider gatefuse-inline, default 2.00 us, gatefuse 4.51",
            ],
            id="gate-cost-prefill",
        ),
        pytest.param(
            {**STATIC, "workload": "glue", "N": 1024, "provider": "inductor", "mode": "default"},
            {"median_us": 3.9},
            ["glue H=4096 N=1024: the gate costs 0.50 us, 4.8 times less than under Inductor"],
            id="gate-cost-ratio",
        ),
        pytest.param(
            {**STATIC, "workload": "mul-training", "N": 4096, **AUTO},
            {"median_us": 2.95, "peak_bytes": 1020},
            [
                "mul-training H=4096 N=4096: gatefuse 3.0 us is 1.106 of the least bytes' 2.7",
                "mul-training H=4096 N=4096: default: gatefuse takes 1.020 of Inductor's memory",
            ],
            id="training",
        ),
        pytest.param(
            {**STATIC, "workload": "glue-training", "N": 4096, **AUTO},
            {"median_us": 4.05},
            ["glue-training H=4096 N=4096: gatefuse is 0.810 of Inductor's 5.0 us, not 0.8"],
            id="training-in-the-glue",
        ),
        pytest.param(
            {**STATIC, "workload": "glue-training", "N": 256, **AUTO, "mode": "max-autotune"},
            {"median_us": 5.2},
            ["glue-training H=4096 N=256: max-autotune: gatefuse 5.20 us is 1.040 of Inductor's"],
            id="training-in-a-tuned-mode",
        ),
        pytest.param(
            {"shapes": "dynamic", "H": 2048, **AUTO, "workload": "add", "N": 32768},
            {"median_us": 5.2},
            ["add H=2048 N=32768 dynamic: default"],
            id="dynamic",
        ),
        pytest.param(
            {"H": 1024, "N": 4096, "dtype": "float32", **AUTO, "workload": "add"},
            {"median_us": 5.2},
            ["add H=1024 N=4096 float32 CPU: default"],
            id="cpu",
        ),
        pytest.param(
            {**STATIC, "workload": "glue", "N": 16, "provider": "gatefuse-kernel"},
            {"error": "AssertionError('output 0')", "median_us": None},
            ["glue H=4096 N=16: gatefuse-kernel, default failed: AssertionError"],
            id="wrong-provider",
        ),
        pytest.param(
            {"what": "call", "provider": "gatefuse-auto"},
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
            {"what": "compile", "provider": "gatefuse-auto", "cache": "cold"},
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
def test_check_names_what_is_violated(
    where: dict[str, Any], change: dict[str, Any], named: list[str]
) -> None:
    contents = files()
    edit(contents, change, **where)
    found_lines = [str(violation) for violation in check(contents)]
    for part in named:
        assert any(violation.startswith(part) for violation in found_lines), found_lines
    assert len(found_lines) == len(named), found_lines


def test_the_baseline_beside_the_op() -> None:
    contents = files()
    edit(contents, {"median_us": 1.26}, workload="add", provider="op", H=4096, N=1, p10_us=None)
    (violation,) = check(contents)
    assert str(violation).startswith("add H=4096 N=1: side by side the op takes 1.26 us")


def test_noise_violates_nothing() -> None:
    contents = files()
    edit(contents, {"median_us": 5.09}, **STATIC, **AUTO, workload="glue", N=4096)  # CPU
    edit(contents, {"median_us": 2.03}, **STATIC, provider="gatefuse-auto", workload="mul", N=2)
    edit(contents, {"median_us": 1.04}, **STATIC, provider="op", workload="mul", N=8192)
    edit(
        contents, {"median_us": 4.01}, **STATIC, provider="gatefuse-auto", workload="glue", N=32768
    )
    edit(
        contents, {"median_us": 4.0}, **STATIC, provider="gatefuse-inline", workload="glue", N=32768
    )
    edit(
        contents, {"median_us": 4.0}, **STATIC, provider="gatefuse-kernel", workload="glue", N=32768
    )
    assert check(contents) == []


def test_a_slower_case_with_a_reason_is_shown_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = files()
    edit(
        contents, {"median_us": 1.9}, **STATIC, provider="gatefuse-inline", workload="glue", N=1024
    )
    found = collect(contents)
    (violation,) = thresholds.check(found)
    assert violation.reason is None
    known = [(["glue H=4096 N=1024: best provider *"], "why")]
    monkeypatch.setattr(thresholds, "reasons", lambda: known)
    assert thresholds.check(found) == []
    (shown,) = thresholds.violations(found)
    assert shown.reason == "why"


def test_a_violation_stays_one_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = files()
    edit(contents, {"median_us": 1.06}, **STATIC, provider="op", workload="mul", N=8192)
    monkeypatch.setattr(thresholds, "reasons", lambda: [(["mul H=* N=8192: the kernel *"], "why")])
    (violation,) = check(contents)
    assert violation.reason == "why"


def test_what_was_not_measured_is_an_error_unless_partial() -> None:
    contents = files()
    contents[0]["rows"] = [
        row
        for row in contents[0]["rows"]
        if not (row["workload"] == "add" and row["N"] == 1024 and row["shapes"] == "static")
        and not (row["workload"] == "mul" and row["provider"] == "op" and row["H"] == 7168)
    ]
    (row,) = (
        row
        for row in contents[0]["rows"]
        if (row["workload"], row["provider"], row["H"], row["N"], row["dtype"], row["shapes"])
        == ("mul", "roofline", 2048, 2, "bfloat16", "static")
    )
    del row["hot_median_us"]
    del contents[1]["rows"][2]
    contents[3]["rows"] = contents[3]["rows"][1:]
    found = collect(contents)
    found_lines = [str(violation) for violation in thresholds.check(found)]
    whole = [
        line for line in found_lines if fnmatch.fnmatchcase(line, "add H=* N=1024*: not measured")
    ]
    providers = [
        m for m in found_lines if fnmatch.fnmatchcase(m, "mul H=7168 N=*: not measured: op, -")
    ]
    wide = grid.GRIDS["widths"]
    dtypes = len(grid.GRIDS["dtypes"].dtypes)
    assert len(whole) == len(grid.WIDTHS) + len(wide.widths) + dtypes
    assert len(providers) == len(wide.rows)
    rest = set(found_lines) - set(whole) - set(providers)
    assert rest == {
        "host: not measured: import",
        "qwen3_next block N=16: not measured: inductor, default",
        "mul H=2048 N=2: not measured: roofline, -, hot",
    }
    assert thresholds.check(found, partial=True) == []


def test_every_reason_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    lines = [str(violation) for violation in thresholds.violations(store.committed())]
    for patterns, _ in thresholds.reasons():
        for pattern in patterns:
            assert any(fnmatch.fnmatchcase(line, pattern) for line in lines), pattern


def test_check_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contents = files()
    assert command.main(["check", *write(tmp_path, contents)]) == 0
    assert "All thresholds are reached." in capsys.readouterr().out
    edit(contents, {"median_us": 5.16}, shapes="dynamic", **AUTO, workload="mul", N=64)
    paths = write(tmp_path, contents)
    assert command.main(["check", *paths]) == 1
    out = capsys.readouterr().out
    assert "VIOLATION mul H=2048 N=64 dynamic: default: gatefuse 5.16 us is 1.032" in out
    assert command.main(["check", paths[0]]) == 1
    assert command.main(["report", *paths]) == 0
    out = capsys.readouterr().out
    assert "Symbolic rows and width:" in out
    assert "N = 2, H = 2048, µs" in out  # host
