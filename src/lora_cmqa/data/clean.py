"""Examples -> examples that are fit to teach, and the account of what was done to them.

    read = kept + rejected          a kept row may have been repaired; every rule has a name, a count and samples

Repairs change text, rejections take a row out with a reason, flags only name a row; each rule can be switched off by
its name.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from html.entities import html5
from typing import Any

from ..core import Example, Message
from ..errors import ConfigError
from . import personal
from .mix import is_copy

PASSES = 8  # at most: what one rule leaves another may find, so the repairs run until nothing changes
SAMPLES = 3  # kept per rule, before and after
EXCERPT, CONTEXT = 120, 30  # characters of a sample, and those before the place that a rule changed

# ---- repairs: text -> text ---------------------------------------------------------------------------------------

_KEPT = "|".join(
    (
        r"\d+(?:。\d+){2,}。?",  # 1。2。3。 and 2013。5。6: three numbers or more are a list or a date
        r"(?:^|(?<=[。；;：:，,！!？?\s]))(?:1。2|2。3|3。4|4。5|5。6|6。7|7。8|8。9)(?=。)",  # 1。2。 heads of a list
        r"(?<!\d)1。[1-9]0{2,}(?!\d)",  # 1。5000 was the dilution 1:5000
        r"(?<=月)\d{1,2}。\d{1,2}(?=[号日])",  # 2月13。14号: two days
    )
)
_DECIMAL = re.compile(rf"(?P<keep>{_KEPT})|(?<![\d。])(?P<whole>\d+)。(?P<part>\d+)(?!\d|。\d)")
_DIGIT_STOP = re.compile(r"(?<=\d)。(?=\d)")


def decimal_point(text: str) -> str:
    """0。7mg -> 0.7mg, 37。5度 -> 37.5度; in cMedQA2 every decimal point between digits became a full stop.

    Lists, dates and dilutions (1。2。3。, 2013。5。6, 1。5000) stay and are counted apart (CleanReport.digit_stops).
    """
    return _DECIMAL.sub(lambda m: m.group() if m["keep"] else f"{m['whole']}.{m['part']}", text)


_BROKEN_ENTITY = re.compile(r"&(#?\w{2,8})。")  # cMedQA2 turned ; into 。 here too: &amp。times。


def html_entities(text: str) -> str:
    """&nbsp; &amp;times; &amp。times。 and their like, however often they were escaped."""
    while "&" in text:
        before = text
        text = _BROKEN_ENTITY.sub(lambda m: f"&{m[1]};" if f"{m[1]};" in html5 or m[1][0] == "#" else m[0], text)
        text = html.unescape(text)
        if text == before:
            break
    return text


_TAG = re.compile(r"</?(?:br|p|div|span|b|i|u|strong|em|font|a|img|ul|ol|li|table|tr|td|h[1-6])\b[^<>]{0,200}>", re.I)


def html_tags(text: str) -> str:
    return _TAG.sub("", text)


_ODD_SPACE = re.compile(r"[\u00a0\u2000-\u200a\u202f\u205f\u3000\t ]+")
_ZERO_WIDTH = re.compile(r"[\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff\x00-\x08\x0b\x0c\x0e-\x1f]")


def white_space(text: str) -> str:
    """Runs of blanks become one, invisible characters go, line ends are \\n, the ends are trimmed."""
    text = _ZERO_WIDTH.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = _ODD_SPACE.sub(" ", text)
    return re.sub(r" ?\n ?", "\n", text).strip()


_FULL_WIDTH = {c: c - 0xFEE0 for c in (*range(0xFF10, 0xFF1A), *range(0xFF21, 0xFF3B), *range(0xFF41, 0xFF5B))}


def full_width(text: str) -> str:
    """０．５ｇ -> half-width letters and digits only: all of NFKC would turn 10² into 102 and ① into 1."""
    return text.translate(_FULL_WIDTH)


_RESIDUE = re.compile(
    r"(?:var\s+)?\w{1,12}\s*=\s*new\s*Image.*?(?:\"[^\"]*\"[。;]?|$)|（如没有点击无）"
    r"|\[object Object\]|\{\{.*?\}\}|\{\[[^{}]*\]\w*\}|<!--.*?-->",
    re.S,
)
_RESIDUE_SIGNS = ("Image", "（如没有", "[object", "{{", "{[", "<!--")


def residue(text: str) -> str:
    """Pieces of scripts and form templates that were scraped along."""
    return _RESIDUE.sub("", text) if any(sign in text for sign in _RESIDUE_SIGNS) else text


_BEGGING = re.compile(
    r"[^。！？!?；;，,\n]*(?:望|请|求|记得|及时|点击|谢谢|作出)[^。！？!?；;，,\n]{0,20}采纳[^。！？!?；;，,\n]*[。！？!?；;，,”\"]*"
)


def begging(text: str) -> str:
    """望采纳 and its like: the clause goes, the advice stays."""
    return _BEGGING.sub("", text) if "采纳" in text else text


_CUT_START = re.compile(r"^(?:[，。、；：？！,;:]+|的话[，,]?|的(?=情况|症状|这种|描述)|[了吗呢啊](?=[，。？！,]))+")


def cut_start(text: str) -> str:
    """A row that begins inside a sentence (的话应该…, ，我担心…) begins at its first whole word."""
    return _CUT_START.sub("", text)


_CUT_END = re.compile(
    r"(?:[，、：；,;:（(【《“‘\s]"
    r"|(?<=[，。！？；、])(?:但是?|可是|而且|并且|因为|由于|所以|如果|例如|比如|以及|或者|还有|另外|同时|及|和|或|与))+$"
)


def cut_end(text: str) -> str:
    """A row cut off inside a sentence (…维生素、 …，但是) ends at its last whole clause; nothing else is taken."""
    return _CUT_END.sub("", text)


def doubled_text(text: str) -> str:
    """The same text standing twice in a row -> once (scraped titles are often repeated)."""
    half, odd = divmod(len(text), 2)
    if half >= 5 and not odd and text[:half] == text[half:]:
        return text[:half]
    at = text.find(text[:8], 8) if len(text) >= 16 else -1
    while at > 0:  # a title, then the same words again as the head of the body
        title = text[:at].rstrip("，。？！、；?!,. \n")
        if len(title) >= 8 and text.startswith(title, at):
            return text[at:]
        at = text.find(text[:8], at + 1)
    return text


# ---- rejections: example -> is it out? ---------------------------------------------------------------------------

MIN_ANSWER = 5  # characters
MIN_QUESTION = 2


def empty(example: Example) -> bool:
    return not example.question.strip() or not example.answer.strip()


def too_short(example: Example) -> bool:
    return len(example.answer.strip()) < MIN_ANSWER or len(example.question.strip()) < MIN_QUESTION


_MOJIBAKE = re.compile(r"\ufffd|锟斤拷|烫烫烫|(?:Ã.|Â.|å.|ä¸|æ.){3}")


def mojibake(example: Example) -> bool:
    """Text that was decoded wrongly somewhere: its meaning is gone."""
    return any(len(_MOJIBAKE.findall(m.content)) > 1 or "锟斤拷" in m.content for m in example.messages)


_ADVERT = re.compile(
    r"\[热线\]|(?:热线|咨询电话|预约电话|加我?|联系)[^。]{0,12}(?:\[电话\]|\[QQ\]|\[微信\]|\[网址\])"
    r"|点击[^。，]{0,8}(?:咨询|头像|图片|相片|图标)|在线(?:医生)?免费咨询"
)


def advert(example: Example) -> bool:
    """An answer that sends the reader to a hotline, a chat account or a button on a page that is not here."""
    return bool(_ADVERT.search(personal.mask_all(example.answer)))


# ---- flags: a row that a person should look at; it stays -----------------------------------------------------------

_SELF_HARM = re.compile(
    r"自杀|自残|自伤|自尽|自虐|轻生|寻短见|寻死|割腕|割脉|跳楼|跳河|(?<!眼)上吊|服毒|遗书|(?:喝|服|吃)了?(?:一瓶)?(?:农药|敌敌畏|百草枯|老鼠药)"
    r"|(?:不想|不愿)(?:再)?活|不如死|想(?:要|去|到)?死|死了(?:算了|一了百了)|(?:结束|了结|放弃)(?:自己的?)?生命|活(?:着|下去)(?:没|毫无|有什么)"
    r"|suicid|self.?harm|kill (?:myself|himself|herself)|end my life|want to die|cut(?:ting)? my wrists?",
    re.I,
)


def self_harm(example: Example) -> bool:
    """Suicide and self-harm, in question or answer."""
    return any(_SELF_HARM.search(m.content) for m in example.messages)


Repair = Callable[[str], str]
Test = Callable[[Example], bool]

# In the order they run: a later rule sees what an earlier one left.
REPAIRS: dict[str, Repair] = {
    "html_entities": html_entities,
    "html_tags": html_tags,
    "residue": residue,
    "full_width": full_width,
    "white_space": white_space,
    "doubled_text": doubled_text,
    "decimal_point": decimal_point,
    "begging": begging,
    "cut_start": cut_start,
    "cut_end": cut_end,
    **{kind: partial(personal.mask, kind=kind) for kind in (*personal.KINDS, "names")},
}
REJECTIONS: dict[str, Test] = {
    "empty": empty,
    "too_short": too_short,
    "mojibake": mojibake,
    "advert": advert,
}
FLAGS: dict[str, Test] = {"self_harm": self_harm}
DUPLICATE = "duplicate"  # the same question and answer, word for word, a second time
WHEN_ASKED = ("names",)
RULES: tuple[str, ...] = (*REPAIRS, *REJECTIONS, DUPLICATE, *FLAGS)


# ---- the account -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class RuleCount:
    rows: int = 0
    samples: list[dict[str, str]] = field(default_factory=list)


@dataclass(slots=True)
class CleanReport:
    """read = kept + len(rejects); repaired counts kept rows that a repair changed.

    rejects      rows as they were judged (repaired, personal data masked) with the rule that rejected them
    flags        flag -> ids of the rows it touches, kept or rejected
    digit_stops  `。` between digits, in distinct questions and in answers: rows, points, and points kept as lists
    """

    read: int = 0
    kept: int = 0
    repaired: int = 0
    rules: dict[str, RuleCount] = field(default_factory=dict)
    rejects: list[tuple[Example, str]] = field(default_factory=list)
    flags: dict[str, list[str]] = field(default_factory=dict)
    digit_stops: dict[str, dict[str, int]] = field(
        default_factory=lambda: {k: {"rows": 0, "points": 0, "kept": 0} for k in ("questions", "answers")}
    )

    def as_dict(self) -> dict[str, Any]:
        return {
            "read": self.read,
            "kept": self.kept,
            "repaired": self.repaired,
            "rejected": len(self.rejects),
            "digit_stops": self.digit_stops,
            "rules": {name: {"rows": c.rows, "samples": c.samples} for name, c in self.rules.items()},
            "flags": self.flags,
        }


def clean(
    examples: Iterable[Example], *, off: Sequence[str] = (), mask_names: bool = False
) -> tuple[list[Example], CleanReport]:
    """Repair, reject and flag.

    off         names of rules that do not run
    mask_names  also the rule "names", which is off otherwise

    Raises ConfigError for a name that is no rule.
    """
    unknown = [name for name in off if name not in RULES]
    if unknown:
        near = get_close_matches(unknown[0], RULES, n=1)
        raise ConfigError(
            f"{unknown[0]!r} is no cleaning rule",
            hint=f"One of {', '.join(RULES)}." + (f" Did you mean {near[0]}?" if near else ""),
        )
    off = off if mask_names else (*off, *WHEN_ASKED)
    report = CleanReport(
        rules={name: RuleCount() for name in RULES if name not in off},
        flags={name: [] for name in FLAGS if name not in off},
    )
    repairs = {n: f for n, f in REPAIRS.items() if n not in off}
    rejections = {n: f for n, f in REJECTIONS.items() if n not in off}
    kept: list[Example] = []
    seen: dict[tuple[str, ...], Example] = {}  # texts -> the first row that has them
    asked: set[tuple[str, str]] = set()  # a question with three answers is one row of its file
    for example in examples:
        report.read += 1
        _count_digit_stops(example, asked, report)
        cleaned, touched = _repair(example, repairs, report)
        for name in report.flags:
            if FLAGS[name](cleaned):
                report.flags[name].append(cleaned.id)
                _count(report.rules[name], cleaned.question, cleaned.answer)
        reason = next((name for name, rejects in rejections.items() if rejects(cleaned)), None)
        if reason is None and DUPLICATE not in off:
            first = seen.setdefault(tuple(m.content for m in cleaned.messages), cleaned)
            if first is not cleaned and not is_copy(cleaned.id, of=first.id):
                reason = DUPLICATE
        if reason is not None:
            _count(report.rules[reason], cleaned.question, cleaned.answer)
            report.rejects.append((cleaned, reason))
            continue
        report.repaired += touched
        report.kept += 1
        kept.append(cleaned)
    return kept, report


def _count_digit_stops(example: Example, asked: set[tuple[str, str]], report: CleanReport) -> None:
    for kind, name, text in (("questions", example.question_id, example.question), ("answers", "", example.answer)):
        if "。" in text and (points := len(_DIGIT_STOP.findall(text))):
            if kind == "questions" and (name, text) in asked:
                continue
            asked.add((name, text))
            stops = report.digit_stops[kind]
            stops["rows"] += 1
            stops["points"] += points
            stops["kept"] += len(_DIGIT_STOP.findall(decimal_point(full_width(text))))


def _repair(example: Example, repairs: dict[str, Repair], report: CleanReport) -> tuple[Example, bool]:
    """The repaired example, and whether any rule changed it; each rule is counted once a row."""
    texts = [m.content for m in example.messages]
    hit: set[str] = set()
    for _ in range(PASSES):
        before = texts
        for name, repair in repairs.items():
            after = [repair(t) for t in texts]
            if after != texts:
                if name not in hit:
                    _count(report.rules[name], *next((b, a) for b, a in zip(texts, after, strict=True) if a != b))
                hit.add(name)
                texts = after
        if texts == before:
            break
    if not hit:
        return example, False
    turns = tuple(Message(m.role, t) for m, t in zip(example.messages, texts, strict=True))
    return replace(example, messages=turns), True


def _count(count: RuleCount, before: str, after: str) -> None:
    """One row more, and a sample of it with its personal data starred: reports are passed around."""
    count.rows += 1
    if len(count.samples) < SAMPLES:
        count.samples.append({"before": _excerpt(before, after), "after": _excerpt(after, before)})


def _excerpt(text: str, other: str) -> str:
    """Where the two begin to differ, with a little before it."""
    same = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    start = max(0, min(same, len(text)) - CONTEXT)
    piece = personal.blur(text, names=True)[start : start + EXCERPT]
    return f"{'…' if start else ''}{piece}{'…' if start + EXCERPT < len(text) else ''}"
