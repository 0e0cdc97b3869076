"""Rows and folders that the data room's tests share."""

import random
from pathlib import Path

import pytest
from hypothesis import strategies as st

from lora_cmqa.core import Example, Message
from lora_cmqa.data.personal import KINDS
from lora_cmqa.data.prepare import prepare

# Pieces that the rules look for: joined at random, what one rule leaves another may find.
PIECES = (
    *("孩子发烧", "请多休息", "建议就医", "好", "a", " ", "\n", "。", "，", "、", "？", "（"),
    *(
        "&amp。",
        "amp。",
        "&lt;",
        "lt。",
        "b&gt。",
        "<b>",
        "</b>",
        "{[",
        "]x}",
        "<!--",
        "-->",
        "\u200b",
        "\u3000",
        "\ufffd",
    ),
    *("1", "。5", "2。3", "０", "的话", "但是", "了，", "望采纳", "请", "采纳", "点击咨询", "不想活"),
    *("138", "1234", "5678", "QQ：", "微信", "abc_123", "@qq.com", "www。", "b。com", "400-", "045-6799"),
)
dirty_text = st.lists(st.sampled_from(PIECES), max_size=10).map("".join)


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


# ---- personal data -------------------------------------------------------------------------------------------------

CONTEXTS = (
    "孩子3岁，{}，谢谢医生。",
    "{}",
    "您好！血压140/90，{}。麻烦回复",
    "我的情况比较急{}，请尽快联系我！",
    "（{}）体温37.5度，两天了",
    "检查结果：白细胞10.5\n{}\n请问严重吗？",
)


