"""What stands between the products of a step: as the plain twins, the same bits in any company, on any processor."""

import pytest
import torch

from lora_cmqa.kernels import few_rows, native
from lora_cmqa.kernels.few_rows import Places, added, attended, attended_plain, gated, normed, turned, why_not
from lora_cmqa.kernels.mlp import gated_plain
from lora_cmqa.kernels.norm import rms_norm_plain
from lora_cmqa.kernels.rope import rotate_plain

pytestmark = pytest.mark.skipif(
    native.missing is not None, reason=f"the compiled kernels are not here: {native.missing}"
)
DTYPES = [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)]


def drawn(*shape: int, seed: int = 0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(got, want, allowed):
    """`want` in float64."""
    assert got.shape == want.shape
    assert float((got.double() - want).norm() / want.norm()) < allowed


@pytest.fixture(params=[0, 1, 2])
def level(request):
    """Each instruction set that this processor has."""
    if native.rows.use(request.param) < request.param:
        native.rows.use(2)
        pytest.skip(f"this processor has no level {request.param}")
    yield request.param
    native.rows.use(2)


@pytest.mark.parametrize(("dtype", "allowed"), DTYPES)
@pytest.mark.parametrize("width", [16, 70, 640, 2049])
def test_norm_and_sum(level, dtype, allowed, width):
    x, y, gain = drawn(9, width, dtype=dtype), drawn(9, width, seed=1, dtype=dtype) * 3, drawn(width, seed=2)
    want = rms_norm_plain(y.double(), gain.double(), 1e-6)
    near(normed(y, gain, 1e-6), want, allowed)
    near(added(x, y, gain, 1e-6), x.double() + want, allowed)


@pytest.mark.parametrize(("dtype", "allowed"), DTYPES)
@pytest.mark.parametrize("dim", [8, 20, 64, 256])
def test_heads_are_normed_and_turned_where_they_lie(level, dtype, allowed, dim):
    qkv, gain, angle = drawn(5, 7, dim, dtype=dtype), drawn(6, dim, seed=1), drawn(5, dim // 2, seed=2)
    angles = angle.cos().to(dtype), angle.sin().to(dtype)
    exact = angles[0].double(), angles[1].double()
    some = qkv[:, :6]
    near(turned(some, None, 0.0, angles), rotate_plain(some.double(), *exact), allowed)
    normed_heads = rms_norm_plain(some.double(), gain.double(), 1e-6)
    near(turned(some, gain, 1e-6, angles), rotate_plain(normed_heads, *exact), allowed)
    wide = torch.cat(angles, -1)  # as a model gives them: halves of one row
    got = turned(some, gain, 1e-6, (wide[:, : dim // 2], wide[:, dim // 2 :]))
    assert torch.equal(got, turned(some, gain, 1e-6, angles))


@pytest.mark.parametrize(("dtype", "allowed"), DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("inner", [16, 50, 2048])
def test_gate(level, dtype, allowed, kind, inner):
    x = drawn(7, 2 * inner, dtype=dtype) * 4
    near(gated(x, kind), gated_plain(x.double(), kind), allowed)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_a_gate_far_out_is_the_value_or_nothing(level, kind):
    far = torch.tensor([[0.0, 1e4, -1e4, 30.0, -30.0, torch.inf, torch.nan, 1e-30, *[1.0] * 8]])
    got = gated(far, kind)[0]
    torch.testing.assert_close(got, gated_plain(far, kind)[0], rtol=1e-5, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("dtype", "allowed"), DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 1, 256), (6, 2, 20), (14, 2, 64), (3, 3, 8)])
@pytest.mark.parametrize("window", [None, 1, 17])
def test_attention(level, dtype, allowed, heads, kv_heads, dim, window, threads):
    keys, values = drawn(6, kv_heads, 90, dim, dtype=dtype), drawn(6, kv_heads, 90, dim, seed=1, dtype=dtype)
    places = Places([4, 0, 5, 2], [70, 0, 16, 89])
    q, kv = drawn(5, heads, dim, seed=2, dtype=dtype) * 3, drawn(5, 2 * kv_heads, dim, seed=3, dtype=dtype)
    k, v = kv[:, :kv_heads], kv[:, kv_heads:]
    before, was = (keys.clone(), values.clone()), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = attended(q, k, v, keys, values, places, dim**-0.5, window)
        alone = [
            attended(
                q[i : i + 1],
                k[i : i + 1],
                v[i : i + 1],
                *(t.clone() for t in before),
                Places([s], [p]),
                dim**-0.5,
                window,
            )
            for i, (s, p) in enumerate(zip([4, 0, 5, 2], [70, 0, 16, 89], strict=True))
        ]
    finally:
        torch.set_num_threads(was)
    for cache, old, new in ((keys, before[0], k), (values, before[1], v)):
        for i, (s, p) in enumerate(zip([4, 0, 5, 2], [70, 0, 16, 89], strict=True)):
            old[s, :, p] = new[i]
        assert torch.equal(cache, old)  # what was written, and nothing else
    near(got[:4], attended_plain(q.double(), keys.double(), values.double(), places, dim**-0.5, window), allowed)
    assert torch.equal(got[:4], torch.cat(alone))
    assert not got[4].any()


def test_attention_to_one_far_key_and_to_equal_ones(level):
    keys, values = torch.zeros(1, 1, 32, 16), drawn(1, 1, 32, 16)
    keys[0, 0, 3] = 1000.0
    q, kv = torch.ones(1, 1, 16), torch.zeros(1, 1, 16)
    got = attended(q, kv, kv, keys, values, Places([0], [20]), 1.0)
    torch.testing.assert_close(got[0], values[0, 0, 3])
    keys.zero_()
    got = attended(q, kv, kv, keys, values, Places([0], [20]), 1.0)
    torch.testing.assert_close(got[0], values[0, 0, :21].mean(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_have_the_same_bits_in_any_company(level, dtype):
    x, y, gain = drawn(9, 200, dtype=dtype), drawn(9, 200, seed=1, dtype=dtype), drawn(200, seed=2)
    for f in (lambda a, b: added(a, b, gain, 1e-6), lambda a, b: gated(b, "silu")):
        whole = f(x, y)
        for rows in (slice(0, 1), slice(3, 5), slice(8, 9)):
            assert torch.equal(f(x[rows], y[rows]), whole[rows])


def test_what_does_not_fit_together_is_refused():
    x, gain = drawn(4, 32), drawn(32)
    heads, angles = drawn(4, 3, 8), (drawn(4, 4), drawn(4, 4))
    keys = drawn(2, 1, 16, 8)
    wrong = [
        lambda: normed(x, gain[:16], 1e-6),
        lambda: normed(x, gain.double(), 1e-6),
        lambda: normed(x.t(), drawn(4), 1e-6),
        lambda: added(x[:2], x, gain, 1e-6),
        lambda: added(x.bfloat16(), x, gain, 1e-6),
        lambda: turned(heads, drawn(2, 8), 1e-6, angles),
        lambda: turned(heads, None, 0.0, (angles[0][:2], angles[1][:2])),
        lambda: turned(heads.transpose(0, 1), None, 0.0, angles),
        lambda: gated(x.t(), "silu"),
        lambda: gated(drawn(4, 31), "silu"),
        lambda: attended(heads, heads[:, :1], heads[:, 1:2], keys, keys, Places([2], [3]), 1.0),  # no such slot
        lambda: attended(heads, heads[:, :1], heads[:, 1:2], keys, keys, Places([0], [16]), 1.0),  # beyond its room
        lambda: attended(heads, heads[:, :2], heads[:, :2], keys, keys, Places([0], [3]), 1.0),
        lambda: attended(heads, heads[:, :1], heads[:, 1:2], keys, keys[:, :, :8], Places([0], [3]), 1.0),
        lambda: attended(heads, heads[:, :1], heads[:, 1:2], keys.bfloat16(), keys, Places([0], [3]), 1.0),
        lambda: attended(heads, heads[:, :1], heads[:, 1:2], keys, keys, Places([0] * 5, [3] * 5), 1.0),
    ]
    for call in wrong:
        with pytest.raises(ValueError, match="fit together"):
            call()


def test_the_twins_are_compared_before_any_is_used(monkeypatch):
    cpu = torch.device("cpu")
    why_not.cache_clear()
    assert why_not(cpu, torch.float32) is why_not(cpu, torch.bfloat16) is None
    assert "float64" in why_not(cpu, torch.float64)
    why_not.cache_clear()
    try:
        for wrong in (lambda x, kind: gated(x, "silu"), lambda x, kind: gated(x, kind) * torch.nan):
            monkeypatch.setattr(few_rows, "gated", wrong)
            assert ">" in why_not(cpu, torch.float32)
            why_not.cache_clear()
    finally:
        why_not.cache_clear()
