"""The whole walk in a few minutes: embedded sample, embedded base, nothing fetched.

    sample rows -> data/demo -> train -> runs/demo -> evaluate -> three questions side by side, and the table

The settings below were found by measurement (docs/demo.md): the answers change visibly, the loss falls by more than
its interval, and a general question is still answered as the base answers it.
"""

from __future__ import annotations

import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from .config import Config, DataConfig, EvaluateConfig, LoraConfig, ModelConfig, TrainConfig
from .messages import say

RUN, DATA = Path("runs/demo"), Path("data/demo")
SAMPLE = Path(str(files("lora_cmqa.data").joinpath("sample")))

QUESTIONS = (
    "晚上总是睡不着，白天没有精神，该怎么办？",
    "孩子吃完海鲜后身上起了很多红疹，很痒，怎么处理？",
    "What is the capital of France?",
)
MAX_NEW_TOKENS = 120
# What the seven minutes have room for; `cmqa eval runs/demo` measures the rest.
MEASURED = EvaluateConfig(
    generate_rows=16, max_new_tokens=MAX_NEW_TOKENS, rank_questions=0, general_chat=False, red_flags=False
)


def settings(model: str = "embedded", max_steps: int = -1) -> Config:
    """The demo's settings; `max_steps` cuts the training short."""
    return Config(
        model=ModelConfig(name_or_path=model),
        data=DataConfig(path=str(DATA), replay=str(SAMPLE / "general.jsonl"), model_max_length=384),
        lora=LoraConfig(r=16, lora_alpha=32),
        train=TrainConfig(
            output_dir=str(RUN),
            num_train_epochs=0.7,
            max_steps=max_steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            learning_rate=5e-4,
            warmup_ratio=0.1,
            eval_steps=10,
            eval_rank_questions=0,  # the seven minutes have no room for it
            save_steps=25,
            save_total_limit=1,
        ),
    )


def demo(*, model: str = "embedded", max_steps: int = -1) -> dict[str, Any]:
    """Run the walk and print it; returns {"run", "seconds", "report", "answers"}.

    Writes runs/demo and data/demo under the current folder. Run again, it shows the same run.
    """
    from .data.prepare import prepare, print_summary
    from .engine.chat import Chat, compare, print_side_by_side
    from .engine.run import open_run
    from .engine.sampling import SamplingParams
    from .evaluate.evaluation import evaluate
    from .evaluate.report import print_table
    from .train.loop import train

    started = time.perf_counter()
    config = settings(model, max_steps)
    _step(1, say("demo.prepare", data=DATA))
    print_summary(prepare(SAMPLE, DATA, licence="Apache-2.0, written for this project"))
    _step(2, say("demo.train", base=model))
    run = train(config)
    _step(3, say("demo.evaluate"))
    opened = open_run(run)
    report = evaluate(opened, DATA, MEASURED)
    _step(4, say("demo.compare"))
    answers = compare(Chat(opened), QUESTIONS, sampling=SamplingParams(max_new_tokens=MAX_NEW_TOKENS))
    print_side_by_side(answers)
    print_table(report)
    seconds = time.perf_counter() - started
    print(say("demo.done", minutes=f"{seconds / 60:.1f}", run=run, page=run / "eval" / "test" / "report.html"))
    return {"run": str(run), "seconds": round(seconds, 1), "report": report, "answers": answers}


def _step(number: int, text: str) -> None:
    print(f"\n[{number}/4] {text}", flush=True)
    sys.stderr.flush()
