"""Credit recovery: how well per-token credit agrees with the true advantage of every token."""

from __future__ import annotations

import torch
from torch import Tensor

from tokengrain.evaluation.intervals import scipy_stats

AUC_MARGIN = 0.3
"""AUC leaves out tokens whose true advantage is smaller than this: their sign matters to nobody."""


def spearman(credit: Tensor, truth: Tensor) -> float:
    """Rank correlation of two vectors `[n]`, in [−1, 1]; NaN when one of them is constant."""
    credit, truth = _checked(credit, truth)
    if len(credit) < 2 or credit.min() == credit.max() or truth.min() == truth.max():
        return float("nan")
    return float(scipy_stats("a rank correlation").spearmanr(credit.numpy(), truth.numpy()).statistic)


def auc(scores: Tensor, positive: Tensor) -> float:
    """Chance that a positive has a higher score than a negative, a tie counting half; NaN without both.

    Args:
        scores: `[n]`.
        positive: bool `[n]`.
    """
    scores, positive = _checked(scores, positive)
    positive = positive.bool()
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if not n_positive or not n_negative:
        return float("nan")
    ranks = torch.from_numpy(scipy_stats("a rank correlation").rankdata(scores.numpy()))
    above = float(ranks[positive].sum()) - n_positive * (n_positive + 1) / 2
    return above / (n_positive * n_negative)


def recovery(credit: Tensor, truth: Tensor, decisions: Tensor | None = None) -> dict[str, float]:
    """Agreement of credit with the truth.

    Args:
        credit: `[N]`, one number per token.
        truth: `[N]`, the true advantage of every token.
        decisions: bool `[N]`, tokens at which there was something to decide (None: all).

    Returns:
        `spearman` over these tokens, `auc` for truth > 0 among those with |truth| > `AUC_MARGIN`, and
        `tokens`.
    """
    credit, truth = _checked(credit, truth)
    if decisions is not None:
        credit, truth = credit[decisions], truth[decisions]
    large = truth.abs() > AUC_MARGIN
    return {
        "spearman": spearman(credit, truth),
        "auc": auc(credit[large], truth[large] > 0),
        "tokens": len(credit),
    }


def _checked(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.dim() != 1 or a.shape != b.shape:
        raise ValueError(f"expected two vectors of one length, got shapes {tuple(a.shape)} and {tuple(b.shape)}")
    if not a.isfinite().all() or not b.isfinite().all():
        raise ValueError("expected finite numbers, got NaN or infinite ones")
    return a.detach().cpu().double(), b.detach().cpu().double()
