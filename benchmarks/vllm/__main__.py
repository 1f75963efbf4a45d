"""What does the fused gate gain in vLLM? Tokens per second, and the device's work in a step.

    python -m benchmarks.vllm --out DIR [--model qwen3_next] [--providers vllm,...]

Offline engines with dummy weights of the model's shapes: no network, no checkpoint, no tokenizer.
Each provider is an engine in a process of its own. ``--together`` engines are up at the same time
and take turns, so drift hits them alike. An engine's speed also differs from start to start: with
``--starts`` all are started so many times, and profiled the first time. With ``--gpus 2`` two
engines that are up together have a GPU each, work at once, and change places at each start; with
``--tensor-parallel 2`` each engine is spread over two GPUs, one process for each rank.

- ``vllm``: vLLM as it is (GATEFUSE_DISABLE=1).
- ``plugin``: gatefuse's plugin.
- ``plugin-no-overlap``, ``vllm-no-overlap``: without vLLM's second stream for the shared expert.
- ``hand-kernel``: the gate as one kernel inside vLLM's opaque MoE op, as vLLM's PR #43190.

A ``plugin`` in which no gate was fused is refused, and so is another engine in which one was. The
result file has a row for each provider, workload and start: seconds of each round, tokens per
second, and what a profiled step holds, by kernel. DIR also gets the engines' logs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import socket
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

from benchmarks import model_zoo, store
from benchmarks.__main__ import chosen
from benchmarks.vllm import tables as vllm_tables
from benchmarks.vllm.engine import Workload
from benchmarks.vllm.group import Group, Remote

LAUNCHED = {"distributed_executor_backend": "external_launcher"}
OFF, NO_OVERLAP = {"GATEFUSE_DISABLE": "1"}, {"VLLM_DISABLE_SHARED_EXPERTS_STREAM": "1"}
PROVIDERS: dict[str, dict[str, str]] = {
    "vllm": OFF,
    "plugin": {},
    "plugin-no-overlap": NO_OVERLAP,
    "hand-kernel": OFF,
    "vllm-no-overlap": OFF | NO_OVERLAP,
}
DEFAULT = ("vllm", "plugin", "plugin-no-overlap", "hand-kernel")

KV_GIB = {"qwen2_moe": 20, "qwen2_moe_fp8": 20, "qwen3_next": 10, "qwen3_next_fp8": 12}

WORKLOADS = (
    *(Workload(f"decode-{n}", n, 32, 128) for n in (16, 32, 64)),
    Workload("balanced", 32, 1024, 256),
    Workload("prefill", 16, 4096, 16),
)
_LONG = {"balanced": (1024, 1024), "decode-heavy": (1024, 2048), "prefill-heavy": (8192, 128)}
LONG = tuple(Workload(f"{name}-{n}", n, *_LONG[name]) for name in _LONG for n in (16, 32, 64))
TINY_WORKLOADS = (Workload("decode-2", 2, 4, 24), Workload("prefill", 2, 48, 2))


def engine_arguments(model: str, folder: Path, tiny: bool, layers: int) -> dict[str, Any]:
    """Arguments of vLLM's LLM, the same for all providers. Fewer layers take less cache."""
    share = min(1.0, layers / model_zoo.engine_config(model)["num_hidden_layers"])
    arguments: dict[str, Any] = dict(
        **dict(model=str(folder), load_format="dummy", skip_tokenizer_init=True),
        **dict(dtype="bfloat16", seed=0, enable_prefix_caching=False, disable_log_stats=True),
        # Explicit, for engines that are started together would count each other's memory.
        gpu_memory_utilization=0.1,
        kv_cache_memory_bytes=1 << 28 if tiny else int(share * (KV_GIB[model] << 30)),
        max_num_seqs=max(w.sequences for w in WORKLOADS),
        max_num_batched_tokens=8192,
        max_model_len=min(8448, model_zoo.engine_config(model)["max_position_embeddings"]),
        compilation_config={"mode": 3, "cudagraph_capture_sizes": [1, 16, 32, 64]},
    )
    if tiny:
        arguments |= dict(max_num_seqs=4, max_num_batched_tokens=256, max_model_len=128)
        arguments["compilation_config"] = {"mode": 3}
    elif model.startswith("qwen3_next"):
        arguments["additional_config"] = {"gdn_prefill_backend": "triton"}
    return arguments


def ranks_of(size: int) -> list[dict[str, str]]:
    """Variables of each rank's process, as torchrun would set them; none for a single one."""
    if size == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [shared | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(size)]


