"""vLLM, in its own environment: prompts and decode steps come over stdin, tokens a second go back. One line each.

Eager, without prefix cache, room for every prompt of a round in one step: what its decode does is measured, not how it
queues. The clock starts when every row has its first token.
"""

from __future__ import annotations

import json
import os
import sys
import time

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what vLLM prints is no answer
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}

import torch  # noqa: E402
import vllm  # noqa: E402
from vllm import EngineArgs, LLMEngine, SamplingParams, TokensPrompt  # noqa: E402

asked = json.loads(sys.argv[1])
now = {"wall": time.perf_counter, "processor": time.process_time}[asked["clock"]]
engine = LLMEngine.from_engine_args(
    EngineArgs(
        model=asked["model"],
        dtype=asked["dtype"],
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=32,
        max_num_batched_tokens=4096,
        enable_prefix_caching=False,
    )
)


def answer(content: dict[str, object]) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


answer({"version": vllm.__version__, "threads": torch.get_num_threads()})
asked_for = 0
for line in sys.stdin:
    prompts, tokens = json.loads(line)
    sampling = SamplingParams(temperature=0, max_tokens=tokens + 1, min_tokens=tokens + 1, ignore_eos=True)
    for ids in prompts:
        engine.add_request(str(asked_for), TokensPrompt(prompt_token_ids=ids), sampling)
        asked_for += 1
    written: dict[str, int] = {}
    began, before = 0.0, 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            written[output.request_id] = len(output.outputs[0].token_ids)
        if not began and len(written) == len(prompts):
            began, before = now(), sum(written.values())
    answer({"tokens_per_second": (sum(written.values()) - before) / (now() - began)})
