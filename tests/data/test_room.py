"""The data room from file to folder: nothing lost, nothing leaked, nothing dangerous taught."""

import codecs
import contextlib
import json
import random
import shutil
import subprocess
import tempfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cmqa.core import Example, Message
from lora_cmqa.data.clean import RULES, clean, decimal_point, doubled_text, private_data
from lora_cmqa.data.files import encoding_of, lines, on_disk, zip_files
from lora_cmqa.data.prepare import load_split, prepare
from lora_cmqa.data.sources import (
    read_cmqa,
    read_conversations,
    read_examples,
    read_messages,
    write_conversations,
    write_messages,
)
from lora_cmqa.data.split import jaccard, leaks, shingles, split
from lora_cmqa.errors import CmqaError, ConfigError, DataError, ResourceError


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


# ---- what the real sets must show ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mini_report(cmqa_mini, tmp_path_factory):
    out = tmp_path_factory.mktemp("mini")
    return prepare(cmqa_mini, out), out


def test_mini_names_every_full_stop_between_digits(mini_report):
    stops = mini_report[0]["digit_stops"]
    assert (stops["questions"]["rows"], stops["questions"]["points"]) == (178, 360)
    assert (stops["answers"]["rows"], stops["answers"]["points"]) == (77, 165)
    assert 0 < stops["questions"]["kept"] < 60
    assert 0 < stops["answers"]["kept"] < 30


def test_mini_every_row_is_accounted_for(mini_report):
    report, out = mini_report
    assert report["read"] == 5000 == report["kept"] + report["rejected"]
    assert sum(1 for _ in (out / "rejects.jsonl").open(encoding="utf-8")) == report["rejected"]
    assert sum(len(load_split(out, s)) for s in ("train", "dev", "test")) == report["kept"]


def test_prepare_changes_nothing_in_its_own_output(mini_report, tmp_path):
    _, out = mini_report
    again = prepare(out, tmp_path / "again")
    assert (again["repaired"], again["rejected"]) == (0, 0)
    for s in ("train", "dev", "test"):
        assert (out / f"{s}.jsonl").read_bytes() == (tmp_path / "again" / f"{s}.jsonl").read_bytes()


def test_a_naive_split_leaks_and_ours_does_not(cmqa_mini):
    rows, _ = read_cmqa(cmqa_mini)
    shuffled = rows.copy()
    random.Random(0).shuffle(shuffled)
    naive = leaks(shuffled[:500], shuffled[500:])
    assert 0.03 < naive.questions / naive.of_questions < 0.09
    ours = split(rows, dev=0.1, test=0.1, seed=1)
    sides = {s: [e for e in ours if e.split == s] for s in ("train", "dev", "test")}
    assert all(len(sides[s]) > 400 for s in sides)
    for a, b in (("test", "train"), ("dev", "train"), ("test", "dev")):
        found = leaks(sides[a], sides[b])
        assert (found.questions, found.answers) == (0, 0)


def test_cepilepsyqa_leaks_and_hotlines(cepilepsyqa, tmp_path):
    report = prepare(cepilepsyqa, tmp_path / "raw", no_clean=RULES)
    found = report["leaks"]["test_train"]
    assert 52 <= found["questions"] <= 62
    assert 67 <= found["answers"] <= 77
    cleaned = prepare(cepilepsyqa, tmp_path / "cleaned", drop_leaks=True)
    assert cleaned["reasons"]["advert"] >= 67
    assert "400-045-6799" not in (tmp_path / "cleaned" / "train.jsonl").read_text(encoding="utf-8")
    assert cleaned["leaks"]["test_train"]["questions"] == cleaned["leaks"]["test_train"]["answers"] == 0


# ---- rules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("叶酸0。7mg", "叶酸0.7mg"),
        ("37。5度", "37.5度"),
        ("孕酮16。1。请问", "孕酮16.1。请问"),
        ("2015。3。13做的检查", "2015。3。13做的检查"),
        ("步骤：1。2。都可以", "步骤：1。2。都可以"),
        ("颈椎4。5。6节", "颈椎4。5。6节"),
        ("1。5000高锰酸钾", "1。5000高锰酸钾"),
        ("2月13。14号", "2月13。14号"),
        ("好。3天后", "好。3天后"),
    ],
)
def test_decimal_point(before, after):
    assert decimal_point(before) == after


