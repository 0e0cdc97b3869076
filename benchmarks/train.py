"""Training speed beside what others do: real tokens a second and MFU, in turn, each measurement in its own process.

    python benchmarks/train.py                      the embedded sample and base: one line in results/train.jsonl
    python benchmarks/train.py --data data/mine     a prepared folder's rows
    python benchmarks/train.py --table              the tables of what is kept, nothing measured

    seed                 the seed's recipe by transformers' Trainer: padded to 512, recomputing, 2 rows x 8
    hf-autocast-4 ...    a plain transformers + PEFT loop; the fastest of a search over batch and precision
    trl-packing-1 ...    TRL, LLaMA-Factory and ms-swift, each in its own environment under runs/bench-env
                         (peers/others.py) and in the fastest of its own small search
    ours                 `cmqa train`; then with one feature off: -separate-rows (no shared prefixes),
                         -transformers-forward (lora/plain.py), -float32 (base in float32), on a GPU also
                         -own-kernels (neither torch's FlashAttention over rows nor Liger)
    several-answers ...  rows of questions with several answers only, with shared prefixes and without

A round is the seed's recipe on 32 rows, peers on 64, ours on 256, several answers on 128; what each feature gives is
measured in round 0 only, on 128 rows, and the searches on 32. On two cores the searches take 18 minutes and a round 9
to 10, so that five rounds end within 90 minutes. A peer that cannot be installed or dies is named with its last words,
and the rest goes on.

Rates are of the steps after the first. MFU = operations / time / peak, where operations are 4 per body parameter and
token (6 where all is recomputed) and 4 per head parameter and supervised token, and the peak is the fastest matrix
product of the same process. A stopped run goes on where it was: measurements wait under runs/bench until the line
is written.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peers import hf_loop, hf_trainer, others, ours
from peers.setting import PEAK_SHAPES, TINY_SHAPES, Clock, Setting, load, operations, peak, peak_memory, read_rows
from result_line import commit, keep, kept, result_line

from lora_cmqa.models.load import DTYPES, computes_in_bfloat16
from lora_cmqa.train.run_folder import environment

HERE = Path(__file__).parent
SEARCH = tuple(f"hf-{precision}-{batch}" for precision in hf_loop.PRECISIONS for batch in hf_loop.BATCHES)
OURS = ("ours", "ours-separate-rows", "ours-transformers-forward", "ours-float32")
ON_GPU = ("ours-own-kernels",)
FEATURE_OFF_ROUNDS = (0,)
SHARED = ("several-answers", "several-answers-separate-rows")


# {way: {round: what `measure` gave}}; -1 is the search
Rounds = dict[str, dict[int, dict[str, Any]]]

# ---- one measurement, in a process of its own --------------------------------------------------------------------


def measure(way: str, setting: Setting) -> dict[str, Any]:
    """Train setting.rows rows by `way`; rates, MFU and what stood around them."""
    torch.set_num_threads(setting.threads)
    torch.manual_seed(setting.round)
    device = torch.device(setting.device)
    narrow = computes_in_bfloat16(device)
    wide_weights = way == "seed" or way.startswith("hf-autocast") or way.endswith("float32") or not narrow
    load_before = os.getloadavg()[0]
    elsewhere = way.split("-")[0] in others.PEERS
    model = load(setting, "float32" if wide_weights else "bfloat16")
    body, head = operations(model)
    vocabulary = model.get_input_embeddings().num_embeddings
    rows, clock = read_rows(setting, vocabulary), Clock(device)
    told: dict[str, Any] = {}
    if elsewhere:
        model = None  # the peer has its own
        try:
            told = others.train(way, setting, rows, clock)
        except others.PeerFailed as error:
            return {"error": str(error)}
    elif way == "seed":
        hf_trainer.train(setting, model, rows, clock)
    elif way.startswith("hf-"):
        _, precision, batch = way.split("-")
        hf_loop.train(setting, model, rows, clock, batch=int(batch), autocast=precision == "autocast" and narrow)
    else:
        ours.train(
            setting,
            model,
            rows,
            clock,
            own_forward=not way.endswith("transformers-forward"),
            shared_prefixes=not way.endswith("separate-rows"),
            library_kernels=not way.endswith("own-kernels"),
        )
    values = clock.values(setting.threads)
    memory = told.pop("peak_memory_bytes", None) or peak_memory(device)
    model = None
    gc.collect()
    computes_in = "float32" if way.endswith("float32") or not narrow else "bfloat16"
    fastest = peak(DTYPES[computes_in], device, TINY_SHAPES if setting.model.startswith("tiny") else PEAK_SHAPES)
    recomputes = way == "seed" or (setting.checkpointing and not elsewhere)
    work = body * (1.5 if recomputes else 1) * values["computed_tokens"] + head * values["supervised_tokens"]
    return values | {
        "mfu": work / values["seconds"] / fastest,
        "peak_operations_per_second": fastest,
        "computes_in": computes_in,
        "peak_memory_bytes": memory,
        "load_before": load_before,
        # what shared prefixes can give at most: operations without them / operations with them
        "bound": (body * values["tokens"] + head * values["supervised_tokens"])
        / (body * values["computed_tokens"] + head * values["supervised_tokens"]),
        "mean_row": sum(map(len, rows)) / len(rows),
        **told,
    }


def in_a_process(way: str, setting: Setting) -> dict[str, Any]:
    """`measure` in a fresh process: its memory and threads are its own."""
    child = subprocess.run(
        [sys.executable, __file__, "--child", way, json.dumps(asdict(setting))],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(setting.threads), "TOKENIZERS_PARALLELISM": "false"},
    )
    if child.returncode:
        raise SystemExit(f"{way} ended with code {child.returncode}; what is above says why")
    return json.loads(child.stdout.splitlines()[-1])


# ---- all of them, in turn ----------------------------------------------------------------------------------------


class Measurements:
    """Finished ones in a file, one JSON object a line, so that a stopped run repeats none."""

    def __init__(self, file: Path, run: Callable[[str, Setting], dict[str, Any]]) -> None:
        self.file, self.run, self.done = file, run, dict[str, dict[str, Any]]()
        if file.exists():
            for line in file.read_text(encoding="utf-8").splitlines():
                key, values = json.loads(line)
                self.done[key] = values

    def of(self, way: str, setting: Setting) -> dict[str, Any]:
        key = f"{way} {json.dumps(asdict(setting), sort_keys=True)}"
        if key not in self.done:
            v = self.run(way, setting)
            self._keep(key, v)
            said = v["error"] if "error" in v else f"{v['tokens_per_second']:8.1f} tokens/s  MFU {v['mfu']:6.1%}"
            print(f"{time.strftime('%H:%M:%S')}  round {setting.round}  {way:32} {said}", file=sys.stderr, flush=True)
        return self.done[key]

    def load_at_start(self) -> float:
        """Of the machine, over the minute before the very first measurement."""
        if "load" not in self.done:
            self._keep("load", {"at_start": os.getloadavg()[0]})
        return self.done["load"]["at_start"]

    def _keep(self, key: str, values: dict[str, Any]) -> None:
        self.done[key] = values
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as f:
            f.write(json.dumps([key, values]) + "\n")


def all_rounds(args: argparse.Namespace, measurements: Measurements) -> Rounds:
    """{way: {round: its measurement, or {"error": ...}}}; a search before round 0 decides which peers take part."""
    base = Setting(
        model=args.model,
        data=args.data,
        rows=args.rows,
        round=0,
        device=args.device,
        threads=args.threads,
        r=args.r,
        max_length=args.max_length,
        stretch=args.stretch,
        checkpointing=args.checkpointing,
    )
    peer_rows, seed_rows = replace(base, rows=args.peer_rows), replace(base, rows=args.seed_rows)
    feature_rows = replace(base, rows=args.feature_rows)
    ways: dict[str, Setting] = {}
    out: Rounds = {}
    if not args.ours_only:
        if not args.no_seed:
            ways["seed"] = seed_rows
        searches = {"hf": tuple(args.hf.split(",")) if args.hf else SEARCH}
        if not (args.no_peers or args.model.startswith("random:")):  # a random model has no texts that peers could read
            searches |= others.SEARCHES
        for candidates in searches.values():
            tried = {way: measurements.of(way, replace(base, rows=args.search_rows)) for way in candidates}
            found = {way: v["tokens_per_second"] for way, v in tried.items() if "error" not in v}
            if found:
                ways[max(found, key=found.__getitem__)] = peer_rows
            out |= {way: {-1: v} for way, v in tried.items() if "error" in v}
    features = (*OURS[1:], *(ON_GPU if args.device.startswith("cuda") else ()))
    ways |= {"ours": base} | dict.fromkeys(features, feature_rows)
    if not args.no_several_answers:
        ways |= dict.fromkeys(SHARED, replace(feature_rows, several_answers=True))
    out |= {way: {} for way in ways}
    for number in range(args.rounds):
        order = list(ways)[:: 1 if number % 2 == 0 else -1]  # who comes first changes
        for way in order:
            if not _is_off(way) or number in FEATURE_OFF_ROUNDS:
                out[way][number] = measurements.of(way, replace(ways[way], round=number))
    return out


def summary(measured: Rounds) -> dict[str, Any]:
    """Medians with [least, most] over the rounds; ratios are of neighbours in one round, then their median.

    A way that failed in a round has no figure of it; its error stands in `errors`.
    """
    rounds = {way: {n: m for n, m in ms.items() if "error" not in m} for way, ms in measured.items()}
    rounds = {way: ms for way, ms in rounds.items() if ms}
    errors = {way: m["error"] for way, ms in measured.items() for m in ms.values() if "error" in m}

    def over(key: str) -> dict[str, Any]:
        return {way: _spread([m[key] for m in ms.values()]) for way, ms in rounds.items()}

    def ratio(of: str, to: str) -> dict[str, float] | None:
        both = sorted(rounds.get(of, {}).keys() & rounds.get(to, {}).keys())
        rates = [(rounds[of][n]["tokens_per_second"], rounds[to][n]["tokens_per_second"]) for n in both]
        return _spread([a / b for a, b in rates]) if rates else None

    rates = over("tokens_per_second")
    hf = next((way for way in rounds if way.startswith("hf-")), None)
    ours_first = next(iter(rounds["ours"].values()))
    hours = 20_000 * 5 * ours_first["mean_row"] / rates["ours"]["median"] / 3600
    shared = rounds.get(SHARED[0], {})
    return {
        "tokens_per_second": rates,
        "ratio_vs_seed": ratio("ours", "seed"),
        "ratio_vs_best_peer": ratio("ours", hf) if hf else None,  # the plain transformers + PEFT loop
        "best_peer": hf,
        "ratio_vs": {way: ratio("ours", way) for way in rounds if way.split("-")[0] in others.PEERS},
        "errors": errors,
        "rounds": {way: len(ms) for way, ms in rounds.items()},
        "mfu": over("mfu"),
        "ratio_shared_prefix": ratio(*SHARED),
        "bound_shared_prefix": _spread([m["bound"] for m in shared.values()]) if shared else None,
        "ratio_feature_off": {way: ratio("ours", way) for way in measured if _is_off(way)},
        "peak_operations_per_second": over("peak_operations_per_second"),
        "computes_in": {way: next(iter(ms.values()))["computes_in"] for way, ms in rounds.items()},
        "peak_memory_bytes": over("peak_memory_bytes"),
        "processor_share": over("processor_share"),
        "seed_job_hours": hours,  # 20,000 rows x 5 epochs at the rate of ours and these rows' mean length
    }


def _is_off(way: str) -> bool:
    """Whether one feature is off in it."""
    return way.startswith("ours-")


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def table(line: dict[str, Any]) -> str:
    v, about = line["values"], line["settings"]
    head = (
        f"{about['model']}, {line['data']}, {line['device']['processor']}, {about['threads']} threads, "
        f"commit {line['commit'][:9]}, {line['date']}, load at the start {line['load_at_start']:.2f}"
    )
    if line["noisy"]:
        head += (
            "\nNOISY: the machine was busy at the start, or ours did not get its processor time: no figures to quote."
        )
    rows = ["| way | real tokens/s (least .. most) | MFU | memory GB | ours is |", "|---|---|---|---|---|"]
    mine = v["tokens_per_second"]["ours"]["median"]
    for way, rate in v["tokens_per_second"].items():
        factor = "" if way in ("ours", *SHARED) else f"x {mine / rate['median']:.2f}"
        rows.append(
            f"| {way} | {rate['median']:.0f} ({rate['least']:.0f} .. {rate['most']:.0f}) "
            f"| {v['mfu'][way]['median']:.1%} | {v['peak_memory_bytes'][way]['median'] / 1e9:.1f} "
            f"| {factor} |"
        )
    rows += [
        f"| {way} | failed: {' '.join(error.split()).replace('|', '/')} | | | |"
        for way, error in v.get("errors", {}).items()
    ]
    counted = {way: n for way, n in v.get("rounds", {}).items() if not _is_off(way)}
    if counted:
        rows.append(f"\nrounds: {max(counted.values())}")
    if v["ratio_shared_prefix"]:
        rows.append(
            f"\nshared prefixes, rows of questions with several answers: x {v['ratio_shared_prefix']['median']:.3f}, "
            f"operation counts allow x {v['bound_shared_prefix']['median']:.3f}"
        )
    rows.append(
        f"\npeak: {v['peak_operations_per_second']['ours']['median'] / 1e9:.0f} GFLOP/s {v['computes_in']['ours']}"
    )
    return "\n".join((head, "", *rows))


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="or random:Qwen3-0.6B, random:Qwen-7B: random weights")
    parser.add_argument("--data", help="prepared folder; default: the embedded sample")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=256, help="of ours in a round")
    parser.add_argument("--peer-rows", type=int, default=64)
    parser.add_argument("--seed-rows", type=int, default=32)
    parser.add_argument("--feature-rows", type=int, default=128, help="of ours with a feature off, and several answers")
    parser.add_argument("--search-rows", type=int, default=32, help="of each candidate before round 0")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--stretch", type=int, default=0, help="every row repeated to so many tokens")
    parser.add_argument("--checkpointing", action="store_true", help="also ours and the plain loop recompute")
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--hf", help="candidates instead of the whole search, as hf-bf16-2,hf-bf16-4")
    parser.add_argument("--no-seed", action="store_true")
    parser.add_argument("--no-peers", action="store_true", help="without TRL, LLaMA-Factory and ms-swift")
    parser.add_argument("--no-several-answers", action="store_true")
    parser.add_argument("--dry", action="store_true", help="print the line and do not keep it")
    parser.add_argument("--table", action="store_true")
    return parser.parse_args(argv)


def bench(
    args: argparse.Namespace, work: Path, run: Callable[[str, Setting], dict[str, Any]] = in_a_process
) -> dict[str, Any]:
    """The line of all rounds. `work` holds finished measurements and the load when the first began."""
    asked = {k: v for k, v in vars(args).items() if k not in ("dry", "table")}
    key = hashlib.sha256(json.dumps([commit(), asked], sort_keys=True).encode()).hexdigest()[:12]
    measurements = Measurements(work / f"train-{key}.jsonl", run)
    load_at_start = measurements.load_at_start()
    values = summary(all_rounds(args, measurements))
    # Ours had 0.91 to 0.92 of two otherwise idle cores; much less means that others took some.
    noisy = load_at_start > 0.5 or (args.device == "cpu" and values["processor_share"]["ours"]["least"] < 0.85)
    about = environment(torch.device(args.device), torch.bfloat16)
    return result_line(
        "train",
        values,
        device={"processor": about["processor"], "device": about["device"], "threads": args.threads},
        versions=about["versions"],
        data=args.data or "the embedded sample's training rows",
        settings=asked,
        seed="the round's number",
        load_at_start=load_at_start,
        noisy=noisy,
    )


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(measure(sys.argv[2], Setting(**json.loads(sys.argv[3])))))
        return
    args = arguments()
    if args.table:
        newest = {json.dumps(line["settings"]): line for line in kept("train")}
        print("\n\n".join(map(table, newest.values())))
        return
    line = bench(args, Path("runs/bench"))
    if args.dry:
        print(json.dumps(line, ensure_ascii=False))
    else:
        keep(line, "train")
    print(table(line))


if __name__ == "__main__":
    main()
