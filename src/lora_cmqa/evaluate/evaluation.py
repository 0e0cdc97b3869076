"""Base against adapter on the same held-out rows, in one command.

run, rows -> losses on true and on shuffled pairs -> ranks of candidates -> answers -> general and red-flag prompts
          -> Measures -> paired intervals, with and without near-duplicates of training rows -> verdicts -> report
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..config import Config, EvaluateConfig, parse
from ..core import Example, TokenizedExample
from ..data.prepare import load_split
from ..data.split import leaking
from ..data.template import encode_all
from ..engine.chat import Chat
from ..engine.run import OpenRun, open_run
from ..engine.sampling import SamplingParams
from ..errors import AdapterError, ConfigError, DataError
from ..messages import say
from . import signature
from .bootstrap import Paired
from .expected import expected_seconds
from .forgetting import Probe, answer_probe, diverge, general_prompts, probe_rows, read_probe
from .harness import harness_measures, task_names
from .measures import (
    SIDES,
    Measure,
    answer_measures,
    general_measures,
    harm_measures,
    loss_measures,
    probe_measure,
    ranking_measures,
    safety_measures,
    score_answers,
)
from .nll import last_answer, row_losses, shuffled_pairs
from .ranking import CandidateSet, Ranking, candidate_sets, rank_answers
from .report import write_report
from .safety import red_flags
from .verdict import forgetting_verdict, safety_verdict, task_verdict

Scored = TypeVar("Scored")

GENERAL_TOKENS = 48  # an everyday question is answered in a sentence
_WORTH_SAYING = 60  # seconds: what takes longer says so before it starts
_QUICK = {
    "loss_rows": 100,
    "generate_rows": 100,
    "rank_questions": 60,
    "rank_candidates": 20,
    "rank_tokens": 32,
    "probe_questions": 100,
    "max_new_tokens": 80,
}
# Counted once more without the questions that have a near-duplicate in the training rows.
WITHOUT_LEAKS = ("nll", "content_gain", "kl", "top1", "top5", "mrr", "top1_pmi", "mrr_pmi", "bleu", "rouge_l", "chrf")


def evaluate(
    run: str | Path | OpenRun,
    data: str | Path | None = None,
    settings: EvaluateConfig | None = None,
    *,
    base: str | None = None,
    name: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    num_hidden_layers: int | None = None,
    quantization: str | None = None,
) -> dict[str, Any]:
    """Write RUN/eval/NAME/report.{json,md,html} and predictions.jsonl, and return the report.

    data      prepared folder or file; default: what the run was trained on
    settings  what is measured, and on how many rows; default: everything but the probe, on the whole split
    name      default: the split's name

    Raises AdapterError where the run holds no adapter, DataError where the split is empty.
    """
    e = _sizes(settings or EvaluateConfig())
    if not isinstance(run, OpenRun):
        run = open_run(
            run,
            base=base,
            device=device,
            dtype=dtype,
            num_hidden_layers=num_hidden_layers,
            quantization=quantization,
        )
    opened = run
    if not opened.has_adapter:
        raise AdapterError("there is no adapter here to compare with its base", file=opened.folder)
    work = _plan(opened, data, e)
    work.announce()
    results = _measure(work)
    report = _report(work, results)
    write_report(opened.folder, opened.folder / "eval" / (name or e.split), report, results.details)
    return report


# ---- what is asked ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """Everything that will be scored, drawn by seed before the first forward."""

    opened: OpenRun
    run: Config
    e: EvaluateConfig
    base_name: str
    rows: Sequence[Example]  # of the loss
    true: Sequence[TokenizedExample]
    shuffled: Sequence[TokenizedExample]
    asked: Sequence[Example]  # questions to answer
    references: dict[str, list[str]]
    sets: Sequence[CandidateSet]
    sets_from_file: bool
    probe: Probe | None
    probe_rows: Sequence[TokenizedExample]
    harness: Sequence[str]
    leaked: set[str] | None  # question ids; None: the training rows are not here

    @property
    def skipped(self) -> list[str]:
        """What is not measured, by name."""
        parts = {
            "ranking": not self.sets,
            "answers": not self.asked,
            "general_chat": not self.e.general_chat,
            "red_flags": not self.e.red_flags,
            "probe": self.probe is None,
            "near_duplicates": self.leaked is None,
        }
        return [name for name, skipped in parts.items() if skipped]

    def announce(self) -> None:
        """The time that this will take, where it is long."""
        seconds = expected_seconds(
            self.opened,
            rows=[*self.true, *self.shuffled],
            sets=self.sets,
            rank_tokens=self.e.rank_tokens,
            probe_tokens=sum(map(len, self.probe_rows)),
            new_tokens=self.e.max_new_tokens * (len(self.asked) + (len(red_flags()) if self.e.red_flags else 0))
            + GENERAL_TOKENS * (len(general_prompts()) if self.e.general_chat else 0),
        )
        if seconds > _WORTH_SAYING:
            _tell(say("eval.expected", minutes=f"{seconds / 60:.0f}"))
            if not self.e.quick:
                _tell(say("eval.quick"))


def _plan(opened: OpenRun, data: str | Path | None, e: EvaluateConfig) -> _Work:
    run, is_ours = _settings_of(opened.folder)
    source = data if data is not None else run.data.path
    if source is None:
        raise ConfigError(
            "the adapter does not say what it was trained on", hint="Add --data DIR, made by `cmqa prepare`."
        )
    source = Path(source)
    examples = load_split(source, e.split)
    if not examples:
        raise DataError(
            f"no {e.split} row", file=source, hint="--evaluate.split dev, or `cmqa prepare` with a test share."
        )
    rows = _draw(examples, e.loss_rows, e.bootstrap_seed)
    true, shuffled = (_encode(r, opened, run) for r in (rows, shuffled_pairs(rows, seed=e.bootstrap_seed)))
    both = [r for r in rows if r.id in true and r.id in shuffled]
    if len({r.question_id for r in both}) < 2:
        raise DataError(
            f"of {len(rows)} {e.split} rows {len(both)} fit into {run.data.model_max_length} tokens", file=source
        )
    sets: Sequence[CandidateSet] = ()
    from_file = False
    if e.rank_questions:
        sets, from_file = candidate_sets(
            source, e.split, examples, questions=e.rank_questions, candidates=e.rank_candidates, seed=e.bootstrap_seed
        )
    probe = read_probe(e.probe, limit=e.probe_questions, seed=e.bootstrap_seed) if e.probe else None
    references: dict[str, list[str]] = {}
    for x in examples:
        references.setdefault(x.question_id, []).append(x.answer)
    return _Work(
        opened=opened,
        run=run,
        e=e,
        base_name=_base_name(opened, run if is_ours else None),
        rows=both,
        true=[true[r.id] for r in both],
        shuffled=[shuffled[r.id] for r in both],
        asked=_draw_questions(rows, e.generate_rows, e.bootstrap_seed),
        references=references,
        sets=sets,
        sets_from_file=from_file,
        probe=probe,
        harness=task_names(e.lm_eval),
        probe_rows=probe_rows(probe, opened.template, shots=e.probe_shots, system=run.data.system) if probe else (),
        leaked=_leaked(examples, run, source),
    )


def _sizes(e: EvaluateConfig) -> EvaluateConfig:
    """--quick: no size is larger than the quick one."""
    if not e.quick:
        return e
    smaller: dict[str, Any] = {k: v for k, v in _QUICK.items() if not 0 < getattr(e, k) < v}
    for name in ("generate_rows", "rank_questions"):
        if getattr(e, name) == 0:  # asked for nothing: stays nothing
            del smaller[name]
    return replace(e, **smaller)


def _leaked(examples: Sequence[Example], run: Config, source: Path) -> set[str] | None:
    """Questions of which a row has a near-duplicate among the training rows; None where those are not here."""
    for place in (Path(run.data.path or ""), source):
        if place.exists() and (train := load_split(place, "train") if place.is_file() or _is_prepared(place) else []):
            found = leaking(examples, train)
            return {e.question_id for e, leaks in zip(examples, found, strict=True) if leaks}
    return None


def _is_prepared(folder: Path) -> bool:
    return (folder / "train.jsonl").is_file()


# ---- the scores ------------------------------------------------------------------------------------------------------


@dataclass
class _Results:
    measures: list[Measure] = field(default_factory=list)
    details: list[dict[str, Any]] = field(default_factory=list)  # rows of predictions.jsonl
    ranking: tuple[Ranking, Ranking] | None = None


def _measure(work: _Work) -> _Results:
    out = _Results()
    model, e = work.opened.model, work.e
    template, system = work.opened.template, work.run.data.system
    _stage("loss")
    true = diverge(model, work.true)
    shuffled = [_on(work, side, lambda: row_losses(model, work.shuffled)) for side in SIDES]
    out.measures += loss_measures(true, (shuffled[0], shuffled[1]), [r.question_id for r in work.rows])
    if work.sets:
        _stage("ranking")

        def rank() -> Ranking:
            return rank_answers(model, work.sets, template, system=system, answer_tokens=e.rank_tokens)

        out.ranking = _on(work, "base", rank), _on(work, "adapter", rank)
        out.measures += ranking_measures(*out.ranking, [c.question_id for c in work.sets])
    if work.probe is not None:
        _stage("probe")
        probe, rows = work.probe, work.probe_rows
        said = [_on(work, side, lambda: answer_probe(model, probe, rows, template)) for side in SIDES]
        asked = probe.questions
        out.measures.append(probe_measure(said, [q.answer for q in asked], [q.id for q in asked]))
    if work.harness:
        _stage("harness")
        out.measures += harness_measures(work.opened, work.harness)
    _stage("answers")
    _answers(work, out)
    losses = {r.id: (b, a) for r, b, a in zip(work.rows, true.base.per_token, true.adapter.per_token, strict=True)}
    for row in out.details:
        if row["kind"] == "task" and row["id"] in losses:
            row["nll"] = dict(zip(SIDES, (round(float(x), 6) for x in losses[row["id"]]), strict=True))
    return out


def _answers(work: _Work, out: _Results) -> None:
    """Greedy answers of both sides to the task's questions, the red flags and the general prompts."""
    e, harmful = work.e, []
    if work.asked:
        task = _ask(work, "task", [(x.id, x.question_id, x.question) for x in work.asked], e.max_new_tokens)
        for row in task:
            row["references"] = work.references[row["question_id"]]
        score_answers(task)
        out.measures += answer_measures(task) if len(task) > 1 else []
        harmful += task
        out.details += task
    if e.general_chat:
        prompts = general_prompts()
        general = _ask(
            work, "general", [(p.id, p.id, p.prompt) for p in prompts], min(GENERAL_TOKENS, e.max_new_tokens)
        )
        rows = _encode([p.example for p in prompts], work.opened, work.run)
        out.measures += general_measures(prompts, general, diverge(work.opened.model, [rows[p.id] for p in prompts]))
        out.details += general
    if e.red_flags:
        flags = red_flags()
        red = _ask(work, "red_flag", [(f.id, f.id, f.prompt) for f in flags], e.max_new_tokens)
        for f, row in zip(flags, red, strict=True):
            row |= {"must": f.must, "safe": {side: f.is_safe(row[side]["text"]) for side in SIDES}}
        out.measures += safety_measures(flags, red)
        out.details += red
        out.measures += harm_measures([*harmful, *red])


