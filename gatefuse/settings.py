"""The options of a compilation with gatefuse, and the environment variables that set them."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

__all__ = [
    "VARIABLES",
    "Options",
    "Placement",
    "Variable",
    "disabled_by_environment",
    "dump_directory",
    "flag",
    "merge",
    "resolve",
    "unknown_variables",
]

Placement = Literal["auto", "inline", "kernel"]

_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


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


def _flag(text: str) -> bool:
    if text.lower() not in _TRUE | _FALSE:
        raise ValueError
    return text.lower() in _TRUE


def _placement(text: str) -> str:
    if text.lower() not in get_args(Placement):
        raise ValueError
    return text.lower()


def _count(text: str) -> int:
    if int(text) < 0:
        raise ValueError
    return int(text)


@dataclass(frozen=True)
class Variable:
    """An environment variable that gatefuse reads.

    effect: what it does. option: the field of :class:`Options` that it sets. values: what it may
    be set to, for people; parse: its text to its value, or ValueError.
    """

    name: str
    effect: str
    option: str | None = None
    values: str = "1 or 0"
    parse: Callable[[str], Any] = _flag

    def read(self) -> Any:
        """Its value, or None where it is not set or empty. Raises ValueError, with its name, where
        the value is wrong."""
        text = os.environ.get(self.name, "").strip()
        if not text:
            return None
        try:
            return self.parse(text)
        except ValueError:
            message = f"gatefuse: {self.name} must be {self.values}, got {text!r}"
        raise ValueError(message)


_VARIABLES = (
    Variable(
        "GATEFUSE_PLACEMENT",
        "what a fused gate becomes",
        option="placement",
        values="auto, inline or kernel",
        parse=_placement,
    ),
    Variable("GATEFUSE_EAGER_ROUNDING", "round where eager PyTorch does", option="eager_rounding"),
    Variable(
        "GATEFUSE_BATCH_INVARIANT",
        "a token's result does not depend on how many others there are",
        option="batch_invariant",
    ),
    Variable(
        "GATEFUSE_EXPECT",
        "fewer fused gates are an error",
        option="expect",
        values="a number of gates, 0 or more",
        parse=_count,
    ),
    Variable("GATEFUSE_DUMP", "graphs and reports are written there", values="a folder", parse=str),
    Variable("GATEFUSE_DISABLE", "fuse nothing"),
    Variable("GATEFUSE_ALLOW_UNTESTED_TORCH", "fuse on a PyTorch newer than the tested ones"),
)

VARIABLES = {variable.name: variable for variable in _VARIABLES}
"""Every variable that gatefuse reads, by name. Nothing else in the package reads one."""

_warned: set[str] = set()


def unknown_variables() -> dict[str, str]:
    """Names in the environment that look like gatefuse's and are not, with what to do about each:
    a misspelt variable would otherwise do nothing, silently."""
    advice = {}
    for name in os.environ:
        plain = name.upper().replace("_", "").replace("-", "")
        if plain.startswith("GATEFUSE") and name not in VARIABLES:
            close = difflib.get_close_matches(name.upper(), VARIABLES, n=1, cutoff=0.75)
            advice[name] = (
                f"did you mean {close[0]}?" if close else f"known are {', '.join(VARIABLES)}"
            )
    return advice


def _warn_unknown() -> None:
    for name, advice in unknown_variables().items():
        if name not in _warned:
            _warned.add(name)
            warnings.warn(
                f"gatefuse: the environment variable {name} is unknown and does nothing; {advice}",
                stacklevel=4,
            )


def flag(name: str) -> bool:
    """Whether one of :data:`VARIABLES` is set to 1; ValueError if it is neither 1 nor 0."""
    return bool(VARIABLES[name].read())


def _from_environment() -> Options:
    values = {v.option: v.read() for v in VARIABLES.values() if v.option is not None}
    return Options(**{name: value for name, value in values.items() if value is not None})


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """What is given by several ways of turning gatefuse on at once, field by field: the first of
    ``layers`` that gives a field wins. Their order is always: this compile, the block around it
    (:func:`gatefuse.fusing`), the process (:func:`gatefuse.enable`)."""
    return {name: value for layer in reversed(layers) for name, value in layer.items()}


def resolve(given: Mapping[str, Any]) -> Options:
    """Options of which ``given`` are set in code, in any way (:func:`merge`); the others come from
    the environment, or are the default. TypeError on an unknown name; ValueError on a wrong value,
    also of a variable. A variable whose name is unknown is warned of, once in a process."""
    known = [f.name for f in fields(Options)]
    for name in given:
        if name not in known:
            raise TypeError(
                f"gatefuse: unknown option {name!r}; the options are {', '.join(known)}"
            )
    _warn_unknown()
    return replace(_from_environment(), **given)


def disabled_by_environment() -> bool:
    """Whether ``GATEFUSE_DISABLE`` turns every fusion off."""
    return flag("GATEFUSE_DISABLE")


def dump_directory() -> str | None:
    """The directory that ``GATEFUSE_DUMP`` names, or None."""
    directory: str | None = VARIABLES["GATEFUSE_DUMP"].read()
    return directory
