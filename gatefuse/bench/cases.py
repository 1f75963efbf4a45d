"""What is compared with what: providers of a workload's result, and cases. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

WORKLOADS = ("mul", "add", "glue")
NO_GATE = "_nogate"
"""Suffix of the workload that lacks the gate and is otherwise the same."""

TRAINING = "-training"
"""Suffix of the workload with its backward: the gradients of its inputs and weights."""

LEAST_TRAFFIC = {"mul" + TRAINING: 8 / 3, "add" + TRAINING: 9 / 3}
"""The least bytes of a forward and backward, in those of the sum that is their roofline. Of N rows
of H elements: three or four in the forward; five in the backward, which reads the value, the
result's gradient and the input once more, and writes the gradients of value and input."""

DRAWS = 3
"""Compiles of a provider in a mode that tunes: two compiles of one program differ by 20 % and more,
now and then by a factor of two. A user gets one of them, so their mean counts."""

CPU_DRAWS = 2
"""The same on the CPU, where what is compiled first can be a few percent faster with cold caches:
each provider is first once."""


class BenchError(RuntimeError):
    """The command cannot run; the message says why, in a line."""


@dataclass(frozen=True)
class Provider:
    """One way to run a workload: ``name`` as in the results, ``mode`` of Inductor or "-".

    ``draw`` numbers repeated compiles.
    """

    workload: str
    name: str
    mode: str = "-"
    draw: int = 0

    @property
    def compiled(self) -> bool:
        """Whether the provider goes through torch.compile."""
        return self.mode != "-"

    @property
    def gates(self) -> int:
        """Gates that it must fuse."""
        return int(self.name.startswith("gatefuse-") and not self.workload.endswith(NO_GATE))


def providers_of(workload: str, modes: Iterable[str], static: bool, device: str) -> list[Provider]:
    """The providers of a workload. Without a gate, gatefuse runs in the default mode only, as a
    control: it must leave the graph alone, and its time against Inductor's shows the noise."""
    gated, gpu = not workload.endswith(NO_GATE), device != "cpu"
    providers = [Provider(workload, "eager")]
    if workload.removesuffix(TRAINING) in ("mul", "add"):
        providers.append(Provider(workload, "roofline"))
        providers += [Provider(workload, "op")] if static else []
    for mode in modes:
        draws = DRAWS if workload in WORKLOADS and mode != "default" else 1
        for draw in range(draws if gpu else CPU_DRAWS):
            pair = [Provider(workload, "inductor", mode, draw)]
            if gated or mode == "default":
                pair.append(Provider(workload, "gatefuse-auto", mode, draw))
            providers += pair[::-1] if draw % 2 else pair
        forced = gated and not workload.endswith(TRAINING)
        if forced and mode == "default" and static and gpu:
            providers += [Provider(workload, f"gatefuse-{p}", mode) for p in ("inline", "kernel")]
    return providers


@dataclass(frozen=True)
class Case:
    """A unit of work: a workload at one width; one number of rows, or several if symbolic.

    shapes: which sizes are symbolic, ``"static"`` (none), ``"dynamic-rows"`` or ``"dynamic"``
    (rows and width). device: ``"cuda"`` or ``"cpu"``.
    """

    workload: str
    H: int
    rows: tuple[int, ...]
    modes: tuple[str, ...] = ("default",)
    shapes: str = "static"
    dtype: str = "bfloat16"
    device: str = "cuda"

    def __str__(self) -> str:
        rows = ",".join(map(str, self.rows))
        return f"{self.workload} {self.shapes} {self.dtype} H={self.H} N={rows}"

    @property
    def workloads(self) -> tuple[str, ...]:
        """What is measured together, so that the gate's cost is a difference within one run."""
        glue = self.workload.startswith("glue") and not self.workload.endswith(TRAINING)
        return (self.workload, self.workload + NO_GATE) if glue else (self.workload,)

    def providers(self) -> list[Provider]:
        """The providers of all workloads."""
        static = self.shapes == "static"
        return [p for w in self.workloads for p in providers_of(w, self.modes, static, self.device)]

    def columns(self, provider: Provider, N: int) -> dict[str, Any]:
        """The columns of a result row that tell what it is of."""
        of = {"workload": provider.workload, "provider": provider.name, "mode": provider.mode}
        size = {"shapes": self.shapes, "H": self.H, "N": N, "dtype": self.dtype}
        return {**of, "draw": provider.draw, **size}
