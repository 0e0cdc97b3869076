"""One forward over a pack equals the rows one by one, and transformers' own forward of each row; fast way and plain."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from lora_cmqa.core import IGNORE
from lora_cmqa.data.pack import make_pack, pack
from lora_cmqa.lora import decoder, plain
from lora_cmqa.lora.decoder import causal_lm, hidden_states, pack_losses, token_losses, why_plain
from lora_cmqa.lora.family import Unsupported
from lora_cmqa.lora.inject import inject_lora, lora_parameters, remove_lora
from lora_cmqa.models.tiny import tiny_model

from .conftest import adapted, awaken, make_packed, make_questions, make_rows
from .test_inject import LINEAR

pytestmark = pytest.mark.usefixtures("exact_norms")


@pytest.fixture(params=["fast", "plain"])
def way(request, monkeypatch) -> str:
    """The test runs by our own forward, and again by the plain twin."""
    if request.param == "plain":
        take_the_plain_way(monkeypatch)
    return request.param


def take_the_plain_way(monkeypatch) -> None:
    def refuse(*_args, **_kwargs):
        raise Unsupported("the test says so")

    monkeypatch.setattr(decoder, "read_body", refuse)


def hf_losses(model, row, attention: str | None = None) -> torch.Tensor:
    """The outside oracle: the model's own forward of one row, torch's cross entropy of its taught tokens."""
    if attention is not None:
        causal_lm(model).set_attn_implementation(attention)
    ids = torch.from_numpy(row.input_ids).long()[None]
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    labels = torch.from_numpy(row.labels[1:]).long()
    taught = labels != IGNORE
    exact = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits[taught].to(exact), labels[taught], reduction="none")


def gradients(model, losses: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    (losses.sum() / len(losses)).backward()
    return {name: weight.grad.clone() for name, weight in lora_parameters(model).items()}


def relative_distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(((a[n] - b[n]).norm() / b[n].norm()).item() for n in b)


def test_one_pack_equals_rows_one_by_one_and_the_models_own_forward(kind, way):
    model, rows = adapted(kind).train(), make_rows()
    packed = pack_losses(model, make_pack(rows), chunk=7)
    ways = {
        "rows one by one": torch.cat([pack_losses(model, make_pack([r]), chunk=7) for r in rows]),
        # (Not its eager attention: that takes the softmax in float32, whatever the model's dtype.)
        "the model's own forward": torch.cat([hf_losses(model, r, "sdpa") for r in rows]),
    }
    ours = gradients(model, packed)
    assert len(ours) > 0
    assert all(g.abs().sum() > 0 for g in ours.values())
    for name, losses in ways.items():
        torch.testing.assert_close(packed, losses, rtol=1e-10, atol=0, msg=name)
        assert relative_distance(ours, gradients(model, losses)) < 1e-10, name


@pytest.mark.parametrize("max_tokens", [1, 45, 80, 4096])
def test_how_a_step_is_cut_changes_no_gradient(kind, max_tokens):
    model, rows = adapted(kind).train(), make_rows()
    assert why_plain(model) is None
    count = sum(r.supervised_tokens for r in rows)
    whole = gradients(model, pack_losses(model, make_pack(rows)))
    model.zero_grad(set_to_none=True)
    for part in pack(rows, max_tokens=max_tokens):
        (pack_losses(model, part).sum() / count).backward()
    cut = {name: weight.grad for name, weight in lora_parameters(model).items()}
    assert relative_distance(cut, whole) < 1e-10


def test_float32_is_within_the_noise_between_eager_and_sdpa(kind, way):
    """Two exact ways in float32 differ by rounding. Ours may differ from either by about as much as they do."""
    model, rows = adapted(kind, torch.float32).train(), make_rows()
    eager = torch.cat([hf_losses(model, r, "eager") for r in rows])
    eager_gradients = gradients(model, eager)
    sdpa = torch.cat([hf_losses(model, r, "sdpa") for r in rows])
    sdpa_gradients = gradients(model, sdpa)
    ours = pack_losses(model, make_pack(rows))
    noise = max((eager - sdpa).abs().max().item(), 1e-6)
    assert (ours - sdpa).abs().max().item() < 3 * noise
    noise = max(relative_distance(eager_gradients, sdpa_gradients), 1e-6)
    assert relative_distance(gradients(model, ours), sdpa_gradients) < 3 * noise


def test_no_row_sees_another(kind, way):
    model = adapted(kind, torch.float32).eval()
    rows = make_rows((20, 20, 19, 12))
    before = hidden_states(model, make_pack(rows)).detach()
    other = make_rows((20, 20, 19, 12), seed=9)
    after = hidden_states(model, make_pack([rows[0], other[1], *rows[2:]])).detach()
    spans = np.cumsum([0, *(r.supervised_tokens for r in rows)])
    for i in (0, 2, 3):
        part = slice(spans[i], spans[i + 1])
        assert torch.equal(before[part], after[part])
    assert not torch.equal(before[spans[1] : spans[2]], after[spans[1] : spans[2]])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(kind, reentrant, way, monkeypatch):
    """The recomputation happens in the backward, after the call that (on the plain way) set our attention."""
    model, packed = adapted(kind).train(), make_packed()
    kept = gradients(model, pack_losses(model, packed))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    layer = causal_lm(model).get_decoder().layers[0]
    own, runs = layer._gradient_checkpointing_func, []
    place = decoder if way == "fast" else plain
    attend = place.packed_attention
    monkeypatch.setattr(place, "packed_attention", lambda *a, **k: (runs.append(1), attend(*a, **k))[1])
    again = gradients(model, pack_losses(model, packed))
    assert len(runs) == 2 * len(causal_lm(model).get_decoder().layers)  # each was computed again
    assert relative_distance(again, kept) < 1e-10
    assert layer._gradient_checkpointing_func is own


def test_the_models_own_attention_is_back_afterwards(kind, monkeypatch):
    take_the_plain_way(monkeypatch)
    model = adapted(kind)
    config = causal_lm(model).get_decoder().config
    for attention in ("eager", "sdpa"):
        causal_lm(model).set_attn_implementation(attention)
        pack_losses(model, make_packed())
        assert config._attn_implementation == attention
    packed = make_packed()
    broken = type(packed)(packed.input_ids + 10_000, *(getattr(packed, f) for f in packed.__slots__[1:]))
    with pytest.raises(IndexError):
        pack_losses(model, broken)
    assert config._attn_implementation == "sdpa"


def test_only_supervised_rows_reach_the_head(kind):
    model, packed = adapted(kind), make_packed()
    hidden = hidden_states(model, packed)
    assert hidden.shape == (packed.supervised_tokens, causal_lm(model).config.hidden_size)


def test_token_losses_build_no_graph_and_equal_pack_losses(kind, way):
    model, packed = adapted(kind).eval(), make_packed()
    losses = token_losses(model, packed)
    assert not losses.requires_grad
    torch.testing.assert_close(losses, pack_losses(model, packed).detach(), rtol=1e-12, atol=0)


def test_the_adapter_switched_off_is_the_base(kind, way):
    model, packed = adapted(kind).eval(), make_packed()
    with model.disable_adapter():
        off = token_losses(model, packed)
    base = token_losses(tiny_model(kind, torch.float64), packed)
    assert torch.equal(off, base)
    assert not torch.allclose(token_losses(model, packed), base, atol=1e-3)


def test_trained_embedding_and_head(kind, way):
    """modules_to_save: the head's copy is used and gets its gradient, as in the model's own forward."""
    model, rows = adapted(kind, modules_to_save=("embed_tokens", "lm_head")).train(), make_rows()
    ours = gradients(model, pack_losses(model, make_pack(rows)))
    own = gradients(model, torch.cat([hf_losses(model, r, "sdpa") for r in rows]))
    assert any("lm_head" in n for n in ours)
    assert relative_distance(ours, own) < 1e-10


@pytest.mark.parametrize("system", [0, 20])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_shared_prefixes_have_the_gradients_of_separate_rows(kind, system, checkpointing, way):
    """A system prompt once, a question with several answers once; Gemma's window of 16 ends inside them."""
    model, rows = adapted(kind).train(), make_questions(system=system)
    if checkpointing:
        decoder.checkpoint_activations(model)
    (shared,) = pack(rows, max_tokens=4096, shared_prefixes=True)
    assert shared.tokens == sum(len(r) for r in rows) - 2 * 21 - 1 * 23 - 5 * system
    alone = [make_pack([r]) for r in rows]
    losses = {id_: pack_losses(model, p).sum().item() for p in alone for id_ in p.example_ids}
    ours = pack_losses(model, shared)
    assert ours.sum().item() == pytest.approx(sum(losses.values()), rel=1e-12)
    own = torch.cat([pack_losses(model, p) for p in alone])
    assert relative_distance(gradients(model, ours), gradients(model, own)) < 1e-10


