"""One vLLM engine in a process of its own, which times and profiles workloads on request.

Imports vLLM only in the process that runs the engine.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

WARM_STEPS, PROFILED_STEPS = 4, 16


@dataclass(frozen=True)
class Workload:
    """``sequences`` requests at once, of ``tokens_in`` prompt and ``tokens_out`` new tokens."""

    name: str
    sequences: int
    tokens_in: int
    tokens_out: int

    @property
    def is_decode(self) -> bool:
        return self.tokens_out > self.tokens_in


_engine: Engine  # of this process


def begin(environment: dict[str, str], log: Path) -> None:
    """Prepare this process; its output goes to ``log``. A spawned process takes over its parent's
    ``sys.path``, whatever PYTHONPATH says."""
    os.environ.update(environment)
    sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def start(provider: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Start this process's engine; what it tells about itself."""
    global _engine
    _engine = Engine(provider, arguments)
    return _engine.start


def ask(method: str, workload: Workload) -> Any:
    """The result of a method of this process's engine."""
    return getattr(_engine, method)(workload)


class Engine:
    """An offline vLLM engine whose core runs in this process."""

    def __init__(self, provider: str, arguments: dict[str, Any]) -> None:
        begin = time.perf_counter()
        import torch
        import vllm

        gates = hand_kernel() if provider == "hand-kernel" else []
        self.llm = vllm.LLM(**arguments)
        self.vocabulary = self.llm.llm_engine.model_config.get_vocab_size()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        config = self.llm.llm_engine.vllm_config
        self.start = {
            "seconds": round(time.perf_counter() - begin, 1),
            "vllm": vllm.__version__,
            "mode": config.compilation_config.mode.name,
            "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
            "hand_gates": len(gates),
        }

    def _requests(self, workload: Workload, tokens_out: int) -> tuple[list[Any], Any]:
        from vllm import SamplingParams

        ids = random.Random(0)
        prompts = [
            {"prompt_token_ids": ids.choices(range(3, self.vocabulary), k=workload.tokens_in)}
            for _ in range(workload.sequences)
        ]
        params = SamplingParams(
            temperature=0, max_tokens=tokens_out, ignore_eos=True, detokenize=False
        )
        return prompts, params

    def warm_up(self, workload: Workload) -> float:
        """As :meth:`time`, with few new tokens where there are many."""
        return self.time(replace(workload, tokens_out=min(workload.tokens_out, 128)))

    def time(self, workload: Workload) -> float:
        """Seconds from the first request until all are done."""
        prompts, params = self._requests(workload, workload.tokens_out)
        begin = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        tokens = sum(len(o.outputs[0].token_ids) for o in outputs)
        if tokens != workload.sequences * workload.tokens_out:
            raise RuntimeError(f"{workload.name}: {tokens} new tokens")
        return seconds

    def profile(self, workload: Workload) -> dict[str, Any]:
        """What the device does in a step: of a decode workload steps in which each sequence gets a
        token, of another one the steps that take in the prompts, 16 of them at most.

        kernel_us: sum over kernels; busy_us: time in which any kernel runs (kernels of two streams
        overlap); span_us: from the first kernel to the last; all per step.
        """
        import torch
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        activity = getattr(ProfilerActivity, self.device.upper())
        synchronise = getattr(torch, self.device).synchronize
        warm = WARM_STEPS if workload.is_decode else 0
        # Prompts are taken in over several steps; the last tokens only close the requests.
        new = warm + PROFILED_STEPS + 4 if workload.is_decode else 1
        prompts, params = self._requests(workload, new)
        engine = self.llm.llm_engine
        for i, prompt in enumerate(prompts if workload.is_decode else prompts[:PROFILED_STEPS]):
            engine.add_request(f"profile-{i}", prompt, params)
        executor, steps = engine.model_executor, 0
        plain = executor.execute_model

        def execute_model(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            steps += bool(scheduled.total_num_scheduled_tokens)
            return plain(scheduled, *args, **kwargs)

        executor.execute_model = execute_model
        try:
            while steps < warm:
                engine.step()
            synchronise()
            begun = steps
            with profile(activities=[activity]) as run:
                while engine.has_unfinished_requests() and (
                    not workload.is_decode or steps < begun + PROFILED_STEPS
                ):
                    engine.step()
                synchronise()
            profiled = steps - begun
            while engine.has_unfinished_requests():
                engine.step()
        finally:
            del executor.execute_model
        kind = getattr(DeviceType, self.device.upper())
        events = [
            (e.name(), e.start_ns(), e.duration_ns())
            for e in run.profiler.kineto_results.events()
            if e.device_type() == kind and not e.is_user_annotation()
        ]
        return summary(events, profiled)


def summary(events: list[tuple[str, int, int]], steps: int) -> dict[str, Any]:
    """Of ``(name, start, duration)`` in ns, over ``steps`` steps. Copies are no kernels."""
    kernels = [event for event in events if not event[0].startswith(("Memcpy", "Memset"))]
    kernels.sort(key=lambda event: event[1])
    busy = end = 0
    count, total = Counter[str](), Counter[str]()
    for name, start, duration in kernels:
        busy += max(0, start + duration - max(start, end))
        end = max(end, start + duration)
        count[name] += 1
        total[name] += duration
    per_step = 1e-3 / max(steps, 1)
    span = end - kernels[0][1] if kernels else 0
    return {
        "steps": steps,
        "kernels": round(len(kernels) / max(steps, 1), 2),
        "copies": round((len(events) - len(kernels)) / max(steps, 1), 2),
        "kernel_us": round(total.total() * per_step, 2),
        "busy_us": round(busy * per_step, 2),
        "span_us": round(span * per_step, 2),
        "by_name": [
            {"name": name[:200], "per_step": round(count[name] / max(steps, 1), 3)}
            | {"us_per_step": round(duration * per_step, 3)}
            for name, duration in total.most_common()
        ],
    }


def hand_kernel() -> list[Any]:
    """Make vLLM's shared expert end with one kernel for its gate, inside the opaque MoE op, as
    vLLM's PR #43190 does. Returns the gates of the experts that are made from now on."""
    from vllm.model_executor.models.qwen2_moe import Qwen2MoeMLP

    from gatefuse import linear_sigmoid_mul

    init, forward = Qwen2MoeMLP.__init__, Qwen2MoeMLP.forward
    gates: list[Any] = []

    def without_gate(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        # Beside the module's own names: the block holds the gate and loads its weight.
        gate, self.expert_gate = self.expert_gate, None
        self.__dict__["hand_gate"] = gate
        gates.extend([gate] if gate is not None else [])

    def gated(self: Any, x: Any) -> Any:
        out = forward(self, x)
        gate = self.__dict__["hand_gate"]
        return out if gate is None else linear_sigmoid_mul(x, gate.weight, out)

    Qwen2MoeMLP.__init__, Qwen2MoeMLP.forward = without_gate, gated
    return gates
