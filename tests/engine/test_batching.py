"""Many requests, many adapters, one base: everyone gets what they would get alone."""

import gc
import weakref

import pytest
import torch

from lora_cmqa.engine import forward
from lora_cmqa.engine.base import RUN_ADAPTER, Request
from lora_cmqa.engine.embedded import EmbeddedEngine
from lora_cmqa.engine.forward import MOST_ROWS, BatchForward, steady_rows
from lora_cmqa.engine.plain import PlainForward
from lora_cmqa.engine.row_wise import RowWise
from lora_cmqa.engine.sampling import SamplingParams
from lora_cmqa.engine.stacked import Stacked, steady_stack_rows
from lora_cmqa.errors import AdapterError, ConfigError
from lora_cmqa.kernels import adapter_rows, few_rows
from lora_cmqa.lora.inject import inject_lora
from lora_cmqa.models.load import load_model

KINDS = ["tiny", "tiny-qwen3", "tiny-llama", "tiny-gemma3"]


def prompt(seed: int, length: int) -> tuple[int, ...]:
    return tuple(torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def asks(adapter: str | None, number: int, length: int = 20, new: int = 8, **sampling) -> Request:
    return Request(prompt(number, length), SamplingParams(max_new_tokens=new, logprobs=2, **sampling), adapter)


CROWD = [
    *(asks("a", i, 5 + i) for i in range(3)),
    asks("b", 10, 150),  # longer than a chunk, and than Gemma's window
    asks(None, 11),
    asks("c", 12),
    asks("d", 13, 70, temperature=0.8, top_p=0.9, seed=5),
    asks(None, 14, 130),
    asks("a", 15, repetition_penalty=1.3),
]


def bits(completion):
    """All that shows of the logits: a different last bit is a difference."""
    return completion.token_ids, completion.logprobs, completion.text


# ---- the plain twin -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_way_answers_as_transformers_with_hooks(serving, kind):
    fast, plain = serving(kind), serving(kind, plain=True)
    assert isinstance(fast.forward, BatchForward)
    assert isinstance(plain.forward, PlainForward)
    ours, theirs = fast.generate(CROWD), plain.generate(CROWD)
    assert [c.token_ids for c in ours] == [c.token_ids for c in theirs]
    for one, other in zip(ours, theirs, strict=True):
        for x, y in zip(one.logprobs, other.logprobs, strict=True):
            assert x.logprob == pytest.approx(y.logprob, abs=1e-5)
    base_only = plain.generate([Request(r.prompt_ids, r.sampling) for r in CROWD])
    assert [c.token_ids for c, r in zip(base_only, CROWD, strict=True) if r.adapter] != [
        c.token_ids for c, r in zip(ours, CROWD, strict=True) if r.adapter
    ]


def test_a_plain_row_is_peft(serving):
    model, tokenizer = load_model("tiny", dtype="float64")
    pairs = serving()._load("a")
    peft = inject_lora(load_model("tiny", dtype="float64")[0], r=4, lora_alpha=4)
    for path, module in peft.get_base_model().named_modules():
        if path in pairs:
            module.lora_A["default"].weight.data.copy_(pairs[path].a)
            module.lora_B["default"].weight.data.copy_(pairs[path].b)
    hooked = EmbeddedEngine(model, tokenizer, (), load_adapter=lambda _: pairs, plain=True)
    asked = [asks("a", 1, 30), asks("a", 2, 90)]
    own = [Request(r.prompt_ids, r.sampling, RUN_ADAPTER) for r in asked]
    for plain in (True, False):
        run = EmbeddedEngine(peft.eval(), tokenizer, (), plain=plain)
        assert [c.token_ids for c in run.generate(own)] == [c.token_ids for c in hooked.generate(asked)]


def test_what_the_fast_way_has_no_words_for_takes_the_plain_one():
    model, tokenizer = load_model("tiny", dtype="float64")
    bare = EmbeddedEngine(model, tokenizer, ()).generate([asks(None, 1)])[0]
    peft = inject_lora(model, r=4, modules_to_save=("lm_head",)).eval()
    peft.get_base_model().lm_head.modules_to_save["default"].weight.data.mul_(-1)
    engine = EmbeddedEngine(peft, tokenizer, ())
    assert "lm_head" in engine.why_plain
    base, own = engine.generate([asks(None, 1), asks(RUN_ADAPTER, 1)])
    assert base.token_ids == bare.token_ids != own.token_ids


# ---- alone or in a crowd: the same bits -----------------------------------------------------------------------------


@pytest.fixture
def stacked(monkeypatch):
    """Engines made from now on add adapters as on a GPU, or where the kernel was not compiled."""
    monkeypatch.setattr(adapter_rows, "why_not", lambda device, dtype: "switched off")


@pytest.fixture(params=[RowWise, Stacked])
def way(request):
    """Of adding adapters, in float32 and bfloat16."""
    if request.param is Stacked:
        request.getfixturevalue("stacked")
    elif adapter_rows.why_not(torch.device("cpu"), torch.float32):
        pytest.skip("the compiled kernel is not here")
    return request.param


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["tiny", "tiny-gemma3"])
def test_an_answer_does_not_depend_on_what_else_is_asked(serving, kind, dtype, way):
    engine = serving(kind, dtype, prefix_memory=0)
    alone = [engine.generate([r])[0] for r in CROWD]
    together = engine.generate([*CROWD, *(asks(x, 50 + i, 3 + i) for i, x in enumerate("abcd" * 5))])
    for request, one, other in zip(CROWD, together[: len(CROWD)], alone, strict=True):
        if way is RowWise or dtype == "float32" or request.adapter is None:
            assert bits(one) == bits(other)
        else:  # stacked 16-bit products: the same bits on the processors seen, not promised on all (decision 0007)
            assert one.logprobs[0].logprob == pytest.approx(other.logprobs[0].logprob, abs=0.05)


