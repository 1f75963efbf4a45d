"""Tables show values, spread, what violates a threshold, and what gatefuse left alone."""

from __future__ import annotations

from tests.benchmarks.extra import need

need()

from benchmarks import grid, publish, tables
from benchmarks.store import collect
from benchmarks.vllm import tables as vllm_tables
from tests.benchmarks.data import AUTO, STATIC, edit, engine_file, files


def cells_of_line(text: str, label: str) -> list[str]:
    lines = [[c.strip() for c in ln.split("|")[1:-1]] for ln in text.splitlines() if "|" in ln]
    (line,) = [line for line in lines if line[0] == label]
    return line[1:]


def test_tables_show_values_spread_and_what_is_violated() -> None:
    contents = files()
    edit(contents, {"median_us": 1.99}, **STATIC, **AUTO, workload="glue", N=64)
    edit(contents, {"error": "x"}, **STATIC, provider="op", workload="mul", N=64)
    edit(contents, {"median_us": 5.2}, **STATIC, **AUTO, workload="mul", N=1)
    edit(contents, {"fused": 0}, **STATIC, **AUTO, workload="mul", N=2)
    made = tables.Tables(collect(contents))
    cost = "\n".join(made.gate_costs("glue", 4096))
    values = cells_of_line(cost, "**gatefuse**")
    assert values == ["0.49" if N == 64 else "0.5" for N in grid.ROWS]
    times = "\n".join(made.times("mul", 4096))
    assert cells_of_line(times, "**gatefuse**")[:2] == ["5.2 (1.9..2.1) †", "2 (1.9..2.1) ‡"]
    assert cells_of_line(times, tables.LABELS[tables.OP])[grid.ROWS.index(64)] == "failed"
    alone = "\n".join(made.alone("mul", 4096))
    assert cells_of_line(alone, "**gatefuse**: % of the roofline's")[1] == "50"
    assert cells_of_line(alone, "**gatefuse**: GB/s")[1] == "2"
    modules = next(part for part in made.modules() if "slowest" in part).splitlines()
    first = ["qwen2_moe block", "16"]
    line = next(ln for ln in modules if [c.strip() for c in ln.split("|")[1:3]] == first)
    shown = [cell.strip() for cell in line.split("|")[3:9]]
    assert shown == ["20", "17", "100 (100..100)", "98 (98..98)", "0.980", "100"]


def test_a_violation_beside_sglang_is_flagged_there_only() -> None:
    contents = files()
    where = {"workload": "add", "provider": "op", "H": 4096, "N": 1}
    edit(contents, {"median_us": 1.26}, **where, p10_us=None)
    made = tables.Tables(collect(contents))
    beside = "\n".join(made.beside_sglang())
    assert "1.26 / 1.15 / 1.1 †" in beside
    assert beside.count("†") == 1
    assert "†" not in "\n".join(made.times("add", 4096))


def test_every_section_is_filled_from_complete_results() -> None:
    made = tables.Tables(collect([*files(), engine_file()]))
    for name, section in publish.SECTIONS.items():
        text = "\n".join(section(made))
        if name in ("Violated thresholds", "Slower than another provider in the glue"):
            assert not text, name
        else:
            assert name == "Not measured yet" or "\n|:---" in text, name
    assert "0 thresholds are violated" in publish.summary(made)[-1]


def test_no_results_have_no_tables() -> None:
    text = publish.report(collect([]))
    assert not text.strip()


def test_what_is_not_measured_is_listed() -> None:
    contents = files()
    contents[0]["rows"] = [r for r in contents[0]["rows"] if r["workload"] != "glue-alone"]
    text = publish.report(collect(contents))
    assert "- glue-alone H=4096 N=8192\n" in text


def lines(text: str) -> list[str]:
    """Without the padding of tables."""
    return [" ".join(line.split()) for line in text.splitlines()]


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
        assert line in lines(text), line


def test_tables_of_vllm_without_a_profile() -> None:
    content = engine_file()
    for row in content["rows"]:
        del row["profile"]
    text = vllm_tables.everything(content)
    assert "| plugin | 1100 (+10.0 %) |" in lines(text)
    assert "Kernels per step" not in text


def test_tables_of_vllm_with_several_starts() -> None:
    """Engines of different starts are not compared with each other: a start's gain is taken within
    it, and the middle one counts."""
    content = engine_file()
    first = content["rows"]
    for number, factors in enumerate(((0.9, 0.9), (1.0, 0.97)), 1):
        for row, factor in zip(first[:2], factors, strict=True):
            speed = row["new_tokens_per_s"] * factor
            again = {
                "provider": row["provider"],
                "name": row["name"],
                "start": number,
                "spread": 0.03,
            }
            content["rows"] = [*content["rows"], again | {"new_tokens_per_s": speed, "repeats": 2}]
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
        assert line in lines(text), line
