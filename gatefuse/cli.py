"""The `gatefuse` command: `gatefuse scan`, `demo`, `bench` and `doctor`, or `env`.

Exit codes: 0 when all is well; 1 when a scan finds fewer gates than expected, the demo finds a gate
that was not fused or a result that differs, the benchmark finds a provider that fails, or the
doctor finds a problem; 2 when the command cannot run, or the benchmark's time was over before all
was measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gatefuse import __version__

__all__ = ["main"]


def _doctor(args: argparse.Namespace) -> int:
    from gatefuse import doctor

    found = doctor.diagnose()
    print(json.dumps(found.to_dict(), indent=2) if args.json else found)
    return 1 if found.problems else 0


def _demo(args: argparse.Namespace) -> int:
    import torch

    from gatefuse import demo

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        result = demo.run_demo(
            args.device,
            dtype=getattr(torch, args.dtype),
            models=args.model or demo.MODELS,
            measure=not args.no_timing,
            say=say,
        )
    except demo.DemoError as error:
        say(f"gatefuse: {error}")
        return 2
    print(json.dumps(result.to_dict(), indent=2) if args.json else result)
    return 0 if result.passed else 1


def _bench(args: argparse.Namespace) -> int:
    from gatefuse.bench.cases import BenchError
    from gatefuse.environment import environment

    try:
        if (reason := (header := environment())["unsupported"]) is not None:
            raise BenchError(f"nothing is fused: {reason}")
        # Not before: it imports internals of Inductor that another PyTorch may not have.
        from gatefuse.bench import run

        device = run.device_of(args.device)
        training = args.what == "training"
        path, code = run.run(device, args.out, args.time_budget, args.quick, header, training)
    except BenchError as error:
        print(f"gatefuse: {error}", file=sys.stderr)
        return 2
    print(f"{path} has all results")
    return code


_SCAN_EXAMPLES = """\
examples:
  gatefuse scan --config Qwen3-Next-80B-A3B-Instruct/config.json --device cuda
  gatefuse scan transformers:Qwen2MoeConfig hidden_size=256 num_hidden_layers=4
  gatefuse scan my_package.models:build --expect 24     # build() returns (model, args)
  gatefuse scan train.py -- --lr 0.1                    # runs it, with gatefuse turned on
"""


def _scan(args: argparse.Namespace) -> int:
    from gatefuse import scan_command

    return scan_command.run(args)


def _add_scan(commands: Any) -> None:
    scan = commands.add_parser(
        "scan",
        help="tell which gates of a model would be fused, without weights, compiler or GPU",
        description="Tell which gates of a model would be fused, and why the others would not. "
        "Fake tensors, no weights, no code generation: no compiler and no GPU are needed.",
        epilog=_SCAN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    scan.add_argument(
        "words",
        nargs="*",
        metavar="target [name=value ...]",
        help="package.module:name or file.py:name: a configuration or model class of transformers, "
        "or a function that returns (model, args) or (model, args, kwargs); name=value are its "
        "arguments. Or script.py, with its own arguments after --",
    )
    scan.add_argument("--config", type=Path, metavar="FILE", help="config.json of transformers")
    scan.add_argument(
        "--device", help="cpu or cuda, which need not be here (default: the GPU if there is one)"
    )
    scan.add_argument("--training", action="store_true", help="a training step")
    scan.add_argument("--dynamic", action="store_true", help="sizes of the inputs are symbolic")
    scan.add_argument(
        "--tokens", type=int, default=16, metavar="N", help="for models of transformers: 16"
    )
    scan.add_argument(
        "--expect", type=int, default=0, metavar="N", help="exit with 1 if fewer gates fuse"
    )
    scan.add_argument("--json", action="store_true", help="print the report as JSON")
    scan.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page")
    scan.set_defaults(run=_scan)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gatefuse",
        description="Fuse sigmoid(linear(x, w)) * value in models compiled by torch.compile.",
    )
    parser.add_argument("--version", action="version", version=f"gatefuse {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_scan(commands)

    demo = commands.add_parser(
        "demo", help="compile small transformers models with and without gatefuse and compare"
    )
    demo.add_argument("--device", help="cpu, cuda, cuda:1, xpu (default: the GPU if there is one)")
    demo.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="of the models",
    )
    demo.add_argument(
        "--model", action="append", choices=("qwen2_moe", "qwen3_next"), help="one model only"
    )
    demo.add_argument("--no-timing", action="store_true", help="do not measure on a GPU")
    demo.add_argument("--json", action="store_true", help="print the result as JSON")
    demo.set_defaults(run=_demo)

    bench = commands.add_parser(
        "bench",
        help="check and time gatefuse against Inductor on this machine, in two minutes",
    )
    bench.add_argument(
        "what",
        nargs="?",
        choices=("inference", "training"),
        default="inference",
        help="training: forward and backward",
    )
    bench.add_argument("--out", type=Path, default=Path("gatefuse-bench"), metavar="DIR")
    bench.add_argument("--device", choices=("cuda", "cpu"), help="default: the GPU if there is one")
    bench.add_argument("--time-budget", type=float, default=120, metavar="SECONDS")
    bench.add_argument("--quick", action="store_true", help="smallest sizes: does it run?")
    bench.set_defaults(run=_bench)

    _add_doctor(commands)
    return parser


def _add_doctor(commands: Any) -> None:
    text = "check versions, devices, compilers, caches, hooks, vLLM and variables"
    for name, help_text in (("doctor", text), ("env", "another name of doctor")):
        parser = commands.add_parser(name, help=help_text, description=f"{text.capitalize()}.")
        parser.add_argument("--json", action="store_true", help="print as JSON")
        parser.set_defaults(run=_doctor)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv`` (by default the process's arguments); returns the exit code."""
    args = _parser().parse_args(argv)
    run: Any = args.run
    return int(run(args))
