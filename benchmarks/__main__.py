"""The laboratory: suites measure; `check`, `report` and `publish` read what they wrote.

Exit codes: 0; 1 if a provider failed or a threshold is violated; 2 if the command cannot run, or
the time was over before all was measured.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks import grid
from benchmarks.grid import BenchError

DTYPES = ("bfloat16", "float16", "float32")
WIDTHS = tuple(sorted({*grid.WIDTHS, *grid.GRIDS["widths"].widths}))


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        return int(args.command(args))
    except (BenchError, ModuleNotFoundError) as error:
        hint = "" if isinstance(error, BenchError) else "; pip install -e '.[benchmarks,demo]'"
        print(f"benchmarks: {error}{hint}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    check = commands.add_parser("check", help="name every violated threshold")
    check.add_argument("files", nargs="*", type=Path, help="default: the committed results")
    check.add_argument("--partial", action="store_true", help="what was not measured is no error")
    check.set_defaults(command=_check)
    report = commands.add_parser("report", help="print all tables of result files")
    report.add_argument("files", nargs="+", type=Path)
    report.set_defaults(command=_report)
    publish = commands.add_parser("publish", help="write RESULTS.md, README's summary, the plots")
    publish.set_defaults(command=_publish)

    def suite(name: str, text: str) -> argparse.ArgumentParser:
        one: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
        one.add_argument("--out", type=Path, default=Path("benchmark-results"), metavar="DIR")
        one.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
        one.add_argument("--time-budget", type=float, default=540, metavar="SECONDS")
        one.add_argument("--processes", type=int, help="that compile; one at a time measures")
        one.add_argument("--quick", action="store_true", help="smallest sizes: does it run?")
        one.set_defaults(command=_measure, suite=name)
        return one

    modes, dtypes = chosen(grid.MODES), chosen(DTYPES)
    one = suite("workloads", "GPU or CPU time of the gate alone and in a layer's glue")
    one.add_argument("--grid", type=chosen(grid.GRIDS), help="of " + ",".join(grid.GRIDS))
    one.add_argument("--workloads", type=chosen((*grid.WORKLOADS, *grid.TRAINED, *grid.VARIANTS)))
    one.add_argument("--widths", type=_numbers)
    one.add_argument("--rows", type=_numbers)
    one.add_argument("--modes", type=modes)
    one.add_argument("--dtypes", type=dtypes)

    one = suite("modules", "modules of transformers: kernels, GPU time")
    one.add_argument("--models", type=chosen(grid.MODULE_MODELS), default=grid.MODULE_MODELS)
    one.add_argument("--parts", type=chosen(grid.MODULE_PARTS), default=grid.MODULE_PARTS)
    one.add_argument("--rows", type=_numbers)
    one.add_argument("--modes", type=chosen(grid.MODULE_MODES), default=grid.MODULE_MODES)

    one = suite("host", "host time per call, import and compile time")
    one.add_argument("--workloads", type=chosen(grid.WORKLOADS), default=grid.WORKLOADS)
    one.add_argument("--width", type=int, default=2048)
    one.add_argument("--rows", type=int, default=2)
    one.add_argument("--modes", type=modes, default=("default",))

    one = suite("launch-config", "the kernel's launch rule, on CUDA")
    one.add_argument("--widths", type=_numbers, default=WIDTHS)
    one.add_argument("--rows", type=_numbers, default=(1, 16, 256, 1024, 8192))
    one.add_argument("--dtypes", type=dtypes, default=("bfloat16", "float32"))

    one = suite("sglang", "the op beside SGLang's kernel, on CUDA")
    one.add_argument("--widths", type=_numbers, default=WIDTHS)
    one.add_argument("--rows", type=_numbers, default=(1, 4, 16, 64, 256, 1024))
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def chosen(allowed: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """The type of an argument that lists some of ``allowed``, separated by commas."""

    def choose(text: str) -> tuple[str, ...]:
        parts = tuple(text.split(","))
        if unknown := set(parts) - set(allowed):
            raise argparse.ArgumentTypeError(f"{sorted(unknown)} not among {list(allowed)}")
        return parts

    return choose


def _check(args: argparse.Namespace) -> int:
    from benchmarks import store, thresholds

    found = store.load(args.files, timed=True) if args.files else store.committed()
    violations = thresholds.check(found, args.partial)
    for one in violations:
        print(f"VIOLATION {one}" + (f"\n          {one.reason}" if one.reason else ""))
    text = f"{len(violations)} thresholds are violated."
    print(text if violations else "All thresholds are reached.")
    return 1 if violations else 0


def _report(args: argparse.Namespace) -> int:
    from benchmarks import publish, store

    found = store.load(args.files, timed=True)
    if not (text := publish.report(found).strip()):
        raise BenchError(f"there are no tables of {', '.join(found.headers)}")
    print(text)
    return 0


def _publish(args: argparse.Namespace) -> int:
    from benchmarks import plots, publish, store

    for path, text in publish.published().items():
        path.write_text(text)
    plots.draw_all(store.committed(), store.ROOT / "docs" / "images")
    return 0


def _measure(args: argparse.Namespace) -> int:
    from benchmarks import publish, store
    from benchmarks.sweep import Run
    from gatefuse.bench.run import TOY, device_of, rounds_of

    device = device_of(args.device)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if args.suite in ("launch-config", "sglang") and device != "cuda" and not interpreted:
        raise BenchError("this suite measures the Triton kernel, on a GPU only")
    # All cores but two: what is timed still has one for itself.
    cores = max(1, min(14, (os.cpu_count() or 1) - 2)) if device == "cuda" else 1
    rounds, processes = rounds_of(device, args.quick), args.processes or cores
    run = Run(device, rounds, args.quick, args.out, processes, args.time_budget)
    module = importlib.import_module("benchmarks.run_" + args.suite.replace("-", "_"))
    path, code = module.run(args, run)
    print(TOY if args.quick else publish.report(store.load([path])))
    print(f"{path}: all results; `python -m benchmarks report {path}` prints the tables")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
