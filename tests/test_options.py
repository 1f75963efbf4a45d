"""`gatefuse.options`: what it merges with, what it refuses, and the environment variables."""

from __future__ import annotations

import pytest
import torch
import torch._inductor.config as inductor_config

import gatefuse
from gatefuse import compat
from gatefuse.inductor import hooks
from tests.support.comparison import BACKEND, report_of
from tests.support.hooks import HOOK, Watcher
from tests.support.programs import run_python


def test_options_merge_with_inductors() -> None:
    log: list[tuple[str, int]] = []
    options = gatefuse.options(
        {"max-autotune": True, HOOK: Watcher("mine", log)}, placement="inline"
    )
    assert options["max_autotune"] is True
    assert [site.placement for site in report_of(options=options).sites] == ["inline"]
    assert log == [("mine", 0)]


def test_options_keep_a_global_pass_and_leave_the_configuration_alone() -> None:
    log: list[tuple[str, int]] = []
    mine = Watcher("mine", log)
    with inductor_config.patch({HOOK: mine}):
        assert report_of(options=gatefuse.options()).fused == 1
        assert getattr(inductor_config, HOOK) is mine
        assert report_of().fused == 0
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


def test_disabled_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEFUSE_DISABLE", "1")
    assert report_of(backend=BACKEND).fused == 0
    assert report_of(options=gatefuse.options()).fused == 0
    with gatefuse.fusing(expect=1) as report:  # "fuse nothing" is no failure to fuse
        report_of()
    assert report.fused == 0
    assert "GATEFUSE_DISABLE is set" in str(report)


def test_disabled_after_enable(monkeypatch: pytest.MonkeyPatch) -> None:
    gatefuse.enable()
    monkeypatch.setenv("GATEFUSE_DISABLE", "1")
    assert report_of().fused == 0


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
    (graph_pass,) = hooks.passes_of(gatefuse.options()[HOOK])
    assert graph_pass.options == options
    (graph_pass,) = hooks.passes_of(gatefuse.options(placement="inline", expect=0)[HOOK])
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
