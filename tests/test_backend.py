"""The ways to turn gatefuse on, and how they live with Inductor's options, modes and passes."""

from __future__ import annotations

import inspect
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

import gatefuse
from gatefuse import compat
from gatefuse.inductor.fusion_pass import GateFusionPass
from tests.support.forms import (
    H,
    addend_first,
    float_cast_back,
    linear,
    linear_bias,
    logit_returned,
    make_inputs,
    product_sum,
)
from tests.support.harness import (
    BACKEND,
    INSTALLED,
    REPOSITORY,
    assert_identical,
    compile_and_compare,
    find,
    judge,
    op_nodes,
    run_python,
)

BF16 = torch.bfloat16
HOOK = "post_grad_custom_post_pass"
PRE_HOOK = "post_grad_custom_pre_pass"


class Gate(nn.Module):
    """A gate with its weights as parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, 1)

    def forward(self, x: Tensor, v: Tensor) -> Tensor:
        return torch.sigmoid(self.gate(x)) * v


class Watcher(CustomGraphPass):
    """A user's pass: notes how many op nodes the graph has when it runs."""

    def __init__(self, name: str, log: list[tuple[str, int]]) -> None:
        self.name, self.log = name, log

    def __call__(self, graph: Graph) -> None:
        self.log.append((self.name, op_nodes(graph)))

    def uuid(self) -> str:
        return f"watcher {self.name}"


def run(fn: Callable[..., Any] = linear, **arguments: Any) -> gatefuse.Report:
    """Compile `fn` anew and check its result; the report of that compilation."""
    torch._dynamo.reset()
    inputs = make_inputs(fn)
    with gatefuse.record() as report, torch.no_grad():
        result = torch.compile(fn, **arguments)(*inputs)
        eager = fn(*inputs)
        judge("result", result, eager, fn(*(t.double() for t in inputs)))
    return report


# --- the backend --------------------------------------------------------------------------------


@pytest.mark.skipif(not INSTALLED, reason="the distribution is not installed: no entry point")
def test_backend_by_name_without_importing_gatefuse() -> None:
    done = run_python(
        """
        import sys, torch
        from tests.support.forms import linear, make_inputs
        assert "gatefuse" in torch.compiler.list_backends(exclude_tags=())
        assert "gatefuse" not in sys.modules
        args = make_inputs(linear)
        out = torch.compile(linear, backend="gatefuse")(*args)
        assert torch.allclose(out, linear(*args), atol=1e-5)
        import gatefuse
        from torch._dynamo.utils import counters
        print(counters["inductor"]["gatefuse_fused"])
        """
    )
    assert done.stdout.split()[-1] == "1"


@pytest.mark.parametrize(
    "mode",
    ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"],
)
def test_modes(mode: str) -> None:
    assert run(backend=BACKEND, mode=mode, fullgraph=True).fused == 1


def test_backend_takes_options_of_both() -> None:
    options = {"max_autotune": False, "epilogue_fusion": True, "gatefuse.placement": "inline"}
    report = run(backend=BACKEND, options=options)
    assert [site.placement for site in report.sites] == ["inline"]


