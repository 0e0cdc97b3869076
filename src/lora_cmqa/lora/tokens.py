"""Single rows of the embedding and of the head, trained beside LoRA.

A base model has never seen the tokens that open and close a turn: their rows are what they were at its birth, and LoRA
on the layers cannot change them. To train the whole embedding and head for two tokens is what filled the seed's card.

    embed_tokens [vocabulary, width]   .......im_start im_end...      2 rows trained, by PEFT's trainable_token_indices
    lm_head      [vocabulary, width]   .......im_start im_end...      2 rows trained (where it is not the embedding)

Untrained is a row that stands among those of tokens no text holds. The measure is the distance of a row of the input
embedding to the mean of such rows (Land and Bartolo 2024, "Fishing for Magikarp", arXiv 2405.05417).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.other import TrainableTokensWrapper

from ..data.template import ChatTemplate
from ..errors import AdapterError
from ..kernels.head import TrainedRows
from ..messages import say

_NEVER_USED = re.compile(r"<\W?(?:unused|extra|reserved)[a-z_]*?_?\d+\W?>")  # <unused3>, <|extra_204|>, ...
_FEWEST = 8  # rows of tokens that no text holds, to judge by


@dataclass(frozen=True, slots=True)
class Verdict:
    """`distance` of each asked id to the mean unused row; at most `cut` is untrained. None: it cannot be told."""

    distance: dict[int, float]
    cut: float | None

    @property
    def untrained(self) -> list[int]:
        return [i for i, d in self.distance.items() if self.cut is not None and d <= self.cut]


def choose_tokens(
    wanted: Sequence[str], model: Any, tokenizer: Any, template: ChatTemplate, *, chat_format: str | None = None
) -> tuple[list[int], str]:
    """The ids whose rows are to be trained, and a sentence that says why; `wanted` is nothing, auto, or tokens.

    auto takes those of the template's turn tokens that are untrained. A generation config whose `chat_format` is
    chatml is a chat model's (Qwen v1): its turns are known. What the model's folder is called decides nothing.
    """
    if not wanted:
        return [], ""
    if "auto" not in wanted:
        ids = ids_of(tokenizer, wanted)
        return ids, say("tokens.trained", tokens=" ".join(wanted), rows=len(ids), profile=say("tokens.profile"))
    if len(wanted) > 1:
        raise AdapterError(f"trainable_tokens: auto stands alone, got {' '.join(wanted)}", hint="One or the other.")
    names = " ".join(tokenizer.convert_ids_to_tokens(list(template.turn_ids)))
    if chat_format == "chatml":
        return [], say("tokens.chat_model", tokens=names)
    weight = model.get_input_embeddings().weight
    verdict = find_untrained(weight, template.turn_ids, unused_ids(tokenizer, len(weight)))
    if verdict.cut is None:
        return [], say("tokens.cannot_tell", tokens=names)
    found = verdict.untrained
    if not found:
        return [], say("tokens.known", tokens=names)
    names = " ".join(tokenizer.convert_ids_to_tokens(found))
    return found, say("tokens.untrained", tokens=names, rows=len(found), profile=say("tokens.profile"))


def find_untrained(weight: torch.Tensor, ids: Sequence[int], unused: Sequence[int]) -> Verdict:
    """Which of `ids` have rows of `weight` [vocabulary, width] that look like those of the tokens `unused`.

    near = the distance within which three quarters of the unused rows stand to their mean
    far  = the distance beyond which 99 of 100 other rows stand
    cut  = half way between, where near < far; else (random weights, say) nothing can be told
    """
    if len(unused) < _FEWEST:
        return Verdict({}, None)
    mean = weight[list(unused)].float().mean(0)
    distance = torch.cat([(part.float() - mean).norm(dim=1) for part in weight.detach().split(8192)]).cpu()
    others = torch.ones(len(distance), dtype=torch.bool)
    others[[*unused, *ids]] = False
    near = float(distance[list(unused)].quantile(0.75))
    far = float(distance[others].kthvalue(max(1, int(others.sum()) // 100)).values)
    return Verdict({i: float(distance[i]) for i in ids}, (near + far) / 2 if near < far else None)


def unused_ids(tokenizer: Any, rows: int) -> list[int]:
    """Ids of an embedding of `rows` rows that no text holds: beyond the tokenizer, or named <unused3>, <|extra_7|>."""
    named = {i for i, t in tokenizer.added_tokens_decoder.items() if _NEVER_USED.fullmatch(str(t))}
    known = max(tokenizer.get_vocab().values()) + 1
    return sorted({*named, *range(known, rows)})


def ids_of(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """The id of each of `tokens`. Raises AdapterError for one that is not a single token of this tokenizer."""
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if token not in vocabulary:
            raise AdapterError(
                f"trainable_tokens: {token!r} is no token of this tokenizer",
                hint="--trainable-tokens auto looks at the chat template's; '<|im_start|>' '<|im_end|>' names two.",
            )
    return [vocabulary[t] for t in dict.fromkeys(tokens)]


def trained_rows(wrapper: TrainableTokensWrapper) -> TrainedRows | None:
    """The rows that PEFT's wrapper puts in place of its matrix's; None where the adapter is switched off or merged."""
    layer = wrapper.token_adapter
    active = [a for a in layer.active_adapters if a in layer.trainable_tokens_delta]
    if layer.disable_adapters or layer.merged or not active:
        return None
    values = layer.trainable_tokens_delta[active[0]]  # PEFT lets one adapter be active here
    return TrainedRows(torch.tensor(layer.token_indices[active[0]], device=values.device), values)


def embed(embedding: Any, ids: torch.Tensor) -> torch.Tensor:
    """`embedding(ids)`: [tokens] -> [tokens, width]. Trained rows are laid over the frozen matrix's; PEFT's wrapper
    would copy the whole matrix for each forward, and make a gradient of its size."""
    rows = trained_rows(embedding) if isinstance(embedding, TrainableTokensWrapper) else None
    if rows is None:
        return embedding(ids)
    frozen = embedding.original_module
    x = frozen(ids)
    scale = getattr(frozen, "embed_scale", None)  # Gemma multiplies its embeddings
    values = rows.values.to(x.dtype) if scale is None else rows.values.to(x.dtype) * scale.to(x.dtype)
    match = ids[:, None] == rows.ids
    return torch.where(match.any(1, keepdim=True), match.to(x.dtype) @ values, x)


def token_indices(model: Any, ids: Sequence[int]) -> dict[str, list[int]]:
    """PEFT's trainable_token_indices for `ids`: rows of the embedding, and of the head where it is another matrix."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    wanted = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    names = {m: path.rsplit(".", 1)[-1] for path, m in model.named_modules() if m in wanted}
    return {names[m]: list(ids) for m in wanted}
