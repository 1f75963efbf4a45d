"""What does the fused gate gain in vLLM? Tokens per second, and the device's work in a step.

    python -m gatefuse.bench.vllm --out DIR [--model qwen2_moe|qwen3_next] [--layers N]
        [--arms vllm,plugin,...] [--workloads decode-16,...] [--rounds 8] [--together 2]
        [--starts 1] [--gpus 1] [--time-budget 560] [--tiny]
    python -m gatefuse.bench.vllm --table FILE...

Offline engines with dummy weights of the model's shapes in bfloat16: no network, no checkpoint, no
tokenizer. Each arm is an engine in a process of its own. ``--together`` engines are up at the same
time and take turns, so that what drifts hits them alike; each runs while the others wait. The
speed of an engine also differs from start to start: with ``--starts`` they are all started so many
times, and profiled the first time. With ``--gpus 2`` two engines that are up together have a GPU
each, so that more layers fit, and work at the same time; they change places at each start. Arms:

- ``vllm``: vLLM as it is (GATEFUSE_DISABLE=1).
- ``plugin``: gatefuse's plugin.
- ``plugin-no-overlap``, ``vllm-no-overlap``: the same two without vLLM's second stream for the
  shared expert.
- ``hand-kernel``: the gate as one kernel inside vLLM's opaque MoE op, as vLLM's PR #43190.

The result file has a row for each arm, workload and start: seconds of each round, tokens per
second, and what a profiled step holds, by kernel; and for each arm the lines that gatefuse logged.
It is written after each group of engines. DIR also gets the engines' logs.

gatefuse need not be installed: where its entry points are not found, the engines' processes get
them from pyproject.toml. So on a machine without a network, where vLLM can be imported, from the
root of a checkout, each within ten minutes:

    python -m gatefuse.bench.vllm --out OUT --model qwen2_moe
    python -m gatefuse.bench.vllm --out OUT --model qwen3_next
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gatefuse.bench import results, vllm_tables
from gatefuse.bench.vllm_engine import Workload, serve

OFF, NO_OVERLAP = {"GATEFUSE_DISABLE": "1"}, {"VLLM_DISABLE_SHARED_EXPERTS_STREAM": "1"}
ARMS: dict[str, dict[str, str]] = {
    "vllm": OFF,
    "plugin": {},
    "plugin-no-overlap": NO_OVERLAP,
    "hand-kernel": OFF,
    "vllm-no-overlap": OFF | NO_OVERLAP,
}
DEFAULT_ARMS = ("vllm", "plugin", "plugin-no-overlap", "hand-kernel")

COMMON: dict[str, Any] = dict(
    torch_dtype="bfloat16",
    vocab_size=151936,
    hidden_size=2048,
    num_attention_heads=16,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    hidden_act="silu",
    rms_norm_eps=1e-6,
    max_position_embeddings=8192,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
)
MODELS: dict[str, dict[str, Any]] = {
    # Qwen/Qwen1.5-MoE-A2.7B: 29 GB
    "qwen2_moe": COMMON
    | dict(
        architectures=["Qwen2MoeForCausalLM"],
        model_type="qwen2_moe",
        num_hidden_layers=24,
        num_key_value_heads=16,
        intermediate_size=5632,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        num_experts=60,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        rope_theta=1e6,
    ),
    # Qwen/Qwen3-Next-80B-A3B: 12 of its 48 layers have 39 GB
    "qwen3_next": COMMON
    | dict(
        architectures=["Qwen3NextForCausalLM"],
        model_type="qwen3_next",
        num_hidden_layers=12,
        num_key_value_heads=2,
        head_dim=256,
        intermediate_size=5120,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
        num_experts=512,
        num_experts_per_tok=10,
        norm_topk_prob=True,
        full_attention_interval=4,
        partial_rotary_factor=0.25,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        rope_theta=1e7,
    ),
}
TINY: dict[str, Any] = dict(
    num_hidden_layers=4,
    vocab_size=512,
    hidden_size=128,
    head_dim=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=256,
    moe_intermediate_size=64,
    shared_expert_intermediate_size=128,
    num_experts=4,
    num_experts_per_tok=2,
    linear_key_head_dim=64,
    linear_value_head_dim=64,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
)
KV_GIB = {"qwen2_moe": 20, "qwen3_next": 10}

WORKLOADS = (
    Workload("decode-16", 16, 32, 128),
    Workload("decode-32", 32, 32, 128),
    Workload("decode-64", 64, 32, 128),
    Workload("balanced", 32, 1024, 256),
    Workload("prefill", 16, 4096, 16),
)
TINY_WORKLOADS = (Workload("decode-2", 2, 4, 24), Workload("prefill", 2, 48, 2))

MIN_ROUNDS = 5
PROFILE_S = 30.0  # kept free for the profiles of a group
GRACE_S = 20.0  # how long after the deadline an engine is waited for

FAILED = object()  # in place of an answer


def engine_arguments(model: str, folder: Path, tiny: bool) -> dict[str, Any]:
    """Arguments of vLLM's LLM, the same for all arms."""
    arguments: dict[str, Any] = dict(
        model=str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        seed=0,
        enable_prefix_caching=False,
        disable_log_stats=True,
        # Explicit, for engines that are started together would count each other's memory.
        gpu_memory_utilization=0.3,
        kv_cache_memory_bytes=(KV_GIB[model] << 30) if not tiny else 1 << 28,
        max_num_seqs=max(w.sequences for w in WORKLOADS),
        max_num_batched_tokens=8192,
        max_model_len=4352,
        compilation_config={"mode": 3, "cudagraph_capture_sizes": [1, 16, 32, 64]},
    )
    if tiny:
        arguments |= dict(max_num_seqs=4, max_num_batched_tokens=256, max_model_len=128)
        arguments["compilation_config"] = {"mode": 3}
    elif model == "qwen3_next":
        arguments["additional_config"] = {"gdn_prefill_backend": "triton"}
    return arguments