def test_base_rows_beside_adapters_are_the_base_bit_for_bit(serving, way):
    """Case 27's arithmetic: a base row's products are those of a base-only batch, and no adapter's sum touches it."""
    for dtype in ("float32", "bfloat16"):
        bare = serving(dtype=dtype).generate([asks(None, i) for i in range(5)])
        mixed = serving(dtype=dtype).generate([asks(x, i) for i in range(5) for x in (None, "a", "b")])
        assert [bits(c) for c in mixed[::3]] == [bits(c) for c in bare]


def test_late_comers_change_nothing(serving):
    engine, alone = serving(dtype="float32"), serving(dtype="float32").generate([CROWD[0], CROWD[3]])
    first, second = [], []
    engine.submit(CROWD[0], first.append)
    for _ in range(3):
        engine.step()
    engine.submit(CROWD[3], second.append)
    while engine.step():
        pass
    assert [[e.token for e in events] for events in (first, second)] == [list(c.token_ids) for c in alone]
    assert engine.load == (0, 0)


def test_the_rows_a_step_is_padded_to_are_measured():
    weight = torch.randn(48, 64)
    assert steady_rows([weight], MOST_ROWS) in (2, 4, 8, 16, 24, 32)
    assert steady_stack_rows([weight], MOST_ROWS) in (8, 16, 24, 32)
    engine = BatchForward(load_model("tiny")[0])
    assert engine.least_rows in (2, 4, 8, 16, 24, 32)
    for least, counts in ((2, [2, 2, 4, 4, 8, 16, 32]), (8, [8, 8, 8, 8, 8, 16, 32])):
        engine.least_rows = least
        assert [engine._row_count(n) for n in (1, 2, 3, 4, 5, 9, 25)] == counts


def test_a_product_that_rounds_otherwise_with_few_rows_pads_to_more(monkeypatch):
    weight = torch.randn(48, 64)
    for few in (1, 3, 7, 23):

        def times(x, w, bias, few=few):
            return x @ w.T + (1e-3 if len(x) <= few else 0)

        monkeypatch.setattr(forward, "_times", times)
        assert steady_rows([weight], MOST_ROWS) >= min(n for n in (2, 4, 8, 16, 24, 32) if n > few)


