"""The command `gatefuse scan`: a target, a report, an exit code."""

from __future__ import annotations

import argparse
import contextlib
import json
import runpy
import sys
import traceback
from pathlib import Path

from gatefuse import compat
from gatefuse.report import FusionError, Report
from gatefuse.scan_targets import Builder, TargetError, from_config_file, from_name, values_of
from gatefuse.scanning import ScanError, scan

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Exit code: 0; 1 if fewer gates fuse than expected; 2 if nothing could be scanned."""
    try:
        if args.tokens < 1 or args.expect < 0:
            raise TargetError("--tokens must be 1 or more, --expect 0 or more")
        if (reason := compat.unsupported_reason()) is not None:
            raise TargetError(f"nothing is fused: {reason}")
        script = args.words[0] if args.words and args.config is None else ""
        if script.endswith(".py"):
            report = _run_script(Path(script), args.words[1:], args)
        else:
            report = _scan(args, _builder(args))
        if args.html is not None:
            report.save_page(args.html)
    except (TargetError, ScanError, TypeError, ValueError, OSError) as e:
        message = str(e).removeprefix("gatefuse: ")
        print(f"gatefuse: {message}", file=sys.stderr)
        return 2
    print(json.dumps(report.to_dict(), indent=2) if args.json else report)
    fused = report.fused if report.model is None else len(report.model.fused)
    if fused < args.expect:
        print(f"gatefuse: expected at least {args.expect} gates to fuse", file=sys.stderr)
        return 1
    return 0


def _builder(args: argparse.Namespace) -> Builder:
    if args.config is not None:
        return from_config_file(args.config, values_of(args.words), args.tokens)
    if not args.words:
        raise TargetError("name what to scan: package.module:function, a script or --config FILE")
    return from_name(args.words[0], values_of(args.words[1:]), args.tokens)


def _scan(args: argparse.Namespace, builder: Builder) -> Report:
    return scan(builder, device=args.device, training=args.training, dynamic=args.dynamic)


def _run_script(path: Path, words: list[str], args: argparse.Namespace) -> Report:
    """Run a script as ``python script.py`` does, with gatefuse turned on for what it compiles. Its
    own output goes to stderr."""
    from gatefuse.backend import fusing

    if args.device or args.training or args.dynamic:
        raise TargetError("--device, --training and --dynamic are not for scripts: the script says")
    if not path.is_file():
        raise TargetError(f"there is no file {path}")
    argv, search = sys.argv, sys.path[:]
    sys.argv, sys.path[0:1] = [str(path), *words], [str(path.parent)]
    report = None
    try:
        with contextlib.redirect_stdout(sys.stderr), fusing() as report:
            runpy.run_path(str(path), run_name="__main__")
    except SystemExit as e:
        if e.code not in (None, 0):
            raise TargetError(f"{path} ended with {e.code!r}") from None
    except FusionError as e:
        raise TargetError(str(e)) from None
    except Exception as e:
        frame = traceback.extract_tb(e.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        raise TargetError(f"{path} failed at {where}: {type(e).__name__}: {e}") from None
    finally:
        sys.argv, sys.path[:] = argv, search
    assert report is not None
    return report
