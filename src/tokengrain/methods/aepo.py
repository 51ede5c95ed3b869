"""AEPO (ARES, arXiv 2510.08457): how many uncertain tokens a prompt is worth, by its difficulty.

High window-entropy (HWE) tokens (see `_entropy_window`) are counted in each completion. A prompt is easy, medium or
hard by the share of its completions that are correct. In easy and medium prompts many HWE tokens cost a correct
completion reward; in hard ones they earn it some, and wrong completions too: emitting trigger words pays even when
wrong, so log the counts.

    reward   R = correct + score(N - target of the bucket), N the HWE tokens of the completion
    smooth   (the code, and the paper's appendix I) bounded by a cap, strength alpha, that walks slowly
    lagrange (the paper's section 3.2.2) for wrong completions only. Its strength is (mean - target) / variance:
             with the target of the same batch that is 0 and the reward plain accuracy, so it needs a lagged one
    KL       each bucket's KL term weighs β_d, which follows the KL measured in it towards a target

Objective: grpo with epsilon_high 0.3, ratio_cap 3, clamp true and beta 0.01. A filter of groups belongs on accuracy,
before this credit, or after it: shaped rewards make every group look varied. (The released configuration computes
rewards before buckets exist, so that its shaping is inactive.) Buckets are long tensors: places in `BUCKETS`, -1 where
nothing could be scored.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.errors import RecipeError, RunError, require
from tokengrain.method import Card, Rollout, rollout_credit
from tokengrain.methods._clipped import sampled_kl
from tokengrain.methods._entropy_window import (
    HighEntropy,
    Mode,
    Triggers,
    batch_threshold,
    high_entropy,
    measured,
    trigger_flags,
    trigger_tokens,
)
from tokengrain.methods._shaping import GroupStatistics, Moments, mean, reduce_groups, scored
from tokengrain.settings import Count, NonNegative, Positive, Share

CARD = Card(
    "aepo",
    "AEPO (ARES)",
    "explores uncertain tokens of hard prompts",
    "ARES: Multimodal Adaptive Reasoning via Difficulty-Aware Token-Level Entropy Shaping",
    "2510.08457",
    "ICLR 2026",
    trains="policy, online",
    credit="uncertain tokens, by the prompt's difficulty",
    objective="grpo",
)

BUCKETS = ("easy", "medium", "hard")


@rollout_credit("aepo", phase="rewards", group=True)
@dataclass(kw_only=True)
class AEPO:
    """Adds the entropy reward to the outcome, and weighs the KL term of the loss by difficulty.

    In mode "code" the threshold lags: the first rollout has none, so nothing is counted and its rewards stay as
    they are. The KL is that of the rollout, k3 between the policy that sampled and the reference, and its weights move
    once per rollout (in the released code once per micro-batch). A bucket that a rollout lacks keeps its state.
    """

    tokenizer: Any = None  # needed for triggers
    mode: Mode = "code"  # which tokens are HWE tokens, see `_entropy_window`
    window: Count = 4  # tokens
    quantile: Share = 0.95  # of the threshold
    decay: Share = 0.99  # of the threshold of mode "code", an exponential average of the rollouts', from the first on
    triggers: Triggers = "english"  # words that may count in modes "code" and "token_semantic"; None: every token
    easy: Share = 2 / 3  # least shares of correct completions
    medium: Share = 1 / 3
    shape: Literal["smooth", "lagrange", "none"] = "smooth"  # "none": accuracy alone
    # "batch": the rounded mean of the same rollout (the code); "lagged": the average of earlier ones, and nothing is
    # shaped in a bucket that has none.
    targets: Literal["batch", "lagged"] = "batch"
    target_ema: Share = 0.0  # weight of the past in targets, which are noisy in buckets of few prompts; 0: none
    alpha_lr: NonNegative = 0.05  # step of alpha. With targets "batch" it drifts by the residue of rounding alone.
    alpha_max: Positive = 2.0
    strength_cap: Positive | None = None  # bound of the strengths of "lagrange"
    preserve_order: bool = False  # no wrong completion outscores a correct one of its bucket, see `smooth_score`
    # What moves the KL's weights: "log_ema" (the released code), "multiplicative" (the paper's Algorithm 1); "none": no
    # weights, and no reference is asked.
    kl: Literal["log_ema", "multiplicative", "none"] = "log_ema"
    kl_target: Positive = 0.01  # nats per token
    kl_interval: Count = 1  # of "log_ema", rollouts between two moves
    kl_step: Positive = 0.1  # of "multiplicative"
    rho: Share | None = None  # weight of the KL of HWE tokens; None: 0.5 in mode "paper" (which gives no value), else 1

    # State: the threshold; per bucket the strength alpha, the target, the average that it comes from, and the strength
    # of "lagrange"; the KL controller's own.
    threshold: float | None = field(default=None, init=False)
    alpha: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BUCKETS, 0.5), init=False)
    target: dict[str, float] = field(default_factory=dict, init=False)
    average: dict[str, float] = field(default_factory=dict, init=False)
    strength: dict[str, float] = field(default_factory=dict, init=False)
    controller: LogBucketKL | LinearBucketKL | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        ordered = f"credit 'aepo': easy is {self.easy} and medium {self.medium}; expected medium < easy"
        require(self.medium < self.easy, RecipeError, ordered)
        if self.shape == "lagrange" and self.targets == "batch":
            message = "shape 'lagrange' with targets 'batch': every strength is 0, the reward is plain accuracy"
            warnings.warn(message, stacklevel=3)
        self.rho = (0.5 if self.mode == "paper" else 1.0) if self.rho is None else self.rho
        self.table = None if self.mode == "paper" else trigger_tokens(self.tokenizer, self.triggers, "credit 'aepo'")
        if self.kl == "log_ema":
            self.controller = LogBucketKL(target=self.kl_target, interval=self.kl_interval)
        elif self.kl == "multiplicative":
            self.controller = LinearBucketKL(target=self.kl_target, step=self.kl_step)
        self.needs = frozenset({"entropy"} if self.controller is None else {"entropy", "ref_logps"})
        self.provides = frozenset() if self.controller is None else frozenset({"kl_weights"})

    def __call__(self, rollout: Rollout) -> None:
        if rollout.correct is None:
            raise RunError("credit 'aepo' needs rewards that say what is correct; this rollout has none")
        correct = torch.where(scored(rollout), rollout.correct.double(), torch.nan)
        buckets = difficulty(correct, rollout.group, easy=self.easy, medium=self.medium)
        found = self._counted(rollout)
        if found is not None:
            self._shape(rollout, correct, buckets, found)
            rollout.quantities["hwe"] = found.mask.float()
        if self.controller is not None:
            self._weigh_kl(rollout, self.controller, buckets[rollout.group], found)
        for place, name in enumerate(BUCKETS):
            rollout.metrics[f"aepo/{name}"] = mean((buckets == place).float())

    def _counted(self, rollout: Rollout) -> HighEntropy | None:
        """The HWE tokens, with the threshold of before this rollout in mode "code"; None: there is none yet."""
        entropy = rollout.quantity("entropy")
        everyone, lengths = rollout.gather(entropy), rollout.gather(rollout.segments.lengths)
        segments = Segments(torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]))
        tau = batch_threshold(everyone, segments, mode=self.mode, window=self.window, quantile=self.quantile)
        if self.mode == "code":
            before, self.threshold = self.threshold, running(self.threshold, tau, self.decay)
            if before is None:
                return None
            tau = before
        rollout.metrics["aepo/tau"] = tau
        values = measured(entropy, rollout.segments, mode=self.mode, window=self.window)
        flags = trigger_flags(self.table, rollout.batch.labels)
        return high_entropy(values, rollout.segments, threshold=tau, triggers=flags)

    def _shape(self, rollout: Rollout, correct: Tensor, buckets: Tensor, found: HighEntropy) -> None:
        # On the host, where ranks with devices of their own can add.
        first, *others = rollout.gather(Observation.of(found.count.cpu(), rollout.group.cpu(), buckets.cpu()))
        seen = sum(others, first)
        self.observe(seen)
        shaped = self.reward(correct, found.count, buckets[rollout.group]) - correct
        rollout.rewards = rollout.rewards + shaped.to(rollout.rewards)
        rollout.metrics |= {f"aepo/hwe_{name}": hwe for name, hwe in bucket_means(seen.prompts).items()}
        rollout.metrics |= {f"aepo/target_{name}": target for name, target in self.target.items()}
        rollout.metrics |= {f"aepo/alpha_{name}": self.alpha[name] for name in self.target}
        rollout.metrics |= {
            "aepo/hwe": mean(found.count.double()),
            "aepo/below": mean(found.below.double()),
            "aepo/reward_correct": mean(shaped[correct == 1]),
            "aepo/reward_wrong": mean(shaped[correct == 0]),
            "aepo/inversions": inversions(rollout.rewards, correct, rollout.group),
        }

    def observe(self, seen: Observation) -> None:
        """Take in a rollout, that of all ranks, before its rewards are computed."""
        before = dict(self.average)
        for name, now in bucket_means(seen.prompts).items():
            self.average[name] = self.target_ema * self.average.get(name, now) + (1 - self.target_ema) * now
            source = self.average if self.targets == "batch" else before
            if name not in source:
                continue
            # Rounded half to even, as in the released code.
            self.target[name] = source[name] if self.shape == "lagrange" else float(round(source[name]))
            sign = -1 if name == "hard" else 1
            moved = self.alpha[name] + self.alpha_lr * sign * (now - self.target[name])
            self.alpha[name] = min(max(moved, 0.0), self.alpha_max)
        present = {name: m for name, m in seen.completions.items() if m.count}
        self.strength = lagrange_strengths(present, self.target, cap=self.strength_cap)

    def reward(self, correct: Tensor, counts: Tensor, buckets: Tensor) -> Tensor:
        """Accuracy and shaping, `[C]`, from what is `correct` (0, 1 or NaN), the HWE counts and the buckets `[C]`."""
        if self.shape == "none":
            return correct.detach()
        target, alpha = per_bucket(self.target, buckets), per_bucket(self.alpha, buckets)
        if self.shape == "smooth":
            given: Any = {"target": target, "alpha": alpha, "preserve_order": self.preserve_order}
            score = smooth_score(correct, counts, buckets, **given)
        else:
            strength = per_bucket(self.strength, buckets, missing=0.0)
            score = lagrange_score(correct, lagrange_shaping(counts, buckets, target), strength)
        return (correct.detach() + torch.where(torch.isnan(target), 0.0, score)).to(correct.dtype)

    def _weigh_kl(
        self, rollout: Rollout, controller: LogBucketKL | LinearBucketKL, buckets: Tensor, found: HighEntropy | None
    ) -> None:
        """Weights of the tokens' KL terms from the KL of this rollout on all ranks."""
        relaxed = None if found is None or self.rho == 1 else found.mask
        kl = sampled_kl(rollout.quantity("old_logps"), rollout.quantity("ref_logps"), "k3")
        if isinstance(controller, LinearBucketKL) and relaxed is not None:
            each = controlled_kl(kl, rollout.segments, relaxed)
        else:
            each = rollout.segments.mean(kl)
        each = torch.where(rollout.segments.lengths > 0, each, torch.nan)
        controller.update(rollout.gather(bucket_sums(each, buckets)[None]).sum(0))
        weights = per_bucket(controller.weights, buckets, missing=1.0)
        assert self.rho is not None  # set after construction
        rollout.quantities["kl_weights"] = kl_token_weights(weights, rollout.segments, relaxed, self.rho).to(kl)
        rollout.metrics |= {f"aepo/kl_weight_{name}": w for name, w in controller.weights.items()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "threshold": {"value": self.threshold},
            "shaping": {name: dict(getattr(self, name)) for name in ("alpha", "target", "average", "strength")},
            "kl": self.controller.state_dict() if self.controller is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        same = (state["kl"] is None) == (self.controller is None)
        require(same, RunError, "credit 'aepo': the checkpoint was made with another setting of `kl`")
        self.threshold = state["threshold"]["value"]
        for name, values in state["shaping"].items():
            setattr(self, name, dict(values))
        if self.controller is not None:
            self.controller.load_state_dict(state["kl"])


def running(before: float | None, now: float, decay: float) -> float:
    """The running threshold after a rollout with threshold `now`; the first stands for itself."""
    return now if before is None else decay * before + (1 - decay) * now


def inversions(rewards: Tensor, correct: Tensor, group: Tensor) -> float:
    """Share of wrong completions whose reward exceeds that of some correct one of their group."""
    right = torch.where(correct == 1, rewards, torch.inf)
    worst = reduce_groups(right.to(rewards), group, torch.inf, "amin")
    return mean((rewards > worst[group])[correct == 0].float())


# Buckets. Sums over them add up over ranks; give every rank the same totals, so that weights stay equal.


def difficulty(correct: Tensor, group: Tensor, *, easy: float = 2 / 3, medium: float = 1 / 3) -> Tensor:
    """The bucket of every prompt by its share of correct completions: long `[G]`.

    Shares are compared as whole numbers, so that exactly 2/3 is easy: the least ones are read as fractions with a
    denominator of at most 1000. At least 3 completions are needed for three buckets, and from 8 they mean something.
    """
    s = GroupStatistics(correct.detach().double(), group)
    right = s.count.new_zeros(s.count.shape).index_add(0, group, torch.nan_to_num(s.rewards, nan=0.0)).round().long()
    n = s.count.long()

    def reaches(share: float) -> Tensor:
        least = Fraction(share).limit_denominator(1000)
        return least.denominator * right >= least.numerator * n

    buckets = torch.where(reaches(easy), 0, torch.where(reaches(medium), 1, 2))
    return torch.where(n > 0, buckets, -1)


def bucket_sums(values: Tensor, buckets: Tensor) -> Tensor:
    """Sum and count of the values of each bucket, NaN left out: `[K], long [K] -> float64 [3, 2]`."""
    keep = ~torch.isnan(values) & (buckets >= 0)
    pairs = torch.stack([values.detach().double(), torch.ones_like(values, dtype=torch.float64)], dim=1)
    return pairs.new_zeros(len(BUCKETS), 2).index_add(0, buckets[keep], pairs[keep])


def bucket_means(sums: Tensor) -> dict[str, float]:
    return {name: s / n for name, (s, n) in zip(BUCKETS, sums.tolist(), strict=True) if n}


def per_bucket(values: Mapping[str, float], buckets: Tensor, missing: float = math.nan) -> Tensor:
    """A number per bucket, looked up for each item: long `[K] -> float64 [K]`; `missing` where the bucket is -1."""
    numbers = [*(values.get(name, missing) for name in BUCKETS), missing]
    return torch.tensor(numbers, dtype=torch.float64, device=buckets.device)[buckets]


@dataclass(frozen=True)
class Observation:
    """What a rollout knows of its counts per bucket; those of two ranks add up."""

    prompts: Tensor  # [3, 2], the `bucket_sums` of the prompts' mean counts
    completions: dict[str, Moments]  # of the completions' counts

    @classmethod
    def of(cls, counts: Tensor, group: Tensor, buckets: Tensor) -> Observation:
        """Of the HWE counts `[C]` of completions in groups `[C]`, with one bucket per group `[G]`."""
        counts = counts.detach().double()
        moments = {name: Moments.of(counts[buckets[group] == place]) for place, name in enumerate(BUCKETS)}
        return cls(bucket_sums(GroupStatistics(counts, group).mean, buckets), moments)

    def __add__(self, other: Observation) -> Observation:
        both = {name: self.completions[name] + other.completions[name] for name in BUCKETS}
        return Observation(self.prompts + other.prompts, both)


# The two rewards.


@dataclass(frozen=True)
class SmoothShape:
    """Constants of the smooth reward per bucket (easy, medium, hard), those of the released code."""

    margin: tuple[float, float, float] = (0.15, 0.25, 0.35)  # share of the target that is tolerated
    kappa: tuple[float, float, float] = (2.0, 3.0, 4.0)  # where a penalty turns from quadratic to linear, tokens
    temperature: tuple[float, float, float] = (2.0, 2.5, 3.0)  # how fast a bonus saturates, tokens
    cap: tuple[float, float, float] = (1.0, 1.0, 1.2)  # times the strength alpha: the largest penalty or bonus
    wrong: tuple[float, float, float] = (0.6, 0.8, 1.0)  # share of the cap that a wrong completion can earn
    min_margin: float = 1.0  # the least margin, tokens


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

    A wrong completion (`correct` below 1) always gets at least wrong * cap / 2, and may outscore a correct one where
    the cap exceeds 1 / (1 + wrong), alpha above 0.625 (easy), 0.556 (medium), 0.417 (hard), unless `preserve_order`
    limits the cap. `counts` are HWE tokens `[C]`, target and alpha those of the completion's bucket `[C]`.
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
        return torch.where(x <= kappa, x.square() / (2 * kappa), x - kappa / 2) / (margin + kappa)  # Huber's

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
    """max(0, (mean - target) / (variance + eps)) of the counts of each bucket, at most `cap` (the paper has none).

    With the mean of the same counts for a target every strength is 0.
    """
    known = [(name, m) for name, m in moments.items() if name in target]
    most = math.inf if cap is None else cap
    return {name: min(max(0.0, (m.mean - target[name]) / (m.std**2 + eps)), most) for name, m in known}


def lagrange_shaping(counts: Tensor, buckets: Tensor, target: Tensor) -> Tensor:
    """By how many HWE tokens a completion misses its target, in the direction that its bucket minds: `[C]`."""
    delta = counts.detach().double() - target.detach().double()
    return torch.where(buckets == 0, delta.clamp(min=0), torch.where(buckets == 1, delta.abs(), (-delta).clamp(min=0)))


def lagrange_score(correct: Tensor, shaping: Tensor, strength: Tensor) -> Tensor:
    """-strength * shaping for wrong completions, 0 for correct ones, NaN for those without a score: `[C]`."""
    score = torch.where(correct < 1, -strength * shaping, 0.0)
    return torch.where(torch.isnan(correct), torch.nan, score)


# Weights of the KL term, constants for the loss.


@dataclass
class LogBucketKL:
    """One weight per bucket, moved in its logarithm by a smoothed relative error: the released code of ARES."""

    target: Mapping[str, float] | float = 0.01  # KL per bucket, nats per token; one number for all
    # Only every so many updates move the weights: by at most 1 % per hundred updates with the released 100.
    interval: int = 100
    ema: float = 0.97  # weight of the past in both averages
    lr: float = 0.05  # size of a step
    clip: float = 0.2  # bound of the smoothed error in it
    deadzone: float = 0.02  # relative errors below this move nothing
    low: float = 1e-4  # bounds of the weights
    high: float = 1e2
    weights: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BUCKETS, 1.0))
    kl: dict[str, float] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BUCKETS, 0.0))
    updates: int = 0

    def update(self, sums: Tensor) -> None:
        """Take in `bucket_sums` of the completions' mean KLs."""
        self.updates += 1
        for name, now in bucket_means(sums).items():
            self.kl[name] = (1 - self.ema) * now + self.ema * self.kl.get(name, now)
            error = _relative_error(self.kl[name], self.target, name)
            if abs(error) < self.deadzone or self.updates % self.interval:
                continue
            self.error[name] = (1 - self.ema) * error + self.ema * self.error[name]
            step = self.lr * min(max(self.error[name], -self.clip), self.clip)
            log = math.log(min(max(self.weights[name], self.low), self.high)) + step
            self.weights[name] = min(max(math.exp(log), self.low), self.high)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": {**self.weights}, "kl": {**self.kl}, "error": {**self.error}, "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weights, self.kl, self.error = (dict(state[k]) for k in ("weights", "kl", "error"))
        self.updates = int(state["updates"])


