"""Real vLLM engines of one model, on the CPU, compiled as on CUDA: with the plugin, without it, and
warm."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.vllm_cpu import tiny
from tests.vllm_cpu.conftest import ALONE, NO_CACHES, Engine, Reference, Run
from tests.vllm_cpu.one_model import (
    OneModel,
    assert_near,
    fused_engine,
    line,
    of_prompts,
    unfused_engine,
)


class TestQwen2Moe(OneModel):
    model, gates = "qwen2_moe", 2


def plain_engine(run: Run, place: Path) -> Engine:
    """Without anything of gatefuse's, beside the caches of an engine with it."""
    fused_engine(run, "qwen2_moe")
    return run("qwen2_moe", "plain", ALONE, caches="shared", reload=other_weights(place))


def test_warm_cache(run: Run) -> None:
    """Loaded code is fused, counted, and gives the same numbers; the pass is not called."""
    cold = fused_engine(run, "qwen2_moe")
    warm = run("qwen2_moe", "warm", caches="shared")
    assert "Directly load AOT compilation" in warm.log
    assert not warm.result["graphs"]
    assert warm.lines == cold.lines
    assert torch.equal(warm.logprobs, cold.logprobs)


def test_expect_with_a_warm_cache(run: Run) -> None:
    """Demanding more than there is ends the start of the engine, also if nothing is compiled."""
    fused_engine(run, "qwen2_moe")
    failed = run("qwen2_moe", "expect", {"GATEFUSE_EXPECT": "3"}, caches="shared", fails=True)
    assert "Directly load AOT compilation" in failed.log
    assert "expected at least 3 fused gates in the engine, fused 2" in failed.log


def test_turned_off_is_untouched(run: Run, place: Path) -> None:
    """GATEFUSE_DISABLE=1 gives the graphs and the hash of a vLLM that never saw the plugin; neither
    takes fused code from a cache."""
    off = run("qwen2_moe", "off", {"GATEFUSE_DISABLE": "1"}, caches="off")
    plain = plain_engine(run, place)
    for what in ("traced", "graphs", "hash", "tokens"):
        assert off.result[what] == plain.result[what], what
    assert off.result["graphs"]
    assert off.ops == 0
    assert not off.lines
    assert torch.equal(off.logprobs, plain.logprobs)


def test_mode_2(run: Run, reference: Reference) -> None:
    """vLLM as it comes on the CPU, where it chooses mode 2 and packs the weights of its linears."""
    stock = run(
        "qwen2_moe", "stock", {"VLLM_PLUGINS": "gatefuse"} | NO_CACHES, compilation_config={}
    )
    assert stock.result["mode"] == "DYNAMO_TRACE_ONCE"
    assert stock.lines == [line(2)]
    assert stock.result["matches"]["gatefuse"] == 2
    expected = torch.cat(of_prompts(reference, "qwen2_moe", stock))
    unfused = unfused_engine(run, "qwen2_moe")
    assert_near(stock.logprobs - expected, unfused.logprobs - expected)


def other_weights(place: Path) -> list[str]:
    """Folders of the model with gates of other weights, and of the model itself."""
    other = place / "models" / "other gates"
    if not other.exists():
        tiny.build(other, "qwen2_moe", gates=-2.0)
    return [str(other), str(other.with_name("qwen2_moe"))]


def behind_engine(run: Run, place: Path) -> Engine:
    """With another pass, and rounded as vLLM's own code is."""
    return run(
        "qwen2_moe",
        "behind",
        {"GATEFUSE_EAGER_ROUNDING": "1"} | NO_CACHES,
        compilation_config={"mode": 3, "hook": "own"},
        reload=other_weights(place),
    )


def test_weights_are_loaded_anew(run: Run, place: Path) -> None:
    """The compiled code takes new weights of the gates. On the CPU vLLM itself computes something
    else after loading the same weights anew, so an engine without the plugin is the measure."""
    fused, plain = behind_engine(run, place), plain_engine(run, place)
    norm = torch.linalg.vector_norm
    changed, back = plain.result["reloaded"]
    gates = norm(changed - back)
    assert gates > 20 * norm(fused.logprobs - plain.logprobs), "they matter"
    for mine, theirs in zip(fused.result["reloaded"], plain.result["reloaded"], strict=True):
        assert norm(mine - theirs) <= 0.1 * gates


def test_behind_the_users_own_pass(run: Run, place: Path) -> None:
    """A pass on the hook stays, and runs first; options come from the environment."""
    behind = behind_engine(run, place)
    assert behind.lines == [line(2)]
    assert behind.ops == 2
    seen = behind.result["seen_by_own_pass"]
    assert len(seen) == len(behind.result["graphs"])
    assert not any("gatefuse" in graph for graph in seen)
    # Rounded as unfused code rounds: nearer to it than one rounding at the end is.
    plain, fused = plain_engine(run, place).logprobs, fused_engine(run, "qwen2_moe").logprobs
    norm = torch.linalg.vector_norm
    assert norm(behind.logprobs - plain) <= norm(fused - plain)


def test_transformers_backend(run: Run, reference: Reference) -> None:
    """Models of transformers, whose experts and gates vLLM moves into its MoE op."""
    fused = run("qwen2_moe", "transformers", NO_CACHES, model_impl="transformers")
    assert "TransformersMoEForCausalLM" in fused.log
    assert fused.ops == 2
    assert fused.lines == [line(2)]
    expected = torch.cat(of_prompts(reference, "qwen2_moe", fused))
    unfused = unfused_engine(run, "qwen2_moe")
    assert_near(fused.logprobs - expected, unfused.logprobs - expected)


def test_tensor_parallel(run: Run, place: Path, reference: Reference) -> None:
    """Two ranks, which are processes of their own. Fused or not, two ranks sum in another order
    than one: fused, they may differ by twice of what they differ by unfused, from one rank and from
    the reference."""
    two_ranks = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"} | NO_CACHES
    fused = run("qwen2_moe", "two ranks", two_ranks, tensor_parallel_size=2)
    unfused = run("qwen2_moe", "two ranks, plain", two_ranks | ALONE, tensor_parallel_size=2)
    assert fused.lines == [line(2)]
    assert not unfused.lines
    one_fused, one_unfused = fused_engine(run, "qwen2_moe"), plain_engine(run, place)
    assert_near(fused.logprobs - one_fused.logprobs, unfused.logprobs - one_unfused.logprobs)
    expected = torch.cat(of_prompts(reference, "qwen2_moe", unfused))
    assert_near(fused.logprobs - expected, unfused.logprobs - expected)
