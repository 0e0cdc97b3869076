"""Rows of one step, each with its own adapter: right, alone in what it reads, the same bits in any company."""

import itertools
import shutil
import sys

import pytest
import torch

from lora_cmqa.kernels import native
from lora_cmqa.kernels.adapter_rows import AB, Segment, Segments, from_blocks, in_blocks, why_not

CPU = torch.device("cpu")
built = pytest.mark.skipif(native.missing is not None, reason=f"the compiled kernel is not here: {native.missing}")


def drawn(*shape: int, seed: int = 0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def an_adapter(rank: int, inner: int, outs: tuple[int, ...], dtype, seed: int = 0) -> AB:
    bs = [drawn(rank, out, seed=seed + 7 * i, dtype=dtype) for i, out in enumerate(outs)]
    return AB(drawn(len(outs) * rank, inner, seed=seed + 100, dtype=dtype) / inner**0.5, in_blocks(bs))


def exactly(y, x, segments: Segments, key):
    """In float64, rounded once."""
    y = y.double()
    for s in segments.segments:
        ab, rows = s.parts[key], slice(s.first, s.stop)
        parts = (x[rows].double() @ ab.a.double().t()).split(s.rank, -1)
        y[rows] += torch.cat(
            [t @ b.double() for t, b in zip(parts, from_blocks(ab.b, segments.outs[key]), strict=True)], -1
        )
    return y


def test_it_is_built_where_there_is_a_compiler():
    if sys.platform != "linux" or not (shutil.which("cc") or shutil.which("gcc")):
        pytest.skip("no C compiler here: the package installs without the kernel")
    assert why_not(CPU, torch.bfloat16) is None
    assert why_not(CPU, torch.float32) is None


def test_what_it_is_not_for_it_says():
    assert "float64" in why_not(CPU, torch.float64)
    assert "cuda" in why_not(torch.device("cuda"), torch.bfloat16)


def test_blocks_hold_every_output_and_give_it_back():
    bs = [drawn(3, out, seed=out) for out in (40, 16, 5)]
    blocks = in_blocks(bs)
    assert blocks.shape == (3 + 1 + 1, 3, 16)
    assert all(torch.equal(b, back) for b, back in zip(bs, from_blocks(blocks, (40, 16, 5)), strict=True))
    assert blocks[2, :, 8:].abs().sum() == 0


@built
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-3)])
def test_every_instruction_set_adds_what_the_plain_sum_adds(level, dtype, allowed):
    taken = native.rows.use(level)
    try:
        if taken < level:
            pytest.skip(f"this processor has no level {level}")
        shapes = itertools.product((16, 70, 129), ((16,), (40, 16), (8, 24, 33)), (1, 3, 16, 40))
        for inner, outs, rank in shapes:
            counts = (1, 2, 3, 4, 5, 9)
            stops = list(itertools.accumulate(counts))
            adapters = [an_adapter(rank + i, inner, outs, dtype, seed=i) for i in range(len(counts))]
            segments = Segments(
                [Segment({0: ab}, rank + i, stops[i] - counts[i], stops[i]) for i, ab in enumerate(adapters)], {0: outs}
            )
            x, y = (
                drawn(stops[-1] + 2, inner, seed=1, dtype=dtype),
                drawn(stops[-1] + 2, sum(outs), seed=2, dtype=dtype),
            )
            want, got = exactly(y, x, segments, 0), segments.add(y.clone(), x, 0)
            assert float((got.double() - want).norm() / want.norm()) < allowed
            assert torch.equal(got[stops[-1] :], y[stops[-1] :])  # the bare base's rows
            assert float((segments.add_plain(y.clone(), x, 0).double() - want).norm() / want.norm()) < 3 * allowed
    finally:
        native.rows.use(2)


