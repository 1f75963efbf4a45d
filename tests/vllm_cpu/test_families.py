"""Engines of the other models, in a file that shares no engine with test_engines.py."""

from __future__ import annotations

import pytest
import torch

from tests.vllm_cpu.conftest import ALONE, NO_CACHES, Reference, Run
from tests.vllm_cpu.one_model import OneModel, assert_near, line, of_prompts

MORE_GATES = {"qwen3_moe": 2, "qwen3_5_moe": 4}


class TestQwen3Next(OneModel):
    model, gates = "qwen3_next", 4


@pytest.mark.parametrize("model", list(MORE_GATES))
def test_more_families(run: Run, reference: Reference, model: str) -> None:
    """Qwen3.5-MoE, and the copy of the shared expert in Qwen3-MoE, of which Qwen3-Omni's thinker is
    made; with the error of eager bfloat16 as the measure, in an engine whose gates are left to
    vLLM, with a line that says why."""
    fused = run(model, "fused", NO_CACHES)
    assert fused.ops == MORE_GATES[model]
    assert fused.lines == [line(MORE_GATES[model])]
    eager = dict(enforce_eager=True, compilation_config={})
    unfused = run(model, "eager", **eager)
    gates = MORE_GATES[model]
    assert unfused.lines == [
        f"gatefuse: {gates} shared-expert gates left to vLLM: compilation mode NONE"
    ]
    if model == "qwen3_moe":  # transformers has no such model with a shared expert
        expected = run(model, "float32", ALONE, dtype="float32", **eager).logprobs
    else:
        expected = torch.cat(of_prompts(reference, model, fused))
    assert_near(fused.logprobs - expected, unfused.logprobs - expected)
