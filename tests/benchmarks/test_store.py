"""Result files merged: which run, and which of several compiles, counts; old files' words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.extra import need

need()

from benchmarks import __main__ as command
from benchmarks import grid, store
from benchmarks.store import Results, collect, matches
from tests.benchmarks.data import STATIC, edit, files
from tests.support.programs import run_python


def case(results: Results, **where: Any) -> Any:
    """The one row of the workloads' cases with these values, or None."""
    wanted = {"device": "cuda", "shapes": "static", "dtype": grid.DTYPE, **where}
    rows = list(results.cases[matches(results.cases, wanted)].itertuples())
    assert len(rows) <= 1
    return rows[0] if rows else None


def test_the_last_run_of_a_case_counts_whole() -> None:
    first, second = files()[0], files()[0]
    second["rows"] = [
        {**row, "median_us": 7.0}
        for row in second["rows"]
        if row["workload"] == "mul" and row["N"] == 2 and row["mode"] == "default"
    ]
    found = collect([first, second])
    of = {"workload": "mul", "H": 2048, "N": 2, "provider": "inductor"}
    assert case(found, **of, mode="default").median_us == 7.0
    assert case(found, **of, mode="max-autotune") is None
    assert case(found, **{**of, "N": 1}, mode="default").median_us == 5.0


def test_of_several_draws_the_mean_counts_unless_one_failed() -> None:
    contents = files()
    where = {**STATIC, "workload": "glue", "N": 64, "provider": "inductor", "mode": "max-autotune"}
    edit(contents, {"median_us": 6.5}, **where, draw=1)
    row = case(collect(contents), **where)
    assert row.median_us == pytest.approx((5.0 + 6.5 + 5.0) / 3)
    assert (row.p10_us, row.p90_us) == (5.0, 6.5), "the range of the draws"
    edit(contents, {"error": "x", "median_us": None}, **where, draw=2)
    row = case(collect(contents), **where)
    assert row.error == "x"
    assert row.median_us != row.median_us


def test_of_several_compiles_of_a_module_the_fastest_counts_unless_one_failed() -> None:
    contents = files()
    where = {"model": "qwen2_moe", "part": "block", "tokens": 16, "provider": "inductor"}
    where["mode"] = "default"
    (modules,) = [content for content in contents if content["kind"] == "modules"]
    (first,) = [row for row in modules["rows"] if row.items() >= where.items()]
    slow, fast = {**first, "draw": 1, "median_us": 130.0}, {**first, "draw": 2, "median_us": 95.0}
    modules["rows"] += [slow, fast]

    def found() -> Any:
        frame = collect(contents).modules
        (row,) = frame[matches(frame, where)].itertuples()
        return row

    assert (found().median_us, found().slowest_us, found().draw) == (95.0, 130.0, 2)
    del slow["median_us"]
    slow["error"] = "x"
    assert found().error == "x"


def test_ratios_and_costs_are_taken_within_a_mode() -> None:
    contents = files()
    where = {**STATIC, "workload": "glue", "N": 64}
    edit(contents, {"median_us": 4.0}, **where, provider="inductor", mode="max-autotune")
    plain = {**where, "workload": "glue_nogate", "provider": "inductor", "mode": "max-autotune"}
    edit(contents, {"median_us": 1.0}, **plain)
    found = collect(contents)
    row = case(found, **where, provider="gatefuse-auto", mode="max-autotune")
    assert (row.ratio, row.cost_us, row.inductor_cost_us) == (0.5, 1.0, 3.0)
    row = case(found, **where, provider="gatefuse-auto", mode="default")
    assert (row.ratio, row.cost_us, row.inductor_cost_us) == (0.4, 0.5, 3.5)
    assert case(found, **where, provider="eager").cost_us == 7.5
    assert row.best_us == 2.0


def test_header_names_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {(): "GPU A, 580\nGPU B, 580", ("-i", "1"): "GPU B, 580"}
    monkeypatch.setattr(store, "_output", lambda *command: found[command[3:]])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert store._gpu() == "GPU A, 580"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert store._gpu() == "GPU B, 580"


def test_header_keeps_no_folders_of_the_machine(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path / "out"), "--grid", "main"]
    assert store.header("cpu", arguments)["arguments"] == ["--out", "out", "--grid", "main"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        ("", "is not a result file"),
        ("[1]", "is not a result file"),
        ("{}", "is not a result file"),
        ('{"kind": "cpu", "header": {}, "rows": []}', "is not a result file"),
        ('{"kind": "cpu", "header": {"date": "2026"}, "rows": 3}', "is not a result file"),
        ('{"kind": "cpu", "header": {"date": "2026"}, "rows": [3]}', "is not a result file"),
        ('{"kind": "cpu", "header": {"date": "2026"}, "rows": []}', "nothing was measured"),
        ('{"kind": "odd", "header": {"date": "2026"}, "rows": [{}]}', "no tables of odd"),
    ],
)
def test_a_file_without_results_is_a_line_and_not_a_traceback(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    if text is not None:
        path.write_text(text)
    assert command.main(["report", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmarks: ") and message in line
    assert path.name in line or "measured" in message or "tables" in message


def test_results_that_cannot_be_written_are_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    arguments = ["workloads", "--device", "cpu", "--out", str(tmp_path / "file")]
    assert command.main(arguments) == 2
    assert "file cannot be made" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [("matplotlib", ["publish"]), ("pandas", ["report", "x.json"]), ("pebble", ["workloads"])],
)
def test_a_missing_package_is_a_line(missing: str, arguments: list[str]) -> None:
    """In a process of its own: here everything is imported."""
    code = f"""
        import sys
        sys.modules[{missing!r}] = None
        from benchmarks.__main__ import main
        print(main({arguments!r}))
    """
    done = run_python(code)
    assert done.stdout.split() == ["2"]
    (line,) = done.stderr.splitlines()
    assert missing in line and "pip install -e '.[benchmarks,demo]'" in line