@built
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_in_any_company(dtype, threads):
    inner, outs, before = 130, (48, 17), torch.get_num_threads()
    adapters = [an_adapter(r, inner, outs, dtype, seed=r) for r in (16, 4, 8)]
    x, y = drawn(12, inner, seed=1, dtype=dtype), drawn(12, 65, seed=2, dtype=dtype)
    owners = [0, 0, 0, 0, 0, 0, 0, 1, 2, 2, 2, 1]
    torch.set_num_threads(threads)
    try:
        alone = [
            Segments([Segment({0: adapters[o]}, (16, 4, 8)[o], 0, 1)], {0: outs}).add(
                y[i : i + 1].clone(), x[i : i + 1], 0
            )
            for i, o in enumerate(owners)
        ]
        runs = ((0, 0, 7), (1, 7, 8), (2, 8, 11), (1, 11, 12))
        together = Segments([Segment({0: adapters[o]}, (16, 4, 8)[o], a, b) for o, a, b in runs], {0: outs})
        assert torch.equal(together.add(y.clone(), x, 0), torch.cat(alone))
        for few in range(1, 8):
            some = Segments([Segment({0: adapters[0]}, 16, 0, few)], {0: outs})
            assert torch.equal(some.add(y[:few].clone(), x[:few], 0), torch.cat(alone[:few]))
    finally:
        torch.set_num_threads(before)


@built
def test_bfloat16_is_rounded_as_torch_rounds():
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)  # all there are
    for seed in range(3):
        b = every if seed == 0 else drawn(1 << 16, seed=seed, dtype=torch.bfloat16)
        y = every[torch.randperm(1 << 16, generator=torch.Generator().manual_seed(seed))][None].clone()
        one = torch.ones(1, 1, dtype=torch.bfloat16)
        segments = Segments([Segment({0: AB(one, in_blocks([b[None]]))}, 1, 0, 1)], {0: (1 << 16,)})
        want = (y.float() + b.float()).bfloat16()
        torch.testing.assert_close(segments.add(y, one, 0), want, rtol=0, atol=0, equal_nan=True)


@built
def test_an_adapter_whose_products_overflow_spoils_no_one_elses():
    outs, inner = (32,), 64
    wild, tame = an_adapter(4, inner, outs, torch.bfloat16), an_adapter(4, inner, outs, torch.bfloat16, seed=5)
    wild = AB(wild.a * 1e30, wild.b)
    x, y = drawn(4, inner, seed=1, dtype=torch.bfloat16), torch.zeros(4, 32, dtype=torch.bfloat16)
    x[1] *= 1e20
    got = Segments([Segment({0: tame}, 4, 0, 1), Segment({0: wild}, 4, 1, 3)], {0: outs}).add(y.clone(), x, 0)
    assert not got[1].isfinite().all()
    assert torch.equal(got[:1], Segments([Segment({0: tame}, 4, 0, 1)], {0: outs}).add(y[:1].clone(), x[:1], 0))
    assert not got[3].any()


@built
def test_a_projection_that_nobody_changes_stays_and_wrong_sizes_are_refused():
    ab = an_adapter(4, 64, (32,), torch.float32)
    segments = Segments([Segment({"a": ab}, 4, 0, 3)], {"a": (32,), "b": (32,)})
    y, x = drawn(3, 32), drawn(3, 64)
    assert torch.equal(segments.add(y.clone(), x, "b"), y)
    for wrong_y, wrong_x in ((y[:2], x), (y, x[:2]), (y.t().contiguous().t(), x), (y, drawn(3, 128)[:, ::2])):
        with pytest.raises(ValueError, match="3 rows or more"):
            segments.add(wrong_y, wrong_x, "a")
    for wrong_y, wrong_x in ((drawn(3, 48), x), (y, drawn(3, 65)), (y.bfloat16(), x), (y.double(), x.double())):
        with pytest.raises(ValueError, match="of 32"):
            segments.add(wrong_y, wrong_x, "a")


@built
def test_the_twin_is_compared_before_it_is_used(monkeypatch):
    why_not.cache_clear()
    monkeypatch.setattr(Segments, "add", lambda self, y, x, key: y)
    try:
        assert ">" in why_not(CPU, torch.float32)
    finally:
        why_not.cache_clear()
