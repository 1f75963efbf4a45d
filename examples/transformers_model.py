"""A Qwen2-MoE of transformers, unchanged, compiled with gatefuse and trained for one step.

Run: python examples/transformers_model.py (needs transformers: pip install 'gatefuse[demo]')
Exits non-zero if a gate was not fused or the loss or the gradients differ from eager's.
"""

import sys

import torch

import gatefuse

try:
    from transformers import AutoModelForCausalLM, Qwen2MoeConfig
except ImportError:
    sys.exit("this example needs transformers: pip install 'gatefuse[demo]'")


def main() -> int:
    """Compile a forward pass and a training step; returns the exit code."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=4,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device)
    gates = sum(name.endswith("shared_expert_gate") for name, _ in model.named_modules())
    ids = torch.randint(0, config.vocab_size, (2, 16), device=device)

    # `expect` makes the compilation fail if a graph has fewer fused gates than that.
    compiled = torch.compile(model, options=gatefuse.options(expect=gates))
    with gatefuse.record() as report:
        with torch.no_grad():
            logits = compiled(input_ids=ids, use_cache=False).logits
        loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}

    model.zero_grad()
    with torch.no_grad():
        expected_logits = model(input_ids=ids, use_cache=False).logits
    expected_loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    expected_loss.backward()

    print(report)
    print(f"{gates} gates in the model, {report.fused} fused in {len(report.graphs)} graphs")
    torch.testing.assert_close(logits, expected_logits)
    torch.testing.assert_close(loss, expected_loss)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            gradients[name], parameter.grad, msg=lambda m, n=name: f"{n}: {m}"
        )
    print("logits, loss and gradients agree with eager")
    # One inference graph and one training forward, each with every gate.
    return 0 if report.fused == 2 * gates else 1


if __name__ == "__main__":
    sys.exit(main())