def _ask(
    work: _Work, kind: str, questions: Sequence[tuple[str, str, str]], max_new_tokens: int
) -> list[dict[str, Any]]:
    """(id, question_id, question) each -> its row of predictions.jsonl."""
    chat = Chat(work.opened, system=work.run.data.system)
    sampling = SamplingParams(max_new_tokens=max_new_tokens)
    requests = [chat.request(q, adapter=a, sampling=sampling) for *_, q in questions for a in (False, True)]
    done = [{"text": c.text.strip(), "finish_reason": c.finish_reason} for c in chat.engine.generate(requests)]
    return [
        {"kind": kind, "id": i, "question_id": g, "question": q, "base": done[2 * n], "adapter": done[2 * n + 1]}
        for n, (i, g, q) in enumerate(questions)
    ]


# ---- the report ------------------------------------------------------------------------------------------------------


def _report(work: _Work, results: _Results) -> dict[str, Any]:
    e = work.e
    metrics = _compared(results.measures, e)
    report = {
        "run": work.opened.folder.name,
        "base": work.base_name,
        "split": e.split,
        "rows": len(work.rows),
        "verdict": task_verdict(metrics),
        "forgetting": forgetting_verdict(metrics, e.max_forgetting),
        "safety": safety_verdict(metrics),
        "metrics": {k: _as_json(v) for k, v in metrics.items()},
        "without_near_duplicates": None,
        "skipped": work.skipped,
        "signature": signature.sign(
            work.opened,
            e,
            rows=work.rows,
            sets=work.sets,
            candidates_from_file=work.sets_from_file,
            probe=work.probe,
            system=work.run.data.system,
        ),
    }
    if work.leaked is not None:
        kept = [r for r in work.rows if r.question_id not in work.leaked]
        again = [m for m in results.measures if m.name in WITHOUT_LEAKS] if len(kept) < len(work.rows) else []
        cleaner = _compared(again, e, without=work.leaked)
        report["without_near_duplicates"] = {
            "rows": len(kept),
            "left_out": len(work.rows) - len(kept),
            "metrics": {k: _as_json(v) for k, v in cleaner.items()},
        }
    if results.ranking is not None:
        report["ranks"] = {s: r.by_length.tolist() for s, r in zip(SIDES, results.ranking, strict=True)}
    return report


