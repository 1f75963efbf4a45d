"""Other ways to write the gate, and what only looks like one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table

import gatefuse
from tests.support.comparison import compile_and_compare

BF16, FP16 = torch.bfloat16, torch.float16


def operands(dtype: torch.dtype = torch.float32, lead: tuple[int, ...] = (6,)) -> Any:
    """x, w, v and an addend."""
    shapes = (*lead, 48), (1, 48), (*lead, 16), (*lead, 16)
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


def addcmul(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return torch.addcmul(r, torch.sigmoid(F.linear(x, w)), v)


def addcmul_swapped(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return torch.addcmul(r, v, torch.sigmoid(F.linear(x, w)))


def addcmul_in_place(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return r.clone().addcmul_(torch.sigmoid(F.linear(x, w)), v)


def repeated(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w)).repeat(*[1] * (v.dim() - 1), v.shape[-1]) * v


def tiled(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return r + torch.sigmoid(F.linear(x, w)).tile(v.shape[-1]) * v


def repeat_interleaved(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w)).repeat_interleave(v.shape[-1], dim=-1) * v


def expanded_as(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w)).expand_as(v) * v


def expanded(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return v * torch.sigmoid(F.linear(x, w)).expand(-1, *v.shape[1:])


def broadcast_to(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return torch.broadcast_to(torch.sigmoid(F.linear(x, w)), v.shape) * v


def by_exp(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-F.linear(x, w))) * v


def by_reciprocal(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return r + torch.reciprocal(torch.exp(-F.linear(x, w)) + 1) * v


def by_tanh(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return (0.5 * torch.tanh(F.linear(x, w) / 2) + 0.5) * v


FUSED = [
    addcmul,
    addcmul_swapped,
    addcmul_in_place,
    repeated,
    tiled,
    repeat_interleaved,
    expanded_as,
    expanded,
    broadcast_to,
    by_exp,
    by_reciprocal,
    by_tanh,
]


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("fn", FUSED)
def test_fused(fn: Callable[..., Any], dtype: torch.dtype) -> None:
    compared = compile_and_compare(fn, operands(dtype))
    compared.check()
    assert compared.report.fused == 1
    assert compared.report.sites[0].has_addend == ("r" in used_names(fn))


def used_names(fn: Callable[..., Any]) -> set[str]:
    source = fn.__code__
    names = source.co_varnames[: source.co_argcount]
    import dis

    return {i.argval for i in dis.get_instructions(fn) if i.opname == "LOAD_FAST"} & set(names)


@pytest.mark.parametrize("fn", [addcmul, by_exp, by_tanh])
def test_fused_in_training(fn: Callable[..., Any]) -> None:
    inputs = tuple(t.requires_grad_() for t in operands())
    compared = compile_and_compare(fn, inputs, grad=True)
    compared.check()
    forward = [g for g in compared.report.graphs if g.phase == "forward"]
    assert [g.fused for g in forward] == [1]


@pytest.mark.parametrize("fn", [by_exp, by_tanh])
def test_eager_rounding_is_known_of_a_sigmoid_only(fn: Callable[..., Any]) -> None:
    with gatefuse.fusing(eager_rounding=True) as report, torch.no_grad():
        torch.compile(fn)(*operands(BF16))
    assert report.fused == 0
    assert "written as a sigmoid" in report.rejections[0].reason


def addcmul_scaled(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return torch.addcmul(r, torch.sigmoid(F.linear(x, w)), v, value=0.5)


def addcmul_of_a_row(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return torch.addcmul(r[:1], torch.sigmoid(F.linear(x, w)), v)


def divided(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return v / (1 + torch.exp(-F.linear(x, w)))


def two_class_softmax(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    z = F.linear(x, w)
    return torch.softmax(torch.cat([z, torch.zeros_like(z)], -1), -1)[..., :1] * v


def hardsigmoid(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return F.hardsigmoid(F.linear(x, w)) * v


def quarter_tanh(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return (0.5 * torch.tanh(F.linear(x, w) / 4) + 0.5) * v


def two_plus_exp(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return 1 / (2 + torch.exp(-F.linear(x, w))) * v


def into_cat(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return torch.cat([torch.sigmoid(F.linear(x, w)), v], -1)


def returned(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w))


def of_a_maximum(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return torch.sigmoid(x.amax(-1, keepdim=True)) * v


@pytest.mark.parametrize(
    "fn, reason",
    [
        (addcmul_scaled, "addcmul scales the product"),
        (addcmul_of_a_row, "addend of addcmul is broadcast"),
        (divided, "not a sigmoid, but aten.neg, aten.exp, aten.add.Tensor, stands between"),
        (two_class_softmax, "aten.exp"),
        (hardsigmoid, "aten.clamp_min, aten.clamp_max"),
        (quarter_tanh, "aten.tanh"),
        (two_plus_exp, "aten.exp"),
        (into_cat, "it goes into aten.cat"),
        (returned, "in this graph, which returns it"),
        (of_a_maximum, "it comes from aten.amax"),
    ],
)
def test_left_alone_with_the_reason(fn: Callable[..., Any], reason: str) -> None:
    if "addcmul" in reason and torch.ops.aten.addcmul.default in select_decomp_table():
        pytest.skip("here addcmul is a product and a sum before the pass sees it")
    compared = compile_and_compare(fn, operands(), alone=True)
    compared.check_identical()
    assert compared.report.fused == 0
    assert [reason in r.reason for r in compared.report.rejections] == [True]


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_freezing_is_named(dtype: torch.dtype) -> None:
    """In bfloat16 Inductor packs the sigmoid with the linear: no sigmoid is left to reject. For a
    processor on which oneDNN has no bfloat16 it packs nothing, and the gate is fused."""
    packed = dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()

    class Gate(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = torch.nn.Linear(16, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(self.gate(x)) * x

    with inductor_config.patch(freezing=True), torch.no_grad(), gatefuse.fusing() as report:
        torch.compile(Gate().eval().to(dtype))(torch.randn(6, 16).to(dtype))
    assert report.fused == (not packed)
    reasons = ["packed for the CPU (freezing)" in r.reason for r in report.rejections]
    assert reasons == [True] * packed


def test_batch_fusion_is_named() -> None:
    def fn(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Any:
        return [torch.sigmoid(F.linear(t, w)) * v for t in (x, x + 1)]

    options = {"batch_sigmoid": {"min_fuse_set_size": 2}}
    patch = inductor_config.patch(pre_grad_fusion_options=options)
    with patch, torch.no_grad(), gatefuse.fusing() as report:
        torch.compile(fn)(*operands())
    assert report.fused == 0
    assert "perhaps by Inductor's batch fusion" in report.rejections[0].reason


def test_the_backwards_own_sigmoid_is_not_left_alone() -> None:
    """It is the derivative of a gate that was fused."""
    x, w, v, r = (t.requires_grad_() for t in operands())
    with gatefuse.fusing() as report:
        torch.compile(addcmul)(x, w, v, r).sum().backward()
    assert {g.phase: (g.fused, g.rejections) for g in report.graphs} == {
        "forward": (1, []),
        "backward": (0, []),
    }


# --- nodes nobody foresaw -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_an_odd_weight_leaves_the_other_gates_alone(shape: tuple[int, ...]) -> None:
    def fn(x: Tensor, s: Tensor, x2: Tensor, w: Tensor, v: Tensor) -> Any:
        odd = torch.sigmoid(torch.bmm(x, s.expand(4, 16, 1))) * v
        return odd, torch.sigmoid(F.linear(x2, w)) * x2

    shapes = (4, 3, 16), shape, (6, 16), (1, 16), (4, 3, 8)
    compared = compile_and_compare(fn, tuple(torch.randn(s) for s in shapes))
    compared.check()
    assert compared.report.fused == 1
    assert [g.error for g in compared.report.graphs] == [None]
    assert len(compared.report.rejections) == 1


class _Keywords(CustomGraphPass):
    """Writes ``mm(self, mat2=...)``, which Inductor compiles as well."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
            node.args, node.kwargs = node.args[:1], {"mat2": node.args[1]}

    def uuid(self) -> None:
        return None


