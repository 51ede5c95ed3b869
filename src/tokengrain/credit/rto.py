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

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.callables import NonNegative, Positive
from tokengrain.credit.guide import guide_token_rewards
from tokengrain.credit.shaping import penalised, sampled_kl

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
