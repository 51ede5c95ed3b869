"""RTO, Reinforced Token Optimization (arXiv 2404.18922): a DPO policy's log-ratio as the reward of each token.

    r_t = clip(beta1 (log dpo_t - log ref_t), -c, c) - beta2 (log policy_t - log ref_t) + [t last] beta3 s     (4.7)

with s the sentence reward of the completion, its outcome. The first term is the dense part: a policy trained by DPO
against the reference it started from. For an optimal DPO policy it is the true reward of the token up to a difference
of potentials. The variants of the ablation (section 5.2) differ in where it stands; the KL penalty stays on its token:

    rto      on each token
    semi     the sum over a sentence on the sentence's last token (Semi-RTO)
    delayed  the sum over the completion on its last token (DDPO, also DPPO in the paper)
    shaping  on each token, and its sum subtracted at the last one: the total is PPO's (RS-PPO)
    ppo      nowhere

Everything is fixed for the whole update on a rollout: no gradient. `gae` makes advantages of it, PPO the update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.errors import RecipeError, require
from tokengrain.method import Card, Rollout, rollout_credit
from tokengrain.methods._clipped import sampled_kl
from tokengrain.methods._shaping import mean, scored
from tokengrain.methods.ppo import next_coefficient
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


@rollout_credit("rto", phase="rewards", needs={"ref_logps"})
@dataclass(kw_only=True)
class RTO:
    """Rewards of RTO: the DPO log-ratio and the KL penalty per token, the outcome as sentence reward on the last one.

    It adds to what was given per token. `normalize` (of the outcome) belongs before it, if the sentence reward is that
    of a reward model. Where the metric "rto/dominates" is often 1, the dense part is larger than the sentence reward
    and the method's gain is lost: lower beta1.
    """

    model: Any = None  # the guide: the policy trained by DPO, a model or a `Reference`; not for variant "ppo"
    reference: Any = None  # what it was trained against; None: the reference of the run
    tokenizer: Any = None  # for variant "semi"
    variant: Literal["rto", "semi", "delayed", "shaping", "ppo"] = "rto"  # where the dense part stands
    beta1: NonNegative = 0.05  # reward per nat of the guide's log-ratio; it replaces DPO's beta. 0: PPO
    beta2: NonNegative = 0.01  # weight of the KL penalty; with kl_target the first one
    beta3: NonNegative = 1.0  # weight of the sentence reward
    # Bound of the dense part of a token, in reward, after beta1; "beta1": log-ratios to +-1, the authors' script; None:
    # none, as in the paper.
    clip: Positive | Literal["beta1"] | None = "beta1"
    sentence_clip: Positive | None = 10.0  # bound of the sentence reward before beta3
    kl_target: Positive | None = None  # beta2 adapts to hold this mean KL, nats per token; None: it is fixed
    kl_horizon: Positive = 10000.0
    delimiters: tuple[str, ...] = (".", "!", "?", "\n")  # a token whose text ends in one of these ends a sentence
    _ends: dict[int, bool] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        guided = self.model is not None or self.variant == "ppo" or not self.beta1 > 0
        require(guided, RecipeError, "credit 'rto' needs a guide (model), the policy trained by DPO; or variant: ppo")
        missing = "credit 'rto': variant 'semi' needs a tokenizer, which knows where sentences end"
        require(self.variant != "semi" or self.tokenizer is not None, RecipeError, missing)

    def __call__(self, rollout: Rollout) -> None:
        known, ref_logps = scored(rollout), rollout.quantity("ref_logps")
        guide, start = (self._logps(scorer, rollout, ref_logps) for scorer in (self.model, self.reference))
        given = {"ref_logps": ref_logps, "dpo_logps": guide, "dpo_ref_logps": start}
        given["sentence_rewards"] = torch.where(known, rollout.rewards, 0.0)
        ends = self._sentence_ends(rollout.batch.labels) if self.variant == "semi" else None
        found = self.rewards(rollout.quantity("old_logps"), rollout.segments, **given, ends=ends)
        # The sentence reward stays the outcome, so that group methods and logs see it apart.
        at_end = torch.where(rollout.segments.is_last, rollout.broadcast(found.sentence), 0.0)
        dense = found.rewards - at_end
        rollout.token_rewards = dense if rollout.token_rewards is None else rollout.token_rewards + dense
        rollout.rewards = torch.where(torch.isnan(rollout.rewards), torch.nan, found.sentence).to(rollout.rewards)
        rollout.metrics |= {name: mean(values[known]) for name, values in found.metrics.items()}
        rollout.metrics["rto/kl_coef"] = self.beta2
        self.beta2 = next_coefficient(rollout, found.kl, self.beta2, self.kl_target, self.kl_horizon)

    def rewards(
        self,
        logps: Tensor,
        segments: Segments,
        *,
        ref_logps: Tensor,
        dpo_logps: Tensor,
        sentence_rewards: Tensor,
        dpo_ref_logps: Tensor | None = None,
        ends: Tensor | None = None,
    ) -> RTORewards:
        """The reward of every token, equation 4.7, from log-probabilities `[N]` of the policy that sampled.

        `sentence_rewards` are s `[C]`; `ends`, for variant "semi", says which tokens end a sentence, bool `[N]`.
        """
        raw = (self.beta1 * (dpo_logps - (ref_logps if dpo_ref_logps is None else dpo_ref_logps))).detach()
        if self.variant == "ppo":
            raw = torch.zeros_like(logps)
        bound = self.beta1 or None if self.clip == "beta1" else self.clip
        dense = raw if bound is None else raw.clamp(-bound, bound)
        s = sentence_rewards.detach().to(dense.dtype)
        s = self.beta3 * (s if self.sentence_clip is None else s.clamp(-self.sentence_clip, self.sentence_clip))
        kl = sampled_kl(logps, ref_logps)
        rewards = self._placed(dense, segments, ends) - self.beta2 * kl
        rewards = rewards + torch.where(segments.is_last, segments.broadcast(s), 0.0)
        total = segments.sum(dense)
        metrics = {
            "rto/clipped": segments.mean((raw != dense).to(dense.dtype)),
            "kl/ref": segments.mean(kl),
            "rto/dense": segments.mean(dense),
            "rto/dense_sum": total,
            "rto/dominates": (total.abs() > s.abs()).to(dense.dtype),
            "rto/sentence": s,
        }
        return RTORewards(rewards, dense, kl, s, metrics)

    def _placed(self, dense: Tensor, segments: Segments, ends: Tensor | None) -> Tensor:
        """The dense part `[N]` where the variant has it: each run of tokens up to an end, summed on the end."""
        if self.variant not in ("delayed", "shaping", "semi"):
            return dense
        last = segments.is_last
        ends = last | ends if self.variant == "semi" and ends is not None else last
        run = ends.long().cumsum(0) - ends.long()
        totals = torch.zeros_like(dense).index_add(0, run, dense)
        moved = torch.where(ends, totals[run], 0.0)
        return dense - moved if self.variant == "shaping" else moved

    def _logps(self, scorer: Any, rollout: Rollout, otherwise: Tensor) -> Tensor:
        if scorer is None:
            return otherwise
        found = in_parts(rollout.batch, rollout.max_tokens, lambda part: {"logps": scorer_logps(scorer, part)})
        return found["logps"].to(otherwise)

    def _sentence_ends(self, labels: Tensor) -> Tensor:
        """Tokens that end a sentence, bool `[N]`."""
        unknown = [i for i in torch.unique(labels).tolist() if i not in self._ends]
        texts = self.tokenizer.batch_decode([[i] for i in unknown], clean_up_tokenization_spaces=False)
        delimiters = tuple(self.delimiters)
        self._ends |= {i: t.rstrip(" ").endswith(delimiters) for i, t in zip(unknown, texts, strict=True)}
        return torch.tensor([self._ends[i] for i in labels.tolist()], dtype=torch.bool, device=labels.device)

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self.beta2}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.beta2 = float(state["coef"])


@dataclass(frozen=True)
class RTORewards:
    """Rewards of a rollout and their parts, without gradient."""

    rewards: Tensor  # [N], what GAE takes
    dense: Tensor  # [N], the DPO term of every token, clipped, before a variant moves it
    kl: Tensor  # [N], not weighted
    sentence: Tensor  # [C], beta3 times the clipped sentence reward
    metrics: dict[str, Tensor]  # [C] each; "rto/dense_sum" grows with the length of the completion
