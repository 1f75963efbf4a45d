"""Each suite once on the CPU in toy sizes: nothing runs for the first time on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks.extra import need

need()

from benchmarks import __main__ as command
from benchmarks import grid, store
from benchmarks.run_workloads import Variant
from benchmarks.store import matches
from gatefuse.bench.measure import checker
from gatefuse.bench.run import TOY
from gatefuse.bench.workloads import WORKLOADS, call, make_set
from tests.support.programs import run_python

QUICK = ["--quick", "--device", "cpu", "--processes", "1"]


def measured(directory: Path, *arguments: str) -> store.Results:
    """The results of a suite with the arguments."""
    assert command.main([*arguments, *QUICK, "--out", str(directory)]) == 0
    (path,) = directory.glob("*.json")
    content = json.loads(path.read_text())
    assert content["header"]["torch"] == torch.__version__
    assert content["rows"] and not content.get("not_run")
    return store.load([path])


def row_of(frame: Any, **where: Any) -> Any:
    (row,) = frame[matches(frame, where)].itertuples()
    return row


@pytest.mark.parametrize(
    ("one", "workload"),
    [("variants", "glue-matmuls"), ("dynamic", "mul"), ("training", "mul-training")],
)
def test_workloads_are_measured(one: str, workload: str, tmp_path: Path) -> None:
    arguments = ["workloads", "--grid", one, "--workloads", workload, "--modes", "default"]
    found = measured(tmp_path, *arguments, "--rows", "4").cases
    assert set(found["shapes"]) == set(grid.GRIDS[one].shapes)
    for shapes in grid.GRIDS[one].shapes:
        where = {"workload": workload, "shapes": shapes}
        fused = row_of(found, **where, provider="gatefuse-auto")
        plain = row_of(found, **where, provider="inductor")
        assert fused.median_us > 0 and plain.median_us > 0
        assert (fused.fused, plain.fused) == (1, 0)


def test_cpu_is_measured_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["workloads", "--workloads", "mul", "--rows", "4", "--dtypes", "float32"]
    found = measured(tmp_path, *arguments).cases
    assert set(found["case"]) == {"mul H=128 N=4 float32 CPU"}
    assert row_of(found, provider="gatefuse-auto").hot_median_us > 0
    assert TOY in capsys.readouterr().out
    title = "`sigmoid(x @ w.T) * v`, H = 128, float32, µs:"
    (path,) = tmp_path.glob("*.json")
    assert command.main(["report", str(path)]) == 2, "toy sizes are not compared"
    captured = capsys.readouterr()
    assert "toy sizes" in captured.err and title not in captured.out
    content = json.loads(path.read_text())
    content["header"]["quick"] = False
    path.write_text(json.dumps(content))
    assert command.main(["report", str(path)]) == 0
    assert title in capsys.readouterr().out


def test_a_time_that_is_over_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["workloads", "--device", "cpu", "--out", str(tmp_path), "--time-budget", "-1"]
    assert command.main([*arguments, "--processes", "1"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("benchmarks: nothing was measured")


def test_modules_are_measured(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    arguments = ["--models", "qwen2_moe", "--rows", "4", "--modes", "default"]
    arguments += ["--parts", "layer,layer-training"]
    found = measured(tmp_path, "modules", *arguments).modules
    for part in ("layer", "layer-training"):
        names = "gatefuse-auto", "inductor"
        fused, plain = (row_of(found, part=part, provider=name) for name in names)
        assert fused.fused == 1
        assert 0 < fused.kernels < plain.kernels
        assert 0 < fused.pass_ms < fused.compile_s * 1e3


def test_providers_of_a_module_are_compiled_alternately() -> None:
    pytest.importorskip("transformers")
    from benchmarks.run_modules import draws

    case = grid.ModuleCase("qwen2_moe", "block", 16, "default")
    order = [(name.partition("-")[0], draw) for name, draw in draws(case, small=False)]
    assert order[:4] == [("inductor", 0), ("gatefuse", 0), ("gatefuse", 1), ("inductor", 1)]
    assert order[4:] == [("inductor", 2), ("gatefuse", 2)]


def test_host_is_measured(tmp_path: Path) -> None:
    found = measured(tmp_path, "host", "--workloads", "mul", "--width", "64")
    by_what = {(row["what"], row.get("provider"), row.get("cache")): row for row in found.host}
    assert by_what["call", "gatefuse-auto", None]["median_us"] > 0
    assert by_what["compile", "gatefuse-auto", "cold"]["pass_ms"] > 0
    assert by_what["import", None, None]["median_ms"] > 0


def test_a_suite_in_which_nothing_is_fused_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GATEFUSE_DISABLE", "1")
    arguments = ["workloads", "--workloads", "mul", "--rows", "4", "--dtypes", "float32"]
    assert command.main([*arguments, *QUICK, "--out", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    refused = [row for row in rows if row["provider"] == "gatefuse-auto"]
    assert refused and all("0 gates were fused, not 1" in row["error"] for row in refused)
    assert not any("median_us" in row for row in refused)
    assert all("median_us" in row for row in rows if row["provider"] == "inductor")


def test_suites_of_the_kernel_need_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    for suite in ("launch-config", "sglang"):
        assert command.main([suite, "--device", "cpu"]) == 2
        assert "GPU" in capsys.readouterr().err


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
    """Rows of a suite of the Triton kernel, which runs in Triton's interpreter."""
    pytest.importorskip("triton")
    source = tmp_path / "sglang" / "kernels" / "ops" / "elementwise" / "elementwise.py"
    source.parent.mkdir(parents=True)
    source.write_text(SGLANG)
    (tmp_path / "sglang" / "__init__.py").write_text("raise ImportError('not all of sglang')")
    full = [*arguments, "--out", str(tmp_path / "out"), *QUICK]
    # Guarded, for the processes that measure import this program again.
    code = (
        f"from benchmarks import __main__ as m\nif __name__ == '__main__': exit(m.main({full!r}))"
    )
    run_python(code, TRITON_INTERPRET="1", PYTHONPATH=str(tmp_path))
    (path,) = (tmp_path / "out").glob("*.json")
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    assert not any("error" in row for row in rows)
    return rows