def planted(rng: random.Random) -> tuple[str, str, str]:
    """(kind, text, secret): one piece of personal data in a sentence; `secret` is what must not stay."""

    def d(n: int, first: str = "0123456789") -> str:
        return rng.choice(first) + "".join(rng.choice("0123456789") for _ in range(n - 1))

    def wide(text: str) -> str:
        return text.translate({ord(c): ord(c) + 0xFEE0 for c in "0123456789"})

    def spoken(text: str) -> str:
        return text.translate(dict(zip(map(ord, "0123456789"), "零幺二三四五六七八九", strict=True)))

    def word(low: int, high: int) -> str:
        return "".join(rng.choice("abcdefghijkmnpqrstuvwxyz") for _ in range(rng.randint(low, high)))

    mobile = "1" + d(1, "3456789") + d(9)
    a, b, c = mobile[:3], mobile[3:7], mobile[7:]
    zone, local = "0" + d(rng.choice((2, 3)), "123456789"), d(8, "2345678")
    year, month, day = rng.randint(1940, 2018), rng.randint(1, 12), rng.randint(1, 28)
    card = d(6, "12345678") + f"{year}{month:02}{day:02}" + d(3) + rng.choice("0123456789X")
    old_card = d(6, "12345678") + f"{year % 100:02}{month:02}{day:02}" + d(3)
    number, name = d(rng.randint(6, 10), "123456789"), f"{word(2, 4)}{d(3)}"
    wechat = rng.choice((f"{word(2, 5)}_{d(5)}", f"{word(6, 10)}", f"{word(1, 3)}{d(6)}", f"{word(3, 4)}-{word(3, 5)}"))
    site = f"{word(3, 9)}{rng.choice(('', '-' + word(2, 4)))}"
    kind = rng.choice(list(KINDS))
    forms = {
        "phone": [
            (f"联系我{mobile}", mobile),
            (f"手机号{a} {b} {c}", f"{a} {b} {c}"),
            (f"电话：{a}-{b}-{c}", f"{a}-{b}-{c}"),
            (f"打{a}.{b}.{c}", f"{a}.{b}.{c}"),
            (f"打{a}。{b}。{c}", f"{a}。{b}。{c}"),
            (f"手机+86 {mobile}", mobile),
            (f"手机0086{mobile}", mobile),
            (f"手机86-{a}-{b}-{c}", f"{a}-{b}-{c}"),
            (f"号码{wide(mobile)}", wide(mobile)),
            (f"手机{spoken(mobile)}", spoken(mobile)),
            (f"{a}{b}—{c}", f"{a}{b}—{c}"),
            (f"手机{mobile[:5]} {mobile[5:]}", f"{mobile[:5]} {mobile[5:]}"),
            (f"手机{a}/{b}/{c}", f"{a}/{b}/{c}"),
            (f"手机{a}*{b}*{c}", f"{a}*{b}*{c}"),
            (f"手机{' '.join(mobile)}", " ".join(mobile)),
            (f"座机{zone}-{local}", f"{zone}-{local}"),
            (f"座机({zone}){local}", local),
            (f"固话{zone} {local[:4]} {local[4:]}", f"{local[:4]} {local[4:]}"),
            (f"{zone}{local}转{d(3)}", f"{zone}{local}"),
            (f"电话是{local}", local),
        ],
        "hotline": [
            (f"拨打400-{local[:3]}-{b}", f"400-{local[:3]}-{b}"),
            (f"热线400{local[:7]}", local[:7]),
            (f"热线800 {local[:3]} {b}", f"800 {local[:3]} {b}"),
            (f"咨询400－{local[:4]}－{b[:3]}", f"400－{local[:4]}－{b[:3]}"),
        ],
        "qq": [
            (f"QQ：{number}", number),
            (f"qq号是{number}", number),
            (f"扣扣{number}", number),
            (f"加我qq {number}", number),
            (f"加Q{number}", number),
            (f"ＱＱ：{number}", number),
            (f"QQ：{number[:3]} {number[3:]}", f"{number[:3]} {number[3:]}"),
            (f"QQ群：{number}", number),
            (f"Q:{number}", number),
            (f"{number}(QQ)", number),
            (f"企鹅号{number}", number),
            (f"{number}是我的QQ", number),
        ],
        "wechat": [
            (f"微信号：{wechat}", wechat),
            (f"微信{wechat}", wechat),
            (f"加微信 {wechat}", wechat),
            (f"VX:{wechat}", wechat),
            (f"vx {wechat}", wechat),
            (f"wx：{wechat}", wechat),
            (f"v信{wechat}", wechat),
            (f"WeChat: {wechat}", wechat),
            (f"加我V：{wechat}", wechat),
            (f"微信公众号：{wechat}", wechat),
            (f"微信是{number}", number),
            (f"薇：{wechat}", wechat),
            (f"，V：{wechat}", wechat),
        ],
        "id_card": [
            (f"身份证{card}", card),
            (f"身份证号码：{card[:-1]}x", card[:-1]),
            (card, card),
            (f"{card[:6]} {card[6:14]} {card[14:]}", f"{card[6:14]} {card[14:]}"),
            (f"证件号{old_card}", old_card),
            (f"身份证号{card[:10]}******{card[16:]}", card[:10]),
        ],
        "email": [
            (f"邮箱{name}@qq.com", f"{name}@qq.com"),
            (f"{name}@163。com", f"{name}@163"),
            (f"发到{name}.{word(2, 4)}@mail.{site}.com.cn", f"@mail.{site}"),
            (f"{name}＠126.com", f"{name}＠126"),
            (f"{name}(at){site}.net", f"{name}(at)"),
            (f"{number}@qq.com", number),
            (f"邮箱{name}@qq点com", f"{name}@qq"),
        ],
        "url": [
            (f"见http://www.{site}.com/{name}", site),
            (f"网址https://{site}.cn/a?id={number}", number),
            (f"www.{site}.com", site),
            (f"www。{site}。com", site),
            (f"http://bbs。{site}。com/c。png？x={number}", number),
            (f"登录{site}.com.cn", site),
            (f"百度{site}。net", site),
        ],
    }
    form, secret = rng.choice(forms[kind])
    return kind, rng.choice(CONTEXTS).format(form), secret
