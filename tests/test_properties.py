"""Properties of the rewrite: chains that keep rows are fused, and no other chain is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from gatefuse.inductor.fusion_pass import GateFusionPass
from tests.support.forms import H
from tests.support.graphs import op_nodes
from tests.support.judge import judge

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

#: Steps between linear, sigmoid and multiply that neither compute nor move a row. Each takes the
#: gate in any shape whose elements are one per row, in row order.
KEEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda g: g.reshape(-1),
    "column": lambda g: g.reshape(-1, 1),
    "row": lambda g: g.reshape(1, -1),
    "cube": lambda g: g.reshape(2, -1, 1),
    "unsqueeze-front": lambda g: g.unsqueeze(0),
    "unsqueeze-back": lambda g: g.unsqueeze(-1),
    "squeeze": lambda g: g.squeeze(),
    "clone": lambda g: g.clone(),
    "contiguous": lambda g: g.contiguous(),
    "swap-ones": lambda g: g.reshape(-1, 1, 1).transpose(1, 2),
    "permute-ones": lambda g: g.reshape(1, -1, 1).permute(1, 2, 0),
    "expand-nothing": lambda g: g.expand(g.shape),
    "float": lambda g: g.float(),
}

#: Steps that do compute or move rows.
CORRUPTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose-rows": lambda g: g.reshape(2, 3).t().reshape(-1),
    "permute-rows": lambda g: g.reshape(3, 2, 1).permute(1, 0, 2).reshape(-1),
    "flip": lambda g: g.flip(0),
    "roll": lambda g: g.reshape(-1).roll(1),
    "halves": lambda g: torch.cat([g.reshape(-1)[3:], g.reshape(-1)[:3]]),
    "first-for-all": lambda g: g.reshape(-1)[:1].expand(6),
    "repeat": lambda g: g.reshape(-1)[:3].repeat(2),
    "double": lambda g: g * 2,
    "shift": lambda g: g + 0.5,
    "negate": lambda g: -g,
    "square": lambda g: g * g,
    "relu": lambda g: g.relu(),
    "round": lambda g: g.round(),
    "coarse": lambda g: g.to(torch.float8_e5m2).float(),
    "integer": lambda g: g.to(torch.int32).float(),
    "sum": lambda g: g.sum().expand(6),
    "softmax": lambda g: g.reshape(-1).softmax(0),
    "cumsum": lambda g: g.reshape(-1).cumsum(0),
}

ROWS = 6
keeps = st.lists(st.sampled_from(sorted(KEEPS)), max_size=4)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def gate_of(
    above: list[Callable[[Tensor], Tensor]], below: list[Callable[[Tensor], Tensor]]
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def gate(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        g = F.linear(x, w)
        for step in above:
            g = step(g)
        g = torch.sigmoid(g)
        for step in below:
            g = step(g)
        return g.reshape(*v.shape[:-1], 1) * v

    return gate


def fuse(fn: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[GraphModule, int]:
    """The ATen graph of `fn` after the pass, and the number of op nodes in it."""
    module = make_fx(fn, tracing_mode="fake")(*inputs)
    GateFusionPass()(module.graph)
    module.recompile()
    return module, op_nodes(module.graph)


def make(dtype: torch.dtype, lead: tuple[int, ...]) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((*lead, H), (1, H), (*lead, H))
    return tuple(torch.randn(shape).mul(0.3).to(dtype) for shape in shapes)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(above=keeps, below=keeps, dtype=dtypes, cube=st.booleans())
def test_row_preserving_chains_are_fused(
    above: list[str], below: list[str], dtype: torch.dtype, cube: bool
) -> None:
    gate = gate_of([KEEPS[name] for name in above], [KEEPS[name] for name in below])
    inputs = make(dtype, (2, 3) if cube else (ROWS,))
    fused, ops = fuse(gate, inputs)
    assert ops == 1
    eager, reference = gate(*inputs), F.linear(*(t.double() for t in inputs[:2])).sigmoid()
    judge("result", fused(*inputs), eager, reference * inputs[2].double())


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    above=keeps,
    below=keeps,
    corruption=st.sampled_from(sorted(CORRUPTS)),
    in_front=st.booleans(),
    position=st.integers(0, 4),
)
def test_corrupted_chains_are_not_fused(
    above: list[str], below: list[str], corruption: str, in_front: bool, position: int
) -> None:
    steps = [KEEPS[name] for name in above], [KEEPS[name] for name in below]
    steps[0 if in_front else 1].insert(position, CORRUPTS[corruption])
    gate = gate_of(*steps)
    inputs = make(torch.float32, (ROWS,))
    expected = gate(*inputs)
    fused, ops = fuse(gate, inputs)
    assert ops == 0
    torch.testing.assert_close(fused(*inputs), expected, rtol=0, atol=0)
