"""The code blocks of docs/recipes.md by name, and the small model that they are run on."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.routes.gates import WIDTH, make_expert
from tests.support import markdown
from tests.support.programs import REPOSITORY

PAGE = REPOSITORY / "docs" / "recipes.md"
LAYERS, VOCABULARY = 2, 16


def recipes() -> dict[str, markdown.Block]:
    """The Python blocks of the page, by the name in the comment before each."""
    blocks = markdown.blocks(PAGE, "python")
    return {block.note.removeprefix("recipe: "): block for block in blocks}


def run(name: str, **given: Any) -> dict[str, Any]:
    """Run a block of the page as it stands, with these names defined; returns all names after it.

    Line numbers in tracebacks are those of the page.
    """
    block = recipes()[name]
    code = compile("\n" * (block.line - 1) + block.code, str(PAGE), "exec")
    exec(code, names := {"__name__": f"recipe_{name}", **given})
    return names


class Model(nn.Module):
    """A language model that is called and answers as those of transformers do: token embeddings,
    shared experts with their gates, a loss if there are labels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(make_expert(seed) for seed in range(LAYERS))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = F.linear(x, self.embedding.weight)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def tokens(batch: int = 2, length: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def loss_of(run: Any) -> Tensor:
    """The loss of one call, as a number that can go backward."""
    loss: Tensor = run(tokens(), labels=tokens())["loss"]
    return loss
