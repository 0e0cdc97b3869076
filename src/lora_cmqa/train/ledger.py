"""Every byte of a run, by name: pure arithmetic over a Shape, no torch.

    load        the base arrives
    forward     all that the backward needs is kept, and the head works on a chunk of rows
    backward    layer by layer, last first: a layer's gradients beside what the layers before it still keep
    recomputed  the first layers' turn, where they are made again: by then the others' activations are gone
    last attention   on a CPU: the first attention on the way back takes most where rows are attended by products
    optimizer   gradients of all that is trained, both moments, one pass (fused AdamW makes no temporary)
    evaluation  no gradient, nothing kept
    save, merge on the host: the adapter's bytes; one shard of the base and its float32 sum

The peak is the largest phase, its rows the ledger. What a layer keeps is read off lora/decoder.py and kernels/*, and
tests measure it there. Bytes are bytes; GiB = 2**30.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..models.sizes import Shape

Quantization = Literal["none", "nf4", "int8"]
VALUE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

# bitsandbytes, 4 bits with double quantisation: blocks of 64 weights share an 8-bit constant, 256 such constants a
# float32 (functional.quantize_4bit with compress_statistics; QLoRA, arXiv 2305.14314, section 3).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# While NF4 is written out, a float32 for each block of 64. int8 passes through float32 in pieces, and so does what is
# quantised on a CPU (kernels/quantized.py).
PIECE = 1 << 22  # weights
SHARD_BYTES = 5 * 10**9  # of a published checkpoint's file: what a merge holds at once

# Rows of one attention group differ in length by at most an eighth (kernels/attention.py): half of that on average.
GRID = 1 + 1 / 16
# On a CPU, rows of at most so many tokens are attended by products, which keep their weights (kernels/attention.py).
PRODUCTS = 512
# Of the vocabulary that logits are made of at a time on a CPU (kernels/head.py).
COLUMNS = 8192

# CUDA: what the context and the libraries' workspaces take (cuBLAS 32 MiB on Hopper, 8 MiB before) beside torch's
# allocator, and what the allocator holds beyond what is asked for.
CUDA_CONTEXT = 450 * 2**20
CUDA_SLACK = 0.03

# CPU: Python, torch, transformers and PEFT before a model is there.
CPU_LIBRARIES = 500 * 2**20
# Attention by products, backward: bytes a weight beside the weights that are kept (float32 copies of the weights and of
# their gradient, and the product that torch's vecdot writes out; 4 bytes need no copy). Measured on one layer alone.
PRODUCTS_BACKWARD = {2: 12, 4: 8, 8: 16}
# What oneDNN keeps of a product of each shape after its first run (kernels and scratch), and the heap of what is
# smaller than the blocks that are handed back: median of what was left over on the even half of benchmarks/memory.py.
CPU_SCRATCH = {2: 100 * 2**20, 4: 52 * 2**20, 8: 52 * 2**20}
# What glibc's malloc holds of what is freed (by itself it hands back blocks above 32 MiB only), as a share of the
# passing things: the larger of two even configurations each over 14 steps (benchmarks/memory.py --keeps-freed).
# --memory-limit makes it hand back blocks of a MiB.
GLIBC_KEEPS = {2: 0.67, 4: 0.2, 8: 0.2}


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Phase:
    """A moment of the run and all that lies in one memory then: the device's, or the host's beside it."""

    name: str
    rows: tuple[Row, ...]
    on_host: bool = False

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)


@dataclass(frozen=True, slots=True)
class Setup:
    """What of a run's settings decides its memory. `dtype` is that of the base and of the activations."""

    shape: Shape
    dtype: str = "bfloat16"
    quantization: Quantization = "none"
    r: int = 64
    targets: tuple[str, ...] | None = None  # of shape.linears; None: all seven
    trained_whole: int = 0  # parameters of modules_to_save
    trained_tokens: int = 0  # whose rows of embedding and head are trained
    max_tokens: int = 2048  # of a micro-batch
    step_tokens: int | None = None  # that an optimizer step holds at most; None: more than one micro-batch
    longest_row: int = 512
    mean_row: float | None = None  # of the rows, each counted as often as it has tokens
    supervised: float = 1.0  # share of a micro-batch's tokens that are taught
    checkpoint_layers: int = 0  # the first so many keep their input only
    head_chunk: int = 256
    on_gpu: bool = True
    gives_back: bool = False  # on a CPU: freed blocks go back to the system at once (--memory-limit)

    @property
    def value_bytes(self) -> int:
        return VALUE_BYTES[self.dtype]

    @property
    def tokens(self) -> int:
        """Of the largest micro-batch: a row longer than max_tokens stands alone."""
        return max(self.max_tokens, self.longest_row)

    @property
    def accumulates(self) -> bool:
        """A step has several micro-batches: the gradients of one lie beside the forward of the next."""
        return self.step_tokens is None or self.step_tokens > self.tokens

    @property
    def row_seen(self) -> float:
        """Length of the row that a token of the micro-batch stands in, on average; the longest where not known."""
        return self.longest_row if self.mean_row is None else self.mean_row

    @property
    def fused_attention(self) -> bool:
        return self.on_gpu or self.longest_row > PRODUCTS

    @property
    def taught(self) -> int:
        return max(1, round(self.tokens * self.supervised))


