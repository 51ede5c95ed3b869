"""Win rate of one policy over another, from scores of their completions to the same prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokengrain.evaluation.intervals import CONFIDENCE, Estimate, mean_interval, wilson


def win_rate(
    scores: Tensor | Sequence[float],
    other: Tensor | Sequence[float],
    prompts: Tensor | None = None,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Share of pairs in which `scores` is higher; a tie counts half.

    Args:
        scores, other: `[n]`, true rewards or a judge's scores; entry i of both answers the same prompt.
        prompts: long `[n]`, the prompt of every pair. Given, the interval is that of a mean with the prompts
            as strata; otherwise it is Wilson's.

    Raises:
        ValueError: vectors of other shapes, or a score that is NaN.
    """
    a, b = torch.as_tensor(scores, dtype=torch.float64), torch.as_tensor(other, dtype=torch.float64)
    if a.shape != b.shape or a.dim() != 1 or not len(a):
        raise ValueError(f"expected two vectors of one length, got shapes {tuple(a.shape)} and {tuple(b.shape)}")
    if bool(a.isnan().any()) or bool(b.isnan().any()):
        raise ValueError("a score is NaN; it would count as lost")
    wins = (a > b).double() + 0.5 * (a == b).double()
    if prompts is None:
        return wilson(float(wins.sum()), len(wins), confidence)
    low_high = mean_interval(wins, prompts, confidence)
    return Estimate(low_high.value, max(0.0, low_high.low), min(1.0, low_high.high))
