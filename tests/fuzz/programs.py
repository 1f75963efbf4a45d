"""Random programs with gates. ``generate(seed, index)`` always makes the same one.

A program is text: functions ``inputs(new, n)`` and ``forward``. While it grows, each line runs
eagerly; a line that fails, or whose values are useless, is not taken. The gates of a program and
the noise between them grow together, so that their lines interleave.
"""

from __future__ import annotations

import contextlib
import linecache
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from tests.fuzz.inputs import Make

__all__ = ["Case", "Line", "Loaded"]

_REFUSALS = (RuntimeError, ValueError, IndexError, TypeError, AttributeError)
_NAME = re.compile(r"\b[a-z]+\d+\b")


@dataclass(frozen=True)
class Line:
    """A statement of ``forward``. draws: whether what it makes are random numbers."""

    text: str
    draws: bool = False

    @property
    def target(self) -> str:
        """The name that it makes, or "" where it writes to an older one."""
        found = re.match(r"(\w+) = ", self.text)
        return found[1] if found else ""

    def names(self) -> set[str]:
        return set(_NAME.findall(self.text))


@dataclass(frozen=True)
class Case:
    """One program and how it is compiled.

    sizes: the rows of its calls, one after another. state: inputs that are parameters or buffers.
    rough: names whose values a rounding may change by much.
    dynamic: "", "rows" or "all". inject: a seed for writes into the graph itself, or None.
    inductor, gatefuse: options.
    """

    seed: int
    index: int
    input_lines: tuple[str, ...]
    lines: tuple[Line, ...]
    arguments: tuple[str, ...]
    state: tuple[str, ...]
    outputs: tuple[str, ...]
    rough: frozenset[str] = frozenset()
    sizes: tuple[int, ...] = (5,)
    grad: bool = False
    dynamic: str = ""
    autocast: bool = False
    checkpoint: bool = False
    coordinate_descent: bool = False
    padded_products: bool = False
    special: bool = False
    inject: int | None = None
    inductor: dict[str, Any] = field(default_factory=dict)
    gatefuse: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.seed}:{self.index}"

    @property
    def draws(self) -> set[str]:
        return {line.target for line in self.lines if line.draws}

    def source(self, replay: bool = False) -> str:
        """The program. replay: what it draws comes from ``self.drawn``."""
        indent = "    " * (3 if self.autocast else 2)
        lines = [f"{name} = self.{name}" for name in self.state]
        for line in self.lines:
            drawn = replay and line.draws
            lines.append(f"{line.target} = self.drawn[{line.target!r}]" if drawn else line.text)
        lines.append(f"return ({', '.join(self.outputs)},)")
        body = "\n".join(indent + line for line in lines)
        if self.autocast:
            body = f"        with torch.autocast(DEVICE, dtype=torch.bfloat16):\n{body}"
        arguments = "".join(f", {name}" for name in self.arguments)
        made = "\n".join("    " + line for line in self.input_lines)
        names = ", ".join(f"{n!r}: {n}" for n in (*self.arguments, *self.state))
        name = "body" if self.checkpoint else "forward"
        text = (
            f"def inputs(new, n):\n{made}\n    return {{{names}}}\n\n\n"
            f"class Program(nn.Module):\n    def {name}(self{arguments}):\n{body}\n"
        )
        if self.checkpoint:
            text += (
                f"\n    def forward(self{arguments}):\n"
                f"        return checkpoint(self.body{arguments}, use_reentrant=False)\n"
            )
        return text

    def text(self) -> str:
        """Everything that a reader needs to see what the case is."""
        shown_below = ("input_lines", "lines", "arguments", "state", "outputs", "rough")
        shown = {k: v for k, v in vars(self).items() if v and k not in shown_below}
        return f"# {shown}\n{self.source()}"


