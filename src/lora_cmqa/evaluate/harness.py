"""EleutherAI's lm-evaluation-harness on base and adapter, where it is installed: the only door to lm_eval.

It fetches its tasks' data from a hub; nothing else here does. Its scores of single questions are paired like all
others (it logs them under "samples"), so that its accuracies get an interval and a test too.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..engine.run import OpenRun
from ..errors import ConfigError
from .measures import Measure

PREFIX = "lm_eval "  # of a measure's name: "lm_eval ceval-valid acc"


def task_names(given: Sequence[str]) -> list[str]:
    """`a,b c` -> a, b, c. Raises ConfigError where tasks are named and the harness is not installed."""
    tasks = [t for words in given for t in words.split(",") if t]
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            f"the tasks {', '.join(tasks)} need EleutherAI's harness, which is not installed",
            field="evaluate.lm_eval",
            hint='pip install "lora-cmqa[harness]", or leave --lm-eval out.',
        )
    return tasks


def harness_measures(opened: OpenRun, tasks: Sequence[str]) -> list[Measure]:
    """One measure for each task and each of its metrics that is a number per question."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    out = []
    for task in tasks:
        scores = []
        for side in ("base", "adapter"):
            with opened.model.disable_adapter() if side == "base" else contextlib.nullcontext():
                model = HFLM(pretrained=opened.model, tokenizer=opened.tokenizer, backend="causal")
                scores.append(_by_metric(simple_evaluate(model=model, tasks=[task], log_samples=True)))
        for metric in sorted(scores[0].keys() & scores[1].keys()):
            base, adapter = scores[0][metric], scores[1][metric]
            ids = sorted(base.keys() & adapter.keys())
            left, right = (np.array([side[i] for i in ids]) for side in (base, adapter))
            if set(left) | set(right) <= {0, 1}:
                left, right = left.astype(bool), right.astype(bool)
            out.append(Measure(f"{PREFIX}{task} {metric}", left, right, ids))
    return out


def _by_metric(result: Any) -> dict[str, dict[str, float]]:
    """{metric: {question: value}} of the harness's samples; with several filters the first one counts."""
    found: dict[str, dict[str, float]] = {}
    for subtask, samples in result["samples"].items():
        for s in samples:
            for metric in s["metrics"]:
                if isinstance(s[metric], int | float):
                    found.setdefault(metric, {}).setdefault(f"{subtask}:{s['doc_id']}", float(s[metric]))
    return found
