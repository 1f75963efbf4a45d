"""What is measured, and the marks that the results must reach. Plain data: imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

DTYPE = "bfloat16"

MAIN = ("mul", "add", "glue")

VARIANTS = (
    "glue-alone",
    "glue-add-then-reshape",
    "glue-reshape-then-add",
    "glue-matmuls",
    "glue-opaque",
)
"""Other neighbours of the gate; :class:`gatefuse.bench.workloads.Glue` tells what they are."""

NO_GATE = "_nogate"
"""Suffix of the chain that lacks the gate and is otherwise the same."""

FAMILIES = {
    name: (name, name + NO_GATE) if name.startswith("glue") else (name,)
    for name in (*MAIN, *VARIANTS)
}
"""Chains that are measured in one cell, by the cell's name."""

MODES = ("default", "max-autotune", "coordinate-descent")

SHAPES = ("static", "dynamic-rows", "dynamic")
"""Which sizes are symbolic: none, the number of rows, or the width as well."""

DRAWS = 3
"""Compiles of an arm of the main chains in a mode that tunes. Inductor's tuning of kernels of a few
microseconds is a lottery: two compiles of one program differ by 20 % and more, now and then by a
factor of two. A user gets one of them, so that their mean counts."""


CPU_DRAWS = 2
"""Compiles of an arm on the CPU, where the host's work is part of the time. What is compiled first
can be a few percent faster with cold caches, the same code included: each arm is first once."""


@dataclass(frozen=True)
class Arm:
    """One way to run a chain: ``name`` as in the results, ``mode`` of Inductor or "-".

    ``draw`` numbers repeated compiles.
    """

    chain: str
    name: str
    mode: str = "-"
    draw: int = 0

    @property
    def compiled(self) -> bool:
        return self.mode != "-"


def arms_of(chain: str, modes: Iterable[str], static: bool, gpu: bool = True) -> list[Arm]:
    """The arms of a chain. Without a gate, gatefuse runs in the default mode only, as a control:
    it must leave the graph alone, and its time against Inductor's shows the noise."""
    gated = not chain.endswith(NO_GATE)
    arms = [Arm(chain, "eager")]
    if chain in ("mul", "add"):
        arms += [Arm(chain, "limit")] + ([Arm(chain, "op")] if static else [])
    for mode in modes:
        draws = DRAWS if chain in MAIN and mode != "default" else 1
        for draw in range(draws if gpu else CPU_DRAWS):
            pair = [Arm(chain, "inductor", mode, draw)]
            if gated or mode == "default":
                pair.append(Arm(chain, "gatefuse-auto", mode, draw))
            arms += pair[::-1] if draw % 2 else pair
        if gated and mode == "default" and static and gpu:
            arms += [Arm(chain, f"gatefuse-{forced}", mode) for forced in ("inline", "kernel")]
    return arms


class Key(NamedTuple):
    """One chain at one size: the smallest thing that is measured with all its arms."""

    device: Literal["gpu", "cpu"]
    shapes: str
    chain: str
    H: int
    N: int
    dtype: str

    def __str__(self) -> str:
        parts = [self.chain, f"H={self.H}", f"N={self.N}"]
        parts += [self.shapes] if self.shapes != "static" else []
        parts += [self.dtype] if self.dtype != DTYPE or self.device == "cpu" else []
        parts += ["CPU"] if self.device == "cpu" else []
        return " ".join(parts)


@dataclass(frozen=True)
class Cell:
    """A unit of work: one family at one width; one number of rows, or several if dynamic."""

    family: str
    shapes: str
    H: int
    rows: tuple[int, ...]
    modes: tuple[str, ...]
    dtype: str = DTYPE
    device: Literal["gpu", "cpu"] = "gpu"

    def __str__(self) -> str:
        rows = ",".join(map(str, self.rows))
        return f"{self.family} {self.shapes} {self.dtype} H={self.H} N={rows}"

    @property
    def static(self) -> bool:
        """Whether no size is symbolic."""
        return self.shapes == "static"

    @property
    def hot(self) -> bool:
        """Whether the cell is timed on hot inputs as well."""
        return self.static and self.family in ("mul", "add")

    def arms(self) -> list[Arm]:
        """The arms of all chains of the family."""
        return [
            arm
            for chain in FAMILIES[self.family]
            for arm in arms_of(chain, self.modes, self.static, self.device == "gpu")
        ]

    def measured(self) -> Iterator[tuple[Key, Arm]]:
        """Everything that the cell measures."""
        for N in self.rows:
            for arm in self.arms():
                yield Key(self.device, self.shapes, arm.chain, self.H, N, self.dtype), arm


