"""From rows to an adapter, and on from wherever it was stopped.

rows -> tokens -> stream of batches -> [ step -> metrics line -> dev loss -> checkpoint ]* -> adapter

The run folder is complete in itself; running the same command again resumes it, and a finished run is left as it is.
After each step, in this order: the step's line, the dev loss when it is due, the checkpoint when it is due, and only
then a signal is obeyed. The base's own dev loss (step 0) is taken with the adapter off after the first step, so that
nobody waits for it to see a run begin. A checkpoint knows what was evaluated, so a resume repeats nothing and skips
nothing.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..config import Config, as_flat_dict, bytes_of
from ..core import Batch, Example, Pack, StepMetrics, TokenizedExample
from ..data.pack import pack
from ..data.prepare import load_split
from ..data.stream import BatchStream, rows_sha256
from ..data.template import ChatTemplate, EncodeReport
from ..data.token_cache import encode_cached
from ..errors import ConfigError, DataError, Interrupted, ResourceError, RunError
from ..kernels.compiled import bound_compiled_products
from ..kernels.head import CHUNK
from ..kernels.table import check_kernels, chosen_ways, say_passed_over
from ..lora.adapter import WEIGHTS, adapter_files
from ..lora.decoder import checkpoint_activations, token_losses, why_plain
from ..lora.fingerprint import FILE as FINGERPRINT
from ..lora.fingerprint import check_fingerprint
from ..lora.inject import QWEN_V1_NAMES, inject_lora, lora_parameters
from ..lora.tokens import choose_tokens
from ..messages import say
from ..models.cache import cache_root
from ..models.load import base_name, chat_format, load_model, pick_device, pick_dtype, resolve
from ..models.quantized import parameters_of, quantization_of
from .checkpoint import BEST, load_checkpoint, newest_whole, restore_rng_state, save_checkpoint
from .commit import check_space, disk_errors, remove_leftovers, write_file
from .deterministic import deterministic_kernels
from .dev_ranking import DevRanking, dev_ranking
from .fit import Readings, checked, fitted, has_ample_memory, was_checked
from .memory import memory_limit, peak_memory_bytes, read_mapped_weights
from .model_card import model_card
from .optim import Schedule, adamw, warmup_steps_of
from .plain_peft import commands_for_plain_peft
from .plan import MAX_TOKENS
from .run_folder import (
    CARD,
    CUTS,
    METRICS,
    RunLock,
    check_same_config,
    environment,
    forget_unborn_start,
    is_finished,
    open_run_folder,
    read_cuts,
    same_environment,
    stored_dtype,
    stored_kernels,
    write_adapter,
    write_companions,
    write_cuts,
    write_settings,
    write_state,
)
from .step import StepResult, backward_that_fits, train_step
from .tracking import (
    DevMetrics,
    LossSpikes,
    MetricsFile,
    Progress,
    TensorBoard,
    check_trackers,
)

HINT = "Make room, or the folder writable, and run the same command again: it goes on from the last checkpoint."


def train(config: Config) -> Path:
    """Train an adapter as `config` says and return its run folder; the same call again resumes it.

    A finished run of the same settings returns at once and no byte of it changes.
    Raises ConfigError, DataError, ModelError, RunError for bad input; ResourceError when the disk is full or
    read-only or single rows do not fit the memory; Interrupted after SIGINT or SIGTERM, with a checkpoint.
    """
    if not config.train.output_dir:
        raise ConfigError("no --output-dir", hint="cmqa train --model M --data DIR --output-dir runs/NAME")
    if not config.data.path:
        raise ConfigError("no --data", hint="cmqa prepare SRC --out DIR, then --data DIR")
    check_trackers(config.train.report_to)
    limit = bytes_of(config.train.memory_limit, "memory-limit") if config.train.memory_limit else None
    folder = Path(config.train.output_dir)
    started_before = check_same_config(folder, config)
    if started_before and is_finished(folder):
        _tell(say("train.already_done", run=folder))
        return folder
    open_run_folder(folder)
    threads = torch.get_num_threads()
    try:
        with (
            disk_errors(f"the run in {folder} cannot be written", HINT),
            RunLock(folder),
            deterministic_kernels(config.train.deterministic),
            memory_limit(limit, pick_device(config.model.device)),
        ):
            _start(config, folder).go()
    finally:
        torch.set_num_threads(threads)
    return folder


def train_steps(
    model: Any,
    stream: BatchStream,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    *,
    max_grad_norm: float = 1.0,
    head_chunk: int = CHUNK,
    on_bad_step: Callable[[Batch, StepResult], None] | None = None,
    on_recut: Callable[[int, int], None] | None = None,
    after_forward: Callable[[Pack], None] = lambda _: None,
) -> Iterator[StepMetrics]:
    """Train what requires a gradient in `model` on the batches of `stream`; yields after each optimizer step.

    Between two steps the caller may evaluate, save (`stream.state` is the place) or stop.
    A step whose loss or gradient is not finite changes nothing; `on_bad_step` hears of it before it is yielded.
    When the memory runs out, `stream.cuts` has one more for good; `on_recut(step, max_tokens)` hears of it, then the
    step goes on. Raises ResourceError when single rows do not fit. `after_forward` hears of each pack (step.py).
    """
    device = next(model.parameters()).device
    for batch, _ in stream:
        started = time.perf_counter()
        rate = schedule.learning_rate_at(batch.step)

        cut = [batch]  # what is computed counts, and with shared prefixes a smaller cut computes more

        def recut(max_tokens: int, cut: list[Batch] = cut) -> Batch:
            cut.append(stream.recut(max_tokens))
            if on_recut is not None:
                on_recut(cut[-1].step, max_tokens)
            return cut[-1]

        result = train_step(
            model,
            batch,
            optimizer,
            learning_rate=rate,
            max_grad_norm=max_grad_norm,
            head_chunk=head_chunk,
            recut=recut,
            after_forward=after_forward,
        )
        if not result.is_finite and on_bad_step is not None:
            on_bad_step(batch, result)
        yield StepMetrics(
            step=batch.step,
            epoch=round(batch.epoch, 6),
            loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rate=rate,
            tokens=cut[-1].tokens,
            supervised_tokens=batch.supervised_tokens,
            world_size=stream.world_size,
            time=_time(started, cut[-1].tokens, device),
        )


def dev_loss(model: Any, packs: Sequence[Pack], *, stop: Callable[[], bool] = lambda: False) -> float | None:
    """Loss per answer token over `packs`, in nats, without dropout; None when `stop` said so on the way."""
    model.eval()
    total, tokens = 0.0, 0
    for p in packs:
        if stop():
            return None
        total += float(token_losses(model, p).double().sum())
        tokens += p.supervised_tokens
    return total / tokens


def _time(started: float, tokens: int, device: torch.device) -> dict[str, Any]:
    seconds = time.perf_counter() - started
    return {
        "seconds": round(seconds, 4),
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        "peak_memory_bytes": peak_memory_bytes(device),
    }


# ---- one run -----------------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """A run between its start and its end. `best_step`, `evaluated_step` and `bad_in_a_row` go into checkpoints."""

    config: Config
    folder: Path
    model: Any
    base: str
    stream: BatchStream
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    dev_packs: tuple[Pack, ...]
    dev_rows_sha256: str
    dev_ranking: DevRanking | None
    companions: dict[str, Path]
    step: int = 0
    epoch: float = 0.0
    best_step: int | None = None
    best_score: float = math.inf  # the lower the better: dev loss, or MRR with its sign turned
    since_best: int = 0  # evaluations
    evaluated_step: int = -1  # the last; 0 is the base
    bad_in_a_row: int = 0
    tokens: int = 0
    rng: dict[str, str | None] | None = None  # of the checkpoint that is resumed
    readings: Readings | None = None  # of the memory, until the first step has been compared with the plan
    signals: _StopSignals = field(default_factory=lambda: _StopSignals())

    def go(self) -> None:
        t = self.config.train
        started, first = time.perf_counter(), self._resume()
        with self.signals, Progress(self.stream.total_steps, first, t.logging_steps) as self.progress:
            self.metrics = MetricsFile(self.folder / METRICS, cut_after=first or -1)
            self.spikes = LossSpikes(self.metrics.losses)
            self.board = TensorBoard(self.folder / "tensorboard", after=first) if t.report_to else None
            self._set_random_state()
            try:
                self._steps()
            except ResourceError:
                self._forget_cuts_of_a_step_not_made()
                raise
            finally:
                self.metrics.close()
                if self.board is not None:
                    self.board.close()
        self._finish(self.step - first, time.perf_counter() - started)

    def _set_random_state(self) -> None:
        """Last before the first step: what is set up before it may draw."""
        if self.rng is None:
            torch.manual_seed(self.config.train.seed)  # the GPUs' too
        else:
            restore_rng_state(self.rng, self.device)

    def _steps(self) -> None:
        if self.step == 0 and not was_checked(self.folder):
            read_mapped_weights(self.model)
            self.readings = Readings.begin(self.device)
            if not has_ample_memory(self.folder, self.device):
                self._try_the_fullest(self.readings)
        self._evaluate_what_is_due()  # a signal may have come before it could be made
        self._obey_signal()
        t = self.config.train
        if self._has_stalled():  # stopped early, and killed before the end was written
            return
        for m in train_steps(
            self.model,
            self.stream,
            self.optimizer,
            self.schedule,
            max_grad_norm=t.max_grad_norm,
            head_chunk=t.head_chunk or CHUNK,
            on_bad_step=self._bad_step,
            on_recut=self._recut,
            after_forward=lambda p: self.readings.forward_is_done(p) if self.readings is not None else None,
        ):
            self.step, self.epoch = m.step, m.epoch
            self._compare_memory()
            self.tokens += m.tokens
            if math.isfinite(m.loss) and math.isfinite(m.grad_norm):
                self.bad_in_a_row = 0
            self.metrics.write(m)
            self.progress.step(m)
            if (usual := self.spikes.see(m.loss)) is not None:
                self.progress.print(say("train.loss_spike", step=m.step, loss=f"{m.loss:.4f}", usual=f"{usual:.4f}"))
            if self.board is not None and m.step % t.logging_steps == 0:
                self.board.write(m)
            self._evaluate_what_is_due()
            if self._is_due(t.save_steps) or self.signals.received or self._has_stalled():
                self._save()
            if self._has_stalled():
                say_so = say("train.stopped_early", step=m.step, metric=t.metric_for_best_model, count=self.since_best)
                self.progress.print(say_so)
                return
            self._obey_signal()

    def _try_the_fullest(self, readings: Readings) -> None:
        """The run's fullest micro-batch, forward and backward, before all others: what does not fit is cut now, and
        memory is read. Its gradient is thrown away and the random state put back, so no result depends on it."""
        self.model.train()

        def recut(max_tokens: int) -> Batch:
            self.stream.cuts.append((1, max_tokens))
            self._recut(self.step, max_tokens)
            return self.stream.largest()

        chunk, cuda = self.config.train.head_chunk or CHUNK, self.device.type == "cuda"
        with torch.random.fork_rng([self.device] if cuda else []):
            fullest = self.stream.largest()
            backward_that_fits(self.model, fullest, self.optimizer, chunk, recut, readings.forward_is_done)
        self.optimizer.zero_grad()
        readings.note_peak()

    def _compare_memory(self) -> None:
        """Once, after the first step: predicted beside measured."""
        if self.readings is None:
            return
        self.readings.note_peak()
        precision = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        told = checked(self.config, self.folder, precision, self.readings)
        self.readings = None
        if told:
            self.progress.print(told)

    def _is_due(self, every: int) -> bool:
        """Every so many steps, or at the end of each epoch (0); always after the last step."""
        interval = every or self.stream.steps_per_epoch
        return self.step == self.stream.total_steps or (self.step > 0 and self.step % interval == 0)

    def _evaluate_what_is_due(self) -> None:
        """After the first step also the base alone: it is what all others are compared with."""
        if not self.dev_packs or self.step == 0:
            return
        if self.evaluated_step < 0:
            with self.model.disable_adapter():
                self._evaluate(0, 0.0)
        if self._is_due(self.config.train.eval_steps) and 0 <= self.evaluated_step < self.step:
            self._evaluate(self.step, self.epoch)

    def _evaluate(self, step: int, epoch: float) -> None:
        started = time.perf_counter()
        loss = dev_loss(self.model, self.dev_packs, stop=lambda: bool(self.signals.received))
        ranked: tuple[float | None, float | None] | None = (None, None)
        if self.dev_ranking is not None and loss is not None:
            ranked = self.dev_ranking.measure(self.model, stop=lambda: bool(self.signals.received))
        if loss is None or ranked is None:  # the resumed run makes it first of all
            return
        self.evaluated_step = step
        tokens = sum(p.tokens for p in self.dev_packs)
        spent = _time(started, tokens, self.device)
        m = DevMetrics(step, epoch, loss, tokens, spent, *ranked)
        score = loss if self._goes_by_loss else -(m.dev_mrr or 0.0)
        is_best = step > 0 and score < self.best_score  # the base is no adapter
        self.since_best = 0 if is_best or step == 0 else self.since_best + 1
        if is_best:
            self.best_step, self.best_score = step, score
            write_adapter(self.folder, self._adapter_files())
        self.metrics.write(m)
        self.progress.dev(m, is_best)
        if self.board is not None:
            self.board.write(m)

    @property
    def device(self) -> torch.device:
        where: torch.device = next(self.model.parameters()).device
        return where

    @property
    def _goes_by_loss(self) -> bool:
        return self.config.train.metric_for_best_model == "dev_loss"

    @property
    def _best_metric(self) -> float:
        """As people read it: the loss, or the MRR."""
        return self.best_score if self._goes_by_loss else -self.best_score

    def _has_stalled(self) -> bool:
        return 0 < self.config.train.early_stopping_patience <= self.since_best

    def _adapter_files(self) -> dict[str, bytes]:
        return adapter_files(self.model, base_model_name_or_path=self.base)

    def _obey_signal(self) -> None:
        if not self.signals.received or self.step == self.stream.total_steps:
            return
        raise Interrupted(
            f"stopped by {signal.Signals(self.signals.received).name} after step {self.step} of "
            f"{self.stream.total_steps}" + (", with a checkpoint" if self.step else ""),
            signal_number=self.signals.received,
            hint="Run the same command again: it goes on from there.",
        )

    def _recut(self, step: int, max_tokens: int) -> None:
        """On the disk before the step goes on: a resume that makes it once more cuts it alike."""
        write_cuts(self.folder, self.stream.cuts)
        if self.readings is not None:
            self.readings.start_over()
        self.progress.print(say("train.recut", step=step, max_tokens=max_tokens))

    def _forget_cuts_of_a_step_not_made(self) -> None:
        """Single rows did not fit: whoever gives the run more memory gets no smaller cut than it then needs."""
        made = [cut for cut in self.stream.cuts if cut[0] <= self.step]
        if len(made) < len(self.stream.cuts):
            write_cuts(self.folder, made)

    def _bad_step(self, batch: Batch, result: StepResult) -> None:
        folder = self.folder / "bad-batches"
        folder.mkdir(exist_ok=True)
        file = folder / f"step-{batch.step}.json"
        content = {"step": batch.step, "loss": str(result.loss), "grad_norm": str(result.grad_norm)}
        text = json.dumps(content | {"rows": list(batch.example_ids)}, indent=2, ensure_ascii=False) + "\n"
        write_file(file, text.encode())
        self.progress.print(say("train.bad_batch", step=batch.step, file=file))
        self.bad_in_a_row += 1
        if self.bad_in_a_row > self.config.train.max_bad_steps:
            raise RunError(
                f"{self.bad_in_a_row} steps in a row had a loss or a gradient that is not finite; nothing of them was "
                "applied, and their rows are named there",
                file=folder,
                hint="A smaller --learning-rate with a new --output-dir, --model.dtype float32, or a look at the rows.",
            )

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def _save(self) -> None:
        self.metrics.sync()
        best_elsewhere = self.best_step not in (None, self.step)
        save_checkpoint(
            self.folder,
            self.model,
            self.optimizer,
            self.schedule,
            data_state=self.stream.state,
            trainer_state=self._state(),
            training_args=as_flat_dict(self.config),
            base_model_name_or_path=self.base,
            companions=self.companions | ({BEST: self.folder / WEIGHTS} if best_elsewhere else {}),
            save_total_limit=self.config.train.save_total_limit,
        )
        if not self.dev_packs:
            write_adapter(self.folder, self._adapter_files())

    def _state(self) -> dict[str, Any]:
        return {
            "global_step": self.step,
            "max_steps": self.stream.total_steps,
            "epoch": self.epoch,
            "best_global_step": self.best_step,
            "best_metric": self._best_metric if self.best_step else None,  # of metric_for_best_model
            "evaluated_step": self.evaluated_step,
            "evaluations_since_best": self.since_best,
            "dev_rows_sha256": self.dev_rows_sha256,
            "bad_steps_in_a_row": self.bad_in_a_row,
            "tokens": self.tokens,
            "max_tokens": self.stream.max_tokens_at(self.step),  # smaller than the setting once the memory ran out
        }

    def _resume(self) -> int:
        """Put everything back as the newest whole checkpoint has it; the step it stands at, 0 at a first start."""
        remove_leftovers(self.folder)
        self.stream.cuts = read_cuts(self.folder)
        found, damaged = newest_whole(self.folder)
        for reason in damaged:
            _tell(say("train.passed_over", reason=reason))
        if found is None:
            return 0
        stored = load_checkpoint(found, self.model, self.optimizer, self.schedule)
        self.stream.resume(stored.data_state)
        s, self.rng = stored.trainer_state, stored.rng_state
        if s["dev_rows_sha256"] != self.dev_rows_sha256:
            raise RunError(
                "the dev rows are not those this run was measured on until now",
                file=self.folder,
                hint="Train into another --output-dir.",
            )
        if s["max_tokens"] != self.stream.max_tokens_at(stored.step):
            raise RunError(
                f"it does not tell that micro-batches were cut to {s['max_tokens']} tokens by step {stored.step}, when "
                "the memory had run out",
                file=self.folder / CUTS,
                hint="Start anew with another --output-dir.",
            )
        self.step, self.epoch, self.tokens = stored.step, s["epoch"], s["tokens"]
        self.best_step, self.evaluated_step = s["best_global_step"], s["evaluated_step"]
        self.since_best = s["evaluations_since_best"]
        if self.best_step:
            self.best_score = s["best_metric"] if self._goes_by_loss else -s["best_metric"]
        self.bad_in_a_row = s["bad_steps_in_a_row"]
        if self.best_step:  # a later best may have been written before the run was killed
            best = (found / (WEIGHTS if self.best_step == self.step else BEST)).read_bytes()
            write_adapter(self.folder, self._adapter_files() | {WEIGHTS: best})
        _tell(say("train.resumed", checkpoint=found))
        return self.step

    # ---- the end -------------------------------------------------------------------------------------------------

    def _finish(self, steps: int, seconds: float) -> None:
        if not self.best_step:
            write_adapter(self.folder, self._adapter_files())
        measured = (
            [f"best {self.config.train.metric_for_best_model} | {self._best_metric:.4f}, step {self.best_step}"]
            if self.best_step
            else []
        )
        card = model_card(self.config, self.base, first=commands_for_plain_peft(self.config.model), measured=measured)
        write_file(self.folder / CARD, card.encode())
        state = self._state() | {
            "adapter": "best on dev" if self.best_step else "last",
            "adapter_step": self.best_step or self.step,
            "finished": True,
        }
        write_state(self.folder, state)
        metric, value = self.config.train.metric_for_best_model, f"{self._best_metric:.4f}"
        best = say("train.which_best", step=self.best_step, metric=metric, value=value)
        _tell(
            say(
                "train.done",
                steps=steps,
                minutes=f"{seconds / 60:.1f}",
                which=best if self.best_step else say("train.which_last"),
            )
        )
        if commands := commands_for_plain_peft(self.config.model, self.folder):
            _tell("\n  ".join((say("train.plain_peft"), *commands)))


class _StopSignals:
    """SIGINT and SIGTERM only ask; the run answers after its step. A second one changes nothing."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
        if threading.current_thread() is threading.main_thread():  # elsewhere the caller handles signals
            self._before = {s: signal.signal(s, self._remember) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: Any) -> None:
        self.received = self.received or number