# ---- two ways of adding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["tiny", "tiny-gemma3"])
@pytest.mark.parametrize("names", ["abd", "aab", ["a", "c", None, "b", "d", None], ["c"], [*"aaaaaaac", None]])
def test_row_by_row_answers_as_stacked(serving, kind, names, dtype, request):
    if adapter_rows.why_not(torch.device("cpu"), getattr(torch, dtype)):
        pytest.skip("the compiled kernel is not here")
    asked = [asks(x, 10 + i, 5 + 20 * i) for i, x in enumerate(names)]
    engine = serving(kind, dtype)
    assert isinstance(engine.forward.adding, RowWise)
    got = engine.generate(asked)
    request.getfixturevalue("stacked")
    other = serving(kind, dtype)
    assert isinstance(other.forward.adding, Stacked)
    assert other.forward.why_stacked == "switched off"
    for asking, one, twin in zip(asked, got, other.generate(asked), strict=True):
        if asking.adapter is None:
            assert bits(one) == bits(twin)
        for x, y in zip(one.logprobs, twin.logprobs, strict=True):
            assert x.logprob == pytest.approx(y.logprob, abs=1e-4 if dtype == "float32" else 0.05)
            if x.token != y.token:  # near a tie; from here on they answer differently
                break


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_rows_answer_as_torch(serving, kind, monkeypatch):
    """Norms, rotation, attention and gate of a step; float64, in which the others run, is torch's."""
    engine = serving(kind, "float32")
    if not engine.forward._few:
        pytest.skip("the compiled kernels are not here")
    got = engine.generate(CROWD)
    monkeypatch.setattr(few_rows, "why_not", lambda device, dtype: "switched off")
    other = serving(kind, "float32")
    assert not other.forward._few
    for one, twin in zip(got, other.generate(CROWD), strict=True):
        assert one.token_ids == twin.token_ids
        for x, y in zip(one.logprobs, twin.logprobs, strict=True):
            assert x.logprob == pytest.approx(y.logprob, abs=1e-4)


def test_who_comes_and_goes_leaves_nothing_behind(serving):
    engine = serving(dtype="float32")
    if not isinstance(engine.forward.adding, RowWise):
        pytest.skip("the compiled kernel is not here")
    engine.generate([asks("a", 1), asks("b", 2)])
    engine.forget("a"), engine.forget("b")
    held = []
    for name in "ab":
        prepared = engine.adapters.acquire(name)
        held += [weakref.ref(ab.a) for ab in prepared.parts.values()]
        engine.adapters.release(name)
    del prepared
    engine.generate([asks("a", 1), asks("b", 2)])
    assert all(r() is not None for r in held)
    engine.forget("a"), engine.forget("b")
    gc.collect()
    assert held
    assert not any(r() is not None for r in held)


# ---- beginnings computed once ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_case_26_one_prefix_asked_of_a_b_a_and_the_base_is_computed_as_cold(serving, dtype):
    beginning = prompt(1, 160)
    requests = [
        Request(beginning + prompt(2 + i, 9), SamplingParams(max_new_tokens=6, logprobs=2), x)
        for i, x in enumerate(["a", "b", "a", None, "b", None])
    ]
    warm = serving("tiny-gemma3", dtype)
    answers = [warm.generate([r])[0] for r in requests]
    assert warm.prefixes.hits == 6  # two chunks each for the second a, b and base
    without = serving("tiny-gemma3", dtype, prefix_memory=0)
    cold = [without.generate([r])[0] for r in requests]
    assert [bits(c) for c in answers] == [bits(c) for c in cold]


def test_the_prefix_cache_keeps_its_budget(serving):
    engine = serving(prefix_memory=100_000)
    for i in range(12):
        engine.generate([asks(None, i, 130, new=1)])
        assert engine.prefixes.nbytes <= 100_000
    assert engine.prefixes.misses == 24


# ---- adapters come and go -------------------------------------------------------------------------------------------


