"""Twenty steps of an optimizer: the losses are those of eager, and the gates' gradients repeat."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gatefuse
from tests.support import models
from tests.support.gradients import rewritten, rewritten_gradients

STEPS = 20


class Training(nn.Module):
    def __init__(self, model: nn.Module, checkpointed: bool) -> None:
        super().__init__()
        self.model = model
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            x = checkpoint(self.model, x, use_reentrant=False)
        else:
            x = self.model(x)
        return x.float().square().mean()


def losses(
    model: nn.Module,
    start: dict[str, Tensor],
    batches: list[Tensor],
    run: Any,
    *,
    accumulated: int = 1,
    compiled_step: bool = False,
) -> list[float]:
    """Of STEPS batches from the weights ``start`` on; ``run`` calls the model. accumulated: batches
    for each step of the optimizer. compiled_step: the optimizer's step is compiled."""
    model.load_state_dict(start)
    model.zero_grad()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer_step = torch.compile(optimizer.step) if compiled_step else optimizer.step
    found = []
    for batch in range(STEPS):
        loss = run(batches[batch % len(batches)])
        loss.backward()
        if (batch + 1) % accumulated == 0:
            optimizer_step()
            optimizer.zero_grad()
        found.append(loss.item())
    return found


def shared_expert_gradients(model: nn.Module, batch: Tensor, run: Any) -> dict[str, Tensor]:
    """What the gates' gradients, and those of what they gate, are at the present weights."""
    model.zero_grad()
    run(batch).backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if "shared_expert" in name and parameter.grad is not None
    }


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_next"])
def test_losses_are_those_of_eager(name: str, checkpointed: bool) -> None:
    torch.manual_seed(0)
    model = Training(models.build(name, num_hidden_layers=1), checkpointed).train()
    batches = [models.embeddings(2, 6) for _ in range(2)]
    start = copy.deepcopy(model.state_dict())
    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=False)
    # transformers sets a context variable, which PyTorch 2.11 does not trace in a checkpoint.
    traced = torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)
    with traced, rewritten_gradients(), gatefuse.fusing() as report:
        fused = losses(model, start, batches, compiled)
        # Not the losses of two runs: of Qwen3-Next Inductor by itself does not repeat the last bits
        # of a norm's gradient in a checkpoint (2.13, CPU), and AdamW makes a step of any gradient.
        once, again = (shared_expert_gradients(model, batches[0], compiled) for _ in range(2))
    assert len(once) == 4
    assert all(torch.equal(gradient, again[name]) for name, gradient in once.items())
    forward = [g for g in report.graphs if g.phase == "forward"]
    assert [g.fused for g in forward] == [models.gates(model)] * len(forward)
    gradients = [r for g in report.graphs for r in g.gradients]
    assert len(gradients) == len(report.graphs) - len(forward) > 0
    assert all(r.rewritten and not r.reason for r in gradients)
    eager = losses(model, start, batches, model)
    assert eager[0] != eager[-1]
    torch.testing.assert_close(torch.tensor(fused), torch.tensor(eager), rtol=1e-5, atol=1e-5)


def test_accumulated_gradients_and_a_compiled_optimizer() -> None:
    """Gradients are added to those of the batch before, and the compiled step has no gate."""
    torch.manual_seed(0)
    model = Training(models.build("qwen2_moe", num_hidden_layers=1), checkpointed=False).train()
    batches = [models.embeddings(2, 6) for _ in range(2)]
    start = copy.deepcopy(model.state_dict())
    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=False)
    with rewritten_gradients(), gatefuse.fusing() as report:
        fused = losses(model, start, batches, compiled, accumulated=2, compiled_step=True)
    assert rewritten(report) == 1
    assert sum(g.fused for g in report.graphs) == 1
    eager = losses(model, start, batches, model, accumulated=2)
    assert eager[0] != eager[-1]
    torch.testing.assert_close(torch.tensor(fused), torch.tensor(eager), rtol=1e-5, atol=1e-5)
