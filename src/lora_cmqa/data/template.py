"""THE renderer: a conversation -> token ids. Training, chat, evaluation, server and export all use this one.

    messages    user: 头痛怎么办？     assistant: 您好，...
    fixed text  <|im_start|>user\\n [0] <|im_end|>\\n<|im_start|>assistant\\n [1] <|im_end|>\\n
    labels      .................. ... ........................................ 1 1 1 . .      1 = taught

The fixed text comes from the model's chat template, rendered once per sequence of roles with placeholders as contents;
it is encoded with special tokens recognised. Contents are encoded on their own with special tokens off, so a row
that holds "<|im_end|>" injects nothing. Taught are each assistant content and the token that ends the turn.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..core import IGNORE, Example, Message, TokenizedExample
from ..errors import DataError, TemplateError

# Qwen v1, 2, 2.5 and 3 share this form. Theirs add a default system prompt or a think block; ours adds nothing.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Gemma's turns, for its base models that come without a template; a system prompt stands at the head of the first turn.
GEMMA_TURNS = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set ns.system = message['content'] + '\\n\\n' %}{% else %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\\n'"
    " + ns.system + message['content'] + '<end_of_turn>\\n' }}{% set ns.system = '' %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
# Llama 3.2 and others write today's date into the system turn: a prompt that changes overnight is not one prompt, and a
# run resumed tomorrow would train on other tokens. The date is Llama 3.1's own default.
_STILL = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
NAMED = {"chatml": CHATML, "gemma": GEMMA_TURNS}

_SENTENCE_END = re.compile(r"[。！？!?；;\n]|(?<!\d)\.(?=\s|$)")  # not the dot of 0.5 or of "1. "
_BATCH = 4096  # contents given to the tokenizer at once


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that cannot be trained on. `reason` is too_long or no_supervised; `tokens` its length where known."""

    id: str
    reason: Literal["too_long", "no_supervised"]
    tokens: int


@dataclass(slots=True)
class EncodeReport:
    """read = kept + too_long + no_supervised; shortened rows are among the kept."""

    read: int = 0
    kept: int = 0
    shortened: int = 0
    too_long: int = 0
    no_supervised: int = 0
    longest: int = 0  # tokens of the longest row read
    tokens: int = 0  # of the kept rows
    rejects: list[Reject] = field(default_factory=list)


