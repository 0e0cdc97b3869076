"""The probe's three CSV forms, the letter it reads, KL against torch's, and the bundled prompts."""

import csv
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lora_cmqa.core import IGNORE, Example, Message
from lora_cmqa.data.template import ChatTemplate, encode_all
from lora_cmqa.demo import SAMPLE
from lora_cmqa.errors import DataError
from lora_cmqa.evaluate.forgetting import (
    answer_probe,
    diverge,
    general_prompts,
    letter_ids,
    probe_rows,
    prompt_file,
    read_probe,
)
from lora_cmqa.evaluate.nll import row_losses
from lora_cmqa.lora.inject import inject_lora, lora_parameters
from lora_cmqa.models.tiny import byte_tokenizer, tiny_model


@pytest.fixture(scope="module")
def template():
    return ChatTemplate.from_tokenizer(byte_tokenizer())


@pytest.fixture(scope="module")
def model():
    model = inject_lora(tiny_model("qwen2", torch.float64), r=4, lora_alpha=8, seed=1).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in lora_parameters(model).values():
            weight += 0.1 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    return model


# ---- KL ------------------------------------------------------------------------------------------------------------


def test_kl_is_torchs_kl_div(model, template):
    examples = [
        Example((Message("user", f"问题{i}"), Message("assistant", "回答" * (1 + i))), str(i), str(i)) for i in range(5)
    ]
    rows, _ = encode_all(examples, template, max_length=512)
    found = diverge(model, rows, max_tokens=80)
    for i, row in enumerate(rows):
        ids, at = torch.tensor(row.input_ids).long()[None], np.flatnonzero(row.labels[1:] != IGNORE)
        with torch.no_grad():
            adapter = model(input_ids=ids).logits[0, at].log_softmax(-1)
            with model.disable_adapter():
                base = model(input_ids=ids).logits[0, at].log_softmax(-1)
        want = F.kl_div(adapter, base, log_target=True, reduction="sum")
        assert found.kl[i] == pytest.approx(float(want), rel=1e-6)  # transformers norms in float32
        assert found.kl[i] > 0
    own = row_losses(model, rows)
    assert found.adapter.total == pytest.approx(own.total, rel=1e-10)
    assert found.adapter.tokens.tolist() == own.tokens.tolist()
    with model.disable_adapter():
        assert found.base.total == pytest.approx(row_losses(model, rows).total, rel=1e-10)


# ---- the probe -----------------------------------------------------------------------------------------------------


