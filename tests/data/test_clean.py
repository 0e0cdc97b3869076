"""Repairs, rejections and masks: what each rule does, and that no row vanishes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cmqa.data.clean import RULES, clean, decimal_point, doubled_text
from lora_cmqa.data.personal import KINDS
from lora_cmqa.errors import ConfigError

from .conftest import dirty_text, row


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
        ("html_entities", "白细胞20&amp。times。109/L", "白细胞20×109/L"),
        ("html_entities", "血小板&amp。amp。lt。100时停药", "血小板<100时停药"),
        ("html_entities", "问：a&b。第二句话", "问：a&b。第二句话"),
        ("html_tags", "多喝水<br/>少<b>吃辣</b>", "多喝水少吃辣"),
        ("residue", "这个病怎么治？{[OnlyCharacteristic。No。1#120ask。com]ContentFlag}", "这个病怎么治？"),
        ("residue", '这个病怎么治？im=newImage。im。src="http://stat-z。xywy。com/c。png？s=3"。', "这个病怎么治？"),
        ("full_width", "０.５ｇ，10²和①", "0.5g，10²和①"),
        ("cut_start", "的话应该考虑是痔疮", "应该考虑是痔疮"),
        ("cut_start", "，我担心是手足口病", "我担心是手足口病"),
        ("cut_start", "了解一下这个病", "了解一下这个病"),
        ("cut_end", "多由于下肢静脉、", "多由于下肢静脉"),
        ("cut_end", "建议多休息，但是", "建议多休息"),
        ("cut_end", "希望对你有帮助。，", "希望对你有帮助。"),
        ("cut_end", "及时治疗发热原因才是（", "及时治疗发热原因才是"),
        ("cut_end", "注意休息和保暖", "注意休息和保暖"),
        ("cut_end", "应查明原因", "应查明原因"),
        ("begging", "多休息。希望对你有帮助，望采纳！", "多休息。希望对你有帮助"),
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


@given(st.lists(st.tuples(dirty_text, dirty_text), max_size=8))
@settings(max_examples=200, deadline=None)
def test_read_is_kept_and_rejected_on_any_rows(pairs):
    rows = [row(q, a, id=str(i)) for i, (q, a) in enumerate(pairs)]
    kept, report = clean(rows)
    assert report.read == len(rows) == len(kept) + len(report.rejects)
    assert {e.id for e in kept} | {e.id for e, _ in report.rejects} == {e.id for e in rows}
    again, second = clean(kept)
    assert again == kept
    assert (second.repaired, second.rejects) == (0, [])


SECRETS = {
    "phone": "13812345678",
    "hotline": "400-045-6799",
    "qq": "QQ：12345678",
    "wechat": "微信号：abc_12345",
    "id_card": "110101199003071234",
    "email": "li.lei@example.com",
    "url": "http://www.example.com/a?b=1",
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_personal_data_is_a_rule_of_its_own(kind):
    asked = row(question=f"孩子发烧，{SECRETS[kind]}，怎么办")
    kept, report = clean([asked])
    assert SECRETS[kind] not in kept[0].question
    assert KINDS[kind].word in kept[0].question
    assert {k for k in KINDS if report.rules[k].rows} == {kind}
    (sample,) = report.rules[kind].samples
    assert SECRETS[kind] not in sample["before"]
    assert "**" in sample["before"]
    assert clean([asked], off=[kind])[0][0].question == asked.question


def test_names_go_only_when_asked():
    asked = row(question="谢谢王小明医生，孩子发烧怎么办")
    assert clean([asked])[0] == [asked]
    kept, report = clean([asked], mask_names=True)
    assert kept[0].question == "谢谢[姓名]医生，孩子发烧怎么办"
    assert report.rules["names"].rows == 1
    assert "王小明" not in str(report.as_dict())


def test_a_rejected_row_is_kept_without_its_personal_data():
    _, report = clean([row(answer="请拨打咨询电话400-045-6799，手机13812345678")])
    ((rejected, reason),) = report.rejects
    assert reason == "advert"
    assert rejected.answer == "请拨打咨询电话[热线]，手机[电话]"


def test_an_advert_is_seen_although_masking_is_off():
    kept, report = clean([row(answer="请拨打咨询电话400-045-6799")], off=tuple(KINDS))
    assert (kept, report.rejects[0][1]) == ([], "advert")


@pytest.mark.parametrize(
    "text", ["我不想活了，怎么办", "药吃了一瓶农药", "他割腕了", "反复有轻生的念头", "I want to kill myself"]
)
def test_self_harm_is_flagged_and_stays(text):
    asked = row(question=text)
    kept, report = clean([asked, row(id="2")])
    assert kept == [asked, row(id="2")]
    assert report.flags == {"self_harm": ["1"]}
    assert report.rules["self_harm"].rows == 1
    assert clean([asked], off=["self_harm"])[1].flags == {}


@pytest.mark.parametrize("text", ["发作时双眼上吊", "两眼上吊，口吐白沫", "这药自己停了可以吗", "想知道原因"])
def test_words_that_only_sound_like_self_harm_are_none(text):
    assert clean([row(question=text)])[1].flags == {"self_harm": []}
