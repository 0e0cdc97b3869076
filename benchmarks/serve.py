"""Tokens a second of the embedded engine: base only, many adapters in one batch, and what others do with the same.

    python benchmarks/serve.py                         one line in results/serve.jsonl: every ratio with its interval
    python benchmarks/serve.py --registry 10000        one line: so many adapters of the tiny model registered

Each ratio is that of neighbours in time: a round runs its two sides one after the other, in turn first, and the
interval is over the rounds' log ratios (Student's t). Decode only: the clock starts when every row has its first token.
transformers and PEFT run with the head's weight asking for a gradient: frozen, their generate expands the head once per
row and is several times slower, which would flatter us (`--as-shipped` leaves it so).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from result_line import keep, result_line, versions
from safetensors.numpy import load_file, save_file
from scipy import stats
from transformers import StoppingCriteria, StoppingCriteriaList

from lora_cmqa.engine.base import Event, Request
from lora_cmqa.engine.embedded import EmbeddedEngine
from lora_cmqa.engine.sampling import SamplingParams
from lora_cmqa.lora.adapter import save_adapter
from lora_cmqa.lora.inject import inject_lora, remove_lora
from lora_cmqa.lora.low_rank import LowRank, Pair
from lora_cmqa.models.load import load_model
from lora_cmqa.serve.server import open_service

PROMPT = 58  # tokens: the mean of 32 cMedQA2 questions
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS, RANK = 8, 16
Side = Callable[[int], float]  # rows -> tokens a second


def prompts(rows: int, vocabulary: int) -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [draw.integers(10, vocabulary - 10, PROMPT).tolist() for _ in range(rows)]


def random_adapter(model: Any, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return {
        path: Pair(
            torch.randn(RANK, m.in_features, generator=generator) / m.in_features**0.5,
            torch.randn(m.out_features, RANK, generator=generator) * 0.02,
        )
        for path, m in model.named_modules()
        if path.rsplit(".", 1)[-1] in TARGETS
    }


# ---- our engine ------------------------------------------------------------------------------------------------------


def ours(engine: EmbeddedEngine, names: Sequence[str | None], tokens: int) -> Side:
    """Row i asks names[i % len(names)]."""

    def run(rows: int) -> float:
        first: list[float] = []
        for i, ids in enumerate(prompts(rows, engine.model.config.vocab_size)):
            request = Request(tuple(ids), SamplingParams(max_new_tokens=tokens + 1), names[i % len(names)])
            engine.submit(request, lambda _: None)
        engine.step()  # every prompt, and every row's first token
        began = time.perf_counter()
        while engine.step():
            first.append(time.perf_counter())
        return rows * tokens / (first[-1] - began)

    return run


def first_token_under_load(engine: EmbeddedEngine, names: Sequence[str | None], asked: int) -> dict[str, float]:
    """Seconds to the first token of requests that come one by one while 24 rows are written."""
    ids, waits = prompts(24 + asked, engine.model.config.vocab_size), []
    for i in range(24):
        engine.submit(
            Request(tuple(ids[i]), SamplingParams(max_new_tokens=100_000 // PROMPT), names[i % 8]), lambda _: None
        )
    for _ in range(3):
        engine.step()
    for i in range(asked):
        seen: list[Event] = []
        began = time.perf_counter()
        late = engine.submit(Request(tuple(ids[24 + i]), SamplingParams(max_new_tokens=4), names[i % 8]), seen.append)
        while not seen:
            engine.step()
        waits.append(time.perf_counter() - began)
        while not late.finished:
            engine.step()
    for s in list(engine._running):
        engine.cancel(s)
    engine.step()
    return {"p50": statistics.median(waits), "p95": sorted(waits)[math.ceil(0.95 * asked) - 1], "n": asked}


# ---- transformers and PEFT -------------------------------------------------------------------------------------------


class _Clock(StoppingCriteria):
    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def theirs(model: Any, tokens: int, names: Sequence[str] | None = None) -> Side:
    def run(rows: int) -> float:
        ids, clock = torch.tensor(prompts(rows, model.config.vocab_size), device=model.device), _Clock()
        more = {"adapter_names": [names[i % len(names)] for i in range(rows)]} if names else {}
        with torch.inference_mode():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens + 1,
                min_new_tokens=tokens + 1,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([clock]),
                **more,
            )
        return rows * tokens / (clock.times[-1] - clock.times[0])

    return run


def switching(model: Any, tokens: int, names: Sequence[str]) -> Side:
    """One request after the other, set_adapter before each; the whole time counts."""

    def run(rows: int) -> float:
        ids = torch.tensor(prompts(rows, model.config.vocab_size), device=model.device)
        began = time.perf_counter()
        for i in range(rows):
            model.set_adapter(names[i % len(names)])
            with torch.inference_mode():
                model.generate(
                    input_ids=ids[i : i + 1],
                    attention_mask=torch.ones_like(ids[:1]),
                    max_new_tokens=tokens + 1,
                    min_new_tokens=tokens + 1,
                    do_sample=False,
                )
        return rows * tokens / (time.perf_counter() - began)

    return run


def with_peft(model: Any, pairs: dict[str, LowRank]) -> Any:
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
    peft = None
    for name in pairs:
        if peft is None:
            peft = get_peft_model(model, config, adapter_name=name)
        else:
            peft.add_adapter(name, config)
    assert peft is not None
    for path, module in peft.get_base_model().named_modules():
        for name, low in pairs.items():
            if path in low:
                module.lora_A[name].weight.data.copy_(low[path].a)
                module.lora_B[name].weight.data.copy_(low[path].b)
    return peft.eval().requires_grad_(False)


# ---- pairs -----------------------------------------------------------------------------------------------------------


def paired(left: Side, right: Side, rows: int, rounds: int) -> dict[str, Any]:
    """left / right over `rounds` rounds after one to warm up; in every second round right goes first."""
    speeds: list[tuple[float, float]] = []
    for i in range(rounds + 1):
        if i % 2:
            second, first = right(rows), left(rows)
        else:
            first, second = left(rows), right(rows)
        if i:
            speeds.append((first, second))
    logs = [math.log(a / b) for a, b in speeds]
    half = float(stats.t.ppf(0.975, rounds - 1)) * statistics.stdev(logs) / math.sqrt(rounds)
    middle = statistics.mean(logs)
    return {
        "rows": rows,
        "ratio": math.exp(middle),
        "ci95": [math.exp(middle - half), math.exp(middle + half)],
        "tokens_per_second": [statistics.median(s[0] for s in speeds), statistics.median(s[1] for s in speeds)],
        "rounds": rounds,
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = load_model(args.model, dtype=args.dtype, device=args.device)
    names = [f"adapter-{i}" for i in range(ADAPTERS)]
    pairs = {n: random_adapter(model, i) for i, n in enumerate(names)}
    base = EmbeddedEngine(model, tokenizer, (), prefix_memory=0)
    loaded = EmbeddedEngine(model, tokenizer, (), prefix_memory=0, load_adapter=pairs.__getitem__)
    peer, merged = copy.deepcopy(model), copy.deepcopy(model)
    for path, pair in pairs[names[0]].items():
        weight = merged.get_submodule(path).weight
        weight.data += (pair.b @ pair.a).to(weight)
    one = EmbeddedEngine(merged, tokenizer, (), prefix_memory=0)
    tokens = args.tokens
    base_only, mixed = ours(base, [None], tokens), ours(loaded, names, tokens)
    mixed(8)  # the adapters are in memory from here on
    values: dict[str, Any] = {"least_rows": base.forward.least_rows}

    def say(name: str, left: Side, right: Side, sizes: Sequence[int] = (8, 32)) -> None:
        for rows in sizes:
            values[f"{name} at {rows}"] = one_ratio = paired(left, right, rows, args.rounds)
            print(f"{name} at {rows}: {one_ratio['ratio']:.3f} {one_ratio['ci95']}", flush=True)

    peer.get_output_embeddings().weight.requires_grad_(not args.as_shipped)
    say("base only / transformers generate", base_only, theirs(peer, tokens))
    say("8 adapters mixed / base only", mixed, base_only)
    say("base only with adapters loaded / base only", ours(loaded, [None], tokens), base_only)
    say("merged / base only", ours(one, [None], tokens), base_only)
    peft = with_peft(peer, pairs)
    peft.get_output_embeddings().weight.requires_grad_(not args.as_shipped)
    say("8 adapters mixed / PEFT adapter_names", mixed, theirs(peft, tokens, names))
    say("PEFT set_adapter one by one / base only", switching(peft, tokens, names), base_only, (8,))
    values["seconds to the first token, 24 rows running"] = first_token_under_load(loaded, names, 40)
    return values


# ---- ten thousand names ----------------------------------------------------------------------------------------------


def measure_registry(count: int) -> dict[str, Any]:
    """Start-up with `count` adapters, cold loads of 200 of them, bytes held against a budget of 16 adapters."""
    root = Path(tempfile.mkdtemp(prefix="cmqa-registry-"))
    try:
        model = inject_lora(load_model("tiny")[0], r=1)
        save_adapter(model, root / "0", base_model_name_or_path="tiny")
        remove_lora(model)
        tensors = load_file(root / "0" / "adapter_model.safetensors")
        for i in range(count):
            draw = np.random.default_rng(i)
            shutil.copytree(root / "0", root / f"a{i}")
            changed = {k: draw.normal(0, 0.3, v.shape).astype(np.float32) for k, v in tensors.items()}
            save_file(changed, root / f"a{i}" / "adapter_model.safetensors")
        shutil.rmtree(root / "0")
        began = time.perf_counter()
        service = open_service(root, model="tiny", dtype="float32", device="cpu")
        started = time.perf_counter() - began
        engine, cold = service.engine, []
        engine.adapters.acquire(service.registry.open("a0")[1].digest)
        engine.adapters.budget = 16 * engine.adapters.nbytes
        most = 0
        for i in np.random.default_rng(1).choice(np.arange(100, count), min(200, count - 100), replace=False):
            began = time.perf_counter()
            digest = service.registry.open(f"a{i}")[1].digest
            engine.generate([Request((1, 2, 3), SamplingParams(max_new_tokens=1), digest)])
            cold.append(time.perf_counter() - began)
            most = max(most, engine.adapters.nbytes)
        return {
            "adapters": count,
            "start_up_seconds": started,
            "cold_load_seconds": {
                "p50": statistics.median(cold),
                "p95": sorted(cold)[int(0.95 * len(cold))],
                "n": len(cold),
            },
            "adapter_bytes_most": most,
            "adapter_bytes_budget": engine.adapters.budget,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
    finally:
        shutil.rmtree(root, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=24, help="decode steps timed in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--as-shipped", action="store_true")
    parser.add_argument("--registry", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="print the line and do not keep it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    values = measure_registry(args.registry) if args.registry else measure(args)
    line = result_line(
        "serve-registry" if args.registry else "serve",
        values,
        device=torch.cuda.get_device_name()
        if args.device.startswith("cuda")
        else {"processor": platform.processor() or platform.machine(), "threads": args.threads},
        versions=versions("torch", "transformers", "peft"),
        data=f"random prompts of {PROMPT} tokens, {ADAPTERS} random adapters of rank {RANK} on 7 linear layers",
        settings={k: v for k, v in vars(args).items() if k != "dry"},
        seed=0,
    )
    print(json.dumps(line, ensure_ascii=False))
    if not args.dry:
        keep(line, "serve")


if __name__ == "__main__":
    main()
