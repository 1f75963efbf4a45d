"""Nested compiles, forked and spawned processes, and caches that are carried elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatefuse
from tests.routes.gates import SharedExpert, judge_all, make_expert, make_input
from tests.support.comparison import compile_and_compare
from tests.support.programs import run_python


class Layers(nn.Module):
    """Two experts, one after the other, each called through `wrap`."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([SharedExpert(), SharedExpert()])
        self.wrap = wrap

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.wrap(layer)(x)
        return x


def call_layer(layer: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = layer(x)
    return result


region = torch.compiler.nested_compile_region(call_layer)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_nested_compile_region(grad: bool) -> None:
    """The layers share the code of one subgraph, whose gate is fused once."""
    model = Layers(lambda layer: lambda x: region(layer, x))
    comparison = compile_and_compare(model, (make_input(grad=grad),), grad=grad)
    comparison.check()
    fused = [(g.phase, g.fused) for g in comparison.report.graphs if g.fused]
    assert fused == [("subgraph", 1)], comparison.report


def test_a_compiled_layer_in_a_compiled_model() -> None:
    """The outer compile inlines the inner one: one graph, both gates."""
    layers = Layers(lambda layer: layer)
    layers.layers[0] = torch.compile(layers.layers[0])
    x = make_input()
    with torch.no_grad():
        eager = Layers(lambda layer: layer)
        with gatefuse.fusing() as report:
            fused = torch.compile(layers)(x)
        judge_all([fused], [eager(x)], [eager.double()(x.double())])
    assert [g.fused for g in report.graphs] == [2]


def test_a_compiled_layer_outside_of_the_graph() -> None:
    """A layer that is kept out of the outer graph and compiled by itself is fused by itself."""

    def left_out(layer: nn.Module) -> Any:
        compiled = torch.compile(layer)
        return torch.compiler.disable(lambda x: compiled(x), recursive=False)

    model, x = Layers(lambda layer: layer), make_input()
    first, second = model.layers
    outside = left_out(first)
    with torch.no_grad():
        with gatefuse.fusing() as report:
            fused = torch.compile(lambda x: second(outside(x)))(x)
        judge_all([fused], [model(x)], [model.double()(x.double())])
    assert [g.fused for g in report.graphs] == [1, 1]


def in_process(fused: Tensor) -> None:
    """Assert the result of `expert_compiled`, in whatever process it was made."""
    model, x = make_expert(), make_input()
    with torch.no_grad():
        judge_all([fused], [model(x)], [model.double()(x.double())])


def expert_compiled(**arguments: Any) -> int:
    """Compile the expert anew, check the result; how many gates were fused."""
    torch._dynamo.reset()
    with torch.no_grad(), gatefuse.record() as report:
        in_process(torch.compile(make_expert(), **arguments)(make_input()))
    return report.fused


def work_of_a_spawned_process(options: dict[str, Any], queue: Any) -> None:
    queue.put([expert_compiled(), expert_compiled(options=options)])


def test_fork() -> None:
    """A forked process goes on as its parent was: with gatefuse on, and what it has compiled."""
    code = """
        import multiprocessing, torch, gatefuse
        from tests.routes.test_processes import expert_compiled, in_process
        from tests.routes.gates import make_expert, make_input

        gatefuse.enable()
        model = torch.compile(make_expert())
        with torch.no_grad():
            model(make_input())

        def child(queue):
            with torch.no_grad():
                in_process(model(make_input()))
            queue.put(expert_compiled())

        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        process = context.Process(target=child, args=(queue,))
        process.start()
        print(queue.get(timeout=240))
        process.join()
    """
    assert run_python(code).stdout.split()[-1] == "1"


def test_spawn() -> None:
    """A spawned process starts without; the options of a compile can be sent to it."""
    code = """
        import multiprocessing, gatefuse
        from tests.routes.test_processes import work_of_a_spawned_process

        gatefuse.enable()
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        arguments = gatefuse.options(), queue
        process = context.Process(target=work_of_a_spawned_process, args=arguments)
        process.start()
        print(*queue.get(timeout=240))
        process.join()
    """
    assert run_python(code).stdout.split()[-2:] == ["0", "1"]


CARRIED = """
import json, sys, torch, gatefuse
from torch._dynamo.utils import counters
from tests.routes.gates import make_expert, make_input
from tests.routes.test_processes import in_process

path, load = sys.argv[1], sys.argv[2] == "load"
if load:
    torch.compiler.load_cache_artifacts(open(path, "rb").read())
with torch.no_grad(), gatefuse.fusing() as report:
    in_process(torch.compile(make_expert())(make_input()))
if not load:
    open(path, "wb").write(torch.compiler.save_cache_artifacts()[0])
print(json.dumps([report.fused, report.from_cache, len(report.sites), str(report)]))
"""


def test_cache_artifacts(tmp_path: Path) -> None:
    """What one machine has compiled is loaded into the empty cache of another."""

    def run(cache: str, action: str) -> list[Any]:
        done = run_python(
            CARRIED,
            str(tmp_path / "artifacts"),
            action,
            TORCHINDUCTOR_CACHE_DIR=str(tmp_path / cache),
            TORCHINDUCTOR_VEC_ISA_OK="1",
            TORCHINDUCTOR_FX_GRAPH_CACHE="1",
            TORCHINDUCTOR_AUTOGRAD_CACHE="1",
        )
        result: list[Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    assert run("first", "save")[:3] == [1, False, 1]
    *loaded, text = run("second", "load")
    assert loaded == [1, True, 0]
    assert "cache" in text