def write(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows(rows)


CEVAL = [("id", "question", "A", "B", "C", "D", "answer")]
CMMLU = [("", "Question", "A", "B", "C", "D", "Answer")]
CMEXAM = [("Question", "Options", "Answer", "Explanation")]


@pytest.fixture
def folder(tmp_path):
    write(
        tmp_path / "ceval/val/logic_val.csv",
        [*CEVAL, *((i, f"题{i}", "甲", "乙", "丙", "丁", "ABCD"[i % 4]) for i in range(6))],
    )
    write(
        tmp_path / "ceval/dev/logic_dev.csv", [*CEVAL, *((i, f"例{i}", "甲", "乙", "丙", "丁", "B") for i in range(7))]
    )
    write(tmp_path / "cmmlu/test/arts.csv", [*CMMLU, (0, "画", "甲", "乙", "丙", "丁", "D")])
    write(
        tmp_path / "cmexam.csv",
        [*CMEXAM, ("药", "A 甲\nB 乙\nC 丙\nD 丁\nE 戊", "E", ""), ("多", "A 甲\nB 乙", "AB", "")],
    )
    return tmp_path


def test_the_three_forms_are_read(folder):
    probe = read_probe(folder)
    assert [(q.id, q.answer, len(q.options)) for q in probe.questions] == [
        *((f"ceval/val/logic_val.csv:{i}", "ABCD"[i % 4], 4) for i in range(6)),
        ("cmexam.csv:0", "E", 5),
        ("cmmlu/test/arts.csv:0", "D", 4),
    ]
    assert probe.skipped == 1  # two right letters
    assert [s.question for s in probe.shots["ceval", "logic"]] == [f"例{i}" for i in range(5)]
    assert len(read_probe(folder, limit=3).questions) == 3
    assert read_probe(folder, limit=3) == read_probe(folder, limit=3)


def test_an_index_names_a_subset(folder):
    write(folder / "index.csv", [("suite", "subject", "file", "id"), ("ceval", "logic", "ceval/val/logic_val.csv", 4)])
    for place in (folder, folder / "index.csv"):
        probe = read_probe(place)
        assert [q.id for q in probe.questions] == ["ceval/val/logic_val.csv:4"]
        assert len(probe.shots["ceval", "logic"]) == 5
    write(folder / "ceval/index.csv", [("suite", "subject", "file", "id"), ("x", "x", "../cmexam.csv", 0)])
    with pytest.raises(DataError, match="is not under"):
        read_probe(folder / "ceval")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([("text", "label"), ("a", "b")], "none of the forms"),
        ([*CEVAL, (0, "题", "甲", "乙", "丙", "丁", "Z")], "'Z' is none of A B C D"),
        ([*CMEXAM, ("题", "没有选项", "A", "")], "0 options"),
        (CEVAL, "no question to ask"),
    ],
)
def test_a_broken_probe_is_named(tmp_path, rows, says):
    write(tmp_path / "x.csv", rows)
    with pytest.raises(DataError) as e:
        read_probe(tmp_path)
    assert says in str(e.value)
    with pytest.raises(DataError, match="no such file"):
        read_probe(tmp_path / "absent")


def test_the_likeliest_letter_is_a_plain_forwards(folder, model, template):
    probe = read_probe(folder)
    letters = letter_ids(template)
    assert letters["C"] == ord("C")
    for shots in (0, 5):
        rows = probe_rows(probe, template, shots=shots, system=None)
        said = answer_probe(model, probe, rows, template, max_tokens=500)
        for q, row, letter in zip(probe.questions, rows, said, strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor(row.input_ids[:-1]).long()[None]).logits[0, -1]
            assert letter == max(q.options, key=lambda o, logits=logits: float(logits[letters[o]]))
            assert row.input_ids[-1] == row.labels[-1] == ord(q.answer)
    longest = byte_tokenizer().decode(max(rows, key=len).input_ids)
    assert [longest.count(f"例{i}") for i in range(6)] == [1, 1, 1, 1, 1, 0]


def test_the_real_files_are_read(general_probe):
    probe = read_probe(general_probe / "probe_300.csv")
    assert len(probe.questions) == 300
    assert probe.questions == read_probe(general_probe).questions
    assert len(probe.shots) == 48 + 3 + 15 + 5
    assert all(len(s) == 5 for s in probe.shots.values())
    exam = read_probe(general_probe / "medical/cmexam_test_01_clinical_depart.csv")
    assert (len(exam.questions), exam.skipped) == (606 - 11, 11)
    assert len(read_probe(general_probe / "cmmlu").questions) == 2570


# ---- bundled prompts -----------------------------------------------------------------------------------------------


def test_general_prompts_are_right_by_their_own_answers_and_stand_in_no_sample():
    prompts = general_prompts()
    assert len({p.id for p in prompts}) == len({p.prompt for p in prompts}) == 40
    assert {p.lang for p in prompts} == {"zh", "en"}
    replayed = {
        json.loads(line)["messages"][0]["content"] for line in (SAMPLE / "general.jsonl").open(encoding="utf-8")
    }
    for p in prompts:
        assert p.is_right(p.answer), p
        assert not p.is_right("您好，请去医院检查。"), p
        assert p.prompt not in replayed
    assert prompt_file("general_chat.jsonl").endswith(b"\n")