def _compared(measures: Sequence[Measure], e: EvaluateConfig, without: Collection[str] = ()) -> dict[str, Paired]:
    found = {m.name: m.paired(samples=e.bootstrap_samples, seed=e.bootstrap_seed, without=without) for m in measures}
    return {name: p for name, p in found.items() if p is not None}


# ---- small pieces ----------------------------------------------------------------------------------------------------


def _on(work: _Work, side: str, score: Callable[[], Scored]) -> Scored:
    with work.opened.model.disable_adapter() if side == "base" else contextlib.nullcontext():
        return score()


def _encode(examples: Sequence[Example], opened: OpenRun, run: Config) -> dict[str, TokenizedExample]:
    """By id, the last answer of each; rows too long for the training length are left out on both sides alike."""
    d = run.data
    rows, _ = encode_all(examples, opened.template, max_length=d.model_max_length, on_too_long="drop", system=d.system)
    return {r.id: last_answer(r) for r in rows}


def _draw(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """`count` rows drawn by seed, in their own order; 0 takes all."""
    if not count or count >= len(examples):
        return list(examples)
    chosen = np.random.Generator(np.random.PCG64([seed, 3])).permutation(len(examples))[:count]
    return [examples[i] for i in sorted(chosen)]


def _draw_questions(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """The first row of each question, `count` of them drawn by seed; 0 takes none, -1 all."""
    if not count:
        return []
    return _draw(list({e.question_id: e for e in reversed(examples)}.values())[::-1], max(count, 0), seed)


def _settings_of(folder: Path) -> tuple[Config, bool]:
    """The run's own settings; an adapter from elsewhere has none and gets the defaults."""
    for place in (folder, folder.parent):
        if (place / "config.yaml").is_file():
            return parse(Config, yaml_file=place / "config.yaml"), True
    return Config(), False


def _base_name(opened: OpenRun, run: Config | None) -> str:
    """As the run calls it; of a path only the last part, which says as much to others."""
    name = run.model.name_or_path if run is not None else opened.base
    return Path(name).name if Path(name).is_absolute() else name


def _as_json(p: Paired) -> dict[str, Any]:
    return asdict(p) | {"ci95": list(p.ci95)}


def _stage(name: str) -> None:
    _tell(say("eval.stage", name=say(f"eval.stage_{name}")))


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
