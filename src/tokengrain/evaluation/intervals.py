"""Confidence intervals: shares, means, differences paired by seed, bootstrap within strata."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokengrain.errors import TokengrainError

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A value with the ends of its confidence interval."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the interval's width: the number after ±."""
        return (self.high - self.low) / 2

    def as_dict(self) -> dict[str, float]:
        return self._asdict()


def scipy_stats(purpose: str) -> Any:
    """The module `scipy.stats`, or an error that says how to get it."""
    try:
        import scipy.stats
    except ImportError as error:
        message = f"{purpose} needs scipy, which is not installed; install tokengrain[eval]"
        raise TokengrainError(message) from error
    return scipy.stats


def normal_quantile(confidence: float) -> float:
    """Half-width of a two-sided interval in standard errors: 1.96 for 0.95."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, expected a number between 0 and 1")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def wilson(successes: float, n: int, confidence: float = CONFIDENCE) -> Estimate:
    """Wilson score interval of a share; never leaves [0, 1] (Wilson 1927).

    Args:
        successes: how many of the `n` trials succeeded; ties may count half.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n and n > 0, got {successes} of {n}")
    z, p = normal_quantile(confidence), successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # At the ends the two are equal but for rounding.
    low = max(0.0, centre - half) if successes else 0.0
    return Estimate(p, low, min(1.0, centre + half) if successes < n else 1.0)


def mean_interval(
    values: Tensor | Sequence[float], strata: Tensor | None = None, confidence: float = CONFIDENCE
) -> Estimate:
    """Normal interval of a mean of independent values `[n]`.

    Args:
        strata: long `[n]`, for example the prompt of every sample; differences between strata, whose shares
            are fixed by design, then do not widen the interval.
    """
    x = torch.as_tensor(values, dtype=torch.float64)
    centred = x - (x.mean() if strata is None else _stratum_means(x, strata))
    n_strata = 1 if strata is None else len(strata.unique())
    if len(x) <= n_strata:
        raise ValueError(f"a mean of {len(x)} values in {n_strata} strata has no standard error")
    error = float((centred.square().sum() / (len(x) - n_strata) / len(x)).sqrt())
    mean, z = float(x.mean()), normal_quantile(confidence)
    return Estimate(mean, mean - z * error, mean + z * error)


def _stratum_means(x: Tensor, strata: Tensor) -> Tensor:
    _, stratum = strata.unique(return_inverse=True)
    sums = torch.zeros(int(stratum.max()) + 1, dtype=x.dtype).index_add(0, stratum, x)
    return (sums / torch.bincount(stratum))[stratum]


def paired_difference(first: Sequence[float], second: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Mean of `first − second` over runs that share their seed, with Student's t interval.

    Few seeds make wide intervals: with 5 the factor is 2.78 standard errors, not 1.96.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"expected as many first as second values and at least 2, got {len(first)} and {len(second)}")
    return mean_of_runs([a - b for a, b in zip(first, second, strict=True)], confidence)


def mean_of_runs(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Mean over a few runs (at least 2), one per seed, with Student's t interval."""
    if len(values) < 2:
        raise ValueError(f"expected at least 2 values, got {len(values)}")
    x = torch.tensor(values, dtype=torch.float64)
    mean, error = float(x.mean()), float(x.std()) / math.sqrt(len(x))
    t = float(scipy_stats("Student's t").t.ppf(0.5 + confidence / 2, len(x) - 1))
    return Estimate(mean, mean - t * error, mean + t * error)


def bootstrap(
    statistic: Callable[[Tensor], Tensor],
    values: Tensor,
    strata: Tensor | None = None,
    *,
    resamples: int = 500,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Estimate:
    """Percentile bootstrap of a function of means.

    Args:
        statistic: maps means `[..., M]` of the columns of `values` to numbers `[...]`.
        values: `[n, M]`, one row per independent sample.
        strata: long `[n]`; resampling happens within each stratum.
        seed: of a generator of its own; torch's global state is neither read nor changed.
    """
    values = values.double()
    generator = torch.Generator().manual_seed(seed)
    groups = [torch.arange(len(values))]
    if strata is not None:
        groups = [(strata == s).nonzero().flatten() for s in strata.unique()]
    sums = torch.zeros(resamples, values.shape[1], dtype=torch.float64)
    for group in groups:
        drawn = torch.randint(len(group), (resamples, len(group)), generator=generator)
        sums += values[group[drawn]].sum(1)
    tail = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = statistic(sums / len(values)).quantile(tail).tolist()
    return Estimate(float(statistic(values.mean(0))), low, high)
