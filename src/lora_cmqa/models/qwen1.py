"""Qwen v1 (QWenLMHeadModel, 2023) read natively: no Python file of the checkpoint is ever run.

    config.json      -> Qwen2Config          read_config, native_config
    *.safetensors    -> Qwen2ForCausalLM     one table of names (TABLE), one tensor after the other
    qwen.tiktoken    -> PreTrainedTokenizerFast

    theirs  transformer.h.3.attn.c_attn.weight   [3 * hidden, hidden]    rows q, then k, then v
    ours    model.layers.3.self_attn.q_proj.weight  k_proj  v_proj       [hidden, hidden] each

Up to `seq_length` tokens this is plain Qwen2. Above it the original, in evaluation only, rescales the rotary base by
the length of the row (dynamic NTK) and sharpens queries (logn); `Qwen1Rotary` and `Qwen1Attention` do the same.
"""

from __future__ import annotations

import base64
import functools
import json
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from ..data.template import CHATML, without_surrogates
from ..errors import ModelError
from ..kernels.quantized import Kind
from .cache import appears_complete
from .depth import check_layers, layer_of, refuse_more_layers
from .fingerprint import CONVERTED, converted_from, fingerprint
from .quantized import QuantizedLinear, place_quantized
from .sizes import is_qwen1, with_late_keys
from .tiny import byte_alphabet

# ---- config ----------------------------------------------------------------------------------------------------------

# What the original can be told and no published checkpoint tells it: refused by name, never guessed.
_ONLY = {
    "no_bias": True,
    "pos_emb": "rotary",
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
    "apply_residual_connection_post_layernorm": False,
}


@dataclass(frozen=True)
class Qwen1Config:
    """What decides the computation. `ffn` is the width of each projection: intermediate_size // 2."""

    hidden: int
    layers: int
    heads: int
    ffn: int
    vocab: int
    theta: float
    eps: float
    seq_length: int  # tokens; dynamic NTK and logn act above it
    max_positions: int
    dynamic_ntk: bool
    logn: bool


