"""What a run says while it runs: metrics.jsonl, the progress line, TensorBoard.

    step line        {"step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "supervised_tokens",
                      "world_size", "time": {"seconds", "tokens_per_second", "peak_memory_bytes"}}
    evaluation line  {"step", "epoch", "dev_loss", "tokens", "time": {...}, "dev_top1", "dev_mrr" where ranked}

Two runs of one config differ in `time` only. A step that was not applied has null where its number was not finite.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..core import StepMetrics
from ..errors import ConfigError
from ..messages import say
from .commit import write_file

TRACKERS = ("tensorboard",)


@dataclass(frozen=True, slots=True)
class DevMetrics:
    """The other kind of line: an evaluation on the dev rows after `step` steps."""

    step: int
    epoch: float
    dev_loss: float  # nats per answer token
    tokens: int
    time: dict[str, Any] = field(default_factory=dict)
    dev_top1: float | None = None  # the line has these two where candidates were ranked
    dev_mrr: float | None = None


Metrics = StepMetrics | DevMetrics


# ---- metrics.jsonl -----------------------------------------------------------------------------------------------


class MetricsFile:
    """Appends one line per step, flushed at once. `cut_after` is used when a run goes on from an older step."""

    def __init__(self, file: Path, *, cut_after: int = -1) -> None:
        self.file = file
        kept = _lines_until(file, cut_after) if file.exists() else []
        self.losses = [c["loss"] for c in map(json.loads, kept) if "loss" in c]  # of the steps so far; None: not finite
        if file.exists():
            write_file(file, b"".join(kept))
        self._handle = file.open("ab")

    def write(self, metrics: Metrics) -> None:
        plain = {k: _finite(v) for k, v in asdict(metrics).items() if v is not None}
        self._handle.write(json.dumps(plain, allow_nan=False).encode() + b"\n")
        self._handle.flush()

    def sync(self) -> None:
        """To the disk itself: a checkpoint must not be ahead of its metrics after a power cut."""
        os.fsync(self._handle.fileno())

    def close(self) -> None:
        self._handle.close()


def _lines_until(file: Path, step: int) -> list[bytes]:
    """The lines of steps up to `step`; a torn last line is left out."""
    kept = []
    for line in file.read_bytes().splitlines(keepends=True):
        try:
            content = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or content["step"] > step:
            break
        kept.append(line)
    return kept


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- spikes ------------------------------------------------------------------------------------------------------


class LossSpikes:
    """Sees each step's loss and tells when one stands far above the last ones. It changes nothing.

    usual = median of the last 32 losses, at least 16 of them       far = more than 6 robust standard deviations above
    a robust standard deviation = 1.4826 x the median absolute deviation, and at least 2 % of the median
    """

    WINDOW, NEEDED, FAR, FLOOR = 32, 16, 6.0, 0.02

    def __init__(self, earlier: Iterable[float | None] = ()) -> None:
        """`earlier`: the losses of the steps before a resume."""
        self._last: deque[float] = deque((x for x in earlier if x is not None), maxlen=self.WINDOW)

    def see(self, loss: float) -> float | None:
        """The usual loss when this one is a spike, else None. A loss that is not finite is a bad step, not a spike."""
        if not math.isfinite(loss):
            return None
        usual = statistics.median(self._last) if len(self._last) >= self.NEEDED else math.inf
        spread = 1.4826 * statistics.median(abs(x - usual) for x in self._last) if math.isfinite(usual) else 0.0
        is_spike = loss - usual > self.FAR * max(spread, self.FLOOR * usual)
        self._last.append(loss)
        return usual if is_spike else None


# ---- the terminal ------------------------------------------------------------------------------------------------


class Progress:
    """A live line in a terminal; elsewhere a plain line every `logging_steps` steps."""

    def __init__(self, total_steps: int, done: int, logging_steps: int) -> None:
        from rich.console import Console

        self.total, self.done, self.every = total_steps, done, logging_steps
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._started_at = done
        self._seconds = self._tokens = 0.0
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"), console=self.console
            )
            self._task = self._bar.add_task("", total=self.total, completed=self.done)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def print(self, text: str) -> None:
        """A line above the live one."""
        self.console.print(text, markup=False)

    def step(self, metrics: StepMetrics) -> None:
        self.done = metrics.step
        self._seconds += metrics.time["seconds"]
        self._tokens += metrics.tokens
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, description=self._line(metrics))
        elif self.done % self.every == 0 or self.done == self.total:
            self.print(f"{self.done}/{self.total} {self._line(metrics)}")

    def dev(self, metrics: DevMetrics, is_best: bool) -> None:
        key = "train.evaluated_best" if is_best else "train.evaluated"
        ranked = ""
        if metrics.dev_mrr is not None:
            ranked = say("train.ranked", mrr=f"{metrics.dev_mrr:.3f}", top1=f"{metrics.dev_top1:.3f}")
        self.print(say(key, step=metrics.step, loss=f"{metrics.dev_loss:.4f}") + ranked)

    def _line(self, metrics: StepMetrics) -> str:
        left = (self.total - self.done) * self._seconds / max(1, self.done - self._started_at)
        return say(
            "train.progress",
            loss=f"{metrics.loss:.4f}",
            speed=f"{self._tokens / max(self._seconds, 1e-9):,.0f}",
            left=f"{int(left) // 60}:{int(left) % 60:02d}",
            memory=f"{metrics.time['peak_memory_bytes'] / 2**30:.2f}",
        )


# ---- trackers ----------------------------------------------------------------------------------------------------


def check_trackers(report_to: Sequence[str]) -> None:
    """Raises ConfigError for a tracker that is unknown or not installed, before anything is loaded."""
    for name in report_to:
        if name not in TRACKERS:
            raise ConfigError(f"--report-to {name} is unknown", hint=f"One of none, {', '.join(TRACKERS)}.")
        try:
            import tensorboard  # noqa: F401
        except ImportError:
            raise ConfigError(
                "--report-to tensorboard needs the tensorboard package, which is not installed",
                hint='pip install "lora-cmqa[track]"',
            ) from None


class TensorBoard:
    """Event files under `folder`; `after` drops what an earlier attempt wrote for later steps."""

    def __init__(self, folder: Path, *, after: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=after + 1)

    def write(self, metrics: Metrics) -> None:
        for key, value in asdict(metrics).items():
            if isinstance(value, float):
                self._writer.add_scalar(
                    f"dev/{key}" if isinstance(metrics, DevMetrics) else f"train/{key}", value, metrics.step
                )

    def close(self) -> None:
        self._writer.close()