# ---- adapters of every kind ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "fast"),
    [
        pytest.param(
            {"rank_pattern": {"q_proj": 2, "up_proj": 7}, "alpha_pattern": {"v_proj": 3}}, True, id="patterns"
        ),
        pytest.param({"target_modules": ["k_proj", "v_proj", "down_proj"]}, True, id="some modules"),
        pytest.param({"layers_to_transform": [1]}, True, id="one layer"),
        pytest.param({"use_rslora": True}, True, id="rslora"),
        pytest.param({"modules_to_save": ["q_proj"], "target_modules": ["v_proj"]}, False, id="a whole projection"),
        pytest.param({"use_dora": True}, False, id="dora"),
        pytest.param({"lora_bias": True}, False, id="lora_bias"),
        pytest.param({"trainable_token_indices": [3, 65]}, None, id="trained tokens"),
    ],
)
def test_every_adapter_of_peft_has_the_gradients_of_transformers(kind, settings, fast):
    """What the fast path has no word for takes the plain way; the gradients are the same either way."""
    common = {"r": 4, "lora_alpha": 8, "target_modules": sorted(LINEAR), "task_type": "CAUSAL_LM"}
    model = get_peft_model(tiny_model(kind, torch.float64), LoraConfig(**common | settings)).double()
    model, rows = awaken(model).train(), make_rows()
    if fast is None and causal_lm(model).config.tie_word_embeddings:
        pytest.skip("trained tokens of a tied head are not supported yet")
    assert (why_plain(model) is None) is (fast is not False)
    ours = gradients(model, pack_losses(model, make_pack(rows)))
    own = gradients(model, torch.cat([hf_losses(model, r, "sdpa") for r in rows]))
    assert relative_distance(ours, own) < 1e-10