def read_config(folder: str | Path) -> Qwen1Config:
    """Raises ModelError naming the key that is missing or that no checkpoint of this family has."""
    file = Path(folder) / "config.json"
    raw = _read_json(file)
    if not is_qwen1(raw):
        raise ModelError(f"model type {raw.get('model_type')!r} is not Qwen v1 (qwen)", file=file, field="model_type")
    raw = with_late_keys(raw, file)
    for key, only in _ONLY.items():
        if raw.get(key, only) != only:
            raise ModelError(f"{raw[key]!r} is not built; every Qwen v1 has {only!r}", file=file, field=key)
    for key in ("visual", "audio"):  # Qwen-VL, Qwen-Audio: the same architecture's name, other inputs
        if raw.get(key):
            raise ModelError("only text models are read", file=file, field=key)
    if raw.get("quantization_config"):
        raise ModelError("the weights are quantised (Int4/Int8)", file=file, hint="Take the checkpoint in bf16.")

    def number(key: str) -> float:
        value = raw.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            raise ModelError(f"a positive number is expected, found {value!r}", file=file, field=key)
        return value

    hidden, heads = int(number("hidden_size")), int(number("num_attention_heads"))
    width = number("kv_channels") if "kv_channels" in raw else hidden // heads
    if width * heads != hidden:
        raise ModelError(
            f"{heads} heads of {width} (kv_channels) are not hidden_size {hidden}", file=file, field="kv_channels"
        )
    return Qwen1Config(
        hidden=hidden,
        layers=int(number("num_hidden_layers")),
        heads=heads,
        ffn=int(number("intermediate_size")) // 2,
        vocab=int(number("vocab_size")),
        theta=float(number("rotary_emb_base")),
        eps=number("layer_norm_epsilon"),
        seq_length=int(number("seq_length")),
        max_positions=int(number("max_position_embeddings" if "max_position_embeddings" in raw else "seq_length")),
        dynamic_ntk=bool(raw.get("use_dynamic_ntk", False)),
        logn=bool(raw.get("use_logn_attn", False)),
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ModelError(f"not readable: {e}", file=file) from None
    if not isinstance(content, dict):
        raise ModelError(f"an object is expected, found {type(content).__name__}", file=file)
    return content


def native_config(v1: Qwen1Config, *, num_hidden_layers: int | None = None) -> Qwen2Config:
    """The Qwen2 config that computes the same up to seq_length (with neither NTK nor logn: at every length)."""
    config = Qwen2Config(
        vocab_size=v1.vocab,
        hidden_size=v1.hidden,
        intermediate_size=v1.ffn,
        num_hidden_layers=num_hidden_layers or v1.layers,
        num_attention_heads=v1.heads,
        num_key_value_heads=v1.heads,
        max_position_embeddings=v1.seq_length if v1.dynamic_ntk or v1.logn else v1.max_positions,
        rms_norm_eps=v1.eps,
        rope_parameters={"rope_type": "default", "rope_theta": v1.theta},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=_END,
        pad_token_id=_END,
    )
    config.architectures = ["Qwen2ForCausalLM"]
    return config


# ---- weights ---------------------------------------------------------------------------------------------------------

# Theirs within a layer -> ours; several of ours share the rows equally, in this order.
TABLE: dict[str, tuple[str, ...]] = {
    "ln_1.weight": ("input_layernorm.weight",),
    "attn.c_attn.weight": tuple(f"self_attn.{p}_proj.weight" for p in "qkv"),
    "attn.c_attn.bias": tuple(f"self_attn.{p}_proj.bias" for p in "qkv"),
    "attn.c_proj.weight": ("self_attn.o_proj.weight",),
    "ln_2.weight": ("post_attention_layernorm.weight",),
    "mlp.w1.weight": ("mlp.up_proj.weight",),  # out = c_proj(w1(x) * silu(w2(x)))
    "mlp.w2.weight": ("mlp.gate_proj.weight",),
    "mlp.c_proj.weight": ("mlp.down_proj.weight",),
}
OUTSIDE = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}


def native_names(name: str) -> tuple[str, ...]:
    """Our names for the tensor `name`, each an equal share of its rows; () for one without a place.

    transformer.h.3.mlp.w1.weight -> (model.layers.3.mlp.up_proj.weight,)
    """
    if name in OUTSIDE:
        return (OUTSIDE[name],)
    parts = name.split(".", 3)
    if parts[:2] != ["transformer", "h"] or len(parts) < 4 or not parts[2].isdigit():
        return ()
    return tuple(f"model.layers.{parts[2]}.{ours}" for ours in TABLE.get(parts[3], ()))


def native_tensors(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """(our name, its rows) for one tensor of theirs. Raises ModelError for a tensor without a place."""
    ours = native_names(name)
    if not ours:
        if name.endswith((".attn.bias", ".masked_bias", "rotary_emb.inv_freq")):  # constants that old code saved
            return
        raise ModelError(f"the tensor {name} has no place in Qwen v1's table")
    if not tensor.is_floating_point() or tensor.dim() == 0 or len(tensor) % len(ours):
        raise ModelError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; numbers in {len(ours)} equal shares are expected"
        )
    yield from zip(ours, tensor.chunk(len(ours)), strict=True)


def weight_files(folder: Path) -> list[Path]:
    """The shards in order, of the first form that is whole: safetensors, then .bin. Raises ModelError for none, or for
    a shard that is missing."""
    incomplete = None
    for pattern, index in (
        ("*.safetensors", "model.safetensors.index.json"),
        ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
    ):
        files = sorted(folder.glob(pattern))
        if (folder / index).exists():
            named = _named_in(folder / index)
            missing = [n for n in named if not (folder / n).is_file()]
            if missing:
                said = f"{len(missing)} of {len(named)} weight files are missing: {missing[0]}"
                incomplete = incomplete or ModelError(said, file=folder)
                continue
            files = [folder / n for n in named]
        if files:
            return files
    raise incomplete or ModelError("no *.safetensors and no pytorch_model*.bin", file=folder)