def _tell(text: str) -> None:
    print(text, file=sys.stderr)


# ---- what a run is made of ---------------------------------------------------------------------------------------


def _start(config: Config, folder: Path) -> _Run:
    """Read, encode, load, inject: everything that a first start and a resume do alike."""
    m, d, t, asked = config.model, config.data, config.train, config
    forget_unborn_start(folder)
    device = pick_device(m.device)
    wanted = "bfloat16" if t.bf16 and m.dtype == "auto" else m.dtype
    dtype = pick_dtype(stored_dtype(folder) or wanted if wanted == "auto" else wanted, device)
    bound_compiled_products()  # before the first product, which the self-check makes
    passed_over = check_kernels(device, dtype, m.quantization, stored=stored_kernels(folder))
    now = environment(device, dtype, m.quantization) | {"kernels": chosen_ways(m.quantization)}
    same_environment(folder, now, anyway=t.resume == "anyway")
    say_passed_over(passed_over, device, dtype, m.quantization)
    train_examples, dev_examples = _read_rows(config)
    config, told = fitted(config, folder, device, train_examples)
    if told:
        _tell(told)
    t = config.train
    precision = str(dtype).removeprefix("torch.")
    model, tokenizer = load_model(
        m.name_or_path,
        dtype=precision,
        device=str(device),
        num_hidden_layers=m.num_hidden_layers,
        quantization=m.quantization,
    )
    template = ChatTemplate.from_tokenizer(tokenizer, d.chat_template)
    rows = _encode(train_examples, "train", config, template)
    dev_rows = _encode(dev_examples, "dev", config, template) if dev_examples else []
    _announce_modules_to_save(model, config.lora.modules_to_save)
    tokens, told = choose_tokens(
        config.lora.trainable_tokens, model, tokenizer, template, chat_format=chat_format(resolve(m.name_or_path))
    )
    if told:
        _tell(told)
    model = _inject(model, config, tokens)
    if t.gradient_checkpointing:
        checkpoint_activations(model, t.checkpoint_layers or None)
    stream = BatchStream(
        rows,
        rows_per_step=t.per_device_train_batch_size * t.gradient_accumulation_steps,
        max_tokens=t.max_tokens or MAX_TOKENS,
        num_train_epochs=t.num_train_epochs,
        max_steps=t.max_steps,
        seed=t.seed,
        shared_prefixes=_shares_prefixes(config),
    )
    warmup = warmup_steps_of(stream.total_steps, warmup_steps=t.warmup_steps, warmup_ratio=t.warmup_ratio)
    parameters = lora_parameters(model)
    check_space(folder, 4 * sum(p.numel() * p.element_size() for p in parameters.values()))  # a checkpoint, the adapter
    if (folder / FINGERPRINT).exists():
        check_fingerprint(folder, m.name_or_path)
    ranking = _dev_ranking(config, dev_examples, template)
    base = base_name(m.name_or_path)
    write_settings(folder, asked)
    return _Run(
        config=config,
        folder=folder,
        model=model,
        base=base,
        stream=stream,
        optimizer=adamw(
            parameters,
            weight_decay=t.weight_decay,
            adam_beta1=t.adam_beta1,
            adam_beta2=t.adam_beta2,
            adam_epsilon=t.adam_epsilon,
        ),
        schedule=Schedule(t.lr_scheduler_type, t.learning_rate, warmup, stream.total_steps),
        dev_packs=pack(dev_rows, max_tokens=t.max_tokens or MAX_TOKENS) if dev_rows else (),
        dev_rows_sha256=rows_sha256(dev_rows),
        dev_ranking=ranking,
        companions=write_companions(
            folder, tokenizer, template, m, model_card(config, base, first=commands_for_plain_peft(m)), model
        ),
    )


