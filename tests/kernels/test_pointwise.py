"""Norm, rotation and gate beside their plain twins: forward, backward, gradcheck."""

from __future__ import annotations

import pytest
import torch

from lora_cmqa.kernels.mlp import gated, gated_plain
from lora_cmqa.kernels.norm import rms_norm, rms_norm_plain
from lora_cmqa.kernels.rope import rotate, rotate_plain


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def angles(tokens: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    turned = draw(tokens, half, seed=9)
    return turned.cos(), turned.sin()


CASES = {
    "norm, Llama": (lambda x: rms_norm(x, W, 1e-6), lambda x: rms_norm_plain(x, W, 1e-6), (5, 8)),
    "norm, Gemma": (lambda x: rms_norm(x, W, 1e-6, 1.0), lambda x: rms_norm_plain(x, W, 1e-6, 1.0), (5, 8)),
    "norm of heads": (lambda x: rms_norm(x, H, 1e-3), lambda x: rms_norm_plain(x, H, 1e-3), (5, 3, 8)),
    "rotation": (lambda x: rotate(x, *angles(5, 4)), lambda x: rotate_plain(x, *angles(5, 4)), (5, 3, 8)),
    "SwiGLU": (lambda x: gated(x, "silu"), lambda x: gated_plain(x, "silu"), (5, 8)),
    "GeGLU": (lambda x: gated(x, "gelu_tanh"), lambda x: gated_plain(x, "gelu_tanh"), (5, 8)),
}
W, H = draw(8, seed=1), draw(3, 8, seed=2)


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def test_fast_equals_plain_forward_and_backward(case):
    fast, plain, shape = case
    x, dy = draw(*shape).requires_grad_(), None
    got, expected = fast(x), plain(x)
    dy = draw(*got.shape, seed=4)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    gradients = [torch.autograd.grad(y, x, dy)[0] for y in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


def test_gradcheck(case):
    fast, _, shape = case
    assert torch.autograd.gradcheck(fast, draw(*shape).requires_grad_())


def test_a_part_of_a_larger_tensor_is_read_and_not_written(case):
    """q and k are columns of the joined product: not contiguous, and used by others."""
    fast, plain, shape = case
    whole = draw(shape[0], 2, *shape[1:]).requires_grad_()
    kept, part = whole.detach().clone(), whole[:, 1]
    dy = draw(*fast(part).shape, seed=4)
    ours, theirs = (torch.autograd.grad(f(part), whole, dy, retain_graph=True)[0] for f in (fast, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert torch.equal(whole.detach(), kept)


@pytest.mark.parametrize("rows_in_a_piece", [1, 3, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_without_a_graph_the_bits_are_the_same_and_x_stays(case, dtype, rows_in_a_piece, monkeypatch):
    monkeypatch.setattr("lora_cmqa.kernels.tiles.rows_per_tile", lambda *_: rows_in_a_piece)
    fast, _, shape = case
    x = draw(*shape, dtype=dtype)
    kept, narrow = x.clone(), {n: globals()[n].to(dtype) for n in "WH"}
    monkeypatch.setitem(globals(), "W", narrow["W"])
    monkeypatch.setitem(globals(), "H", narrow["H"])
    monkeypatch.setitem(globals(), "angles", lambda *a, of=angles: tuple(t.to(dtype) for t in of(*a)))
    with_graph = fast(x.clone().requires_grad_())
    assert with_graph.requires_grad
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            assert torch.equal(fast(x), with_graph.detach())
    assert torch.equal(x, kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_types_stay_and_are_near_the_exact_answer(dtype):
    x, near = draw(6, 8, dtype=dtype), 0.02 if dtype == torch.bfloat16 else 1e-5
    for fast, plain in ((lambda x: rms_norm(x, W.to(x.dtype), 1e-6), lambda x: rms_norm_plain(x, W.to(dtype), 1e-6)),):
        assert fast(x).dtype == dtype
        torch.testing.assert_close(fast(x).double(), plain(x.double()), rtol=near, atol=near)
    large = torch.full((2, 8), 3e4, dtype=dtype)  # its square is beyond float16 and rough in bfloat16
    torch.testing.assert_close(rms_norm(large, torch.ones(8), 1e-6).float(), torch.ones(2, 8), rtol=0.01, atol=0)
