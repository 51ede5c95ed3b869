"""The credit step of AEPO (ARES, arXiv 2510.08457): how many uncertain tokens a prompt is worth, by its difficulty."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.callables import NonNegative, Positive, Share
from tokengrain.credit.ares import EntropyShaping, Observation, Shape, TargetFrom, difficulty
from tokengrain.credit.entropy_window import (
    HighEntropy,
    Mode,
    RunningThreshold,
    Triggers,
    batch_threshold,
    high_entropy,
    measured,
    trigger_flags,
    trigger_tokens,
)
from tokengrain.credit.kl_control import (
    BUCKETS,
    LinearBucketKL,
    LogBucketKL,
    bucket_means,
    bucket_sums,
    controlled_kl,
    kl_token_weights,
    per_bucket,
)
from tokengrain.credit.shaping import sampled_kl
from tokengrain.errors import RecipeError, RunError
from tokengrain.training.online.parts import mean, scored
from tokengrain.training.online.step import Phase, RolloutStep

KLControl = Literal["log_ema", "multiplicative", "none"]


class AEPO:
    """Adds the entropy reward to the outcome, and weighs the KL term of the loss by difficulty.

    High window-entropy (HWE) tokens are counted in each completion; a prompt is easy, medium or hard by the share of
    its completions that are correct. Objective: grpo with epsilon_high 0.3, ratio_cap 3, clamp true and beta 0.01.
    A filter of groups belongs on accuracy, before this step, or after it: shaped rewards make every group look varied.

    In mode "code" the threshold lags: the first rollout has none, so nothing is counted and its rewards stay as
    they are. The KL is that of the rollout, k3 between the policy that sampled and the reference, and its weights move
    once per rollout (in the released code once per micro-batch).

    Args:
        tokenizer: needed for triggers.
        mode: which tokens are HWE tokens, see `tokengrain.credit.entropy_window`.
        window: tokens.
        quantile: of the threshold.
        decay: of the running threshold of mode "code".
        triggers: words that may count in modes "code" and "token_semantic": "english", a list, or None: every token.
        easy, medium: least shares of correct completions.
        shape, targets, target_ema, alpha_lr, alpha_max, strength_cap, preserve_order: see `EntropyShaping`.
        kl: what moves the weights: "log_ema" (the released code), "multiplicative" (the paper's Algorithm 1); "none":
            no weights, and no reference is asked.
        kl_target: nats per token; kl_interval: of "log_ema", rollouts between two moves; kl_step: of the other.
        rho: weight of the KL of HWE tokens, in [0, 1]; None: 0.5 in mode "paper", else 1.

    Raises:
        RecipeError: triggers without a tokenizer, or none of them in its vocabulary; thresholds out of order.
    """

    name = "aepo"
    phase: Phase = "rewards"
    needs_group = True

    def __init__(
        self,
        *,
        tokenizer: Any = None,
        mode: Mode = "code",
        window: int = 4,
        quantile: Share = 0.95,
        decay: Share = 0.99,
        triggers: Triggers = "english",
        easy: Share = 2 / 3,
        medium: Share = 1 / 3,
        shape: Shape = "smooth",
        targets: TargetFrom = "batch",
        target_ema: Share = 0.0,
        alpha_lr: NonNegative = 0.05,
        alpha_max: Positive = 2.0,
        strength_cap: Positive | None = None,
        preserve_order: bool = False,
        kl: KLControl = "log_ema",
        kl_target: Positive = 0.01,
        kl_interval: int = 1,
        kl_step: Positive = 0.1,
        rho: Share | None = None,
    ) -> None:
        if not medium < easy:
            raise RecipeError(f"credit 'aepo': easy is {easy} and medium {medium}; expected medium < easy")
        if window < 1 or kl_interval < 1:
            raise RecipeError(f"credit 'aepo': window is {window}, kl_interval {kl_interval}; expected at least 1")
        self.mode, self.window, self.quantile, self.easy, self.medium = mode, window, quantile, easy, medium
        self.rho = (0.5 if mode == "paper" else 1.0) if rho is None else rho
        self.table = None if mode == "paper" else trigger_tokens(tokenizer, triggers, "credit 'aepo'")
        self.threshold = RunningThreshold(decay)
        self.shaping = EntropyShaping(
            shape,
            targets,
            ema=target_ema,
            alpha_lr=alpha_lr,
            alpha_max=alpha_max,
            strength_cap=strength_cap,
            preserve_order=preserve_order,
        )
        self.controller: LogBucketKL | LinearBucketKL | None = None
        if kl == "log_ema":
            self.controller = LogBucketKL(target=kl_target, interval=kl_interval)
        elif kl == "multiplicative":
            self.controller = LinearBucketKL(target=kl_target, step=kl_step)
        self.needs = frozenset({"entropy"} if self.controller is None else {"entropy", "ref_logps"})
        self.provides = frozenset() if self.controller is None else frozenset({"kl_weights"})

    def __call__(self, step: RolloutStep) -> None:
        if step.correct is None:
            raise RunError("credit 'aepo' needs rewards that say what is correct; this rollout has none")
        correct = torch.where(scored(step), step.correct.double(), torch.nan)
        buckets = difficulty(correct, step.group, easy=self.easy, medium=self.medium)
        found = self._counted(step)
        if found is not None:
            self._shape(step, correct, buckets, found)
            step.quantities["hwe"] = found.mask.float()
        if self.controller is not None:
            self._weigh_kl(step, buckets[step.group], found)
        for place, name in enumerate(BUCKETS):
            step.metrics[f"aepo/{name}"] = mean((buckets == place).float())

    def _counted(self, step: RolloutStep) -> HighEntropy | None:
        """The HWE tokens, with the threshold of before this rollout in mode "code"; None: there is none yet."""
        entropy = step.quantity("entropy")
        everyone = step.gather(entropy)
        lengths = step.gather(step.segments.lengths)
        segments = Segments(torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]))
        now = batch_threshold(everyone, segments, mode=self.mode, window=self.window, quantile=self.quantile)
        tau = now
        if self.mode == "code":
            before = self.threshold.value
            self.threshold.update(now)
            if before is None:
                return None
            tau = before
        step.metrics["aepo/tau"] = tau
        values = measured(entropy, step.segments, mode=self.mode, window=self.window)
        return high_entropy(values, step.segments, threshold=tau, triggers=trigger_flags(self.table, step.batch.labels))

    def _shape(self, step: RolloutStep, correct: Tensor, buckets: Tensor, found: HighEntropy) -> None:
        # On the host, where ranks with devices of their own can add.
        own = Observation.of(found.count.cpu(), step.group.cpu(), buckets.cpu())
        first, *others = step.gather(own)
        seen = sum(others, first)
        self.shaping.observe(seen)
        shaped = self.shaping.reward(correct, found.count, buckets[step.group]) - correct
        step.rewards = step.rewards + shaped.to(step.rewards)
        for name, hwe in bucket_means(seen.prompts).items():
            step.metrics[f"aepo/hwe_{name}"] = hwe
        for name, target in self.shaping.target.items():
            step.metrics |= {f"aepo/target_{name}": target, f"aepo/alpha_{name}": self.shaping.alpha[name]}
        step.metrics |= {
            "aepo/hwe": mean(found.count.double()),
            "aepo/below": mean(found.below.double()),
            "aepo/reward_correct": mean(shaped[correct == 1]),
            "aepo/reward_wrong": mean(shaped[correct == 0]),
            "aepo/inversions": inversions(step.rewards, correct, step.group),
        }

    def _weigh_kl(self, step: RolloutStep, buckets: Tensor, found: HighEntropy | None) -> None:
        """Weights of the tokens' KL terms from the KL of this rollout, that of all ranks."""
        assert self.controller is not None
        relaxed = None if found is None or self.rho == 1 else found.mask
        kl = sampled_kl(step.quantity("old_logps"), step.quantity("ref_logps"), "k3")
        if isinstance(self.controller, LinearBucketKL) and relaxed is not None:
            each = controlled_kl(kl, step.segments, relaxed)
        else:
            each = step.segments.mean(kl)
        each = torch.where(step.segments.lengths > 0, each, torch.nan)
        self.controller.update(step.gather(bucket_sums(each, buckets)[None]).sum(0))
        weights = per_bucket(self.controller.weights, buckets, missing=1.0)
        tokens = kl_token_weights(weights, step.segments, relaxed, self.rho)
        step.quantities["kl_weights"] = tokens.to(kl)
        step.metrics |= {f"aepo/kl_weight_{name}": w for name, w in self.controller.weights.items()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "threshold": self.threshold.state_dict(),
            "shaping": self.shaping.state_dict(),
            "kl": self.controller.state_dict() if self.controller is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if (state["kl"] is None) != (self.controller is None):
            raise RunError("credit 'aepo': the checkpoint was made with another setting of `kl`")
        self.threshold.load_state_dict(state["threshold"])
        self.shaping.load_state_dict(state["shaping"])
        if self.controller is not None:
            self.controller.load_state_dict(state["kl"])


def inversions(rewards: Tensor, correct: Tensor, group: Tensor) -> float:
    """Share of wrong completions whose reward exceeds that of some correct one of their group."""
    groups = int(group.max()) + 1 if group.numel() else 0
    right = torch.where(correct == 1, rewards, torch.inf)
    worst = rewards.new_full((groups,), torch.inf).scatter_reduce(0, group, right.to(rewards), "amin")
    wrong = correct == 0
    return mean((rewards > worst[group])[wrong].float())
