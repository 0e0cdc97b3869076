"""Pieces of a stream are the whole text, and no piece is half a character or half a stop string."""

import pytest
import torch

from lora_cmqa.engine.base import Request
from lora_cmqa.engine.sampling import SamplingParams, largest_tokens, next_token, next_token_plain
from lora_cmqa.engine.text import TextStream
from lora_cmqa.models.tiny import byte_tokenizer


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self):
        self.inner, self.tokens = byte_tokenizer(), 0

    def decode(self, ids, **settings):
        self.tokens += len(ids)
        return self.inner.decode(ids, **settings)


def test_pieces_are_whole_characters_and_together_the_text():
    text = "头痛怎么办？See a doctor. 😀 好"
    stream = TextStream(byte_tokenizer())
    pieces = [stream.push(token) for token in text.encode()]
    assert "".join([*pieces, stream.finish()]) == text
    assert not any("\ufffd" in p for p in pieces)


def test_bytes_that_are_no_text_come_out_as_the_tokenizer_writes_them():
    tokenizer = byte_tokenizer()
    for seed in range(20):
        ids = torch.randint(0, 259, (60,), generator=torch.Generator().manual_seed(seed)).tolist()
        stream = TextStream(tokenizer)
        ours = "".join([*(stream.push(i) for i in ids), stream.finish()])
        assert ours == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_the_cost_of_a_token_does_not_grow_with_the_answer():
    tokenizer = Counting()
    stream = TextStream(tokenizer)
    for token in "好好学习天天向上".encode() * 40:
        stream.push(token)
    assert tokenizer.tokens < 12 * 24 * 40  # decoding all ids at each token would be about 460,000


def test_a_stop_string_ends_the_text_before_it_even_across_tokens():
    for stop, want in ((("。再",), "你好"), (("x", "好。"), "你"), (("没有",), "你好。再见")):
        stream = TextStream(byte_tokenizer(), stop)
        shown = "".join([*(stream.push(token) for token in "你好。再见".encode()), stream.finish()])
        assert shown == want
        assert stream.stopped == (stop != ("没有",))


def test_a_stop_string_ends_the_request(serving):
    engine = serving(dtype="float32")
    whole = engine.generate([Request((1, 2, 3), SamplingParams(max_new_tokens=30))])[0]
    stop = whole.text[5:7]
    ended = engine.generate([Request((1, 2, 3), SamplingParams(max_new_tokens=30, stop=(stop,)))])[0]
    assert ended.finish_reason == "stop"
    assert ended.text == whole.text[: whole.text.index(stop)]
    pieces = list(engine.stream(Request((1, 2, 3), SamplingParams(max_new_tokens=30, stop=(stop,)))))
    assert "".join(pieces) == ended.text


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"top_k": 7},
        {"top_p": 0.5},
        {"top_k": 1500, "top_p": 0.9},
        {"top_p": 0.9999},
        {"top_k": 3, "top_p": 0.2, "repetition_penalty": 1.7},
    ],
)
def test_the_sampler_draws_what_its_plain_twin_draws(knobs):
    for seed in range(30):
        logits = torch.randn(5000, generator=torch.Generator().manual_seed(seed)) * 2
        params = SamplingParams(temperature=0.9, **knobs)
        ours, plain = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
        assert next_token(logits, params, [1, 2], ours) == next_token_plain(logits, params, [1, 2], plain)


def test_equals_of_the_last_kept_token_are_kept_however_many_they_are():
    logits = torch.zeros(5000)
    for seed in range(5):
        ours, plain = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
        params = SamplingParams(temperature=1.0, top_k=3)
        assert next_token(logits, params, [], ours) == next_token_plain(logits, params, [], plain)


@pytest.mark.parametrize("size", [5, 512, 1024, 5000, 16_384])
def test_the_largest_token_is_argmax_ties_and_all(size):
    for seed in range(20):
        logits = torch.randn(9, size, generator=torch.Generator().manual_seed(seed)).bfloat16()
        logits[4] = 0  # all alike: the first
        logits[5, -1] = 100
        assert torch.equal(largest_tokens(logits), logits.argmax(-1))


def test_a_seed_is_a_draw(serving):
    engine = serving(dtype="float32")
    params = [SamplingParams(max_new_tokens=12, temperature=1.0, seed=s) for s in (1, 1, 2)]
    one, same, other = engine.generate([Request((5, 6, 7), p) for p in params])
    assert one == same != other