def test_two_adapters_at_once_and_either_alone(kind):
    model, rows = adapted(kind), make_rows()
    other = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    model.add_adapter("second", other)
    model = model.double().eval()
    for active in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(active)
        assert why_plain(model) is None
        own = torch.cat([hf_losses(model, r, "sdpa") for r in rows])
        torch.testing.assert_close(token_losses(model, make_pack(rows)), own.detach(), rtol=1e-10, atol=0)


def test_a_merged_adapter_takes_the_plain_way_and_comes_back(kind):
    model, packed = adapted(kind).eval(), make_packed()
    before = token_losses(model, packed)
    model.merge_adapter()
    assert "merged" in why_plain(model)
    torch.testing.assert_close(token_losses(model, packed), before, rtol=1e-9, atol=0)
    model.unmerge_adapter()
    assert why_plain(model) is None
    torch.testing.assert_close(token_losses(model, packed), before, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: setattr(m.config, "hidden_act", "relu"), "activation"),
        (lambda m: m.model.layers[1].input_layernorm.requires_grad_(True), "input_layernorm"),
        (lambda m: setattr(m.model.layers[0].self_attn, "is_causal", False), "self_attn"),
        (lambda m: setattr(m.model.layers[0].mlp, "up_proj", torch.nn.Bilinear(2, 2, 2)), "Bilinear"),
        (lambda m: setattr(m, "__class__", type("OtherForCausalLM", (type(m),), {})), "OtherForCausalLM"),
    ],
)
def test_what_is_not_known_is_named(change, says):
    model = tiny_model("llama")
    assert why_plain(model) is None
    change(model)
    assert says in why_plain(model)


