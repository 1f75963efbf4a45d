"""Inductor's caches stay on: a second process takes the fused code from them and says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.graphs import op_nodes
from tests.support.programs import run_python

CODE = """
import json, sys
import torch
from torch._dynamo.utils import counters
import gatefuse
from tests.support.form_table import Form
from tests.support.forms import linear_bias

arguments = json.loads(sys.argv[1])
form = Form("", linear_bias, (arguments["rows"],), torch.bfloat16, grad=arguments["train"])
inputs = form.inputs()
for options in arguments["compilations"]:
    torch._dynamo.reset()
    counters.clear()
    with gatefuse.record() as report:
        compiled = torch.compile(
            linear_bias, options=None if options is None else gatefuse.options(**options)
        )
        results = [compiled(*inputs)]
        if form.grad:
            results += torch.autograd.grad(results[0].float().square().sum(), inputs)
    print(json.dumps({
        "results": [t.detach().float().tolist() for t in results],
        "fused": report.fused,
        "from_cache": [g.from_cache for g in report.graphs],
        "sites": len(report.sites),
        "text": str(report),
        "fx_hit": counters["inductor"]["fxgraph_cache_hit"],
        "fx_miss": counters["inductor"]["fxgraph_cache_miss"],
        "bypass": counters["inductor"]["fxgraph_cache_bypass"],
        "aot_hit": counters["aot_autograd"]["autograd_cache_hit"],
    }))
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for the file; tests differ in their rows."""
    return tmp_path_factory.mktemp("cache")


def run(
    directory: Path,
    compilations: list[dict[str, Any] | None],
    *,
    rows: int,
    train: bool,
    autograd_cache: bool,
) -> list[dict[str, Any]]:
    """A process that compiles one function with each of these gatefuse options, None for without
    gatefuse, and tells what happened each time."""
    done = run_python(
        CODE,
        json.dumps({"compilations": compilations, "train": train, "rows": rows}),
        TORCHINDUCTOR_CACHE_DIR=str(directory),
        TORCHINDUCTOR_VEC_ISA_OK="1",  # Inductor's probes of the CPU are not in this cache
        TORCHINDUCTOR_FX_GRAPH_CACHE="1",
        TORCHINDUCTOR_AUTOGRAD_CACHE=str(int(autograd_cache)),
    )
    return [json.loads(line) for line in done.stdout.splitlines()[-len(compilations) :]]


@pytest.mark.parametrize(
    ("train", "autograd_cache", "rows"),
    [(False, True, 5), (False, False, 6), (True, True, 7)],
    ids=["inference-aot-cache", "inference-fx-cache", "training-aot-cache"],
)
def test_caches(directory: Path, train: bool, autograd_cache: bool, rows: int) -> None:
    how = {"rows": rows, "train": train, "autograd_cache": autograd_cache}
    cold, again = run(directory, [{}, {}], **how)
    warm, rounded, alone = run(directory, [{}, {"eager_rounding": True}, None], **how)

    assert cold["bypass"] == 0
    assert (cold["fused"], cold["sites"]) == (1, 1)
    assert not any(cold["from_cache"])

    # From the cache, in the same process and in another.
    for hit in (again, warm):
        assert hit["results"] == cold["results"]
        assert (hit["fx_miss"], hit["sites"], hit["fused"]) == (0, 1, 1)
        assert hit["text"].splitlines()[1:-1] == cold["text"].splitlines()[1:]
        assert hit["aot_hit"] == int(autograd_cache)
        assert hit["fx_hit"] > 0 or autograd_cache
        assert any(hit["from_cache"])
        assert "cache" in hit["text"]

    # Not from the cache: other options, and no gatefuse.
    for miss, sites in ((rounded, 1), (alone, 0)):
        assert (miss["aot_hit"], miss["fx_hit"]) == (0, 0)
        assert (miss["sites"], miss["fused"]) == (sites, sites)
        assert not any(miss["from_cache"])


DUMPED = """
import torch
import gatefuse
from tests.support.forms import linear_bias, make_inputs

with gatefuse.record() as report, torch.no_grad():
    torch.compile(linear_bias, options=gatefuse.options())(*make_inputs(linear_bias))
print(report)
"""


def test_dumps_on_a_warm_cache(tmp_path: Path) -> None:
    """A dump never says nothing: it has the graphs, or how to get them."""

    def dump(name: str) -> tuple[dict[str, Any], list[int], str]:
        done = run_python(
            DUMPED,
            TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
            TORCHINDUCTOR_VEC_ISA_OK="1",
            TORCHINDUCTOR_FX_GRAPH_CACHE="1",
            GATEFUSE_DUMP=str(tmp_path / name),
        )
        (folder,) = (tmp_path / name).iterdir()
        graphs = [p for p in sorted(folder.glob("*.py")) if not p.name.endswith(".code.py")]
        texts = [path.read_text() for path in graphs]
        found = json.loads((folder / "report.json").read_text())
        return found, [op_nodes(text) for text in texts], done.stdout

    cold, graphs, _ = dump("cold")
    assert (cold["fused"], cold["graphs"][0]["from_cache"], graphs) == (1, False, [1, 0])

    warm, graphs, _ = dump("warm")
    assert (warm["fused"], warm["graphs"][0]["from_cache"], graphs) == (1, True, [1, 0])
    assert warm["graphs"][0]["sites"] == cold["graphs"][0]["sites"]

    for path in (tmp_path / "cache" / "gatefuse").iterdir():
        path.unlink()
    lost, graphs, text = dump("lost")
    assert (lost["fused"], graphs) == (1, [])
    for said in (lost["note"], text):
        assert "TORCHINDUCTOR_FORCE_DISABLE_CACHES=1" in said
