"""Sustained uncertainty: token entropy averaged over a short window (ARES, arXiv 2510.08457).

Entropies are flat vectors `[N]` in nats, of whichever distribution they were measured on: a sampler's top-k
log-probabilities are after temperature and top-p, a trainer's logits before. Windows lie within a completion; a
window that would pass its end is incomplete and NaN. Nothing here carries gradient.

Three definitions of a high window-entropy (HWE) token exist (`Mode`):

    code            the window is the tokens after t; t counts if it is a trigger word and the mean reaches tau
    paper           the window starts at t itself; t counts if the mean reaches tau
    token_semantic  no window: t counts if it is a trigger word and its own entropy reaches tau

and each has its own tau: the median over completions of the percentile of their window means (calibrated by
construction), the mean over completions of the quantile of their *token* entropies (which few windows reach, since
a mean varies less than its parts), and the quantile of all token entropies of the batch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.errors import RecipeError, require

Mode = Literal["code", "paper", "token_semantic"]
Triggers = Literal["english"] | tuple[str, ...] | None

TRIGGERS = (
    *("actually", "alternatively", "also", "although", "because", "but", "check", "consider", "first", "hence"),
    *("hmm", "however", "if", "instead", "let", "maybe", "or", "perhaps", "since", "so"),
    *("suppose", "then", "therefore", "though", "thus", "unless", "verify", "wait", "whereas", "yet"),
)
"""English words that often open a step of reasoning: a short list of ours. The authors publish one of 174 words."""


@dataclass(frozen=True)
class HighEntropy:
    """The HWE tokens of a batch."""

    mask: Tensor  # bool [N], which
    count: Tensor  # long [C], how many
    below: Tensor  # long [C], tokens that would be of them (triggers with a complete window) but for their entropy
    excess: Tensor  # [C], by how much they exceed tau in all, nats


def topk_entropy(logprobs: Tensor, *, tail: bool = True, floor: float = 1e-12) -> Tensor:
    """Entropy from the k largest log-probabilities of each token: `[..., k] -> [...]`, nats, detached.

    The rest of the mass counts as one token, which makes this a lower bound; without `tail` it is left out. A
    probability of 0 (-inf) adds 0.
    """
    logp = logprobs.detach()
    p = logp.exp()
    entropy = -torch.where(p > 0, p * logp, 0.0).sum(-1)
    if not tail:
        return entropy
    rest = (1 - p.sum(-1)).clamp(min=0)
    return entropy - rest * rest.clamp(min=floor).log()


def window_means(entropy: Tensor, segments: Segments, *, window: int = 4, own: bool = False) -> Tensor:
    """Mean entropy of the window behind each token (`own`: from it on), `[N] -> [N]`; NaN where it is incomplete."""
    entropy = entropy.detach()
    means = torch.full_like(entropy, torch.nan)
    n, skip = entropy.shape[0], 0 if own else 1
    if n >= window + skip:
        means[: n - window + 1 - skip] = entropy.unfold(0, window, 1).mean(-1)[skip:]
    left = segments.broadcast(segments.lengths) - segments.positions - skip
    return torch.where(left >= window, means, torch.nan)


def measured(entropy: Tensor, segments: Segments, *, mode: Mode = "code", window: int = 4) -> Tensor:
    """What tau is compared with, `[N]`: a window's mean, NaN where incomplete, or the token's own entropy."""
    if mode == "token_semantic":
        return entropy.detach()
    return window_means(entropy, segments, window=window, own=mode == "paper")


def batch_threshold(
    entropy: Tensor, segments: Segments, *, mode: Mode = "code", window: int = 4, quantile: float = 0.95
) -> float:
    """tau of a batch, nats; a completion without tokens has threshold 0 in mode "code" (as released), else none."""
    if mode == "code":
        each = completion_thresholds(entropy, segments, window=window, quantile=quantile)
        return float(torch.quantile(each.double(), 0.5))
    if mode == "paper":
        quantiles = segment_quantiles(entropy.detach(), segments, quantile)
        return float(quantiles[segments.lengths > 0].mean())
    whole = Segments.from_lengths([segments.total], entropy.device)
    return float(segment_quantiles(entropy.detach(), whole, quantile)[0])


def completion_thresholds(entropy: Tensor, segments: Segments, *, window: int = 4, quantile: float = 0.95) -> Tensor:
    """Quantile of the means of the following windows, per completion `[C]`.

    As in the released code each incomplete window counts as the mean of the complete ones, a completion without a
    complete one has its first token's entropy, and an empty one 0.
    """
    means = window_means(entropy, segments, window=window)
    complete = ~torch.isnan(means)
    some = segments.sum(complete.to(means.dtype))
    first = torch.where(segments.positions == 0, entropy.detach(), 0.0)
    total = segments.sum(torch.where(complete, means, 0.0))
    fill = torch.where(some > 0, total / some.clamp(min=1), segments.sum(first))
    filled = torch.where(complete, means, segments.broadcast(fill))
    return torch.where(segments.lengths > 0, segment_quantiles(filled, segments, quantile), 0.0)


def segment_quantiles(values: Tensor, segments: Segments, quantile: float) -> Tensor:
    """Quantile of each segment with linear interpolation, `[N] -> [C]`; NaN for an empty one."""
    if not segments.total:
        return values.new_full((len(segments),), torch.nan)
    ordered = segments.to_padded(values, fill=torch.inf)[0].sort(dim=1).values
    place = quantile * (segments.lengths - 1).clamp(min=0).double()
    low = place.floor().long()
    high = torch.minimum(low + 1, (segments.lengths - 1).clamp(min=0))
    a, b = (ordered.gather(1, i[:, None]).squeeze(1) for i in (low, high))
    found = a + (b - a) * (place - low).to(values.dtype)
    return torch.where(segments.lengths > 0, found, torch.nan)


def high_entropy(
    values: Tensor, segments: Segments, *, threshold: float, triggers: Tensor | None = None
) -> HighEntropy:
    """The tokens whose entropy `measured` reaches the threshold, nats; with `triggers` (bool `[N]`) of these alone."""
    eligible = ~torch.isnan(values) if triggers is None else triggers.bool() & ~torch.isnan(values)
    mask = eligible & (values >= threshold)
    excess = torch.where(mask, values - threshold, 0.0)
    below = segments.sum((eligible & ~mask).long())
    return HighEntropy(mask, segments.sum(mask.long()), below, segments.sum(excess))


def trigger_table(tokens: Sequence[str], words: Collection[str] = TRIGGERS) -> Tensor:
    """Which tokens of a vocabulary, its strings by id, are one of these words, lower-case: bool `[V]`."""
    wanted = set(words)
    plain = (str(token).lstrip("\u2581\u0120").strip().lower() for token in tokens)  # without marks of a word's start
    return torch.tensor([token in wanted for token in plain], dtype=torch.bool)


def trigger_tokens(tokenizer: Any, triggers: Triggers, what: str) -> Tensor | None:
    """Which tokens may count, bool `[V]`; None: all. `what` names who asks, in messages."""
    if triggers is None:
        return None
    missing = f"{what} needs a tokenizer to find trigger words; or set triggers: null (every token)"
    require(tokenizer is not None, RecipeError, missing)
    words = TRIGGERS if triggers == "english" else tuple(triggers)
    table = trigger_table(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))), words)
    unknown = (
        f"{what}: none of the {len(set(words))} trigger words is a token of this vocabulary; give others, or none "
    )
    require(bool(table.any()), RecipeError, unknown + "(triggers: null lets every token count)")
    return table


def trigger_flags(table: Tensor | None, labels: Tensor) -> Tensor | None:
    """Which tokens `[N]` may count, bool; None: all. A model's vocabulary may be larger than its tokenizer's."""
    if table is None:
        return None
    table = table.to(labels.device)
    return (labels < len(table)) & table[labels.clamp(max=len(table) - 1)]


def branch_positions(flags: Tensor, segments: Segments, *, window: int = 4, limit: int | None = None) -> Tensor:
    """Where extra rollouts start: the first token of every stretch of overlapping flagged windows, bool `[N]`.

    The paper describes it and the released code leaves it out: when a window fires (`flags`, bool `[N]`), a further
    completion is sampled from the tokens before it; at most `limit` per completion, the earliest ones.
    """
    flags = flags.bool()
    place = torch.arange(flags.shape[0], device=flags.device)
    last = torch.where(flags, place, -1).cummax(0).values if flags.shape[0] else place
    before = torch.full_like(place, -1)
    before[1:] = last[:-1]  # the flagged token before each token, in this completion or an earlier one
    start = segments.broadcast(segments.offsets[:-1])
    fires = flags & ((before < start) | (place - before >= window))
    if limit is None:
        return fires
    rank = fires.long().cumsum(0)
    earlier = torch.cat([rank.new_zeros(1), rank])[start]
    return fires & (rank - earlier <= limit)
