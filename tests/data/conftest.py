"""Rows and folders that the data room's tests share."""

from pathlib import Path

import pytest

from lora_cmqa.core import Example, Message
from lora_cmqa.data.prepare import prepare


def row(question="孩子发烧怎么办", answer="建议多喝水，注意休息，必要时去医院。", id="1", **more):
    return Example((Message("user", question), Message("assistant", answer)), id=id, question_id=f"q{id}", **more)


def cmqa(
    folder: Path,
    questions="question_id,content\n1,头痛怎么办\n",
    answers="ans_id,question_id,content\n9,1,建议休息观察。\n",
):
    folder.mkdir(exist_ok=True)
    (folder / "questions.csv").write_text(questions, encoding="utf-8")
    (folder / "answers.csv").write_text(answers, encoding="utf-8")
    return folder


@pytest.fixture(scope="package")
def mini_report(cmqa_mini, tmp_path_factory):
    """(report, folder) of cmqa-mini, prepared once."""
    out = tmp_path_factory.mktemp("mini")
    return prepare(cmqa_mini, out), out
