"""The `gatefuse` command: `gatefuse scan`, `demo`, `bench` and `env`.

Exit codes: 0 when all is well; 1 when a scan finds fewer gates than expected, the demo a gate that
was not fused or a result that differs, the benchmark a provider that fails, or `env` that this
PyTorch is not supported; 2 when the command cannot run, or the benchmark's time was over before all
was measured.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["main"]

_PACKAGES = ("gatefuse", "torch", "triton", "transformers", "depyf", "vllm")


def _version(package: str) -> str | None:
    if package == "gatefuse":
        from gatefuse import __version__

        return __version__
    if package in ("torch", "triton"):  # torch with its build; Triton's distribution has many names
        try:
            return str(importlib.import_module(package).__version__)
        except ImportError:
            return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _environment() -> dict[str, Any]:
    import torch

    from gatefuse import compat

    devices = []
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        module = torch.get_device_module(kind.type)
        for index in range(torch.accelerator.device_count()):
            name = getattr(module, "get_device_name", lambda i: "")(index)
            devices.append(f"{kind.type}:{index} {name}".strip())
    return {
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        "c++ compiler": next(filter(None, map(shutil.which, _compilers())), None),
        "devices": devices or ["cpu"],
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith("GATEFUSE_")},
        "unsupported": compat.unsupported_reason(),
    }


def _compilers() -> list[str]:
    return [name for name in (os.environ.get("CXX"), "g++", "clang++", "cl") if name]


def _env(args: argparse.Namespace) -> int:
    found = _environment()
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        for name, value in found.items():
            if name in ("unsupported", "variables"):
                continue
            text = ", ".join(value) if isinstance(value, list) else value
            print(f"{name:14}{text or 'not found'}")
        for name, value in found["variables"].items():
            print(f"{name}={value}")
        reason = found["unsupported"]
        print("This PyTorch is supported." if reason is None else f"Nothing is fused: {reason}.")
    return 0 if found["unsupported"] is None else 1


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
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        print("gatefuse: PyTorch finds no CUDA device here", file=sys.stderr)
        return 2
    if (reason := (environment := _environment())["unsupported"]) is not None:
        print(f"gatefuse: nothing is fused: {reason}", file=sys.stderr)
        return 2
    from gatefuse.bench import run

    path, code = run.run(device, args.out, args.time_budget, args.quick, environment)
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
    parser.add_argument("--version", action="version", version=f"gatefuse {_version('gatefuse')}")
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
    bench.add_argument("--out", type=Path, default=Path("gatefuse-bench"), metavar="DIR")
    bench.add_argument("--device", choices=("cuda", "cpu"), help="default: the GPU if there is one")
    bench.add_argument("--time-budget", type=float, default=120, metavar="SECONDS")
    bench.add_argument("--quick", action="store_true", help="smallest sizes: does it run?")
    bench.set_defaults(run=_bench)

    env = commands.add_parser("env", help="print versions and whether this PyTorch is supported")
    env.add_argument("--json", action="store_true", help="print as JSON")
    env.set_defaults(run=_env)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv`` (by default the process's arguments); returns the exit code."""
    args = _parser().parse_args(argv)
    run: Any = args.run
    return int(run(args))