def test_kernel_placement_falls_back_on_the_cpu() -> None:
    report = run(backend=BACKEND, options={"gatefuse.placement": "kernel"})
    (site,) = report.sites
    assert site.placement == "inline"
    assert site.placement_reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gatefuse.placment": "inline"}, "placment"),
        ({"gatefuse.placement": "fast"}, "placement must be one of"),
        ({"gatefuse.expect": -1}, "expect must be a number"),
        ({"gatefuse.eager_rounding": "yes"}, "eager_rounding must be a bool"),
        ({"no_such_inductor_option": 1}, "no_such_inductor_option"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        torch.compile(linear, backend=BACKEND, options=options)(*make_inputs(linear))


def test_backend_expect() -> None:
    assert run(backend=BACKEND, options={"gatefuse.expect": 1}).fused == 1
    with pytest.raises(Exception, match="expected at least 2 fused gates in the graph, fused 1"):
        run(backend=BACKEND, options={"gatefuse.expect": 2})


def gate_beside_a_branch(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return linear(x, w, torch.cond(x.sum() > 0, torch.sin, torch.cos, (v,)))


def gate_in_a_branch(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, linear, lambda x, w, v: torch.cos(v), (x, w, v))


@pytest.mark.parametrize("fn", [gate_beside_a_branch, gate_in_a_branch])
def test_expect_counts_a_graph_with_its_subgraphs(fn: Callable[..., Any]) -> None:
    """A branch without a gate is no failure, and a gate in a branch counts."""
    with torch.no_grad(), gatefuse.record() as report:
        torch.compile(fn, backend=BACKEND, options={"gatefuse.expect": 1})(*make_inputs(fn))
    assert report.fused == 1
    assert [g.phase for g in report.graphs] == ["subgraph", "subgraph", "inference"]
    with torch.no_grad(), pytest.raises(Exception, match=r"expected at least 2 .* fused 1"):
        torch.compile(fn, backend=BACKEND, options={"gatefuse.expect": 2})(*make_inputs(fn))


def test_cpp_wrapper() -> None:
    report = run(linear_bias, backend=BACKEND, options={"cpp_wrapper": True})
    assert report.fused == 1


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
def test_freezing(dtype: torch.dtype) -> None:
    """Constant weights may be packed for the CPU; then the report says so. The result is right."""
    model = Gate().to(dtype).eval()
    x, v = torch.randn(9, H).to(dtype), torch.randn(9, H).to(dtype)
    with torch.no_grad(), gatefuse.record() as report:
        compiled = torch.compile(model, backend=BACKEND, options={"freezing": True})
        result, eager = compiled(x, v), model(x, v)
        judge("result", result, eager, model.double()(x.double(), v.double()))
    assert report.fused + len(report.rejections) == 1
    assert all(r.reason for r in report.rejections)


# --- options of one compilation -----------------------------------------------------------------


def test_options_merge_with_inductors() -> None:
    log: list[tuple[str, int]] = []
    options = gatefuse.options(
        {"max-autotune": True, HOOK: Watcher("mine", log)}, placement="inline"
    )
    assert options["max_autotune"] is True
    assert [site.placement for site in run(options=options).sites] == ["inline"]
    assert log == [("mine", 0)]


def test_options_keep_a_global_pass_and_leave_the_configuration_alone() -> None:
    log: list[tuple[str, int]] = []
    mine = Watcher("mine", log)
    with inductor_config.patch({HOOK: mine}):
        assert run(options=gatefuse.options()).fused == 1
        assert getattr(inductor_config, HOOK) is mine
        assert run().fused == 0
    assert log == [("mine", 0), ("mine", 0)]


def test_options_are_checked() -> None:
    with pytest.raises(TypeError, match="unknown option 'placment'"):
        gatefuse.options(placment="inline")
    with pytest.raises(ValueError, match="placement must be one of"):
        gatefuse.options(placement="fast")


def test_arguments_of_wrong_types_are_named() -> None:
    with pytest.raises(TypeError, match="inductor_options is of type str; expected a mapping"):
        gatefuse.options("max-autotune")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model is of type Tensor; expected a module or a function"):
        gatefuse.explain(torch.ones(1))  # type: ignore[arg-type]


def test_options_dataclass_is_frozen() -> None:
    with pytest.raises(AttributeError):
        gatefuse.Options().expect = 3  # type: ignore[misc]


# --- the whole process --------------------------------------------------------------------------


def test_enable_and_disable_are_idempotent() -> None:
    before = getattr(inductor_config, HOOK)
    gatefuse.enable()
    gatefuse.enable(placement="inline")
    assert len(compat.passes_of(getattr(inductor_config, HOOK))) == 1
    assert [site.placement for site in run().sites] == ["inline"]
    gatefuse.disable()
    gatefuse.disable()
    assert getattr(inductor_config, HOOK) is before
    assert run().fused == 0


def test_enable_and_options_fuse_once() -> None:
    gatefuse.enable()
    report = run(options=gatefuse.options())
    assert (report.fused, len(report.graphs)) == (1, 1)


def _takes_lists() -> bool:
    return hasattr(torch._inductor.custom_graph_pass, "get_custom_graph_passes")


@pytest.mark.parametrize("as_list", [False, True], ids=["single", "list"])
def test_other_passes_keep_running_in_order(as_list: bool) -> None:
    if as_list and not _takes_lists():
        pytest.skip("this PyTorch's hooks hold one pass")
    log: list[tuple[str, int]] = []
    first, second, pre = (Watcher(name, log) for name in ("first", "second", "pre"))
    hook = [first, second] if as_list else first
    expected = ["first", "second"] if as_list else ["first"]

    with inductor_config.patch({HOOK: hook, PRE_HOOK: pre}):
        gatefuse.enable()
        assert run().fused == 1
        assert log == [(name, 0) for name in ["pre", *expected]]
        gatefuse.disable()
        assert compat.passes_of(getattr(inductor_config, HOOK)) == compat.passes_of(hook)
        assert getattr(inductor_config, PRE_HOOK) is pre
        log.clear()
        assert run().fused == 0
        assert [name for name, _ in log] == ["pre", *expected]


def test_threads_compile_with_the_backend_and_with_options() -> None:
    """Since PyTorch 2.13 a thread has its own configuration of Inductor; what goes with the model
    holds in every thread."""

    def compile_both() -> None:
        run(backend=BACKEND)
        run(options=gatefuse.options())

    with gatefuse.record() as report, ThreadPoolExecutor(1) as pool:
        pool.submit(compile_both).result()
    assert report.fused == 2


def test_backward_graphs_of_compiled_autograd_expect_nothing() -> None:
    from torch._dynamo import compiled_autograd

    inputs = make_inputs(linear, grad=True)
    gatefuse.enable(expect=1)
    with gatefuse.record() as report:
        out = torch.compile(linear)(*inputs)
        with compiled_autograd._enable(torch.compile(backend="inductor")):
            out.sum().backward()
    assert [(g.phase, g.fused) for g in report.graphs] == [("forward", 1), ("backward", 0)]


def test_a_plain_function_on_the_hook_keeps_running() -> None:
    seen: list[int] = []

    def mine(graph: Graph) -> None:
        seen.append(len(find(graph, torch.ops.aten.sigmoid.default)))

    with inductor_config.patch({HOOK: mine}), gatefuse.fusing():
        assert run().fused == 1
    assert seen == [1]


def test_a_pass_added_behind_gatefuse_stays() -> None:
    log: list[tuple[str, int]] = []
    gatefuse.enable()
    ours = getattr(inductor_config, HOOK)
    hook = (
        [ours, Watcher("behind", log)]
        if _takes_lists()
        else compat.append_pass(ours, Watcher("behind", log))
    )
    with inductor_config.patch({HOOK: hook}):
        run()
        gatefuse.disable()
        run()
    assert [name for name, _ in log] == ["behind", "behind"]
    assert log[-1] == ("behind", 0)


def test_pass_on_the_pre_hook() -> None:
    with inductor_config.patch({PRE_HOOK: GateFusionPass()}):
        assert run(addend_first).fused == 1


def test_fusing_is_scoped() -> None:
    with gatefuse.fusing() as outer:
        run()
        with gatefuse.fusing(placement="inline") as inner:
            run(linear_bias)
        run(addend_first)
    run()
    assert inner.fused == 1
    assert outer.fused == 3
    assert getattr(inductor_config, HOOK) is None


def test_fusing_keeps_what_was_enabled() -> None:
    gatefuse.enable(placement="inline")
    with gatefuse.fusing(eager_rounding=True):
        pass
    (kept,) = compat.passes_of(getattr(inductor_config, HOOK))
    assert isinstance(kept, GateFusionPass)
    assert kept.options == gatefuse.Options(placement="inline")


def test_fusing_restores_after_an_error() -> None:
    with pytest.raises(KeyError), gatefuse.fusing():
        raise KeyError
    assert getattr(inductor_config, HOOK) is None


def test_fusing_expect() -> None:
    with gatefuse.fusing(expect=2):
        run()
        run(linear_bias)
    with (
        pytest.raises(gatefuse.FusionError, match="expected at least 2 fused gates, fused 1"),
        gatefuse.fusing(expect=2),
    ):
        run()


def test_dynamo_reset_inside_a_block() -> None:
    with gatefuse.fusing() as report:
        run()
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        run(linear_bias)
    assert report.fused == 2


def test_explain() -> None:
    x, w, v = make_inputs(linear, grad=True)
    compiled = torch.compile(linear)
    compiled(x, w, v)
    report = gatefuse.explain(linear, x, w, v)
    assert {g.phase: g.fused for g in report.graphs}["forward"] == 1
    assert {g.phase for g in report.graphs} == {"forward", "backward"}
    assert x.grad is None
    assert w.grad is None
    assert getattr(inductor_config, HOOK) is None
    with gatefuse.record() as later, torch._dynamo.config.patch(error_on_recompile=True):
        compiled(x, w, v)
    assert not later.graphs


def test_explain_of_a_call_that_goes_backward() -> None:
    def step(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        loss = linear(x, w, v).sum()
        loss.backward()
        return loss

    report = gatefuse.explain(step, *make_inputs(linear, grad=True))
    assert {g.phase: g.fused for g in report.graphs}["forward"] == 1


def test_explain_of_a_complex_result() -> None:
    def wave(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return torch.complex(linear(x, w, v), v)

    report = gatefuse.explain(wave, *make_inputs(linear, grad=True))
    assert {g.phase: g.fused for g in report.graphs}["forward"] == 1
    assert {g.phase for g in report.graphs} == {"forward", "backward"}


def test_explain_of_a_module_that_has_compiled_itself() -> None:
    model, inputs = Gate(), (torch.randn(5, H), torch.randn(5, H))
    model.compile()
    with torch.no_grad():
        model(*inputs)
        assert gatefuse.explain(model, *inputs).fused == 1
        assert gatefuse.explain(torch.compile(Gate()), *inputs).fused == 1


def test_explain_tells_of_rejections() -> None:
    def scaled(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return torch.sigmoid(3 * nn.functional.linear(x, w)) * v

    with torch.no_grad():
        report = gatefuse.explain(scaled, *make_inputs(linear))
    (rejection,) = report.rejections
    assert report.fused == 0
    assert rejection.reason in str(report)


# --- environment variables ----------------------------------------------------------------------


def test_disabled_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEFUSE_DISABLE", "1")
    assert run(backend=BACKEND).fused == 0
    assert run(options=gatefuse.options()).fused == 0
    with gatefuse.fusing(expect=1) as report:  # "fuse nothing" is no failure to fuse
        run()
    assert report.fused == 0
    assert "GATEFUSE_DISABLE is set" in str(report)


def test_disabled_after_enable(monkeypatch: pytest.MonkeyPatch) -> None:
    gatefuse.enable()
    monkeypatch.setenv("GATEFUSE_DISABLE", "1")
    assert run().fused == 0


@pytest.mark.parametrize(
    ("name", "value", "options"),
    [
        ("GATEFUSE_PLACEMENT", "kernel", gatefuse.Options(placement="kernel")),
        ("GATEFUSE_EAGER_ROUNDING", "1", gatefuse.Options(eager_rounding=True)),
        ("GATEFUSE_EXPECT", "3", gatefuse.Options(expect=3)),
    ],
)
def test_options_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, options: gatefuse.Options
) -> None:
    monkeypatch.setenv(name, value)
    (graph_pass,) = compat.passes_of(gatefuse.options()[HOOK])
    assert graph_pass.options == options
    (graph_pass,) = compat.passes_of(gatefuse.options(placement="inline", expect=0)[HOOK])
    assert (graph_pass.options.placement, graph_pass.options.expect) == ("inline", 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GATEFUSE_PLACEMENT", "fast"),
        ("GATEFUSE_EAGER_ROUNDING", "maybe"),
        ("GATEFUSE_EXPECT", "two"),
        ("GATEFUSE_EXPECT", "-1"),
        ("GATEFUSE_DISABLE", "perhaps"),
        ("GATEFUSE_ALLOW_UNTESTED_TORCH", "maybe"),
    ],
)
def test_wrong_environment_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setattr(compat, "_torch_version", lambda: (2, 99))
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=name) as error:
        gatefuse.options()
    assert value in str(error.value)


def test_environment_of_a_process() -> None:
    done = run_python(
        """
        import torch, gatefuse
        from tests.support.forms import linear, make_inputs
        try:
            torch.compile(linear, options=gatefuse.options())(*make_inputs(linear))
        except Exception as error:
            print("expected at least 5" in str(error))
        """,
        GATEFUSE_EXPECT="5",
    )
    assert done.stdout.split()[-1] == "True"


# --- PyTorch versions ---------------------------------------------------------------------------


@pytest.mark.parametrize("version", [(2, 5), (2, 99)], ids=["too-old", "too-new"])
def test_unknown_torch_compiles_unfused_and_warns(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int]
) -> None:
    monkeypatch.setattr(compat, "_torch_version", lambda: version)
    monkeypatch.setattr(compat, "_warned", set())
    with pytest.warns(UserWarning, match="not among the versions gatefuse was tested on"):
        report = run(backend=BACKEND)
    assert report.fused == 0


def test_untested_torch_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "_torch_version", lambda: (2, 99))
    monkeypatch.setenv("GATEFUSE_ALLOW_UNTESTED_TORCH", "1")
    assert run(backend=BACKEND).fused == 1


