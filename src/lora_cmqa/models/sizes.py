"""What a decoder is made of, as numbers: named shapes, and a config.json of any family read as one. No torch.

    "Qwen-7B"  "Qwen/Qwen3-8B-Base"  ./a/folder  ->  Shape  ->  parameters, weights by role

    q k v   [heads * head_dim | kv_heads * head_dim, hidden]   + bias (Qwen v1, Qwen2)   + norm a head (Qwen3, Gemma 3)
    o       [hidden, heads * head_dim]
    gate up [ffn, hidden]        down [hidden, ffn]            norms: 2 of `hidden` a layer, 4 in Gemma 3

The numbers are those of the published config.json files; tests count transformers' own classes on the meta device.
"""

from __future__ import annotations

import difflib
import json
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import hub
from ..errors import ModelError

# The first Qwen v1 configs (August 2023) used GPT-2's words.
QWEN1_EARLY_KEYS = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "ffn_hidden_size": "intermediate_size",
    "padded_vocab_size": "vocab_size",
}

# Names of Qwen v1's modules -> the same layers by the names used here.
QWEN_V1_NAMES: dict[str, tuple[str, ...]] = {
    "c_attn": ("q_proj", "k_proj", "v_proj"),
    "c_proj": ("o_proj", "down_proj"),  # the same name stood in attention and in the MLP
    "w1": ("up_proj",),
    "w2": ("gate_proj",),
    "wte": ("embed_tokens",),
    "lm_head": ("lm_head",),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A pre-norm decoder with grouped-query attention and a gated MLP."""

    name: str
    family: str  # qwen1, qwen2, qwen3, llama, gemma3
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    tied: bool  # the head is the embedding
    dtype: str = "bfloat16"  # as published
    window: int | None = None  # tokens that a windowed layer sees
    window_layers: int = 0

    @property
    def qkv_bias(self) -> bool:
        return self.family in ("qwen1", "qwen2")

    @property
    def head_norm(self) -> bool:
        """q and k are normalised per head (two vectors of head_dim a layer)."""
        return self.family in ("qwen3", "gemma3")

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """{name: (out, in)} of a layer's linear weights, by the names used here."""
        return {
            "q_proj": (self.q_width, self.hidden),
            "k_proj": (self.kv_width, self.hidden),
            "v_proj": (self.kv_width, self.hidden),
            "o_proj": (self.hidden, self.q_width),
            "gate_proj": (self.ffn, self.hidden),
            "up_proj": (self.ffn, self.hidden),
            "down_proj": (self.hidden, self.ffn),
        }

    @property
    def linear_parameters(self) -> int:
        """Of one layer, in its seven matrices: what a quantised base stores in fewer bits."""
        return sum(out * inner for out, inner in self.linears.values())

    @property
    def layer_parameters(self) -> int:
        bias = self.q_width + 2 * self.kv_width if self.qkv_bias else 0
        norms = (4 if self.family == "gemma3" else 2) * self.hidden + (2 * self.head_dim if self.head_norm else 0)
        return self.linear_parameters + bias + norms

    @property
    def embedding_parameters(self) -> int:
        return self.vocab * self.hidden

    @property
    def head_parameters(self) -> int:
        return 0 if self.tied else self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        return self.embedding_parameters + self.head_parameters + self.layers * self.layer_parameters + self.hidden

    def lora_parameters(self, r: int, targets: tuple[str, ...] | None = None) -> int:
        """A [r, in] and B [out, r] on each of `targets` (None: all seven) in every layer."""
        chosen = self.linears if targets is None else {t: self.linears[t] for t in targets}
        return self.layers * sum(r * (out + inner) for out, inner in chosen.values())

    def with_layers(self, layers: int) -> Shape:
        """The first `layers` layers only."""
        if not 1 <= layers <= self.layers:
            raise ModelError(f"num_hidden_layers is {layers}; {self.name} has {self.layers}")
        return replace(self, layers=layers, window_layers=min(layers, self.window_layers * layers // self.layers))


def _qwen2(name: str, hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int, tied: bool) -> Shape:
    return Shape(name, "qwen2", vocab, hidden, layers, heads, kv_heads, hidden // heads, ffn, tied)


def _qwen3(name: str, hidden: int, layers: int, heads: int, ffn: int, tied: bool) -> Shape:
    return Shape(name, "qwen3", 151936, hidden, layers, heads, 8, 128, ffn, tied)


def _gemma3(name: str, vocab: int, hidden: int, layers: int, heads: int, kv: int, ffn: int, window: int) -> Shape:
    windowed = layers - layers // 6  # every sixth layer sees all tokens
    return Shape(name, "gemma3", vocab, hidden, layers, heads, kv, 256, ffn, True, "bfloat16", window, windowed)


_SHAPES = (
    Shape("Qwen-1.8B", "qwen1", 151936, 2048, 24, 16, 16, 128, 5504, False),
    Shape("Qwen-7B", "qwen1", 151936, 4096, 32, 32, 32, 128, 11008, False),
    Shape("Qwen-14B", "qwen1", 152064, 5120, 40, 40, 40, 128, 13696, False),
    _qwen2("Qwen2.5-0.5B", 896, 24, 14, 2, 4864, 151936, True),
    _qwen2("Qwen2.5-1.5B", 1536, 28, 12, 2, 8960, 151936, True),
    _qwen2("Qwen2.5-3B", 2048, 36, 16, 2, 11008, 151936, True),
    _qwen2("Qwen2.5-7B", 3584, 28, 28, 4, 18944, 152064, False),
    _qwen2("Qwen2.5-14B", 5120, 48, 40, 8, 13824, 152064, False),
    _qwen2("Qwen2.5-32B", 5120, 64, 40, 8, 27648, 152064, False),
    _qwen3("Qwen3-0.6B", 1024, 28, 16, 3072, True),
    _qwen3("Qwen3-1.7B", 2048, 28, 16, 6144, True),
    _qwen3("Qwen3-4B", 2560, 36, 32, 9728, True),
    _qwen3("Qwen3-8B", 4096, 36, 32, 12288, False),
    _qwen3("Qwen3-14B", 5120, 40, 40, 17408, False),
    _qwen3("Qwen3-32B", 5120, 64, 64, 25600, False),
    _gemma3("gemma-3-270m", 262144, 640, 18, 4, 1, 2048, 512),
    _gemma3("gemma-3-1b", 262144, 1152, 26, 4, 1, 6912, 512),
    _gemma3("gemma-3-4b", 262208, 2560, 34, 8, 4, 10240, 1024),  # the text decoder; the image tower is not loaded here
    Shape("Meta-Llama-3-8B", "llama", 128256, 4096, 32, 32, 8, 128, 14336, False),
    # The built-in ones (tiny.py).
    Shape("tiny-qwen2", "qwen2", 259, 64, 3, 4, 2, 16, 128, False, "float32"),
    Shape("tiny-qwen3", "qwen3", 259, 64, 2, 4, 2, 32, 128, True, "float32"),
    Shape("tiny-llama", "llama", 259, 64, 2, 4, 1, 16, 128, False, "float32"),
    Shape("tiny-gemma3", "gemma3", 259, 64, 4, 4, 1, 32, 128, True, "float32", 16, 3),
)
SHAPES: dict[str, Shape] = {s.name: s for s in _SHAPES}
_ALSO = {"embedded": "gemma-3-270m", "tiny": "tiny-qwen2", "llama-3-8b": "Meta-Llama-3-8B"}
# Variants of one shape: "-Instruct" and the like change weights, not sizes.
_VARIANTS = ("-instruct", "-chat", "-base", "-it", "-pt")


def shape_of(name_or_path: str | Path) -> Shape:
    """The shape of a model: its folder's config.json, a named shape, or the hub's config.json.

    A local folder and a named shape open no socket.
    Raises ModelError: nothing of that name, a family that is not one of the five, a key that is missing.
    """
    name = str(name_or_path)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return shape_from_config(folder / "config.json")
    known = {s.lower(): s for s in SHAPES} | _ALSO
    wanted = name.rsplit("/", 1)[-1].lower()
    for variant in _VARIANTS:
        wanted = wanted.removesuffix(variant)
    if wanted in known:
        return SHAPES[known[wanted]]
    if name.count("/") == 1 and not folder.parent.is_dir() and not name.startswith((".", "~", "/")):
        return shape_from_config(hub.fetch_config(name), name=name)
    near = difflib.get_close_matches(wanted, known, n=2, cutoff=0.5)
    raise ModelError(
        f"there is no model, folder or named shape {name!r}",
        hint=(f"Did you mean {' or '.join(near)}? " if near else "") + f"Named shapes: {', '.join(SHAPES)}.",
    )


# ---- a config.json -> a shape ----------------------------------------------------------------------------------------

_FAMILIES = {
    "qwen": "qwen1",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "llama": "llama",
    "gemma3_text": "gemma3",
    "gemma3": "gemma3",
}


def is_qwen1(config: dict[str, Any]) -> bool:
    """Whether a config.json is a Qwen v1 checkpoint's."""
    return config.get("model_type") == "qwen" or "QWenLMHeadModel" in (config.get("architectures") or [])


def shape_from_config(file: str | Path, *, name: str | None = None) -> Shape:
    """Read the numbers that decide memory and time. Raises ModelError naming the key that is absent or not a number."""
    file = Path(file)
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError("no config.json", file=file.parent, hint="A model's folder holds config.json.") from None
    except (OSError, ValueError) as e:
        raise ModelError(f"not readable JSON: {e}", file=file) from None
    if not isinstance(raw, dict):
        raise ModelError(f"an object is expected, found {type(raw).__name__}", file=file)
    family = "qwen1" if is_qwen1(raw) else _FAMILIES.get(str(raw.get("model_type")))
    if family is None:
        raise ModelError(
            f"model type {raw.get('model_type')!r} has no plan here",
            file=file,
            field="model_type",
            hint=f"Families that are planned: {', '.join(_FAMILIES)}.",
        )
    raw |= raw.get("text_config") or {}  # Gemma 3 with an image tower
    return _qwen1_shape(raw, file, name) if family == "qwen1" else _native_shape(raw, family, file, name)


def with_late_keys(raw: dict[str, Any], file: Path) -> dict[str, Any]:
    """A Qwen v1 config with the later of both names of each key. Raises ModelError where both stand and disagree."""
    late = dict(raw)
    for early, name in QWEN1_EARLY_KEYS.items():
        if early not in raw:
            continue
        # Some early configs count the tokenizer's entries as vocab_size: the rows are padded_vocab_size.
        if early != "padded_vocab_size" and raw.get(name, raw[early]) != raw[early]:
            raise ModelError(f"{raw[early]!r}, but {name} is {raw[name]!r}: they are one key", file=file, field=early)
        late[name] = late.pop(early)
    return late


def _qwen1_shape(raw: dict[str, Any], file: Path, name: str | None) -> Shape:
    raw = with_late_keys(raw, file)
    hidden, heads = _count(raw, "hidden_size", file), _count(raw, "num_attention_heads", file)
    return Shape(
        name or file.parent.name,
        "qwen1",
        vocab=_count(raw, "vocab_size", file),
        hidden=hidden,
        layers=_count(raw, "num_hidden_layers", file),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=_count(raw, "intermediate_size", file) // 2,  # theirs counts w1 and w2 together
        tied=False,
        dtype=_dtype(raw, file),
    )


def _native_shape(raw: dict[str, Any], family: str, file: Path, name: str | None) -> Shape:
    hidden, heads = _count(raw, "hidden_size", file), _count(raw, "num_attention_heads", file)
    layers = _count(raw, "num_hidden_layers", file)
    kinds = raw.get("layer_types") or []
    windowed = kinds[:layers].count("sliding_attention")
    if family == "gemma3" and not kinds:
        windowed = layers - layers // int(raw.get("sliding_window_pattern") or 6)
    return Shape(
        name or file.parent.name,
        family,
        vocab=_count(raw, "vocab_size", file),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=_count(raw, "num_key_value_heads", file) if "num_key_value_heads" in raw else heads,
        head_dim=int(raw.get("head_dim") or hidden // heads),
        ffn=_count(raw, "intermediate_size", file),
        tied=bool(raw.get("tie_word_embeddings", family == "gemma3")),
        dtype=_dtype(raw, file),
        window=int(raw["sliding_window"]) if windowed and raw.get("sliding_window") else None,
        window_layers=windowed,
    )


def _count(raw: dict[str, Any], key: str, file: Path) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelError(f"a positive whole number is expected, found {value!r}", file=file, field=key)
    return value


def _dtype(raw: dict[str, Any], file: Path) -> str:
    if raw.get("bf16") is True:
        return "bfloat16"  # Qwen v1's own key
    found = str(raw.get("dtype") or raw.get("torch_dtype") or "float32")
    if found not in ("float32", "bfloat16", "float16", "float64"):
        raise ModelError(f"{found!r} is no dtype of weights", file=file, field="dtype")
    return found


def cpu_computes_in_bfloat16() -> bool:
    """Whether this machine's processor has bfloat16 instructions (elsewhere they would be emulated)."""
    if platform.system() != "Linux":
        return False
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16", "svebf16"})  # x86, then ARM
