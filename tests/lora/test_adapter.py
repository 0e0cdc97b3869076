"""An adapter on disk: plain PEFT loads it and gives our logits; what does not fit is refused."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig
from safetensors.torch import load_file, save_file

from lora_cmqa.errors import AdapterError
from lora_cmqa.lora.adapter import load_adapter, read_adapter_config, save_adapter
from lora_cmqa.lora.inject import inject_lora, lora_parameters
from lora_cmqa.models.tiny import tiny_folder, tiny_model

from .conftest import adapted, awaken

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(4))
SETTINGS = [
    pytest.param({}, id="plain"),
    pytest.param({"use_rslora": True, "r": 8}, id="rslora"),
    pytest.param({"target_modules": ("q_proj", "v_proj")}, id="two modules"),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CMQA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def saved(tmp_path):
    """(folder, model) of a qwen2 adapter."""
    model = adapted("qwen2", torch.float32).eval()
    return save_adapter(model, tmp_path / "a", base_model_name_or_path=str(tiny_folder())), model


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("settings", SETTINGS)
def test_plain_peft_loads_it_and_gives_our_logits(kind, settings, tmp_path):
    model = adapted(kind, torch.float32, **settings).eval()
    save_adapter(model, tmp_path, base_model_name_or_path=str(tiny_folder(kind)))
    ours = logits(model)
    theirs = logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval())
    assert (ours - theirs).abs().max() <= 1e-5 * ours.std()
    assert (ours - logits(tiny_model(kind))).abs().max() > 0.05  # the adapter does something


@pytest.mark.parametrize("settings", [*SETTINGS, pytest.param({"modules_to_save": ("lm_head",)}, id="head")])
def test_round_trip(kind, settings, tmp_path):
    model = adapted(kind, torch.float32, **settings).eval()
    back = load_adapter(tiny_model(kind), save_adapter(model, tmp_path, base_model_name_or_path="x"))
    assert torch.equal(logits(model), logits(back)) or (logits(model) - logits(back)).abs().max() < 1e-6
    assert not lora_parameters(back)
    again = save_adapter(back, tmp_path / "again", base_model_name_or_path="x")
    assert (again / "adapter_model.safetensors").read_bytes() == (tmp_path / "adapter_model.safetensors").read_bytes()


def test_a_loaded_adapter_can_be_trained_on(saved):
    folder, _ = saved
    model = load_adapter(tiny_model(), folder, is_trainable=True)
    assert lora_parameters(model).keys() == lora_parameters(inject_lora(tiny_model(), r=4)).keys()


def test_float64_over_a_float64_base(saved):
    model = load_adapter(tiny_model(dtype=torch.float64), saved[0], is_trainable=True)
    assert {w.dtype for w in lora_parameters(model).values()} == {torch.float64}


def test_portable_profile(tmp_path):
    save_adapter(adapted("qwen2", r=8, lora_alpha=16, use_rslora=True), tmp_path, base_model_name_or_path="the/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["use_rslora"] is False
    assert config["lora_alpha"] == pytest.approx(16 * 8**0.5)
    assert config["inference_mode"] is True
    assert config["base_model_name_or_path"] == "the/base"
    assert config["target_modules"] == sorted(config["target_modules"])
    assert (config["bias"], config["modules_to_save"]) == ("none", None)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert all(k.startswith("base_model.model.model.layers.") for k in tensors)
    assert all(k.endswith((".lora_A.weight", ".lora_B.weight")) for k in tensors)


def test_a_whole_folded_alpha_is_a_whole_number(tmp_path):
    """Some engines read lora_alpha as an integer."""
    save_adapter(adapted("qwen2", r=4, lora_alpha=16, use_rslora=True), tmp_path, base_model_name_or_path="x")
    assert '"lora_alpha": 32,' in (tmp_path / "adapter_config.json").read_text()


def test_same_weights_same_bytes(tmp_path):
    a, b = (save_adapter(adapted("qwen2"), tmp_path / name, base_model_name_or_path="x") for name in ("a", "b"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes()


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_an_adapter_without_effect(tmp_path):
    model = inject_lora(tiny_model(), r=4)
    save_adapter(model, tmp_path, base_model_name_or_path="x")
    base = tiny_model()
    with pytest.raises(AdapterError, match="every lora_B is zero"):
        load_adapter(base, tmp_path)
    assert [type(m) for m in base.modules()] == [type(m) for m in tiny_model().modules()]  # given back as it came
    load_adapter(base, tmp_path, allow_inert=True)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda t: t.popitem(), "1 of 42 tensors .* missing"),
        (
            lambda t: t.update({"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, 64)}),
            "no layer",
        ),
        (lambda t: t.update({next(iter(t)): torch.ones(5, 64)}), r"is \[5, 64\], the base needs"),
        (lambda t: t.update({next(iter(t)): torch.full((4, 128), float("nan"))}), "NaN"),
        (lambda t: t.update({next(iter(t)): torch.full((4, 128), float("inf"))}), "NaN or infinity"),
    ],
)
def test_tensors_that_do_not_fit(saved, harm, says):
    file = saved[0] / "adapter_model.safetensors"
    tensors = load_file(file)
    harm(tensors)
    save_file(tensors, file)
    with pytest.raises(AdapterError, match=says):
        load_adapter(tiny_model(), saved[0])


def test_fewer_layers_than_the_base(tmp_path):
    """What plain PEFT loads with no more than a warning."""
    model = adapted("qwen2", torch.float32)
    save_adapter(model, tmp_path, base_model_name_or_path="x")
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if ".layers.2." not in k}, file)
    with pytest.raises(AdapterError, match="the adapter has 2 layers, the base 3") as caught:
        load_adapter(tiny_model(), tmp_path)
    assert "--num-hidden-layers 2" in str(caught.value)


def test_another_kind_of_model(saved):
    edit(saved[0], target_modules=["c_attn"])
    with pytest.raises(AdapterError, match="no module 'c_attn'"):
        load_adapter(tiny_model(), saved[0])


def test_a_torn_file(saved):
    file = saved[0] / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="not a whole safetensors file"):
        load_adapter(tiny_model(), saved[0])
    file.unlink()
    with pytest.raises(AdapterError, match="missing"):
        load_adapter(tiny_model(), saved[0])


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize("name", ["adapter_model.bin", "optimizer.pt", "rng_state.pth", "x.pkl", "modeling.py"])
def test_code_and_pickles_are_refused_unopened(saved, name):
    (saved[0] / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(AdapterError, match=name):
        load_adapter(tiny_model(), saved[0])


def test_every_config_that_peft_writes_for_plain_lora_is_read(tmp_path):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    assert read_adapter_config(tmp_path)["r"] == 4


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "LOHA"}, "peft_type"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"bias": "all"}, "bias"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"auto_mapping": {"parent_library": "os"}}, "auto_mapping"),
        ({"a_key_of_tomorrow": "x"}, "a_key_of_tomorrow"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"r": 0}, "r"),
        ({"r": "8"}, "r"),
        ({"r": True}, "r"),
        ({"lora_alpha": -1}, "lora_alpha"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": [3]}, "target_modules"),
    ],
)
def test_settings_that_are_not_plain_lora(saved, change, field):
    edit(saved[0], **change)
    with pytest.raises(AdapterError) as caught:
        read_adapter_config(saved[0])
    assert caught.value.field == field


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_a_config_that_is_none(saved, text):
    (saved[0] / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(AdapterError, match=r"JSON|object"):
        read_adapter_config(saved[0])
    (saved[0] / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        read_adapter_config(saved[0])


def test_awaken_is_seeded():
    a, b = (lora_parameters(awaken(inject_lora(tiny_model(), r=2))) for _ in range(2))
    assert all(torch.equal(a[n], b[n]) for n in a)
