"""The embedded engine answers as transformers' generate does, and the base beside the adapter stays the base."""

import pytest
import torch

from lora_cmqa.data.template import ChatTemplate
from lora_cmqa.engine.base import RUN_ADAPTER, Request
from lora_cmqa.engine.chat import Chat, converse, print_side_by_side
from lora_cmqa.engine.embedded import EmbeddedEngine
from lora_cmqa.engine.run import OpenRun, open_run
from lora_cmqa.engine.sampling import SamplingParams, next_token
from lora_cmqa.errors import ConfigError, RunError
from lora_cmqa.kernels.table import rms_norm
from lora_cmqa.lora.inject import inject_lora, lora_parameters
from lora_cmqa.models.load import load_model

PROMPTS = [tuple(range(40, 50)), tuple(range(60, 63)), tuple(range(70, 101))]
GREEDY = SamplingParams(max_new_tokens=10)


def with_adapter(kind="tiny", dtype="float64"):
    model, tokenizer = load_model(kind, dtype=dtype)
    model = inject_lora(model, r=4, lora_alpha=8)
    generator = torch.Generator().manual_seed(1)
    for name, weight in lora_parameters(model).items():
        if "lora_B" in name:
            weight.data.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * 0.2)
    return model.eval(), tokenizer


@pytest.mark.parametrize("kind", ["tiny", "tiny-qwen3", "tiny-llama", "tiny-gemma3"])
def test_greedy_equals_transformers_generate(kind):
    model, tokenizer = with_adapter(kind)
    engine = EmbeddedEngine(model, tokenizer, stop_ids=(258,))
    ours = engine.generate([Request(p, GREEDY, RUN_ADAPTER) for p in PROMPTS])
    for prompt, completion in zip(PROMPTS, ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, eos_token_id=258
        )[0, len(prompt) :].tolist()
        assert list(completion.token_ids) == [t for t in theirs if t != 258]


def test_a_wrong_kernel_is_found_before_an_answer_is_given(monkeypatch, capsys):
    def answers():
        run = open_run("tiny", dtype="float32", device="cpu")
        engine = EmbeddedEngine(run.model, run.tokenizer, stop_ids=())
        return [c.token_ids for c in engine.generate([Request(p, GREEDY) for p in PROMPTS])]

    right, fast = answers(), rms_norm.fast
    assert "rms_norm" not in capsys.readouterr().err
    monkeypatch.setattr(rms_norm, "way", "fast")
    monkeypatch.setattr(rms_norm, "fast", lambda *args, **kwargs: fast(*args, **kwargs).flip(-1))
    assert answers() == right
    assert "rms_norm" in capsys.readouterr().err


def test_base_rows_are_the_base_bit_for_bit():
    model, tokenizer = with_adapter()
    engine = EmbeddedEngine(model, tokenizer, stop_ids=())
    mixed = engine.generate([Request(p, GREEDY, a) for p in PROMPTS for a in (RUN_ADAPTER, None)])
    bare = EmbeddedEngine(load_model("tiny", dtype="float64")[0], tokenizer, stop_ids=())
    alone = bare.generate([Request(p, GREEDY) for p in PROMPTS])
    assert [c.token_ids for c in mixed[1::2]] == [c.token_ids for c in alone]
    assert [c.token_ids for c in mixed[0::2]] != [c.token_ids for c in alone]


def test_a_stream_left_half_way_leaves_the_adapter_on():
    model, tokenizer = with_adapter()
    engine = EmbeddedEngine(model, tokenizer, stop_ids=())
    want = engine.generate([Request(PROMPTS[0], GREEDY, RUN_ADAPTER)])[0]
    half = engine.stream(Request(PROMPTS[0], GREEDY))
    next(half)
    assert engine.generate([Request(PROMPTS[0], GREEDY, RUN_ADAPTER)])[0] == want


def test_the_head_gets_rows_not_a_sliced_cube():
    model, tokenizer = with_adapter()
    engine = EmbeddedEngine(model, tokenizer, stop_ids=())
    seen = []
    head = engine.forward.head.module
    head.register_forward_pre_hook(lambda _, args: seen.append((args[0].dim(), args[0].is_contiguous())))
    engine.generate([Request(p, GREEDY) for p in PROMPTS])
    assert seen
    assert set(seen) == {(2, True)}


def test_stop_ids_end_an_answer_and_are_no_part_of_it():
    model, tokenizer = with_adapter()
    free = EmbeddedEngine(model, tokenizer, stop_ids=()).generate([Request(PROMPTS[0], GREEDY)])[0]
    stop = free.token_ids[4]
    stopped = EmbeddedEngine(model, tokenizer, stop_ids=(stop,)).generate([Request(PROMPTS[0], GREEDY)])[0]
    assert free.finish_reason == "length"
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(stop)]


def test_sampling_keeps_what_transformers_keeps():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(50, generator=torch.Generator().manual_seed(3)) * 3
    theirs = logits[None]
    for warper in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(12), TopPLogitsWarper(0.8)):
        theirs = warper(None, theirs)
    allowed = set(torch.isfinite(theirs[0]).nonzero()[:, 0].tolist())
    params = SamplingParams(temperature=0.7, top_k=12, top_p=0.8)
    generator = torch.Generator().manual_seed(0)
    drawn = {next_token(logits, params, [], generator) for _ in range(3000)}
    assert drawn == allowed


def test_repetition_penalty_is_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(50, generator=torch.Generator().manual_seed(4))
    for seen in ([1, 2, 3], list(range(40))):
        theirs = RepetitionPenaltyLogitsProcessor(5.0)(torch.tensor([seen]), logits[None].clone())[0].argmax()
        params = SamplingParams(repetition_penalty=5.0)
        assert next_token(logits, params, seen, torch.Generator()) == int(theirs)


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_p": 0}, {"max_new_tokens": 0}, {"repetition_penalty": 0}])
def test_senseless_sampling_is_refused(bad):
    with pytest.raises(ConfigError):
        SamplingParams(**bad)


def chat(tmp_path):
    model, tokenizer = with_adapter()
    template = ChatTemplate.from_tokenizer(tokenizer)
    return Chat(OpenRun(model, tokenizer, template, (256, 258), tmp_path, "tiny", True))


def test_a_conversation_takes_its_commands(tmp_path, capsys):
    lines = iter(["", "你好", "/base", "你好", "/adapter", "/reset", "/what", "你好", "/exit", "never"])
    converse(chat(tmp_path), sampling=SamplingParams(max_new_tokens=4), lines=lines)
    out = capsys.readouterr().out
    assert "/what" in out
    assert next(lines) == "never"


def test_history_and_system_reach_the_prompt(tmp_path):
    c = chat(tmp_path)
    text = c.run.tokenizer.decode(c.request("二", [("一", "答")]).prompt_ids)
    assert text.index("一") < text.index("答") < text.index("二")
    c.system = "你是医生"
    assert "你是医生" in c.run.tokenizer.decode(c.request("一").prompt_ids)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"adapter_config\.json"):
        Chat(tmp_path)


def test_side_by_side_shows_long_answers_whole(capsys):
    long = "".join(chr(0x4E00 + i) for i in range(150))  # no space to break at, every character once
    print_side_by_side([{"question": "q", "base": "short", "adapter": long}])
    assert set(long) <= set(capsys.readouterr().out)
