"""RTO's token reward (arXiv 2404.18922, equation 4.7) and the variants of its ablation (section 5.2).

    r_t = clip(beta1 (log dpo_t - log ref_t), -c, c) - beta2 (log policy_t - log ref_t) + [t last] beta3 s

with s the sentence reward of the completion, clipped to +-10. The first term is the dense part: a policy trained by
DPO against the reference it started from. For an optimal DPO policy it is the true reward of the token up to a
difference of potentials. Variants differ in where it stands; the KL penalty stays on its token in all of them.

    rto      on each token
    semi     the sum over a sentence on the sentence's last token (Semi-RTO)
    delayed  the sum over the completion on its last token (DDPO, also DPPO in the paper)
    shaping  on each token, and its sum subtracted at the last one: the total is PPO's (RS-PPO)
    ppo      nowhere

Everything is fixed for the whole update on a rollout: no gradient. `tokengrain.credit.gae` makes advantages of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.errors import RecipeError
from tokengrain.method import Card, RolloutStep, rollout_credit
from tokengrain.methods._rollout import mean, scored
from tokengrain.methods._shaping import penalised, sampled_kl
from tokengrain.methods.ppo import KLCoefficient
from tokengrain.methods.tgdpo import guide_token_rewards
from tokengrain.scoring.reference import scorer_logps
from tokengrain.scoring.score import in_parts
from tokengrain.settings import NonNegative, Positive

CARD = Card(
    "rto",
    "RTO",
    "PPO on DPO's token rewards",
    "DPO Meets PPO: Reinforced Token Optimization for RLHF",
    "2404.18922",
    "ICML 2025",
    trains="guide on pairs, then policy and critic, online",
    credit="log-ratio of a DPO-trained guide, through a critic",
    objective="ppo",
)

Variant = Literal["rto", "semi", "delayed", "shaping", "ppo"]


@dataclass(frozen=True)
class RTORewards:
    """Rewards of a rollout and their parts, without gradient.

    Attributes:
        rewards: `[N]`, what GAE takes.
        dense: `[N]`, the DPO term of every token, clipped, before a variant moves it.
        kl: `[N]`, log policy - log reference, not weighted.
        sentence: `[C]`, beta3 times the clipped sentence reward.
        metrics: one value per completion `[C]` each, for logging. "rto/dense_sum" grows with the length of the
            completion; where "rto/dominates" is often 1 (its size exceeds that of the sentence reward) beta1 is
            too large: the paper's gain is lost.
    """

    rewards: Tensor
    dense: Tensor
    kl: Tensor
    sentence: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


def rto_rewards(
    logps: Tensor,
    segments: Segments,
    *,
    ref_logps: Tensor,
    sentence_rewards: Tensor,
    dpo_logps: Tensor | None = None,
    dpo_ref_logps: Tensor | None = None,
    sentences: Tensor | None = None,
    variant: Variant = "rto",
    beta1: NonNegative = 0.05,
    beta2: NonNegative = 0.01,
    beta3: NonNegative = 1.0,
    clip: Positive | Literal["beta1"] | None = "beta1",
    sentence_clip: Positive | None = 10.0,
) -> RTORewards:
    """The reward of every token.

    Args:
        logps: log-probabilities under the policy that sampled `[N]`, nats.
        segments: cuts `[N]` into C completions.
        ref_logps: the same under the frozen reference `[N]`.
        sentence_rewards: `[C]`, on the scale of rewards: (raw - mean) / std with the constants of the reward model
            (`scale_scores(raw, "zscore", moments)`).
        dpo_logps: log-probabilities under the policy trained by DPO `[N]`; not used by variant "ppo".
        dpo_ref_logps: what the DPO policy was trained against `[N]`; None: ref_logps.
        sentences: long `[N]`, the sentence of each token, from `sentence_ids`; needed for variant "semi".
        variant: where the dense part stands, see above.
        beta1: reward per nat of the dense part; it replaces the beta of DPO. 0: PPO.
        beta2: weight of the KL penalty; beta3: weight of the sentence reward.
        clip: bound of the dense part of a token, in reward, after beta1; "beta1": log-ratios to +-1, the authors'
            script; None: no bound, as in the paper.
        sentence_clip: bound of the sentence reward, before beta3; None: none.

    Raises:
        ValueError: a sentence reward that is NaN, or something missing that the variant needs.
    """
    missing = torch.isnan(sentence_rewards).nonzero().flatten().tolist()
    if missing:
        raise ValueError(f"rto_rewards: completions {missing} have no sentence reward (NaN); leave them out")
    if variant == "ppo":
        raw = torch.zeros_like(logps)
    elif dpo_logps is None:
        raise ValueError(f"rto_rewards: variant {variant!r} needs dpo_logps")
    else:
        raw = guide_token_rewards(dpo_logps, ref_logps if dpo_ref_logps is None else dpo_ref_logps, beta1)
    bound = beta1 if clip == "beta1" else clip
    dense = raw if bound is None else raw.clamp(-bound, bound)
    s = sentence_rewards.detach().to(dense.dtype)
    s = beta3 * (s if sentence_clip is None else s.clamp(-sentence_clip, sentence_clip))
    kl = sampled_kl(logps, ref_logps)
    rewards = penalised(_placed(dense, segments, variant, sentences), kl, beta2)
    rewards = rewards + torch.where(segments.is_last, segments.broadcast(s), 0.0)
    clipped = (raw != dense).to(dense.dtype)
    metrics = {"rto/clipped": segments.mean(clipped), "kl/ref": segments.mean(kl), **_sizes(dense, s, segments)}
    return RTORewards(rewards, dense, kl, s, metrics)


def sentence_ids(delimiter: Tensor, segments: Segments) -> Tensor:
    """Numbers sentences: a token that ends one belongs to it. Long `[N]`, not starting from 0 in each completion.

    Args:
        delimiter: bool `[N]`, tokens that end a sentence.
    """
    ends = delimiter.bool() | segments.is_last
    return ends.long().cumsum(0) - ends.long()


def _sizes(dense: Tensor, sentence: Tensor, segments: Segments) -> dict[str, Tensor]:
    total = segments.sum(dense)
    return {
        "rto/dense": segments.mean(dense),
        "rto/dense_sum": total,
        "rto/dominates": (total.abs() > sentence.abs()).to(dense.dtype),
        "rto/sentence": sentence,
    }


def _placed(dense: Tensor, segments: Segments, variant: Variant, sentences: Tensor | None) -> Tensor:
    """The dense part `[N]` where a variant has it."""
    if variant in ("rto", "ppo"):
        return dense
    if variant == "delayed":
        return _at_ends(dense, segments.is_last)
    if variant == "shaping":
        return dense - _at_ends(dense, segments.is_last)
    if variant != "semi":
        raise ValueError(f"variant must be 'rto', 'semi', 'delayed', 'shaping' or 'ppo', got {variant!r}")
    if sentences is None:
        raise ValueError("rto_rewards: variant 'semi' needs sentences, the sentence of each token [N]")
    changes = torch.ones_like(segments.is_last)
    changes[:-1] = sentences[1:] != sentences[:-1]
    return _at_ends(dense, segments.is_last | changes)


def _at_ends(values: Tensor, ends: Tensor) -> Tensor:
    """Each run of tokens up to an end, summed on the end; 0 elsewhere: `[N] -> [N]`."""
    run = ends.long().cumsum(0) - ends.long()
    totals = torch.zeros_like(values).index_add(0, run, values)
    return torch.where(ends, totals[run], 0.0)


# ----------------------------------------------------------------------------------------------------
# The credit step of RTO (arXiv 2404.18922): a DPO policy's log-ratio as reward of each token.


@rollout_credit("rto", phase="rewards", needs={"ref_logps"})
class RTO:
    """Rewards of RTO: the DPO log-ratio and the KL penalty per token, the outcome as sentence reward on the last one.

    What was given per token before is added to. `normalize` (of the outcome) belongs before it, if the sentence
    reward is that of a reward model. Where the metric "rto/dominates" is often 1, the dense part is larger than the
    sentence reward and the method's gain is lost: lower beta1.

    Args:
        model: the guide: the policy trained by DPO, a model or a `Reference`; not for variant "ppo".
        reference: what it was trained against; None: the reference of the run.
        variant: "rto", or of the paper's ablation "semi" (at the ends of sentences), "delayed" (at the end),
            "shaping" (its sum taken off at the end) and "ppo" (without it).
        beta1: reward per nat of the guide's log-ratio; it replaces DPO's beta.
        beta2: weight of the KL penalty; with kl_target the first one.
        beta3: weight of the sentence reward.
        clip: bound of the dense part of a token; "beta1": log-ratios to +-1; None: none, as in the paper.
        sentence_clip: bound of the sentence reward before beta3; None: none.
        kl_target, kl_horizon: beta2 adapts to hold this mean KL, nats per token; None: it is fixed.
        tokenizer, delimiters: for variant "semi": a token whose text ends in one of these ends a sentence.

    Raises:
        RecipeError: no guide, or variant "semi" without a tokenizer.
    """

    def __init__(
        self,
        *,
        model: Any = None,
        reference: Any = None,
        tokenizer: Any = None,
        variant: Variant = "rto",
        beta1: NonNegative = 0.05,
        beta2: NonNegative = 0.01,
        beta3: NonNegative = 1.0,
        clip: Positive | Literal["beta1"] | None = "beta1",
        sentence_clip: Positive | None = 10.0,
        kl_target: Positive | None = None,
        kl_horizon: Positive = 10000.0,
        delimiters: tuple[str, ...] = (".", "!", "?", "\n"),
    ) -> None:
        if model is None and variant != "ppo" and beta1 > 0:
            raise RecipeError("credit 'rto' needs a guide (model), the policy trained by DPO; or variant: ppo")
        if variant == "semi" and tokenizer is None:
            raise RecipeError("credit 'rto': variant 'semi' needs a tokenizer, which knows where sentences end")
        if clip == "beta1" and not beta1:
            clip = None  # nothing to bound
        self.model, self.reference, self.tokenizer, self.delimiters = model, reference, tokenizer, tuple(delimiters)
        self.settings: dict[str, Any] = {
            "variant": variant,
            "beta1": beta1,
            "beta3": beta3,
            "clip": clip,
            "sentence_clip": sentence_clip,
        }
        self.controller = KLCoefficient(beta2, kl_target, kl_horizon)
        self._ends: dict[int, bool] = {}

    def __call__(self, step: RolloutStep) -> None:
        known = scored(step)
        logps, ref_logps = step.quantity("old_logps"), step.quantity("ref_logps")
        sentences = None
        if self.settings["variant"] == "semi":
            sentences = sentence_ids(self._delimiter(step), step.segments)
        found = rto_rewards(
            logps,
            step.segments,
            ref_logps=ref_logps,
            dpo_logps=self._logps(self.model, step, ref_logps),
            dpo_ref_logps=self._logps(self.reference, step, ref_logps),
            sentence_rewards=torch.where(known, step.rewards, 0.0),
            sentences=sentences,
            beta2=self.controller.coef,
            **self.settings,
        )
        # The sentence reward stays the outcome, so that group methods and logs see it apart.
        at_end = torch.where(step.segments.is_last, step.broadcast(found.sentence), 0.0)
        dense = found.rewards - at_end
        step.token_rewards = dense if step.token_rewards is None else step.token_rewards + dense
        step.rewards = torch.where(torch.isnan(step.rewards), torch.nan, found.sentence).to(step.rewards)
        step.metrics |= {name: mean(values[known]) for name, values in found.metrics.items()}
        step.metrics["rto/kl_coef"] = self.controller.coef
        self.controller.follow(step, found.kl)

    def _logps(self, scorer: Any, step: RolloutStep, otherwise: Tensor) -> Tensor:
        if scorer is None:
            return otherwise
        found = in_parts(step.batch, step.max_tokens, lambda part: {"logps": scorer_logps(scorer, part)})
        return found["logps"].to(otherwise)

    def _delimiter(self, step: RolloutStep) -> Tensor:
        """Tokens that end a sentence, bool `[N]`."""
        labels = step.batch.labels
        unknown = [i for i in torch.unique(labels).tolist() if i not in self._ends]
        texts = self.tokenizer.batch_decode([[i] for i in unknown], clean_up_tokenization_spaces=False)
        self._ends |= {i: t.rstrip(" ").endswith(self.delimiters) for i, t in zip(unknown, texts, strict=True)}
        return torch.tensor([self._ends[i] for i in labels.tolist()], dtype=torch.bool, device=labels.device)

    def state_dict(self) -> dict[str, Any]:
        return self.controller.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.controller.load_state_dict(state)