def test_arguments_by_keyword() -> None:
    x, w, v, _ = operands()
    patch = inductor_config.patch(post_grad_custom_post_pass=_Keywords())
    with patch, torch.no_grad(), gatefuse.fusing(expect=1):
        torch.compile(lambda x, w, v: torch.sigmoid(F.linear(x, w)) * v)(x, w, v)


def test_an_error_at_one_candidate_rejects_that_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    from gatefuse.inductor import match_gate

    match, seen = match_gate.match_logit, []

    def fail_first(sigmoid: Any) -> Any:
        seen.append(sigmoid)
        if len(seen) == 1:
            raise IndexError("odd")
        return match(sigmoid)

    monkeypatch.setattr(match_gate, "match_logit", fail_first)
    x, w, v, _ = operands()
    with gatefuse.fusing() as report, torch.no_grad():
        torch.compile(lambda x, w, v: [torch.sigmoid(F.linear(t, w)) * v for t in (x, x + 1)])(
            x, w, v
        )
    assert report.fused == 1
    assert [r.reason for r in report.rejections] == ["cannot be read: IndexError: odd"]


def test_other_padding_is_no_padding() -> None:
    """A product of operands padded with ones is not the product that was padded."""

    def fn(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Tensor:
        padded = F.pad(w.t(), [0, 7, 0, 8], value=0.5)
        return torch.sigmoid((F.pad(x, [0, 8], value=1.0) @ padded)[:, :1]) * v

    compared = compile_and_compare(fn, operands())
    compared.check()
    assert compared.report.fused == 0


NO_SIGMOIDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "reciprocal": lambda z, v: torch.reciprocal(torch.exp(z)) * v,
    "reciprocal-plus-one": lambda z, v: 1 / (1 + torch.relu(z)) * v,
    "exp-of-the-logit": lambda z, v: 1 / (1 + torch.exp(z)) * v,
    "tanh": lambda z, v: torch.tanh(z) * v,
    "tanh-of-a-product": lambda z, v: (0.5 * torch.tanh(z * v[:, :1]) + 0.5) * v,
    "tanh-of-a-quotient": lambda z, v: (0.5 * torch.tanh(z / v[:, :1]) + 0.5) * v,
    "tanh-of-a-quotient-by-zero": lambda z, v: (0.5 * torch.tanh(z / 0.0) + 0.5) * v,
    "tanh-by-a-third": lambda z, v: (0.3 * torch.tanh(z / 2) + 0.5) * v,
    "tanh-plus-a-quarter": lambda z, v: (0.5 * torch.tanh(z / 2) + 0.25) * v,
    "tanh-minus-a-half": lambda z, v: (0.5 * torch.tanh(z / 2) - 0.5) * v,
    "tanh-halved-and-squared": lambda z, v: (0.5 * torch.tanh(z / 2)).square() * v,
}


@pytest.mark.parametrize("other", NO_SIGMOIDS.values(), ids=NO_SIGMOIDS.keys())
def test_no_sigmoid_beside_a_gate(other: Callable[[Tensor, Tensor], Tensor]) -> None:
    """What begins like a sigmoid of other functions is none, and spoils no gate beside it."""

    def fn(x: Tensor, w: Tensor, v: Tensor, r: Tensor) -> Any:
        return torch.sigmoid(F.linear(x, w)) * v, other(F.linear(r, w[:, :16]), v)

    compared = compile_and_compare(fn, operands())
    compared.check()
    assert compared.report.fused == 1
    assert [g.error for g in compared.report.graphs] == [None]