class Loaded:
    """A case, ready to be run; modules and inputs are made anew for each run."""

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        self.device = device
        self.namespaces = [self._execute(replay) for replay in (False, True)]

    def _execute(self, replay: bool) -> dict[str, Any]:
        source = self.case.source(replay)
        name = f"<fuzz {self.case.id}{' replayed' if replay else ''}>"
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        namespace = namespace_of(self.device)
        exec(compile(source, name, "exec"), namespace)
        return namespace

    def tensors(self, n: int, wide: bool = False) -> dict[str, Tensor]:
        inputs: dict[str, Tensor] = self.namespaces[0]["inputs"](Make(self.device, wide), n)
        return inputs

    def module(
        self, tensors: dict[str, Tensor], drawn: dict[str, Tensor] | None = None
    ) -> nn.Module:
        """drawn: the random numbers to use, by name; or None to draw."""
        module: nn.Module = self.namespaces[drawn is not None]["Program"]()
        module.drawn = drawn  # type: ignore[assignment]
        for name in self.case.state:
            t = tensors[name]
            if t.requires_grad:
                module.register_parameter(name, nn.Parameter(t.detach()))
            else:
                module.register_buffer(name, t)
        return module

    def forget(self) -> None:
        for replay in (False, True):
            linecache.cache.pop(f"<fuzz {self.case.id}{' replayed' if replay else ''}>", None)


def namespace_of(device: str) -> dict[str, Any]:
    return {
        "torch": torch,
        "F": F,
        "nn": nn,
        "checkpoint": torch.utils.checkpoint.checkpoint,
        "DEVICE": device,
    }