@pytest.mark.parametrize(
    ("rule", "before", "after"),
    [
        ("html_entities", "白细胞20&amp;times;10", "白细胞20×10"),
        ("residue", '这个病怎么治？im=newImage。im。src="http://stat-z。xywy。com/c。png？s=3"。', "这个病怎么治？"),
        ("full_width", "０.５ｇ，10²和①", "0.5g，10²和①"),
        ("cut_start", "的话应该考虑是痔疮", "应该考虑是痔疮"),
        ("cut_start", "，我担心是手足口病", "我担心是手足口病"),
        ("cut_start", "了解一下这个病", "了解一下这个病"),
        ("begging", "多休息。希望对你有帮助，望采纳！", "多休息。希望对你有帮助，"),
    ],
)
def test_a_repair_and_its_switch(rule, before, after):
    kept, report = clean([row(answer=before)])
    assert kept[0].answer == after
    assert report.rules[rule].rows == 1 or before == after
    assert clean([row(answer=before)], off=RULES)[0][0].answer == before


def test_doubled_title_goes():
    assert (
        doubled_text("便血鲜红不疼怎么办呢便血鲜红不疼怎么办呢？从上个星期开始")
        == "便血鲜红不疼怎么办呢？从上个星期开始"
    )


def test_an_unknown_rule_is_refused():
    with pytest.raises(ConfigError, match="no cleaning rule"):
        clean([], off=["nonsense"])


texts = st.text(alphabet=st.sampled_from("你好的了吗。，？1230 a<>&;@-[]\n０采纳望"), max_size=30)


@given(st.lists(st.tuples(texts, texts), max_size=8))
@settings(max_examples=60, deadline=None)
def test_read_is_kept_and_rejected_on_any_rows(pairs):
    rows = [row(q, a, id=str(i)) for i, (q, a) in enumerate(pairs)]
    kept, report = clean(rows)
    assert report.read == len(rows) == len(kept) + len(report.rejects)
    assert {e.id for e in kept} | {e.id for e, _ in report.rejects} == {e.id for e in rows}


# ---- cases ---------------------------------------------------------------------------------------------------------


def planted(rng: random.Random) -> tuple[str, str]:
    """A sentence with one piece of personal data, and that piece."""
    d = lambda n: "".join(rng.choice("0123456789") for _ in range(n))  # noqa: E731
    head = f"1{rng.choice('3456789')}{d(1)}"
    secret = rng.choice(
        [
            f"{head}{d(8)}",
            f"{head} {d(4)} {d(4)}",
            f"{head}-{d(4)}-{d(4)}",
            f"+86 {head}{d(8)}",
            f"0{rng.randint(10, 29)}-{rng.randint(2, 8)}{d(7)}",
            f"QQ：{rng.randint(1, 9)}{d(rng.randint(5, 9))}",
            f"扣扣{rng.randint(1, 9)}{d(8)}",
            f"微信号：{rng.choice('abcxyz')}{rng.choice('kmn')}_{d(6)}",
            f"VX:{rng.choice('abcxyz')}yao{d(5)}",
            f"{rng.randint(11, 65)}{d(4)}{rng.randint(1950, 2015)}0{rng.randint(1, 9)}1{rng.randint(0, 9)}{d(3)}X",
            f"dr.{rng.choice('abc')}{d(4)}@example.com",
            f"http://www.example.com/{d(5)}",
        ]
    )
    return f"孩子{rng.randint(2, 9)}岁，联系我{secret}，谢谢医生。", secret


def test_case_42_personal_data_is_masked_before_training(tmp_path):
    rng = random.Random(42)
    found = 0
    for _ in range(2000):
        text, secret = planted(rng)
        core = max((p for p in secret.replace("：", ":").split(":")), key=len)
        found += core not in private_data(text)
    assert found / 2000 >= 0.99
    sentences = [planted(rng) for _ in range(50)]
    write_messages(tmp_path / "in.jsonl", [row(question=f"{i}号 {t}", id=str(i)) for i, (t, _) in enumerate(sentences)])
    prepare(tmp_path / "in.jsonl", tmp_path / "out", dev=0, test=0)
    written = (tmp_path / "out" / "train.jsonl").read_text(encoding="utf-8")
    assert not [s for _, s in sentences if s in written]


def test_case_42_numbers_of_medicine_stay():
    for text in ("血压140/90，血糖7.8mmol/L", "HCG 145554.00", "一次400mg，每日3次", "2015-03-13检查", "每年4000人"):
        assert private_data(text) == text


