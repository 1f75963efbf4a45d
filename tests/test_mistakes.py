"""What a report says where nothing was fused: each mistake has a sentence of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatefuse
from gatefuse.records import Activity
from gatefuse.summary import nothing_compiled
from tests.support.forms import linear, make_inputs
from tests.support.programs import run_python


def not_compiled(args: Any) -> None:
    linear(*args)


def compiled_before(args: Any) -> Callable[[], Any]:
    compiled = torch.compile(linear, backend="eager")
    with torch.no_grad():
        compiled(*args)
    return lambda: compiled(*args)


def another_backend(args: Any) -> None:
    torch.compile(linear, backend="eager")(*args)


def another_thread(args: Any) -> None:
    thread = threading.Thread(target=lambda: torch.compile(linear, backend="eager")(*args))
    thread.start()
    thread.join()


@pytest.fixture(autouse=True)
def counters() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def said_of(call: Callable[[], Any], turned_on: bool = True) -> str:
    with gatefuse.fusing() if turned_on else gatefuse.record() as report, torch.no_grad():
        call()
    assert report.fused == 0
    assert str(report).splitlines() == [f"gatefuse: {report.verdict}"]
    return report.verdict


def test_not_compiled() -> None:
    said = said_of(lambda: not_compiled(make_inputs(linear)))
    assert "nothing was compiled in this block: pass the model to torch.compile" in said
    assert "before it" not in said


def test_compiled_before_the_block() -> None:
    said = said_of(compiled_before(make_inputs(linear)))
    assert "open the block before the model's first call" in said


def test_another_backend() -> None:
    said = said_of(lambda: another_backend(make_inputs(linear)))
    assert "1 graph went to another backend than Inductor" in said


def test_without_gatefuse() -> None:
    said = said_of(lambda: torch.compile(linear)(*make_inputs(linear)), turned_on=False)
    assert "1 graph compiled without gatefuse" in said
    assert "gatefuse.enable()" in said


def test_another_thread() -> None:
    said = said_of(lambda: another_thread(make_inputs(linear)))
    assert "the compilation ran in another thread" in said


def test_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEFUSE_DISABLE", "1")
    said = said_of(lambda: torch.compile(linear)(*make_inputs(linear)))
    assert said.endswith("GATEFUSE_DISABLE is set")


def test_compiling_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    args = make_inputs(linear)
    with torch.compiler.set_stance("force_eager"):
        assert "force_eager" in said_of(lambda: torch.compile(linear)(*args))
    with torch._dynamo.config.patch(disable=True):
        assert "config.disable is set" in said_of(lambda: torch.compile(linear)(*args))
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert "TORCHDYNAMO_DISABLE is set" in said_of(lambda: linear(*args))


def test_each_mistake_has_its_sentence() -> None:
    break_ = {"Call to print\n  Explanation: why\n": 1}
    cases = [
        Activity(),
        Activity(before=1),
        Activity(graphs=2),
        Activity(graphs=2, hooked=True),
        Activity(graphs=2, cached=2, hooked=True),
        Activity(elsewhere=1),
        Activity(breaks=break_),
        Activity(switched_off="x is set"),
    ]
    said = [nothing_compiled([], case, None) for case in cases]
    assert len(set(said)) == len(cases)
    assert "Call to print: why" in str(said[6])
    assert nothing_compiled([], Activity(), "a note") == "a note"


class Cut(nn.Module):
    """A graph break between the logit and the sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.score = nn.Linear(64, 1), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logit = self.gate(x)
        torch._dynamo.graph_break()
        return torch.sigmoid(logit) * x, x


def test_a_gate_that_a_graph_break_cuts() -> None:
    with torch.no_grad():
        report = gatefuse.explain(Cut(), torch.randn(5, 64))
    assert report.verdict.startswith("0 of 1 gates fused")
    assert report.model is not None
    assert (report.model.gates, report.model.not_compiled) == (["gate"], ["score"])
    (rejection,) = report.rejections
    assert rejection.kind == "near miss"
    assert rejection.location is not None and rejection.location.endswith("in forward")
    said = str(report)
    assert "torch._dynamo.graph_break()" in said
    assert "keep linear, sigmoid and multiply in one graph" in said


def test_expect_says_the_same() -> None:
    with (
        pytest.raises(gatefuse.FusionError, match="1 graph went to another backend"),
        gatefuse.fusing(expect=1),
    ):
        another_backend(make_inputs(linear))


def test_torch_logs_takes_the_name() -> None:
    code = """
    import torch, gatefuse
    from tests.support.forms import linear, make_inputs
    with torch.no_grad():
        torch.compile(linear, options=gatefuse.options())(*make_inputs(linear))
    """
    done = run_python(code, TORCH_LOGS="+gatefuse")
    assert "graph_0_inference: 1 fused" in done.stderr
    assert "linear_sigmoid_mul" in done.stderr


def test_the_structured_trace_has_the_report(tmp_path: Any) -> None:
    code = """
    import torch, gatefuse
    from tests.support.forms import linear, make_inputs
    with torch.no_grad():
        torch.compile(linear, options=gatefuse.options())(*make_inputs(linear))
    """
    run_python(code, TORCH_TRACE=str(tmp_path), TORCHINDUCTOR_FORCE_DISABLE_CACHES="1")
    (log,) = tmp_path.glob("*.log")
    text = log.read_text()
    assert '"name": "gatefuse_graph_0_inference", "encoding": "string"' in text
    assert "gatefuse: 1 of 1 gates fused" in text
