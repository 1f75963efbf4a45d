"""What each family of models has to show in engines, and what the tests of engines share."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tests.vllm_cpu.conftest import ALONE, NO_CACHES, Engine, Reference, Run


def line(fused: int, gates: int | None = None, placement: str = "inline") -> str:
    return (
        f"gatefuse: {fused} of {gates or fused} shared-expert gates fused (placement {placement})"
    )


def fused_engine(run: Run, model: str, **arguments: Any) -> Engine:
    return run(model, "fused", caches="shared", **arguments)


def unfused_engine(run: Run, model: str, **arguments: Any) -> Engine:
    """Without the plugin, with the pass."""
    config = {"mode": 3, "hook": "gatefuse"}
    return run(model, "pass alone", NO_CACHES | ALONE, compilation_config=config, **arguments)


def assert_near(error: torch.Tensor, allowed: torch.Tensor) -> None:
    """The formula of docs/design.md, in the mean and on the worst element."""
    assert error.isfinite().all()
    assert allowed.isfinite().all()
    for norm in (torch.linalg.vector_norm, lambda t: t.abs().max()):
        assert norm(error) <= 2 * norm(allowed)


def of_prompts(reference: Reference, model: str, engine: Engine) -> list[torch.Tensor]:
    """Log-probabilities of the prompts by the reference."""
    rows = reference(model, engine)
    return [r[: -len(tokens)] for r, tokens in zip(rows, engine.result["tokens"])]


class OneModel:
    """Tests of one model; ``gates``: how many it has; ``arguments``: more of its engines'."""

    model: str
    gates: int
    arguments: ClassVar[dict[str, Any]] = {}

    def fused(self, run: Run) -> Engine:
        return fused_engine(run, self.model, **self.arguments)

    def unfused(self, run: Run) -> Engine:
        return unfused_engine(run, self.model, **self.arguments)

    def test_each_layer_has_one_fused_op(self, run: Run) -> None:
        fused = self.fused(run)
        assert fused.result["mode"] == "VLLM_COMPILE"
        assert fused.ops == self.gates
        assert fused.result["matches"]["gatefuse"] == self.gates
        assert fused.lines == [line(self.gates)]

    def test_without_the_plugin_no_pass_sees_a_gate(self, run: Run) -> None:
        unfused = self.unfused(run)
        assert unfused.result["graphs"]
        assert unfused.ops == 0
        assert unfused.result["counter"] == 0

    def test_logprobs(self, run: Run, reference: Reference) -> None:
        """`|fused - ref| <= 2 * |unfused - ref|` against transformers in float32, with no slack for
        a rounding: over prompts, and over new tokens, each engine on the tokens it chose."""
        errors = []
        for engine in (self.fused(run), self.unfused(run)):
            differences: dict[str, list[torch.Tensor]] = {"prompt": [], "new": []}
            for i, expected in enumerate(reference(self.model, engine)):
                n = len(engine.result["prompt"][i])
                differences["prompt"].append(engine.result["prompt"][i] - expected[:n])
                differences["new"].append(engine.result["new"][i] - expected[n:])
            errors.append({part: torch.cat(rows) for part, rows in differences.items()})
        for part in ("prompt", "new"):
            assert_near(errors[0][part], errors[1][part])
