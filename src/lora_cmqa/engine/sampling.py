"""From logits to a token.

    logits -> repetition penalty -> (temperature 0: the largest)
                                 -> / temperature -> top-k -> top-p -> softmax -> draw

The order and the meaning of each knob are those of transformers' logits processors and warpers. A draw takes one
uniform number u and goes through the kept tokens in the order of their ids until their probabilities pass u.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import ConfigError

_BLOCK = 512
_CANDIDATES = 1024  # likeliest tokens looked at first: sorting a whole vocabulary takes far longer


@dataclass(frozen=True, slots=True)
class SamplingParams:
    max_new_tokens: int = 256
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0  # keep the fewest tokens whose probability reaches top_p
    top_k: int = 0  # keep the k likeliest; 0 keeps all
    repetition_penalty: float = 1.0  # > 1 makes every token already seen less likely (arXiv 1909.05858, section 4.1)
    seed: int = 0
    stop: tuple[str, ...] = ()  # the answer ends before the first of these
    stop_ids: tuple[int, ...] = ()  # end the answer, besides the engine's own
    logprobs: int | None = None  # report each token's log probability and so many likeliest others

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("max_new_tokens", self.max_new_tokens, 1, 1_000_000),
            ("temperature", self.temperature, 0, 100),
            ("top_p", self.top_p, 1e-6, 1),
            ("top_k", self.top_k, 0, 10**9),
            ("repetition_penalty", self.repetition_penalty, 1e-3, 100),
            ("seed", self.seed, -(2**63), 2**63 - 1),
            ("logprobs", self.logprobs or 0, 0, 20),
        ):
            if not low <= value <= high:
                raise ConfigError(f"{name} is {value}; it must lie in {low:g} .. {high:g}", field=name)
        if not all(self.stop):
            raise ConfigError("a stop string is empty, so the answer would end before it begins", field="stop")

    @property
    def is_plain_greedy(self) -> bool:
        return self.temperature == 0 and self.repetition_penalty == 1


def largest_tokens(logits: torch.Tensor) -> torch.Tensor:
    """logits [rows, vocabulary] -> [rows]: the first of the largest, as `argmax` gives it.

    Block by block: on a CPU argmax goes through 16-bit numbers one at a time.
    """
    rows, size = logits.shape
    blocks = size // _BLOCK
    if blocks < 2 or logits.device.type != "cpu":
        return logits.argmax(-1)
    whole = logits[:, : blocks * _BLOCK].unflatten(1, (blocks, _BLOCK))
    best = whole.amax(-1).argmax(-1)
    row = torch.arange(rows)
    found = best * _BLOCK + whole[row, best].argmax(-1)
    if size == blocks * _BLOCK:
        return found
    rest = logits[:, blocks * _BLOCK :].argmax(-1) + blocks * _BLOCK
    return torch.where(logits[row, rest] > logits[row, found], rest, found)


def next_token(logits: torch.Tensor, params: SamplingParams, seen: Sequence[int], generator: torch.Generator) -> int:
    """logits [vocabulary] of any float dtype; `seen`: prompt and answer so far. `generator` on the CPU."""
    scores = _penalised(logits, params, seen)
    if params.temperature == 0:
        return int(scores.argmax())
    scores = scores / params.temperature
    kept = _kept(scores, params)
    weights = scores.double().softmax(-1) if kept is None else scores[kept].double().softmax(-1)
    reached = weights.cumsum(-1)
    u = torch.rand(1, generator=generator, dtype=torch.float64) * reached[-1]
    place = min(int(torch.searchsorted(reached, u, right=True)), len(reached) - 1)
    return place if kept is None else int(kept[place])


def next_token_plain(
    logits: torch.Tensor, params: SamplingParams, seen: Sequence[int], generator: torch.Generator
) -> int:
    """The definition: the whole vocabulary sorted, every probability written out."""
    scores = _penalised(logits, params, seen)
    if params.temperature == 0:
        return int(scores.argmax())
    scores = scores / params.temperature
    if 0 < params.top_k < len(scores):
        scores[scores < scores.topk(params.top_k).values[-1]] = -torch.inf
    if params.top_p < 1:
        ordered, index = scores.sort(descending=True, stable=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability of all that is likelier
        scores[index[before >= params.top_p]] = -torch.inf
    reached = scores.double().softmax(-1).cumsum(-1)
    u = torch.rand(1, generator=generator, dtype=torch.float64) * reached[-1]
    return min(int((reached <= u).sum()), len(scores) - 1)


def token_logprob(logits: torch.Tensor, token: int, top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """log p of `token`, and (token, log p) of the `top` likeliest; logits [vocabulary] as the model gave them."""
    scores = logits.float().log_softmax(-1)
    best = scores.topk(top) if top else None
    pairs = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if best is not None else ()
    return float(scores[token]), pairs


def _penalised(logits: torch.Tensor, params: SamplingParams, seen: Sequence[int]) -> torch.Tensor:
    scores = logits.detach().float().cpu()
    if params.repetition_penalty != 1 and seen:
        scores = scores.clone() if scores.data_ptr() == logits.data_ptr() else scores
        index = torch.tensor(sorted(set(seen)))
        value = scores[index]
        scores[index] = torch.where(value > 0, value / params.repetition_penalty, value * params.repetition_penalty)
    return scores


def _kept(scores: torch.Tensor, params: SamplingParams) -> torch.Tensor | None:
    """Ids of the tokens that top-k and top-p leave, ascending; None: all."""
    size = len(scores)
    by_k, by_p = 0 < params.top_k < size, params.top_p < 1
    if not by_k and not by_p:
        return None
    look = min(size, max(_CANDIDATES, params.top_k + 1 if by_k else 0))
    while True:
        values, ids = scores.topk(look)
        if by_k:
            tied = int((values >= values[params.top_k - 1]).sum())  # equals of the k-th stay, as in transformers
            if tied == look < size:
                look = size
                continue
            values, ids = values[:tied], ids[:tied]
        if by_p:
            whole = values.logsumexp(-1) if by_k else scores.logsumexp(-1)
            shares = (values - whole).exp()
            before = shares.cumsum(-1) - shares
            inside = int((before < params.top_p).sum())
            if inside == look < size:  # the candidates do not reach top_p
                look = size
                continue
            ids = ids[:inside]
        return ids.sort().values