def test_the_launch_rule_is_measured(tmp_path: Path) -> None:
    arguments = ["--widths", "256", "--rows", "2,3", "--dtypes", "float32"]
    rows = interpreted(tmp_path, "launch-config", *arguments)
    assert {(row["N"], row["block"]) for row in rows} == {(2, 256), (2, 512), (3, 256), (3, 512)}
    assert all(row["median_us"] > 0 for row in rows)


def test_the_op_is_measured_beside_sglang(tmp_path: Path) -> None:
    rows = interpreted(tmp_path, "sglang", "--widths", "64", "--rows", "2")
    assert {(row["workload"], row["provider"]) for row in rows} == {
        (name, provider) for name in ("mul", "add") for provider in ("op", "sglang", "roofline")
    }


@pytest.mark.parametrize("name", grid.VARIANTS)
def test_variants_differ_by_the_gate_alone(name: str) -> None:
    """With the gate wide open (weights of zero give one half) the outputs are those without."""
    with torch.no_grad():
        module, inputs = make_set(name, 32, 5, torch.float64, "cpu")
        plain, _ = make_set(name + grid.NO_GATE, 32, 5, torch.float64, "cpu")
        assert isinstance(module, Variant)
        plain.load_state_dict(module.state_dict(), strict=False)
        module.gate.weight.zero_()
        matmuls = hasattr(module, "down")
        if matmuls:
            module.down.weight.mul_(2)
        doubled = module(*inputs) if matmuls else module(*inputs[:2], 2 * inputs[2])
        torch.testing.assert_close(doubled, plain(*inputs))


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_is_checked_against_float64(name: str) -> None:
    with torch.no_grad():
        module, inputs = make_set(name, 128, 40, torch.bfloat16, "cpu")
        check = checker(module, inputs)
        outputs = call(module, *inputs)
        check(outputs)
        with pytest.raises(AssertionError):
            check([y * 1.02 for y in outputs])