def test_adapters_stay_within_their_budget_and_come_back_the_same(serving):
    size = (loaded := serving()).adapters.acquire("a").nbytes
    assert loaded.adapters.nbytes == size
    engine = serving(adapter_memory=2 * size)
    names = [f"a-{i}" for i in range(5)]
    first = [engine.generate([asks(n, 1)])[0] for n in names]
    assert engine.adapters.nbytes <= 2 * size
    assert engine.adapters.loads == 5
    again = [engine.generate([asks(n, 1)])[0] for n in names]
    assert [bits(c) for c in again] == [bits(c) for c in first]
    assert engine.adapters.loads == 10
    assert len({c.token_ids for c in first}) == 5
    together = engine.generate([asks(n, 1) for n in names])  # all five answer at once: they are needed, so they stay
    assert [c.token_ids for c in together] == [c.token_ids for c in first]
    assert engine.adapters.nbytes <= 2 * size


def test_a_place_in_the_stack_keeps_nothing_of_who_had_it_before(serving):
    want = serving().generate([asks("d", 1), asks("b", 2)])
    engine = serving()
    engine.generate([asks("a", 1), asks("b", 2)])  # a is on every layer, d on two
    assert [c.token_ids for c in engine.generate([asks("d", 1), asks("b", 2)])] == [c.token_ids for c in want]


def test_an_adapter_that_cannot_be_loaded_fails_its_own_request_only(serving):
    engine, events, good = serving(), [], []
    engine.submit(asks("unknown", 1), events.append)
    engine.submit(asks("a", 1), good.append)
    while engine.step():
        pass
    assert isinstance(events[-1].error, KeyError)
    assert events[-1].finish_reason == "error"
    assert good[-1].finish_reason == "length"
    with pytest.raises(AdapterError, match="no adapter"):
        EmbeddedEngine(engine.model, engine.tokenizer, ()).generate([asks("a", 1)])


def test_a_run_trained_on_answers_with_its_new_weights():
    model, tokenizer = load_model("tiny", dtype="float64")
    peft = inject_lora(model, r=4).eval()
    engine = EmbeddedEngine(peft, tokenizer, ())
    before = engine.generate([asks(RUN_ADAPTER, 1)])[0]
    for name, weight in peft.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(generator=torch.Generator().manual_seed(1))
    assert engine.generate([asks(RUN_ADAPTER, 1)])[0].token_ids != before.token_ids


def test_a_failing_step_tells_everyone_and_the_engine_lives_on(serving, monkeypatch):
    engine, events = serving(), []
    engine.submit(asks("a", 1), events.append)
    with monkeypatch.context() as patch:
        patch.setattr(engine.forward, "prefill", lambda *_: (_ for _ in ()).throw(MemoryError()))
        engine.step()
    assert isinstance(events[-1].error, MemoryError)
    assert engine.load == (0, 0)
    assert engine.generate([asks("a", 1)])[0].finish_reason == "length"


# ---- leaving --------------------------------------------------------------------------------------------------------


def test_case_36_a_client_that_vanishes_frees_its_slot_within_a_step(serving):
    engine = serving(max_batch=2)
    for i in range(100):
        leaving = [engine.submit(asks("a", i, new=50), lambda _: None) for _ in range(3)]
        for _ in range(i % 4):
            engine.step()
        for s in leaving:
            engine.cancel(s)
        engine.step()
        assert engine.load == (0, 0)
        assert sorted(engine._free_slots) == [0, 1]
    assert engine.adapters._users == {}
    assert engine.adapters.loads == 1


def test_more_requests_than_slots_wait_their_turn(serving):
    engine = serving(max_batch=2)
    assert [c.token_ids for c in engine.generate(CROWD)] == [c.token_ids for c in serving().generate(CROWD)]


def test_more_rows_than_one_forward_takes(serving):
    crowd = [asks("abcd"[i % 4], i, 4 + i % 7) for i in range(40)]
    want = serving().generate(crowd)
    assert [c.token_ids for c in serving(max_batch=48).generate(crowd)] == [c.token_ids for c in want]


@pytest.mark.parametrize("bad", [Request(()), asks(None, 1, 10, new=5000)])
def test_what_cannot_fit_is_refused_before_it_waits(serving, bad):
    engine = serving()
    with pytest.raises(ConfigError):
        engine.generate([bad])
    assert engine.load == (0, 0)
