"""Inductor's hooks after gatefuse: the very values that were there."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as config
from torch._inductor.custom_graph_pass import CustomGraphPass

import gatefuse
from gatefuse.inductor import hooks
from gatefuse.inductor.fusion_pass import GateFusionPass
from gatefuse.inductor.hooks import POST_HOOK, PRE_HOOK
from tests.support.programs import run_python


class Own(CustomGraphPass):
    """A user's own pass."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.runs += 1

    def uuid(self) -> str:
        return "own"


LISTS = pytest.mark.skipif(
    not hasattr(torch._inductor.custom_graph_pass, "get_custom_graph_passes"),
    reason="a hook of this PyTorch holds one pass",
)
VALUES: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "pass": Own,
    "gatefuse": GateFusionPass,
    "sequence": lambda: hooks.append_pass(Own(), GateFusionPass()),
    "empty-list": list,
    "list": lambda: [Own(), Own()],
    "list-with-gatefuse": lambda: [GateFusionPass(), Own()],
    "tuple": lambda: (Own(), GateFusionPass()),
}
MAKERS = [
    pytest.param(make, id=name, marks=[LISTS] if "list" in name or name == "tuple" else [])
    for name, make in VALUES.items()
]


@pytest.mark.parametrize("hook", [POST_HOOK, PRE_HOOK])
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("fails", [False, True])
def test_a_block_puts_back_the_very_object(make: Any, hook: str, fails: bool) -> None:
    value = make()
    content = hooks.passes_of(value)
    with config.patch({hook: value}):
        before = getattr(config, hook)
        with contextlib.suppress(KeyError), gatefuse.fusing(), gatefuse.fusing(placement="inline"):
            assert sum(isinstance(p, GateFusionPass) for p in passes_in_force()) == 1
            if fails:
                raise KeyError
        assert getattr(config, hook) is before
        assert [id(p) for p in hooks.passes_of(before)] == [id(p) for p in content]


def passes_in_force() -> list[Any]:
    return [p for hook in (POST_HOOK, PRE_HOOK) for p in hooks.passes_of(getattr(config, hook))]


@pytest.mark.parametrize("make", [m for m in MAKERS if "gatefuse" not in m.id and m.id != "tuple"])
def test_enable_and_disable_put_back_the_very_object(make: Any) -> None:
    with config.patch({POST_HOOK: make()}):
        before = hooks.remove_pass(getattr(config, POST_HOOK))
        gatefuse.enable()
        gatefuse.enable(placement="inline")
        gatefuse.disable()
        assert getattr(config, POST_HOOK) is before


@LISTS
def test_a_list_may_grow_after_enable() -> None:
    passes: list[Any] = []
    with config.patch({POST_HOOK: passes}):
        # config.patch and the like may copy a value that is set; the user's list is what is there.
        passes = getattr(config, POST_HOOK)
        gatefuse.enable()
        passes.append(own := Own())
        torch.compile(lambda x: x * 5)(torch.randn(3))
        gatefuse.disable()
    assert own.runs == 1


def test_disable_inside_a_block_stays() -> None:
    gatefuse.enable()
    with gatefuse.fusing():
        gatefuse.disable()
    assert getattr(config, POST_HOOK) is None


def test_what_a_block_changes_stays_without_its_pass() -> None:
    own = Own()
    for enabled in (False, True):
        if enabled:
            gatefuse.enable(placement="inline")
        with gatefuse.fusing(placement="kernel"):
            value = hooks.PassSequence(own, hooks.pass_on(getattr(config, POST_HOOK)))
            setattr(config, POST_HOOK, value)
        left = hooks.passes_of(getattr(config, POST_HOOK))
        gatefuse.disable()
        assert left[0] is own
        assert [p.options.placement for p in left[1:]] == ["inline"] * enabled
        assert getattr(config, POST_HOOK) is own
        setattr(config, POST_HOOK, None)


def test_blocks_of_two_threads_leave_nothing() -> None:
    """Before PyTorch 2.13 threads share the hooks; blocks that overlap end in any order."""
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with gatefuse.fusing():
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    with gatefuse.fusing():
        thread.start()
        inside.wait(30)
    leave.set()
    thread.join()
    assert hooks.pass_on(getattr(config, POST_HOOK)) is None


def test_an_unrelated_model_keeps_its_cache(tmp_path: Path) -> None:
    """The key of Inductor's cache is as it was after gatefuse has come and gone."""
    code = """
        import torch, gatefuse
        import torch._inductor.config as config
        from torch._dynamo.utils import counters
        from tests.test_hooks import Own

        config.post_grad_custom_post_pass = Own()
        for step in range(3):
            if step == 2:
                gatefuse.enable()
                gatefuse.disable()
                with gatefuse.fusing():
                    pass
            torch._dynamo.reset()
            counters.clear()
            torch.compile(lambda x: torch.tanh(x) * 3 + 1.25)(torch.randn(3, 7))
            print(counters["inductor"]["fxgraph_cache_hit"])
    """
    done = run_python(
        code,
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path),
        TORCHINDUCTOR_FX_GRAPH_CACHE="1",
        TORCHINDUCTOR_AUTOGRAD_CACHE="1",
    )
    assert done.stdout.split()[1:] == ["1", "1"]
