"""Qwen v1 read natively equals what its own code computed (shared/fixtures/qwen-v1)."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from lora_cmqa.cli import main
from lora_cmqa.core import Message
from lora_cmqa.data.template import ChatTemplate
from lora_cmqa.engine.base import Request
from lora_cmqa.engine.embedded import EmbeddedEngine
from lora_cmqa.engine.plain import as_cache
from lora_cmqa.engine.sampling import SamplingParams
from lora_cmqa.errors import ModelError, RunError
from lora_cmqa.evaluate.ranking import answer_log_probs
from lora_cmqa.models import qwen1
from lora_cmqa.models.load import chat_format, load_model
from lora_cmqa.models.sizes import QWEN1_EARLY_KEYS, shape_of

SETS = {"qwen_v1_tiny": "reference", "qwen_v1_tiny_sharded": "reference_sharded"}
TOLERANCE = 1e-4  # fp32 logits of standard deviation 1.4; a float64 run differs by 7e-6


@pytest.fixture(scope="module", params=SETS)
def original(request, qwen_v1):
    """(model, tokenizer, reference json, reference arrays, folder)"""
    folder = qwen_v1 / request.param
    name = SETS[request.param]
    model, tokenizer = load_model(folder)
    return (
        model,
        tokenizer,
        json.loads((qwen_v1 / f"{name}.json").read_text()),
        np.load(qwen_v1 / f"{name}.npz"),
        folder,
    )


@pytest.fixture(scope="module")
def tokenizer(qwen_v1):
    return qwen1.native_tokenizer(qwen_v1 / "qwen_v1_tiny")


def logits(model, ids, **more):
    with torch.no_grad():
        return model(torch.tensor([ids] if isinstance(ids[0], int) else ids), **more).logits.numpy()


def difference(arrays, name, computed):
    at, subset = arrays[f"{name}.pos"], arrays["vocab_subset"]
    return float(np.abs(computed[at][:, subset] - arrays[f"{name}.logits_subset"]).max())


def difference_of_row(model, arrays, name, ids):
    """The same for one row, with the head on the compared positions and words only (a long row's logits are 1.3 GB)."""
    at, subset = torch.from_numpy(arrays[f"{name}.pos"]).long(), torch.from_numpy(arrays["vocab_subset"]).long()
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0, at]
        computed = hidden @ model.lm_head.weight[subset].T
    return float(np.abs(computed.numpy() - arrays[f"{name}.logits_subset"]).max())


# ---- the model -------------------------------------------------------------------------------------------------------


def test_logits_and_greedy_tokens_of_every_prompt(original):
    model, tokenizer, reference, arrays, _ = original
    worst = 0.0
    for i, prompt in enumerate(reference["prompts"]):
        assert tokenizer(prompt["text"]).input_ids == prompt["ids"]
        computed = logits(model, prompt["ids"])[0]
        worst = max(worst, difference(arrays, f"p{i}", computed))
        if f"p{i}.full_logits_last" in arrays:
            worst = max(worst, float(np.abs(computed[-1] - arrays[f"p{i}.full_logits_last"]).max()))
        ids = torch.tensor([prompt["ids"]])
        for key, penalty in (("greedy16", 1.0), ("greedy16_rp1.1", 1.1)):
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, repetition_penalty=penalty, max_new_tokens=16
            )
            assert out[0, ids.shape[1] :].tolist() == prompt[key]
    print(f"largest logit difference {worst:.1e}")
    assert worst <= TOLERANCE


def test_states_of_every_layer_and_the_loss(original):
    model, _, reference, arrays, _ = original
    for i, prompt in enumerate(reference["prompts"]):
        ids = torch.tensor([prompt["ids"]])
        with torch.no_grad():
            out = model(ids, labels=ids, output_hidden_states=i == 0)
        assert float(out.loss) == pytest.approx(prompt["lm_loss"], abs=1e-5, nan_ok=True)  # of one token there is none
        if i == 0:
            ours = torch.stack(out.hidden_states)[:, 0].numpy()
            assert ours.shape == arrays["p0.layers"].shape
            assert np.abs(ours[:-1] - arrays["p0.layers"][:-1]).max() <= TOLERANCE
            assert np.abs(ours[-1] - arrays["p0.hidden"]).max() <= TOLERANCE


