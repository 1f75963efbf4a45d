"""Runs one vLLM engine in this process and tells what it did.

Usage: python engine.py OUT.pt '{"model": folder, ...LLM arguments}'
   or: python engine.py, an engine for each line of the input; see serve

OUT.pt holds a dict: tokens and log-probabilities of all tokens of the vocabulary (at each position
of the prompts and for each new token), the graphs after vLLM's passes, vLLM's hash of the
configuration, vLLM's match table, and gatefuse's counter. "hook" in the compilation config puts a
pass on vLLM's hook: "gatefuse", or "own" for one that is none of gatefuse's. "reload": folders
whose weights the engine loads in turn, with the log-probabilities of the prompts after each.
"adapter": the folder of a LoRA adapter, with the log-probabilities of the prompts under it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

PROMPTS = [[(7 * i + 3 * p + 5) % 500 + 3 for i in range(n)] for p, n in enumerate((24, 9, 17))]
NEW_TOKENS = 6


def table(entry: dict[int, Any], size: int) -> torch.Tensor:
    row = torch.full((size,), float("nan"), dtype=torch.float64)
    for token, logprob in entry.items():
        row[token] = logprob.logprob
    return row


seen_by_own_pass: list[str] = []


def own_pass() -> Any:
    """A user's own pass, which changes nothing."""
    from vllm.compilation.passes.inductor_pass import InductorPass

    class OwnPass(InductorPass):
        def __call__(self, graph: Any) -> None:
            seen_by_own_pass.append(str(graph))

    return OwnPass()


def drafted(llm: Any) -> list[torch.Tensor]:
    """Gets the logits of each step of the engine's draft model."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    draft = (runner.drafter if hasattr(runner, "drafter") else runner.speculator).model
    compute, drafts = draft.compute_logits, []

    def compute_logits(*args: Any, **kwargs: Any) -> Any:
        drafts.append(compute(*args, **kwargs).double())
        return drafts[-1]

    draft.compute_logits = compute_logits
    return drafts


def vllm() -> tuple[Any, ...]:
    """What is imported of vLLM."""
    from vllm import LLM, SamplingParams
    from vllm.compilation.backends import VllmBackend
    from vllm.compilation.passes.pass_manager import PostGradPassManager
    from vllm.compilation.passes.vllm_inductor_pass import VllmPatternMatcherPass

    return LLM, SamplingParams, VllmBackend, PostGradPassManager, VllmPatternMatcherPass


def serve() -> None:
    """For each line of the input run an engine in a fork of this process, which has imported vLLM,
    and print its exit status. A line: the arguments of main, "variables" and the file "log". An
    engine that takes too long is killed."""
    vllm()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        if pid := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)
            continue
        answers.close()
        os.environ.update(request["variables"])
        with open(os.devnull) as nothing, open(request["log"], "w") as log:
            os.dup2(nothing.fileno(), 0)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        signal.alarm(400)
        main(request["out"], request["arguments"])
        return


def main(out: str, arguments: dict[str, Any]) -> None:
    LLM, SamplingParams, VllmBackend, PostGradPassManager, VllmPatternMatcherPass = vllm()
    vocabulary = json.loads(Path(arguments["model"], "config.json").read_text())["vocab_size"]
    graphs: list[str] = []
    traced: list[str] = []
    run_passes, run_backend = PostGradPassManager.__call__, VllmBackend.__call__

    def passes(self: Any, graph: Any) -> None:
        run_passes(self, graph)
        graphs.append(str(graph))

    def backend(self: Any, graph: Any, example_inputs: Any) -> Any:
        traced.append(graph.code)
        return run_backend(self, graph, example_inputs)

    PostGradPassManager.__call__, VllmBackend.__call__ = passes, backend
    arguments = (
        dict(
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=128,
            max_num_seqs=4,
            gpu_memory_utilization=0.3,  # of the machine's memory, which it may share
            max_logprobs=vocabulary,
            seed=0,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        | arguments
    )
    if isinstance(arguments.get("compilation_config"), dict):
        config = arguments["compilation_config"]
        if (which := config.pop("hook", None)) is not None:
            import gatefuse

            hook = {"gatefuse": gatefuse.vllm_pass, "own": own_pass()}[which]
            config["inductor_compile_config"] = {"post_grad_custom_post_pass": hook}
    folders, adapter = arguments.pop("reload", []), arguments.pop("adapter", None)
    llm = LLM(**arguments)
    drafts = drafted(llm) if "speculative_config" in arguments else []
    params = SamplingParams(
        temperature=0,
        max_tokens=NEW_TOKENS,
        ignore_eos=True,
        detokenize=False,
        logprobs=vocabulary,
        prompt_logprobs=vocabulary,
    )

    def generate(**request: Any) -> tuple[list[Any], list[torch.Tensor]]:
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        outputs = llm.generate(prompts, params, use_tqdm=False, **request)
        tables = [[table(e, vocabulary) for e in o.prompt_logprobs[1:]] for o in outputs]
        return outputs, [torch.stack(rows) for rows in tables]

    outputs, logprobs = generate()
    reloaded = []
    for folder in folders:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        reloaded.append(torch.cat(generate()[1]))
    adapted = None
    if adapter is not None:
        from vllm.lora.request import LoRARequest

        adapted = torch.cat(generate(lora_request=LoRARequest("adapter", 1, adapter))[1])
    from torch._dynamo.utils import counters

    result = {
        "prompts": PROMPTS,
        "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        "prompt": logprobs,
        "reloaded": reloaded,
        "adapted": adapted,
        "new": [
            torch.stack([table(e, vocabulary) for e in o.outputs[0].logprobs]) for o in outputs
        ],
        "graphs": graphs,
        "traced": traced,
        "seen_by_own_pass": seen_by_own_pass,
        "drafts": drafts,
        "hash": llm.llm_engine.vllm_config.compute_hash(),
        "matches": dict(VllmPatternMatcherPass.match_table),
        "counter": counters["inductor"]["gatefuse_fused"],
        "mode": llm.llm_engine.vllm_config.compilation_config.mode.name,
    }
    torch.save(result, out)


if __name__ == "__main__":
    if sys.argv[1:]:
        main(sys.argv[1], json.loads(sys.argv[2]))
    else:
        serve()
