"""Statistics of evaluations: intervals, win rates, the reward-KL frontier, best of n, accuracy by length, pass@k."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import torch
from scipy import stats
from torch import Tensor, nn

from tokengrain.batch import TokenBatch
from tokengrain.errors import require
from tokengrain.scoring.model import evaluating
from tokengrain.scoring.score import score

CONFIDENCE = 0.95  # of every interval
Values = Tensor | Sequence[float]
Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


class Estimate(NamedTuple):
    """A value with the ends of its confidence interval."""

    value: float
    low: float
    high: float

    def named(self, name: str) -> dict[str, Any]:
        """The three as metrics: `name`, `name_low`, `name_high`."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def wilson(successes: float, n: int) -> Estimate:
    """Wilson score interval of a share; never leaves [0, 1] (Wilson 1927). Ties may count as half a success."""
    message = f"expected 0 <= successes <= n and n > 0, got {successes} of {n}"
    require(n > 0 and 0 <= successes <= n, ValueError, message)
    p = successes / n
    centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    # At the ends the two are equal but for rounding.
    low = max(0.0, centre - half) if successes else 0.0
    return Estimate(p, low, min(1.0, centre + half) if successes < n else 1.0)


def mean_interval(values: Values, strata: Tensor | None = None) -> Estimate:
    """Normal interval of a mean of independent values `[n]`; differences between strata do not widen it."""
    x = torch.as_tensor(values, dtype=torch.float64)
    n_strata, centre = 1, x.mean()
    if strata is not None:
        _, stratum = strata.unique(return_inverse=True)
        n_strata = int(stratum.max()) + 1
        sums = torch.zeros(n_strata, dtype=x.dtype).index_add(0, stratum, x)
        centre = (sums / torch.bincount(stratum))[stratum]
    enough = len(x) > n_strata
    require(enough, ValueError, f"a mean of {len(x)} values in {n_strata} strata has no standard error")
    error = float(((x - centre).square().sum() / (len(x) - n_strata) / len(x)).sqrt())
    mean = float(x.mean())
    return Estimate(mean, mean - Z * error, mean + Z * error)


def interval_of_moments(mean: float, square: float, n: int) -> Estimate:
    """Student's t interval of a mean of `n` (at least 2) independent values whose squares have the mean `square`."""
    require(n >= 2, ValueError, f"expected at least 2 values, got {n}")
    return _student(mean, math.sqrt(max(square - mean * mean, 0.0) / (n - 1)), n)


def mean_of_runs(values: Sequence[float]) -> Estimate:
    """Mean over a few runs (at least 2), one per seed, with Student's t interval."""
    require(len(values) >= 2, ValueError, f"expected at least 2 values, got {len(values)}")
    x = torch.tensor(values, dtype=torch.float64)
    return _student(float(x.mean()), float(x.std()) / math.sqrt(len(x)), len(x))


def _student(mean: float, error: float, n: int) -> Estimate:
    t = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1))
    return Estimate(mean, mean - t * error, mean + t * error)


