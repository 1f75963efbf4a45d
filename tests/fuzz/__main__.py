"""``python -m tests.fuzz``: run cases, or replay one; exits 1 on a failure."""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path

# Before torch is imported: a warm cache skips the pass.
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = "0"
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import datetime
import gc
import json
import logging
import math
import platform
import warnings

import torch

import gatefuse
from tests.fuzz.engines import ENGINES
from tests.fuzz.generate import generate
from tests.fuzz.runner import LEAST_FUSED, Result, failure, run_case, run_cases
from tests.fuzz.shrinking import shrink


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="index of the first case")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    parser.add_argument("--engine", choices=ENGINES, default="fast")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--case", metavar="SEED:INDEX", help="replay one case")
    parser.add_argument("--stop", action="store_true", help="stop at the first failure")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this time")
    arguments = parser.parse_args()
    if arguments.minutes < math.inf and arguments.jobs > 1:
        parser.error("--minutes takes the cases in order: --jobs 1")
    quiet()
    if arguments.case:
        return replay(arguments.case, arguments.engine, arguments.device)
    print(f"seed {arguments.seed}, engine {arguments.engine}, device {arguments.device}")
    start = time.monotonic()
    failures: list[Result] = []
    counts: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    indices = range(arguments.first, arguments.first + arguments.cases)
    done = 0
    for result in run_cases(
        arguments.seed, indices, arguments.engine, arguments.device, arguments.jobs
    ):
        done += 1
        counts += result.counts
        if result.skipped:
            skipped[_reason(result.skipped)] += 1
        if result.problems:
            failures.append(result)
            print(failure(result, arguments.engine, arguments.device), flush=True)
            if arguments.stop:
                break
        seconds = time.monotonic() - start
        if done % 200 == 0:
            print(
                f"{done} cases, {len(failures)} failed, {done / seconds:.1f} a second", flush=True
            )
        if seconds > 60 * arguments.minutes:
            break
    seconds = time.monotonic() - start
    fused = counts["cases with a fused gate"]
    enough = fused >= LEAST_FUSED * done or done < 50
    for name, count in sorted(counts.items()):
        print(f"{count:8} {name}")
    for reason, count in skipped.most_common():
        print(f"{count:8} skipped, fails without gatefuse: {reason}")
    print(f"{done} cases in {seconds:.0f} s, {fused} with a fused gate, {len(failures)} failed")
    if not enough:
        print(f"fewer than {LEAST_FUSED:.0%} of the cases fuse a gate: the run proves nothing")
    if arguments.json:
        record = {
            "engine": arguments.engine,
            "device": arguments.device,
            "seed": arguments.seed,
            "first": arguments.first,
            "cases": done,
            "failures": [{"case": r.id, "problems": r.problems} for r in failures],
            "skipped": sum(skipped.values()),
            "counts": dict(sorted(counts.items())),
            "seconds": round(seconds, 1),
            "jobs": arguments.jobs,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "gatefuse": gatefuse.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": machine(arguments.device),
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(bool(failures) or not enough)


def quiet() -> None:
    """Cases that Dynamo refuses are skipped, without its pages about them."""
    gc.set_threshold(50_000)
    warnings.simplefilter("ignore")
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)


def _reason(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[1 if lines[0].endswith("raised:") and len(lines) > 1 else 0][:100]


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {os.cpu_count()} cores"


def replay(name: str, engine: str, device: str) -> int:
    seed, index = map(int, name.split(":"))
    case = generate(seed, index)
    print(case.text())
    result = run_case(case, engine, device)
    print(result.skipped and f"skipped, fails without gatefuse: {result.skipped}")
    for key, count in sorted(result.counts.items()):
        print(f"{count:8} {key}")
    if not result.problems:
        print("no difference")
        return 0
    print(failure(result, engine, device))
    small = shrink(case, engine, device)
    print(f"\nSmaller:\n\n{small.text()}")
    print("\n".join(run_case(small, engine, device).problems))
    return 1


if __name__ == "__main__":
    sys.exit(main())