class EngineError(Exception):
    """An engine failed, died, or did not answer in time."""


class Remote:
    """An engine in another process."""

    def __init__(
        self,
        arm: str,
        arguments: dict[str, Any],
        environment: dict[str, str],
        log: Path,
        deadline: float,
    ) -> None:
        self.arm, self.log, self.deadline = arm, log, deadline
        context = multiprocessing.get_context("spawn")
        self._connection: Connection
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(arm, arguments, log, theirs))
        before = dict(os.environ)
        os.environ.update(environment)  # what a spawned process starts with
        try:
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()

    def answer(self) -> Any:
        if not self._connection.poll(max(0.0, self.deadline + GRACE_S - time.monotonic())):
            raise EngineError(f"{self.arm}: no answer before the deadline")
        try:
            result, error = self._connection.recv()
        except (EOFError, ConnectionError):
            raise EngineError(f"{self.arm}: the process died; see its log") from None
        if error is not None:
            raise EngineError(f"{self.arm}: {error}")
        return result

    def lines(self) -> list[str]:
        """gatefuse's lines in the engine's log, without prefixes."""
        return re.findall(r"gatefuse: .*", self.log.read_text())

    def ask(self, method: str, workload: Workload) -> None:
        """What is asked is told by :meth:`answer`."""
        try:
            self._connection.send((method, workload))
        except ConnectionError:
            raise EngineError(f"{self.arm}: the process died; see its log") from None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._process.join(10)
        self._process.kill()
        self._process.join()


