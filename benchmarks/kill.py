"""Kill a run with SIGKILL at random moments, start it again, and compare its end with a run that nobody stopped.

    python benchmarks/kill.py [--kills 200] [--seed 42]

Moments are drawn from the seed in two kinds, in turn: some way into a random step (when metrics.jsonl shows that the
step before it is done) and some way into a random save (when its temporary folder appears). Which one it hit is read
off the folder afterwards: a temporary folder that is left means inside a save. Every fifth run is killed once more.
Half of the runs have dropout, half have shared prefixes. The children are forks of one process that has imported
everything, so a run of the tiny model takes about a second.
One line is added to benchmarks/results/kill.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from result_line import keep, result_line

from lora_cmqa.config import Config, DataConfig, LoraConfig, ModelConfig, TrainConfig
from lora_cmqa.data.files import sha256_of
from lora_cmqa.train import loop
from lora_cmqa.train.checkpoint import list_checkpoints
from lora_cmqa.train.run_folder import environment

STEPS, SAVE_STEPS, EVAL_STEPS, ROWS = 12, 2, 2, 24


KINDS = ("dropout", "shared prefixes")  # the one keeps the other off, so half of the runs are of each


def config_of(folder: Path, kind: str) -> Config:
    """The tiny model, a dev set whose best is kept, a checkpoint every other step; two answers to each question."""
    topics = ("头痛", "发烧", "咳嗽", "失眠", "胃痛")
    lines = [
        {
            "id": f"row-{i}",
            "question_id": f"question-{i // 2}",
            "split": "dev" if i >= ROWS - 4 else "train",
            "messages": [
                {"role": "user", "content": f"{topics[i // 2 % 5]}第{i // 2}天，怎么办？"},
                {"role": "assistant", "content": f"{topics[i // 2 % 5]}要多休息。" + "必要时就医。" * (i % 4)},
            ],
        }
        for i in range(ROWS)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return Config(
        model=ModelConfig(name_or_path="tiny", dtype="float32", device="cpu"),
        data=DataConfig(path=str(data), system="你是一名医生。"),
        lora=LoraConfig(r=4, lora_dropout=0.1 if kind == "dropout" else 0.0),
        train=TrainConfig(
            per_device_train_batch_size=4,
            gradient_accumulation_steps=1,
            max_steps=STEPS,
            learning_rate=0.6,  # so high that dev losses go up and down
            lr_scheduler_type="constant",
            save_steps=SAVE_STEPS,
            eval_steps=EVAL_STEPS,
            max_tokens=256,
        ),
    )


def end_of(run: Path) -> dict[str, Any]:
    """What must not depend on kills: the adapter, the optimizer's state, random state, metrics but for `time`."""
    last = list_checkpoints(run)[-1]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "adapter": sha256_of(run / "adapter_model.safetensors"),
        "optimizer": sha256_of(last / "optimizer.safetensors"),
        "rng": sha256_of(last / "rng_state.json"),
        "metrics": [{k: v for k, v in line.items() if k != "time"} for line in lines],
        "state": json.loads((run / "trainer_state.json").read_text()),
    }


# ---- children ----------------------------------------------------------------------------------------------------


def start(config: Config) -> int:
    """Train in a fork of this process; its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        loop.train(config)
        code = 0
    finally:
        os._exit(code)


def has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait(pid: int) -> int:
    """Exit code, or minus the signal's number."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---- moments -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    kind: str  # step, save
    at: int  # the step that runs, or the step whose checkpoint is written
    delay: float  # seconds into it


