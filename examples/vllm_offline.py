"""vLLM, offline, with the shared-expert gates fused: gatefuse only has to be installed.

Run: python examples/vllm_offline.py Qwen/Qwen1.5-MoE-A2.7B-Chat --expect 24
The model is a name or a folder; prompts are given as text, or as token ids where the model has no
tokenizer (--ids). vLLM's log has the line "gatefuse: 24 of 24 shared-expert gates fused". With
--expect the engine does not start if fewer are fused. With GATEFUSE_DISABLE=1 vLLM runs as it is.
"""

import argparse
import os
import sys


def main() -> int:
    """Start an engine, continue two prompts; returns the exit code."""
    parser = argparse.ArgumentParser(description="vLLM offline with gatefuse")
    parser.add_argument("model", help="a model with a shared-expert gate")
    parser.add_argument("--expect", type=int, default=0, help="number of gates to be fused")
    parser.add_argument("--ids", action="store_true", help="token ids instead of text")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    arguments = parser.parse_args()
    try:
        from vllm import LLM, SamplingParams
    except ImportError:
        print("this example needs vLLM: pip install 'gatefuse[vllm]'", file=sys.stderr)
        return 2

    # Read when the model is built, in whichever of vLLM's processes that is.
    os.environ["GATEFUSE_EXPECT"] = str(arguments.expect)
    llm = LLM(
        model=arguments.model,
        skip_tokenizer_init=arguments.ids,
        tensor_parallel_size=arguments.tensor_parallel_size,
        max_model_len=arguments.max_model_len,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        compilation_config={"mode": 3},
    )
    if arguments.ids:
        prompts = [{"prompt_token_ids": ids} for ids in ([3, 5, 7, 11], [13, 17])]
    else:
        prompts = ["The shared expert of a mixture-of-experts layer", "A sigmoid gate"]
    params = SamplingParams(temperature=0, max_tokens=16, detokenize=not arguments.ids)
    for output in llm.generate(prompts, params):
        continuation = output.outputs[0]
        print(list(continuation.token_ids) if arguments.ids else continuation.text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