def _dev_ranking(config: Config, dev: Sequence[Example], template: ChatTemplate) -> DevRanking | None:
    """Raises ConfigError where the best adapter or an early stop would go by what is not measured."""
    d, t = config.data, config.train
    if t.early_stopping_patience and not dev:
        raise ConfigError("early stopping needs dev rows", hint="--dev-path FILE, or --dev-fraction 0.05.")
    ranking = dev_ranking(
        Path(d.path or ""), dev, template, questions=t.eval_rank_questions, seed=t.seed, system=d.system
    )
    if ranking is None and t.metric_for_best_model == "dev_mrr":
        raise ConfigError(
            "dev_mrr is not measured: there are no dev candidates, or --eval-rank-questions is 0",
            field="train.metric_for_best_model",
            hint="`cmqa prepare` writes candidates; or --metric-for-best-model dev_loss.",
        )
    return ranking


def _inject(model: Any, config: Config, tokens: Sequence[int]) -> Any:
    lora, total, kind = config.lora, parameters_of(model), quantization_of(model)
    weights = next(model.parameters())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing")  # PEFT asks by the old name
        wrapped = inject_lora(
            model,
            r=lora.r,
            lora_alpha=lora.lora_alpha,
            lora_dropout=lora.lora_dropout,
            target_modules=lora.target_modules,
            modules_to_save=lora.modules_to_save,
            trainable_token_ids=tokens,
            use_rslora=lora.use_rslora,
            seed=config.train.seed,
        )
    trained = sum(p.numel() for p in lora_parameters(wrapped).values())
    _tell(
        say(
            "train.model",
            base=config.model.name_or_path,
            dtype=str(weights.dtype).removeprefix("torch.") + (f" + {kind}" if kind != "none" else ""),
            device=weights.device,
            threads=torch.get_num_threads(),
            trained=f"{trained:,}",
            total=f"{total:,}",
        )
    )
    if reason := why_plain(wrapped):
        _tell(say("train.plain_path", reason=reason))
    return wrapped


