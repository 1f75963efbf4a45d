"""Is the op as fast as the best hand-written kernel known? Both in one run, on one machine.

The rival is SGLang's fused shared-expert gate, with programmatic dependent launch; it is found
where sglang is installed and loaded by itself, for the rest of sglang is not needed. Both are
called eagerly and replayed through CUDA graphs; inputs and weights are cold. SGLang's kernel adds
into the routed experts' output, the op writes a new tensor.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import sys
import types
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import gatefuse
from benchmarks.run_workloads import columns, release_memory
from benchmarks.store import BenchError, Row
from benchmarks.sweep import Setting, sweep
from benchmarks.workers import DeviceLock
from gatefuse import kernels
from gatefuse.bench.timing import Replay, interleaved, plan

_SOURCE = "kernels/ops/elementwise/elementwise.py"
_IMPORTED: dict[str, dict[str, Callable[[], bool]]] = {
    "sglang.kernels.jit.utils": {"is_arch_support_pdl": lambda: kernels.supports_pdl(0)},
    "sglang.srt.batch_invariant_ops": {"is_batch_invariant_mode_enabled": lambda: False},
    "sglang.srt.utils": {"is_hip": lambda: False},
}
"""What the source imports from sglang, and all that is used of it."""


@dataclass(frozen=True)
class PeerCell:
    """A unit of work: one chain at one width, with all arms."""

    chain: str
    H: int
    rows: tuple[int, ...]


def load() -> Any:
    """The module of SGLang's kernel. Raises BenchError where there is none."""
    package = importlib.util.find_spec("sglang")  # runs nothing of it
    folders = package.submodule_search_locations if package is not None else None
    source = Path(next(iter(folders)), _SOURCE) if folders else None
    if source is None or not source.exists():
        raise BenchError("sglang, whose kernel is the rival, is not installed")
    modules = {}
    for name, attributes in _IMPORTED.items():
        modules[name] = types.ModuleType(name)
        vars(modules[name]).update(attributes)
    spec = importlib.util.spec_from_file_location("gatefuse_bench_sglang", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {"sglang": types.ModuleType("sglang"), **modules}):
        spec.loader.exec_module(module)
    return module


def version() -> str:
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


Set = tuple[nn.Parameter, Tensor, Tensor, Tensor, Tensor]  # weight, x, v, routed, SGLang's routed


def calls_of(chain: str) -> dict[str, Callable[[Set], Tensor]]:
    """The arms: a call each."""
    peer = load()

    def op(s: Set) -> Tensor:
        return gatefuse.linear_sigmoid_mul(
            s[1], s[0], s[2], addend=s[3] if chain == "add" else None
        )

    def rival(s: Set) -> Tensor:
        if chain == "mul":
            result: Tensor = peer.fused_gate_sigmoid_mul(s[1], s[0][0], s[2])
            return result
        peer.fused_gate_sigmoid_mul_add(s[1], s[0][0], s[2], s[4])
        return s[4]

    def limit(s: Set) -> Tensor:
        return torch.add(s[1], s[2]) if chain == "mul" else torch.addcmul(s[3], s[1], s[2])

    return {"op": op, "peer": rival, "limit": limit}


def run_cell(setting: Setting, cell: PeerCell, lock: DeviceLock) -> list[Row]:
    """A result row for each arm and number of rows."""
    torch.manual_seed(setting.seed + zlib.crc32(repr(cell).encode()))
    with torch.no_grad():
        calls = calls_of(cell.chain)
        for call in calls.values():  # compile, while others measure
            call(make_set(cell, 2, setting.device))
        rows = []
        for N in cell.rows:
            rows += measure(cell, N, calls, setting, lock)
            release_memory(setting.device)
        return rows


def make_set(cell: PeerCell, N: int, device: str) -> Set:
    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    weight = nn.Parameter(make(1, cell.H) / cell.H**0.5)
    routed = make(N, cell.H)
    return weight, make(N, cell.H), make(N, cell.H), routed, routed.clone()


def measure(
    cell: PeerCell,
    N: int,
    calls: dict[str, Callable[[Set], Tensor]],
    setting: Setting,
    lock: DeviceLock,
) -> list[Row]:
    """Check and time all arms at ``N`` rows."""
    device = setting.device
    inputs = 2 + (cell.chain == "add")
    row_bytes = 2 * N * cell.H
    planned = plan(inputs * row_bytes, (inputs + 1) * row_bytes, 1, device)
    pool = torch.cuda.graph_pool_handle() if device == "cuda" else None
    with lock:
        sets = [make_set(cell, N, device) for _ in range(planned.sets)]
        for s in sets:  # a weight is loaded early only after a first launch has waited for it
            calls["op"](s)
        weight, x, v, routed, _ = sets[0]
        reference = torch.sigmoid(x.double() @ weight.double().T) * v.double()
        reference += routed.double() if cell.chain == "add" else 0
        for arm in ("op", "peer"):
            error = (calls[arm](sets[0]).double() - reference).norm() / reference.norm()
            if not error < 4e-3:  # bfloat16 rounds to 2.0e-3 of a value, in the root mean square
                raise AssertionError(f"{arm} is wrong: {cell}, N={N}: {error:.2e}")
        replays = {
            arm: Replay(
                lambda i, call=call: (call(sets[i % len(sets)]),),  # type: ignore[misc]
                planned.calls,
                device,
                pool,
            )
            for arm, call in calls.items()
        }
        timings = interleaved(replays, setting.rounds, device)
    key = {"chain": cell.chain, "H": cell.H, "N": N}
    return [
        {**key, "arm": arm, "sglang": version(), **columns(timing)}
        for arm, timing in timings.items()
    ]


def failed_rows(cell: PeerCell, error: str) -> list[Row]:
    """The rows of a cell whose process died."""
    return [{"chain": cell.chain, "H": cell.H, "N": N, "error": error} for N in cell.rows]


def run(
    widths: Sequence[int],
    rows: Sequence[int],
    setting: Setting,
    out: Path,
    processes: int,
    time_budget: float,
) -> tuple[Path, int]:
    """Measure all; see :func:`benchmarks.sweep.sweep`. Raises BenchError without sglang."""
    load()
    cells = [PeerCell(chain, H, tuple(rows)) for H in widths for chain in ("mul", "add")]
    work = functools.partial(run_cell, setting)
    return sweep("peer", setting.device, cells, work, failed_rows, out, processes, time_budget)
