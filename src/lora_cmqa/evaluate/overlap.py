"""What can be counted in a generated answer: against the question's references, and by itself.

    answer, references -> BLEU, ROUGE, chrF        0 .. 100, the best over all references of the question
    answer             -> distinct-n, repetition, length, copied question

Every score against references comes from the library that defines it, with its own defaults:

    bleu                 sacrebleu's corpus BLEU, tokenize zh; several references as in Papineni et al. 2002
    bleu_llama_factory   mean of nltk's sentence BLEU-4 over characters, smoothing method 3 (NIST's): what
                         LLaMA-Factory's train/sft/metric.py reports as bleu-4
    rouge_1 _2 _l        rouge-chinese's F over jieba's words; an empty answer scores 0 (both as in LLaMA-Factory)
    chrf                 sacrebleu's chrF2
"""

from __future__ import annotations

import hashlib
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import SequenceMatcher
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

SENTENCE_SCORES = ("bleu_llama_factory", "rouge_1", "rouge_2", "rouge_l", "chrf")
_DEEP = 20_000  # rouge-chinese recurses once a word of both texts


# ---- against references --------------------------------------------------------------------------------------------


def sentence_scores(answer: str, references: Sequence[str]) -> dict[str, float]:
    """Each of SENTENCE_SCORES, 0 .. 100, for one answer."""
    each = [{"bleu_llama_factory": _nltk_bleu(answer, r)} | _rouge(answer, r) for r in references]
    best = {name: max(scores[name] for scores in each) for name in each[0]}
    return best | {"chrf": _chrf().sentence_score(answer, list(references)).score}  # its own choice is the best one


def bleu_sums(answer: str, references: Sequence[str]) -> np.ndarray:
    """What corpus BLEU adds up over answers, float64 [10]: matching 1- to 4-grams, all of them, lengths of both."""
    score = _bleu().corpus_score([answer], [[r] for r in references])
    return np.array([*score.counts, *score.totals, score.sys_len, score.ref_len], dtype=np.float64)


def bleu_of_sums(sums: np.ndarray) -> np.ndarray:
    """[draws, 10] -> sacrebleu's corpus BLEU of each, [draws], 0 .. 100."""
    compute = _bleu().compute_bleu
    return np.array(
        [compute(s[:4].tolist(), s[4:8].tolist(), int(s[8]), int(s[9]), smooth_method="exp").score for s in sums]
    )


def _nltk_bleu(answer: str, reference: str) -> float:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    if not answer:
        return 0.0
    return 100 * float(sentence_bleu([list(reference)], list(answer), smoothing_function=SmoothingFunction().method3))


def _rouge(answer: str, reference: str) -> dict[str, float]:
    from rouge_chinese import Rouge

    mine, theirs = " ".join(words(answer)), " ".join(words(reference))
    if not mine.split() or not theirs.split():
        return {"rouge_1": 0.0, "rouge_2": 0.0, "rouge_l": 0.0}
    with _deep_recursion():
        (scores,) = Rouge().get_scores(mine, theirs)
    return {name.replace("-", "_"): 100 * value["f"] for name, value in scores.items()}


@cache
def _bleu() -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize="zh")


@cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


@contextmanager
def _deep_recursion() -> Iterator[None]:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, _DEEP))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


# ---- by itself -------------------------------------------------------------------------------------------------------


def distinct(text: str, n: int) -> float:
    """Share of the answer's word n-grams that are different ones (Li et al. 2016, within one answer); 0 without any."""
    spoken = words(text)
    grams = [tuple(spoken[i : i + n]) for i in range(len(spoken) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition_rate(text: str, n: int = 4) -> float:
    """Share of the text's character n-grams that stand in it already: 0 says nothing twice, near 1 is a loop."""
    bare = "".join(text.split())
    grams = [bare[i : i + n] for i in range(len(bare) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def copies_question(question: str, answer: str) -> bool:
    """The answer holds an unbroken run of at least half of the question (white space apart, 4 characters or more)."""
    asked, told = "".join(question.split()), "".join(answer.split())
    needed = max(4, (len(asked) + 1) // 2)
    match = SequenceMatcher(None, asked, told, autojunk=False).find_longest_match()
    return match.size >= needed


# ---- words -----------------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """jieba's words with its own dictionary, white space left out."""
    return list(_words(text))


@lru_cache(maxsize=1 << 14)
def _words(text: str) -> tuple[str, ...]:
    return tuple(w for w in _segmenter()(text) if w.strip())


@cache
def _segmenter() -> Callable[[str], list[str]]:
    """One of our own: jieba's shared one keeps its dictionary in a file that anybody on the machine may write."""
    import jieba

    jieba.setLogLevel(logging.CRITICAL)
    tokenizer = jieba.Tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.tmp_dir = folder
        tokenizer.initialize()
    return tokenizer.lcut


def signature() -> dict[str, str]:
    """Which libraries and which dictionary counted: part of a report's signature."""
    import jieba

    _bleu().corpus_score(["a"], [["a"]])  # the signature is known after a first score
    dictionary = Path(jieba.__file__).parent / "dict.txt"
    return {
        "bleu": str(_bleu().get_signature()).replace("nrefs:1", "nrefs:var"),
        "chrf": "chrF2|" + version("sacrebleu"),
        "nltk": version("nltk"),
        "rouge-chinese": version("rouge-chinese"),
        "segmenter": f"jieba {version('jieba')}",
        "dictionary_sha256": hashlib.sha256(dictionary.read_bytes()).hexdigest(),
    }