def test_dropout_has_pefts_distribution(kind, monkeypatch):
    """Mean and spread of the losses over many masks, by the fast path and by PEFT's own layers."""
    model, rows = adapted(kind, torch.float32, lora_dropout=0.4).train(), make_rows((12, 9))
    packed = make_pack(rows)
    assert why_plain(model) is None
    with torch.no_grad():
        ours = torch.stack([pack_losses(model, packed) for _ in range(400)])
        body = [plain.hidden_states_plain(causal_lm(model), packed) for _ in range(400)]
        head = causal_lm(model).get_output_embeddings().weight
        theirs = torch.stack([decoder.cross_entropy(h, head, torch.from_numpy(packed.targets).long()) for h in body])
    spread = theirs.std(0)
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 5 * spread * (2 / 400) ** 0.5).all()
    assert (ours.std(0) / spread - 1).abs().max() < 0.25
    assert (spread > 1e-3).all()


def test_dropout_is_off_in_evaluation_and_the_same_after_the_same_seed(kind):
    model, packed = adapted(kind, lora_dropout=0.4), make_packed()
    exact = token_losses(adapted(kind).eval(), packed)
    torch.testing.assert_close(token_losses(model.eval(), packed), exact, rtol=1e-12, atol=0)
    model.train()
    torch.manual_seed(3)
    first = gradients(model, pack_losses(model, packed))
    decoder.checkpoint_activations(model)  # the masks are made a third time
    torch.manual_seed(3)
    assert relative_distance(gradients(model, pack_losses(model, packed)), first) < 1e-10
    assert relative_distance(gradients(model, pack_losses(model, packed)), first) > 1e-3


# ---- weights in place ------------------------------------------------------------------------------------------------


def test_joined_weights_are_views_and_nothing_of_the_model_changes(kind, tmp_path):
    model, before = tiny_model(kind), tiny_model(kind)
    token_losses(model, make_packed())
    layer = model.get_decoder().layers[0]
    for group in (
        [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj],
        [layer.mlp.gate_proj, layer.mlp.up_proj],
    ):
        storages = {m.weight.untyped_storage().data_ptr() for m in group}
        assert len(storages) == 1
        assert group[0].weight.untyped_storage().nbytes() == sum(m.weight.nbytes for m in group)  # no second copy
    ours, theirs = model.state_dict(), before.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    model.save_pretrained(tmp_path)
    assert all(torch.equal(v, ours[k]) for k, v in load_file(tmp_path / "model.safetensors").items())


def test_a_change_of_a_weight_counts_at_the_next_forward(kind):
    """In place, by a new tensor, or by a move to another dtype: each is read anew."""
    model, packed = tiny_model(kind, torch.float64), make_packed()
    token_losses(model, packed)
    k_proj = model.get_decoder().layers[0].self_attn.k_proj
    for change in (
        lambda: k_proj.weight.data.mul_(1.5),
        lambda: setattr(k_proj.weight, "data", k_proj.weight.data * 0.5),
        lambda: model.float().double(),
    ):
        change()
        own = torch.cat([hf_losses(model, r, "sdpa") for r in make_rows()])
        torch.testing.assert_close(token_losses(model, packed), own, rtol=1e-10, atol=0)


def test_an_adapter_put_on_and_taken_off_after_the_weights_were_joined(kind):
    base, packed = tiny_model(kind, torch.float64), make_packed()
    bare = token_losses(base, packed)
    model = awaken(inject_lora(base, r=4, lora_alpha=8, seed=1)).eval()
    torch.testing.assert_close(
        token_losses(model, packed), token_losses(adapted(kind).eval(), packed), rtol=1e-12, atol=0
    )
    assert torch.equal(token_losses(remove_lora(model), packed), bare)


def test_bfloat16_base_with_float32_adapter(kind):
    """The rounding of bfloat16 and no more: as far from the exact losses as transformers' own forward is."""
    model, rows = adapted(kind, torch.bfloat16).train(), make_rows()
    exact = adapted(kind, torch.float64)
    exact.load_state_dict(model.state_dict())
    truth = token_losses(exact, make_pack(rows))
    losses = pack_losses(model, make_pack(rows))
    assert losses.dtype == torch.float32
    assert {g.dtype for g in gradients(model, losses).values()} == {torch.float32}
    theirs = torch.cat([hf_losses(model, r, "sdpa") for r in rows])
    assert (losses - truth).abs().mean() < 1.5 * (theirs - truth).abs().mean()
