"""Ways to turn the pass on: a backend, options of one compilation, or the whole process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch._inductor import config

from gatefuse import compat
from gatefuse.inductor import hooks
from gatefuse.inductor.fusion_pass import GateFusionPass
from gatefuse.inductor.hooks import POST_HOOK, PRE_HOOK
from gatefuse.recording import record
from gatefuse.report import FusionError, Report
from gatefuse.settings import disabled_by_environment, merge, resolve

__all__ = ["disable", "enable", "fusing", "gatefuse_backend", "options"]

_PREFIX = "gatefuse."


def _usable() -> bool:
    if disabled_by_environment():
        return False
    if (reason := compat.unsupported_reason()) is not None:
        compat.warn_unsupported(reason)
        return False
    return True


def options(
    inductor_options: Mapping[str, Any] | None = None, /, **gatefuse_options: Any
) -> dict[str, Any]:
    """Options for ``torch.compile(model, options=...)`` that add the pass to one compilation.

    inductor_options: other options of Inductor's for the same compilation; a pass of the user's on
    the hook among them, or one set globally, runs before gatefuse's. gatefuse_options: fields of
    :class:`gatefuse.Options`.

    Raises TypeError or ValueError on an unknown or wrong gatefuse option.
    """
    if not isinstance(inductor_options, Mapping | None):
        raise TypeError(
            f"gatefuse: inductor_options is of type {type(inductor_options).__name__}; expected a "
            "mapping of Inductor's options, or None"
        )
    result = {key.replace("-", "_"): value for key, value in (inductor_options or {}).items()}
    existing = result.get(POST_HOOK, getattr(config, POST_HOOK))
    new = _make_pass(gatefuse_options, _given_on(existing), _given())
    if _usable():
        result[POST_HOOK] = hooks.append_pass(existing, new)
        if hooks.pass_on(early := result.get(PRE_HOOK, getattr(config, PRE_HOOK))) is not None:
            result[PRE_HOOK] = hooks.remove_pass(early)
        if new.options.batch_invariant and hasattr(config, "batch_invariant"):
            result.setdefault("batch_invariant", True)
    return result


def _make_pass(*layers: Mapping[str, Any]) -> GateFusionPass:
    given = merge(*layers)
    return GateFusionPass(resolve(given), given)


def _given() -> Mapping[str, Any]:
    """The options that the surrounding block, or the process, gives."""
    return merge(*(_given_on(getattr(config, hook)) for hook in (POST_HOOK, PRE_HOOK)))


def _given_on(hook: Any) -> Mapping[str, Any]:
    found = hooks.pass_on(hook)
    return {} if found is None else found.given


_options = options  # a backend has a parameter of this name


def enable(**gatefuse_options: Any) -> None:
    """Add the pass to every later Inductor compilation of this process.

    Calling it again only replaces the options. Passes already on the hook keep running, first.
    Since PyTorch 2.13 Inductor's configuration belongs to a thread: other threads that compile call
    it too, or use the backend or :func:`options`, which go with the model.
    """
    new = _make_pass(gatefuse_options)
    if _usable():
        setattr(config, POST_HOOK, hooks.append_pass(getattr(config, POST_HOOK), new))


def disable() -> None:
    """Undo :func:`enable`; other passes on the hooks stay."""
    for hook in (POST_HOOK, PRE_HOOK):
        setattr(config, hook, hooks.remove_pass(getattr(config, hook)))


@contextlib.contextmanager
def fusing(**gatefuse_options: Any) -> Iterator[Report]:
    """Enable the pass inside a block; yields the report of what is compiled in it.

    ``expect=n`` raises :class:`gatefuse.FusionError` at the end of the block if the graphs compiled
    in it have fewer than n fused sites together.
    """
    expect = resolve(gatefuse_options).expect
    given = merge(gatefuse_options, _given(), {"expect": 0})
    if "expect" in gatefuse_options:
        given["expect"] = 0  # of a graph: the block's counts for all together
    new = _make_pass(given)
    before = {hook: getattr(config, hook) for hook in (POST_HOOK, PRE_HOOK)}
    during = dict(before)
    if _usable():
        during = {
            POST_HOOK: hooks.append_pass(before[POST_HOOK], new),
            PRE_HOOK: hooks.remove_pass(before[PRE_HOOK]),
        }
    with record() as result:
        for hook, value in during.items():
            setattr(config, hook, value)
        try:
            yield result
        finally:
            new.ended = True
            for hook in before:
                setattr(config, hook, _after_block(hook, new, before[hook], during[hook]))
    if result.fused < expect and not disabled_by_environment():
        raise FusionError(
            f"gatefuse: expected at least {expect} fused gates, fused {result.fused}.\n{result}"
        )


def _after_block(hook: str, ours: GateFusionPass, before: Any, during: Any) -> Any:
    """What belongs on a hook when a block ends: the very object that was there before, unless the
    block has changed the hook, which stays changed, but for the block's own pass."""
    now = getattr(config, hook)
    earlier = hooks.pass_on(before)
    if earlier is not None and earlier.ended:  # a block of another thread
        before, earlier = hooks.remove_pass(before), None
    if now is during:
        return before
    if hooks.pass_on(now) is not ours:
        return now
    return hooks.remove_pass(now) if earlier is None else hooks.append_pass(now, earlier)


def gatefuse_backend(
    gm: torch.fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """The backend ``"gatefuse"`` of ``torch.compile``: Inductor with the pass.

    Takes Inductor's modes and options; options named ``gatefuse.<field of Options>`` are
    gatefuse's own.
    """
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.exc import InductorError

    own, inductor = {}, {}
    for key, value in (options or {}).items():
        if key.startswith(_PREFIX):
            own[key.removeprefix(_PREFIX)] = value
        else:
            inductor[key] = value
    patches = _options(compat.inductor_options(mode, inductor), **own)
    try:
        compiled: Any = compile_fx(gm, example_inputs, config_patches=patches)
    except InductorError as e:
        if isinstance(e.inner_exception, FusionError):
            raise e.inner_exception from None
        raise
    return compiled


def _reset() -> None:
    # torch._dynamo.reset() calls this on a backend: CUDA graphs of mode "reduce-overhead".
    import sys

    if "torch._inductor.cudagraph_trees" in sys.modules:
        sys.modules["torch._inductor.cudagraph_trees"].reset_cudagraph_trees()


gatefuse_backend.reset = _reset  # type: ignore[attr-defined]
