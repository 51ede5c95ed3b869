"""AEPO's reward: how many high window-entropy tokens a completion may use depends on how hard its prompt is
(ARES, arXiv 2510.08457).

Order of a step: correctness -> `difficulty` -> `EntropyShaping.observe` -> `reward` -> filter -> advantages. The
filter must come after: the released configuration computes rewards before buckets exist, so that its shaping is
inactive. Counts come from `tokengrain.credit.entropy_window`, the weight of the KL from `tokengrain.credit.kl_control`,
the loss is `grpo_loss` with epsilon_high 0.3, ratio_cap 3, clamp, beta 0.01 and kl_weights.

Buckets are long tensors: places in `BUCKETS`, -1 where nothing could be scored. In buckets "easy" and "medium" many
HWE tokens cost a correct completion reward; in "hard" they earn it some, and wrong completions too: emitting trigger
words pays even when wrong, so log the counts. What is defined twice is so in the paper and its code:

    smooth    (the code, and the paper's appendix I) bounded by a cap that walks slowly
    lagrange  (the paper's section 3.2.2) for wrong completions only. Its strength is (mean - target) / variance:
              with the target of the same batch that is 0 and the reward plain accuracy, so it needs a lagged one
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from tokengrain.credit.group import GroupStatistics
from tokengrain.credit.kl_control import BUCKETS, bucket_means, bucket_sums, per_bucket
from tokengrain.credit.shaping import Moments

Shape = Literal["smooth", "lagrange", "none"]
TargetFrom = Literal["batch", "lagged"]


@dataclass(frozen=True)
class SmoothShape:
    """Constants of the smooth reward per bucket (easy, medium, hard), those of the released code.

    Attributes:
        margin: share of the target that is tolerated, at least `min_margin` tokens.
        kappa: where a penalty turns from quadratic to linear, tokens.
        temperature: how fast a bonus saturates, tokens.
        cap: multiplies the strength alpha: the largest penalty or bonus.
        wrong: share of the cap that a wrong completion can earn.
    """

    margin: tuple[float, float, float] = (0.15, 0.25, 0.35)
    kappa: tuple[float, float, float] = (2.0, 3.0, 4.0)
    temperature: tuple[float, float, float] = (2.0, 2.5, 3.0)
    cap: tuple[float, float, float] = (1.0, 1.0, 1.2)
    wrong: tuple[float, float, float] = (0.6, 0.8, 1.0)
    min_margin: float = 1.0


def difficulty(
    correct: Tensor,
    group: Tensor,
    *,
    easy: Fraction | float = Fraction(2, 3),
    medium: Fraction | float = Fraction(1, 3),
) -> Tensor:
    """The bucket of every prompt by its share of correct completions: long `[G]`.

    Shares are compared as whole numbers, so that exactly 2/3 is easy. At least 3 completions are needed for three
    buckets, and from 8 they mean something.

    Args:
        correct: 0 or 1 `[C]`; NaN where a completion could not be scored.
        group: long `[C]`, the prompt of each.
        easy, medium: least shares; read as fractions with a denominator of at most 1000.
    """
    s = GroupStatistics(correct.detach().double(), group)
    right = s.count.new_zeros(s.count.shape).index_add(0, group, torch.nan_to_num(s.rewards, nan=0.0)).round().long()
    n = s.count.long()

    def reaches(share: Fraction | float) -> Tensor:
        share = Fraction(share).limit_denominator(1000)
        return share.denominator * right >= share.numerator * n

    buckets = torch.where(reaches(easy), 0, torch.where(reaches(medium), 1, 2))
    return torch.where(n > 0, buckets, -1)


def smooth_score(
    correct: Tensor,
    counts: Tensor,
    buckets: Tensor,
    *,
    target: Tensor,
    alpha: Tensor,
    preserve_order: bool = False,
    shape: SmoothShape | None = None,
) -> Tensor:
    """What HWE tokens add to the accuracy of a completion: `[C]`, float64, between -cap and cap.

    A wrong completion always gets at least wrong * cap / 2, and may outscore a correct one where the cap exceeds
    1 / (1 + wrong): alpha above 0.625 (easy), 0.556 (medium), 0.417 (hard).

    Args:
        correct: `[C]`; NaN gives NaN. Completions below 1 are wrong.
        counts: HWE tokens `[C]`.
        buckets: long `[C]`.
        target, alpha: `[C]`, of the completion's bucket.
        preserve_order: limit the cap so that no wrong completion outscores a correct one of its bucket.
        shape: other constants.
    """
    shape = SmoothShape() if shape is None else shape
    margin, kappa, temp, scale, wrong = (
        per_bucket(dict(zip(BUCKETS, numbers, strict=True)), buckets)
        for numbers in (shape.margin, shape.kappa, shape.temperature, shape.cap, shape.wrong)
    )
    target = target.detach().double()
    delta = counts.detach().double() - target
    margin = (margin * target.clamp(min=1)).clamp(min=shape.min_margin)
    cap = alpha.detach().double() * scale
    if preserve_order:
        cap = torch.minimum(cap, 1 / (1 + wrong))

    def penalty(excess: Tensor) -> Tensor:
        x = excess.clamp(min=0)
        huber = torch.where(x <= kappa, x.square() / (2 * kappa), x - kappa / 2)
        return huber / (margin + kappa)

    def bonus(x: Tensor) -> Tensor:
        return cap * torch.sigmoid(x / temp)

    easy, hard = buckets == 0, buckets == 2
    beyond = torch.where(easy, delta, delta.abs()) - margin
    tamed = -torch.minimum(cap, cap * penalty(beyond))
    lacking = -torch.minimum(cap, 0.5 * cap * penalty(-delta - margin))
    encouraged = torch.where(delta >= -margin, bonus(delta + margin), lacking)
    right = torch.where(hard, encouraged, tamed)
    score = torch.where(correct >= 1, right, wrong * bonus((delta - margin).clamp(min=0)))
    return torch.where(torch.isnan(correct), torch.nan, score)


def lagrange_strengths(
    moments: Mapping[str, Moments], target: Mapping[str, float], *, eps: float = 1e-6, cap: float | None = None
) -> dict[str, float]:
    """max(0, (mean - target) / (variance + eps)) of the counts of each bucket, at most `cap`.

    Args:
        moments: of the completions' counts per bucket, all ranks' added up.
        target: lagged; with the mean of the same counts every strength is 0.
        cap: there is no bound in the paper, and the variance may be small.
    """
    found = {
        name: max(0.0, (m.mean - target[name]) / (m.std**2 + eps)) for name, m in moments.items() if name in target
    }
    return {name: strength if cap is None else min(strength, cap) for name, strength in found.items()}


def lagrange_shaping(counts: Tensor, buckets: Tensor, target: Tensor) -> Tensor:
    """By how many HWE tokens a completion misses its target, in the direction that its bucket minds: `[C]`."""
    delta = counts.detach().double() - target.detach().double()
    return torch.where(buckets == 0, delta.clamp(min=0), torch.where(buckets == 1, delta.abs(), (-delta).clamp(min=0)))


def lagrange_score(correct: Tensor, shaping: Tensor, strength: Tensor) -> Tensor:
    """-strength * shaping for wrong completions, 0 for correct ones, NaN for those without a score: `[C]`."""
    score = torch.where(correct < 1, -strength * shaping, 0.0)
    return torch.where(torch.isnan(correct), torch.nan, score)


@dataclass(frozen=True)
class Observation:
    """What a step knows of its counts; those of two ranks add up.

    Attributes:
        prompts: `[3, 2]`, sum and number of the prompts' mean counts per bucket (`bucket_sums`).
        completions: moments of the completions' counts per bucket.
    """

    prompts: Tensor
    completions: dict[str, Moments]

    @classmethod
    def of(cls, counts: Tensor, group: Tensor, buckets: Tensor) -> Observation:
        """Of the HWE counts `[C]` of completions in groups `[C]`, with one bucket per group `[G]`."""
        counts = counts.detach().double()
        moments = {name: Moments.of(counts[buckets[group] == place]) for place, name in enumerate(BUCKETS)}
        return cls(bucket_sums(GroupStatistics(counts, group).mean, buckets), moments)

    def __add__(self, other: Observation) -> Observation:
        both = {name: self.completions[name] + other.completions[name] for name in BUCKETS}
        return Observation(self.prompts + other.prompts, both)


@dataclass
class EntropyShaping:
    """Targets and strengths per bucket, the state of AEPO's reward, and the reward itself.

    Args:
        shape: "smooth", "lagrange" or "none" (accuracy alone).
        targets: "batch": the rounded mean of the same batch (the code); "lagged": the average of earlier batches,
            and nothing is shaped in a bucket that has none.
        ema: weight of the past in targets, which are noisy in buckets of few prompts; 0: the last batch alone.
        alpha_lr, alpha_max: step and bound of alpha. In "batch" mode it drifts by the residue of rounding alone.
        strength_cap: bound of the strengths of "lagrange"; None: none.
        preserve_order: see `smooth_score`.
    """

    shape: Shape = "smooth"
    targets: TargetFrom = "batch"
    ema: float = 0.0
    alpha_lr: float = 0.05
    alpha_max: float = 2.0
    strength_cap: float | None = None
    preserve_order: bool = False
    alpha: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BUCKETS, 0.5))
    target: dict[str, float] = field(default_factory=dict)
    average: dict[str, float] = field(default_factory=dict)
    strength: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.shape == "lagrange" and self.targets == "batch":
            warnings.warn(
                "shape 'lagrange' with targets 'batch': every strength is 0, the reward is plain accuracy", stacklevel=2
            )

    def observe(self, seen: Observation) -> None:
        """Take in a step, that of all ranks, before its rewards are computed. A bucket that is absent keeps its
        state."""
        means = bucket_means(seen.prompts)
        before = dict(self.average)
        for name, mean in means.items():
            self.average[name] = self.ema * self.average.get(name, mean) + (1 - self.ema) * mean
            source = self.average if self.targets == "batch" else before
            if name not in source:
                continue
            # Rounded half to even, as in the released code.
            self.target[name] = source[name] if self.shape == "lagrange" else float(round(source[name]))
            sign = -1 if name == "hard" else 1
            moved = self.alpha[name] + self.alpha_lr * sign * (mean - self.target[name])
            self.alpha[name] = min(max(moved, 0.0), self.alpha_max)
        present = {name: m for name, m in seen.completions.items() if m.count}
        self.strength = lagrange_strengths(present, self.target, cap=self.strength_cap)

    def reward(self, correct: Tensor, counts: Tensor, buckets: Tensor) -> Tensor:
        """Accuracy and shaping: one reward per completion `[C]`, in the type of `correct`.

        Args:
            correct: 0 or 1 `[C]`, NaN where there is no score.
            counts: HWE tokens `[C]`.
            buckets: long `[C]`: `difficulty(correct, group)[group]`.
        """
        if self.shape == "none":
            return correct.detach()
        target = per_bucket(self.target, buckets)
        if self.shape == "smooth":
            alpha = per_bucket(self.alpha, buckets)
            score = smooth_score(
                correct, counts, buckets, target=target, alpha=alpha, preserve_order=self.preserve_order
            )
        else:
            strength = per_bucket(self.strength, buckets, missing=0.0)
            score = lagrange_score(correct, lagrange_shaping(counts, buckets, target), strength)
        shaped = torch.where(torch.isnan(target), 0.0, score)
        return (correct.detach() + shaped).to(correct.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON or `torch.save`."""
        return {name: dict(getattr(self, name)) for name in ("alpha", "target", "average", "strength")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in ("alpha", "target", "average", "strength"):
            setattr(self, name, dict(state[name]))
