"""Guards of the matcher against what the metadata of a graph may say, or settings of PyTorch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._inductor import config
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

import gatefuse
from gatefuse.inductor.fusion_pass import GateFusionPass
from gatefuse.inductor.fx_utils import widens
from gatefuse.inductor.match_gate import find_sites
from gatefuse.inductor.rewriter import DifferentResult, check_same
from tests.support.guards import BF16, SHAPES, Guard, gate

aten = torch.ops.aten


def traced(fn: Callable[..., Any], **sizes: tuple[int, ...]) -> Graph:
    return make_fx(fn, tracing_mode="fake")(*Guard("", fn, sizes=sizes).inputs()).graph


def gated(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return gate(x, w) * v


def reasons_of(graph: Graph, options: gatefuse.Options | None = None) -> list[str]:
    """Run the pass; what it says of the gates that it leaves alone."""
    with gatefuse.record() as report:
        GateFusionPass(options)(graph)
    assert report.graphs[0].error is None
    return [r.reason for r in report.rejections]


def move(nodes: Iterable[Node], device: str) -> None:
    """Metadata of tensors on a device that need not be there."""
    for node in nodes:
        if isinstance(val := node.meta.get("val"), Tensor):
            elements = val.to("meta")
            node.meta["val"] = FakeTensor(val.fake_mode, elements, torch.device(device))


def test_a_device_that_was_not_tried() -> None:
    graph = traced(gated)
    move(graph.nodes, "mps")
    assert reasons_of(graph) == ["not tried on device mps"]


def test_operands_on_several_devices() -> None:
    graph = traced(gated)
    move(graph.find_nodes(op="placeholder")[:1], "cuda")
    assert reasons_of(graph) == ["operands are on several devices: cpu, cuda:0"]


def test_a_sparse_value() -> None:
    graph = traced(gated)
    value = graph.find_nodes(op="placeholder")[2]
    value.meta["val"] = torch.empty(6, 16).to_sparse()
    assert reasons_of(graph) == ["the value is not a strided tensor"]


def with_linear(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Any:
    return r + gate(x, w).expand(6, 16) * v


def with_columns(x: Tensor, w: Tensor, v: Tensor) -> Any:
    return torch.sigmoid((x.unsqueeze(-1) * w.view(16, 1)).sum(1)) * v


def with_sum(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Any:
    g = torch.sigmoid((x.view(6, 16).float() * w).sum(-1, True)).to(BF16)
    return torch.addcmul(r, g, v)


@pytest.mark.parametrize("fn", [with_linear, with_sum, with_columns])
def test_nodes_without_metadata(fn: Callable[..., Any]) -> None:
    """Whichever it is, its gate is fused or left alone with a reason."""
    for i in range(len(traced(fn).nodes) - 1):
        graph = traced(fn)
        node = list(graph.nodes)[i]
        del node.meta["val"]
        assert not any("cannot be read" in reason for reason in reasons_of(graph)), node


def kept(x: Tensor, w: Tensor, v: Tensor) -> Any:
    z = torch.mv(x, w)
    return torch.sigmoid(z).unsqueeze(-1) * v, z


@pytest.mark.parametrize("mode", [None, FakeTensorMode()])
def test_metadata_of_other_kinds(mode: FakeTensorMode | None) -> None:
    """Real tensors, or fake ones that know no symbols."""
    graph = traced(kept, w=(16,))
    for node in graph.nodes:
        if isinstance(val := node.meta.get("val"), Tensor):
            with mode or contextlib.nullcontext():
                node.meta["val"] = torch.empty_strided(val.shape, val.stride(), dtype=val.dtype)
    assert reasons_of(graph) == []


def test_new_nodes_have_the_names_of_their_operators() -> None:
    """Inductor names its kernels by them."""
    graph = traced(kept, w=(16,))
    old = set(graph.nodes)
    GateFusionPass()(graph)
    new = [n for n in graph.nodes if n not in old]
    assert [n.meta.get("original_aten") for n in new] == [
        n.target if isinstance(n.target, torch._ops.OpOverload) else None for n in new
    ]
    assert any("gatefuse" in str(n.target) for n in new)


ONES = torch.ones(1, 4)
DIFFERENT = {
    "same": (ONES, ONES, True),
    "dtype": (ONES, ONES.half(), False),
    "shape": (torch.ones(2, 4), torch.ones(3, 4), False),
    "strides": (torch.ones(2, 4), torch.ones(4, 2).t(), False),
    "strides-of-size-one": (ONES, ONES.as_strided((1, 4), (7, 1)), True),
}
"""Two tensors, and whether one may stand for the other."""


@pytest.mark.parametrize("case", DIFFERENT.values(), ids=DIFFERENT.keys())
def test_what_the_op_may_return(case: tuple[Tensor, Tensor, bool]) -> None:
    new, old, same = case
    with contextlib.nullcontext() if same else pytest.raises(DifferentResult):
        check_same(new, old)


@pytest.mark.parametrize("placement", ["auto", "inline"])
@pytest.mark.parametrize("symbolic", ["", "x", "v"])
def test_a_symbolic_width_on_a_gpu(symbolic: str, placement: Any) -> None:
    """One compile serves all numbers of rows, and of many it would be slower."""

    def fn(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return torch.sigmoid(torch.mm(x, w.t())) * v

    mode = FakeTensorMode(shape_env=ShapeEnv())
    inputs = []
    for name, width in ("x", "x"), ("w", "x"), ("v", "v"):
        width_is = DimDynamic.DYNAMIC if width == symbolic else DimDynamic.STATIC
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.STATIC, width_is])
        given, source = torch.randn(SHAPES[name]), ConstantSource(name)
        inputs.append(mode.from_tensor(given, source=source, symbolic_context=context))
    with mode:
        graph = make_fx(fn, tracing_mode="real")(*inputs).graph
    move(graph.nodes, "cuda")
    left_alone = bool(symbolic) and placement == "auto"
    reasons = reasons_of(graph, gatefuse.Options(placement=placement))
    assert ["a width is symbolic" in r for r in reasons] == [True] * left_alone


def test_a_roundings_source_is_not_the_operand() -> None:
    """What was rounded on its way to the linear is rounded when the op reads it."""
    for fn in (
        lambda x, w, v, b: torch.sigmoid(F.linear(x.to(BF16), w.to(BF16), b.to(BF16))) * v,
        lambda x, w, v, b: torch.sigmoid((x.to(BF16) * w.to(BF16)).sum(-1, True) + b.to(BF16)) * v,
    ):
        ((site,), _) = find_sites(traced(fn, b=(1,)))
        for node in (site.input, site.weight, site.bias):
            assert node is not None
            assert node.meta["val"].dtype == BF16


def test_an_input_from_another_device() -> None:
    graph = traced(lambda x, w, v: torch.sigmoid(F.linear(x.to(BF16).float(), w)) * v)
    _, widened = graph.find_nodes(op="call_function", target=aten._to_copy.default)
    move([n for n in graph.nodes if n >= widened or n.name in ("w_1", "v_1")], "cuda")
    ((site,), _) = find_sites(graph)
    assert site.input is widened


@pytest.mark.parametrize("to", [torch.float16, BF16, torch.float32])
@pytest.mark.parametrize("given", [torch.float16, BF16, torch.float32])
def test_what_loses_nothing(given: torch.dtype, to: torch.dtype) -> None:
    graph = make_fx(lambda x: aten._to_copy(x, dtype=to), tracing_mode="fake")(
        torch.ones(1, dtype=given)
    ).graph
    (node,) = graph.find_nodes(op="call_function", target=aten._to_copy.default)
    assert widens(node) == (to in (given, torch.float32))


@pytest.mark.parametrize("split", [False, True])
def test_the_graph_ends_at_the_gate(monkeypatch: pytest.MonkeyPatch, split: bool) -> None:
    """In a distributed program the reason names what may have split the graph."""
    graph = traced(gate)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: split)
    (reason,) = reasons_of(graph)
    assert "which returns it" in reason
    assert ("optimize_ddp" in reason) == split
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    (reason,) = reasons_of(graph)
    assert "optimize_ddp" not in reason


@pytest.mark.parametrize("which", ["pre_grad_fusion_options", "post_grad_fusion_options"])
def test_inductors_batch_fusion_may_be_the_reason(which: str) -> None:
    with config.patch({which: {"batch_linear": {}}}):
        (reason,) = reasons_of(traced(gate_into_cat))
    assert "batch fusion" in reason
    (reason,) = reasons_of(traced(gate_into_cat))
    assert "batch fusion" not in reason


def gate_into_cat(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.cat([gate(x, w), v], -1)


@pytest.mark.parametrize(("width", "packed"), [(1, True), (16, False)])
def test_a_packed_linear(width: int, packed: bool) -> None:
    """Inductor packs linears for the CPU in functions of its own; only one output is a gate."""
    graph = traced(lambda x, w, v: (torch.tanh(x[:, :width]) * v, v + 1), w=(1, 1))
    (node,) = graph.find_nodes(op="call_function", target=aten.tanh.default)
    node.target = functools.partial(torch.tanh)
    expected = ["the linear is packed for the CPU (freezing)"] * packed
    assert [r.reason for r in find_sites(graph)[1]] == expected
    for without in (*node.users, node):
        val = without.meta.pop("val")
        assert find_sites(graph)[1] == []
        without.meta["val"] = val
