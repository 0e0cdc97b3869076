"""packed_attention beside its plain twin, and both beside the rows taken one by one."""

from __future__ import annotations

import pytest
import torch

from lora_cmqa.kernels import attention
from lora_cmqa.kernels.attention import _groups, packed_attention, packed_attention_plain

ROWS = [
    pytest.param((5,), id="one row"),
    pytest.param((7, 7, 7), id="even"),
    pytest.param((9, 5, 4, 3), id="uneven"),
    pytest.param((3, 9, 4), id="not sorted"),
    pytest.param((1, 1, 6, 1), id="rows of one token"),
    pytest.param((24, 23, 22, 22), id="one group, padded"),
]


def qkv(tokens: int, heads: int, kv_heads: int, dim: int = 8, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(tokens * 100 + heads * 10 + kv_heads)
    return tuple(
        torch.randn(tokens, n, dim, generator=generator, dtype=dtype).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    )


def forward_backward(attend, tensors, *args, **settings):
    out = attend(*tensors, *args, **settings)
    seed = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out.detach(), torch.autograd.grad(out, tensors, seed)


@pytest.fixture(params=["products", "sdpa"])
def way(request, monkeypatch) -> str:
    """Short rows on a CPU go by batched products, everything else by torch's own attention."""
    if request.param == "sdpa":
        monkeypatch.setattr(attention, "_PRODUCTS_WIDTH", 0)
    return request.param


@pytest.mark.parametrize("row_lengths", ROWS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 1, 4, 23, 64])
def test_fast_equals_plain_forward_and_backward(row_lengths, heads, kv_heads, window, way):
    tensors = qkv(sum(row_lengths), heads, kv_heads)
    fast = forward_backward(packed_attention, tensors, row_lengths, scale=0.3, window=window)
    plain = forward_backward(packed_attention_plain, tensors, row_lengths, scale=0.3, window=window)
    torch.testing.assert_close(fast[0], plain[0], rtol=1e-10, atol=1e-12)
    for a, b in zip(fast[1], plain[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("window", [None, 4])
def test_softcap_equals_plain(window):
    tensors = qkv(12, 4, 2)
    settings = {"scale": 2.0, "softcap": 1.5, "window": window}
    fast = forward_backward(packed_attention, tensors, (7, 5), **settings)
    plain = forward_backward(packed_attention_plain, tensors, (7, 5), **settings)
    torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-12)
    uncapped = packed_attention(*tensors, (7, 5), scale=2.0, window=window)
    assert not torch.allclose(fast[0], uncapped, atol=1e-3)


@pytest.mark.parametrize("window", [None, 4])
def test_packed_rows_equal_single_rows_of_torch(window):
    """The outside oracle: torch's own attention on each row alone."""
    row_lengths = (9, 9, 5, 1)
    q, k, v = qkv(sum(row_lengths), 4, 2)
    alone, start = [], 0
    for n in row_lengths:
        one = [x[start : start + n].transpose(0, 1)[None] for x in (q, k, v)]
        i = torch.arange(n)
        seen = (i[None] <= i[:, None]) & (i[:, None] - i[None] < (window or n))
        out = torch.nn.functional.scaled_dot_product_attention(*one, attn_mask=seen, scale=0.3, enable_gqa=True)
        alone.append(out[0].transpose(0, 1))
        start += n
    torch.testing.assert_close(
        packed_attention(q, k, v, row_lengths, scale=0.3, window=window), torch.cat(alone), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize(("row_lengths", "window"), [((4, 2, 1), None), ((5, 4), 3)])
def test_gradcheck(row_lengths, window, way):
    tensors = qkv(sum(row_lengths), 2, 1, dim=4)
    assert torch.autograd.gradcheck(
        lambda q, k, v: packed_attention(q, k, v, row_lengths, scale=0.5, window=window), tensors
    )


@pytest.mark.parametrize("attend", [packed_attention, packed_attention_plain])
def test_no_row_sees_another(attend):
    row_lengths = (8, 8, 7)
    q, k, v = (x.detach() for x in qkv(23, 4, 2, dtype=torch.float32))
    before = attend(q, k, v, row_lengths, scale=0.3)
    for x in (q, k, v):
        x[8:16] += 1.0
    after = attend(q, k, v, row_lengths, scale=0.3)
    assert torch.equal(before[:8], after[:8])
    assert torch.equal(before[16:], after[16:])
    assert not torch.equal(before[8:16], after[8:16])


def test_scores_of_bfloat16_are_not_rounded_to_it():
    q, k = (x.detach().bfloat16() for x in qkv(64, 8, 8, dim=64)[:2])
    exact = torch.bmm(q.double(), k.double().transpose(1, 2))
    assert (attention._scores(q, k) - exact).abs().max() < 1e-3 < (torch.bmm(q, k.transpose(1, 2)) - exact).abs().max()


def test_bfloat16_keeps_its_dtype_and_stays_near_the_exact_answer(way):
    exact = qkv(30, 4, 1)
    half = tuple(x.detach().bfloat16() for x in exact)
    out = packed_attention(*half, (16, 14), scale=0.3)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), packed_attention(*exact, (16, 14), scale=0.3), rtol=0, atol=0.03)


