"""Random programs: as Inductor alone computes them, and fused where they should be.

A failure prints the command that replays its case. The fuzzer is a program of its own, for longer
runs: ``python -m tests.fuzz --help``.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from gatefuse import formulas
from gatefuse.inductor import fx_utils, gradient_rewriter, rewriter
from gatefuse.inductor.fusion_pass import GateFusionPass
from gatefuse.inductor.node_order import Order
from gatefuse.operands import Operands
from tests.fuzz import steps
from tests.fuzz.generate import generate
from tests.fuzz.programs import Case, Line
from tests.fuzz.runner import failure, run_case
from tests.fuzz.shrinking import shrink
from tests.support.forms import H
from tests.support.graphs import op_nodes
from tests.support.judge import judge

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

SEED = 20251125
BLOCK = 25


def check(seed: int, indices: range, engine: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    failures = []
    for index in indices:
        result = run_case(generate(seed, index), engine)
        counts += result.counts
        if result.problems:
            failures.append(failure(result, engine, "cpu"))
    assert not failures, "\n".join(failures)
    return counts


@pytest.mark.parametrize("first", range(0, 150, BLOCK))
def test_fixed_cases(first: int) -> None:
    counts = check(SEED, range(first, first + BLOCK), "fast")
    # The share of so few cases is chance; the command line checks it over a whole run.
    assert counts["cases with a fused gate"] >= 1


@pytest.mark.parametrize("block", range(100 // BLOCK))
def test_random_cases(block: int) -> None:
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    check(seed, range(BLOCK), "fast")


@pytest.mark.parametrize("seed", [SEED, None], ids=["fixed", "random"])
def test_generated_code(seed: int | None) -> None:
    seed = random.SystemRandom().randrange(1 << 31) if seed is None else seed
    print(f"seed {seed}")
    check(seed, range(300, 304), "full")


def test_a_case_follows_from_its_seed() -> None:
    assert generate(3, 14) == generate(3, 14)
    assert generate(3, 14) != generate(3, 15)
    assert generate(3, 14) != generate(4, 14)


# --- does the fuzzer see what is wrong? -------------------------------------------------------


def case(*lines: str, outputs: str, draws: tuple[str, ...] = (), **options: object) -> Case:
    """A program with inputs x1, v1, r1 [n, 16] and w1 [1, 16]."""
    grad = f"grad={options.get('grad', False)}"
    inputs = [f"{n}1 = new({i}, (n, 16), torch.float32, {grad})" for i, n in enumerate("xvr")]
    return Case(
        seed=0,
        index=0,
        input_lines=(*inputs, f"w1 = new(9, (1, 16), torch.float32, scale=0.25, {grad})"),
        lines=tuple(Line(line, line.startswith(draws) if draws else False) for line in lines),
        arguments=("x1", "v1", "r1", "w1"),
        state=(),
        outputs=tuple(outputs.split()),
        **options,  # type: ignore[arg-type]
    )


GATE = case("z1 = F.linear(x1, w1)", "y1 = torch.sigmoid(z1) * v1 + r1", outputs="y1")
DRAWS = case(
    "z1 = F.linear(x1, w1)",
    "d1 = torch.poisson(z1.detach().clamp(3, 3))",
    "d2 = torch.rand_like(v1)",
    "d3 = torch.rand_like(r1)",
    "y1 = torch.sigmoid(z1) * (v1 + d2 + d3)",
    outputs="y1 d1 d2 d3",
    draws=("d1", "d2", "d3"),
    grad=True,  # or Inductor reorders the draws itself
    inductor={"fallback_random": True},
)
ROLLED = case(
    "z1 = F.linear(x1, w1).reshape(-1, 1, 1).permute(1, 2, 0)",
    "k1 = torch.sigmoid(z1).reshape(2, -1).t().reshape(-1, 1)",
    "y1 = k1 * v1",
    outputs="y1",
    sizes=(6,),
)


def test_programs_written_by_hand_pass() -> None:
    for program in (GATE, DRAWS, ROLLED):
        result = run_case(program, "fast")
        assert not result.skipped
        assert not result.problems


def test_a_wrong_value_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = formulas.value_and_logit

    def wrong(operands: Operands, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        out, logit = compute(operands, dtype)
        return out * (1 + 2**-18), logit

    monkeypatch.setattr(formulas, "value_and_logit", wrong)
    assert "error" in run_case(GATE, "fast").problems[0]


@pytest.mark.parametrize("breaks", [True, False])
def test_wrong_gradients_are_seen(breaks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU too, where gatefuse leaves gradients to Inductor."""
    make = gradient_rewriter._elementwise

    def wrong(call: Callable[..., Any], old: Node) -> Node:
        if breaks:
            raise KeyError("val")
        return call(torch.ops.aten.mul.Tensor, make(call, old), 1 + 2**-18)

    monkeypatch.setattr(gradient_rewriter, "_elementwise", wrong)
    program = case(*(line.text for line in GATE.lines), outputs="y1", grad=True, sizes=(40,))
    found = "\n".join(run_case(program, "fast").problems)
    assert ("could not be rewritten: KeyError" if breaks else "gradient of x1") in found


def test_draws_in_another_order_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Order, "draws", lambda _: 0)
    found = "\n".join(run_case(DRAWS, "fast").problems)
    assert "d1" in found
    assert "bit for bit" in found


def test_moved_rows_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fx_utils, "_moves_only_ones", lambda node: True)
    assert "norm error" in run_case(ROLLED, "fast").problems[0]


def test_errors_of_the_pass_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(rewriter, "check_same", broken)
    assert "broken" in run_case(GATE, "fast").problems[0]


def test_a_failing_case_is_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fx_utils, "_moves_only_ones", lambda node: True)
    noisy = case(
        *(line.text for line in ROLLED.lines),
        "o1 = x1.tanh()",
        "y2 = y1 + r1",
        outputs="o1 y2 y1",
        sizes=(6,),
    )
    assert len(shrink(noisy, "fast").lines) <= len(ROLLED.lines)


# --- what has to be fused, and what must not be -----------------------------------------------

ROWS = 6
keeps = st.lists(st.sampled_from(sorted(steps.KEEPS)), max_size=4)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
#: Of a column, "swap-lead" moves nothing.
CORRUPTS = {name: s for name, s in (steps.CORRUPTS | steps.COARSE).items() if name != "swap-lead"}


def gate_of(above: list[str], below: list[str]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A gate with steps, as source text, before and after its sigmoid."""
    sources = [[s.format(g="g", perm="perm") for s in part] for part in (above, below)]

    def gate(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        g = F.linear(x, w)
        perm = torch.arange(ROWS - 1, -1, -1)
        for step in sources[0]:
            g = eval(step, {"g": g, "torch": torch, "perm": perm})
        g = torch.sigmoid(g)
        for step in sources[1]:
            g = eval(step, {"g": g, "torch": torch, "perm": perm})
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
    gate = gate_of([steps.KEEPS[name] for name in above], [steps.KEEPS[name] for name in below])
    inputs = make(dtype, (2, 3) if cube else (ROWS,))
    fused, found = fuse(gate, inputs)
    assert found == 1
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
    chain = [steps.KEEPS[name] for name in above], [steps.KEEPS[name] for name in below]
    chain[0 if in_front else 1].insert(position, CORRUPTS[corruption])
    gate = gate_of(*chain)
    inputs = make(torch.float32, (ROWS,))
    expected = gate(*inputs)
    fused, found = fuse(gate, inputs)
    assert found == 0
    torch.testing.assert_close(fused(*inputs), expected, rtol=0, atol=0)