class ChatTemplate:
    """Made by `from_tokenizer`. `jinja` is what the run folder keeps; `stop_ids` end an answer."""

    def __init__(self, tokenizer: Any, jinja: str) -> None:
        self.tokenizer, self.jinja = tokenizer, jinja
        self._mark = secrets.token_hex(8)  # unguessable: no content can look like a placeholder
        self._fixed_of: dict[tuple[tuple[str, ...], bool], list[list[int] | int]] = {}
        self._special = {
            i
            for i, t in tokenizer.added_tokens_decoder.items()
            if getattr(t, "special", True) or re.fullmatch(r"<[^<>\s]+>", str(t))
        }
        self._trims = self._template_trims()
        self.end_id = self._check()
        eos = tokenizer.eos_token_id
        self.stop_ids: tuple[int, ...] = tuple(sorted({self.end_id, *([eos] if eos is not None else [])}))

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, chat_template: str | None = None) -> ChatTemplate:
        """`chat_template`: Jinja text, a .jinja file, or one of chatml, gemma; None: ChatML for a tokenizer that has
        its tokens, else the tokenizer's own.

        Raises TemplateError: no template, or one that does not keep its contents whole and in order.
        """
        if chat_template is not None:
            return cls(tokenizer, _template_text(chat_template))
        own = tokenizer.chat_template
        if isinstance(own, dict):  # several by name, for tools and the like
            own = own.get("default")
        vocabulary = tokenizer.get_vocab()
        if {"<|im_start|>", "<|im_end|>"} <= vocabulary.keys() and (not own or "<|im_start|>" in own):
            return cls(tokenizer, CHATML)
        if not own:
            raise TemplateError(
                "the tokenizer has no chat template, so the form of a conversation is unknown",
                hint="Add --chat-template chatml, --chat-template gemma, or a .jinja file; or take the chat model.",
            )
        return cls(tokenizer, _STILL + own if "strftime_now" in own else own)

    @property
    def turn_ids(self) -> tuple[int, ...]:
        """Special tokens written around a question and its answer, as they come: <|im_start|>, <|im_end|>."""
        fixed = [t for p in self._fixed(("user", "assistant"), False) if isinstance(p, list) for t in p]
        return tuple(dict.fromkeys(t for t in fixed if t in self._special))

    # ---- rendering -------------------------------------------------------------------------------------------------

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The conversation so far and the opening of the assistant's turn."""
        contents = self._encode_contents([m.content for m in messages])
        ids: list[int] = []
        for piece in self._fixed(tuple(m.role for m in messages), True):
            ids += piece if isinstance(piece, list) else contents[piece]
        return ids

    def encode(
        self,
        example: Example,
        *,
        max_length: int,
        on_too_long: Literal["drop", "shorten", "error"] = "drop",
        system: str | None = None,
    ) -> TokenizedExample | Reject:
        """One row as token ids and labels, or why not. `encode_all` says what the settings mean."""
        rows, report = encode_all([example], self, max_length=max_length, on_too_long=on_too_long, system=system)
        return rows[0] if rows else report.rejects[0]

    def _row(self, example: Example, messages: Sequence[Message], contents: Sequence[list[int]]) -> TokenizedExample:
        """Contents are those of `messages`; tokens after the last taught one are left out."""
        ids: list[int] = []
        labels: list[int] = []
        last = 0  # behind the last taught token
        ending = False  # the fixed text that follows an assistant's content: taught up to its end token
        for piece in self._fixed(tuple(m.role for m in messages), False):
            new = piece if isinstance(piece, list) else contents[piece]
            taught = 0
            if not isinstance(piece, list):
                ending = messages[piece].role == "assistant"
                taught = len(new) if ending else 0
            elif ending:
                taught = 1 + next((i for i, t in enumerate(new) if t in self._special), -1)
                ending = False
            if taught:
                last = len(ids) + taught
            ids += new
            labels += new[:taught] + [IGNORE] * (len(new) - taught)
        return TokenizedExample(
            input_ids=np.array(ids[:last], dtype=np.int32),
            labels=np.array(labels[:last], dtype=np.int32),
            id=example.id,
            question_id=example.question_id,
        )

    def _fixed(self, roles: tuple[str, ...], generate: bool) -> list[list[int] | int]:
        """Token ids of the fixed text, and between them the index of each content."""
        key = (roles, generate)
        if key not in self._fixed_of:
            pieces = [p if isinstance(p, int) else self._encode_fixed(p) for p in self._render(roles, generate)]
            if not generate:
                self._check_openings(roles, pieces)
            self._fixed_of[key] = pieces
        return self._fixed_of[key]

    def _render(self, roles: tuple[str, ...], generate: bool) -> list[str | int]:
        holders = [f"{self._mark}:{i}:" for i in range(len(roles))]
        text = self._apply(list(zip(roles, holders, strict=True)), generate)
        pieces: list[str | int] = []
        for i, part in enumerate(re.split(rf"{self._mark}:(\d+):", text)):
            if i % 2:
                pieces.append(int(part))
            elif part:
                pieces.append(part)
        order = [p for p in pieces if isinstance(p, int)]
        if order != list(range(len(roles))):
            raise TemplateError(
                f"the chat template renders the contents of {' '.join(roles)} as {order}, "
                "so a turn would be lost, repeated or moved",
                hint="Give another one with --chat-template (chatml, gemma or a .jinja file).",
            )
        return pieces

    def _apply(self, messages: list[tuple[str, str]], generate: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                [{"role": r, "content": c} for r, c in messages],
                chat_template=self.jinja,
                tokenize=False,
                add_generation_prompt=generate,
            )
        except Exception as e:  # the template's own raise_exception, or any error of Jinja in it
            roles = " ".join(r for r, _ in messages)
            raise TemplateError(f"the chat template refuses the turns {roles}: {e}") from None

    def _encode_fixed(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"])

    def _encode_contents(self, texts: Sequence[str]) -> list[list[int]]:
        if self._trims:
            texts = [t.strip() for t in texts]
        encode = contents_plain if getattr(self.tokenizer, "backend_tokenizer", None) is None else contents_fast
        out: list[list[int]] = []
        for start in range(0, len(texts), _BATCH):
            out += encode(self.tokenizer, [without_surrogates(t) for t in texts[start : start + _BATCH]])
        return out

    # ---- what a template must keep ---------------------------------------------------------------------------------

    def _template_trims(self) -> bool:
        """Some templates strip contents (Gemma's, Llama 3's): then we do too, to give the same ids."""
        return f" {self._mark} " not in self._apply([("user", f" {self._mark} ")], False)

    def _check_openings(self, roles: tuple[str, ...], row: list[list[int] | int]) -> None:
        """Before each answer a row must hold exactly the prompt that chat would give: trained is what is asked."""
        for turn, role in enumerate(roles):
            prompt = self._fixed(roles[:turn], True) if turn and role == "assistant" else []
            if prompt and row[: len(prompt) + 1] != [*prompt, turn]:
                raise TemplateError(
                    f"the chat template opens the assistant's turn ({' '.join(roles[: turn + 1])}) in another way once "
                    "it is answered, so what is trained would not be what is asked",
                    hint="Give another one with --chat-template (chatml, gemma or a .jinja file).",
                )

    def _check(self) -> int:
        """The id that ends an assistant's turn. Raises TemplateError where rows and prompts would differ."""
        row = self._fixed(("user", "assistant", "user", "assistant"), False)
        ending = row[row.index(3) + 1] if row[-1] != 3 else []
        end = next((t for t in ending if t in self._special), None) if isinstance(ending, list) else None
        if end is None:
            raise TemplateError("no special token ends the assistant's turn, so an answer would never stop")
        probe = [("user", "你好 abc"), ("assistant", "好的。")]
        whole = self._encode_fixed(self._apply(probe, False))
        contents = self._encode_contents([c for _, c in probe])
        ours = [
            t for p in self._fixed(("user", "assistant"), False) for t in (p if isinstance(p, list) else contents[p])
        ]
        if whole != ours:
            raise TemplateError(
                f"this tokenizer splits a conversation differently as a whole ({len(whole)} tokens) "
                f"than by segments ({len(ours)} tokens), so other engines would not see what was trained"
            )
        return end


def contents_plain(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text on its own; a text that spells a special token gives its letters, not the token."""
    return list(tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def contents_fast(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """`contents_plain` through the tokenizers library alone: neither offsets nor masks are made, on all cores."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # each call of the tokenizer sets it anew
    return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]


def encode_all(
    examples: Iterable[Example],
    template: ChatTemplate,
    *,
    max_length: int,
    on_too_long: Literal["drop", "shorten", "error"] = "drop",
    system: str | None = None,
) -> tuple[list[TokenizedExample], EncodeReport]:
    """Rows as token ids and labels, in order, and what became of the others.

    max_length   tokens; a longer row is dropped and counted, or its last answer is shortened at the last sentence end
                 that fits (the end token stays), or DataError is raised (on_too_long="error")
    system       put before rows that have no system turn

    Raises DataError under on_too_long="error"; TemplateError for a sequence of turns the template refuses.
    """
    rows: list[TokenizedExample] = []
    report = EncodeReport()
    pending: list[tuple[Example, tuple[Message, ...]]] = []

    def flush() -> None:
        contents = iter(template._encode_contents([m.content for _, messages in pending for m in messages]))
        for example, messages in pending:
            try:
                row = template._row(example, messages, [next(contents) for _ in messages])
            except TemplateError as e:
                raise TemplateError(
                    f"row {example.id}: {e.message}", hint=e.hint, file=example.source or None
                ) from None
            _take(row, example, messages)
        pending.clear()

    def _take(row: TokenizedExample, example: Example, messages: tuple[Message, ...]) -> None:
        report.read += 1
        report.longest = max(report.longest, len(row))
        if not any(m.role == "assistant" and m.content.strip() for m in messages) or row.supervised_tokens == 0:
            report.no_supervised += 1
            report.rejects.append(Reject(example.id, "no_supervised", len(row)))
            return
        if len(row) > max_length:
            if on_too_long == "error":
                raise DataError(
                    f"row {example.id} has {len(row)} tokens, more than model_max_length {max_length}",
                    file=example.source or None,
                    hint="--on-too-long drop or shorten, or a larger --model-max-length.",
                )
            shorter = _shorten(template, example, messages, max_length) if on_too_long == "shorten" else None
            if shorter is None:
                report.too_long += 1
                report.rejects.append(Reject(example.id, "too_long", len(row)))
                return
            row = shorter
            report.shortened += 1
        report.kept += 1
        report.tokens += len(row)
        rows.append(row)

    for example in examples:
        messages = example.messages
        if system and not any(m.role == "system" for m in messages):
            messages = (Message("system", system), *messages)
        pending.append((example, messages))
        if len(pending) >= _BATCH:
            flush()
    flush()
    return rows, report


def _shorten(
    template: ChatTemplate, example: Example, messages: tuple[Message, ...], max_length: int
) -> TokenizedExample | None:
    """The same row with its last answer cut at the last sentence end that fits; None where not one sentence fits."""
    while messages[-1].role != "assistant":  # a question left without an answer is not in the row either
        messages = messages[:-1]
    last = messages[-1]
    ends = [m.end() for m in _SENTENCE_END.finditer(last.content)]
    low, high, best = 0, len(ends) - 1, None
    while low <= high:  # tokens grow with the text, so the longest that fits is found by halving
        middle = (low + high) // 2
        cut = (*messages[:-1], Message("assistant", last.content[: ends[middle]].rstrip()))
        candidate = template._row(example, cut, template._encode_contents([m.content for m in cut]))
        if len(candidate) <= max_length:
            best, low = candidate, middle + 1
        else:
            high = middle - 1
    return best


def preview(row: TokenizedExample, tokenizer: Any) -> list[tuple[str, bool]]:
    """The row as runs of (text, taught?), for a coloured look at what is trained."""
    runs: list[tuple[list[int], bool]] = []
    for token, label in zip(row.input_ids.tolist(), row.labels.tolist(), strict=True):
        if not runs or runs[-1][1] != (label != IGNORE):
            runs.append(([], label != IGNORE))
        runs[-1][0].append(token)
    return [(tokenizer.decode(ids, clean_up_tokenization_spaces=False), taught) for ids, taught in runs]


def _template_text(given: str) -> str:
    if given.lower() in NAMED:
        return NAMED[given.lower()]
    if "{" in given:
        return given
    file = Path(given)
    if not file.is_file():
        raise TemplateError(
            f"chat template {given!r} is neither a file nor one of {', '.join(NAMED)}",
            hint="--chat-template chatml, gemma, or a .jinja file",
        )
    return file.read_text(encoding="utf-8")


def without_surrogates(text: str) -> str:
    """Lone surrogates become U+FFFD, pairs are joined: the tokenizers library takes valid Unicode only."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
