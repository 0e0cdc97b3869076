from __future__ import annotations

import warnings

import pytest
import torch
from peft.tuners.lora import LoraLayer

from lora_cmqa.errors import AdapterError
from lora_cmqa.lora.inject import inject_lora, lora_parameters, remove_lora
from lora_cmqa.models.tiny import tiny_model

from .conftest import awaken

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def targets(model) -> set[str]:
    return set(model.peft_config["default"].target_modules)


def test_all_linear_is_every_linear_layer_but_the_head(kind):
    model = inject_lora(tiny_model(kind), r=4)
    linear = [n for n, m in tiny_model(kind).named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
    with_lora = {
        n.split(".lora_A")[0].removeprefix("base_model.model.") for n in lora_parameters(model) if "lora_A" in n
    }
    assert with_lora == set(linear)
    assert targets(model) == LINEAR
    assert len(lora_parameters(model)) == 2 * len(linear)
    assert all("lora_" in n for n in lora_parameters(model))


@pytest.mark.parametrize(
    ("base", "lora"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_dtype_of_the_lora_weights(kind, base, lora):
    model = inject_lora(tiny_model(kind, base), r=2, modules_to_save=("lm_head",))
    assert {w.dtype for n, w in lora_parameters(model).items() if "lora_" in n} == {lora}
    assert {w.dtype for w in model.parameters() if not w.requires_grad} == {base}


def test_the_draw_depends_on_the_seed_alone_and_leaves_torchs_state():
    torch.manual_seed(1)
    a = lora_parameters(inject_lora(tiny_model(), r=4, seed=7))
    base = tiny_model()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    b = lora_parameters(inject_lora(base, r=4, seed=7))
    assert torch.equal(torch.get_rng_state(), state)
    c = lora_parameters(inject_lora(tiny_model(), r=4, seed=8))
    assert list(a) == list(b)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not any(torch.equal(a[n], c[n]) for n in a if "lora_A" in n)
    assert all(a[n].any() for n in a if "lora_A" in n)
    assert not any(a[n].any() for n in a if "lora_B" in n)


def test_rslora_scales_by_the_root_of_r():
    plain = inject_lora(tiny_model(), r=16, lora_alpha=8)
    rooted = inject_lora(tiny_model(), r=16, lora_alpha=8, use_rslora=True)
    scale = [next(m for m in x.modules() if isinstance(m, LoraLayer)).scaling["default"] for x in (plain, rooted)]
    assert scale == [8 / 16, 8 / 16**0.5]


def test_remove_gives_back_the_base(kind):
    """The round trip: every weight bit for bit, every module of its old class, and LoRA can be put on again."""
    model, before = tiny_model(kind), tiny_model(kind)
    ids = torch.arange(12)[None]
    back = remove_lora(awaken(inject_lora(model, r=4, modules_to_save=("lm_head",))))
    assert type(back) is type(before)
    assert [type(m) for m in back.modules()] == [type(m) for m in before.modules()]
    ours, theirs = back.state_dict(), before.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert torch.equal(back(ids).logits, before(ids).logits)
    assert lora_parameters(back) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject_lora(back, r=4)


@pytest.mark.parametrize(
    ("v1", "today"),
    [
        (("c_attn",), {"q_proj", "k_proj", "v_proj"}),
        (("c_attn", "c_proj", "w1", "w2"), LINEAR),
        (("w1",), {"up_proj"}),
        (("w2", "q_proj"), {"gate_proj", "q_proj"}),
    ],
)
def test_names_of_qwen_v1_are_accepted(v1, today):
    assert targets(inject_lora(tiny_model(), r=2, target_modules=v1)) == today


def test_modules_to_save_by_either_name():
    model = inject_lora(tiny_model(), r=2, modules_to_save=("wte", "lm_head"))
    saved = [n for n in lora_parameters(model) if "modules_to_save" in n]
    assert [n.split(".modules_to_save")[0].rsplit(".", 1)[-1] for n in saved] == ["embed_tokens", "lm_head"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"target_modules": ("q_porj",)}, "Did you mean q_proj"),
        ({"target_modules": ("c_atn",)}, "Did you mean c_attn"),
        ({"target_modules": ("self_attn",)}, "takes no LoRA"),
        ({"target_modules": ()}, "empty"),
        ({"target_modules": ("all-linear", "q_proj")}, "stands alone"),
        ({"modules_to_save": ("all-linear",)}, "stands alone"),
        ({"modules_to_save": ("embed_token",)}, "Did you mean embed_tokens"),
        ({"r": 0}, "r must be at least 1"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
    ],
)
def test_what_cannot_be_is_refused_with_the_nearest_name(settings, says):
    with pytest.raises(AdapterError, match=says):
        inject_lora(tiny_model(), **settings)
