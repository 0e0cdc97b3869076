"""Personal data in text: found, masked, blurred. Telephone, hotline, QQ, WeChat, ID card, e-mail, web address, names.

    联系我13812345678，谢谢     mask  ->  联系我[电话]，谢谢
                                find  ->  [Found("phone", "13812345678", 3)]
                                blur  ->  联系我13*********，谢谢         (for a report's samples)

One table serves cleaning (before training) and the evaluation's scan of generated text. Digits may be full-width, and a
dot may be the `。` that cMedQA2 made of every dot (www。example。com). A number of medicine (140/90, 145554.00) stays.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Sign = Literal["latin", "digits"]


@dataclass(frozen=True, slots=True)
class Kind:
    """`word` stands in the text's place; `pattern` finds it, and only where the text has one of `signs`."""

    word: str
    pattern: re.Pattern[str]
    signs: tuple[Sign, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """`start` counts characters of the text it was found in."""

    kind: str
    text: str
    start: int


_DOT = r"[.。．]"
_GAP = r"[-—–－.。·/*\s]?"
_IS = r"[:：,，是为加\s]*"  # between the word and the number: 微信号是：
_ZONES = r"(?:com|cn|net|org|cc|top|vip|info|edu|gov|xyz|site|shop|club|me|tv)"


def _any(*ways: str, flags: re.RegexFlag = re.NOFLAG) -> re.Pattern[str]:
    return re.compile("|".join(ways), flags)


# In the order they are masked: what looks like a telephone number inside an ID card is the card's.
KINDS: dict[str, Kind] = {
    "email": Kind(
        "[邮箱]",
        re.compile(
            rf"[\w.%+-]{{1,64}}\s?(?:[@＠]|[(（\[]at[)）\]])\s?[\w-]+(?:{_DOT}[\w-]+)*(?:{_DOT}|点)[A-Za-z]{{2,}}",
            re.A | re.I,
        ),
        ("latin",),
    ),
    "url": Kind(
        "[网址]",
        _any(
            rf"(?:https?[:：]//|www{_DOT})[\w-]+(?:{_DOT}[\w-]+)*(?::\d+)?(?:[/?#？][\w./?#&=%:+~;,@!-]*(?:[。？][\w/?#&=%:+~-]+)*)?",
            rf"(?<![\w.。@-])[\w-]{{2,}}(?:{_DOT}[\w-]+)*{_DOT}{_ZONES}(?![\w-])(?:/[\w./?#&=%:+~-]*)?",
            flags=re.A | re.I,
        ),
        ("latin",),
    ),
    "id_card": Kind(
        "[证件号]",
        _any(
            r"(?<!\d)[1-9１-９]\d{5}[ -]?(?:19|20|１９|２０)\d\d(?:0[1-9]|1[0-2]|０[１-９]|１[０-２])"
            r"[0-3０-３]\d[ -]?\d{3}[\dXxＸｘ](?!\d)",
            r"(?<!\d)[1-9]\d{5}\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}(?!\d)",  # the 15 digits of before 1999
            rf"身份证(?:件)?(?:号码?)?{_IS}\d[\d* ]{{13,18}}[\dXx*](?!\d)",
        ),
        ("digits",),
    ),
    "hotline": Kind("[热线]", re.compile(rf"(?<![\d.])[48]00{_GAP}(?:\d{_GAP}){{6}}\d(?!\d)"), ("digits",)),
    "phone": Kind(
        "[电话]",
        _any(
            rf"(?<!\d)(?:(?:\+|00)?86{_GAP})?[1１][3-9３-９]\d(?:{_GAP}\d{{4}}{_GAP}\d{{4}}|{_GAP}\d{{3}}{_GAP}\d{{5}}"
            rf"|\d{{2}}{_GAP}\d{{6}})(?!\d)",
            r"(?<![\d\s])\s?1\s[3-9](?:\s\d){9}(?!\d)",
            r"(?<![零〇一二三四五六七八九幺])[一幺][三四五六七八九][零〇一二三四五六七八九幺]{9}(?![零〇一二三四五六七八九])",
            r"(?<![\d.])[(（]?[0０]\d{2,3}(?:[)）]\s?|[-—–－ ]?)(?:\d{7,8}|\d{4}[- ]\d{4}|\d{3}[- ]\d{4})(?![\d.])"
            r"(?:\s?[-转]\s?\d{1,5})?",
            rf"(?:电话|手机|座机|热线|联系方式|号码|致电|拨打|[Tt][Ee][Ll]){_IS}[2-9]\d{{2,3}}[- ]?\d{{4}}(?!\d)",
        ),
        ("digits",),
    ),
    "qq": Kind(
        "[QQ]",
        _any(
            rf"(?:QQ|Q\sQ|ＱＱ|扣扣|抠抠|企鹅)(?:号码?|群号?)?{_IS}[1-9１-９]"
            r"(?:\d{4,10}|\d{2,3}(?:[ -]\d{3,7}){1,2})(?!\d)",
            r"(?<![A-Za-z])(?:(?<=[加我的是])Q\s?|Q\s?[:：]\s?)[1-9]\d{4,10}(?!\d)",
            r"(?<!\d)[1-9]\d{4,10}\s?[(（]?(?:是我的?)?(?:QQ|扣扣)号?[)）]?",
            flags=re.I,
        ),
        ("digits",),
    ),
    "wechat": Kind(
        "[微信]",
        _any(
            rf"(?:微\s?信|薇\s?信|威信|[vV]信|wei\s?xin|wechat|(?<![a-z])[vw]x)(?:公众号|号码?|同号)?{_IS}"
            r"(?:[a-z][-a-z0-9_]{5,19}|\d{6,})",
            rf"(?:(?:加我?|我的?)(?:v|微|薇){_IS}|(?:薇|(?<![a-z])v)\s?[:：]\s?)(?:[a-z][-a-z0-9_]{{5,19}}|\d{{6,}})",
            flags=re.I | re.A,
        ),
        ("latin", "digits"),
    ),
}

# ---- names: only when asked, for a pattern over surnames is sometimes wrong ----------------------------------------

# The hundred most frequent surnames (census of 2020) and some more; left out are those that are everyday words before
# a title (向医生, 和医生, 于, 从, 时, 应). Two-character surnames stand first.
_SURNAME = (
    "(?:欧阳|司马|上官|诸葛|司徒|皇甫|慕容|尉迟|令狐|夏侯|"
    "[王李张刘陈杨黄赵吴周徐孙马朱胡郭何林高罗郑梁谢宋唐许韩邓冯曹彭曾肖萧田董潘袁蔡蒋余杜叶程魏苏吕丁沈姚卢姜崔钟谭陆汪范廖"
    "金石韦贾夏付傅方邹熊白孟秦邱侯江尹薛阎段雷龙黎史陶贺毛郝顾龚邵覃武钱戴严莫孔汤常温康施文牛樊葛邢安齐伍庞颜倪庄聂章鲁岳翟殷詹申耿关兰焦俞柳])"
)
# Characters that stand in words of the room, not in given names: 高血压专家, 马上找医生, 方面, 江苏, 常州.
_GIVEN = (
    "[^\\W\\d_A-Za-z上下面时候州苏省市县区血压脂糖病科院症癌斑疮炎痛疗药治尿便疸障的了吗请找看问让给去到来说做在是有和跟与把被叫"
    "我你他她它们这那哪什么些个位名主副多少很也都就还没不能会要想可以用吃住过医师生护专教授]"
)
_TITLE = "(?:医生|大夫|主任|医师|教授|院长|护士|药师|专家|先生|女士|小姐|阿姨|老师)"
NAMES = Kind(
    "[姓名]",
    _any(
        rf"(?:(?<![\u4e00-\u9fff])|(?<=[的找请问是由让向给跟院科位名谢您你好叫和说见]))(?!谢谢?{_TITLE}){_SURNAME}{_GIVEN}{{0,2}}(?={_TITLE})",
        rf"(?<=姓名)(?:是|[:：])?\s?{_SURNAME}{_GIVEN}{{1,2}}",
        rf"(?<=[者人儿生夫师][:：]){_SURNAME}{_GIVEN}{{1,2}}(?![\u4e00-\u9fff])",
        rf"(?<=[我名]叫){_SURNAME}{_GIVEN}{{1,2}}(?![\u4e00-\u9fff])",
    ),
    (),
)


# ---- what is done with them ----------------------------------------------------------------------------------------


def find_personal_data(text: str, *, names: bool = False) -> list[Found]:
    """Every find, by place in the text. Masks that stand in it already ([电话]) are none."""
    found: list[Found] = []
    taken: list[tuple[int, int]] = []
    for name, kind in _chosen(names):
        for m in kind.pattern.finditer(text):
            if not any(a < m.end() and m.start() < b for a, b in taken):
                taken.append(m.span())
                found.append(Found(name, m.group(), m.start()))
    return sorted(found, key=lambda f: f.start)


def mask(text: str, kind: str) -> str:
    """`text` with every find of one kind (KINDS or "names") replaced by its word in brackets."""
    k = NAMES if kind == "names" else KINDS[kind]
    if k.signs and not _signs_of(text).intersection(k.signs):  # most text has none, and patterns are slow
        return text
    return k.pattern.sub(k.word, text)


_LATIN = re.compile(r"[A-Za-zＡ-Ｚａ-ｚ]{2}")
_DIGITS = re.compile(r"\d(?:\D{0,3}\d){4}|[零〇一二三四五六七八九幺]{11}")


@lru_cache(maxsize=8)  # the kinds are masked one after the other
def _signs_of(text: str) -> frozenset[Sign]:
    found: list[tuple[Sign, re.Pattern[str]]] = [("latin", _LATIN), ("digits", _DIGITS)]
    return frozenset(sign for sign, pattern in found if pattern.search(text))


def mask_all(text: str) -> str:
    for kind in KINDS:
        text = mask(text, kind)
    return text


def blur(text: str, *, names: bool = False) -> str:
    """`text` with all but the first two characters of each find starred: enough to see what a rule did."""
    for _, kind in _chosen(names):
        text = kind.pattern.sub(lambda m: m.group()[:2] + "*" * (len(m.group()) - 2), text)
    return text


def _chosen(names: bool) -> Iterable[tuple[str, Kind]]:
    return (*KINDS.items(), ("names", NAMES)) if names else KINDS.items()