def test_a_chat_is_rendered_and_answered_as_make_context_did(original):
    model, tokenizer, reference, arrays, _ = original
    template = ChatTemplate.from_tokenizer(tokenizer)
    for i, chat in enumerate(reference["make_context"]):
        turns = [Message("system", chat["system"])]
        for question, answer in chat["history"]:
            turns += [Message("user", question), Message("assistant", answer)]
        ids = template.encode_prompt([*turns, Message("user", chat["query"])])
        assert ids == chat["ids"]
        assert difference(arrays, f"ctx{i}", logits(model, ids)[0]) <= TOLERANCE


def test_our_engine_writes_the_originals_tokens(original):
    """Greedy, plain and with repetition_penalty 1.1: all prompts and chats in one batch."""
    model, tokenizer, reference, _, _ = original
    cases = [(p["ids"], p["greedy16"], 1.0) for p in reference["prompts"]]
    cases += [(p["ids"], p["greedy16_rp1.1"], 1.1) for p in reference["prompts"]]
    cases += [(c["ids"], c["greedy16"], 1.0) for c in reference["make_context"] if "greedy16" in c]
    asked = [Request(tuple(i), SamplingParams(max_new_tokens=16, repetition_penalty=p)) for i, _, p in cases]
    for plain in (False, True):
        engine = EmbeddedEngine(model, tokenizer, (), plain=plain)
        for (_, want, _), answer in zip(cases, engine.generate(asked), strict=True):
            assert list(answer.token_ids) == want


def test_left_padded_rows_go_on_as_the_originals_did(original):
    model, _, reference, _, _ = original
    batch = reference["batch_left_padded"]
    ids, mask = torch.tensor(batch["input_ids"]), torch.tensor(batch["attention_mask"])
    out = model.generate(ids, attention_mask=mask, do_sample=False, repetition_penalty=1.0, max_new_tokens=16)
    assert out[:, ids.shape[1] :].tolist() == batch["greedy16"]


def test_padded_rows_count_by_their_own_length(original):
    model, _, reference, arrays, _ = original
    batch = reference["batch_right_padded"]
    mask = torch.tensor(batch["input_ids"]) != 151643
    computed = logits(model, batch["input_ids"], attention_mask=mask.long())
    for row in range(len(computed)):
        assert difference(arrays, f"batch{row}", computed[row]) <= TOLERANCE


def test_padded_rows_count_on_after_what_is_cached(original):
    model, _, reference, _, _ = original
    batch = reference["batch_left_padded"]
    ids, mask = torch.tensor(batch["input_ids"]), torch.tensor(batch["attention_mask"])
    whole = model(ids, attention_mask=mask, use_cache=False).logits[:, -1]
    begun = model(ids[:, :-3], attention_mask=mask[:, :-3], use_cache=True)
    rest = model(ids[:, -3:], attention_mask=mask, **as_cache(model, begun_cache(begun))).logits[:, -1]
    torch.testing.assert_close(rest, whole, atol=1e-4, rtol=0)


def begun_cache(output):
    return output["cache" if "cache" in output else "past_key_values"]


def shorter(folder: Path, out: Path, seq_length: int) -> Path:
    """The same weights with another seq_length in the config, as the fixtures' `_s128` were made."""
    shutil.copytree(folder, out)
    config = json.loads((folder / "config.json").read_text())
    (out / "config.json").chmod(0o644)
    (out / "config.json").write_text(json.dumps(config | {"seq_length": seq_length}))
    return out


