"""What the laboratory measures. Plain data: imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from gatefuse.bench.cases import NO_GATE, TRAINING, WORKLOADS, BenchError, Case, Provider

__all__ = ["NO_GATE", "WORKLOADS", "BenchError", "Case", "Provider"]

TRAINED = tuple(name + TRAINING for name in WORKLOADS)

DTYPE = "bfloat16"

VARIANTS = (
    "glue-alone",
    "glue-add-then-reshape",
    "glue-reshape-then-add",
    "glue-matmuls",
    "glue-opaque",
)
"""Other neighbours of the gate; :class:`benchmarks.run_workloads.Variant` tells what they are."""

MODES = ("default", "max-autotune", "coordinate-descent")
SHAPES = ("static", "dynamic-rows", "dynamic")
"""Which sizes are symbolic: none, the number of rows, or the width as well."""


@dataclass(frozen=True)
class Grid:
    """Cases: the product of all fields."""

    workloads: tuple[str, ...]
    widths: tuple[int, ...]
    rows: tuple[int, ...]
    modes: tuple[str, ...] = ("default",)
    shapes: tuple[str, ...] = ("static",)
    dtypes: tuple[str, ...] = (DTYPE,)
    device: str = "cuda"

    def cases(self) -> list[Case]:
        """All cases, the most telling first: decode and prefill sizes, then what lies between.

        A case of symbolic rows has all of them but 1, which Dynamo would specialise on.
        """
        telling = (2, 8192, 64, 1024, 1, 256, 16, 32768)
        ordered = sorted(self.rows, key=lambda n: telling.index(n) if n in telling else 99)
        several = tuple(sorted(N for N in self.rows if N >= 2))
        return [
            Case(workload, H, rows, self.modes, shapes, dtype, self.device)
            for shapes in self.shapes
            for rows in ([(N,) for N in ordered] if shapes == "static" else [several])
            for dtype in self.dtypes
            for H in self.widths
            for workload in self.workloads
            if rows
        ]


ROWS = (1, 2, 16, 64, 256, 1024, 8192, 32768)
WIDTHS = (2048, 4096)

GRIDS = {
    "main": Grid(WORKLOADS, WIDTHS, ROWS, MODES),
    "dynamic": Grid(WORKLOADS, WIDTHS, ROWS[1:], shapes=SHAPES[1:]),
    "variants": Grid(VARIANTS, WIDTHS, (2, 64, 1024, 8192)),
    "widths": Grid(WORKLOADS, (1024, 2560, 3072, 3584, 5120, 7168), (1, 16, 64, 256, 1024, 8192)),
    "dtypes": Grid(WORKLOADS, (2048,), (2, 64, 1024, 8192), dtypes=("float16", "float32")),
    "training": Grid(TRAINED, WIDTHS, (256, 1024, 4096, 16384, 65536), MODES[:2]),
    "cpu": Grid(
        WORKLOADS, (2048, 1024, 4096), (1, 16, 256, 4096), dtypes=("float32", DTYPE), device="cpu"
    ),
}
"""What the committed results must cover, by the names that the suite ``workloads`` takes."""


class Key(NamedTuple):
    """One workload at one size: the smallest thing that is measured with all its providers."""

    device: str
    shapes: str
    workload: str
    H: int
    N: int
    dtype: str

    def __str__(self) -> str:
        parts = [self.workload, f"H={self.H}", f"N={self.N}"]
        parts += [self.shapes] if self.shapes != "static" else []
        parts += [self.dtype] if self.dtype != DTYPE or self.device == "cpu" else []
        return " ".join(parts + (["CPU"] if self.device == "cpu" else []))


def is_hot(case: Case | Key) -> bool:
    """Whether a case is timed on hot inputs as well."""
    return case.shapes == "static" and case.workload in ("mul", "add")


def measured(cases: Iterable[Case]) -> Iterator[tuple[Key, Provider]]:
    for case in cases:
        for N in case.rows:
            for p in case.providers():
                yield Key(case.device, case.shapes, p.workload, case.H, N, case.dtype), p


@dataclass(frozen=True)
class ModuleCase:
    """A unit of work: a module of transformers at one size in one mode, with both providers."""

    model: str
    part: str
    tokens: int
    mode: str

    def __str__(self) -> str:
        return f"{self.model} {self.part} N={self.tokens} {self.mode}"


MODULE_MODELS = ("qwen3_next", "qwen2_moe")
LAYER_TRAINING = "layer-training"
MODULE_PARTS = ("block", "layer", LAYER_TRAINING)
MODULE_MODES = MODES[:2]
MODULE_PROVIDERS = ("inductor", "gatefuse-auto")
MODULE_DRAWS = {"default": 3, "max-autotune": 2}
"""Compiles of each provider of a module, by mode. Inductor measures which launch is best for each
kernel that it generates, the gate's or not, and does not always find the same one; of a provider's
compiles the fastest counts."""

MODULE_ROWS = (16, 4096, 1, 1024, 256, 32768)
MODULE_TUNED_ROWS = (16, 4096)
"""Tokens in max-autotune, where tuning the matrix products takes minutes."""
MODULE_UNTRAINED_ROWS = (16, 1, 1024, 32768)
"""Of MODULE_ROWS those that the layer is not trained with: two sizes tell enough."""


def module_cases(
    models: Iterable[str] = MODULE_MODELS,
    parts: Iterable[str] = MODULE_PARTS,
    rows: Iterable[int] = MODULE_ROWS,
    modes: Iterable[str] = MODULE_MODES,
) -> list[ModuleCase]:
    """All cases, the most telling first; tuned ones last, for they take longest."""
    return [
        ModuleCase(model, part, tokens, mode)
        for mode in modes
        for tokens in rows
        for part in parts
        for model in models
        if (mode == "default" or tokens in MODULE_TUNED_ROWS)
        and (part != LAYER_TRAINING or (mode == "default" and tokens not in MODULE_UNTRAINED_ROWS))
    ]
