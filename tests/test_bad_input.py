"""Bad input of each kind: one message that helps, an exit code, no traceback."""

import json

import pytest

from lora_cmqa.cli import main

GOOD_Q = "question_id,content\n1,头痛怎么办呢\n2,咳嗽怎么办呢\n"
GOOD_A = "ans_id,question_id,content\n1,1,您好，请注意休息\n2,2,您好，请多喝温水\n"


def cmqa(folder, questions=GOOD_Q, answers=GOOD_A):
    folder.mkdir(exist_ok=True)
    (folder / "questions.csv").write_text(questions, encoding="utf-8")
    (folder / "answers.csv").write_text(answers, encoding="utf-8")
    return str(folder)


def rows(file, *turns):
    with file.open("w", encoding="utf-8") as f:
        for question, answer in turns:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            f.write(json.dumps({"messages": messages}) + "\n")
    return str(file)


def fails(argv, code, *says, capsys):
    assert main(argv) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    for text in says:
        assert text in err


@pytest.mark.parametrize(
    ("questions", "answers", "says"),
    [
        ("id,content\n1,头痛\n", GOOD_A, ["questions.csv", "question_id"]),
        (GOOD_Q, GOOD_A + "3,77,没有问题的回答\n", ["answers.csv", "line 4", "77", "--on-orphan drop"]),
        ("", GOOD_A, ["questions.csv", "empty"]),
        (GOOD_Q, "ans_id,question_id,content\n1,1\n", ["answers.csv", "line 2"]),
        (GOOD_Q, 'ans_id,question_id,content\n1,1,"没有关上的引号\n', ["answers.csv"]),
    ],
)
def test_a_bad_folder_is_named(tmp_path, capsys, questions, answers, says):
    source = cmqa(tmp_path / "src", questions, answers)
    fails(["prepare", source, "--out", str(tmp_path / "out")], 2, *says, capsys=capsys)


def test_no_such_source(tmp_path, capsys):
    fails(["prepare", str(tmp_path / "nowhere"), "--out", str(tmp_path)], 2, "nowhere", capsys=capsys)


def test_random_bytes(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_bytes(bytes(range(256)) * 20)
    fails(["prepare", str(tmp_path / "x.jsonl"), "--out", str(tmp_path / "o")], 2, "x.jsonl", capsys=capsys)


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    argv = ["prepare", cmqa(tmp_path / "src"), "--out", str(tmp_path / "file" / "out")]
    assert main(argv) in (2, 3)
    assert "Traceback" not in capsys.readouterr().err
    data = rows(tmp_path / "d.jsonl", ("头痛怎么办", "请注意休息"))
    argv = ["train", "--model", "tiny", "--data", data, "--output-dir", str(tmp_path / "file" / "run")]
    assert main(argv) in (2, 3)
    assert "Traceback" not in capsys.readouterr().err


def train(tmp_path, data, *more):
    return ["train", "--model", "tiny", "--data", data, "--output-dir", str(tmp_path / "run"), *more]


def test_unknown_model(tmp_path, capsys):
    data = rows(tmp_path / "d.jsonl", ("头痛怎么办", "请注意休息"))
    argv = ["train", "--model", "tinny", "--data", data, "--output-dir", str(tmp_path / "run")]
    fails(argv, 2, "tinny", "tiny", capsys=capsys)


def test_every_row_too_long(tmp_path, capsys):
    data = rows(tmp_path / "d.jsonl", ("头痛" * 50, "休息" * 50))
    fails(train(tmp_path, data, "--model-max-length", "32"), 2, "32", capsys=capsys)


def test_no_supervised_token(tmp_path, capsys):
    data = rows(tmp_path / "d.jsonl", ("头痛怎么办", ""))
    fails(train(tmp_path, data), 2, capsys=capsys)


def test_no_data_and_no_output_dir(tmp_path, capsys):
    fails(["train", "--model", "tiny"], 2, "--", capsys=capsys)
    fails(["train", "--model", "tiny", "--data", str(tmp_path / "x")], 2, capsys=capsys)


def test_a_run_that_is_none(tmp_path, capsys):
    for verb in ("eval", "chat"):
        fails([verb, str(tmp_path)], 2, capsys=capsys)
    fails(["compare", str(tmp_path), "头痛怎么办"], 2, capsys=capsys)
    fails(["merge", str(tmp_path), "--out", str(tmp_path / "m")], 2, capsys=capsys)