def draw(kind: str, rng: random.Random, seconds: dict[str, float]) -> Moment:
    at = rng.randrange(1, STEPS + 1) if kind == "step" else SAVE_STEPS * rng.randrange(1, STEPS // SAVE_STEPS + 1)
    return Moment(kind, at, rng.uniform(0, seconds[kind]))


def has_come(moment: Moment, run: Path) -> bool:
    if moment.kind == "save":
        return (run / f".checkpoint-{moment.at}.tmp").exists()
    return steps_done(run) >= moment.at - 1 and (run / "metrics.jsonl").exists()


def steps_done(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_bytes().count(b'"loss"')
    except FileNotFoundError:
        return 0


def kill_at(moment: Moment, config: Config) -> bool:
    """Start, wait for the moment, SIGKILL. False when the run had ended before."""
    run, pid = Path(config.train.output_dir or ""), start(config)
    while not has_come(moment, run) and not has_ended(pid):
        time.sleep(0.0002)
    time.sleep(moment.delay)
    os.kill(pid, signal.SIGKILL)
    return wait(pid) == -signal.SIGKILL


def where_it_hit(run: Path) -> str:
    if any(run.glob(".checkpoint-*")):
        return "inside a save"
    return "inside the steps" if (run / "metrics.jsonl").exists() else "before the first step"


# ---- all of it ---------------------------------------------------------------------------------------------------


def reference(config: Config) -> tuple[dict[str, Any], dict[str, float]]:
    """The end of a run that nobody stops, and the seconds of a step and of a save (medians)."""
    seconds: dict[str, list[float]] = {"step": [], "save": []}

    def timed(work: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = work(*args, **kwargs)
            seconds[kind].append(time.perf_counter() - started)
            return result

        return run

    real = loop.train_step, loop.save_checkpoint
    loop.train_step, loop.save_checkpoint = timed(real[0], "step"), timed(real[1], "save")
    try:
        ended = end_of(loop.train(config))
    finally:
        loop.train_step, loop.save_checkpoint = real
    return ended, {kind: statistics.median(s) for kind, s in seconds.items()}


def kill_many(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """`kills` runs, each killed at a moment of its own and started again; how many ended as the one left alone."""
    torch.set_num_threads(1)  # OpenMP's threads do not live on in a fork

    seeds: dict[str, int] = {}

    def into(name: str, kind: str) -> Config:
        config = config_of(folder, kind)
        return replace(config, train=replace(config.train, seed=seeds[kind], output_dir=str(folder / name)))

    expected, seconds = {}, {}
    for kind in KINDS:
        for seeds[kind] in range(20):  # the first whose best adapter is not its last, so that both must be kept
            expected[kind], seconds[kind] = reference(into(f"whole-{kind}-{seeds[kind]}", kind))
            if expected[kind]["state"]["best_global_step"] < STEPS:
                break
    rng, hits, reached = random.Random(seed), Counter[str](), Counter[int]()
    kinds = Counter[str]()
    identical = second_kills = too_late = 0
    while hits.total() < kills:
        i = hits.total()
        kind = KINDS[i // 2 % 2]
        mine = into(f"killed-{i}-{too_late}", kind)
        run = Path(mine.train.output_dir or "")
        if not kill_at(draw(("step", "save")[i % 2], rng, seconds[kind]), mine):
            too_late += 1
            continue
        hits[where_it_hit(run)] += 1
        reached[steps_done(run)] += 1
        kinds[kind] += 1
        if i % 5 == 0:
            second_kills += kill_at(draw(rng.choice(("step", "save")), rng, seconds[kind]), mine)
        same = wait(start(mine)) == 0 and end_of(run) == expected[kind]
        identical += same
        if not same:
            print(f"run {i} ended otherwise: {run}", file=sys.stderr)
    return {
        "kills": kills,
        "identical": identical,
        "inside_saves": hits["inside a save"],
        "inside_steps": hits["inside the steps"],
        "before_the_first_step": hits["before the first step"],
        "killed_a_second_time": second_kills,
        "moments_after_the_end_drawn_again": too_late,
        "killed_after_step": {str(k): reached[k] for k in sorted(reached)},
        "runs": dict(kinds),
        "best_step": {kind: expected[kind]["state"]["best_global_step"] for kind in KINDS},
        "adapter_sha256": {kind: expected[kind]["adapter"] for kind in KINDS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        values = kill_many(args.kills, args.seed, Path(folder))
    about = environment(torch.device("cpu"), torch.float32)
    line = result_line(
        "kill",
        values | {"seconds": round(time.perf_counter() - started)},
        device=about["processor"],
        versions=about["versions"],
        data=f"{ROWS} made-up rows, two answers a question",
        settings={"model": "tiny", "steps": STEPS, "save_steps": SAVE_STEPS, "eval_steps": EVAL_STEPS, "threads": 1},
        seed=args.seed,
    )
    keep(line, "kill")
    print(json.dumps(line["values"]))
    sys.exit(values["identical"] != values["kills"])


if __name__ == "__main__":
    main()
