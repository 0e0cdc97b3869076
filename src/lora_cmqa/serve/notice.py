"""What stands beside an answer: that a machine wrote it, and, where a question sounds like an emergency, whom to call.

    question -> urgency: "emergency", "crisis" or None        word patterns, Chinese and English
             -> language: zh where it holds a Chinese character, else en

The patterns are made to miss little rather than to be right: a notice too many costs a line. They are no medical
judgement, and no notice does not mean that nothing is urgent.
"""

from __future__ import annotations

import re
from typing import Literal

from ..messages import Language, say

Urgency = Literal["emergency", "crisis"]

_CRISIS = re.compile(
    r"自杀|自残|轻生|遗书|想死|不想活|活着没(?:有)?意思|结束(?:这一切|生命)|割(?:自己的)?(?:手)?腕|跳楼"
    r"|\bsuicid|\bkill (?:my|him|her|them)sel|\bend (?:my life|it all)|\bnot want to live"
    r"|\bdon'?t want to live"
    r"|\bbetter off without (?:me|him|her|them)|\bself[- ]?harm|\bcut(?:ting)? my(?:self| wrist)"
    r"|\bjump(?:ing)? (?:from|off)\b"
    r"|\bwant to die",
    re.I,
)
_EMERGENCY = re.compile(
    r"胸(?:口|部|前)?[^，。？]{0,6}(?:压|闷|绞|剧)?痛|胸口[^，。？]{0,4}疼|心梗|心肌梗"
    r"|嘴(?:歪|唇[^，。？]{0,3}(?:肿|紫))|口角歪|说不出话|说话不清"
    r"|(?:手脚|胳膊|肢体|半身)[^，。？]{0,6}(?:没力|无力|抬不起|麻)|往一边倒|中风|脑出血"
    r"|误(?:服|食|吞)|喝了?[^，。？]{0,4}(?:农药|百草枯|洁厕|消毒)|农药|中毒|煤气"
    r"|一家人[^，。？]{0,4}(?:头晕|恶心)|(?:烧煤|煤炉)"
    r"|(?:吃|服)了?[^，。？]{0,4}(?:[二三四五六七八九]?十|\d{2,}|半瓶|一瓶|整瓶|一盒)(?:多)?[片粒颗]?[^，。？]{0,4}药"
    r"|喉咙(?:发)?紧|呼吸困难|喘不(?:上|过)气|喘不上|上不来气|突然气短|窒息|卡住|脸(?:发)?[青紫]|嘴唇发紫"
    r"|全身[^，。？]{0,4}(?:起)?疹[^。？]{0,8}(?:心慌|晕)"
    r"|(?:[一两二]个?月|[一二三]?十?[一二三四五六七八九]?天|\d+天)(?:大)?[^，。？]{0,6}(?:宝宝|婴儿|新生儿)?[^。？]{0,8}(?:发烧|体温3[89]|体温4\d)"
    r"|(?:宝宝|婴儿|新生儿)[^。？]{0,8}(?:才|刚)?[^。？]{0,6}(?:天|[一两二]个?月)[^。？]{0,6}发烧"
    r"|(?:昏迷|叫不醒|意识不清|昏睡)|抽(?:搐|了一下|筋不停)|口吐白沫"
    r"|吐[^，。？]{0,6}血|呕血|(?:流|出)了?(?:很多|大量)(?:的)?血|大出血|血[^，。？]{0,4}(?:喷|止不住)"
    r"|止不住血|脖子(?:发)?硬|按不褪色|头部?[^，。？]{0,4}撞[^。？]{0,10}(?:呕吐|嗜睡|昏)"
    r"|\bchest (?:pain|tightness|pressure)|\btightness in my chest|\b(?:crushing|severe) chest"
    r"|\bheart attack|\bstroke\b"
    r"|\b(?:face|mouth)\b[^.?]{0,30}\bdroop|\bslurred\b|\bsudden (?:weakness|numbness)"
    r"|\bweakness in one (?:arm|leg|side)"
    r"|\bswallow(?:ed|ing)? (?:a |an |some |the )?(?:\w+ )?(?:battery|magnet|bleach|pills?)"
    r"|\b(?:drank|drunk) (?:some )?(?:\w+ )?(?:cleaner|bleach|pesticide|antifreeze)"
    r"|\bpoison|\boverdos|\b(?:whole|entire) (?:box|bottle|pack) of"
    r"|\bthroat (?:feels|is) (?:tight|closing)|\btongue is swelling|\banaphyla"
    r"|\bhives all over|\b(?:can(?:no|')t|can hardly|unable to|trouble|difficulty) (?:breath|speak)"
    r"|\binhaler does(?: not|n't) help|\bchok(?:ing|ed)\b"
    r"|\bturning blue|\b(?:\w+-week|\w+-day|\w+ days?)[- ]old\b[^.?]{0,20}\bfever"
    r"|\bbaby of \w+ (?:weeks|days)\b|\bnewborn\b[^.?]{0,20}\bfever|\bfloppy\b"
    r"|\bunconscious|\bwon'?t wake|\bseizure|\bconvuls|\bstiff neck|\brash that does(?: not|n't) fade"
    r"|\bbleeding (?:heavily|badly|a lot)"
    r"|\bvomit(?:ed|ing)?\b[^.?]{0,12}\bblood|\bcough(?:ed|ing)? up blood|\bconfused\b[^.?]{0,30}\bbreath"
    r"|\bsmells of acetone",
    re.I,
)
_CHINESE = re.compile(r"[\u3400-\u9fff]")


def language_of(text: str) -> Language:
    return "zh" if _CHINESE.search(text) else "en"


def urgency(question: str) -> Urgency | None:
    """Whether `question` sounds like a crisis or an emergency."""
    text = question[:20_000]
    if _CRISIS.search(text):
        return "crisis"
    return "emergency" if _EMERGENCY.search(text) else None


def emergency_notice(question: str) -> str | None:
    """Whom to call, in the language asked in; None where nothing sounds urgent."""
    kind = urgency(question)
    return say(f"serve.{kind}", language_of(question)) if kind else None
