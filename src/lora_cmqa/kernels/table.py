"""The table that chooses: each fast function with its plain twin, and which of them is called.

    check_kernels(device, dtype)      small shapes, forward and backward, each beside the plain twin
       rms_norm          1e-7         the fast one stays
       packed_attention  nan          its plain twin is called from now on; the caller says so by name

On a GPU a library's kernel comes before ours where there is one (`library_ways`), and passes the same comparison.

A kernel that is right on one machine may be wrong on another (a driver, a build of torch, a processor's own library);
a wrong one would train, score and answer in silence. So whoever opens a base asks once (0.4 s), on its own device and
dtype, before the first step or answer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch

from ..messages import say
from . import attention, head, liger, lora_linear, mlp, norm, quantized, rope
from .kernel import Kernel, Way, distance

Case = tuple[Sequence[Any], dict[str, Any]]  # arguments of a kernel

rms_norm = Kernel(norm.rms_norm, norm.rms_norm_plain)
rotate = Kernel(rope.rotate, rope.rotate_plain)
gated = Kernel(mlp.gated, mlp.gated_plain)
project = Kernel(lora_linear.lora_linear, lora_linear.lora_linear_plain)
packed_attention = Kernel(attention.packed_attention, attention.packed_attention_plain)
cross_entropy = Kernel(head.linear_cross_entropy, head.linear_cross_entropy_plain, without=("chunk",))
KERNELS: tuple[Kernel[Any], ...] = (rms_norm, rotate, gated, project, packed_attention, cross_entropy)

# Largest ||fast - plain|| / ||plain||. In 16 bits the twins round at different places, several times in a chain.
_ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def library_ways(device: torch.device, dtype: torch.dtype) -> dict[Kernel[Any], Callable[..., torch.Tensor]]:
    """What libraries offer on `device`: torch's own FlashAttention over rows of any lengths (16 bits), and Liger."""
    if device.type != "cuda":
        return {}
    ways: dict[Kernel[Any], Callable[..., torch.Tensor]] = {}
    if dtype in (torch.bfloat16, torch.float16):
        ways[packed_attention] = attention.packed_attention_varlen
    if liger.is_installed() and dtype != torch.float64:
        ways |= {rms_norm: liger.rms_norm, gated: liger.gated}
    return ways


def check_kernels(
    device: torch.device, dtype: torch.dtype, quantization: str = "none", *, stored: Mapping[str, Way] | None = None
) -> dict[str, str]:
    """Compare every function with its twin on `device` in `dtype`: a library's, else ours, else the twin itself is
    called from now on. What writes a weight of `quantization` (nf4, int8) out is compared where there is one.

    stored  what `chosen_ways` said when a run began: no better way is taken, and a plain one without a comparison
    Returns {name: what was found} of those that were passed over; empty where all agree. Draws nothing from torch's
    own random state.
    """
    found, libraries = {}, library_ways(device, dtype)
    for kernel in _kernels(quantization):
        kernel.library = libraries.get(kernel)
        best: Way = "library" if kernel.library is not None else "fast"
        first = best if stored is None else stored.get(kernel.name, "fast")
        kernel.way, reason = _first_that_agrees(kernel, first, device, dtype)
        if reason is not None:
            found[kernel.name] = reason
    return found


def _kernels(quantization: str) -> tuple[Kernel[Any], ...]:
    return KERNELS if quantization == "none" else (*KERNELS, quantized.DEQUANTIZE[quantization])


def chosen_ways(quantization: str = "none") -> dict[str, Way]:
    """{name: way} of every kernel."""
    return {kernel.name: kernel.way for kernel in _kernels(quantization)}


def say_passed_over(
    found: Mapping[str, str], device: torch.device, dtype: torch.dtype, quantization: str = "none"
) -> None:
    """What `check_kernels` has found, for people."""
    ways = chosen_ways(quantization)
    for kernel, reason in found.items():
        key = "kernels.plain" if ways[kernel] == "plain" else "kernels.own"
        print(say(key, kernel=kernel, found=reason, device=device, dtype=dtype), file=sys.stderr)


_WAYS: tuple[Way, ...] = ("library", "fast", "plain")


def _first_that_agrees(
    kernel: Kernel[Any], first: Way, device: torch.device, dtype: torch.dtype
) -> tuple[Way, str | None]:
    """The way to take, from `first` on, and why not an earlier one."""
    reason = "as at the first start" if first == "plain" else None
    for way in _WAYS[_WAYS.index(first) : -1]:
        differs = _differs(kernel, way, device, dtype)
        if differs is None:
            return way, reason
        reason = differs
    return "plain", reason


def _differs(kernel: Kernel[Any], way: Way, device: torch.device, dtype: torch.dtype) -> str | None:
    function = kernel.library if way == "library" else kernel.fast
    if function is None:  # it was there at the first start
        return "not installed"
    found = (_case_differs(kernel, function, case(_Draw(device, dtype)), dtype) for case in _CASES[kernel])
    return next((reason for reason in found if reason is not None), None)