def test_groups_hold_rows_of_like_length_and_lose_none():
    assert _groups((100, 95, 90, 60, 58, 10)) == [[100, 95, 90], [60, 58], [10]]
    lengths = [37, 36, 31, 30, 12, 12, 11, 3, 2, 1, 1]
    groups = _groups(lengths)
    assert [n for g in groups for n in g] == lengths
    assert all(max(g) - min(g) <= 0.125 * max(g) for g in groups)


@pytest.mark.parametrize("lengths", [(9, 8, 8), (9, 5, 5, 3)])
def test_rows_of_unlike_length_keep_no_second_copy_of_their_input(lengths):
    q, k, v = (torch.randn(sum(lengths), 2, 4, requires_grad=True) for _ in range(3))
    kept = set()

    def remember(tensor):
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        packed_attention(q, k, v, lengths, scale=0.5)
    assert kept
    assert not kept & {x.untyped_storage().data_ptr() for x in (q, k, v)}


# ---- parts that continue others --------------------------------------------------------------------------------------

TREES = [
    pytest.param((5, 3, 2), (-1, 0, 0), id="a question, two answers"),
    pytest.param((4, 6, 3, 3, 2, 7), (-1, 0, 1, 1, 0, -1), id="a system prompt, questions, answers, and a row"),
    pytest.param((20, 9, 8, 9, 1), (-1, 0, 0, 0, 2), id="like lengths side by side"),
]


@pytest.mark.parametrize(("lengths", "parents"), TREES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 1, 4, 23])
def test_a_tree_fast_and_plain(lengths, parents, heads, kv_heads, window, way):
    tensors = qkv(sum(lengths), heads, kv_heads)
    settings = {"scale": 0.3, "window": window, "parents": parents}
    fast = forward_backward(packed_attention, tensors, lengths, **settings)
    plain = forward_backward(packed_attention_plain, tensors, lengths, **settings)
    torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("lengths", "parents"), TREES)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("attend", [packed_attention, packed_attention_plain])
def test_a_part_sees_its_ancestors_and_itself_as_one_row(lengths, parents, window, attend):
    q, k, v = (x.detach() for x in qkv(sum(lengths), 4, 2))
    out = attend(q, k, v, lengths, scale=0.3, window=window, parents=parents)
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    for part, (end, length) in enumerate(zip(ends, lengths, strict=True)):
        line = [part]
        while parents[line[0]] >= 0:
            line.insert(0, parents[line[0]])
        places = [t for i in line for t in range(ends[i] - lengths[i], ends[i])]
        alone = attend(q[places], k[places], v[places], (len(places),), scale=0.3, window=window)
        torch.testing.assert_close(out[end - length : end], alone[-length:], rtol=1e-10, atol=1e-12)


def test_a_tree_evaluated_first_is_trained_on_after():
    """The layout of a pack is kept between calls, so also from one in inference mode."""
    q, k, v = (torch.randn(9, 2, 8, requires_grad=True) for _ in range(3))
    lengths, parents = (3, 2, 4), (-1, 0, 0)
    with torch.inference_mode():
        before = packed_attention(q, k, v, lengths, scale=0.3, parents=parents)
    after = packed_attention(q, k, v, lengths, scale=0.3, parents=parents)
    after.sum().backward()
    assert torch.equal(before, after)
    assert q.grad is not None
