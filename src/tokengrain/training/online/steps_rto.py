"""The credit step of RTO (arXiv 2404.18922): a DPO policy's log-ratio as reward of each token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from tokengrain.callables import NonNegative, Positive
from tokengrain.credit.base import scorer_logps
from tokengrain.credit.rto import Variant, rto_rewards, sentence_ids
from tokengrain.errors import RecipeError
from tokengrain.training.online.parts import mean, scored
from tokengrain.training.online.scoring import in_parts
from tokengrain.training.online.step import Phase, RolloutStep
from tokengrain.training.online.steps_ppo import KLCoefficient


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

    name = "rto"
    phase: Phase = "rewards"
    needs = frozenset({"ref_logps"})

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