def _case_differs(
    kernel: Kernel[Any], function: Callable[..., torch.Tensor], case: Case, dtype: torch.dtype
) -> str | None:
    args, kwargs = case
    try:
        fast = _run(function, args, kwargs)
    except Exception as e:  # whatever a build or a driver raises: the twin needs only plain operations
        return f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:200]}"
    plain = _run(kernel.twin, args, {k: v for k, v in kwargs.items() if k not in kernel.without})
    error = max(distance(a, b) for a, b in zip(fast, plain, strict=True))
    return None if error <= _ALLOWED[dtype] else f"{error:.1e} > {_ALLOWED[dtype]:.0e}"  # nan compares as different


def _run(function: Callable[..., torch.Tensor], args: Sequence[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The result, and the gradients of all that asks for one."""
    flat = [t for a in args for t in ([t for low in a for t in low[:2]] if isinstance(a, list) else [a])]
    wanted = [t for t in flat if isinstance(t, torch.Tensor) and t.requires_grad]
    out = function(*args, **kwargs)
    if not wanted:
        return [out]
    upstream = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, wanted, upstream)]


# ---- small cases -----------------------------------------------------------------------------------------------------


class _Draw:
    """Random tensors from a generator of its own."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, grad: bool = True, dtype: torch.dtype | None = None) -> torch.Tensor:
        drawn = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return drawn.to(self.device, dtype or self.dtype).requires_grad_(grad)


_TOKENS = 44  # of rows 20, 19 and 5: two are padded side by side, one stands alone


def _norm_case(draw: _Draw) -> Case:
    return (draw(_TOKENS, 64), draw(64, grad=False), 1e-6, 1.0), {}


def _rotate_case(draw: _Draw) -> Case:
    angle = draw(_TOKENS, 16, grad=False, dtype=torch.float64)
    return (draw(_TOKENS, 6, 32), angle.cos().to(draw.dtype), angle.sin().to(draw.dtype)), {}


def _gelu_case(draw: _Draw) -> Case:
    return (draw(_TOKENS, 2 * 96), "gelu_tanh"), {}


def _silu_case(draw: _Draw) -> Case:
    return (draw(_TOKENS, 2 * 96), "silu"), {}


def _project_case(draw: _Draw) -> Case:
    exact = torch.promote_types(draw.dtype, torch.float32)
    low = [
        lora_linear.LowRank(draw(4, 64, dtype=exact), draw(stop - start, 4, dtype=exact), 0.5, start, stop)
        for start, stop in ((0, 64), (64, 96))
    ]
    return (draw(_TOKENS, 64), draw(96, 64, grad=False), draw(96, grad=False), low), {}


def _attention_case(draw: _Draw) -> Case:
    q, k, v = draw(_TOKENS, 4, 32), draw(_TOKENS, 2, 32), draw(_TOKENS, 2, 32)
    return (q, k, v, (20, 19, 5)), {"scale": 32**-0.5, "window": 12}


def _whole_rows_case(draw: _Draw) -> Case:
    """Without a window: a library has another way for it."""
    q, k, v = draw(_TOKENS, 4, 32), draw(_TOKENS, 2, 32), draw(_TOKENS, 2, 32)
    return (q, k, v, (20, 19, 5)), {"scale": 32**-0.5}


def _tree_case(draw: _Draw) -> Case:
    """A beginning of 14 tokens with two endings of 10 and 9, beside a row of 11."""
    q, k, v = draw(_TOKENS, 4, 32), draw(_TOKENS, 2, 32), draw(_TOKENS, 2, 32)
    return (q, k, v, (14, 10, 9, 11)), {"scale": 32**-0.5, "parents": (-1, 0, 0, -1)}


def _head_case(draw: _Draw) -> Case:
    targets = torch.arange(_TOKENS, device=draw.device) * 7
    weight = (draw(1000, 64, grad=False) / 8).detach()
    return (draw(_TOKENS, 64), weight, targets), {"chunk": 32}


def _weight_case(kind: str) -> Callable[[_Draw], Case]:
    def case(draw: _Draw) -> Case:
        dtype = torch.float32 if draw.dtype == torch.float64 else draw.dtype
        return (quantized.quantize(draw(96, 520, grad=False, dtype=dtype), cast(quantized.Kind, kind)), dtype), {}

    return case


_CASES: dict[Kernel[Any], tuple[Callable[[_Draw], Case], ...]] = {
    rms_norm: (_norm_case,),
    rotate: (_rotate_case,),
    gated: (_gelu_case, _silu_case),
    project: (_project_case,),
    packed_attention: (_attention_case, _whole_rows_case, _tree_case),
    cross_entropy: (_head_case,),
    **{kernel: (_weight_case(kind),) for kind, kernel in quantized.DEQUANTIZE.items()},
}