def test_case_41_every_row_can_be_traced_and_every_byte_is_hashed(tmp_path):
    rows = [row(f"问题{i}：{'甲乙丙丁戊'[i % 5] * 3}怎么办{i * 7919}", id=f"r{i}") for i in range(20)]
    write_messages(tmp_path / "in.jsonl", rows)
    prepare(tmp_path / "in.jsonl", tmp_path / "a", dev=0, test=0)
    card = json.loads((tmp_path / "a" / "data_card.json").read_text(encoding="utf-8"))
    assert {e.id for e in read_messages(tmp_path / "a" / "train.jsonl")} <= {e.id for e in rows}
    write_messages(tmp_path / "in.jsonl", [*rows[:-1], row("问题被人改了", id="r19")])
    prepare(tmp_path / "in.jsonl", tmp_path / "b", dev=0, test=0)
    other = json.loads((tmp_path / "b" / "data_card.json").read_text(encoding="utf-8"))
    assert card["inputs"] != other["inputs"]
    assert card["outputs"]["train.jsonl"] != other["outputs"]["train.jsonl"]


def test_spun_text_is_refused_unless_allowed(tmp_path):
    rows = [row(f"通风机{90 + i}，高压{140 + i}怎么办", id=str(i)) for i in range(4)]
    write_messages(tmp_path / "in.jsonl", rows)
    with pytest.raises(DataError, match="allow-spun"):
        prepare(tmp_path / "in.jsonl", tmp_path / "out", dev=0, test=0)
    assert prepare(tmp_path / "in.jsonl", tmp_path / "out", dev=0, test=0, allow_spun=True)["spun"]


def test_leaks_against_a_benchmark(tmp_path):
    write_messages(
        tmp_path / "in.jsonl", [row(id="1"), row("手脚冰凉是什么原因造成的", "注意保暖，适当运动。", id="2")]
    )
    write_messages(tmp_path / "bench.jsonl", [row("孩子发烧怎么办", "另一个完全不同的回答在这里。", id="b")])
    report = prepare(tmp_path / "in.jsonl", tmp_path / "o", dev=0, test=0, against=[tmp_path / "bench.jsonl"])
    assert report["against"]["train_bench.jsonl"]["questions"] == 1
    dropped = prepare(
        tmp_path / "in.jsonl", tmp_path / "o", dev=0, test=0, against=[tmp_path / "bench.jsonl"], drop_leaks=True
    )
    assert dropped["reasons"] == {"leak": 1}


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "encode", [lambda t: t.encode(), lambda t: codecs.BOM_UTF8 + t.encode(), lambda t: t.encode("gb18030")]
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_encoding_and_line_end(tmp_path, encode, end):
    text = 'question,answer\n"孩子咳嗽三天了，\n要不要紧","建议先观察，多喝水。"\n'.replace("\n", end)
    (tmp_path / "数据.csv").write_bytes(encode(text))
    (example,) = read_examples(tmp_path / "数据.csv")
    assert example.question == f"孩子咳嗽三天了，{end}要不要紧"
    assert example.answer == "建议先观察，多喝水。"


def test_an_orphan_answer_is_named_with_its_line(tmp_path):
    folder = cmqa(tmp_path / "d", answers="ans_id,question_id,content\n9,1,建议休息观察。\n10,7,没有问题的回答。\n")
    with pytest.raises(DataError, match=r"question_id 7 is not in questions.csv \(1 rows like this, of 2\)") as e:
        prepare(folder, tmp_path / "o")
    assert (e.value.row, "--on-orphan drop" in e.value.hint) == (3, True)
    report = prepare(folder, tmp_path / "o", on_orphan="drop", dev=0, test=0)
    assert (report["read"], report["kept"], report["reasons"]) == (2, 1, {"orphan": 1})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"question,answer\n", "no row"),
        ("题目,内容\n一,二\n".encode(), "no column"),
        (b"question,answer\na,b,c\n", "3 fields"),
        (b'question,answer\n"abc,d\n', "whole CSV"),
        (random.Random(5).randbytes(4000), "no text"),
        ("question,answer\n繁體中文的問題,這是繁體的回答\n".encode("big5"), "neither UTF-8 nor GB18030"),
        (b"question,answer\n" + "很长的问题很长的问题很长的问题很长的问题".encode() + b"\xe5", "broken UTF-8"),
    ],
)
def test_a_bad_file_is_a_data_error(tmp_path, content, says):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(DataError, match=says) as e:
        read_examples(tmp_path / "x.csv")
    assert "x.csv" in str(e.value)


