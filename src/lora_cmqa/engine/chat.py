"""Talk to a run: one question, a conversation, or base and adapter side by side.

messages -> template.encode_prompt -> Request -> engine -> text
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..core import Message
from ..errors import CmqaError
from ..messages import say
from .base import RUN_ADAPTER, Request
from .embedded import EmbeddedEngine
from .run import OpenRun, open_run
from .sampling import SamplingParams

History = Sequence[tuple[str, str]]  # (question, answer) turns, oldest first


class Chat:
    """A run folder, a checkpoint or a bare base, ready to answer.

    `Chat("runs/a").ask("孩子发烧怎么办？")`; `adapter=False` lets the base answer with the adapter switched off.
    """

    def __init__(
        self,
        run: str | Path | OpenRun,
        *,
        base: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        num_hidden_layers: int | None = None,
        quantization: str | None = None,
        system: str | None = None,
    ) -> None:
        if not isinstance(run, OpenRun):
            run = open_run(
                run,
                base=base,
                device=device,
                dtype=dtype,
                num_hidden_layers=num_hidden_layers,
                quantization=quantization,
            )
        self.run = run
        self.engine = EmbeddedEngine(self.run.model, self.run.tokenizer, self.run.stop_ids)
        self.system = system

    def ask(
        self,
        text: str,
        history: History | None = None,
        *,
        adapter: bool = True,
        sampling: SamplingParams | None = None,
    ) -> str:
        """The whole answer to `text` after the turns of `history`."""
        return self.engine.generate([self.request(text, history, adapter=adapter, sampling=sampling)])[0].text

    def stream(
        self,
        text: str,
        history: History | None = None,
        *,
        adapter: bool = True,
        sampling: SamplingParams | None = None,
    ) -> Iterator[str]:
        """The same answer in pieces as it is written."""
        return self.engine.stream(self.request(text, history, adapter=adapter, sampling=sampling))

    def request(
        self,
        text: str,
        history: History | None = None,
        *,
        adapter: bool = True,
        sampling: SamplingParams | None = None,
    ) -> Request:
        messages = [Message("system", self.system)] if self.system else []
        for question, answer in history or ():
            messages += [Message("user", question), Message("assistant", answer)]
        messages.append(Message("user", text))
        prompt = tuple(self.run.template.encode_prompt(messages))
        own = RUN_ADAPTER if adapter and self.run.has_adapter else None
        return Request(prompt, sampling or SamplingParams(), own)


def compare(
    run: str | Path | Chat,
    questions: Sequence[str],
    *,
    base: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    num_hidden_layers: int | None = None,
    quantization: str | None = None,
    system: str | None = None,
    sampling: SamplingParams | None = None,
) -> list[dict[str, str]]:
    """[{"question", "base", "adapter"}]: each question answered by the base and by the adapter, same settings."""
    if not isinstance(run, Chat):
        run = Chat(
            run,
            base=base,
            device=device,
            dtype=dtype,
            num_hidden_layers=num_hidden_layers,
            quantization=quantization,
            system=system,
        )
    both = [run.request(q, adapter=a, sampling=sampling) for q in questions for a in (False, True)]
    answers = [c.text.strip() for c in run.engine.generate(both)]
    return [{"question": q, "base": answers[2 * i], "adapter": answers[2 * i + 1]} for i, q in enumerate(questions)]


# ---- in the terminal -------------------------------------------------------------------------------------------------


def print_side_by_side(answers: Sequence[dict[str, str]]) -> None:
    """Two columns, base left and adapter right; a question above each pair."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for a in answers:
        table = Table(title=Text(a["question"], style="bold"), title_justify="left", box=box.SIMPLE_HEAD, expand=True)
        # fold: Chinese has no spaces to break at, and an answer is shown whole
        table.add_column(say("chat.base"), ratio=1, overflow="fold")
        table.add_column(say("chat.adapter"), ratio=1, style="green", overflow="fold")
        table.add_row(Text(a["base"] or say("chat.silence")), Text(a["adapter"] or say("chat.silence")))
        console.print(table)


def converse(chat: Chat, *, sampling: SamplingParams, lines: Iterator[str] | None = None) -> None:
    """The loop of `cmqa chat`: /base /adapter /reset /exit, everything else is a question.

    `lines` replaces the keyboard in tests.
    """
    history: list[tuple[str, str]] = []
    adapter = chat.run.has_adapter
    print(say("chat.welcome", run=chat.run.folder, base=chat.run.base))
    for line in lines if lines is not None else _keyboard():
        text = line.strip()
        command = text.lower()
        if not text:
            continue
        if command in ("/exit", "/quit"):
            return
        if command == "/reset":
            history.clear()
            print(say("chat.forgotten"))
        elif command == "/base":
            adapter = False
            print(say("chat.base_answers"))
        elif command == "/adapter":
            adapter = chat.run.has_adapter
            print(say("chat.adapter_answers" if adapter else "chat.no_adapter"))
        elif command.startswith("/"):
            print(say("chat.unknown_command", command=text))
        else:
            try:
                history.append((text, _speak(chat.stream(text, history, adapter=adapter, sampling=sampling))))
            except CmqaError as e:
                print(e, file=sys.stderr)


def _speak(pieces: Iterator[str]) -> str:
    said: list[str] = []
    for piece in pieces:
        said.append(piece)
        print(piece, end="", flush=True)
    print()
    return "".join(said)


def _keyboard() -> Iterator[str]:
    while True:
        try:
            yield input("> ")
        except EOFError:
            return