def _shares_prefixes(config: Config) -> bool:
    if config.data.shared_prefixes and config.lora.lora_dropout:
        _tell(say("train.no_shared_prefixes"))
    return config.data.shared_prefixes and not config.lora.lora_dropout


def _announce_modules_to_save(model: Any, names: Sequence[str]) -> None:
    """The seed's trap: a whole embedding and head in training cost more than all else. Said before it is paid."""
    today = {n for name in names for n in (name, *QWEN_V1_NAMES.get(name, ()))}
    found = [p for n, module in model.named_modules() if n.rsplit(".", 1)[-1] in today for p in module.parameters()]
    if found:
        count, copy = sum(p.numel() for p in found), sum(p.numel() * p.element_size() for p in found)
        gib = f"{4 * copy / 2**30:.2f}"  # the copy, its gradient, AdamW's two moments
        _tell(say("train.saved_modules", modules=" ".join(names), parameters=f"{count:,}", gib=gib))


def _read_rows(config: Config) -> tuple[list[Example], list[Example]]:
    d, seed = config.data, config.train.seed
    path = Path(d.path or "")
    rows = load_split(path, "train", dev_fraction=d.dev_fraction, seed=seed)
    if not rows:
        raise DataError("no training row", file=path, hint="`cmqa prepare SRC --out DIR` accounts for every row.")
    if d.replay:
        rows = [*rows, *load_split(d.replay, "train")]
    if d.dev_path is None:
        return rows, load_split(path, "dev", dev_fraction=d.dev_fraction, seed=seed)
    dev = load_split(d.dev_path, "dev") or load_split(d.dev_path, "train")  # a file that names no split is all dev rows
    return rows, dev