# --- the pass as an object ----------------------------------------------------------------------


def test_pass_is_picklable() -> None:
    graph_pass = GateFusionPass(gatefuse.Options(placement="inline", expect=2))
    copy = pickle.loads(pickle.dumps(graph_pass))
    assert copy == graph_pass
    assert copy.uuid() == graph_pass.uuid()


def test_a_chain_of_passes_is_picklable_and_identified() -> None:
    log: list[tuple[str, int]] = []
    chains = [
        compat._hook_of([Watcher(name, log), GateFusionPass()])
        if not _takes_lists()
        else (Watcher(name, log), GateFusionPass())
        for name in ("a", "b")
    ]
    uuids = [
        chain.uuid() if hasattr(chain, "uuid") else tuple(p.uuid() for p in chain)
        for chain in chains
    ]
    assert uuids[0] != uuids[1]
    pickle.loads(pickle.dumps(chains[0]))


def test_uuid_changes_with_options() -> None:
    options = [
        {},
        {"placement": "inline"},
        {"placement": "kernel"},
        {"eager_rounding": True},
        {"expect": 1},
    ]
    assert len({GateFusionPass(gatefuse.Options(**o)).uuid() for o in options}) == len(options)


def test_uuid_changes_with_the_source(tmp_path: Path) -> None:
    """One comment more in any module that decides what code is generated changes the uuid."""
    shutil.copytree(REPOSITORY / "gatefuse", tmp_path / "gatefuse")
    done = run_python(
        """
        import pathlib, sys
        sys.path.insert(0, sys.argv[1])
        from gatefuse.inductor import fusion_pass
        inductor = pathlib.Path(fusion_pass.__file__).parent
        assert inductor.is_relative_to(sys.argv[1])
        uuid = fusion_pass.GateFusionPass().uuid()
        for path in [*inductor.glob("*.py"), *inductor.parent.glob("*.py")]:
            source = path.read_text()
            path.write_text(source + "# changed\\n")
            fusion_pass.sources_hash.cache_clear()
            if fusion_pass.GateFusionPass().uuid() == uuid:
                print(path.stem)
            path.write_text(source)
        """,
        str(tmp_path),
    )
    assert not done.stdout


