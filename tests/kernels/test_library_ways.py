"""Libraries' kernels: taken where they agree with the plain twin, passed over by name where not, and kept by a resume.

What runs on a card only is stood in for here by the same sums on the processor; tests/gpu runs the real ones."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch
import torch.nn.attention.varlen as torch_varlen

from lora_cmqa.kernels import attention, liger, mlp, norm, table
from lora_cmqa.kernels.table import check_kernels, chosen_ways, rms_norm, say_passed_over

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_before():
    yield
    for kernel in table.KERNELS:
        kernel.way, kernel.library = "fast", None


@pytest.fixture
def library(monkeypatch):
    """library(function): it stands in for ours on this processor."""

    def offer(function) -> None:
        monkeypatch.setattr(table, "library_ways", lambda device, dtype: {rms_norm: function})

    return offer


def not_ours():
    return {name: way for name, way in chosen_ways().items() if way != "fast"}


def doubled(*args):
    return norm.rms_norm(*args) * 2


def missing(*args):
    raise ImportError("no triton here")


def test_a_librarys_kernel_is_taken_where_it_agrees(library):
    calls = []
    library(lambda *args: (calls.append(1), norm.rms_norm(*args))[1])
    assert check_kernels(CPU, torch.float32) == {}
    assert not_ours() == {"rms_norm": "library"}
    before = len(calls)
    rms_norm(torch.randn(3, 8), torch.ones(8), 1e-6)
    assert len(calls) == before + 1


@pytest.mark.parametrize("broken", [doubled, missing])
def test_one_that_differs_or_fails_is_passed_over_for_ours_and_said(library, broken, capsys):
    library(broken)
    found = check_kernels(CPU, torch.float32)
    assert list(found) == ["rms_norm"]
    assert not_ours() == {}
    say_passed_over(found, CPU, torch.float32)
    assert "ours is taken" in capsys.readouterr().err
    assert torch.equal(
        rms_norm(torch.ones(3, 8), torch.ones(8), 1e-6), norm.rms_norm(torch.ones(3, 8), torch.ones(8), 1e-6)
    )


def test_where_ours_differs_too_the_twin_answers(library, monkeypatch, capsys):
    library(doubled)
    monkeypatch.setattr(rms_norm, "fast", doubled)
    say_passed_over(check_kernels(CPU, torch.float32), CPU, torch.float32)
    assert not_ours() == {"rms_norm": "plain"}
    assert "the plain one is taken" in capsys.readouterr().err


def test_a_resume_takes_no_better_way_than_the_first_start(library):
    library(norm.rms_norm)
    assert check_kernels(CPU, torch.float32, stored={}) == {}
    assert not_ours() == {}  # ours then, ours now
    assert check_kernels(CPU, torch.float32, stored={"rms_norm": "library"}) == {}
    assert not_ours() == {"rms_norm": "library"}
    assert list(check_kernels(CPU, torch.float32, stored={"rms_norm": "plain"})) == ["rms_norm"]
    assert not_ours() == {"rms_norm": "plain"}


def test_a_library_that_is_gone_is_named(library, monkeypatch):
    monkeypatch.setattr(table, "library_ways", lambda device, dtype: {})
    assert check_kernels(CPU, torch.float32, stored={"rms_norm": "library"}) == {"rms_norm": "not installed"}
    assert not_ours() == {}  # the run folder's comparison of ways refuses to go on


def test_a_processor_has_no_library_ways_and_a_card_those_of_its_dtype(monkeypatch):
    assert table.library_ways(CPU, torch.bfloat16) == {}
    card = torch.device("cuda")
    monkeypatch.setattr(liger, "is_installed", lambda: False)
    assert list(table.library_ways(card, torch.bfloat16)) == [table.packed_attention]
    assert table.library_ways(card, torch.float32) == {}
    monkeypatch.setattr(liger, "is_installed", lambda: True)
    assert set(table.library_ways(card, torch.float16)) == {table.packed_attention, rms_norm, table.gated}
    assert set(table.library_ways(card, torch.float32)) == {rms_norm, table.gated}


# ---- FlashAttention over rows of any lengths -------------------------------------------------------------------------


def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size=(-1, -1), enable_gqa=False):
    """What torch 2.13 says of torch.nn.attention.varlen.varlen_attn: rows by their ends, a window (left, right)."""
    assert q.dim() == k.dim() == 3
    assert enable_gqa or q.shape[1] == k.shape[1]
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert max_q == int(cu_seq_q.diff().max()) == max_k
    left, right = (math.inf if n < 0 else n for n in window_size)
    outputs = []
    for start, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        at = torch.arange(end - start)
        ahead = at[None] - at[:, None]
        keys, values = (x[start:end].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[start:end], keys) * scale
        scores = scores.masked_fill(~((ahead <= right) & (-ahead <= left)), -math.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("kv", [2, 4])
def test_varlen_is_asked_for_what_the_twin_computes(monkeypatch, window, kv):
    monkeypatch.setattr(torch_varlen, "varlen_attn", varlen_attn)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(18, heads, 8, generator=draw, dtype=torch.float64) for heads in (4, kv, kv))
    asked = {"scale": 0.3, "window": window}
    ours = attention.packed_attention_varlen(q, k, v, (9, 2, 7), **asked)
    assert torch.allclose(ours, attention.packed_attention_plain(q, k, v, (9, 2, 7), **asked), atol=1e-12)


@pytest.mark.parametrize(
    ("dim", "more"), [(8, {"parents": (-1, 0)}), (8, {"softcap": 5.0}), (264, {}), (12, {})], ids=str
)
def test_what_varlen_has_no_word_for_goes_the_other_way(monkeypatch, dim, more):
    monkeypatch.setattr(torch_varlen, "varlen_attn", lambda *_, **__: pytest.fail("it was asked"))
    q, k, v = (torch.randn(6, 2, dim, dtype=torch.float64) for _ in range(3))
    found = attention.packed_attention_varlen(q, k, v, (4, 2), scale=0.3, **more)
    assert torch.allclose(found, attention.packed_attention_plain(q, k, v, (4, 2), scale=0.3, **more), atol=1e-12)


# ---- Liger -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def liger_kernel(monkeypatch):
    """Its functions by what they are documented to compute, with its names and its order of arguments."""

    def rms(x, w, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
        assert (casting_mode, in_place) == ("gemma", False)
        return norm.rms_norm_plain(x, w, eps, offset)

    def offer(module: str, name: str, function) -> None:
        made = types.ModuleType(f"liger_kernel.ops.{module}")
        setattr(made, name, type(name, (), {"apply": staticmethod(function)}))
        monkeypatch.setitem(sys.modules, made.__name__, made)

    for package in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    offer("rms_norm", "LigerRMSNormFunction", rms)
    offer("swiglu", "LigerFusedGateUpSiLUMulFunction", lambda y, in_place=False: mlp.gated_plain(y, "silu"))
    offer("geglu", "LigerGELUMulFunction", lambda a, b: mlp.gated_plain(torch.cat((a, b), -1), "gelu_tanh"))


@pytest.mark.usefixtures("liger_kernel")
def test_liger_is_called_with_its_own_arguments():
    x, y = torch.randn(5, 8), torch.randn(5, 12)
    for offset in (0.0, 1.0):
        found = liger.rms_norm(x, torch.full((8,), 0.5), 1e-6, offset)
        assert torch.allclose(found, norm.rms_norm(x, torch.full((8,), 0.5), 1e-6, offset), atol=1e-6)
    for activation in ("silu", "gelu_tanh"):
        assert torch.allclose(liger.gated(y, activation), mlp.gated(y, activation), atol=1e-6)
    each = torch.randn(5, 2, 4), torch.randn(2, 4)  # a weight for each head
    assert torch.equal(liger.rms_norm(*each, 1e-6), norm.rms_norm(*each, 1e-6))
