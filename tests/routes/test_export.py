"""Ahead-of-time compilation: what is saved holds plain kernels and runs where gatefuse is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import gatefuse
from tests.routes.gates import judge_all, make_expert, make_input
from tests.support.programs import run_python

WITHOUT_GATEFUSE = """
import sys
sys.modules["gatefuse"] = None  # an import of it fails
import functools, torch
from tests.routes.gates import make_expert
path, inputs, results = sys.argv[1:]
"""


def run_elsewhere(load: str, saved: Path, folder: Path, *inputs: torch.Tensor) -> list[Any]:
    """The results for each input of saved code, in a process that cannot import gatefuse."""
    torch.save(inputs, folder / "inputs.pt")
    code = f"{WITHOUT_GATEFUSE}\nrun = {load}\n" + (
        "with torch.no_grad():\n"
        "    torch.save([run(x) for x in torch.load(inputs)], results)\n"
        "assert not hasattr(torch.ops.gatefuse, 'linear_sigmoid_mul')\n"
    )
    run_python(code, str(saved), str(folder / "inputs.pt"), str(folder / "results.pt"))
    results: list[Any] = torch.load(folder / "results.pt")
    return results


@pytest.mark.parametrize("way", ["options", "enable"])
def test_aot_inductor(way: str, tmp_path: Path) -> None:
    model, x, other = make_expert().eval(), make_input(), make_input(11)
    rows = torch.export.Dim("rows", min=2, max=64)
    with torch.no_grad(), gatefuse.record() as report:
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
        if way == "enable":
            gatefuse.enable(expect=1)
        configs = gatefuse.options(expect=1) if way == "options" else {}
        saved = torch._inductor.aoti_compile_and_package(
            exported, package_path=str(tmp_path / "expert.pt2"), inductor_configs=configs
        )
    assert report.fused == 1
    fused = run_elsewhere(
        "torch._inductor.aoti_load_package(path)", Path(saved), tmp_path, x, other
    )
    with torch.no_grad():
        eager = [model(x), model(other)]
        reference = [model.double()(x.double()), model(other.double())]
    judge_all(fused, eager, reference)


def test_exported_program_compiles() -> None:
    model, x = make_expert().eval(), make_input()
    exported = torch.export.export(model, (x,)).module()
    with torch.no_grad(), gatefuse.fusing(expect=1):
        fused = torch.compile(exported)(x)
    with torch.no_grad():
        judge_all([fused], [model(x)], [model.double()(x.double())])


SAVE = """
import sys, torch, gatefuse
from tests.routes.gates import make_expert, make_input
with torch.no_grad(), gatefuse.fusing(expect=1):
    compiled = torch.compile(make_expert().eval().forward, fullgraph=True)
    compiled.aot_compile(((make_input(),), {})).save_compiled_function(sys.argv[1])
"""


@pytest.mark.skipif(
    not hasattr(torch.compile(make_input), "aot_compile"), reason="this PyTorch cannot"
)
def test_aot_compile(tmp_path: Path) -> None:
    """`torch.compile(...).aot_compile(...)`: a compiled function as a file."""
    saved = tmp_path / "expert"
    run_python(
        SAVE,
        str(saved),
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
        TORCHINDUCTOR_VEC_ISA_OK="1",
        TORCHINDUCTOR_FX_GRAPH_CACHE="1",
        TORCHINDUCTOR_AUTOGRAD_CACHE="1",
    )
    model, x = make_expert().eval(), make_input()
    load = "torch.compiler.load_compiled_function(open(path, 'rb'))"
    fused = run_elsewhere(f"functools.partial({load}, make_expert().eval())", saved, tmp_path, x)
    with torch.no_grad():
        judge_all(fused, [model(x)], [model.double()(x.double())])