# ---- what does not depend on the micro-batch -------------------------------------------------------------------------


def weights(*, shape: Shape, value_bytes: int, quantization: Quantization) -> tuple[Row, ...]:
    """The frozen base. Only the layers' matrices are quantised; embedding, head, norms and biases keep their dtype."""
    matrices = shape.layers * shape.linear_parameters
    others = shape.layers * shape.layer_parameters - matrices + shape.hidden
    if quantization == "nf4":
        layers = Row("weights: layers in NF4, constants included", round(matrices * NF4_BYTES))
    elif quantization == "int8":
        scales = 4 * shape.layers * sum(out for out, _ in shape.linears.values())  # float32, one a row
        layers = Row("weights: layers in int8, scales included", matrices + scales)
    else:
        layers = Row("weights: layers", matrices * value_bytes)
    rows = [layers, Row("weights: norms and biases", others * value_bytes)]
    rows.append(Row("weights: embedding", shape.embedding_parameters * value_bytes))
    if not shape.tied:
        rows.append(Row("weights: head", shape.head_parameters * value_bytes))
    return tuple(rows)


def lora_value_bytes(value_bytes: int) -> int:
    """LoRA weights, their gradients and moments are float32, float64 over a float64 base."""
    return max(4, value_bytes)


def trained(
    *, lora_parameters: int, trained_whole: int, value_bytes: int, gradients: bool, moments: bool
) -> tuple[Row, ...]:
    """LoRA in its own dtype; modules_to_save as copies in the base's."""
    lora, whole = lora_parameters * lora_value_bytes(value_bytes), trained_whole * value_bytes
    rows = [Row("LoRA weights", lora)]
    rows += [Row("LoRA gradients", lora)] * gradients + [Row("LoRA optimizer states", 2 * lora)] * moments
    if trained_whole:
        rows.append(Row("modules_to_save: copies", whole))
        rows += [Row("modules_to_save: gradients", whole)] * gradients
        rows += [Row("modules_to_save: optimizer states", 2 * whole)] * moments
    return tuple(rows)


def _token_rows(setup: Setup) -> tuple[Row, ...]:
    """Rows of embedding and head that are trained, with gradient and moments: kilobytes (lora/tokens.py copies no
    whole matrix)."""
    if not setup.trained_tokens:
        return ()
    values = setup.trained_tokens * setup.shape.hidden * (1 if setup.shape.tied else 2)
    return (Row("trained tokens: rows, gradients, optimizer states", 4 * values * lora_value_bytes(setup.value_bytes)),)


# ---- what a micro-batch keeps ----------------------------------------------------------------------------------------