def test_above_seq_length_ntk_and_logn_equal_the_original(original, tmp_path):
    model, _, reference, arrays, folder = original
    short = qwen1.load(shorter(folder, tmp_path / "s128", 128), torch.float32)
    worst = 0.0
    for name, case in reference["long"].items():
        if not name.startswith("long"):
            continue
        chosen = short if case["seq_length"] == 128 else model
        chosen.train("trainmode" in name)
        worst = max(worst, difference_of_row(chosen, arrays, name, case["ids"]))
        assert worst <= TOLERANCE, name
        chosen.eval()
    batch = reference["long"]["batch_s128"]
    computed = logits(short, batch["input_ids"], attention_mask=torch.tensor(batch["attention_mask"]))
    for row in range(2):
        worst = max(worst, difference(arrays, f"batch_s128_row{row}", computed[row]))
    print(f"above seq_length: largest logit difference {worst:.1e}")
    assert worst <= TOLERANCE
    case = reference["long"]["generate_cross_s128"]  # crosses seq_length while it generates
    ids = torch.tensor([case["prompt_ids"]])
    for cache, key in ((True, "greedy24_cached"), (False, "greedy24_recomputed_without_cache")):
        out = short.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            repetition_penalty=1.0,
            max_new_tokens=24,
            use_cache=cache,
        )
        assert out[0, ids.shape[1] :].tolist() == case[key], key


def test_a_plain_qwen2_is_wrong_above_seq_length(original, tmp_path):
    """The control: were NTK or logn left out, the test above would see it."""
    _, _, reference, arrays, folder = original
    for off in ("use_dynamic_ntk", "use_logn_attn"):
        out = shorter(folder, tmp_path / off, 128)
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(config | {off: False}))
        plain = qwen1.load(out, torch.float32)
        assert difference_of_row(plain, arrays, "long300_s128", reference["long"]["long300_s128"]["ids"]) > 0.01


def test_packed_rows_equal_the_same_rows_alone_above_seq_length(qwen_v1, tmp_path, exact_norms):
    """Rows of 150, 20 and 300 tokens in one pack, seq_length 128: each by its own alpha."""
    from lora_cmqa.core import TokenizedExample
    from lora_cmqa.data.pack import make_pack
    from lora_cmqa.lora.decoder import token_losses

    model = qwen1.load(shorter(qwen_v1 / "qwen_v1_tiny", tmp_path / "s128", 128), torch.float64)
    rng = np.random.default_rng(0)
    rows = [
        TokenizedExample(ids, ids.copy(), str(n), str(n))
        for n in (150, 20, 300)
        for ids in [rng.integers(0, 151643, n).astype(np.int32)]
    ]
    packed = token_losses(model, make_pack(rows))
    alone = torch.cat([token_losses(model, make_pack([row])) for row in rows])
    torch.testing.assert_close(packed, alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("question", [150, 100])  # above seq_length, and beyond it only with the answer
def test_candidates_above_seq_length_are_ranked_as_the_whole_rows_say(question, qwen_v1, tmp_path):
    model = qwen1.load(shorter(qwen_v1 / "qwen_v1_tiny", tmp_path / "s128", 128), torch.float64)
    rng = np.random.default_rng(1)
    prefix = rng.integers(0, 151643, question).tolist()
    answers = [rng.integers(0, 151643, n) for n in (60, 12, 40)]
    ranked = answer_log_probs(model, prefix, answers)
    for answer, ours in zip(answers, ranked, strict=True):
        row = [*prefix, *answer.tolist()]
        log_p = torch.from_numpy(logits(model, row)[0, question - 1 : -1]).log_softmax(-1)
        alone = log_p.gather(1, torch.from_numpy(answer)[:, None]).sum().item()
        assert ours == pytest.approx(alone, abs=1e-9)


def test_rows_go_on_by_the_alpha_of_their_own_cache(qwen_v1, tmp_path):
    """A long and a short row in turn, and one cache gone on from by three rows: none takes another's alpha."""
    model = qwen1.load(shorter(qwen_v1 / "qwen_v1_tiny", tmp_path / "s128", 128), torch.float64)
    rng = np.random.default_rng(2)
    long, short = (torch.from_numpy(rng.integers(0, 151643, (1, n))) for n in (200, 90))
    with torch.no_grad():
        caches = [begun_cache(model(ids[:, :-1], use_cache=True)) for ids in (long, short)]
        for ids, cache in zip((long, short), caches, strict=True):
            three = copy.deepcopy(cache)
            three.batch_repeat_interleave(3)
            for rows, known in ((1, cache), (3, three)):
                rest = model(
                    ids[:, -1:].expand(rows, -1),
                    position_ids=torch.full((rows, 1), ids.shape[1] - 1),
                    **as_cache(model, known),
                ).logits[:, -1]
                want = model(ids, use_cache=False).logits[:, -1].expand(rows, -1)
                torch.testing.assert_close(rest, want, atol=1e-9, rtol=0)


def test_a_long_row_scored_before_changes_no_answer(qwen_v1, tmp_path):
    """The engine refuses rows above seq_length by its number, in a batch with others too, and what was scored above it
    leaves nothing behind."""
    from lora_cmqa.core import TokenizedExample
    from lora_cmqa.data.pack import make_pack
    from lora_cmqa.errors import ConfigError
    from lora_cmqa.lora.decoder import token_losses

    folder = shorter(qwen_v1 / "qwen_v1_tiny", tmp_path / "s128", 128)
    model, tokenizer = load_model(folder)
    rng = np.random.default_rng(3)
    ids = rng.integers(0, 151643, 300).astype(np.int32)
    engine = EmbeddedEngine(model, tokenizer, ())
    asked = [Request(tuple(ids[:n].tolist()), SamplingParams(max_new_tokens=128 - n)) for n in (100, 120, 126)]
    for prompt, answer in ((100, 29), (200, 1)):
        with pytest.raises(ConfigError, match="this model has 128 positions"):
            engine.generate([*asked, Request(tuple(ids[:prompt].tolist()), SamplingParams(max_new_tokens=answer))])
    first = [c.token_ids for c in engine.generate(asked)]
    token_losses(model, make_pack([TokenizedExample(ids, ids.copy(), "long", "long")]))
    assert [c.token_ids for c in engine.generate(asked)] == first  # their first 64 tokens come from the prefix cache
    plain = EmbeddedEngine(model, tokenizer, (), plain=True)
    assert [c.token_ids for c in plain.generate(asked)] == first


# ---- config and weights ----------------------------------------------------------------------------------------------

SEVEN_B = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "intermediate_size": 22016,
    "vocab_size": 151936,
    "rotary_emb_base": 10000,
    "layer_norm_epsilon": 1e-6,
    "seq_length": 8192,
    "max_position_embeddings": 32768,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
}