def test_a_hundred_megabyte_line_is_refused(tmp_path):
    with (tmp_path / "x.csv").open("wb") as f:
        f.write(b"question,answer\n")
        for _ in range(100):
            f.write(b"a" * (1 << 20))
    with pytest.raises(DataError, match="a line of more than"):
        list(lines(on_disk(tmp_path / "x.csv")))


def test_an_unwritable_folder_is_a_resource_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError):
        prepare(cmqa(tmp_path / "d"), tmp_path / "file", dev=0, test=0)


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_no_bytes_do_anything_but_read_or_say_what_is_wrong(content):
    with tempfile.TemporaryDirectory() as folder:
        for name in ("x.csv", "x.jsonl"):
            file = Path(folder) / name
            file.write_bytes(content)
            with contextlib.suppress(CmqaError):
                read_examples(file)


def test_both_written_forms_read_back(tmp_path):
    rows = [row(id="1", source="a.csv", split="train"), row("第二个问题", id="2", source="a.csv", split="dev")]
    write_messages(tmp_path / "m.jsonl", rows)
    assert read_messages(tmp_path / "m.jsonl") == rows
    write_conversations(tmp_path / "c.json", rows)
    assert [(e.id, e.messages) for e in read_conversations(tmp_path / "c.json")] == [(e.id, e.messages) for e in rows]


def test_a_hostile_zip_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "up.zip", "w") as z:
        z.writestr("../evil.csv", "question,answer\n")
    with pytest.raises(DataError, match="leaves"):
        zip_files(tmp_path / "up.zip")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a.csv", b"0" * (20 << 20))
    with pytest.raises(DataError, match="zip bomb"):
        zip_files(tmp_path / "bomb.zip")


def test_a_zip_and_a_folder_of_zips_read_like_the_folder(tmp_path):
    folder = cmqa(tmp_path / "d")
    (tmp_path / "z").mkdir()
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as both:
        for name in ("questions", "answers"):
            both.write(folder / f"{name}.csv", f"cMQA/{name}.csv")
            with zipfile.ZipFile(tmp_path / "z" / f"{name}.zip", "w") as z:
                z.write(folder / f"{name}.csv", f"{name}.csv")
    plain = read_examples(folder)
    assert read_examples(tmp_path / "all.zip") == read_examples(tmp_path / "z") == plain
    assert prepare(tmp_path / "all.zip", tmp_path / "o", dev=0, test=0)["kept"] == 1


@pytest.mark.skipif(shutil.which("zip") is None, reason="needs the zip command to split an archive")
def test_a_split_archive_is_read_as_the_one_it_was(tmp_path):
    noise = "".join(f"{i},1,{random.Random(i).random()}很长的回答\n" for i in range(6000))
    folder = cmqa(tmp_path / "d", answers="ans_id,question_id,content\n" + noise)
    subprocess.run(["zip", "-q", "-s", "64k", "../s.zip", "answers.csv", "questions.csv"], cwd=folder, check=True)
    assert (tmp_path / "s.z01").exists()
    assert read_examples(tmp_path / "s.zip") == read_examples(folder)
    (tmp_path / "s.z01").unlink()
    with pytest.raises(DataError, match="split archive"):
        read_examples(tmp_path / "s.zip")


def test_a_header_narrower_than_its_rows_is_named_with_the_command(tmp_path):
    folder = cmqa(tmp_path / "d")
    (folder / "dev_candidates.txt").write_text("question_id,ans_id,label\n1,9,0,1\n")
    with pytest.raises(DataError, match="under a header of 3 names") as e:
        prepare(folder, tmp_path / "o")
    assert "sed -i" in e.value.hint


def test_the_page_needs_no_network(mini_report):
    page = (mini_report[1] / "report.html").read_text(encoding="utf-8")
    assert '"showSendToCloud": false' in page or '"showSendToCloud":false' in page
    assert "<script src=" not in page


def test_encoding_is_found_by_looking(tmp_path):
    for name, content in (("a", "中文" * 100), ("b", "abc")):
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert encoding_of(on_disk(tmp_path / name)) == "utf-8-sig"


def test_jaccard_by_hand():
    assert jaccard(shingles("abcdef"), shingles("abcdeg")) == pytest.approx(1 / 3)