def layer_keeps(setup: Setup, *, last: bool = False) -> float:
    """Bytes a token that one layer keeps for its backward; `last`: after its attention only taught rows go on, and
    this counts what all rows keep.

    x, norm(x)            2 H          the residual and what q k v read
    q k v product         q + 2 kv     where a norm of each head reads it (Qwen3, Gemma)
    q, k, v on the grid   3 q          of rows of like length, each kv head repeated for its query heads
    attention's output    q            on the grid, and q once more in the rows' order
      by products         q + 2 kv, and the row's length a head in place of these (short rows on a CPU)
    x', norm(x')          2 H          after the attention; Gemma's norms after each half keep 2 H more
    gate up, inner        3 F
    LoRA's x A'           r for each projection
    """
    s, r, v = setup.shape, setup.r, setup.value_bytes
    h, q, kv, f = s.hidden, s.q_width, s.kv_width, s.ffn
    chosen = tuple(s.linears) if setup.targets is None else setup.targets
    first = [t for t in chosen if t[0] in "qkv"]
    second = [t for t in chosen if t[0] not in "qkv"]
    attention = 4 * q if setup.fused_attention else q + 2 * kv + s.heads * setup.row_seen
    before = 2 * h + (q + 2 * kv) * s.head_norm + attention * GRID + r * len(first)
    after = q + 2 * h + 3 * f + r * len(second) + (2 * h if s.family == "gemma3" else 0)
    exact = max(4, v)
    inverses = exact * (2 + (s.heads + s.kv_heads if s.head_norm else 0) + s.heads)  # and log-sum-exps
    return (before if last else before + after) * v + inverses


def scaled_a(setup: Setup) -> int:
    """Bytes of A, scaled and in the dtype that is computed in, which each layer that is not recomputed keeps."""
    s = setup.shape
    inputs = [inner for name, (_, inner) in s.linears.items() if setup.targets is None or name in setup.targets]
    return setup.r * sum(inputs) * setup.value_bytes


def kept(setup: Setup) -> tuple[Row, ...]:
    """Activations at the end of the forward, but the last layer's share."""
    s, v = setup.shape, setup.value_bytes
    each = layer_keeps(setup)
    saving = min(setup.checkpoint_layers, s.layers - 1)
    rows = []
    if saving:
        rows.append(Row("activations: inputs of recomputed layers", saving * setup.tokens * s.hidden * v))
    if others := s.layers - 1 - saving:
        rows.append(Row("activations: layers", round(others * setup.tokens * each)))
        rows.append(Row("LoRA A in the dtype of the base", others * scaled_a(setup)))
    return tuple(rows)


def last_layer_keeps(setup: Setup) -> Row:
    s, v = setup.shape, setup.value_bytes
    if setup.checkpoint_layers >= s.layers:
        return Row("activations: last layer", setup.tokens * s.hidden * v)
    every = layer_keeps(setup, last=True)
    taught = layer_keeps(setup) - every
    return Row("activations: last layer", round(setup.tokens * every + setup.taught * taught) + scaled_a(setup))


# ---- the largest passing things --------------------------------------------------------------------------------------


def head(setup: Setup) -> tuple[Row, ...]:
    """kernels/head.py: logits of a chunk (on a CPU of some of the vocabulary), their float32 tile, the chunk's gradient
    in float32 and that of every taught row."""
    s, v = setup.shape, setup.value_bytes
    rows = min(setup.head_chunk, setup.taught)
    columns = s.vocab if setup.on_gpu else min(s.vocab, COLUMNS)
    tile = 0 if v >= 4 else rows if setup.on_gpu else min(16, rows)
    exact = max(v, 4)
    return (
        Row("head: logits of a chunk", columns * (rows * v + tile * 4) + 2 * rows * s.hidden * exact),
        Row("head: states and gradients of taught rows", 3 * setup.taught * s.hidden * v),
    )


def layer_backward(setup: Setup) -> Row:
    """The fuller of two moments of a layer's backward. The gated MLP: gradients of inner and of the joined product,
    while `inner` is gone. Attention by products, with the MLP's share gone."""
    s, v = setup.shape, setup.value_bytes
    gated = (2 * s.ffn + s.hidden) * v
    products = products_backward(setup) - (3 * s.ffn + 2 * s.hidden) * v
    return Row("backward of a layer", round(setup.tokens * max(gated, products)))


