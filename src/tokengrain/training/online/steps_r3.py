"""The credit step of DRO (arXiv 2506.13351): how likely a chain of thought makes the reference answer."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from tokengrain.batch import Segments, TokenBatch
from tokengrain.callables import NonNegative, Number, Positive, Share
from tokengrain.credit.r3 import (
    R3,
    Normalise,
    Propagation,
    Rule,
    length_rewards,
    r3_rewards,
    repeat_for_rollouts,
)
from tokengrain.credit.r3_filter import filter_prompts
from tokengrain.errors import RecipeError
from tokengrain.training.online.parts import mean, shares
from tokengrain.training.online.references import (
    chains_of,
    reference_batch,
    reference_logps,
    reference_ranks,
    references_of,
)
from tokengrain.training.online.step import Phase, RolloutStep, Stateless

Baseline = Literal["none", "empty", "replaced"]


class R3Rewards(Stateless):
    """The reasoning reflection reward of each completion, from its chain and the row's reference answer.

    A completion is its chain of thought, up to and with `marker`, and an answer. The reference is scored in place of
    the answer, by the current policy or the reference model. A completion without the marker, or cut at the length
    limit, has no reward: it takes no part in its group and gets advantage 0.

    Args:
        tokenizer: of the policy.
        reference: the frozen model, for scorer "reference".
        scorer: which model scores: "policy" or "reference".
        marker: text that ends the chain.
        column: the row's reference answer; separator: text between chain and answer; end: the answer ends with the
            end-of-sequence token.
        truncated: "keep" uses completions that were cut after their chain had ended.
        baseline: subtract the reference's log-probabilities with the chain masked: "empty", by the marker alone,
            which is the same for the whole group and changes nothing but the logs as long as rewards are compared
            within the group; "replaced", token by token by a placeholder, which differs between completions; "none".
        propagation: correct for what a wrong token does to later ones (then without a baseline); gamma, span,
            rule, share: see `Propagation` (its window and value).
        power, threshold, normalize, ddof, floor, min_sigma: see `r3_rewards`.
        weight: factor of R3; length_weight, length_slope: of the reward for an answer as long as the reference.
        combine: "add" to the outcome there is, or "replace" it.
        filter_top_k: leave out prompts whose reference is out of reach: the mean rank of the worst share
            `filter_rho` of its tokens, for the policy, above this under every chain. None: no such filter.
        filter_drop: leave out this share of the prompts, whose reference varies least over the chains. In every
            rollout; the paper does both now and then, on the data.

    Raises:
        RecipeError: a baseline with propagation, or scorer "reference" without one.
    """

    name = "r3"
    phase: Phase = "rewards"
    needs_group = True

    def __init__(
        self,
        *,
        tokenizer: Any,
        reference: Any = None,
        scorer: Literal["policy", "reference"] = "policy",
        marker: str = "</think>",
        column: str = "reference",
        separator: str = "",
        end: bool = True,
        truncated: Literal["drop", "keep"] = "drop",
        baseline: Baseline | None = None,
        propagation: bool = False,
        gamma: NonNegative = 0.5,
        span: int | None = None,
        rule: Rule = "top",
        share: Positive = 0.1,
        power: NonNegative = 1.0,
        threshold: NonNegative = 0.0,
        normalize: Normalise = "sum",
        ddof: Literal[0, 1] = 0,
        floor: Number | None = None,
        min_sigma: NonNegative = 0.0,
        weight: NonNegative = 1.0,
        length_weight: NonNegative = 0.1,
        length_slope: NonNegative = 0.5,
        combine: Literal["add", "replace"] = "add",
        filter_top_k: Positive | None = None,
        filter_rho: Share = 0.1,
        filter_drop: Share = 0.0,
    ) -> None:
        if propagation and baseline not in (None, "none"):
            raise RecipeError(f"credit 'r3': baseline is {baseline!r} and propagation true; expected one of them")
        if scorer == "reference" and reference is None:
            raise RecipeError("credit 'r3': scorer is 'reference', and there is no reference model")
        if not marker:
            raise RecipeError("credit 'r3': marker is empty; expected the text that ends a chain of thought")
        self.tokenizer, self.reference, self.scorer = tokenizer, reference, scorer
        self.marker, self.truncated, self.combine = marker, truncated, combine
        self.reading: dict[str, Any] = {"column": column, "separator": separator, "end": end}
        self.baseline: Baseline = baseline or ("none" if propagation else "empty")
        self.propagation = Propagation(gamma, span, rule, share) if propagation else None
        self.settings: dict[str, Any] = {
            "power": power,
            "threshold": threshold,
            "normalize": normalize,
            "ddof": ddof,
            "floor": floor,
            "min_sigma": min_sigma,
        }
        self.weight, self.length_weight, self.length_slope = weight, length_weight, length_slope
        self.filter_top_k, self.filter_rho, self.filter_drop = filter_top_k, filter_rho, filter_drop
        self.last: R3 | None = None  # of the latest rollout, for inspection

    def __call__(self, step: RolloutStep) -> None:
        if not step.batch.n_completions:
            return
        found = chains_of(step.batch, self.tokenizer, self.marker)
        usable = torch.tensor([c is not None for c in found], device=step.batch.device)
        if self.truncated == "drop":
            usable = usable & ~step.truncated
        chains = [c or [] for c in found]
        references = references_of(step.batch, self.tokenizer, **self.reading)
        scored = reference_batch(step.batch, chains, references)
        logps = self._logps(step, scored)
        self.last = r3_rewards(
            logps,
            scored.segments,
            scored.group,
            usable=usable,
            baseline=self._baseline(step, chains, references, scored),
            propagation=self.propagation,
            **self.settings,
        )
        lengths = self._length_rewards(step, chains, scored)
        rewards = self.weight * self.last.rewards + self.length_weight * lengths
        before = step.rewards if self.combine == "add" else torch.zeros_like(step.rewards)
        step.rewards = before + rewards.to(step.rewards)
        if self.filter_top_k is not None or self.filter_drop:
            self._filter(step, scored, logps, usable)
        self._measure(step, usable, lengths)

    def _logps(self, step: RolloutStep, batch: TokenBatch) -> Tensor:
        scorer = step.model if self.scorer == "policy" else self.reference
        return reference_logps(scorer, batch, step.max_tokens).to(step.batch.device)

    def _baseline(
        self, step: RolloutStep, chains: list[list[int]], references: list[list[int]], scored: TokenBatch
    ) -> Tensor | None:
        """Log-probabilities of the reference's tokens with the chains masked `[N]`."""
        if self.baseline == "none":
            return None
        marker = list(self.tokenizer(self.marker, add_special_tokens=False)["input_ids"])
        if self.baseline == "replaced":
            names = ("mask_token_id", "pad_token_id", "unk_token_id", "eos_token_id")
            ids = [i for i in (getattr(self.tokenizer, name, None) for name in names) if i is not None]
            if not ids:
                raise RecipeError("credit 'r3': baseline 'replaced' needs a mask, pad or end token in the tokenizer")
            masked = [[ids[0]] * max(len(c) - len(marker), 0) + c[max(len(c) - len(marker), 0) :] for c in chains]
            return self._logps(step, reference_batch(step.batch, masked, references))
        alone = reference_batch(step.batch, [marker] * len(references), references, range(len(references)))
        return repeat_for_rollouts(self._logps(step, alone), alone.segments, scored.segments, scored.group)

    def _length_rewards(self, step: RolloutStep, chains: list[list[int]], scored: TokenBatch) -> Tensor:
        answers = step.batch.completion_offsets.diff() - torch.tensor([len(c) for c in chains], device=scored.device)
        if not self.reading["end"]:
            answers = answers - (~step.truncated).long()  # the end token is no part of the reference
        dtype = step.rewards.dtype
        return length_rewards(answers.to(dtype), scored.segments.lengths.to(dtype), slope=self.length_slope)

    def _filter(self, step: RolloutStep, scored: TokenBatch, logps: Tensor, usable: Tensor) -> None:
        """Drop prompts, judged among those of all ranks by their usable completions."""
        tokens = scored.segments.broadcast(usable)
        ranks = torch.ones_like(logps)
        if self.filter_top_k is not None:
            ranks = reference_ranks(step.model, scored, step.max_tokens).to(logps)
        mine = (
            step.batch.n_prompts,
            logps[tokens].tolist(),
            ranks[tokens].tolist(),
            scored.segments.lengths[usable].tolist(),
            scored.group[usable].tolist(),
        )
        parts, own = shares(step, mine)
        firsts = [sum(p[0] for p in parts[:rank]) for rank in range(len(parts))]
        judged = filter_prompts(
            torch.tensor([v for p in parts for v in p[1]]),
            torch.tensor([v for p in parts for v in p[2]]),
            Segments.from_lengths([n for p in parts for n in p[3]]),
            torch.tensor([first + g for first, p in zip(firsts, parts, strict=True) for g in p[4]], dtype=torch.long),
            rho=self.filter_rho,
            # Prompts without a usable chain have rank infinity.
            top_k=torch.finfo(torch.float32).max if self.filter_top_k is None else self.filter_top_k,
            drop=self.filter_drop,
            ddof=self.settings["ddof"],
        )
        keep = torch.zeros(sum(p[0] for p in parts), dtype=torch.bool)
        keep[: len(judged.keep)] = judged.keep
        step.drop(keep[firsts[own] : firsts[own] + mine[0]].to(step.batch.device))
        step.metrics |= {"r3/kept": mean(keep.float()), "r3/reachable": mean(judged.reachable.float())}

    def _measure(self, step: RolloutStep, usable: Tensor, lengths: Tensor) -> None:
        assert self.last is not None  # set in the call
        step.metrics |= {name: mean(values) for name, values in self.last.metrics.items()}
        step.metrics |= {
            "r3/reward": mean(self.last.rewards),
            "r3/usable": mean(usable.float()),
            "r3/length": mean(lengths[usable]),
        }
        if self.last.log_propagation is not None:
            step.metrics["r3/propagation"] = mean(self.last.log_propagation)
