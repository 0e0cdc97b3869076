"""The doll's house: tiny models with random weights and a byte tokenizer, for tests, examples and docs.

    "tiny"  "tiny-qwen2"  "tiny-qwen3"  "tiny-llama"  "tiny-gemma3"       no download, no network

They are transformers' own classes, so whatever works on them works on their big sisters; each differs from the
others in what differs between the real ones:

    kind     layers  heads/kv  head_dim  head    besides
    qwen2    3       4 / 2     16        own     bias on q, k, v
    qwen3    2       4 / 2     32        tied    norm on q and k
    llama    2       4 / 1     16        own
    gemma3   4       4 / 1     32        tied    four norms a layer, embeddings x sqrt(hidden), window of 16 in 3 of 4
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ..data.template import CHATML
from .cache import quiet_transformers, write_once

TinyKind = Literal["qwen2", "qwen3", "llama", "gemma3"]
KINDS: tuple[str, ...] = get_args(TinyKind)

REVISION = 1  # part of the cached folder's name: raise it when what is written changes

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 256, 257, 258; a byte's id is its value


def tiny_model(kind: TinyKind = "qwen2", dtype: torch.dtype = torch.float32, *, seed: int = 0) -> PreTrainedModel:
    """A model of `kind` with seeded random weights: hidden 64, vocabulary 259, about 0.2 million parameters.

    The weights are drawn in float32, so that every dtype holds the same numbers. Logits have a standard deviation
    near 1; biases and norm weights are random too, so that a mistake with them shows.
    """
    common = {
        "vocab_size": 256 + len(SPECIALS),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": 258,
        "pad_token_id": 256,
    }
    if kind == "qwen2":
        config = Qwen2Config(**common, num_hidden_layers=3, num_key_value_heads=2, tie_word_embeddings=False)
        model: PreTrainedModel = Qwen2ForCausalLM(config)
    elif kind == "qwen3":
        config = Qwen3Config(
            **common, num_hidden_layers=2, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True
        )
        model = Qwen3ForCausalLM(config)
    elif kind == "llama":
        config = LlamaConfig(**common, num_hidden_layers=2, num_key_value_heads=1, tie_word_embeddings=False)
        model = LlamaForCausalLM(config)
    else:
        config = Gemma3TextConfig(
            **common,
            num_hidden_layers=4,
            num_key_value_heads=1,
            head_dim=32,
            query_pre_attn_scalar=32,
            sliding_window=16,
            layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        )
        model = Gemma3ForCausalLM(config)
    _random_weights(model, seed)
    return model.to(dtype).eval().requires_grad_(False)


def _random_weights(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 2:
                weight.copy_(noise / weight.shape[1] ** 0.5)
            elif name.endswith("bias") or isinstance(model, Gemma3ForCausalLM):
                weight.copy_(0.1 * noise)  # Gemma's norms multiply by 1 + weight
            else:
                weight.copy_(1 + 0.1 * noise)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the ChatML specials; every string encodes, decoding is exact.

    "好" -> [229, 165, 189]        "<|im_end|>" -> [258]
    """
    alphabet = byte_alphabet()
    core = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def byte_alphabet() -> list[str]:
    """The letter that byte-level BPE writes for each byte value (printable ones stand for themselves)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def tiny_folder(kind: TinyKind = "qwen2") -> Path:
    """The tiny model as a native folder in the user's cache (written on first use), so that plain PEFT loads it."""

    def build(folder: Path) -> None:
        model = tiny_model(kind)
        model.generation_config = GenerationConfig(eos_token_id=[258, 256], pad_token_id=256)
        with quiet_transformers():
            model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)

    return write_once(f"tiny-{kind}-{REVISION}", build)
