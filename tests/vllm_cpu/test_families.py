"""Engines of the other models, in a file that shares no engine with test_engines.py."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from tests.vllm_cpu.conftest import ALONE, NO_CACHES, Engine, Reference, Run
from tests.vllm_cpu.cuda_path import REPLICATED
from tests.vllm_cpu.one_model import OneModel, assert_near, line, of_prompts, unfused_engine

MORE_GATES = {"qwen3_moe": 2, "qwen3_5_moe": 4}


class TestQwen3Next(OneModel):
    """With multi-token prediction: the draft's gate is fused as well."""

    model, gates = "qwen3_next", 5
    arguments: ClassVar[dict[str, Any]] = {
        "speculative_config": {"method": "qwen3_next_mtp", "num_speculative_tokens": 1},
    }

    def fused(self, run: Run) -> Engine:
        return run(self.model, "fused", NO_CACHES, **self.arguments)

    def test_drafts(self, run: Run) -> None:
        """The draft's logits after the prompts differ from the unfused ones no more than twice as
        much as the model's own log-probabilities do."""

        def difference(mine: torch.Tensor, theirs: torch.Tensor) -> float:
            middle = theirs.mean(-1, keepdim=True)
            return float((mine - theirs).norm() / (theirs - middle).norm())

        fused, unfused = self.fused(run), self.unfused(run)
        (mine, *_), (theirs, *_) = fused.result["drafts"], unfused.result["drafts"]
        assert len(mine) == len(fused.result["prompts"])
        assert difference(mine, theirs) <= 2 * difference(fused.logprobs, unfused.logprobs)


def test_replicated_shared_experts(run: Run, reference: Reference) -> None:
    """vLLM keeps them out of its MoE op and so traces the gate itself."""
    model = "qwen3_next"
    fused = run(model, "replicated", NO_CACHES | {REPLICATED: "1"})
    assert not any("moe_forward_shared" in code for code in fused.result["traced"])
    assert fused.ops == 4
    assert fused.lines == [line(4)]
    expected = torch.cat(of_prompts(reference, model, fused))
    unfused = unfused_engine(run, model, **TestQwen3Next.arguments)
    assert_near(fused.logprobs - expected, unfused.logprobs - expected)


@pytest.mark.parametrize("model", list(MORE_GATES))
def test_more_families(run: Run, reference: Reference, model: str) -> None:
    """Qwen3.5-MoE, and the copy of the shared expert in Qwen3-MoE, of which Qwen3-Omni's thinker is
    made; with the error of eager bfloat16 as the measure, in an engine whose gates are left to
    vLLM, with a line that says why."""
    fused = run(model, "fused", NO_CACHES)
    assert fused.ops == MORE_GATES[model]
    assert fused.lines == [line(MORE_GATES[model])]
    eager = dict(enforce_eager=True, compilation_config={})
    unfused = run(model, "eager", NO_CACHES, **eager)
    gates = MORE_GATES[model]
    assert unfused.lines == [
        f"gatefuse: {gates} shared-expert gates left to vLLM: compilation mode NONE"
    ]
    if model == "qwen3_moe":  # transformers has no such model with a shared expert
        expected = run(model, "float32", NO_CACHES | ALONE, dtype="float32", **eager).logprobs
    else:
        expected = torch.cat(of_prompts(reference, model, fused))
    assert_near(fused.logprobs - expected, unfused.logprobs - expected)