def products_backward(setup: Setup) -> float:
    """Bytes a token that attention by products takes on its way back, beside what its layer keeps: over its weights,
    and the gradients of q, of the output and of x. 0 where attention is fused."""
    if setup.fused_attention:
        return 0.0
    s, v = setup.shape, setup.value_bytes
    return s.heads * setup.row_seen * GRID * PRODUCTS_BACKWARD[v] + (2 * s.q_width + 2 * s.hidden) * v


def last_attention_backward(setup: Setup) -> tuple[Row, ...]:
    """The first attention on the way back, while all other layers still keep theirs: the last layer's, whose MLP is
    done."""
    if setup.fused_attention or setup.checkpoint_layers >= setup.shape.layers:
        return ()
    before = setup.tokens * layer_keeps(setup, last=True)
    return (
        Row("activations: last layer up to its attention", round(before) + scaled_a(setup)),
        Row("backward of the last attention", round(setup.tokens * products_backward(setup))),
    )


def layer_forward(setup: Setup) -> Row:
    """Without gradient: residual, normed input, joined product, its gate."""
    s, v = setup.shape, setup.value_bytes
    return Row("forward of a layer", setup.tokens * (3 * s.hidden + 4 * s.ffn) * v)


def dequantised(setup: Setup) -> tuple[Row, ...]:
    """The largest matrix, written out in the dtype that is computed in, and what that takes on the way."""
    if setup.quantization == "none":
        return ()
    largest = _largest(setup)
    passing = largest // 16 if setup.quantization == "nf4" else 8 * min(PIECE, largest)
    return (Row("one weight dequantised", largest * setup.value_bytes + passing),)


def _largest(setup: Setup) -> int:
    return max(out * inner for out, inner in setup.shape.linears.values())


# ---- the phases ------------------------------------------------------------------------------------------------------


def phases(setup: Setup, *, first_step: bool = False) -> tuple[Phase, ...]:
    """All moments at which a memory may be fullest, in the order of a run.

    first_step  the optimizer makes its moments at the end of it: before that they are not there
    """
    s, v = setup.shape, setup.value_bytes
    base = weights(shape=s, value_bytes=v, quantization=setup.quantization)
    lora = s.lora_parameters(setup.r, setup.targets)

    def have(*, gradients: bool, moments: bool = not first_step) -> tuple[Row, ...]:
        rows = trained(
            lora_parameters=lora,
            trained_whole=setup.trained_whole,
            value_bytes=v,
            gradients=gradients,
            moments=moments,
        )
        return base + rows + _token_rows(setup)

    before = have(gradients=setup.accumulates)  # a step's first backward makes them
    moments = {
        "load": base + _largest_16_bit(setup),
        "forward": (*before, *kept(setup), last_layer_keeps(setup), *head(setup)),
        "backward": (*before, *kept(setup), layer_backward(setup), *dequantised(setup)),
        "last attention": (*before, *kept(setup), *last_attention_backward(setup)),
        "recomputed": (*have(gradients=True), *_recomputed(setup)),
        "optimizer": have(gradients=True, moments=True),
        "evaluation": (*have(gradients=False), layer_forward(setup), *head(setup), *dequantised(setup)),
    }
    rows = [Phase(name, (*there, *_around(setup, there))) for name, there in moments.items()]
    adapter = lora * lora_value_bytes(v) + setup.trained_whole * v
    rows.append(Phase("save", (Row("adapter and optimizer states on their way to disk", 4 * adapter),), on_host=True))
    rows.append(Phase("merge", merge_rows(s), on_host=True))
    return tuple(rows)


