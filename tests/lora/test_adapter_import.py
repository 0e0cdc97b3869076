"""Adapters of Qwen v1's time: the original's logits from the imported ones; what is incomplete is refused."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from lora_cmqa.engine.base import RUN_ADAPTER, Request
from lora_cmqa.engine.embedded import EmbeddedEngine
from lora_cmqa.engine.sampling import SamplingParams
from lora_cmqa.errors import AdapterError, RunError
from lora_cmqa.lora.adapter import load_adapter, read_adapter_config
from lora_cmqa.lora.adapter_import import import_adapter, rebase
from lora_cmqa.lora.merge import merge
from lora_cmqa.models.load import load_model
from lora_cmqa.models.qwen1 import convert

ADAPTERS = {
    "base_ckpt10": ("adapter_base/checkpoint-10", False),
    "base_top": ("adapter_base", True),
    "chat_ckpt10": ("adapter_chat/checkpoint-10", False),
    "chat_top": ("adapter_chat", False),
}


@pytest.fixture(scope="module")
def native(qwen_v1, tmp_path_factory):
    """The tiny Qwen v1 model in native form, float32."""
    return convert(qwen_v1 / "qwen_v1_tiny", tmp_path_factory.mktemp("v1") / "native", dtype="float32")


@pytest.fixture(scope="module")
def reference(qwen_v1):
    arrays = np.load(qwen_v1 / "reference_adapters.npz")
    prompts = json.loads((qwen_v1 / "reference.json").read_text(encoding="utf-8"))["prompts"]
    return arrays, [p["ids"] for p in prompts]


@torch.no_grad()
def check_logits(model, reference, name):
    arrays, prompts = reference
    vocabulary = torch.from_numpy(arrays["vocab_subset"].astype(np.int64))
    worst = 0.0
    for i, ids in enumerate(prompts):
        ours = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        theirs = arrays[f"{name}.p{i}.logits_subset"]
        at = arrays[f"{name}.p{i}.pos"] if f"{name}.p{i}.pos" in arrays else np.arange(len(ids))
        worst = max(worst, float(np.abs(ours[at][:, vocabulary].numpy() - theirs).max()))
    print(f"{name}: largest logit difference {worst:.1e}")
    assert worst <= 1e-4, "far from the original's logits"


@pytest.mark.parametrize("name", ADAPTERS)
def test_imported_adapter_gives_the_originals_logits(name, qwen_v1, native, reference, tmp_path):
    path, without_missing = ADAPTERS[name]
    report = import_adapter(qwen_v1 / path, native, tmp_path / "new", without_missing=without_missing)
    assert report["layers"] == 4
    assert report["left_out"] == (["wte", "lm_head"] if without_missing else [])
    base, tokenizer = load_model(native)
    model = load_adapter(base, tmp_path / "new").eval()
    check_logits(model, reference, name)
    known = json.loads((qwen_v1 / "reference_adapters.json").read_text(encoding="utf-8"))["adapters"][name]["prompts"]
    asked = [Request(tuple(ids), SamplingParams(max_new_tokens=16), RUN_ADAPTER) for ids in reference[1]]
    for answer, prompt in zip(EmbeddedEngine(model, tokenizer, ()).generate(asked), known, strict=True):
        assert list(answer.token_ids) == prompt["greedy16"]


def test_plain_peft_loads_an_imported_adapter(qwen_v1, native, reference, tmp_path):
    import_adapter(qwen_v1 / "adapter_base/checkpoint-10", native, tmp_path / "new")
    model = PeftModel.from_pretrained(load_model(native)[0], tmp_path / "new").eval()
    check_logits(model, reference, "base_ckpt10")


@pytest.mark.parametrize("name", ["base_ckpt10", "chat_top"])
def test_merged_gives_the_originals_logits(name, qwen_v1, native, reference, tmp_path):
    import_adapter(qwen_v1 / ADAPTERS[name][0], native, tmp_path / "new")
    merge(tmp_path / "new", tmp_path / "merged")
    check_logits(load_model(tmp_path / "merged")[0], reference, name)


def test_an_adapter_on_the_v1_folder_itself_merges_too(qwen_v1, reference, tmp_path):
    base = qwen_v1 / "qwen_v1_tiny"
    import_adapter(qwen_v1 / "adapter_chat", base, tmp_path / "new")
    merge(tmp_path / "new", tmp_path / "merged", dtype="float32")
    check_logits(load_model(tmp_path / "merged")[0], reference, "chat_top")
    assert not list((tmp_path / "merged").glob(".native"))


def test_a_bin_of_tensors_is_read_and_a_pickle_of_more_is_not(qwen_v1, native, tmp_path):
    import_adapter(qwen_v1 / "parity_exact/final", native, tmp_path / "new")
    assert read_adapter_config(tmp_path / "new")["target_modules"] == ["down_proj", "gate_proj", "o_proj", "up_proj"]
    old = copy(qwen_v1 / "parity_exact/final", tmp_path / "old")

    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was run",))

    (old / "adapter_model.bin").write_bytes(pickle.dumps({"a": Trap()}))
    with pytest.raises(AdapterError, match="not a file of tensors"):
        import_adapter(old, native, tmp_path / "no")


def test_what_was_declared_and_lost_is_named(qwen_v1, native, tmp_path):
    with pytest.raises(AdapterError, match="modules_to_save declares wte, lm_head") as caught:
        import_adapter(qwen_v1 / "adapter_base", native, tmp_path / "new")
    assert "--without-missing" in str(caught.value)
    assert not (tmp_path / "new").exists()


def copy(source, target):
    shutil.copytree(source, target)
    for path in [target, *target.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    return target


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda t: [t.pop(k) for k in list(t) if ".h.3." in k], "the adapter has 3 layers, the base 4"),
        (lambda t: t.update({k.replace(".h.3.", ".h.4."): v for k, v in t.items() if ".h.3." in k}), "5 layers"),
        (lambda t: t.pop(next(k for k in t if "c_attn.lora_B" in k)), "has no lora_B"),
        (lambda t: [t.pop(k) for k in list(t) if "mlp.w1" in k], "target_modules declares mlp.up_proj"),
        (lambda t: [t.pop(k) for k in list(t) if "attn.c_proj" in k], "declares self_attn.o_proj"),
        (lambda t: t.update({"base_model.model.transformer.h.0.attn.c_new.lora_A.weight": torch.ones(1)}), "no place"),
        (lambda t: t.update({k: v[:, :-1] for k, v in t.items() if "c_attn.lora_A" in k}), "need"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(4, 4)}), "not declared"),
        (lambda t: t.update({next(iter(t)): torch.tensor([float("nan")])}), "NaN"),
    ],
)
def test_what_does_not_fit_the_base(harm, says, qwen_v1, native, tmp_path):
    old = copy(qwen_v1 / "adapter_chat", tmp_path / "old")
    tensors = load_file(old / "adapter_model.safetensors")
    harm(tensors)
    save_file({k: t.clone().contiguous() for k, t in tensors.items()}, old / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=says):
        import_adapter(old, native, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_base_of_another_family(qwen_v1, tmp_path):
    with pytest.raises(AdapterError, match="neither Qwen v1"):
        import_adapter(qwen_v1 / "adapter_chat", "tiny-llama", tmp_path / "new")


def test_rebase_after_convert(qwen_v1, native, reference, tmp_path):
    """Trained on the v1 folder; plain PEFT loads it after `convert` and `adapter rebase`."""
    import_adapter(qwen_v1 / "adapter_chat", qwen_v1 / "qwen_v1_tiny", tmp_path / "on_v1")
    (tmp_path / "on_v1" / "chat_template.jinja").write_text("kept")
    report = rebase(tmp_path / "on_v1", native, tmp_path / "new")
    assert report["same_base"] is True  # other files hold the same numbers; converted_from.json says whose
    config = read_adapter_config(tmp_path / "new")
    assert config["base_model_name_or_path"] == str(native)
    assert (tmp_path / "new" / "chat_template.jinja").read_text() == "kept"
    assert read_adapter_config(tmp_path / "on_v1")["base_model_name_or_path"] == str(qwen_v1 / "qwen_v1_tiny")
    before, after = ((tmp_path / d / "adapter_model.safetensors").read_bytes() for d in ("on_v1", "new"))
    assert before == after
    check_logits(PeftModel.from_pretrained(load_model(native)[0], tmp_path / "new").eval(), reference, "chat_top")
    assert rebase(tmp_path / "new", native, tmp_path / "again")["same_base"] is True
    stranger = copy(native, tmp_path / "stranger")
    (stranger / "converted_from.json").unlink()
    assert rebase(tmp_path / "on_v1", stranger, tmp_path / "unknown")["same_base"] is False


def test_rebase_refuses_another_shape_and_a_full_folder(qwen_v1, native, tmp_path):
    import_adapter(qwen_v1 / "adapter_chat", native, tmp_path / "new")
    with pytest.raises(AdapterError):
        rebase(tmp_path / "new", "tiny", tmp_path / "no")
    assert not (tmp_path / "no").exists()
    with pytest.raises(RunError, match="not empty"):
        rebase(tmp_path / "new", native, tmp_path / "new")


def test_an_adapter_of_a_cut_base(qwen_v1, reference, tmp_path):
    """The seed's own case, 16 of 32 layers: here 2 of 4."""
    base, old = qwen_v1 / "qwen_v1_tiny", copy(qwen_v1 / "adapter_chat", tmp_path / "old")
    tensors = load_file(old / "adapter_model.safetensors")
    first = {k: t for k, t in tensors.items() if int(k.split(".h.")[1].split(".")[0]) < 2}
    save_file(first, old / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="the adapter has 2 layers, the base 4") as caught:
        import_adapter(old, base, tmp_path / "no")
    assert "--num-hidden-layers 2" in str(caught.value)
    assert import_adapter(old, base, tmp_path / "new", num_hidden_layers=2)["layers"] == 2
    assert json.loads((tmp_path / "new" / "fingerprint.json").read_text())["num_hidden_layers"] == 2
    merge(tmp_path / "new", tmp_path / "merged", dtype="float32")
    merged, _ = load_model(tmp_path / "merged")
    assert len(merged.model.layers) == 2
    assert check_logits_differ(merged, reference)


def check_logits_differ(model, reference):
    """Half the layers are another model: the reference of the whole one is far away."""
    with pytest.raises(AssertionError, match="far from the original"):
        check_logits(model, reference, "chat_top")
    return True
