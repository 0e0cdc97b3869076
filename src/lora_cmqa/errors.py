"""The family of errors.

    CmqaError                 2    bad input: what happened, where, and the command that helps
    ├── ConfigError           2    a setting: unknown name, wrong type, out of range
    ├── DataError             2    a row, a file, a split
    ├── TemplateError         2    a conversation that cannot be rendered
    ├── ModelError            2    a base model: unknown, unsafe, of no known class
    ├── AdapterError          2    an adapter: wrong base, missing layer, no effect
    ├── RunError              2    a run folder or a checkpoint
    ├── ResourceError         3    out of disk or memory; the run can be resumed
    ├── GateFailed            4    a gate said no
    └── Interrupted     130 / 143  stopped by a signal, with a checkpoint

The number is the exit code of the command line. A CmqaError never reaches a user as a traceback.
"""

from __future__ import annotations

from pathlib import Path


class CmqaError(Exception):
    """`str(error)` is the whole message for a person: place, what happened, and the hint on a line of its own.

    message  what happened, with numbers
    hint     what to do: a flag or a command that works
    file, row, field  where; row counts from 1 as an editor does
    """

    exit_code = 2

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        file: str | Path | None = None,
        row: int | None = None,
        field: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.hint, self.file, self.row, self.field = message, hint, file, row, field

    def __str__(self) -> str:
        where = " ".join(
            part
            for part in (
                str(self.file) if self.file is not None else "",
                f"line {self.row}" if self.row is not None else "",
                f"field {self.field!r}" if self.field is not None else "",
            )
            if part
        )
        text = f"{where}: {self.message}" if where else self.message
        return f"{text}\n  {self.hint}" if self.hint else text

    def as_dict(self) -> dict[str, object]:
        """The same for `--json`; keys are never translated."""
        return {
            "error": type(self).__name__,
            "message": self.message,
            "hint": self.hint,
            "file": str(self.file) if self.file is not None else None,
            "row": self.row,
            "field": self.field,
        }


class ConfigError(CmqaError): ...


class DataError(CmqaError): ...


class TemplateError(CmqaError): ...


class ModelError(CmqaError): ...


class AdapterError(CmqaError): ...


class RunError(CmqaError): ...


class ResourceError(CmqaError):
    exit_code = 3


class GateFailed(CmqaError):
    exit_code = 4


class Interrupted(CmqaError):
    """`signal_number` 2 (SIGINT) exits with 130, 15 (SIGTERM) with 143."""

    def __init__(self, message: str, *, signal_number: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = 128 + signal_number