def their_shapes(v1: qwen1.Qwen1Config) -> dict[str, tuple[int, ...]]:
    h, f = v1.hidden, v1.ffn
    layer = {
        "ln_1.weight": (h,),
        "attn.c_attn.weight": (3 * h, h),
        "attn.c_attn.bias": (3 * h,),
        "attn.c_proj.weight": (h, h),
        "ln_2.weight": (h,),
        "mlp.w1.weight": (f, h),
        "mlp.w2.weight": (f, h),
        "mlp.c_proj.weight": (h, f),
    }
    shapes = {f"transformer.h.{n}.{k}": s for n in range(v1.layers) for k, s in layer.items()}
    return shapes | {
        "transformer.wte.weight": (v1.vocab, h),
        "transformer.ln_f.weight": (h,),
        "lm_head.weight": (v1.vocab, h),
    }


def test_a_7b_shaped_config_goes_through_the_table_without_allocating(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SEVEN_B))
    v1 = qwen1.read_config(tmp_path)
    theirs = their_shapes(v1)
    assert len(theirs) == 259
    ours = {
        name: tuple(t.shape)
        for their_name, shape in theirs.items()
        for name, t in qwen1.native_tensors(their_name, torch.empty(shape, device="meta"))
    }
    with torch.device("meta"):
        model = Qwen2ForCausalLM(qwen1.native_config(v1))
    assert ours == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert sum(p.numel() for p in model.parameters()) == 7_721_324_544


def test_early_config_keys_are_mapped(tmp_path):
    early = {v: k for k, v in QWEN1_EARLY_KEYS.items()}
    (tmp_path / "config.json").write_text(json.dumps({early.get(k, k): v for k, v in SEVEN_B.items()}))
    v1 = qwen1.read_config(tmp_path)
    assert (v1.hidden, v1.layers, v1.ffn, v1.vocab, v1.max_positions) == (4096, 32, 11008, 151936, 32768)


