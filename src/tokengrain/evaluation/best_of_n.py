"""Scores of whole completions, the best of several, and whether a preference for length hides in them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokengrain.batch import TokenBatch
from tokengrain.evaluation.intervals import CONFIDENCE, Estimate, wilson

Pooling = Literal["mean", "last"]


def score_completions(
    source: nn.Module | Callable[[TokenBatch], Tensor], batch: TokenBatch, pooling: Pooling = "mean"
) -> Tensor:
    """One number per completion: the mean of its tokens' scores.

    Never their sum, which would grow with the length (arXiv 2505.23363, section 3).

    Args:
        source: a token-level reward model, or a credit source (any callable `batch -> [N]`).
        batch: prompts with any number of completions.
        pooling: "last" takes the last token's score, for a reward model that was trained on it alone.

    Returns:
        `[C]`; -inf for a completion without counted tokens, so that it is never the best.
    """
    scores = _token_scores(source, batch) if isinstance(source, nn.Module) else source(batch)
    scores, segments = scores.to(batch.device), batch.segments
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    empty = segments.lengths == 0
    if pooling == "last":
        # The place before an empty completion belongs to another one, or to none; it is overwritten below.
        pooled = torch.cat([scores, scores.new_zeros(1)])[segments.offsets[1:] - 1]
    else:
        pooled = segments.mean(scores)
    return pooled.masked_fill(empty, -math.inf)


def best_of(batch: TokenBatch, scores: Tensor) -> Tensor:
    """The best completion of every prompt, counted within the prompt: `[C] -> long [G]`; the first of equals.

    Raises:
        ValueError: not one score per completion, a score that is NaN, or a prompt without completions.
    """
    if scores.shape != (batch.n_completions,):
        raise ValueError(f"scores have shape {tuple(scores.shape)}, expected ({batch.n_completions},)")
    if bool(scores.isnan().any()):
        raise ValueError(f"the score of completion {int(scores.isnan().nonzero()[0])} is NaN")
    counts = torch.bincount(batch.group, minlength=batch.n_prompts)
    if not bool((counts > 0).all()):
        raise ValueError(f"prompt {int((counts == 0).nonzero()[0])} has no completion")
    first = counts.cumsum(0) - counts
    top = scores.new_full((batch.n_prompts,), -math.inf).scatter_reduce(0, batch.group, scores, "amax")
    places = torch.arange(batch.n_completions, device=scores.device)
    is_top = scores == top[batch.group]
    earliest = torch.full_like(first, batch.n_completions).scatter_reduce(
        0, batch.group[is_top], places[is_top], "amin"
    )
    return earliest - first


@dataclass(frozen=True)
class LengthBucket:
    """Accuracy on the pairs of one bucket.

    Attributes:
        low, high: the least and greatest value of what was cut into buckets.
        pairs: how many pairs.
        accuracy: share with the chosen completion above the rejected one (a tie counts half), Wilson interval.
        longer_preferred: share, among pairs of unequal lengths, where the longer completion scores higher; NaN
            without such pairs. Far from the share in which the longer one was chosen, the model goes by length.
        longer_chosen: share, among the same pairs, where the longer completion is the chosen one.
    """

    low: float
    high: float
    pairs: int
    accuracy: Estimate
    longer_preferred: float
    longer_chosen: float


def accuracy_by_length(
    scores: Tensor,
    lengths: Tensor,
    *,
    by: Literal["difference", "total"] = "difference",
    buckets: int = 4,
    confidence: float = CONFIDENCE,
) -> list[LengthBucket]:
    """Pair accuracy in buckets of about equally many pairs, cut by length.

    The mean over tokens hides a preference for length that one accuracy over all pairs does not show: where it
    falls in the first bucket and rises in the last, the model follows length.

    Args:
        scores: `[2P]`, one per completion, chosen before rejected.
        lengths: `[2P]`, tokens per completion (`batch.segments.lengths`).
        by: "difference" cuts by length of chosen minus length of rejected, "total" by their sum.
        buckets: how many at most; pairs with equal values are never separated.

    Returns:
        From the shortest to the longest; buckets that would be empty are left out.

    Raises:
        ValueError: not scores and lengths of pairs, or a score that is NaN.
    """
    if scores.shape != lengths.shape or scores.dim() != 1 or len(scores) % 2 or not len(scores):
        raise ValueError(
            f"expected scores and lengths of pairs, both [2P], got {tuple(scores.shape)} and {tuple(lengths.shape)}"
        )
    if bool(scores.isnan().any()):
        raise ValueError(f"the score of completion {int(scores.isnan().nonzero()[0])} is NaN")
    chosen, rejected = scores[0::2].double().cpu(), scores[1::2].double().cpu()
    long, short = lengths[0::2].cpu(), lengths[1::2].cpu()
    values = (long - short if by == "difference" else long + short).double()
    wins = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
    longer = (long > short, long != short)
    prefers = torch.where(longer[0], wins, 1 - wins)
    ranks = torch.linspace(0, 1, buckets + 1, dtype=torch.float64)[1:-1]
    edges = values.quantile(ranks, interpolation="lower")
    bucket = torch.searchsorted(edges, values)  # pairs on an edge go to the lower bucket
    out = []
    for index in bucket.unique().tolist():
        here = bucket == index
        unequal = here & longer[1]
        out.append(
            LengthBucket(
                low=float(values[here].min()),
                high=float(values[here].max()),
                pairs=int(here.sum()),
                accuracy=wilson(float(wins[here].sum()), int(here.sum()), confidence),
                longer_preferred=float(prefers[unequal].mean()),
                longer_chosen=float(longer[0][unequal].double().mean()),
            )
        )
    return out


def _token_scores(model: nn.Module, batch: TokenBatch) -> Tensor:
    from tokengrain.scoring import score
    from tokengrain.scoring.forward import evaluating

    with evaluating(model):
        scores: Any = score(model, batch, ("token_scores",)).token_scores
    return scores