def bootstrap(
    statistic: Callable[[Tensor], Tensor],
    values: Tensor,
    strata: Tensor | None = None,
    *,
    resamples: int = 500,
    seed: int = 0,
) -> Estimate:
    """Percentile bootstrap of a statistic of column means, `[..., M] -> [...]`, of independent rows `[n, M]`.

    Resampling happens within each of the strata; torch's global random state is neither read nor changed.
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
    tail = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64)
    low, high = statistic(sums / len(values)).quantile(tail).tolist()
    return Estimate(float(statistic(values.mean(0))), low, high)


class Classification(NamedTuple):
    """How right predicted classes are.

    Attributes:
        accuracy: the share of right ones.
        macro_f1: mean over classes of F1, the harmonic mean of precision and recall.
        by_class: the share of right ones among those of each class.
        unread: the share without a prediction.
    """

    accuracy: float
    macro_f1: float
    by_class: dict[int, float]
    unread: float


def classification(
    truth: Sequence[int], predicted: Sequence[int], *, classes: Literal["real", "seen"] = "real"
) -> Classification:
    """Accuracy and F1 of predicted classes; a prediction below 0 is none, which is wrong.

    Args:
        classes: whose F1 is averaged: "real": those that the truth has; "seen": also those that were only predicted,
            no prediction counting as a class (scikit-learn's default, and TimeMaster's).
    """
    require(truth and len(truth) == len(predicted), ValueError, f"{len(truth)} classes, {len(predicted)} predictions")
    real, pairs = Counter(truth), list(zip(truth, predicted))
    right, given = Counter(t for t, p in pairs if t == p), Counter(predicted)
    averaged = set(real) | (set(given) if classes == "seen" else set())
    f1 = [2 * right[c] / (real[c] + given[c]) for c in averaged]
    by_class = {c: right[c] / real[c] for c in sorted(real)}
    unread = sum(p < 0 for p in predicted) / len(pairs)
    return Classification(right.total() / len(pairs), math.fsum(f1) / len(f1), by_class, unread)


def win_rate(scores: Values, other: Values, prompts: Tensor | None = None) -> Estimate:
    """Share of pairs `[n]` in which `scores` is higher, ties half; the prompts are strata (None: Wilson's interval)."""
    a, b = torch.as_tensor(scores, dtype=torch.float64), torch.as_tensor(other, dtype=torch.float64)
    message = f"expected two vectors of one length, got shapes {tuple(a.shape)} and {tuple(b.shape)}"
    require(a.shape == b.shape and a.dim() == 1 and len(a), ValueError, message)
    require(not (a.isnan() | b.isnan()).any(), ValueError, "a score is NaN; it would count as lost")
    wins = (a > b).double() + 0.5 * (a == b).double()
    if prompts is None:
        return wilson(float(wins.sum()), len(wins))
    mean, low, high = mean_interval(wins, prompts)
    return Estimate(mean, max(0.0, low), min(1.0, high))


MIN_KL = 0.01
"""Nats. Below this a policy counts as unmoved: both sides of the share's fraction are noise there."""


@dataclass(frozen=True)
class Frontier:
    """Best mean reward at every mean KL (nats per completion), by increasing KL; the first point is the reference.

    Between points the reward is interpolated in √KL, in which it is nearly straight (near the reference
    R − R0 ≈ √(2·KL·Var R)). Beyond the last point it stays what it is there.
    """

    kl: Sequence[float]
    reward: Sequence[float]

    def __post_init__(self) -> None:
        kl, reward = (torch.tensor(values, dtype=torch.float64) for values in (self.kl, self.reward))
        message = f"a frontier needs as many rewards as KLs and at least 2, got {len(reward)} and {len(kl)}"
        require(len(kl) == len(reward) and len(kl) >= 2, ValueError, message)
        rising = kl[0] == 0 and (kl.diff() >= 0).all() and (reward.diff() >= -1e-9).all()
        message = "a frontier needs KLs that start at 0 and increase, and rewards that do not decrease"
        require(rising, ValueError, message)

    @property
    def base_reward(self) -> float:
        return self.reward[0]

    def best_reward(self, kl: Tensor | float) -> Tensor:
        """R*(KL), the best mean reward at these KLs (nats; below 0 counts as 0)."""
        roots = torch.tensor(self.kl, dtype=torch.float64).sqrt()
        rewards = torch.tensor(self.reward, dtype=torch.float64)
        root = torch.as_tensor(kl, dtype=torch.float64).clamp(min=0).sqrt()
        right = torch.searchsorted(roots, root.contiguous()).clamp(1, len(roots) - 1)
        part = ((root - roots[right - 1]) / (roots[right] - roots[right - 1]).clamp(min=1e-12)).clamp(0, 1)
        return rewards[right - 1] + part * (rewards[right] - rewards[right - 1])

    def share(self, reward: Tensor | float, kl: Tensor | float) -> Tensor:
        """f = (R − R0)/(R*(KL) − R0): 0 is the reference, 1 is on the frontier; 0 where KL < `MIN_KL`."""
        reward, kl = torch.as_tensor(reward, dtype=torch.float64), torch.as_tensor(kl, dtype=torch.float64)
        room = self.best_reward(kl) - self.base_reward
        return ((reward - self.base_reward) / room.clamp(min=1e-12)).where(kl >= MIN_KL, 0.0)

    def curve(self, max_kl: float | None = None, points: int = 200) -> dict[str, list[float]]:
        """`{"kl": [...], "reward": [...]}` for a plot, dense where the curve bends."""
        end = math.sqrt(self.kl[-1] if max_kl is None else max_kl)
        kl = torch.linspace(0, end, points, dtype=torch.float64).square()
        return {"kl": kl.tolist(), "reward": self.best_reward(kl).tolist()}


Pooling = Literal["mean", "last"]


def score_completions(
    source: nn.Module | Callable[[TokenBatch], Tensor], batch: TokenBatch, pooling: Pooling = "mean"
) -> Tensor:
    """One number per completion, `[C]`: the mean of its tokens' scores; -inf for a completion without counted tokens.

    Never their sum, which would grow with the length (arXiv 2505.23363, section 3). `pooling` "last" takes the last
    token's score, for a reward model that was trained on it alone.
    """
    scores: Any
    if isinstance(source, nn.Module):
        with evaluating(source):
            scores = score(source, batch, ("token_scores",)).token_scores
    else:
        scores = source(batch)
    scores, segments = scores.to(batch.device), batch.segments
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    if pooling == "last":
        # The place before an empty completion belongs to another one, or to none; it is overwritten below.
        pooled = torch.cat([scores, scores.new_zeros(1)])[segments.offsets[1:] - 1]
    else:
        pooled = segments.mean(scores)
    return pooled.masked_fill(segments.lengths == 0, -math.inf)


def best_of(batch: TokenBatch, scores: Tensor) -> Tensor:
    """The best completion of every prompt, counted within the prompt: `[C] -> long [G]`; the first of equals."""
    message = f"scores have shape {tuple(scores.shape)}, expected ({batch.n_completions},)"
    require(scores.shape == (batch.n_completions,), ValueError, message)
    _check_no_nan(scores)
    own = [scores[batch.group == g] for g in range(batch.n_prompts)]
    for g, those in enumerate(own):
        require(len(those), ValueError, f"prompt {g} has no completion")
    return torch.tensor([int(those.argmax()) for those in own], device=scores.device)


def _check_no_nan(scores: Tensor) -> None:
    if bool(scores.isnan().any()):
        raise ValueError(f"the score of completion {int(scores.isnan().nonzero()[0])} is NaN")


@dataclass(frozen=True)
class LengthBucket:
    """Accuracy on the pairs of one bucket, differences of length from `low` to `high`; a tie counts half.

    `longer_preferred`: share, among pairs of unequal lengths, where the longer completion scores higher (NaN without
    such pairs). Far from `longer_chosen`, where it is the chosen one, the model goes by length.
    """

    low: float
    high: float
    pairs: int
    accuracy: Estimate
    longer_preferred: float
    longer_chosen: float


def accuracy_by_length(scores: Tensor, lengths: Tensor, *, buckets: int = 4) -> list[LengthBucket]:
    """Pair accuracy in at most so many buckets of about equally many pairs, by length of chosen minus rejected.

    Shows a preference for length that one accuracy over all pairs hides: where accuracy is low in the first bucket and
    high in the last, the model follows length. Pairs with equal differences are never separated.

    Args:
        scores, lengths: `[2P]`, one per completion, chosen before rejected.
    """
    of_pairs = scores.shape == lengths.shape and scores.dim() == 1 and len(scores) and len(scores) % 2 == 0
    message = f"expected scores and lengths of pairs, both [2P], got {tuple(scores.shape)} and {tuple(lengths.shape)}"
    require(of_pairs, ValueError, message)
    _check_no_nan(scores)
    chosen, rejected = scores[0::2].double().cpu(), scores[1::2].double().cpu()
    long, short = lengths[0::2].cpu(), lengths[1::2].cpu()
    values = (long - short).double()
    wins = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
    longer = long > short
    prefers = torch.where(longer, wins, 1 - wins)
    ranks = torch.linspace(0, 1, buckets + 1, dtype=torch.float64)[1:-1]
    edges = values.quantile(ranks, interpolation="lower")
    bucket = torch.searchsorted(edges, values)  # pairs on an edge go to the lower bucket
    out = []
    for index in bucket.unique().tolist():
        here = bucket == index
        unequal = here & (long != short)
        out.append(
            LengthBucket(
                low=float(values[here].min()),
                high=float(values[here].max()),
                pairs=int(here.sum()),
                accuracy=wilson(float(wins[here].sum()), int(here.sum())),
                longer_preferred=float(prefers[unequal].mean()),
                longer_chosen=float(longer[unequal].double().mean()),
            )
        )
    return out


def pass_at_k(n: int | Tensor, c: int | Tensor, k: int) -> Tensor:
    """Chance that at least one of k samples is right, estimated without bias from n samples with c right ones.

    1 − C(n − c, k) / C(n, k): of all ways to take k of the n samples, those without a right one (arXiv 2107.03374,
    equation 1). Plugging the share of right samples into 1 − (1 − p)^k instead would be too low. n and c broadcast.
    """
    total, right = torch.broadcast_tensors(torch.as_tensor(n), torch.as_tensor(c))
    if k < 1 or bool((total < k).any()):
        least = int(total.min())
        raise ValueError(f"k is {k}; expected at least 1 and at most the samples, of which there are {least}")
    if bool(((right < 0) | (right > total)).any()):
        raise ValueError(f"expected 0 <= c <= n, got c from {int(right.min())} to {int(right.max())}")
    # C(n − c, k) / C(n, k) as a product of k factors, each in [0, 1]: no factorials that overflow.
    i = torch.arange(k, dtype=torch.float64, device=total.device)
    wrong = (total - right).double()[..., None]
    none = ((wrong - i) / (total.double()[..., None] - i)).clamp(min=0.0).prod(-1)
    return 1.0 - none


def avg_at_k(correct: Tensor, k: int | None = None) -> Tensor:
    """Mean of the first k of each prompt's samples: `[P, n] -> [P]` (None: all n)."""
    return _first(correct, k).double().mean(1)


def maj_at_k(answers: Sequence[Sequence[Hashable]], correct: Tensor, k: int | None = None) -> Tensor:
    """Whether the most frequent answer (None has no vote) among each prompt's first k samples is right, `[P]`.

    An answer counts as right if the first sample that gives it is. Of several with the most votes the share that is
    right counts: what a fair draw would reach on average.
    """
    right = _first(correct, k)
    complete = len(answers) == len(correct) and all(len(a) == correct.shape[1] for a in answers)
    require(complete, ValueError, f"expected an answer for each of {tuple(correct.shape)} samples")
    out = []
    for given, good in zip(answers, right.tolist(), strict=True):
        verdicts: dict[Hashable, bool] = {}
        for answer, verdict in zip(given, good):
            if answer is not None:
                verdicts.setdefault(answer, bool(verdict))
        votes = Counter(a for a in given[: len(good)] if a is not None)
        most = max(votes.values(), default=0)
        top = [verdicts[a] for a, count in votes.items() if count == most]
        out.append(sum(top) / max(len(top), 1))
    return torch.tensor(out, dtype=torch.float64)


def utilised(correct: Tensor) -> Tensor:
    """Prompts with right and wrong samples, from which group advantages learn something: `[P, n] -> bool [P]`."""
    right = correct.bool()
    return right.any(1) & ~right.all(1)


def mean_over_prompts(values: Tensor) -> Estimate:
    """Mean of one number per prompt `[P]`, with an interval over prompts, which are independent where samples are not.

    Wilson's where every prompt has 0 or 1, else a percentile bootstrap over prompts. Where all have the same number in
    [0, 1], which gives the bootstrap nothing to vary, Wilson's is taken: too wide rather than empty.
    """
    x = values.double()
    require(len(x), ValueError, "there are no prompts")
    if bool(((x == 0) | (x == 1)).all()) or (bool((x == x[0]).all()) and 0 <= x[0] <= 1):
        return wilson(float(x.sum()), len(x))
    return bootstrap(lambda means: means[..., 0], x[:, None])


def by_group(values: Tensor, keys: Sequence[Hashable]) -> dict[Hashable, Estimate]:
    """`mean_over_prompts` of the prompts of each key (one per prompt), in order of first appearance."""
    require(len(keys) == len(values), ValueError, f"{len(keys)} keys for {len(values)} prompts")
    places = {key: [i for i, other in enumerate(keys) if other == key] for key in dict.fromkeys(keys)}
    return {key: mean_over_prompts(values[at]) for key, at in places.items()}


def sample_metrics(
    correct: Tensor, answers: Sequence[Sequence[Hashable]] | None = None, k: int | None = None
) -> dict[str, Tensor]:
    """The measures of this module per prompt, each `[P]`, from correct samples `[P, n]` and their answers (for maj@k).

    `accuracy` (the share of all n samples), `pass@j` for j = 1, 2, 4, ... and k, `avg@k`, `maj@k`, `utilisation`.
    """
    n = correct.shape[1]
    k = n if k is None else k
    right = correct.long().sum(1)
    found = {"accuracy": avg_at_k(correct)}
    powers = [2**i for i in range(k.bit_length()) if 2**i < k]
    found |= {f"pass@{j}": pass_at_k(n, right, j) for j in (*powers, k)}
    found[f"avg@{k}"] = avg_at_k(correct, k)
    if answers is not None:
        found[f"maj@{k}"] = maj_at_k(answers, correct, k)
    found["utilisation"] = utilised(correct).double()
    return found


def _first(correct: Tensor, k: int | None) -> Tensor:
    message = f"expected samples [P, n] with n > 0, got shape {tuple(correct.shape)}"
    require(correct.dim() == 2 and correct.shape[1], ValueError, message)
    message = f"k is {k}; expected at least 1 and at most {correct.shape[1]} samples"
    require(k is None or 1 <= k <= correct.shape[1], ValueError, message)
    return correct[:, :k]