def environment_of(arm: str, site: Path) -> dict[str, str]:
    """Variables of the arm's process; ``site`` comes first in its path."""
    path = [str(site), str(results.ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the profiler is in this process
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # greedy: the sampler is not what is measured
        "VLLM_DISABLE_COMPILE_CACHE": "1",
        "GATEFUSE_DISABLE": "0",
        **ARMS[arm],
    }


def write_entry_points(site: Path) -> None:
    """gatefuse's entry points, where no installed distribution has them."""
    group = "vllm.general_plugins"
    if any(p.name == "gatefuse" for p in importlib.metadata.entry_points(group=group)):
        return
    project = tomllib.loads((results.ROOT / "pyproject.toml").read_text())["project"]
    info = site / "gatefuse-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gatefuse\nVersion: 0\n")
    sections = [
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in points.items())
        for group, points in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(sections))


class Group:
    """Engines that are up at the same time and take turns, or with ``at_once`` work at the same
    time; one that fails is left out from then on.

    Their results go to ``content``.
    """

    def __init__(
        self, engines: Sequence[Remote], content: dict[str, Any], *, at_once: bool = False
    ) -> None:
        self.engines = list(engines)
        self.content = content
        self.at_once = at_once
        self.rows: dict[tuple[str, Workload], dict[str, Any]] = {}

    def wait(self, workloads: Sequence[Workload], start_number: int) -> None:
        """Until all have started; ``start_number`` counts the starts of each."""
        for engine in list(self.engines):
            if (start := self._try(engine, engine.answer)) is FAILED:
                continue
            self.content["engines"][engine.arm] = start | {"lines": engine.lines()}
            print(f"{engine.arm}: {json.dumps(self.content['engines'][engine.arm])}", flush=True)
            for workload in workloads:
                row = {"arm": engine.arm, **asdict(workload), "start": start_number, "seconds": []}
                self.rows[engine.arm, workload] = row
                self.content["rows"].append(row)

    def measure(self, rounds: int, share: float, deadline: float) -> None:
        """``MIN_ROUNDS`` rounds if the deadline allows it, ``rounds`` if the share lasts."""
        longest = 0.0
        for done in range(rounds + 1):  # the first warms up
            begin = time.monotonic()
            limit = deadline if done <= MIN_ROUNDS else share
            if begin + longest > limit - PROFILE_S:
                break
            first = done % max(1, len(self.engines))
            for (arm, workload), seconds in self._ask("time", first):
                if done:
                    self.rows[arm, workload]["seconds"].append(round(seconds, 5))
            longest = max(longest, time.monotonic() - begin) if done else 0.0
            print(f"round {done} ({time.monotonic() - begin:.0f} s)", flush=True)
        for row in self.rows.values():
            row |= rates(row)

    def profile(self) -> None:
        for key, profile in self._ask("profile"):
            self.rows[key]["profile"] = profile

    def _ask(self, method: str, first: int = 0) -> Iterator[tuple[tuple[str, Workload], Any]]:
        """Ask every engine about each workload, beginning with another one each time."""
        for workload in dict.fromkeys(workload for _, workload in self.rows):
            engines = self.engines[first:] + self.engines[:first]
            for turn in [engines] if self.at_once else [[engine] for engine in engines]:
                asked = [
                    engine
                    for engine in turn
                    if self._try(engine, functools.partial(engine.ask, method, workload))
                    is not FAILED
                ]
                for engine in asked:
                    if (answer := self._try(engine, engine.answer)) is not FAILED:
                        yield (engine.arm, workload), answer

    def _try(self, engine: Remote, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except EngineError as error:
            self.content["errors"].append(str(error))
            print(error, file=sys.stderr, flush=True)
            self.engines.remove(engine)
            engine.close()
            return FAILED

    def close(self) -> None:
        for engine in self.engines:
            engine.close()


def rates(row: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second, new and all, at the median time; spread: (p90 - p10) / median."""
    seconds = sorted(row["seconds"])
    if not seconds:
        return {"repeats": 0}
    median = statistics.median(seconds)
    deciles = statistics.quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else [0.0]
    new, all_ = row["tokens_out"], row["tokens_in"] + row["tokens_out"]
    return {
        "repeats": len(seconds),
        "new_tokens_per_s": round(row["sequences"] * new / median, 1),
        "tokens_per_s": round(row["sequences"] * all_ / median, 1),
        "spread": round((deciles[-1] - deciles[0]) / median, 4),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure or render; returns the exit code."""
    parser = argparse.ArgumentParser(description="tokens per second of vLLM with gatefuse")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--model", choices=MODELS, default="qwen2_moe")
    parser.add_argument("--layers", type=int, help="another number of layers")
    parser.add_argument("--arms", default=",".join(DEFAULT_ARMS))
    parser.add_argument("--workloads", help="default: all")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--starts", type=int, default=1, help="starts of each engine")
    parser.add_argument("--gpus", type=int, default=1, help="that engines are spread over")
    parser.add_argument("--together", type=int, default=2, help="engines that are up at a time")
    parser.add_argument("--time-budget", type=float, default=560, help="seconds in all")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short workloads")
    arguments = parser.parse_args(argv)
    if arguments.table:
        for path in arguments.table:
            print(vllm_tables.everything(json.loads(path.read_text())), end="\n\n")
        return 0
    arms = arguments.arms.split(",")
    if arguments.out is None or not set(arms) <= set(ARMS):
        parser.error(f"--out is needed, and arms among {', '.join(ARMS)}")
    workloads: tuple[Workload, ...] = TINY_WORKLOADS if arguments.tiny else WORKLOADS
    if arguments.workloads is not None:
        chosen = arguments.workloads.split(",")
        if not set(chosen) <= {w.name for w in workloads}:
            parser.error(f"workloads are {', '.join(w.name for w in workloads)}")
        workloads = tuple(w for w in workloads if w.name in chosen)

    import torch

    begin = time.monotonic()
    config = MODELS[arguments.model] | (TINY if arguments.tiny else {})
    config = config | ({"num_hidden_layers": arguments.layers} if arguments.layers else {})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    content: dict[str, Any] = {
        "kind": "vllm",
        "header": results.header(device, sys.argv[1:] if argv is None else argv),
        "model": arguments.model + (", tiny" if arguments.tiny else ""),
        "layers": config["num_hidden_layers"],
        "config": config,
        "engines": {},
        "errors": [],
        "rows": [],
    }
    out = results.new_path(arguments.out, f"vllm-{arguments.model}")
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        (place / "model").mkdir()
        (place / "model" / "config.json").write_text(json.dumps(config))
        (place / "site").mkdir()
        write_entry_points(place / "site")

        def start(arm: str, number: int, place_in_group: int) -> Remote:
            environment = environment_of(arm, place / "site")
            if arguments.gpus > 1:
                environment["CUDA_VISIBLE_DEVICES"] = str(
                    (place_in_group + number) % arguments.gpus
                )
            return Remote(
                arm,
                engine_arguments(arguments.model, place / "model", arguments.tiny),
                environment,
                arguments.out / f"{out.stem}-{arm}{f'-{number}' if number else ''}.log",
                deadline,
            )

        deadline = begin + arguments.time_budget
        groups = [
            (number, arms[i : i + arguments.together])
            for number in range(arguments.starts)
            for i in range(0, len(arms), arguments.together)
        ]
        longest = 0.0
        for i, (number, names) in enumerate(groups):
            group_begin = time.monotonic()
            if number and group_begin + longest > deadline:
                break
            share = group_begin + (deadline - group_begin) / (len(groups) - i)
            engines = [start(arm, number, index) for index, arm in enumerate(names)]
            group = Group(engines, content, at_once=arguments.gpus > 1)
            try:
                group.wait(workloads, number)
                group.measure(arguments.rounds, share, deadline)
                results.write(out, content)
                if number == 0:
                    group.profile()
            finally:
                group.close()
                results.write(out, content)
            if number:  # the first time caches are cold, and profiles are taken
                longest = max(longest, time.monotonic() - group_begin)
    print(vllm_tables.everything(content))
    print(f"{out} ({time.monotonic() - begin:.0f} s)")
    return 1 if content["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