@dataclass
class LinearBucketKL:
    """One weight per bucket, multiplied by 1 + step * relative error: the paper's Algorithm 1 of ARES."""

    target: Mapping[str, float] | float = 0.01
    step: float = 0.1  # the paper's a
    low: float = 1e-3
    high: float = 10.0
    weights: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BUCKETS, 1.0))

    def update(self, sums: Tensor) -> None:
        """Take in `bucket_sums` of `controlled_kl`: tokens of flagged windows count as KL 0."""
        for name, now in bucket_means(sums).items():
            moved = self.weights[name] * (1 + self.step * _relative_error(now, self.target, name))
            self.weights[name] = min(max(moved, self.low), self.high)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": dict(self.weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weights = dict(state["weights"])


def _relative_error(kl: float, target: Mapping[str, float] | float, name: str) -> float:
    return kl / max(target[name] if isinstance(target, Mapping) else target, 1e-8) - 1


def kl_token_weights(weights: Tensor, segments: Segments, relaxed: Tensor | None = None, rho: float = 0.5) -> Tensor:
    """Weight of every token's KL: that of its completion `[C]`, times rho where relaxed (bool `[N]`): `[N]`."""
    tokens = segments.broadcast(weights.detach())
    return tokens if relaxed is None else torch.where(relaxed.bool(), rho * tokens, tokens)


def controlled_kl(kl: Tensor, segments: Segments, relaxed: Tensor) -> Tensor:
    """Mean KL of each completion `[C]` with relaxed tokens as 0, over all its tokens: relaxation hides no drift."""
    return segments.mean(torch.where(relaxed.bool(), 0.0, kl.detach()))
