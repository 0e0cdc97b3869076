"""One forward over a pack equals the rows one by one, and transformers' own forward of each row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lora_cmqa.core import IGNORE
from lora_cmqa.data.pack import make_pack, pack
from lora_cmqa.lora.decoder import causal_lm, hidden_states, pack_losses, token_losses
from lora_cmqa.lora.inject import lora_parameters

from .conftest import adapted, make_packed, make_rows


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


def test_one_pack_equals_rows_one_by_one_and_the_models_own_forward(kind):
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
    count = sum(r.supervised_tokens for r in rows)
    whole = gradients(model, pack_losses(model, make_pack(rows)))
    model.zero_grad(set_to_none=True)
    for part in pack(rows, max_tokens=max_tokens):
        (pack_losses(model, part).sum() / count).backward()
    cut = {name: weight.grad for name, weight in lora_parameters(model).items()}
    assert relative_distance(cut, whole) < 1e-10


def test_float32_is_within_the_noise_between_eager_and_sdpa(kind):
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


def test_no_row_sees_another(kind):
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
def test_gradient_checkpointing_changes_nothing(kind, reentrant):
    """The recomputation happens in the backward, after the call that set our attention has returned."""
    model, packed = adapted(kind).train(), make_packed()
    plain = gradients(model, pack_losses(model, packed))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    layer = causal_lm(model).get_decoder().layers[0]
    own, runs = layer._gradient_checkpointing_func, []
    handle = layer.self_attn.register_forward_hook(lambda *_: runs.append(1))
    again = gradients(model, pack_losses(model, packed))
    handle.remove()
    assert len(runs) == 2  # it was computed again
    assert relative_distance(again, plain) < 1e-10
    assert layer._gradient_checkpointing_func is own


def test_the_models_own_attention_is_back_afterwards(kind):
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


def test_token_losses_build_no_graph_and_equal_pack_losses(kind):
    model, packed = adapted(kind).eval(), make_packed()
    losses = token_losses(model, packed)
    assert not losses.requires_grad
    torch.testing.assert_close(losses, pack_losses(model, packed).detach(), rtol=1e-12, atol=0)


def test_the_adapter_switched_off_is_the_base(kind):
    from lora_cmqa.models.tiny import tiny_model

    model, packed = adapted(kind).eval(), make_packed()
    with model.disable_adapter():
        off = token_losses(model, packed)
    base = token_losses(tiny_model(kind, torch.float64), packed)
    assert torch.equal(off, base)
    assert not torch.allclose(token_losses(model, packed), base, atol=1e-3)


def test_trained_embedding_and_head(kind):
    """modules_to_save: the head's copy is used and gets its gradient, as in the model's own forward."""
    model, rows = adapted(kind, modules_to_save=("embed_tokens", "lm_head")).train(), make_rows()
    ours = gradients(model, pack_losses(model, make_pack(rows)))
    own = gradients(model, torch.cat([hf_losses(model, r, "sdpa") for r in rows]))
    assert any("lm_head" in n for n in ours)
    assert relative_distance(ours, own) < 1e-10
