"""The options of a compilation with gatefuse, and the environment variables that set them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

__all__ = [
    "Options",
    "Placement",
    "disabled_by_environment",
    "dump_directory",
    "flag",
    "merge",
    "resolve",
]

Placement = Literal["auto", "inline", "kernel"]

_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off", ""}


@dataclass(frozen=True)
class Options:
    """How gatefuse compiles a graph. Part of Inductor's cache key.

    placement: what a fused site becomes. ``"inline"``: Inductor IR, which fuses with its
        neighbours; ``"kernel"``: a direct launch of the Triton kernel (GPU only; on the CPU it
        falls back to inline); ``"auto"``: whichever the neighbours of the site call for.
    eager_rounding: round logit, gate and product to the working dtype, as unfused eager PyTorch
        does, instead of once at the end. ``torch._inductor.config.emulate_precision_casts`` turns
        it on as well.
    batch_invariant: a token's result does not depend on how many others there are: what is fused,
        and how, is chosen without regard to the number of rows.
        ``torch._inductor.config.batch_invariant`` and ``deterministic`` turn it on as well, and
        where PyTorch has the former (2.13), this option turns it on for the compile.
    expect: raise :class:`gatefuse.FusionError` where a forward or inference graph compiled with
        these options has, subgraphs included, fewer fused sites than this. 0 expects nothing. In
        :func:`gatefuse.fusing` it counts over all graphs compiled in the block instead.
    """

    placement: Placement = "auto"
    eager_rounding: bool = False
    batch_invariant: bool = False
    expect: int = 0

    def __post_init__(self) -> None:
        if self.placement not in get_args(Placement):
            raise ValueError(
                f"gatefuse: placement must be one of {', '.join(map(repr, get_args(Placement)))}, "
                f"got {self.placement!r}"
            )
        for name in ("eager_rounding", "batch_invariant"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"gatefuse: {name} must be a bool, got {type(value).__name__}")
        if not isinstance(self.expect, int) or isinstance(self.expect, bool) or self.expect < 0:
            raise ValueError(
                f"gatefuse: expect must be a number of sites (0 or more), got {self.expect!r}"
            )


def flag(name: str) -> bool:
    """Whether an environment variable is set to 1; ValueError if it is neither 1 nor 0."""
    text = os.environ.get(name, "").strip().lower()
    if text in _TRUE | _FALSE:
        return text in _TRUE
    raise ValueError(f"gatefuse: {name} must be 1 or 0, got {text!r}")


def _from_environment() -> Options:
    options = Options()
    if text := os.environ.get("GATEFUSE_PLACEMENT"):
        options = _with(options, "GATEFUSE_PLACEMENT", placement=text.strip().lower())
    if text := os.environ.get("GATEFUSE_EXPECT"):
        try:
            expect = int(text)
        except ValueError:
            raise ValueError(f"gatefuse: GATEFUSE_EXPECT must be a number, got {text!r}") from None
        options = _with(options, "GATEFUSE_EXPECT", expect=expect)
    return replace(
        options,
        eager_rounding=flag("GATEFUSE_EAGER_ROUNDING"),
        batch_invariant=flag("GATEFUSE_BATCH_INVARIANT"),
    )


def _with(options: Options, variable: str, **value: Any) -> Options:
    try:
        return replace(options, **value)
    except ValueError as e:
        raise ValueError(f"{e} (from the environment variable {variable})") from None


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """What is given by several ways of turning gatefuse on at once, field by field: the first of
    ``layers`` that gives a field wins. Their order is always: this compile, the block around it
    (:func:`gatefuse.fusing`), the process (:func:`gatefuse.enable`)."""
    return {name: value for layer in reversed(layers) for name, value in layer.items()}


def resolve(given: Mapping[str, Any]) -> Options:
    """Options of which ``given`` are set in code, in any way (:func:`merge`); the others come from
    the environment, or are the default. TypeError on an unknown name."""
    known = [f.name for f in fields(Options)]
    for name in given:
        if name not in known:
            raise TypeError(
                f"gatefuse: unknown option {name!r}; the options are {', '.join(known)}"
            )
    return replace(_from_environment(), **given)


def disabled_by_environment() -> bool:
    """Whether ``GATEFUSE_DISABLE`` turns every fusion off."""
    return flag("GATEFUSE_DISABLE")


def dump_directory() -> str | None:
    """The directory that ``GATEFUSE_DUMP`` names, or None."""
    return os.environ.get("GATEFUSE_DUMP") or None