def _named_in(index: Path) -> list[str]:
    """The files that an index names. They lie beside it, or it is refused."""
    held = _read_json(index).get("weight_map")
    if not isinstance(held, dict) or not held:
        raise ModelError("it names no weights", file=index, field="weight_map")
    for name in held.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(f"{name!r} is no file beside it", file=index, field="weight_map")
    return sorted(set(held.values()))


def read_shard(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(our name, tensor as stored) of one shard, one tensor in memory after the other.

    A .bin shard is opened with weights_only: it holds tensors or it is refused.
    """
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118  (not a dict)
                    yield from native_tensors(name, shard.get_tensor(name))
        else:
            mapped = zipfile.is_zipfile(file)  # the form before torch 1.6 is read whole
            for name, tensor in torch.load(file, map_location="cpu", weights_only=True, mmap=mapped).items():
                yield from native_tensors(name, tensor)
    except ModelError as e:
        raise ModelError(e.message, file=file) from None
    except (SafetensorError, RuntimeError, EOFError, OSError) as e:
        raise ModelError(f"the weight file is damaged: {_first_line(e)}", file=file) from None
    except Exception as e:  # pickle.UnpicklingError and its kin: something else than tensors
        raise ModelError(
            f"not a file of tensors: {_first_line(e)}", file=file, hint="Take the safetensors form."
        ) from None


def _first_line(e: Exception) -> str:
    return next(iter(str(e).splitlines()), type(e).__name__)[:200]


def load(
    folder: str | Path,
    dtype: torch.dtype,
    *,
    num_hidden_layers: int | None = None,
    quantization: Kind | None = None,
    device: torch.device | None = None,
) -> Qwen2ForCausalLM:
    """The checkpoint as transformers' Qwen2ForCausalLM, on the CPU unless a `device` is given: never more than one
    tensor above its size. `quantization` keeps the layers' matrices in so few bits from the moment they are read.

    `num_hidden_layers` keeps the first so many layers (the seed's edit). Raises ModelError: a tensor that is missing,
    without a place, or of another shape than the config says.
    """
    folder = Path(folder)
    v1 = read_config(folder)
    layers = check_layers(num_hidden_layers, v1.layers)
    config = native_config(v1, num_hidden_layers=layers)
    config._attn_implementation = "sdpa"
    config.dtype = dtype
    config._name_or_path = str(folder)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    if quantization:
        place_quantized(model, quantization)
    for shard in _shards(folder, model, dtype, v1.layers):
        for name, value in shard:
            owner, _, leaf = name.rpartition(".")
            module, value = model.get_submodule(owner), value.to(device)
            if leaf == "weight" and isinstance(module, QuantizedLinear):
                module.take(value)
            else:
                setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = Qwen1Rotary(config, v1)
    for layer in model.model.layers:
        if v1.logn:
            layer.self_attn.__class__ = Qwen1Attention
            layer.self_attn.seq_length = v1.seq_length
    model.model.register_forward_pre_hook(_before_body, with_kwargs=True)
    model.model.register_forward_hook(_after_body, always_call=True)
    model.generation_config = native_generation_config(folder)
    return model.eval()


def _shards(
    folder: Path, model: Qwen2ForCausalLM, dtype: torch.dtype | None, layers: int
) -> Iterator[Iterator[tuple[str, torch.Tensor]]]:
    """File after file, (our name, tensor in `dtype`; None: as stored) of each parameter of `model` in it. `model` may
    lie on the meta device and have fewer than the checkpoint's `layers`.

    Raises ModelError for a tensor too many, one too few, or another shape.
    """
    waiting = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for file in weight_files(folder):
        yield _fitting(file, waiting, dtype, model.config.num_hidden_layers, layers)
    if waiting:
        raise ModelError(f"{len(waiting)} weights are missing, the first is {next(iter(waiting))}", file=folder)


def _fitting(
    file: Path, waiting: dict[str, tuple[int, ...]], dtype: torch.dtype | None, kept: int, layers: int
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in read_shard(file):
        if kept <= layer_of(name) < layers:  # cut off by num_hidden_layers
            continue
        refuse_more_layers([name], layers, file=file.parent / "config.json")
        if name not in waiting:
            raise ModelError(f"the tensor {name} is there twice, or the config has no place for it", file=file)
        if tuple(tensor.shape) != waiting.pop(name):
            raise ModelError(f"{name} has the shape {tuple(tensor.shape)}; the config says otherwise", file=file)
        # The copy cuts q, k and v loose from the joined tensor and from the file's memory map.
        yield name, tensor.to(dtype or tensor.dtype, copy=True, memory_format=torch.contiguous_format)


def native_generation_config(folder: str | Path) -> GenerationConfig:
    """The original's sampling, and both ends of an answer: <|im_end|> of a turn, <|endoftext|> of a text."""
    file = Path(folder) / "generation_config.json"
    raw = _read_json(file) if file.exists() else {}
    kept = {k: raw[k] for k in ("do_sample", "top_k", "top_p", "repetition_penalty", "max_new_tokens") if k in raw}
    try:
        return GenerationConfig(**kept, eos_token_id=[_IM_END, _END], pad_token_id=_END)
    except (TypeError, ValueError) as e:
        raise ModelError(_first_line(e), file=file) from None


# ---- above seq_length ------------------------------------------------------------------------------------------------


_ALPHAS = "qwen1_alphas"  # an attribute of transformers' cache


class Qwen1Rotary(nn.Module):
    """Rotary angles with dynamic NTK: a row longer than seq_length gets the base theta * alpha^(d / (d - 2)),

        alpha = 2^ceil(log2(length / seq_length) + 1) - 1        1 up to seq_length; in evaluation only

    forward(x, position_ids [rows, tokens]) -> cos, sin [rows, tokens, head_dim] in x's dtype; the angles are float32
    as the original's (float64 for a float64 model). Rows packed end to end (positions that start again at 0) count
    each by its own length. With a cache, alpha stays what it was when the row began, as in the original; the cache
    carries it (_before_body, _after_body).
    """

    def __init__(self, config: Qwen2Config, v1: Qwen1Config) -> None:
        super().__init__()
        self.config, self.v1 = config, v1
        self.dim = v1.hidden // v1.heads
        self.cached: torch.Tensor | None = None  # alpha of each row of the cache that the body goes on from
        self.latest: torch.Tensor | None = None  # of the rows of the last call

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        positions = position_ids.to(x.device)
        alphas = self._alphas(positions) if self.v1.dynamic_ntk and not self.training else None
        exact = torch.promote_types(x.dtype, torch.float32)
        angles = positions[..., None].to(exact) * self._inv_freq(1.0, exact, x.device)
        if alphas is not None:
            for alpha in alphas.unique().tolist():
                if alpha != 1.0:
                    scaled = positions[..., None].to(exact) * self._inv_freq(alpha, exact, x.device)
                    angles = torch.where((alphas == alpha)[..., None], scaled, angles)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def _inv_freq(self, alpha: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        theta = self.v1.theta * alpha ** (self.dim / (self.dim - 2))
        return (1.0 / (theta ** (torch.arange(0, self.dim, 2, dtype=dtype) / self.dim))).to(device)

    def _alphas(self, positions: torch.Tensor) -> torch.Tensor:
        """float [rows, tokens]."""
        if not bool((positions == 0).any()):  # goes on from a cache; without one (the engine): rows up to seq_length
            self.latest = torch.ones(len(positions)) if self.cached is None else self.cached
            return self.latest.to(positions.device)[:, None].expand(positions.shape)  # one cached row: of all
        segment = (positions == 0).long().cumsum(1)
        length = torch.zeros(len(positions), int(segment.max()) + 1, dtype=torch.long, device=positions.device)
        length = length.scatter_reduce(1, segment, positions + 1, "amax").gather(1, segment)
        alphas = torch.ones(positions.shape, device=positions.device)
        for n in length.unique().tolist():
            if n > self.v1.seq_length:
                alphas[length == n] = 2 ** math.ceil(math.log2(n / self.v1.seq_length) + 1) - 1
        self.latest = alphas[torch.arange(len(alphas)), positions.argmax(1)]
        return alphas


class Qwen1Attention(Qwen2Attention):
    """Qwen2's attention; in evaluation a query at position i > seq_length (from 1) is scaled by log i / log seq_length.

    The scale is laid on the output of whatever module q_proj is at that moment, so LoRA's part is scaled too.
    """

    seq_length: int

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        positions = kwargs.get("position_ids")
        if self.training or positions is None or int(positions.max()) < self.seq_length:
            return super().forward(hidden_states, *args, **kwargs)
        logn = ((positions + 1).double().log() / math.log(self.seq_length)).clamp(min=1.0)[..., None]
        hook = self.q_proj.register_forward_hook(lambda _, __, q: q * logn.to(q))
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            hook.remove()


def _before_body(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Rows of a padded batch count by their own lengths: transformers alone would count the padding too. Rows that go
    on from a cache have the alpha that it carries."""
    mask, cache = kwargs.get("attention_mask"), kwargs.get("cache", kwargs.get("past_key_values"))  # until 5.24
    module.rotary_emb.cached = getattr(cache, _ALPHAS, None)
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and kwargs.get("position_ids") is None:
        seen = cache.get_seq_length() if cache is not None else 0
        kwargs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, seen:]
        kwargs["position_ids"] = kwargs["position_ids"].masked_fill(mask[:, seen:] == 0, 0)
    return args, kwargs


def _after_body(module: Any, _: Any, output: Any) -> None:
    cache = getattr(output, "cache", None) or getattr(output, "past_key_values", None)
    if cache is not None:
        setattr(cache, _ALPHAS, module.rotary_emb.latest)
    module.rotary_emb.cached = module.rotary_emb.latest = None


# ---- tokenizer -------------------------------------------------------------------------------------------------------

_END, _IM_START, _IM_END = 151643, 151644, 151645
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Qwen1Tokenizer(PreTrainedTokenizerFast):
    """A fast tokenizer that, as the original, turns a lone surrogate into U+FFFD (the library alone refuses it)."""

    def _encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> Any:
        return super()._encode_plus(_valid(text), _valid(text_pair), **kwargs)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> Any:
        """Saved as a plain tokenizers-library tokenizer: the ids are the same, and anything can load it."""
        files = super().save_pretrained(save_directory, **kwargs)
        file = Path(save_directory) / "tokenizer_config.json"
        content = json.loads(file.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        return files


def _valid(text: Any) -> Any:
    """Each string of a text, a pair or a batch, without lone surrogates."""
    if isinstance(text, str):
        return without_surrogates(text)
    if isinstance(text, (list, tuple)):
        return type(text)(_valid(t) for t in text)
    return text


def native_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """qwen.tiktoken -> a fast tokenizer: 151,643 ranks and 208 specials.

    `tokenizer(text)` recognises specials in the text, as the original does by default; split_special_tokens=True
    reads them as text. Nothing is added. Raises ModelError where the file is missing or not what it says.
    """
    core = Tokenizer(_bpe(Path(folder) / "qwen.tiktoken"))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    # normalized: the original composes the whole text before it looks for specials.
    core.add_special_tokens([AddedToken(s, special=True, normalized=True) for s in SPECIALS])
    return Qwen1Tokenizer(
        tokenizer_object=core,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
        model_max_length=read_config(folder).seq_length if (Path(folder) / "config.json").exists() else 8192,
    )


def _bpe(file: Path) -> models.BPE:
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise ModelError("no qwen.tiktoken", file=file.parent, hint="Copy it from the original checkpoint.") from None
    try:
        vocabulary, merges = _vocabulary(content)
    except ModelError as e:
        raise ModelError(e.message, file=file) from None
    return models.BPE(vocab=vocabulary, merges=merges)


@functools.lru_cache(maxsize=1)  # two seconds; one process often opens base, run and merged model in turn
def _vocabulary(content: bytes) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The tokens, spelled as byte-level BPE spells them, and the merge that makes each of more than one byte."""
    ranks = _read_ranks(content)
    letters = byte_alphabet()
    spelled = {token: "".join(letters[b] for b in token) for token in ranks}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            left, right = _parts(token, rank, ranks)
            merges.append((spelled[left], spelled[right]))
    return {spelled[t]: r for t, r in ranks.items()}, merges


def _read_ranks(content: bytes) -> dict[bytes, int]:
    try:
        lines = content.splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    except ValueError as e:
        raise ModelError(f"not a tiktoken file: {e}") from None
    if len(ranks) != _END or sorted(ranks.values()) != list(range(_END)):
        raise ModelError(f"{len(ranks):,} tokens; Qwen v1 has {_END:,}, ranked 0 to {_END - 1:,}")
    return ranks


def _parts(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens whose merge makes `token`: BPE on its bytes with the lower ranks only."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
        best = min(pairs)
        if best >= rank:
            raise ModelError(f"token {rank} cannot be merged from lower ones")
        at = pairs.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


# ---- out again -------------------------------------------------------------------------------------------------------


def convert(source: str | Path, out: str | Path, dtype: str = "auto", *, num_hidden_layers: int | None = None) -> Path:
    """A Qwen v1 folder -> a native Qwen2 folder that any tool loads; returns `out`.

    Shard by shard, in the stored dtype (dtype "auto") or cast once; with `num_hidden_layers` only the first so many
    layers. The native model is exact up to seq_length, which becomes its max_position_embeddings. An `out` that holds
    the same already is left as it is.

    Raises ModelError: not a Qwen v1 folder, a tensor that is missing or without a place; RunError: `out` is not empty.
    """
    folder, out = Path(source), Path(out)
    if not folder.is_dir():
        raise ModelError("no such folder", file=folder)
    v1 = read_config(folder)
    layers = check_layers(num_hidden_layers, v1.layers)
    source_is = fingerprint(folder) | {"num_hidden_layers": layers, "asked_dtype": dtype}
    if converted_from(out) == source_is:  # done already
        return out
    with appears_complete(out) as made:
        config = native_config(v1, num_hidden_layers=layers)
        config.dtype = _write_shards(folder, made, v1, config, None if dtype == "auto" else getattr(torch, dtype))
        config.save_pretrained(made)
        native_generation_config(folder).save_pretrained(made)
        native_tokenizer(folder).save_pretrained(made)
        (made / CONVERTED).write_text(json.dumps(source_is, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return out


def _write_shards(
    folder: Path, out: Path, v1: Qwen1Config, config: Qwen2Config, dtype: torch.dtype | None
) -> torch.dtype:
    """One native shard for each of theirs that holds something kept, and the index. Returns the dtype written."""
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    shards: list[list[str]] = []
    size = 0
    for tensors in _shards(folder, model, dtype, v1.layers):
        shard = dict(tensors)
        if not shard:
            continue
        size += sum(t.nbytes for t in shard.values())
        written = next(iter(shard.values())).dtype
        save_file(shard, out / f"{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        del shard  # before the next one is read
    if len(shards) == 1:
        (out / "0").rename(out / "model.safetensors")
        return written
    where: dict[str, str] = {}
    for number, held in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (out / f"{number}").rename(out / name)
        where |= dict.fromkeys(held, name)
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return written
