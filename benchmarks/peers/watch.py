"""Inside a peer's own environment: read the job, watch its Trainer, print one JSON line. Needs transformers only.

All three peers train by a subclass of transformers' Trainer, so one place sees every micro-batch and step of theirs.
Counted are tokens that are not padding, and labels that are taught, of what was really computed.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

import torch
import transformers


def job() -> dict[str, Any]:
    """What others.py asks for; the peer's threads are set by it."""
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    torch.manual_seed(asked["seed"])
    return asked


class Watch(transformers.TrainerCallback):
    """ends: at each optimizer step the clock, the processor time, tokens and taught tokens since the last."""

    def __init__(self, pad: int) -> None:
        self.pad, self.tokens, self.taught = pad, 0, 0
        self.began, self.ends = time.perf_counter(), list[tuple[float, float, int, int, int]]()
        step, train, watch = transformers.Trainer.training_step, transformers.Trainer.train, self

        def seen_step(trainer: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            watch.tokens += int((inputs["input_ids"] != watch.pad).sum())
            watch.taught += int((inputs["labels"] != -100).sum())
            watch.model = trainer.model
            return step(trainer, model, inputs, *args, **kwargs)

        def seen_train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            trainer.add_callback(watch)
            return train(trainer, *args, **kwargs)

        transformers.Trainer.training_step, transformers.Trainer.train = seen_step, seen_train

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available() and not args.use_cpu:
            torch.cuda.synchronize()
        self.ends.append((time.perf_counter(), time.process_time(), self.tokens, self.tokens, self.taught))
        self.tokens = self.taught = 0

    def report(self) -> None:
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        on_gpu = next(base.parameters()).is_cuda
        print(
            json.dumps(
                {
                    "began": self.began,
                    "ends": self.ends,
                    "trained_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
                    "attention": base.config._attn_implementation,
                    "memory": torch.cuda.max_memory_allocated()
                    if on_gpu
                    else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                }
            ),
            flush=True,
        )
