"""Our rows against the labels that the seed's finetune.py made, each difference explained in docs/labels.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_cmqa.core import IGNORE, Example, Message, TokenizedExample
from lora_cmqa.data.template import ChatTemplate
from lora_cmqa.models.qwen1 import native_tokenizer

START, END, NEWLINE, PAD = 151644, 151645, 198, 151643
WHOLE = ["train64[0]", "train64[1]", "train64[2]", "train64[3]", "multi_turn", "nfc_and_spaces"]


@pytest.fixture(scope="module")
def seed(qwen_v1: Path) -> dict[str, Any]:
    return json.loads((qwen_v1 / "seed_labels.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def template(qwen_v1: Path) -> ChatTemplate:
    return ChatTemplate.from_tokenizer(native_tokenizer(qwen_v1 / "qwen_v1_tiny"))


def ours(template: ChatTemplate, seed: dict[str, Any], name: str, *, max_length: int = 4096) -> Any:
    messages = tuple(Message(t["from"], t["value"]) for t in seed_row(seed, name)["conversations"])
    return template.encode(Example(messages, name, name), max_length=max_length, system=seed["system_message"])


def seed_row(seed: dict[str, Any], name: str) -> dict[str, Any]:
    return next(r for r in seed["rows"] if r["name"] == name)


def without_the_seeds_frame(ids: list[int], labels: list[int]) -> list[int]:
    """The seed's labels less what only the seed trains: turn openings, newlines after ends, ends of asked turns."""
    out = list(labels)
    answering = False
    for at, token in enumerate(ids):
        if token == START:
            answering = ids[at + 1] == 77091  # "assistant"
            out[at] = IGNORE
        if token == END:
            out[at] = labels[at] if answering else IGNORE
            if at + 1 < len(ids):
                out[at + 1] = IGNORE
    return out


@pytest.mark.parametrize("name", WHOLE)
def test_rows_that_fit_differ_by_the_frame_only(template: ChatTemplate, seed: dict[str, Any], name: str) -> None:
    row, theirs = ours(template, seed, name), seed_row(seed, name)
    length = len(row)
    assert row.input_ids.tolist() == theirs["input_ids"][:length]
    assert theirs["input_ids"][length] == NEWLINE  # the one token after the last end that we leave out
    assert set(theirs["input_ids"][length + 1 :]) <= {PAD}
    expected = without_the_seeds_frame(theirs["input_ids"], theirs["labels"])
    assert row.labels.tolist() == expected[:length]
    assert set(expected[length:]) <= {IGNORE}
    assert row.labels.tolist() != theirs["labels"][:length]  # the frame is a real difference


def test_an_opening_answer_is_dropped_there_and_read_here(template: ChatTemplate, seed: dict[str, Any]) -> None:
    row, theirs = ours(template, seed, "starts_with_assistant"), seed_row(seed, "starts_with_assistant")
    texts = [t["value"] for t in theirs["conversations"]]
    assert texts[0] in template.tokenizer.decode(row.input_ids)
    assert texts[0] not in template.tokenizer.decode(theirs["input_ids"])
    assert _taught(template, row) == texts[0] + "<|im_end|>" + texts[2] + "<|im_end|>"


def test_cut_rows_are_refused_here(template: ChatTemplate, seed: dict[str, Any]) -> None:
    for name in ("truncated", "truncated_inside_answer"):
        refused = ours(template, seed, name, max_length=seed["max_len"])
        assert refused.reason == "too_long"
        assert refused.tokens > seed["max_len"]
        assert seed_row(seed, name)["input_ids"][-1] not in (END, NEWLINE)  # the seed's row ends without an end
    # The seed's row of a long question teaches its frame only: <|im_start|>, <|im_end|>, newline, <|im_start|>.
    labels = seed_row(seed, "truncated")["labels"]
    assert [t for t in labels if t != IGNORE] == [START, END, NEWLINE, START]


def test_special_texts_are_tokens_there_and_text_here(template: ChatTemplate, seed: dict[str, Any]) -> None:
    name = "special_text_inside_content"
    row, theirs = ours(template, seed, name), seed_row(seed, name)
    assert theirs["input_ids"].count(END) == 4  # one of them stood in the question's text
    assert row.input_ids.tolist().count(END) == 3
    assert PAD not in row.input_ids  # there the <|endoftext|> of the text is masked out of attention, as padding is
    decoded = template.tokenizer.decode(row.input_ids)
    assert all(t["value"] in decoded for t in theirs["conversations"])


def test_an_empty_answer_is_refused_here(template: ChatTemplate, seed: dict[str, Any]) -> None:
    assert ours(template, seed, "empty_answer").reason == "no_supervised"
    assert END in seed_row(seed, "empty_answer")["labels"]


def test_every_row_of_the_reference_is_spoken_for(seed: dict[str, Any]) -> None:
    told = {"starts_with_assistant", "truncated", "truncated_inside_answer", "special_text_inside_content"}
    assert {r["name"] for r in seed["rows"]} == {*WHOLE, *told, "empty_answer"}


def _taught(template: ChatTemplate, row: TokenizedExample) -> str:
    return template.tokenizer.decode([t for t in row.labels.tolist() if t != IGNORE])
