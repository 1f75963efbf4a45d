"""What a new user types, and what gatefuse answers.

``python -m tests.transcript > docs/transcript.md``. Each command runs in a process of its own, from
the root of a checkout with the extra ``test``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

import gatefuse

ROOT = Path(__file__).resolve().parents[1]

WITH = (
    "--config examples/configs/qwen3-next-80b-a3b.json",
    "--config examples/configs/qwen3-next-80b-a3b.json --device cuda",
    "--config examples/configs/qwen3.5-397b-a17b.json --device cuda",
    "transformers:Qwen2MoeConfig",
    "transformers:Qwen2MoeConfig --training",
    "transformers:Qwen3_5MoeTextConfig",
)
WITHOUT = tuple(
    f"transformers:{name}Config"
    for name in ("Llama", "Mixtral", "Qwen3Moe", "DeepseekV3", "Olmoe", "GptOss")
)

PRELUDE = """
import torch
from torch import nn

import gatefuse


class Block(nn.Module):
    def __init__(self, outputs=1):
        super().__init__()
        self.gate, self.up = nn.Linear(256, outputs), nn.Linear(256, 256)

    def forward(self, x):
        BODY


x = torch.randn(8, 256)
"""
GATE = "return torch.sigmoid(self.gate(x)) * self.up(x)"
BROKEN = {
    "Two logits per token": (
        "return torch.sigmoid(self.gate(x))[:, :1] * self.up(x)",
        "print(gatefuse.explain(Block(outputs=2), x))",
    ),
    "A graph break between the logit and the sigmoid": (
        "logit = self.gate(x)\n        print(end='')\n"
        "        return torch.sigmoid(logit) * self.up(x)",
        "print(gatefuse.explain(Block(), x))",
    ),
    "Another function in the sigmoid's place": (
        "return torch.relu(self.gate(x)) * self.up(x)",
        "print(gatefuse.explain(Block(), x))",
    ),
}
TINY = """
import torch
from transformers import CompileConfig, Qwen2MoeConfig, Qwen2MoeForCausalLM

import gatefuse

config = Qwen2MoeConfig(
    num_hidden_layers=2, hidden_size=64, intermediate_size=128, moe_intermediate_size=64,
    shared_expert_intermediate_size=64, num_experts=4, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=256, pad_token_id=0,
)
model = Qwen2MoeForCausalLM(config)
ids = torch.randint(1, 256, (4, 16))
"""
LOOPS = {
    "`generate` (on the CPU it compiles only if asked by this private switch)": """
CompileConfig._compile_all_devices = True
with gatefuse.record() as report:
    model.eval().generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=4,
        cache_implementation="static",
        compile_config=CompileConfig(backend="gatefuse"),
    )
print(report)
""",
    "transformers' Trainer": """
from transformers import Trainer, TrainingArguments

gatefuse.enable(expect=2)  # FusionError if a step's graphs have fewer
data = [{"input_ids": row, "labels": row} for row in ids]
arguments = TrainingArguments("out", max_steps=3, torch_compile=True, disable_tqdm=True)
with gatefuse.record() as report:
    result = Trainer(model, arguments, train_dataset=data).train()
print(result.global_step, "steps")
print(report)
""",
    "A loop of one's own": """
step = torch.compile(model, backend="gatefuse")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
with gatefuse.record() as report:
    losses = []
    for _ in range(5):
        loss = step(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
print("the loss falls:", losses[-1] < losses[0])
print(report)
""",
}
MISTAKES = {
    "The model is not compiled": """
with gatefuse.fusing() as report:
    Block()(x)
print(report)
""",
    "It was compiled before": """
model = torch.compile(Block(), backend="gatefuse")
model(x)
with gatefuse.record() as report:
    model(x)
print(report)
""",
    "Another backend": """
gatefuse.enable()
with gatefuse.record() as report:
    torch.compile(Block(), backend="aot_eager")(x)
print(report)
""",
    "Without gatefuse": """
with gatefuse.record() as report:
    torch.compile(Block())(x)
print(report)
""",
    "In another thread": """
import threading

model = torch.compile(Block(), backend="gatefuse")
with gatefuse.record() as report:
    thread = threading.Thread(target=model, args=(x,))
    thread.start()
    thread.join()
print(report)
""",
    "Switched off": """
with torch.compiler.set_stance("force_eager"), gatefuse.fusing() as report:
    torch.compile(Block())(x)
print(report)
""",
    "From a cache, in a second process": """
with gatefuse.record() as report:
    torch.compile(Block(), backend="gatefuse")(x)
print(report)
""",
}


def main() -> None:
    print(
        "# As a new user\n\n"
        "What one types, and what gatefuse answers, on two cores and no GPU. Made by\n"
        f"`python -m tests.transcript` with gatefuse {gatefuse.__version__}, torch "
        f"{torch.__version__.split('+')[0]} and transformers {transformers.__version__}.\n"
    )
    print("## Models with the gate\n")
    for arguments in WITH:
        command(f"scan {arguments}")
    print("## Models without it\n")
    for arguments in WITHOUT:
        command(f"scan {arguments}")
    print("## Broken ones\n")
    for title, (body, program) in BROKEN.items():
        script(title, PRELUDE.replace("BODY", body), program)
    print("## Generating and training\n")
    for title, program in LOOPS.items():
        script(title, TINY, program.strip(), ACCELERATE_USE_CPU="1")
    print("## Nothing was fused\n")
    with tempfile.TemporaryDirectory() as cache:
        for title, program in MISTAKES.items():
            source, runs = PRELUDE.replace("BODY", GATE), 1 + ("cache" in title)
            script(title, source, program.strip(), runs, TORCHINDUCTOR_CACHE_DIR=cache)


def command(arguments: str) -> None:
    text, seconds = output([sys.executable, "-m", "gatefuse", *arguments.split()])
    print(f"```text\n$ gatefuse {arguments}    # {seconds:.0f} s\n{text}\n```\n", flush=True)


def script(title: str, prelude: str, program: str, runs: int = 1, **environment: str) -> None:
    """Show the part of the program that matters and what its last run prints."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.py")
        path.write_text(prelude.lstrip() + "\n" + program + "\n")
        for _ in range(runs):
            text, _ = output([sys.executable, str(path)], folder, **environment)
    print(f"{title}:\n\n```text\n{program}\n\n{text}\n```\n", flush=True)


def output(
    arguments: list[str], folder: str | Path = ROOT, **environment: str
) -> tuple[str, float]:
    begin = time.monotonic()
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"} | environment
    done = subprocess.run(
        arguments, cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    text = (done.stdout + (done.stderr if done.returncode else "")).strip()
    return re.sub(r"(?m)(.{400}).+$", r"\1...", text), time.monotonic() - begin


if __name__ == "__main__":
    main()