class Builder:
    """The program so far, with the values of its names for the first size."""

    def __init__(self, rng: random.Random, case: Case, lead: tuple[str, ...], dtype: str) -> None:
        self.rng = rng
        self.case = case
        self.lead = lead
        self.dtype = dtype
        self.env: dict[str, Any] = namespace_of("cpu") | {"n": case.sizes[0], "new": Make()}
        self.inputs: list[str] = []
        self.arguments: list[str] = []
        self.state: list[str] = []
        self.lines: list[Line] = []
        self.rough: set[str] = set()
        self.logits: list[str] = []
        self.results: list[str] = []
        self.returned: list[str] = []
        self.count = 0

    def name(self, letter: str) -> str:
        self.count += 1
        return f"{letter}{self.count}"

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    # --- inputs ---------------------------------------------------------------------------

    def input(self, letter: str, shape: str, dtype: str = "", **options: Any) -> str:
        """A new input; options go to Make."""
        name = self.name(letter)
        if self.case.special and self.chance(0.3):
            options["special"] = True
        if self.case.grad and self.chance(0.8):
            options["grad"] = True
        if options.get("layout") == "contiguous":
            del options["layout"]
        more = "".join(f", {key}={value!r}" for key, value in options.items())
        key = self.rng.randrange(1 << 31)
        self._input(name, f"new({key}, {shape}, {dtype or self.dtype}{more})")
        return name

    def _input(self, name: str, expression: str) -> None:
        exec(f"{name} = {expression}", self.env)
        self.inputs.append(f"{name} = {expression}")
        # What a module owns has one size, and memory of its own to be set before each run.
        fixed = not (self.case.dynamic and re.search(r"\bn\b", expression))
        owned = fixed and "expanded" not in expression and self.chance(0.2)
        (self.state if owned else self.arguments).append(name)

    def alias(self, of: str) -> str | None:
        """Another input that is, or is a view of, an input without a gradient."""
        t = self.env[of]
        if t.requires_grad or of in self.state or not t.is_contiguous():
            return None
        views = ["", ".view({}.shape)", "[:]" if t.dim() else ".view(())", ".detach()"]
        view = self.rng.choice(views).format(of)
        name = self.name("a")
        exec(f"{name} = {of}{view}", self.env)
        self.inputs.append(f"{name} = {of}{view}")
        self.arguments.append(name)
        return name

    def permutation(self, rows: int, expression: str) -> str:
        name = self.name("i")
        self._input(name, f"new.indices({self.rng.randrange(1 << 31)}, {expression})")
        return name

    # --- lines ----------------------------------------------------------------------------

    def let(
        self, letter: str, expression: str, draws: bool = False, rough: bool = False
    ) -> str | None:
        """A new name for the value of an expression, or None where it has no useful one."""
        name = self.name(letter)
        # By name: in float64, where all dtypes are one, a cast is still to copy.
        expression = re.sub(
            r"\b([a-z]+\d+)\.dtype", lambda m: str(self.env[m[1]].dtype), expression
        )
        line = Line(f"{name} = {expression}", draws)
        try:
            with self._context():
                value = eval(expression, self.env)
        except _REFUSALS:
            return None
        if not isinstance(value, Tensor) or not self._useful(value):
            return None
        if draws and value.requires_grad:
            return None
        if re.search(r"\.(to|float)\(", expression) and self._shares_memory(value):
            return None  # a cast to the same dtype is an alias, in float64 a copy
        self.env[name] = value
        self.lines.append(line)
        if rough or not self.rough.isdisjoint(line.names()):
            self.rough.add(name)
        return name

    def do(self, statement: str, target: str) -> bool:
        """A statement that writes to ``target``."""
        line = Line(statement)
        before = {n: t.detach().clone() for n, t in self._tensors().items()}
        try:
            with self._context():
                exec(statement, self.env)
        except _REFUSALS:
            for n, t in before.items():
                with torch.no_grad(), contextlib.suppress(RuntimeError):
                    self.env[n].copy_(t)
            return False
        self.lines.append(line)
        if not self.rough.isdisjoint(line.names()):
            storage = self.env[target].untyped_storage().data_ptr()
            shared = [n for n, t in self._tensors().items()
                      if t.untyped_storage().data_ptr() == storage]  # fmt: skip
            self.rough.update(shared)
        return True

    def _shares_memory(self, value: Tensor) -> bool:
        storage = value.untyped_storage().data_ptr()
        return any(t.untyped_storage().data_ptr() == storage for t in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        return {n: t for n, t in self.env.items() if isinstance(t, Tensor)}

    def _useful(self, value: Tensor) -> bool:
        if value.numel() > 1 << 18:
            return False
        if not value.is_floating_point() or not value.numel():
            return True
        return self.case.special or bool(value.detach().abs().max() < 1e3)

    @contextlib.contextmanager
    def _context(self) -> Iterator[None]:
        with torch.set_grad_enabled(self.case.grad), contextlib.ExitStack() as stack:
            if self.case.autocast:
                stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
            yield

    # --- choosing -------------------------------------------------------------------------

    def shape_of_lead(self) -> torch.Size:
        n = self.case.sizes[0]
        return torch.Size(n if s == "n" else int(s) for s in self.lead)

    def rows(self) -> int:
        return self.shape_of_lead().numel()

    def choose(self, condition: Any) -> str | None:
        """A float tensor of the program so far."""
        found = [
            n
            for n, t in self._tensors().items()
            if t.is_floating_point() and t.dtype.itemsize > 1 and condition(t)
        ]
        return self.rng.choice(found) if found else None

    def finished(self, outputs: list[str]) -> Case:
        """The case, without inputs that nothing uses."""
        used = {n for line in self.lines for n in line.names()}
        used |= {n for output in outputs for n in _NAME.findall(output)}
        kept = []
        for text in reversed(self.inputs):
            name, _, expression = text.partition(" = ")
            if name in used:
                kept.append(text)
                used.update(_NAME.findall(expression))
        return replace(
            self.case,
            input_lines=tuple(reversed(kept)),
            lines=tuple(self.lines),
            arguments=tuple(n for n in self.arguments if n in used),
            state=tuple(n for n in self.state if n in used),
            outputs=tuple(outputs),
            rough=frozenset(self.rough),
        )