@dataclass(frozen=True)
class Grid:
    """Cells: the product of all fields."""

    families: tuple[str, ...]
    widths: tuple[int, ...]
    rows: tuple[int, ...]
    modes: tuple[str, ...] = ("default",)
    shapes: tuple[str, ...] = ("static",)
    dtypes: tuple[str, ...] = (DTYPE,)
    device: Literal["gpu", "cpu"] = "gpu"

    def cells(self) -> list[Cell]:
        """All cells, the most telling first: decode and prefill sizes, then what lies between.

        A cell of symbolic rows has all of them, one excepted, which Dynamo would specialise on.
        """
        telling = (2, 8192, 64, 1024, 1, 256, 16, 32768)
        ordered = sorted(self.rows, key=lambda n: telling.index(n) if n in telling else 99)
        several = tuple(sorted(N for N in self.rows if N >= 2))
        return [
            Cell(family, shapes, H, rows, self.modes, dtype, self.device)
            for shapes in self.shapes
            for rows in ([(N,) for N in ordered] if shapes == "static" else [several])
            for dtype in self.dtypes
            for H in self.widths
            for family in self.families
            if rows
        ]


ROWS = (1, 2, 16, 64, 256, 1024, 8192, 32768)
WIDTHS = (2048, 4096)

GRIDS = {
    "main": Grid(MAIN, WIDTHS, ROWS, MODES),
    "dynamic": Grid(MAIN, WIDTHS, ROWS[1:], shapes=SHAPES[1:]),
    "variants": Grid(VARIANTS, WIDTHS, (2, 64, 1024, 8192)),
    "widths": Grid(MAIN, (1024, 2560, 3072, 3584, 5120, 7168), (1, 16, 64, 256, 1024, 8192)),
    "dtypes": Grid(MAIN, (2048,), (2, 64, 1024, 8192), dtypes=("float16", "float32")),
}
"""What the committed results of a GPU must hold, by the names that `gatefuse bench core` takes."""

CPU_GRID = Grid(
    MAIN, (2048, 1024, 4096), (1, 16, 256, 4096), dtypes=("float32", DTYPE), device="cpu"
)

SHORT = {
    "gpu": Grid(MAIN, (2048,), (16, 1024, 8192)),
    "cpu": Grid(MAIN, (2048,), (1, 256), dtypes=("float32",), device="cpu"),
}
"""What `gatefuse bench` alone measures."""


class BlockKey(NamedTuple):
    """A module of transformers at one number of tokens."""

    model: str
    part: str
    tokens: int

    def __str__(self) -> str:
        return f"{self.model} {self.part} N={self.tokens}"


@dataclass(frozen=True)
class BlockCell:
    """A unit of work: a module of transformers at one size in one mode, with both arms."""

    model: str
    part: str
    tokens: int
    mode: str

    def __str__(self) -> str:
        return f"{self.key} {self.mode}"

    @property
    def key(self) -> BlockKey:
        return BlockKey(self.model, self.part, self.tokens)


BLOCK_MODELS = ("qwen3_next", "qwen2_moe")
BLOCK_PARTS = ("block", "layer")
BLOCK_MODES = MODES[:2]
BLOCK_DRAWS = {"default": 3, "max-autotune": 2}
"""Compiles of each arm of a module, by mode. Inductor measures which launch is best for each kernel
that it generates, the gate's or not, and does not always find the same one; of an arm's compiles
the fastest counts."""

BLOCK_ROWS = (16, 4096, 1, 1024, 256, 32768)
BLOCK_TUNED_ROWS = (16, 4096)
"""Tokens in max-autotune, where tuning the matrix products takes minutes."""


def block_cells(
    models: Iterable[str] = BLOCK_MODELS,
    parts: Iterable[str] = BLOCK_PARTS,
    rows: Iterable[int] = BLOCK_ROWS,
    modes: Iterable[str] = BLOCK_MODES,
) -> list[BlockCell]:
    """All cells, the most telling first; tuned cells last, for they take longest."""
    return [
        BlockCell(model, part, tokens, mode)
        for mode in modes
        for tokens in rows
        for part in parts
        for model in models
        if mode == "default" or tokens in BLOCK_TUNED_ROWS
    ]


# The marks. Times in µs; a ratio is one of medians of one run.

SLOWER = 1.02
"""gatefuse over Inductor alone in the same mode, in every cell, and, of the gate alone in default
mode, over the best arm of all."""

EXPLAINED = 1.03
"""In the glue, default-mode gatefuse over the best arm of all: above this it is listed."""

SMALL_ROWS = 1024
SPEEDUP = 1.5
"""Of the gate alone: Inductor's default mode over gatefuse, up to SMALL_ROWS rows."""

GATE_COST_RATIO = 5.0
"""In the glue: cost of the gate under Inductor's default mode over that under gatefuse, up to
SMALL_ROWS rows."""

GATE_COST_US = 0.5
GATE_COST_ROWS = 256
"""In the glue the gate costs at most so much at up to so many rows."""

GATE_COST_PREFILL_US = {(2048, 8192): 2.0, (4096, 8192): 3.0}
"""The same by width and rows."""

LIMIT_RATIO = 1.05
"""The kernel alone over ``torch.add`` or ``torch.addcmul``, from SMALL_ROWS rows on."""

PEER_ROWS = 256
PEER_US = 0.1
"""The eager op is at most so much slower than the best known kernel, up to PEER_ROWS rows: as
``benchmarks/peers.csv`` has it, and as measured beside it (``gatefuse bench peer``)."""

PASS_SHARE = 0.01
"""gatefuse's pass, of the time of a compile in an empty cache."""

IMPORT_MS = 50.0
"""``import gatefuse`` after ``import torch``."""
