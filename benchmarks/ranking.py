"""Ranking's speed: a question's prefix once and its candidates side by side, against one candidate at a time.

    python benchmarks/ranking.py DATA [--model embedded] [--questions 5] [--candidates 20]

DATA is a folder made by `cmqa prepare`. Both ways score the same candidates; they must agree, and one line is added
to benchmarks/results/ranking.jsonl.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
from result_line import keep, result_line, versions

from lora_cmqa.data.prepare import load_split
from lora_cmqa.data.template import ChatTemplate
from lora_cmqa.evaluate.ranking import (
    answer_log_probs,
    answer_log_probs_plain,
    candidate_sets,
    encode_answers,
    prompt_ids,
)
from lora_cmqa.models.load import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--questions", type=int, default=5)
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, dtype=args.dtype)
    template = ChatTemplate.from_tokenizer(tokenizer)
    examples = load_split(args.data, "test")
    sets, _ = candidate_sets(
        args.data, "test", examples, questions=args.questions, candidates=args.candidates, seed=args.seed
    )
    ids = encode_answers([a for c in sets for a in c.answers], template)
    seconds: dict[str, float] = {}
    scores: dict[str, np.ndarray] = {}
    for name, way in (("shared", answer_log_probs), ("plain", answer_log_probs_plain)):
        way(model, prompt_ids("", template, None), [next(iter(ids.values()))])  # the first call also warms up
        started = time.perf_counter()
        scores[name] = np.concatenate(
            [way(model, prompt_ids(c.question, template, None), [ids[a] for a in c.answers]) for c in sets]
        )
        seconds[name] = time.perf_counter() - started
    lengths = np.array([len(ids[a]) for c in sets for a in c.answers])
    weights = next(model.parameters())
    values = {
        "seconds_per_question": round(seconds["shared"] / len(sets), 3),
        "seconds_per_question_plain": round(seconds["plain"] / len(sets), 3),
        "ratio_vs_plain": round(seconds["plain"] / seconds["shared"], 2),
        "answer_tokens_per_second": round(float(lengths.sum()) / seconds["shared"], 1),
        "largest_difference_per_token": float(np.abs((scores["shared"] - scores["plain"]) / lengths).max()),
    }
    line = result_line(
        "ranking",
        values,
        device=f"{platform.machine()}, {weights.device.type}, {torch.get_num_threads()} threads",
        versions=versions("torch", "transformers"),
        data=f"{len(sets)} questions x {args.candidates} candidates of {args.data.name}, {lengths.sum()} tokens",
        settings={"model": args.model, "dtype": str(weights.dtype).removeprefix("torch.")},
        seed=args.seed,
    )
    keep(line, "ranking")
    print(json.dumps(values))


if __name__ == "__main__":
    main()
