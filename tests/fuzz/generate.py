"""Decides what a random program is made of; ``generate(seed, index)`` is always the same."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import torch

from tests.fuzz import steps
from tests.fuzz.engines import run_eagerly
from tests.fuzz.inputs import LAYOUTS
from tests.fuzz.programs import Builder, Case, Loaded
from tests.fuzz.settings import DTYPES, random_settings

__all__ = ["generate"]

_WIDTHS = (1, 2, 3, 4, 7, 8, 16, 16, 16, 32, 33, 64, 130, 1024)


def generate(seed: int, index: int) -> Case:
    """The case ``seed:index``: one that runs eagerly, with at least one gate."""
    rng = random.Random(f"{seed}:{index}")
    while True:
        case = _attempt(rng, seed, index)
        if case is not None and (case := _runnable(case)) is not None:
            return case


def _runnable(case: Case) -> Case | None:
    """The case, or one without gradients, if it runs for all of its sizes."""
    for candidate in (case, *([_inference(case)] if case.grad else [])):
        loaded = Loaded(candidate, "cpu")
        try:
            run_eagerly(loaded, drawn=None)
        except (RuntimeError, ValueError, IndexError):
            continue
        finally:
            loaded.forget()
        return candidate
    return None


def _inference(case: Case) -> Case:
    lines = tuple(line.replace(", grad=True", "") for line in case.input_lines)
    return replace(case, grad=False, checkpoint=False, input_lines=lines)


def _attempt(rng: random.Random, seed: int, index: int) -> Case | None:
    case, lead, dtype = random_settings(rng, seed, index)
    tangled = rng.random() < 0.2
    if tangled:  # gates that wait for each other's logits, and draws in between
        case = replace(case, inductor=case.inductor | {"fallback_random": True})
    b = Builder(rng, case, lead, dtype)
    width = rng.choice(_WIDTHS)
    if b.chance(0.01):
        width = rng.choice((0, 8192))
    same = b.chance(0.6)
    program = _Program(b, width, width if same else rng.choice(_WIDTHS), tangled)
    if "n" in lead and case.sizes[0] > 1 and not case.grad and b.chance(0.05):
        program.select_rows()
    threads: list[Iterator[None]] = [
        program.gate() for _ in range(rng.choice((2, 2, 3) if tangled else (1, 1, 2, 2, 3, 4)))
    ]
    threads += [
        program.noise() for _ in range(rng.choice((1, 2, 2) if tangled else (0, 0, 1, 2, 3, 4)))
    ]
    current = rng.choice(threads)
    while threads:
        if current not in threads or b.chance(0.35):
            current = rng.choice(threads)
        if next(current, program) is program:
            threads.remove(current)
    outputs = program.outputs()
    return b.finished(outputs) if outputs and b.logits else None


class _Program:
    """Grows gates and noise; each of its iterators yields where another may go on."""

    def __init__(self, b: Builder, width: int, value_width: int, tangled: bool) -> None:
        self.b = b
        self.tangled = tangled
        self.width = width
        self.value_width = value_width
        self.selection = ""

    # --- operands -------------------------------------------------------------------------

    def _shape(self, *last: int, flat: bool = False) -> str:
        lead = [f"({' * '.join(self.b.lead) or 1})"] if flat else list(self.b.lead)
        return f"({', '.join([*lead, *map(str, last)])},)"

    def _layout(self) -> str:
        return self.b.rng.choice(LAYOUTS) if self.b.chance(0.25) else "contiguous"

    def _dtype(self) -> str:
        return self.b.rng.choice(DTYPES) if self.b.chance(0.05) else self.b.dtype

    def _selected(self, name: str) -> str:
        """Rows of an input, of an unbacked number."""
        return (self.b.let("u", f"{name}[{self.selection}]") or name) if self.selection else name

    def select_rows(self) -> None:
        """From now on all rows are the true ones of a mask: a size that no graph knows."""
        b = self.b
        if b.lead != ("n",):
            return
        name = b.name("m")
        b._input(name, f"new.mask({b.rng.randrange(1 << 31)}, n)")
        self.selection = b.let("i", f"torch.nonzero({name}).squeeze(1)") or ""

    def _known_rows(self) -> torch.Size:
        if self.selection:
            return self.b.env[self.selection].shape
        return self.b.shape_of_lead()

    def x(self) -> str:
        b = self.b
        shape = (*self._known_rows(), self.width)
        found = b.choose(lambda t: t.shape == shape) if b.chance(0.5) else None
        name = found or self._selected(
            b.input("x", self._shape(self.width), self._dtype(), layout=self._layout())
        )
        for _ in range(2):
            if b.chance(0.12):
                step = b.rng.choice(
                    ("{}.clone()", "F.silu({})", "F.rms_norm({0}, ({0}.shape[-1],))", "{}.float()",
                     "{0}.transpose(0, -1).contiguous().transpose(0, -1)", "{} * 0.5",
                     "{0}.reshape(-1, {0}.shape[-1])", "{}.unsqueeze(0)", "{}.to(torch.bfloat16)")
                )  # fmt: skip
                name = b.let("x", step.format(name)) or name
        return name

    def weight(self, rows: int = 1) -> str:
        b = self.b
        found = b.choose(lambda t: t.shape == (rows, self.width)) if b.chance(0.3) else None
        scale = max(self.width, 1) ** -0.5
        name = found or b.input("w", f"({rows}, {self.width})", scale=round(scale, 4),
                                layout=self._layout())  # fmt: skip
        if rows == 1 and b.chance(0.15):
            step = b.rng.choice(list(steps.WEIGHTS.values()))
            name = b.let("w", step.format(w=name, w2=self.weight())) or name
        return name

    def rows_of(self, width: int, letter: str = "v") -> str:
        """A value: a tensor ``[..., width]``, or one of as many rows."""
        b = self.b
        rows = self._known_rows()
        flat = len(b.lead) > 1 and b.chance(0.15)
        shapes = [(*rows, width), (rows.numel(), width)]
        found = b.choose(lambda t: tuple(t.shape) in shapes) if b.chance(0.45) else None
        if found:
            return found
        if b.chance(0.1) and b.arguments:
            alias = b.alias(b.rng.choice(b.arguments))
            if alias and tuple(b.env[alias].shape) in shapes:
                return alias
        return self._selected(
            b.input(letter, self._shape(width, flat=flat), self._dtype(), layout=self._layout())
        )

    def like(self, name: str) -> str:
        """Another tensor of the shape of ``name``."""
        b = self.b
        shape = b.env[name].shape
        same = b.choose(lambda t: t.shape == shape and t.dtype == b.env[name].dtype)
        if same and same != name and b.chance(0.5):
            return same
        if shape == (*self._known_rows(), shape[-1] if shape else 0):
            return self._selected(b.input("r", self._shape(shape[-1]), layout=self._layout()))
        if len(shape) == 2 and shape[0] == self._known_rows().numel() and not self.selection:
            return b.input("r", self._shape(shape[-1], flat=True))
        return same or name

    def logit(self) -> str | None:
        return self.b.rng.choice(self.b.logits) if self.b.logits else None

    def _fill(self, template: str, name: str, **names: str) -> str:
        """A template with its names; those that it does not ask for are not made."""
        b = self.b
        z = (self.logit() or name) if "{z" in template else name
        lead = f"*{name}.shape[:-1], 1" if b.env[name].dim() else "1"
        names = {
            "r": self.like(name) if "{r}" in template else "",
            "z": z,
            "zr": f"{z}.reshape({lead})",
            "other": b.rng.choice(("torch.float32", "torch.bfloat16", "torch.float16")),
            "device": "DEVICE",
            "dtype": b.dtype,
            "shape": f"(*{name}.shape[:-1], {b.rng.choice((1, 3))})",
            "rows": f"{name}.shape[0]",
        } | names
        return template.format(**names)

    def step(self, table: dict[str, str], letter: str, name: str, **names: str) -> str | None:
        template = self.b.rng.choice(list(table.values()))
        return self.b.let(letter, self._fill(template, name, **names))

    # --- gates ----------------------------------------------------------------------------

    def gate(self) -> Iterator[None]:
        b = self.b
        if b.chance(0.12) and not self.tangled:
            yield from self._other_gate()
            return
        x = self.x()
        yield
        w = self.weight()
        if b.env[x].dtype != b.env[w].dtype and b.chance(0.8):
            x = b.let("x", f"{x}.to({w}.dtype)") or x
        linears = list(steps.LINEARS.values())
        linear = b.rng.choice(linears[: steps.PLAIN_LINEARS] if b.chance(0.5) else linears)
        table = w2 = bias = w
        if "{t}" in linear:
            table = self.weight(3)
        if "{w2}" in linear:
            w2 = self.weight()
        if "{b}" in linear:
            bias = b.input("b", b.rng.choice(("(1,)", "()", "(1, 1)")), str(b.env[w].dtype))
        z = b.let("z", linear.format(x=x, w=w, t=table, b=bias, w2=w2))
        z = z or b.let("z", f"F.linear({x}, {w}.to({x}.dtype))")
        if z is None:
            return
        b.logits.append(z)
        yield from self._use(z, 0.4)
        z = self._between(z, 0.35)
        yield
        sigmoid = b.rng.choice(("torch.sigmoid({})", "{}.sigmoid()", "{}.clone().sigmoid_()"))
        g = b.let("g", sigmoid.format(z))
        if g is None:
            return
        yield from self._use(g, 0.12)
        g = self._between(g, 0.25)
        yield from self._multiply(g)
        if b.chance(0.1):  # the gate serves two values
            yield
            yield from self._multiply(g)

    def _between(self, g: str, probability: float) -> str:
        """Steps that keep the rows, and now and then one that does not."""
        b = self.b
        while b.chance(probability) and not self.tangled:
            table, rough = steps.KEEPS, False
            if b.chance(0.25):
                table = steps.CORRUPTS
            elif b.chance(0.03):
                table, rough = steps.COARSE, True
            known = list(table.values())
            if table is steps.CORRUPTS and b.chance(0.5):
                known = known[: steps.ROW_MOVERS]
            step = b.rng.choice(known)
            names = {"g": g}
            if "{perm}" in step:
                rows = self._known_rows().numel()
                if self.selection or b.env[g].numel() != rows:
                    continue
                names["perm"] = b.permutation(rows, " * ".join(b.lead) or "1")
            g = b.let("k", step.format(**names), rough=rough) or g
        return g

    def _use(self, z: str, probability: float) -> Iterator[None]:
        """Another use of a logit or a gate, so that it has to be kept."""
        b = self.b
        while b.chance(probability):
            used = self.step(steps.BETWEEN, "o", z, z=z)
            if used:
                b.returned.append(used)
            probability /= 2
            yield

    def _multiply(self, g: str) -> Iterator[None]:
        b = self.b
        v = self.rows_of(self.value_width)
        if self.tangled and b.chance(0.6):
            v = b.let("v", self._fill(steps.VALUES["of-logit"], v, v=v)) or v
        while b.chance(0.3):
            v = self.step(steps.VALUES, "v", v, v=v) or v
            yield
        yield
        ways = list(steps.MULTIPLIES.values())
        multiply = b.rng.choice(ways[: steps.PLAIN_MULTIPLIES] if b.chance(0.6) else ways)
        y = b.let("y", self._fill(multiply, v, g=g, v=v))
        y = y or b.let("y", f"{g}.reshape(*{v}.shape[:-1], 1) * {v}")
        if y is None:
            return
        b.results.append(y)
        while b.chance(0.45):
            yield
            after = self.step(steps.AFTER, "y", y, y=y)
            if after:
                b.results[b.results.index(y) if y in b.results and b.chance(0.8) else -1] = after
                y = after

    def _other_gate(self) -> Iterator[None]:
        b = self.b
        x, v = self.x(), self.rows_of(self.value_width)
        yield
        text = b.rng.choice(list(steps.OTHER_GATES.values()))
        names = {"x": x, "v": v}
        if "{wh}" in text:
            names["wh"] = self.weight(2)
        if "{wd}" in text:
            names["wd"] = self.weight(self.value_width)
        y = b.let("y", text.format(**names))
        if y:
            b.results.append(y)

    # --- noise ----------------------------------------------------------------------------

    def noise(self) -> Iterator[None]:
        b = self.b
        for _ in range(b.rng.choice((1, 1, 2, 3))):
            yield
            if b.chance(0.6) or b.case.checkpoint:
                self._draw()
            else:
                self._write()

    def _draw(self) -> None:
        b = self.b
        v = self.rows_of(self.value_width)
        draw = b.rng.choice(list(steps.DRAWS.values()))
        if self.tangled:
            draw = steps.DRAWS[b.rng.choice(("poisson", "poisson-3", "rand-like", "rand-like"))]
        drawn = b.let("d", self._fill(draw, v, v=v), draws=True)
        if drawn is None:
            return
        b.returned.append(drawn)
        if b.env[drawn].shape == b.env[v].shape and b.chance(0.5):
            used = b.let("v", f"{v} * {drawn}")
            if used and b.chance(0.3):
                b.returned.append(used)

    def _write(self) -> None:
        b = self.b
        target = b.choose(lambda t: t.dim() >= 1 and not t.requires_grad) or ""
        drawn = {line.target for line in b.lines if line.draws}  # returned as they were drawn
        if not target or b.case.checkpoint or target in drawn:
            return
        if target in b.arguments and b.chance(0.2):
            b.alias(target)
        text = b.rng.choice(list(steps.WRITES.values()))
        b.do(self._fill(text, target, v=target), target)

    # --- outputs --------------------------------------------------------------------------

    def outputs(self) -> list[str]:
        b = self.b
        found = list(dict.fromkeys([*b.results, *b.returned]))
        extra = [line.target for line in b.lines if line.target]
        if extra and b.chance(0.3):
            found.append(b.rng.choice(extra))
        if found and b.chance(0.12):
            found.append(b.rng.choice(found))
        if found and b.chance(0.08):
            found.append(f"{b.rng.choice(found)}.unsqueeze(0)")
        if b.arguments and b.chance(0.06):
            found.append(b.rng.choice(b.arguments))
        b.rng.shuffle(found)
        return found