def merge_rows(shape: Shape) -> tuple[Row, ...]:
    """lora/merge.py: one shard at a time, each matrix summed in float32 and cast once."""
    value = VALUE_BYTES[shape.dtype]
    largest = max(shape.embedding_parameters, *(out * inner for out, inner in shape.linears.values()))
    return (
        Row("one shard of the base, read and written", 2 * min(SHARD_BYTES, shape.parameters * value)),
        Row("one matrix in float32 and its change", 2 * 4 * largest),
    )


def _recomputed(setup: Setup) -> tuple[Row, ...]:
    """The last of the layers that are made again, on its way back: of the layers after it only gradients are left."""
    if not setup.checkpoint_layers:
        return ()
    s, layers = setup.shape, min(setup.checkpoint_layers, setup.shape.layers)
    again = round(setup.tokens * layer_keeps(setup)) + scaled_a(setup)
    inputs = (layers - 1) * setup.tokens * s.hidden * setup.value_bytes  # its own is among what it keeps
    return (
        Row("activations: inputs of recomputed layers", inputs),
        Row("activations: the layer that is recomputed", again),
        layer_backward(setup),
        *dequantised(setup),
    )


def _largest_16_bit(setup: Setup) -> tuple[Row, ...]:
    """While a base is quantised, one matrix is there in 16 bits, and float32 pieces of it on a CPU."""
    if setup.quantization == "none":
        return ()
    largest = _largest(setup)
    pieces = 0 if setup.on_gpu else 20 * min(PIECE, largest)
    return (Row("one weight before it is quantised", largest * setup.value_bytes + pieces),)


def _around(setup: Setup, rows: tuple[Row, ...]) -> tuple[Row, ...]:
    if not setup.on_gpu:
        passing = sum(row.bytes for row in rows if row.name.startswith(_PASSING))
        libraries = Row("Python, torch and other libraries", CPU_LIBRARIES)
        scratch = Row("scratch that oneDNN and the heap keep", CPU_SCRATCH[setup.value_bytes] if passing else 0)
        kept_back = Row("freed, and held by the C library", round(passing * GLIBC_KEEPS[setup.value_bytes]))
        return (libraries, scratch) if setup.gives_back else (libraries, scratch, kept_back)
    slack = round(CUDA_SLACK * sum(row.bytes for row in rows))
    return (Row("CUDA context and libraries", CUDA_CONTEXT), Row("allocator slack", slack))


_PASSING = ("activations: ", "head: ", "backward ", "forward ", "one weight ")


def peak(setup: Setup) -> Phase:
    """The fullest moment of the device."""
    return max((p for p in phases(setup) if not p.on_host), key=lambda p: p.bytes)


def growth(setup: Setup, *, first_step: bool = False) -> Phase:
    """What training adds above the level after loading, at its fullest: all rows but the weights, base's and LoRA's."""
    fullest = max(
        (p for p in phases(setup, first_step=first_step) if not p.on_host and p.name != "load"), key=lambda p: p.bytes
    )
    there = ("weights: ", "LoRA weights", "modules_to_save: copies", "Python, torch", "CUDA context", "allocator slack")
    return Phase(fullest.name, tuple(row for row in fullest.rows if not row.name.startswith(there)))


# ---- operations ------------------------------------------------------------------------------------------------------


def flops_per_token(setup: Setup) -> float:
    """Of the body, forward and backward: 2 a parameter forward, 2 for the gradient of the input (the base is frozen),
    2 more where a layer is computed again; LoRA's own 6 a parameter."""
    s = setup.shape
    layer = s.linear_parameters
    lora = 6 * s.lora_parameters(setup.r, setup.targets)
    return 4 * s.layers * layer + 2 * min(setup.checkpoint_layers, s.layers) * layer + lora


def flops_per_taught_token(shape: Shape) -> float:
    """Of the head: 2 a parameter for the logits and 2 for the gradient."""
    return 4 * shape.vocab * shape.hidden


def flops_of_attention(shape: Shape, length: int, checkpointed: float) -> float:
    """Of a row of `length` tokens in all layers: two products of n^2 / 2 by q_width forward, five backward."""
    return (2 + 5 + 2 * checkpointed) * shape.layers * shape.q_width * length * length