def test_a_config_of_august_2023(tmp_path):
    """Its keys as they were published, vocab_size the tokenizer's; and one that contradicts itself."""
    early = {
        "model_type": "qwen",
        "n_embd": 4096,
        "n_head": 32,
        "n_layer": 32,
        "n_positions": 8192,
        "n_inner": None,
        "ffn_hidden_size": 22016,
        "padded_vocab_size": 151936,
        "vocab_size": 151851,
        "kv_channels": 128,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.1,
        "no_bias": True,
        "layer_norm_epsilon": 1e-6,
        "pos_emb": "rotary",
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": 2048,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "params_dtype": "torch.bfloat16",
        "apply_residual_connection_post_layernorm": False,
        "onnx_safe": None,
        "bias_dropout_fusion": True,
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(early))
    v1 = qwen1.read_config(tmp_path)
    assert (v1.hidden, v1.layers, v1.ffn, v1.vocab, v1.seq_length) == (4096, 32, 11008, 151936, 2048)
    assert shape_of(tmp_path).vocab == 151936
    file.write_text(json.dumps(early | {"num_hidden_layers": 16}))
    with pytest.raises(ModelError, match="32, but num_hidden_layers is 16") as caught:
        qwen1.read_config(tmp_path)
    assert caught.value.field == "n_layer"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"no_bias": False}, "no_bias"),
        ({"rotary_pct": 0.5}, "rotary_pct"),
        ({"pos_emb": "alibi"}, "pos_emb"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual"),
        ({"kv_channels": 64}, "kv_channels"),
        ({"seq_length": None}, "seq_length"),
        ({"kv_channels": None}, "kv_channels"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"visual": {"layers": 48}}, "'visual': only text models"),
    ],
)
def test_what_is_not_built_is_refused_by_name(tmp_path, change, said):
    (tmp_path / "config.json").write_text(json.dumps(SEVEN_B | change))
    with pytest.raises(ModelError, match=said):
        qwen1.read_config(tmp_path)


def test_heads_that_do_not_share_the_width_are_refused(tmp_path):
    odd = {k: v for k, v in SEVEN_B.items() if k != "kv_channels"} | {"num_attention_heads": 30}
    (tmp_path / "config.json").write_text(json.dumps(odd))
    with pytest.raises(ModelError, match=r"30 heads of 136 \(kv_channels\) are not hidden_size 4096"):
        qwen1.read_config(tmp_path)


def test_every_value_of_every_tensor_arrives(qwen_v1):
    """Round trip: our weights joined again are theirs, bit for bit."""
    folder = qwen_v1 / "qwen_v1_tiny_sharded"
    model = qwen1.load(folder, torch.bfloat16)
    ours = dict(model.named_parameters())
    seen = set()
    for file in qwen1.weight_files(folder):
        for name, tensor in load_file(file).items():
            names = qwen1.native_names(name)
            assert torch.equal(torch.cat([ours[n] for n in names]), tensor)
            seen |= set(names)
    assert seen == set(ours)


@pytest.fixture
def small(qwen_v1, tmp_path):
    """A writable copy, and its tensors."""
    folder = tmp_path / "v1"
    shutil.copytree(qwen_v1 / "qwen_v1_tiny", folder)
    for file in folder.iterdir():
        file.chmod(0o644)
    folder.chmod(0o755)
    return folder, load_file(folder / "model.safetensors")


def test_a_missing_a_foreign_and_a_misshapen_tensor_are_named(small):
    folder, tensors = small
    norm = "transformer.h.2.ln_1.weight"
    for change, said in (
        ({k: v for k, v in tensors.items() if k != norm}, "missing, the first is model.layers.2.input_layernorm"),
        (tensors | {"transformer.h.0.attn.extra.weight": torch.ones(2)}, "attn.extra.weight has no place"),
        (tensors | {norm: torch.ones(7)}, r"shape \(7,\)"),
        (tensors | {"transformer.h.1.attn.c_attn.bias": torch.ones(97)}, r"\(97,\); numbers in 3 equal shares"),
        (tensors | {norm: torch.tensor(1.0)}, r"shape \(\); numbers"),
        (tensors | {norm: torch.ones(32, dtype=torch.int8)}, "is torch.int8 of shape"),
        (tensors | {"transformer.h.9.ln_1.weight": tensors[norm].clone()}, "hold a layer 10, this config says 4"),
    ):
        save_file(change, folder / "model.safetensors")
        with pytest.raises(ModelError, match=said):
            qwen1.load(folder, torch.float32)


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return open, (self.canary, "w")


