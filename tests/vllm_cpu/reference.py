"""Log-probabilities of a tiny model in float32 by transformers, independent of vLLM.

Usage: python reference.py OUT.pt MODEL '[[token ids], ...]' (sequences: prompts with new tokens)
OUT.pt holds a list of tensors, [tokens - 1, vocabulary] each: row i is after token i.
"""

from __future__ import annotations

import json
import sys

import torch


def main(out: str, model: str, sequences: list[list[int]]) -> None:
    from transformers import AutoModelForCausalLM

    module, loading = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(loading.values()), loading
    with torch.no_grad():
        logits = [module.eval()(torch.tensor([ids])).logits[0, :-1] for ids in sequences]
    torch.save([torch.log_softmax(x.double(), -1) for x in logits], out)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
