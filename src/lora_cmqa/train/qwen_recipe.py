"""The memory of Qwen v1's own finetune.py, named: why 7B did not fit 24 GB, and what would have cured it.

    base bf16 + LoRA float32 (on the fused c_attn, c_proj, w1, w2) + AdamW + full checkpointing + all logits
    the path lacks "chat"  ->  wte and lm_head trained whole: copy, gradient, both moments, foreach temporaries

Measured dtypes and the trigger: the seed's script on the reference stack. Checked against the table in QwenLM's README
(A100-80G, FlashAttention 2, batch 1, torch 2.0): docs/memory.md.
"""

from __future__ import annotations

from ..models.sizes import Shape
from .ledger import CUDA_CONTEXT, CUDA_SLACK, Phase, Row

# GPTQ, 4 bits, groups of 128 inputs: a float16 scale and a 4-bit zero a group (AutoGPTQ's QuantLinear).
_GPTQ_BYTES = 0.5 + (2 + 0.5) / 128
# Unpacking a GPTQ matrix: int32, int8 twice, the gathered float16 scales, the float16 weight.
_UNPACKED_BYTES = 4 + 1 + 1 + 2 + 2
# A logit at the start of the backward, in float32: the copy that accelerate returns, log_softmax, and both gradients.
_LOGIT_BYTES = 4 + 4 + 4 + 4


def fused_lora_parameters(shape: Shape, r: int) -> int:
    """c_attn [3 H, H] has one A for q, k and v; c_proj stands in attention and in the MLP."""
    h, f = shape.hidden, shape.ffn
    return shape.layers * r * ((h + 3 * h) + (h + h) + 2 * (h + f) + (f + h))


def trains_embeddings(name: str) -> bool:
    """finetune.py: `if lora_args.q_lora or "chat" in model_name_or_path.lower(): modules_to_save = None`."""
    return "chat" not in name.lower()


def phases(
    shape: Shape, *, r: int, length: int, batch: int, embeddings: bool, quantised: bool, foreach_lists: int = 1
) -> tuple[Phase, ...]:
    """Backward, and the optimizer's step: the two moments that decide.

    embeddings     wte and lm_head are trained whole
    quantised      Q-LoRA on a GPTQ Int4 base (DeepSpeed in float16: 2 + 2 bytes of weight and gradient, 12 of master
                   and moments, the same 16 in all as float32 LoRA takes)
    foreach_lists  AdamW's step holds so many lists as large as a moment: 1 since torch 2.1 (the seed's 2.5), 2 in torch
                   2.0 (the published table): sqrt(v), and sqrt(v) + eps beside it
    """
    matrices = shape.layers * shape.linear_parameters
    others = shape.parameters - matrices - shape.embedding_parameters - shape.head_parameters
    lora, whole = fused_lora_parameters(shape, r), (shape.embedding_parameters + shape.head_parameters) * embeddings
    static = [
        Row(
            "weights: layers in GPTQ Int4" if quantised else "weights: layers",
            round(matrices * (_GPTQ_BYTES if quantised else 2)),
        ),
        Row("weights: norms and biases", 2 * others),
        Row("weights: embedding and head", 2 * (shape.embedding_parameters + shape.head_parameters)),
        Row("LoRA weights", 4 * lora),
        Row("LoRA gradients", 4 * lora),
        Row("LoRA optimizer states", 8 * lora),
    ]
    if embeddings:
        static += [
            Row("modules_to_save wte, lm_head: copies", 2 * whole),
            Row("modules_to_save wte, lm_head: gradients", 2 * whole),
            Row("modules_to_save wte, lm_head: optimizer states", 4 * whole),
        ]
    tokens = length * batch
    step = [
        *static,
        Row("activations: inputs of recomputed layers", 2 * shape.layers * tokens * shape.hidden),
        Row("activations: the layer that is recomputed", tokens * _layer_bytes(shape)),
        Row("all logits with their float32 copies", _LOGIT_BYTES * tokens * shape.vocab),
    ]
    if embeddings:
        step.append(Row("gradient of lm_head before it is added", 2 * shape.head_parameters))
    if quantised:
        # The product is plain autograd, so it keeps the unpacked weights of the layer that is recomputed.
        step.append(Row("unpacked weights of the layer that is recomputed", 2 * shape.linear_parameters))
        step.append(Row("one weight being unpacked", _UNPACKED_BYTES * 3 * shape.hidden * shape.hidden))
    optimizer = [*static, Row("foreach AdamW's temporaries", foreach_lists * (4 * lora + 2 * whole))]
    return tuple(
        Phase(name, (*rows, Row("CUDA context and libraries", CUDA_CONTEXT), _slack(rows)))
        for name, rows in (("backward", step), ("optimizer", optimizer))
    )


def _layer_bytes(shape: Shape) -> int:
    """A token in one layer of modeling_qwen.py with peft 0.6: bf16 of both norms, c_attn, rotated q and k, attention,
    w1, w2, silu, product; and a float32 copy of what each of the five LoRA layers reads."""
    h, f = shape.hidden, shape.ffn
    return 2 * (4 * h + 3 * h + 2 * h + 2 * h + 2 * h + 4 * f) + 4 * (h + h + h + h + f)


def _slack(rows: list[Row]) -> Row:
    return Row("allocator slack", round(CUDA_SLACK * sum(row.bytes for row in rows)))


def peak(shape: Shape, **settings: int | bool | None) -> Phase:
    """The fuller of the two moments; arguments as `phases`."""
    return max(phases(shape, **settings), key=lambda p: p.bytes)  # type: ignore[arg-type]