def test_bin_shards_are_read_as_tensors_only(small):
    folder, tensors = small
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    model = qwen1.load(folder, torch.float32)
    assert torch.equal(model.model.norm.weight, tensors["transformer.ln_f.weight"].float())
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)  # as torch 1.5 wrote
    assert torch.equal(qwen1.load(folder, torch.float32).lm_head.weight, model.lm_head.weight)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="damaged"):
        qwen1.load(folder, torch.float32)
    torch.save({"transformer.ln_f.weight": Trap(folder / "canary")}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="not a file of tensors"):
        qwen1.load(folder, torch.float32)
    assert not (folder / "canary").exists()


def bin_name(name: str) -> str:
    return name.replace("model-", "pytorch_model-").replace("safetensors", "bin")


def test_bin_shards_and_their_index(qwen_v1, tmp_path):
    source, folder = qwen_v1 / "qwen_v1_tiny_sharded", tmp_path / "v1"
    folder.mkdir()
    shutil.copyfile(source / "config.json", folder / "config.json")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    for file in qwen1.weight_files(source):
        torch.save(load_file(file), folder / bin_name(file.name))
    named = {k: bin_name(v) for k, v in index["weight_map"].items()}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": named}))
    want = qwen1.load(source, torch.bfloat16).state_dict()
    assert all(torch.equal(t, want[n]) for n, t in qwen1.load(folder, torch.bfloat16).state_dict().items())
    (folder / "model.safetensors.index.json").write_text((source / "model.safetensors.index.json").read_text())
    shutil.copyfile(source / "model-00003-of-00003.safetensors", folder / "model-00003-of-00003.safetensors")
    assert len(qwen1.weight_files(folder)) == 3  # a fetch of the other form that broke off does not stand in the way
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00003-of-00003.safetensors").unlink()
    (folder / "pytorch_model-00001-of-00003.bin").unlink()
    with pytest.raises(ModelError, match="1 of 3 weight files are missing: pytorch_model-00001"):
        qwen1.load(folder, torch.float32)


MEASURE = """
import sys, torch
from pathlib import Path
from lora_cmqa.models import qwen1
def peak():  # resident pages at their most, mapped files' among them
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
what, folder, out = sys.argv[1:]
v1, before = qwen1.read_config(folder), peak()
if what == "load":
    model = qwen1.load(folder, torch.bfloat16)
else:
    qwen1._write_shards(Path(folder), Path(out), v1, qwen1.native_config(v1), None)
print(peak() - before)
"""


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_memory_is_never_more_than_a_shard_above_the_model(form, tmp_path):
    """8 shards of 39 MB (embedding, six wide layers, head): loading holds the model and one shard. Converting holds one
    read and one to be written, never the model. (glibc is told to hand freed blocks back at once.)"""
    config = SEVEN_B | {"hidden_size": 128, "num_attention_heads": 1, "num_hidden_layers": 6, "vocab_size": 151936}
    folder, out = tmp_path / "v1", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 100_000}))
    shapes = their_shapes(qwen1.read_config(folder))
    shards = [{} for _ in range(8)]
    for name, shape in shapes.items():
        number = int(name.split(".")[2]) + 1 if ".h." in name else 7 if "lm_head" in name else 0
        shards[number][name] = torch.ones(shape, dtype=torch.bfloat16)
    for number, shard in enumerate(shards):
        if form == "safetensors":
            save_file(shard, folder / f"model-{number}.safetensors")
        else:
            torch.save(shard, folder / f"pytorch_model-{number}.bin")
    largest, *_, smallest = sorted((sum(t.nbytes for t in s.values()) for s in shards), reverse=True)
    size, slack = (
        2 * sum(int(np.prod(s)) for s in shapes.values()),
        16e6,
    )  # slack: pages of code touched for the first time
    assert smallest > 2 * slack
    for what, most in (("load", size + largest), ("convert", 2 * largest)):
        command = [sys.executable, "-c", MEASURE, what, str(folder), str(out)]
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=env)
        used = int(done.stdout.split()[-1])
        print(f"{form} {what}: {used / 1e6:.1f} MB for {size / 1e6:.1f} MB in shards of {largest / 1e6:.1f} MB")
        assert used <= most + slack


