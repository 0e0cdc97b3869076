"""Base against adapter on the same held-out rows, in one command.

run, rows -> losses of both on true and on shuffled pairs -> answers of both -> paired intervals -> verdict -> report
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Config, parse
from ..core import Example, TokenizedExample
from ..data.prepare import load_split
from ..data.template import encode_all
from ..engine.chat import Chat
from ..engine.run import OpenRun, open_run
from ..engine.sampling import SamplingParams
from ..errors import AdapterError, DataError
from .bootstrap import Paired, paired
from .nll import RowLosses, row_losses, shuffled_pairs
from .overlap import repetition_rate
from .report import write_report


def evaluate(
    run: str | Path | OpenRun,
    data: str | Path | None = None,
    *,
    base: str | None = None,
    name: str | None = None,
    split: str = "test",
    loss_rows: int = 0,
    generate_rows: int = 32,
    max_new_tokens: int = 160,
    bootstrap_samples: int = 10_000,
    seed: int = 42,
    device: str = "auto",
    dtype: str = "auto",
    num_hidden_layers: int | None = None,
) -> dict[str, Any]:
    """Write RUN/eval/NAME/report.{json,md,html} and predictions.jsonl, and return the report.

    data           prepared folder or file; default: what the run was trained on
    loss_rows      rows scored by loss, drawn by seed; 0 takes all
    generate_rows  questions answered by both, drawn by seed; 0 answers none

    Raises AdapterError where the run holds no adapter, DataError where the split is empty.
    """
    if not isinstance(run, OpenRun):
        run = open_run(run, base=base, device=device, dtype=dtype, num_hidden_layers=num_hidden_layers)
    opened = run
    if not opened.has_adapter:
        raise AdapterError("there is no adapter here to compare with its base", file=opened.folder)
    settings = _settings_of(opened.folder)
    source = Path(data) if data is not None else Path(settings.data.path or "")
    examples = load_split(source, split)
    if not examples:
        raise DataError(
            f"no {split} row", file=source, hint="--evaluate.split dev, or `cmqa prepare` with a test share."
        )
    examples = _draw(examples, loss_rows, seed)
    true, shuffled = _encode(examples, opened, settings), _encode(shuffled_pairs(examples, seed=seed), opened, settings)
    both = [e for e in examples if e.id in true and e.id in shuffled]
    questions = [e.question_id for e in both]
    scores: dict[str, tuple[RowLosses, RowLosses]] = {}
    for side in ("base", "adapter"):
        with _side(opened, side):
            scores[side] = (
                row_losses(opened.model, [true[e.id] for e in both]),
                row_losses(opened.model, [shuffled[e.id] for e in both]),
            )
    metrics = _loss_metrics(scores, questions, samples=bootstrap_samples, seed=seed)
    predictions = _answers(opened, _draw_questions(examples, generate_rows, seed), max_new_tokens, settings.data.system)
    metrics |= _text_metrics(predictions, samples=bootstrap_samples, seed=seed)
    report = {
        "run": opened.folder.name,
        "base": settings.model.name_or_path,
        "split": split,
        "rows": len(both),
        "metrics": {k: _as_json(v) for k, v in metrics.items()},
        "verdict": verdict(metrics),
        "signature": {
            "data_sha256": _hash_rows(both),
            "adapter_sha256": _hash_file(opened.folder / "adapter_model.safetensors"),
            "split": split,
            "dtype": str(next(opened.model.parameters()).dtype).removeprefix("torch."),
            "decoding": {"temperature": 0, "max_new_tokens": max_new_tokens},
            "bootstrap_samples": bootstrap_samples,
            "seed": seed,
            "version": _version(),
        },
    }
    write_report(opened.folder / "eval" / (name or split), report, predictions)
    return report


def verdict(metrics: dict[str, Paired]) -> str:
    """worse: the loss rose; better: content gain above zero; style only: the loss fell without it; or nothing shown."""
    loss, content = metrics["nll"], metrics["content_gain"]
    if loss.ci95[0] > 0:
        return "worse"
    if content.ci95[0] > 0:
        return "better"
    return "style only" if loss.ci95[1] < 0 else "no difference shown"


# ---- the numbers --------------------------------------------------------------------------------------------------


def _loss_metrics(
    scores: dict[str, tuple[RowLosses, RowLosses]], questions: Sequence[str], *, samples: int, seed: int
) -> dict[str, Paired]:
    """nll and nll_shuffled in nats per token; content_gain = (how much lower the true pair's loss is than the shuffled
    one's) under the adapter minus the same under the base."""
    (base_true, base_shuffled), (own_true, own_shuffled) = scores["base"], scores["adapter"]

    def both(base: np.ndarray, own: np.ndarray, tokens: np.ndarray) -> Paired:
        return paired(base, own, questions, weights=tokens, samples=samples, seed=seed)

    return {
        "nll": both(base_true.per_token, own_true.per_token, base_true.tokens),
        "nll_shuffled": both(base_shuffled.per_token, own_shuffled.per_token, base_shuffled.tokens),
        "content_gain": both(
            base_shuffled.per_token - base_true.per_token,
            own_shuffled.per_token - own_true.per_token,
            base_true.tokens,
        ),
    }


def _text_metrics(predictions: Sequence[dict[str, Any]], *, samples: int, seed: int) -> dict[str, Paired]:
    if len(predictions) < 2:
        return {}
    ids = [p["question_id"] for p in predictions]

    def both(measure: Any) -> Paired:
        base, own = (np.array([float(measure(p[side])) for p in predictions]) for side in ("base", "adapter"))
        return paired(base, own, ids, samples=samples, seed=seed)

    return {
        "repetition": both(lambda a: repetition_rate(a["text"])),
        "length": both(lambda a: len(a["text"])),
        "ended": both(lambda a: a["finish_reason"] == "stop"),
    }


def _answers(
    opened: OpenRun, examples: Sequence[Example], max_new_tokens: int, system: str | None
) -> list[dict[str, Any]]:
    """Greedy answers of base and adapter to each question, and the reference."""
    chat = Chat(opened, system=system)
    sampling = SamplingParams(max_new_tokens=max_new_tokens)
    requests = [chat.request(e.question, adapter=a, sampling=sampling) for e in examples for a in (False, True)]
    done = [{"text": c.text.strip(), "finish_reason": c.finish_reason} for c in chat.engine.generate(requests)]
    return [
        {
            "id": e.id,
            "question_id": e.question_id,
            "question": e.question,
            "reference": e.answer,
            "base": done[2 * i],
            "adapter": done[2 * i + 1],
        }
        for i, e in enumerate(examples)
    ]


# ---- small pieces ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _side(opened: OpenRun, side: str) -> Iterator[None]:
    with opened.model.disable_adapter() if side == "base" else contextlib.nullcontext():
        yield


def _encode(examples: Sequence[Example], opened: OpenRun, settings: Config) -> dict[str, TokenizedExample]:
    """By id; rows too long for the training length are left out on both sides alike."""
    d = settings.data
    rows, _ = encode_all(examples, opened.template, max_length=d.model_max_length, on_too_long="drop", system=d.system)
    return {r.id: r for r in rows}


def _draw(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """`count` rows drawn by seed, in their own order; 0 takes all."""
    if not count or count >= len(examples):
        return list(examples)
    chosen = np.random.Generator(np.random.PCG64([seed, 3])).permutation(len(examples))[:count]
    return [examples[i] for i in sorted(chosen)]


def _draw_questions(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """The first row of each question, `count` of them drawn by seed."""
    if count <= 0:
        return []
    return _draw(list({e.question_id: e for e in reversed(examples)}.values())[::-1], count, seed)


def _settings_of(folder: Path) -> Config:
    """The run's own settings; an adapter from elsewhere has none and gets the defaults."""
    for place in (folder, folder.parent):
        if (place / "config.yaml").is_file():
            return parse(Config, yaml_file=place / "config.yaml")
    return Config()


def _as_json(p: Paired) -> dict[str, Any]:
    return asdict(p) | {"ci95": list(p.ci95)}


def _hash_rows(examples: Sequence[Example]) -> str:
    rows = [[e.id, [[m.role, m.content] for m in e.messages]] for e in examples]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()


def _hash_file(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _version() -> str:
    from .. import __version__

    return __version__
