"""linear_cross_entropy beside its plain twin; it never holds all logits."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_cmqa.kernels import head
from lora_cmqa.kernels.head import TrainedRows, linear_cross_entropy, linear_cross_entropy_plain

ROWS, WIDTH, VOCABULARY = 37, 12, 50


@pytest.fixture(params=[8192, 16, 1], ids=["whole rows", "pieces of 16", "column by column"])
def columns(request, monkeypatch):
    """How much of the vocabulary a piece of logits holds."""
    monkeypatch.setattr(head, "_COLUMNS", request.param)


def inputs(dtype: torch.dtype = torch.float64, rows: int = ROWS, vocabulary: int = VOCABULARY):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, WIDTH, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype), targets


def forward_backward(function, hidden, weight, targets, **settings):
    losses = function(hidden, weight, targets, **settings)
    by_row = torch.linspace(-1, 2, len(losses), dtype=losses.dtype)  # each row's gradient has its own factor
    return losses.detach(), torch.autograd.grad(losses, hidden, by_row)[0]


@pytest.mark.usefixtures("columns")
@pytest.mark.parametrize("chunk", [1, 7, 16, 37, 1000])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (None, 0.0625), (3.0, 1.0), (3.0, 0.5)])
def test_fast_equals_plain_forward_and_backward(chunk, softcap, scale):
    fast = forward_backward(linear_cross_entropy, *inputs(), chunk=chunk, softcap=softcap, scale=scale)
    plain = forward_backward(linear_cross_entropy_plain, *inputs(), softcap=softcap, scale=scale)
    torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-13)


@pytest.mark.usefixtures("columns")
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (2.0, 0.7)])
def test_gradcheck(softcap, scale):
    hidden, weight, targets = inputs(rows=5)
    assert torch.autograd.gradcheck(
        lambda h: linear_cross_entropy(h, weight, targets, chunk=2, softcap=softcap, scale=scale), (hidden,)
    )


def test_a_trained_head_gets_its_gradient():
    hidden, weight, targets = inputs()
    weight.requires_grad_()
    losses = linear_cross_entropy(hidden, weight, targets, chunk=8)
    for gradient in torch.autograd.grad(losses.sum(), (hidden, weight)):
        assert gradient.abs().sum() > 0


@pytest.mark.usefixtures("columns")
@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (3.0, 0.5)])
@pytest.mark.parametrize("reads", ["hidden and rows", "rows alone"])
def test_trained_rows_fast_equals_plain(chunk, softcap, scale, reads):
    """Rows 3 and 41 trained; some targets are they."""
    both = []
    for function, more in ((linear_cross_entropy, {"chunk": chunk}), (linear_cross_entropy_plain, {})):
        hidden, weight, targets = inputs()
        targets[::5], targets[::7] = 41, 3
        values = torch.linspace(-1, 1, 2 * WIDTH, dtype=hidden.dtype).view(2, WIDTH).requires_grad_()
        rows = TrainedRows(torch.tensor([41, 3]), values)
        hidden.requires_grad_(reads == "hidden and rows")
        losses = function(hidden, weight, targets, softcap=softcap, scale=scale, rows=rows, **more)
        wanted = (values, hidden) if reads == "hidden and rows" else (values,)
        gradients = torch.autograd.grad(losses, wanted, torch.linspace(-1, 2, ROWS, dtype=losses.dtype))
        both.append((losses.detach(), *gradients))
    torch.testing.assert_close(both[0], both[1], rtol=1e-10, atol=1e-13)


@pytest.mark.usefixtures("columns")
def test_trained_rows_gradcheck():
    hidden, weight, targets = inputs(rows=5)
    values = torch.ones(1, WIDTH, dtype=hidden.dtype, requires_grad=True)

    def losses(h, v):
        return linear_cross_entropy(h, weight, targets, chunk=2, rows=TrainedRows(targets[:1], v))

    assert torch.autograd.gradcheck(losses, (hidden, values))


@pytest.mark.usefixtures("columns")
def test_softmax_is_float32_for_bfloat16_input():
    hidden, weight, targets = inputs(torch.bfloat16)
    losses = linear_cross_entropy(hidden, weight, targets, chunk=8)
    assert losses.dtype == torch.float32
    logits = torch.nn.functional.linear(hidden, weight).float()  # the logits themselves are bfloat16 products
    torch.testing.assert_close(
        losses, torch.nn.functional.cross_entropy(logits, targets, reduction="none"), rtol=1e-5, atol=1e-5
    )


@pytest.mark.usefixtures("columns")
def test_large_logits_stay_finite():
    hidden, weight, targets = inputs(torch.float32)
    losses = linear_cross_entropy(hidden * 1e4, weight, targets, chunk=8)
    (gradient,) = torch.autograd.grad(losses.sum(), hidden)
    assert torch.isfinite(losses).all()
    assert torch.isfinite(gradient).all()


def test_no_row_gives_no_loss():
    hidden, weight, targets = inputs(rows=0)
    losses = linear_cross_entropy(hidden, weight, targets, chunk=8)
    losses.sum().backward()
    assert losses.shape == (0,)


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                LargestTensor.elements = max(LargestTensor.elements, tensor.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "two rows trained"])
def test_never_holds_all_logits(dtype, softcap, trained):
    rows, vocabulary, chunk = 200, 3000, 16
    hidden, weight, targets = inputs(dtype, rows, vocabulary)
    LargestTensor.elements = 0
    with LargestTensor():
        values = weight[:2].float().requires_grad_()
        some = TrainedRows(torch.arange(2), values) if trained else None
        linear_cross_entropy(hidden, weight, targets, chunk=chunk, softcap=softcap, rows=some).sum().backward()
    assert (values.grad is not None) == trained
    assert 0 < LargestTensor.elements <= max(chunk * vocabulary, weight.numel()) < rows * vocabulary


def test_a_large_vocabulary_is_summed_accurately():
    """torch's own float32 log_softmax on a CPU adds the 262,144 terms one after another and is off by about 1e-5, all
    in one direction; in a model's gradients that is 1e-4 (docs/decisions)."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator) for n in (4, 262_144))
    targets = torch.arange(4)
    exact = linear_cross_entropy(hidden.double(), weight.double(), targets)
    assert (linear_cross_entropy(hidden, weight, targets) - exact).abs().max() < 4e-6
