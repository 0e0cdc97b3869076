"""Is the plan true? Predicted growth of the process beside the measured one, each configuration in its own process.

    python benchmarks/memory.py            what results/memory.jsonl lacks for this commit, and the table
    python benchmarks/memory.py --table    prints it only

A child builds the model (random weights of a shape, or the embedded base), puts LoRA on it, notes its resident memory,
sets the kernel's high-water mark back, trains a full micro-batch twice and notes the mark. Freed blocks go back to the
system at once, as under --memory-limit. What is predicted is the ledger's fullest moment without the weights; it has no
fitted constant there.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from result_line import commit, keep, kept, result_line, versions


@dataclass(frozen=True)
class Case:
    model: str  # embedded, or family:hidden:layers:heads:kv_heads:head_dim:ffn:vocab
    dtype: str = "float32"
    length: int = 256  # longest row; rows are drawn between half of it and all of it
    max_tokens: int = 2048
    checkpoint_layers: int = 0
    head_chunk: int = 256
    r: int = 16


QWEN2 = "qwen2:896:12:14:2:64:4864:32000"  # half the layers of Qwen2.5-0.5B
QWEN2_SMALL = "qwen2:768:8:12:2:64:3072:50000"
QWEN3 = "qwen3:1024:14:16:8:128:3072:32000"  # half the layers of Qwen3-0.6B
QWEN3_SMALL = "qwen3:512:8:8:4:128:2048:151936"
LLAMA = "llama:1536:10:12:4:128:4096:32000"
LLAMA_BIG = "llama:2048:12:16:8:128:8192:64000"  # 0.95 billion
CASES = (
    Case("embedded", "bfloat16", 512, 2048),
    Case("embedded", "float32", 512, 2048),
    Case("embedded", "bfloat16", 256, 4096, r=64),
    Case("embedded", "float32", 256, 2048, checkpoint_layers=18),
    Case("embedded", "bfloat16", 512, 4096, checkpoint_layers=9),
    Case("embedded", "float32", 128, 1024, head_chunk=512),
    Case(QWEN2, "float32", 256, 1024),
    Case(QWEN2, "bfloat16", 512, 2048, r=64),
    Case(QWEN2, "float32", 512, 4096, checkpoint_layers=12),
    Case(QWEN2, "bfloat16", 256, 2048, checkpoint_layers=4),
    Case(QWEN2_SMALL, "float32", 128, 2048),
    Case(QWEN2_SMALL, "float32", 1024, 4096, checkpoint_layers=4),
    Case(QWEN3, "float32", 256, 1024),
    Case(QWEN3, "bfloat16", 256, 2048),
    Case(QWEN3, "bfloat16", 512, 4096, checkpoint_layers=10),
    Case(QWEN3_SMALL, "float32", 512, 2048, head_chunk=64),
    Case(QWEN3_SMALL, "float32", 256, 2048, head_chunk=512, r=64),
    Case(QWEN3_SMALL, "bfloat16", 1024, 4096),
    Case(LLAMA, "float32", 512, 1024),
    Case(LLAMA, "bfloat16", 512, 2048, r=64),
    Case(LLAMA, "float32", 256, 2048, checkpoint_layers=5, head_chunk=64),
    Case(LLAMA_BIG, "bfloat16", 256, 1024, r=64),
    Case(LLAMA_BIG, "bfloat16", 512, 2048, checkpoint_layers=12),
    Case(LLAMA_BIG, "bfloat16", 1024, 2048, checkpoint_layers=6),
)


# ---- one configuration, in a process of its own ----------------------------------------------------------------------


def measure(case: Case) -> dict[str, Any]:
    """{"predicted", "measured"} bytes of growth, {"ledger"} rows and {"phase"} of the fullest moment."""
    import numpy as np
    import torch

    from lora_cmqa.core import Batch, TokenizedExample
    from lora_cmqa.data.pack import pack
    from lora_cmqa.lora.decoder import checkpoint_activations, why_plain
    from lora_cmqa.lora.inject import inject_lora, lora_parameters
    from lora_cmqa.train.ledger import Setup, growth
    from lora_cmqa.train.memory import give_back_what_is_freed
    from lora_cmqa.train.optim import adamw
    from lora_cmqa.train.step import train_step

    give_back_what_is_freed()
    model, shape = _model(case)
    model = inject_lora(model, r=case.r)
    if case.checkpoint_layers:
        checkpoint_activations(model, case.checkpoint_layers)
    reason = why_plain(model)
    assert reason is None, reason
    draw = np.random.default_rng(0)
    rows = []
    for i, n in enumerate(draw.integers(case.length // 2, case.length + 1, 4 * case.max_tokens // case.length)):
        ids = draw.integers(0, shape.vocab, n).astype(np.int32)
        labels = ids.copy()
        labels[: n // 3] = -100
        rows.append(TokenizedExample(ids, labels, str(i), str(i)))
    full = pack(rows, max_tokens=case.max_tokens)[0]
    batch = Batch((full,), step=1, epoch=1.0, step_supervised_tokens=full.supervised_tokens)
    optimizer = adamw(lora_parameters(model))
    level = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    for _ in range(2):  # the second with the moments that the first has made
        train_step(model, batch, optimizer, learning_rate=1e-4, head_chunk=case.head_chunk)
    measured = _resident("VmHWM") - level
    setup = Setup(
        shape,
        dtype=case.dtype,
        r=case.r,
        max_tokens=full.tokens,
        longest_row=max(full.row_lengths),
        mean_row=sum(n * n for n in full.row_lengths) / full.tokens,
        supervised=full.supervised_tokens / full.tokens,
        checkpoint_layers=case.checkpoint_layers,
        head_chunk=case.head_chunk,
        on_gpu=False,
        gives_back=True,
    )
    predicted = growth(setup)
    return {
        "pack": {"tokens": full.tokens, "longest": max(full.row_lengths), "taught": full.supervised_tokens},
        "predicted": predicted.bytes,
        "measured": measured,
        "error": round(predicted.bytes / measured - 1, 4),
        "phase": predicted.name,
        "ledger": [asdict(row) for row in predicted.rows],
        "parameters": shape.parameters,
        "threads": torch.get_num_threads(),
    }


def _model(case: Case) -> tuple[Any, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    from lora_cmqa.models.load import DTYPES, load_model
    from lora_cmqa.models.sizes import Shape, shape_of

    if case.model == "embedded":
        return load_model("embedded", dtype=case.dtype)[0], shape_of("embedded")
    family, *numbers = case.model.split(":")
    hidden, layers, heads, kv, dim, ffn, vocab = map(int, numbers)
    config, kind = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[family]
    with torch.device("meta"):
        model = kind(
            config(
                vocab_size=vocab,
                hidden_size=hidden,
                intermediate_size=ffn,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=kv,
                head_dim=dim,
                tie_word_embeddings=True,
            )
        )
    model = model.to(DTYPES[case.dtype]).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.02, generator=generator) if weight.dim() == 2 else weight.fill_(1)
    rotary = model.get_decoder().rotary_emb  # its table is a buffer that `to_empty` left empty
    model.get_decoder().rotary_emb = type(rotary)(config=model.config)
    shape = Shape(case.model, family, vocab, hidden, layers, heads, kv, dim, ffn, True)
    return model.eval().requires_grad_(False), shape


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}")


# ---- all of them -----------------------------------------------------------------------------------------------------


def known() -> dict[str, dict[str, Any]]:
    """The newest line of each configuration."""
    return {json.dumps(line["settings"], sort_keys=True): line for line in kept("memory")}


def run() -> None:
    now, done = commit(), known()
    for number, case in enumerate(CASES):
        key = json.dumps(asdict(case), sort_keys=True)
        if key in done and done[key]["commit"] == now:
            continue
        child = subprocess.run(
            [sys.executable, __file__, "--child", str(number)], capture_output=True, text=True, timeout=1800
        )
        if child.returncode:
            print(f"{case}: {child.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        line = result_line(
            "memory",
            json.loads(child.stdout.splitlines()[-1]),
            device="cpu, " + platform.machine(),
            versions=versions("torch", "transformers", "peft"),
            data="random rows, two thirds taught",
            settings=asdict(case),
            seed=0,
        )
        keep(line, "memory")
        print(f"{number:2} {line['values']['error']:+.1%}  {case}", flush=True)


def table() -> None:
    done = known()
    print("| | model | dtype | length | tokens | recomputed | chunk | r | predicted GB | measured GB | error |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    errors: list[float] = []
    for number, case in enumerate(CASES):
        line = done.get(json.dumps(asdict(case), sort_keys=True))
        if line is None:
            continue
        v = line["values"]
        errors.append(v["error"])
        print(
            f"| {number} | {case.model} | {case.dtype} | {case.length} | {case.max_tokens} | {case.checkpoint_layers} "
            f"| {case.head_chunk} | {case.r} | {v['predicted'] / 1e9:.2f} | {v['measured'] / 1e9:.2f} "
            f"| {v['error']:+.1%} |"
        )
    if errors:
        within = sum(abs(e) <= 0.1 for e in errors)
        print(f"{within} of {len(errors)} within 10 %, largest error {max(map(abs, errors)):.1%}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", type=int)
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    if asked.child is not None:
        print(json.dumps(measure(CASES[asked.child])))
        return
    if not asked.table:
        run()
    table()


if __name__ == "__main__":
    main()