# --- rounding -----------------------------------------------------------------------------------


def _exact_inputs(fn: Callable[..., Any], rows: int = 64) -> tuple[Tensor, ...]:
    """bfloat16 inputs whose products and sums are exact in float32, in any order, and mostly not
    in bfloat16."""
    generator = torch.Generator().manual_seed(3)
    exact = {
        "x": torch.randint(-64, 65, (rows, H), generator=generator),
        "w": torch.randint(-64, 65, (1, H), generator=generator) / 8192,
    }
    inputs = zip(inspect.signature(fn).parameters, make_inputs(fn, lead=(rows,)), strict=True)
    return tuple(exact.get(name, t).to(BF16) for name, t in inputs)


def gate_widened(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w)).float() * v.float()


def gate_widened_and_back(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return gate_widened(x, w, v).to(v.dtype)


def logit_narrowed(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x.float(), w.float()).to(v.dtype)) * v


def bias_wider(x: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w) + b.float()).to(v.dtype) * v


ROUNDED = (
    linear,
    addend_first,
    linear_bias,
    bias_wider,
    product_sum,
    float_cast_back,
    logit_returned,
    gate_widened,
    gate_widened_and_back,
    logit_narrowed,
)


@pytest.mark.parametrize("how", ["option", "inductor"])
@pytest.mark.parametrize("fn", ROUNDED, ids=lambda fn: fn.__name__)
def test_eager_rounding_is_bit_identical_to_eager(fn: Callable[..., Any], how: str) -> None:
    inputs = _exact_inputs(fn)
    with inductor_config.patch(emulate_precision_casts=how == "inductor"):
        result = compile_and_compare(fn, inputs, options={"eager_rounding": how == "option"})
    assert result.report.fused == 1
    assert_identical(result.fused, result.eager)


@pytest.mark.parametrize("rows", [1, 64])
def test_eager_rounding_of_a_decomposed_product(rows: int) -> None:
    """Coordinate descent, and one row on the CPU, make a float32 sum of the linear."""
    for fn in (addend_first, gate_widened):
        result = compile_and_compare(
            fn,
            _exact_inputs(fn, rows),
            options={"eager_rounding": True},
            coordinate_descent=rows > 1,
        )
        assert result.report.fused == 1
        assert_identical(result.fused, result.eager)


def test_without_eager_rounding_the_result_is_rounded_once() -> None:
    inputs = _exact_inputs(addend_first)
    eager = addend_first(*inputs)
    reference = addend_first(*(t.double() for t in inputs))
    with torch.no_grad(), gatefuse.fusing():
        fused = torch.compile(addend_first)(*inputs)
    assert not torch.equal(fused, eager)
    assert (fused.double() - reference).norm() < (eager.double() - reference).norm()
    # One rounding: the nearest bfloat16 to the truth, up to ties that float32 arithmetic decides.
    assert (fused != reference.to(BF16)).double().mean() < 0.01
