"""From logits to a token.

    logits -> repetition penalty -> (temperature 0: the largest)
                                 -> / temperature -> top-k -> top-p -> softmax -> draw

The order and the meaning of each knob are those of transformers' logits processors and warpers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import ConfigError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    max_new_tokens: int = 256
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0  # keep the fewest tokens whose probability reaches top_p
    top_k: int = 0  # keep the k likeliest; 0 keeps all
    repetition_penalty: float = 1.0  # > 1 makes every token already seen less likely (arXiv 1909.05858, section 4.1)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("max_new_tokens", self.max_new_tokens, 1, 1_000_000),
            ("temperature", self.temperature, 0, 100),
            ("top_p", self.top_p, 1e-6, 1),
            ("top_k", self.top_k, 0, 10**9),
            ("repetition_penalty", self.repetition_penalty, 1e-3, 100),
        ):
            if not low <= value <= high:
                raise ConfigError(f"{name} is {value}; it must lie in {low:g} .. {high:g}")

    @property
    def is_plain_greedy(self) -> bool:
        return self.temperature == 0 and self.repetition_penalty == 1


def next_token(logits: torch.Tensor, params: SamplingParams, seen: Sequence[int], generator: torch.Generator) -> int:
    """logits [vocabulary] of any float dtype; `seen`: prompt and answer so far. `generator` on the CPU."""
    scores = logits.detach().float().cpu()
    if params.repetition_penalty != 1 and seen:
        index = torch.tensor(sorted(set(seen)))
        value = scores[index]
        scores[index] = torch.where(value > 0, value / params.repetition_penalty, value * params.repetition_penalty)
    if params.temperature == 0:
        return int(scores.argmax())
    scores = scores / params.temperature
    if 0 < params.top_k < len(scores):
        scores[scores < scores.topk(params.top_k).values[-1]] = -torch.inf
    if params.top_p < 1:
        ordered, index = scores.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability of all that is likelier
        scores[index[before >= params.top_p]] = -torch.inf
    return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))
