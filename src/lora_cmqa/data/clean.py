"""Examples -> examples that are fit to teach, and the account of what was done to them.

    read = kept + rejected          a kept row may have been repaired; every rule has a name, a count and samples

Repairs change text, rejections take a row out with a reason; each rule can be switched off by its name.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..core import Example, Message
from ..errors import ConfigError

PASSES = 8  # at most: what one rule leaves another may find, so the repairs run until nothing changes
SAMPLES = 3  # kept per rule, before and after

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


def html_entities(text: str) -> str:
    """&nbsp; &amp;times; and their like, also written twice over."""
    return html.unescape(html.unescape(text)) if "&" in text else text


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
    r"|\[object Object\]|\{\{.*?\}\}|<!--.*?-->",
    re.S,
)


def residue(text: str) -> str:
    """Pieces of scripts and form templates that were scraped along."""
    return _RESIDUE.sub("", text)


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


_PRIVATE: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("[邮箱]", re.compile(r"[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}")),
    ("[网址]", re.compile(r"(?:https?://|www\.)[^\s，。；、！？]+", re.I)),
    ("[证件号]", re.compile(r"(?<!\d)[1-9]\d{5}(?:19|20)\d{2}(?:0[1-9]|1[0-2])(?:[0-2]\d|3[01])\d{3}[\dXx](?!\d)")),
    ("[电话]", re.compile(r"(?<!\d)(?:\+?86[- ]?)?1[3-9]\d[-—. ]?\d{4}[-—. ]?\d{4}(?!\d)")),
    ("[热线]", re.compile(r"(?<![\d.])[48]00[-—－ ]?\d{3,4}[-—－ ]?\d{3,4}(?!\d)")),
    ("[电话]", re.compile(r"(?<!\d)[(（]?0\d{2,3}[)）]?[-—－ ]?\d{7,8}(?!\d)")),
    ("[QQ]", re.compile(r"(?:[Qq]{1,2}|扣扣|企鹅)(?:号码?|群)?\s*[:：是为加]?\s*[1-9]\d{4,11}(?!\d)")),
    (
        "[微信]",
        re.compile(
            r"(?:微信|薇信|威信|WeChat|wechat|weixin|VX|vx|Vx|wx|WX)(?:号码?)?\s*[:：是为加]?\s*(?:[A-Za-z][-A-Za-z0-9_]{5,19}|\d{6,})"
        ),
    ),
)


def private_data(text: str) -> str:
    """Telephone, ID card, e-mail, web address, QQ and WeChat numbers -> a word in brackets."""
    for word, pattern in _PRIVATE:
        text = pattern.sub(word, text)
    return text


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
    return bool(_ADVERT.search(example.answer))


Repair = Callable[[str], str]
Rejection = Callable[[Example], bool]

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
    "private_data": private_data,
}
REJECTIONS: dict[str, Rejection] = {
    "empty": empty,
    "too_short": too_short,
    "mojibake": mojibake,
    "advert": advert,
}
DUPLICATE = "duplicate"  # the same question and answer, word for word, a second time
RULES: tuple[str, ...] = (*REPAIRS, *REJECTIONS, DUPLICATE)


# ---- the account -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class RuleCount:
    rows: int = 0
    samples: list[dict[str, str]] = field(default_factory=list)


@dataclass(slots=True)
class CleanReport:
    """read = kept + len(rejects); repaired counts kept rows that a repair changed.

    digit_stops: `。` between digits, in distinct questions and in answers: rows, points, and points kept as lists
    """

    read: int = 0
    kept: int = 0
    repaired: int = 0
    rules: dict[str, RuleCount] = field(default_factory=dict)
    rejects: list[tuple[Example, str]] = field(default_factory=list)
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
        }


def clean(examples: Iterable[Example], *, off: Sequence[str] = ()) -> tuple[list[Example], CleanReport]:
    """Repair and reject. `off` names rules that do not run. Raises ConfigError for a name that is no rule."""
    unknown = [name for name in off if name not in RULES]
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is no cleaning rule", hint=f"One of {', '.join(RULES)}.")
    report = CleanReport(rules={name: RuleCount() for name in RULES if name not in off})
    repairs = {n: f for n, f in REPAIRS.items() if n not in off}
    rejections = {n: f for n, f in REJECTIONS.items() if n not in off}
    kept: list[Example] = []
    seen: set[tuple[str, ...]] = set()
    asked: set[tuple[str, str]] = set()  # a question with three answers is one row of its file
    for example in examples:
        report.read += 1
        for kind, name, text in (("questions", example.question_id, example.question), ("answers", "", example.answer)):
            if "。" in text and (points := len(_DIGIT_STOP.findall(text))):
                if kind == "questions" and (name, text) in asked:
                    continue
                asked.add((name, text))
                stops = report.digit_stops[kind]
                stops["rows"] += 1
                stops["points"] += points
                stops["kept"] += len(_DIGIT_STOP.findall(decimal_point(full_width(text))))
        cleaned, touched = _repair(example, repairs, report)
        reason = next((name for name, rejects in rejections.items() if rejects(cleaned)), None)
        words = tuple(m.content for m in cleaned.messages)
        if reason is None and DUPLICATE not in off and words in seen:
            reason = DUPLICATE
        if reason is not None:
            count = report.rules[reason]
            count.rows += 1
            _sample(count, cleaned.question, cleaned.answer)
            report.rejects.append((example, reason))
            continue
        seen.add(words)
        report.repaired += touched
        report.kept += 1
        kept.append(cleaned)
    return kept, report


def _repair(example: Example, repairs: dict[str, Repair], report: CleanReport) -> tuple[Example, bool]:
    """The repaired example, and whether any rule changed it; each rule is counted once a row."""
    texts = [m.content for m in example.messages]
    hit: set[str] = set()
    for _ in range(PASSES):
        before = texts
        for name, repair in repairs.items():
            after = [repair(t) for t in texts]
            if after != texts:
                count = report.rules[name]
                count.rows += name not in hit
                hit.add(name)
                _sample(count, *next((b, a) for b, a in zip(texts, after, strict=True) if a != b))
                texts = after
        if texts == before:
            break
    if not hit:
        return example, False
    turns = tuple(Message(m.role, t) for m, t in zip(example.messages, texts, strict=True))
    return replace(example, messages=turns), True


def _sample(count: RuleCount, before: str, after: str) -> None:
    if len(count.samples) < SAMPLES:
        count.samples.append({"before": before[:200], "after": after[:200]})