def test_a_missing_shard_and_a_damaged_one_are_named(qwen_v1, tmp_path):
    folder = tmp_path / "v1"
    shutil.copytree(qwen_v1 / "qwen_v1_tiny_sharded", folder)
    folder.chmod(0o755)
    second = folder / "model-00002-of-00003.safetensors"
    second.chmod(0o644)
    second.write_bytes(second.read_bytes()[:1000])
    with pytest.raises(ModelError, match="damaged"):
        qwen1.load(folder, torch.float32)
    second.unlink()
    with pytest.raises(ModelError, match="1 of 3 weight files are missing: model-00002"):
        qwen1.load(folder, torch.float32)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.safetensors.index.json", "{", "not readable"),
        ("model.safetensors.index.json", "[]", "an object is expected"),
        ("model.safetensors.index.json", "{}", "names no weights"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../b.safetensors"}}', "no file beside it"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}', "1 of 1 weight files are missing"),
        ("generation_config.json", "{", "not readable"),
        ("generation_config.json", '{"max_new_tokens": -4}', "max_new_tokens"),
        ("config.json", "{", "not readable"),
        ("config.json", "[]", "object"),
    ],
)
def test_broken_files_are_named(small, name, content, said, capsys):
    folder, _ = small
    (folder / name).write_text(content)
    assert main(["chat", "--model", str(folder), "--device", "cpu", "--dtype", "float32"]) == 2
    refused = capsys.readouterr().err
    assert "ModelError" in refused
    assert said in refused
    assert name in refused or "missing" in refused


def test_the_seeds_layer_edit_says_what_it_costs(qwen_v1, capsys):
    whole = qwen1.load(qwen_v1 / "qwen_v1_tiny", torch.float32)
    cut, _ = load_model(qwen_v1 / "qwen_v1_tiny", num_hidden_layers=2)
    assert (len(cut.model.layers), cut.config.num_hidden_layers) == (2, 2)
    assert torch.equal(cut.model.layers[1].mlp.up_proj.weight, whole.model.layers[1].mlp.up_proj.weight)
    assert "Keeping the first 2 of 4 layers" in capsys.readouterr().err
    with pytest.raises(ModelError, match="num_hidden_layers is 5; the model has 4"):
        load_model(qwen_v1 / "qwen_v1_tiny", num_hidden_layers=5)


def test_the_seeds_own_way_to_cut_is_named(small):
    """It wrote 16 into config.json over weights of 32 layers; its stack then left the others out with a warning."""
    folder, _ = small
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(ModelError, match="hold a layer 3, this config says 2: it was edited") as caught:
        load_model(folder)
    assert "--num-hidden-layers 2" in str(caught.value)


