"""What the demo found, as data and as text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Timing:
    """Median time of one forward pass, in milliseconds."""

    mode: str
    phase: str
    tokens: int
    inductor_ms: float
    gatefuse_ms: float


@dataclass
class Differences:
    """The largest difference over all logits, relative to the largest logit of the reference.

    ``*_vs_eager``: from the eager model; ``*_vs_fp64``: from the same weights in float64.
    """

    inductor_vs_eager: float
    gatefuse_vs_eager: float
    eager_vs_fp64: float
    inductor_vs_fp64: float
    gatefuse_vs_fp64: float

    @property
    def ratio(self) -> float:
        """gatefuse's difference from eager over Inductor's own."""
        if self.inductor_vs_eager == 0:
            return 1.0 if self.gatefuse_vs_eager == 0 else float("inf")
        return self.gatefuse_vs_eager / self.inductor_vs_eager


@dataclass
class ModelResult:
    """What the demo found in one model; problems is empty if all is well."""

    model: str
    gates: int
    sites: int
    op_nodes: int
    placements: dict[str, int]
    locations: dict[str, int]
    differences: Differences
    problems: list[str] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)


@dataclass
class DemoResult:
    """All models' results; ``passed`` is False when a gate was not fused or a result differs."""

    versions: dict[str, str]
    device: str
    dtype: str
    models: list[ModelResult]

    @property
    def passed(self) -> bool:
        """Whether every gate was fused and every result agrees."""
        return not any(m.problems for m in self.models)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        plain = dataclasses.asdict(self)
        for model, result in zip(plain["models"], self.models, strict=True):
            ratio = result.differences.ratio
            model["differences"]["ratio"] = ratio if math.isfinite(ratio) else None
        return plain | {"passed": self.passed}

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [f"{versions}; {self.device}, {self.dtype}", ""]
        counted, compared, timed = [], [], []
        for m in self.models:
            verdict = "FAILED" if m.problems else "ok"
            counted.append((m.model, m.gates, m.sites, m.op_nodes, _counts(m.placements), verdict))
            d = m.differences
            eager = [f"{x:.2e}" for x in (d.inductor_vs_eager, d.gatefuse_vs_eager)]
            fp64 = [f"{x:.2e}" for x in (d.eager_vs_fp64, d.inductor_vs_fp64, d.gatefuse_vs_fp64)]
            compared.append((m.model, *eager, f"{d.ratio:.2f}", *fp64))
            for t in m.timings:
                ms = (t.inductor_ms, t.gatefuse_ms, t.gatefuse_ms / t.inductor_ms)
                times = [f"{x:.3f}" for x in ms]
                timed.append((m.model, t.mode, t.phase, t.tokens, *times))
        lines += _table(("model", "gates", "sites", "op nodes", "placed", "verdict"), counted)
        lines += ["", "largest difference of the logits, relative to the largest logit", ""]
        against = ["Inductor\nvs eager", "gatefuse\nvs eager", "ratio", "eager\nvs fp64"]
        lines += _table(["model", *against, "Inductor\nvs fp64", "gatefuse\nvs fp64"], compared)
        if any(m.locations for m in self.models):
            lines += ["", "where the gates are"]
        for m in self.models:
            lines += [f"  {m.model}: {n} x {where}" for where, n in sorted(m.locations.items())]
        if timed:
            lines += ["", "median time of a forward pass of a wider model, bfloat16, ms", ""]
            heads = ("model", "mode", "phase", "tokens", "Inductor", "gatefuse", "ratio")
            lines += _table(heads, timed)
        lines.append("")
        for m in self.models:
            lines += [f"{m.model}: {problem}" for problem in m.problems]
        good = (
            "Every gate is fused and every result is as near to the float64 reference as eager's."
        )
        return "\n".join([*lines, good if self.passed else "FAILED"])


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a plain-text table; the first column is flush left, the others flush right.

    A header cell may have two lines.
    """
    heads = [(["", *cell.split("\n")])[-2:] for cell in header]
    above, below = zip(*heads, strict=True)
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(above, below, *texts, strict=True)]
    lines = []
    for row in (above, below, ["-" * width for width in widths], *texts):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines if lines[0] else lines[1:]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {what}" for what, n in sorted(counts.items())) or "none"
