"""Joined projections with LoRA beside PEFT's arithmetic one by one; dropout by a seed."""

from __future__ import annotations

import pytest
import torch

from lora_cmqa.kernels.lora_linear import LowRank, _dropped, lora_linear, lora_linear_plain

TOKENS, INPUT, OUTPUTS = 7, 6, (5, 3, 4)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(which: tuple[int, ...], ranks=(2, 1, 3), dropout: float = 0.0):
    """x, weight, bias, and adapters on the projections `which` of three that read x."""
    bounds = [0, 5, 8, 12]
    adapters = [
        LowRank(
            draw(ranks[i], INPUT, seed=10 + i).requires_grad_(),
            draw(OUTPUTS[i], ranks[i], seed=20 + i).requires_grad_(),
            scale=0.5 + i,
            start=bounds[i],
            stop=bounds[i + 1],
            dropout=dropout,
        )
        for i in which
    ]
    return draw(TOKENS, INPUT).requires_grad_(), draw(12, INPUT, seed=1), draw(12, seed=2), adapters


def gradients(function, x, weight, bias, adapters):
    y = function(x, weight, bias, adapters)
    wanted = [x, *(t for adapter in adapters for t in adapter[:2])]
    return y.detach(), torch.autograd.grad(y, wanted, draw(*y.shape, seed=5))


@pytest.mark.parametrize("which", [(), (0,), (2,), (0, 2), (0, 1, 2), (0, 0, 1)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_fast_equals_plain_forward_and_backward(which, has_bias):
    x, weight, bias, adapters = case(which)
    arguments = (x, weight, bias if has_bias else None, adapters)
    torch.testing.assert_close(gradients(lora_linear, *arguments), gradients(lora_linear_plain, *arguments))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck(dropout):
    """With dropout: the backward's masks are the forward's."""
    x, weight, bias, adapters = case((0, 1, 2), dropout=dropout)

    def function(x, *tensors):
        torch.manual_seed(8)
        given = [a._replace(a=tensors[2 * i], b=tensors[2 * i + 1]) for i, a in enumerate(adapters)]
        return lora_linear(x, weight, bias, given)

    assert torch.autograd.gradcheck(function, (x, *(t for adapter in adapters for t in adapter[:2])))


def test_no_gradient_is_made_for_an_input_that_needs_none():
    x, weight, bias, adapters = case((0, 1))
    y = lora_linear(x.detach(), weight, bias, adapters)
    y.sum().backward()
    assert x.grad is None
    assert all(t.grad.any() for adapter in adapters for t in adapter[:2])


def test_adapters_keep_their_dtype_over_a_bfloat16_base():
    x, weight, bias, adapters = case((0, 2))
    half = [t.detach().bfloat16() for t in (x, weight, bias)]
    narrow = [
        a._replace(a=a.a.detach().float().requires_grad_(), b=a.b.detach().float().requires_grad_()) for a in adapters
    ]
    y = lora_linear(*half, narrow)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert {t.grad.dtype for a in narrow for t in a[:2]} == {torch.float32}
    torch.testing.assert_close(y.double(), lora_linear(x, weight, bias, adapters), rtol=0.05, atol=0.2)


def test_each_projection_drops_on_its_own_and_the_seed_alone_decides():
    x = torch.ones(200, 50, dtype=torch.float64)
    first, again, other = (_dropped(x, 0.3, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert set(first.unique().tolist()) == {0.0, 1 / 0.7}
    assert (first == 0).double().mean().item() == pytest.approx(0.3, abs=0.02)
    both = ((first == 0) & (other == 0)).double().mean().item()
    assert both == pytest.approx(0.09, abs=0.015)