def test_convert_writes_the_first_layers_only(qwen_v1, tmp_path):
    """Of three shards and three layers one layer is kept: what is left of the shards has an index of its own."""
    folder = qwen_v1 / "qwen_v1_tiny_sharded"
    out = qwen1.convert(folder, tmp_path / "native", num_hidden_layers=1)
    cut, _ = load_model(folder, num_hidden_layers=1)
    written, _ = load_model(out)
    assert len(written.model.layers) == written.config.num_hidden_layers == 1
    for (name, a), (_, b) in zip(cut.named_parameters(), written.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert {f.name for f in out.glob("*.safetensors")} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == 2 * sum(p.numel() for p in written.parameters())
    with pytest.raises(ModelError, match="num_hidden_layers is 4; the model has 3"):
        qwen1.convert(folder, tmp_path / "no", num_hidden_layers=4)


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def check_cases(tokenizer, cases):
    for case in cases:
        text, ids = case["text"], case["ids"]
        assert tokenizer(text).input_ids == ids, text
        assert tokenizer(text, split_special_tokens=True).input_ids == case["ids_specials_as_text"], text
        assert tokenizer.decode(ids) == case["decoded"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == case["decoded_skip_special"]


def test_tokenizer_equals_the_original(tokenizer, qwen_v1):
    cases = json.loads((qwen_v1 / "tokenizer_cases.json").read_text())["cases"]
    assert len(cases) == 600
    check_cases(tokenizer, cases)
    assert len(tokenizer) == 151851
    assert tokenizer.decode([151900, 151935]) == ""


def test_the_ids_survive_saving(tokenizer, qwen_v1, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    cases = json.loads((qwen_v1 / "tokenizer_cases.json").read_text())["cases"]
    whole = [c for c in cases if not any("\ud800" <= letter <= "\udfff" for letter in c["text"])]
    assert len(whole) > 500
    plain = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False, local_files_only=True)
    check_cases(plain, whole)


def test_a_batch_and_a_lone_surrogate(tokenizer):
    assert tokenizer(["头痛", "a\ud800b"]).input_ids == [tokenizer("头痛").input_ids, tokenizer("a\ufffdb").input_ids]


def test_a_wrong_tiktoken_file_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no qwen\.tiktoken"):
        qwen1.native_tokenizer(tmp_path)
    (tmp_path / "qwen.tiktoken").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(ModelError, match="2 tokens; Qwen v1 has 151,643"):
        qwen1.native_tokenizer(tmp_path)


def test_chat_or_not_is_what_the_generation_config_says(qwen_v1, tmp_path):
    """Never what the folder is called: the seed's script looked for the word chat in the path."""
    for name, said in (("qwen_v1_tiny", "chatml"), ("qwen_v1_tiny_sharded", "raw")):
        for called in ("Qwen-7B-Chat", "Qwen-7B"):
            folder = tmp_path / name / called
            folder.parent.mkdir(exist_ok=True)
            folder.symlink_to(qwen_v1 / name)
            assert chat_format(folder) == said
    assert chat_format(tmp_path) is None


# ---- out again -------------------------------------------------------------------------------------------------------


def test_convert_writes_a_folder_that_plain_transformers_loads(original, tmp_path):
    model, _, reference, _, folder = original
    out = qwen1.convert(folder, tmp_path / "native")
    plain = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, trust_remote_code=False, local_files_only=True
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=False, local_files_only=True)
    for prompt in reference["prompts"][:3]:
        assert tokenizer(prompt["text"]).input_ids == prompt["ids"]
        assert np.abs(logits(plain, prompt["ids"]) - logits(model, prompt["ids"])).max() <= 1e-6
    assert plain.config.max_position_embeddings == 2048
    assert plain.generation_config.eos_token_id == [151645, 151643]
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    assert qwen1.convert(folder, out) == out  # the same again: nothing to do
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before
    with pytest.raises(RunError, match="not empty"):
        qwen1.convert(folder, out, num_hidden_layers=1)
    with pytest.raises(ModelError, match="'qwen2' is not Qwen v1"):
        qwen1.convert(out, tmp_path / "again")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["native"]
    assert {oct(p.stat().st_mode & 0o777) for p in out.iterdir()} == {"0o644"}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_it_is_quantised_as_its_layers_are_read(kind, qwen_v1):
    """The packed layers are those of the loaded ones, q, k and v cut from c_attn; embedding, head and biases stay."""
    from lora_cmqa.kernels.quantized import quantize
    from lora_cmqa.models.quantized import QuantizedLinear, quantization_of

    folder = qwen_v1 / "qwen_v1_tiny"
    plain, (packed, _) = qwen1.load(folder, torch.float32), load_model(folder, quantization=kind)
    assert quantization_of(packed) == kind
    layers = {n: m for n, m in packed.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(layers) == 7 * len(packed.model.layers)
    for name, layer in layers.items():
        expected = quantize(plain.get_submodule(name).weight, kind)
        assert all(torch.equal(t, layer.quantized.tensors[n]) for n, t in expected.tensors.items())
    same = {n: p for n, p in packed.named_parameters() if n.removesuffix(".weight") not in layers}
    assert any(n.endswith("q_proj.bias") for n in same)
    assert all(torch.equal(p, plain.get_parameter(n)) for n, p in same.items())