def environment_of(provider: str, site: Path) -> dict[str, str]:
    """Variables of the provider's process and its children. site: has gatefuse's entry points."""
    path = [str(site), str(store.ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the profiler is in this process
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # greedy: the sampler is not what is measured
        "VLLM_DISABLE_COMPILE_CACHE": "1",
        "GATEFUSE_DISABLE": "0",
        **PROVIDERS[provider],
    }


def write_entry_point(site: Path) -> None:
    """Of the plugin, where no installed distribution has it: gatefuse need not be installed."""
    group = "vllm.general_plugins"
    if any(p.name == "gatefuse" for p in importlib.metadata.entry_points(group=group)):
        return
    project = tomllib.loads((store.ROOT / "pyproject.toml").read_text())["project"]
    info = site / "gatefuse-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gatefuse\nVersion: 0\n")
    plugin = project["entry-points"][group]["gatefuse"]
    (info / "entry_points.txt").write_text(f"[{group}]\ngatefuse = {plugin}\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="tokens per second of vLLM with gatefuse")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", choices=tuple(model_zoo.ENGINE_MODELS), default="qwen2_moe")
    parser.add_argument("--layers", type=int, help="another number of layers")
    parser.add_argument("--providers", type=chosen(PROVIDERS), default=DEFAULT)
    names = [w.name for w in (*WORKLOADS, *TINY_WORKLOADS, *LONG)]
    parser.add_argument("--workloads", type=chosen(names), default=names[: -len(LONG)])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--starts", type=int, default=1, help="starts of each engine")
    parser.add_argument("--gpus", type=int, default=1, help="that engines are spread over")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs of each engine")
    parser.add_argument("--together", type=int, default=2, help="engines that are up at a time")
    parser.add_argument("--time-budget", type=float, default=560, help="seconds in all")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short workloads")
    arguments = parser.parse_args(argv)
    all_ = TINY_WORKLOADS if arguments.tiny else (*WORKLOADS, *LONG)
    workloads = [w for w in all_ if w.name in arguments.workloads]
    config = model_zoo.engine_config(arguments.model, arguments.layers, arguments.tiny)
    fit = [w for w in all_ if w.tokens_in + w.tokens_out <= config["max_position_embeddings"]]
    if not workloads or not set(workloads) <= set(fit):
        parser.error(f"workloads of this model are {', '.join(w.name for w in fit)}")
    import torch

    begin = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    content: dict[str, Any] = {"kind": "vllm", "header": store.header(device, argv or sys.argv[1:])}
    content |= {"model": arguments.model + ", tiny" * arguments.tiny, "config": config}
    layers = config["num_hidden_layers"]
    content |= {"layers": layers, "engines": {}, "errors": [], "rows": []}
    content["tensor_parallel"] = arguments.tensor_parallel
    out = store.new_path(arguments.out, f"vllm-{arguments.model}")
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        (place / "model").mkdir()
        (place / "model" / "config.json").write_text(json.dumps(config))
        (place / "site").mkdir()
        write_entry_point(place / "site")

        def start(provider: str, number: int, index: int) -> Remote:
            environment = environment_of(provider, place / "site")
            if arguments.gpus > 1:
                environment["CUDA_VISIBLE_DEVICES"] = str((index + number) % arguments.gpus)
            log = arguments.out / f"{out.stem}-{provider}{f'-{number}' if number else ''}.log"
            options = engine_arguments(arguments.model, place / "model", arguments.tiny, layers)
            if (size := arguments.tensor_parallel) > 1:
                options |= dict(tensor_parallel_size=size, **LAUNCHED)
            return Remote(provider, options, environment, log, deadline, ranks_of(size))

        deadline = begin + arguments.time_budget
        groups = [
            (number, arguments.providers[i : i + arguments.together])
            for number in range(arguments.starts)
            for i in range(0, len(arguments.providers), arguments.together)
        ]
        longest = 0.0
        for i, (number, names) in enumerate(groups):
            group_begin = time.monotonic()
            if number and group_begin + longest > deadline:
                break
            share = group_begin + (deadline - group_begin) / (len(groups) - i)
            engines = [start(provider, number, index) for index, provider in enumerate(names)]
            group = Group(engines, content, at_once=arguments.gpus > 1)
            try:
                group.wait(workloads, number)
                group.measure(arguments.rounds, share, deadline)
                store.write(out, content)
                if number == 0:
                    group.profile()
            finally:
                group.close()
                store.write(out, content)
            if number:  # the first time caches are cold, and profiles are taken
                longest = max(longest, time.monotonic() - group_begin)
    print(vllm_tables.everything(content))
    print(f"{out} ({time.monotonic() - begin:.0f} s)")
    return 1 if content["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
