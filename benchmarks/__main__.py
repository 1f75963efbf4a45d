"""The arguments of `gatefuse bench`. Imports torch only when it measures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import grid

DTYPES = ("bfloat16", "float16", "float32")


def add_to(commands: Any) -> None:
    """Add `bench` to the subcommands of the `gatefuse` command."""
    bench = commands.add_parser(
        "bench",
        help="measure gatefuse on this machine, or check the committed results",
        description="Without a question: gatefuse against Inductor on this machine, in a minute "
        "or two. Results go to JSON files, with plots beside them if matplotlib is installed.",
    )
    bench.add_argument(
        "--check",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="name every cell of the files (default: the committed results) that misses its mark; "
        "exit with 1 if there is one",
    )
    bench.add_argument(
        "--partial", action="store_true", help="with --check: what was not measured is no miss"
    )
    bench.add_argument("--report", nargs="+", type=Path, metavar="FILE", help="print all tables")
    bench.add_argument(
        "--update",
        action="store_true",
        help="write the tables and plots of README.md and docs/ from the committed results",
    )
    _measuring(bench, budget=120)
    bench.set_defaults(run=_run, measure=_short)
    questions = bench.add_subparsers(metavar="question")

    core = _question(questions, "core", "GPU time of the gate alone and in a layer's glue", _core)
    names = ",".join(grid.GRIDS)
    core.add_argument("--grid", type=_chosen(grid.GRIDS), default=("main",), help=names)
    _grid(core)

    cpu = _question(questions, "cpu", "the same on the CPU, against Inductor's C++", _cpu, 1200)
    _grid(cpu)

    blocks = _question(questions, "blocks", "modules of transformers: kernels, GPU time", _blocks)
    blocks.add_argument("--models", type=_chosen(grid.BLOCK_MODELS), default=grid.BLOCK_MODELS)
    blocks.add_argument("--parts", type=_chosen(grid.BLOCK_PARTS), default=grid.BLOCK_PARTS)
    blocks.add_argument("--rows", type=_numbers)
    blocks.add_argument("--modes", type=_chosen(grid.BLOCK_MODES), default=grid.BLOCK_MODES)

    host = _question(questions, "host", "host time per call, import and compile time", _host)
    host.add_argument("--chains", type=_chosen(grid.MAIN), default=grid.MAIN)
    host.add_argument("--width", type=int, default=2048)
    host.add_argument("--rows", type=int, default=2)
    host.add_argument("--modes", type=_chosen(grid.MODES), default=("default",))

    widths = tuple(sorted({*grid.WIDTHS, *grid.GRIDS["widths"].widths}))
    rule = _question(questions, "launch-rule", "the kernel's launch rule, on CUDA", _launch_rule)
    rule.add_argument("--widths", type=_numbers, default=widths)
    rule.add_argument("--rows", type=_numbers, default=(1, 16, 256, 1024, 8192))
    rule.add_argument("--dtypes", type=_chosen(DTYPES), default=("bfloat16", "float32"))

    peer = _question(
        questions, "peer", "the op beside SGLang's kernel, on CUDA with sglang installed", _peer
    )
    peer.add_argument("--widths", type=_numbers, default=widths)
    peer.add_argument("--rows", type=_numbers, default=(1, 4, 16, 64, 256, 1024))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _chosen(allowed: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    def choose(text: str) -> tuple[str, ...]:
        parts = tuple(text.split(","))
        if unknown := set(parts) - set(allowed):
            raise argparse.ArgumentTypeError(f"{sorted(unknown)} not among {list(allowed)}")
        return parts

    return choose


def _measuring(parser: argparse.ArgumentParser, budget: int) -> None:
    parser.add_argument("--out", type=Path, default=Path("gatefuse-bench"), metavar="DIR")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), help="default: the GPU if there is one"
    )
    parser.add_argument("--time-budget", type=float, default=budget, metavar="SECONDS")
    parser.add_argument("--processes", type=int, help="that compile; one at a time measures")
    parser.add_argument("--quick", action="store_true", help="smallest sizes: does it run?")


def _question(
    questions: Any, name: str, text: str, measure: Callable[..., Any], budget: int = 540
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = questions.add_parser(name, help=text, description=text)
    _measuring(parser, budget)
    parser.set_defaults(measure=measure)
    return parser


def _grid(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chains", type=_chosen(grid.FAMILIES))
    parser.add_argument("--widths", type=_numbers)
    parser.add_argument("--rows", type=_numbers)
    parser.add_argument("--modes", type=_chosen(grid.MODES))
    parser.add_argument("--dtypes", type=_chosen(DTYPES))


def _run(args: argparse.Namespace) -> int:
    from benchmarks.store import BenchError

    try:
        if args.check is not None:
            return _check(args)
        if args.report is not None:
            return _report(args)
        if args.update:
            return _update()
        return _measure(args)
    except BenchError as error:
        print(f"gatefuse: {error}", file=sys.stderr)
        return 2


def _check(args: argparse.Namespace) -> int:
    from benchmarks import store as results
    from benchmarks import thresholds as marks

    found = results.load(args.check) if args.check else results.committed()
    misses = marks.check(found, args.partial)
    for miss in misses:
        print(f"MISS {miss}" + (f"\n     {miss.reason}" if miss.reason else ""))
    print(f"{len(misses)} marks are missed." if misses else "All marks are reached.")
    return 1 if misses else 0


def _report(args: argparse.Namespace) -> int:
    from benchmarks import store as results
    from benchmarks import tables as report

    print("\n\n".join(report.Tables(results.load(args.report)).all()))
    return 0


def _update() -> int:
    from benchmarks import plots
    from benchmarks import publish as documents
    from benchmarks import store as results

    root = results.checkout()
    documents.update(root)
    plots.draw_all(results.committed(), root / "docs" / "images")
    return 0


def _measure(args: argparse.Namespace) -> int:
    import torch

    from benchmarks import store as results
    from benchmarks import sweep
    from benchmarks import tables as report

    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif args.device == "cuda" and not torch.cuda.is_available():
        raise results.BenchError("PyTorch finds no CUDA device here")
    if args.processes is None:
        args.processes = sweep.default_processes() if args.device == "cuda" else 1
    path, code = args.measure(args)
    found = results.load([path])
    print(report.short(found))
    try:
        from benchmarks import plots
    except ImportError:
        print("no plots: matplotlib is not installed; pip install 'gatefuse[bench]'")
    else:
        plots.draw_all(found, args.out)
    print(f"{path}: all results; `gatefuse bench --report {path}` prints every table")
    return int(code)


def _setting(args: argparse.Namespace) -> Any:
    from benchmarks.sweep import Setting

    # The CPU has other things to do as well: more samples.
    rounds = 3 if args.quick else 25 if args.device == "cuda" else 50
    return Setting(args.device, rounds, small=args.quick)


def _cells(args: argparse.Namespace, grids: Iterable[grid.Grid]) -> list[grid.Cell]:
    import dataclasses

    given = {
        "families": args.chains,
        "widths": args.widths,
        "rows": args.rows,
        "modes": args.modes,
        "dtypes": args.dtypes,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if args.quick:
        changes = {"widths": (128,), "rows": (2, 64), **changes}
    return [cell for g in grids for cell in dataclasses.replace(g, **changes).cells()]


def _short(args: argparse.Namespace) -> tuple[Path, int]:
    from benchmarks import run_workloads as core

    cells = grid.SHORT["gpu" if args.device == "cuda" else "cpu"].cells()
    return core.run(cells, _setting(args), args.out, args.processes, args.time_budget)


def _core(args: argparse.Namespace) -> tuple[Path, int]:
    from benchmarks import run_workloads as core

    cells = _cells(args, [grid.GRIDS[name] for name in args.grid])
    return core.run(cells, _setting(args), args.out, args.processes, args.time_budget)


def _cpu(args: argparse.Namespace) -> tuple[Path, int]:
    from benchmarks import run_workloads as core

    args.device = "cpu"
    cells = _cells(args, [grid.CPU_GRID])
    return core.run(cells, _setting(args), args.out, args.processes, args.time_budget)


def _blocks(args: argparse.Namespace) -> tuple[Path, int]:
    from benchmarks import run_modules as blocks

    rows = args.rows or ((4, 300) if args.quick else grid.BLOCK_ROWS)
    cells = grid.block_cells(args.models, args.parts, rows, args.modes)
    return blocks.run(cells, _setting(args), args.out, args.processes, args.time_budget)


def _host(args: argparse.Namespace) -> tuple[Path, int]:
    from benchmarks import run_host as host

    repeats = host.Repeats(3, 1, 1) if args.quick else host.Repeats()
    return host.run(
        args.chains,
        args.width,
        args.rows,
        args.modes,
        args.device,
        args.out,
        repeats,
        args.time_budget,
    )


def _launch_rule(args: argparse.Namespace) -> tuple[Path, int]:
    from benchmarks import run_launch_config as launch_rule

    _needs_cuda(args, "launch-rule")
    return launch_rule.run(
        args.widths,
        args.rows,
        args.dtypes,
        _setting(args),
        args.out,
        args.processes,
        args.time_budget,
    )


def _peer(args: argparse.Namespace) -> tuple[Path, int]:
    from benchmarks import run_sglang as peer

    _needs_cuda(args, "peer")
    return peer.run(
        args.widths, args.rows, _setting(args), args.out, args.processes, args.time_budget
    )


def _needs_cuda(args: argparse.Namespace, question: str) -> None:
    import os

    from benchmarks.store import BenchError

    if args.device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise BenchError(f"{question} measures the Triton kernel, on a GPU only")
