"""Repairs, rejections and masks: what each rule does, and that no row vanishes."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cmqa.data.clean import RULES, clean, decimal_point, doubled_text, private_data
from lora_cmqa.data.prepare import prepare
from lora_cmqa.data.sources import write_messages
from lora_cmqa.errors import ConfigError

from .conftest import row


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