def _encode(
    examples: Sequence[Example], name: str, config: Config, template: ChatTemplate
) -> Sequence[TokenizedExample]:
    d = config.data
    rows, report = encode_cached(
        examples,
        template,
        folder=cache_root() / "tokens",
        max_bytes=int(d.token_cache_gib * 2**30),
        max_length=d.model_max_length,
        on_too_long=d.on_too_long,
        system=d.system,
    )
    _say_encoded(name, report, d.model_max_length)
    if not rows:
        raise DataError(
            f"no {name} row is left of {report.read}: {report.too_long} are longer than {d.model_max_length} tokens, "
            f"{report.no_supervised} have no answer to learn",
            file=d.path,
            hint="A larger --model-max-length, or --on-too-long shorten.",
        )
    return rows


def _say_encoded(name: str, report: EncodeReport, max_length: int) -> None:
    _tell(say("train.rows", name=name, kept=report.kept, tokens=f"{report.tokens:,}", longest=report.longest))
    if dropped := report.too_long + report.no_supervised:
        _tell(
            say(
                "train.dropped",
                name=name,
                dropped=dropped,
                read=report.read,
                too_long=report.too_long,
                no_supervised=report.no_supervised,
                max_length=max_length,
            )
        )
    if report.shortened:
        _tell(say("train.shortened", name=name, shortened=report.shortened, max_length=max_length))
