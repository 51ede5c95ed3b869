"""Credit steps of THR (arXiv 2510.03669) and NTHR (arXiv 2505.18830): advantages weighed by hidden influence."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from tokengrain.callables import Bounds, Number, Share
from tokengrain.credit.thr import (
    correct_influence,
    influence_threshold,
    mixed_groups,
    nthr_weights,
    thr_weights,
    token_hidden_rewards,
)
from tokengrain.errors import RunError
from tokengrain.training.online.parts import mean
from tokengrain.training.online.step import Phase, RolloutStep, Stateless

Steering = Annotated[float, Bounds(ge=-1, le=1)]


class _Influence(Stateless):
    """What both have in common: the influence of every token on its group's correct completions."""

    name: str
    phase: Phase = "after"
    needs = frozenset({"hidden"})
    needs_group = True
    length_normalize: bool
    exclude_self: bool
    restricted: bool

    def influence(self, step: RolloutStep) -> tuple[Tensor, Tensor]:
        """(influence `[N]`, correct `[C]`)."""
        if step.correct is None or step.advantages is None:
            missing = "rewards that say what is correct" if step.correct is None else "advantages"
            raise RunError(f"credit {self.name!r} needs {missing}; this rollout has none")
        found = correct_influence(
            step.quantity("hidden"),
            step.head(),
            step.batch.labels,
            step.segments,
            step.group,
            step.correct,
            length_normalize=self.length_normalize,
            exclude_self=self.exclude_self,
            restricted=self.restricted,
            logps=step.quantity("old_logps"),
        )
        return found.values, step.correct

    def weigh(self, step: RolloutStep, weights: Tensor) -> None:
        """Multiply the advantages."""
        assert step.advantages is not None  # refused in `influence`
        step.advantages = step.advantages * weights.to(step.advantages)


class THR(_Influence):
    """Keeps the tokens that matter to the correct completions of their group, and steers by the sign of how.

    A group without both a correct and an incorrect completion is left as it is. What counts as correct is
    `correct_from`'s reward above one half, whatever the rewards that advantages are made of.

    Args:
        p: weight 1 + p for tokens whose update raises the likelihood of correct completions, 1 - p for the
            others: above 0 for greedy accuracy, below 0 for pass@k; the paper has 0.1, 0 and -0.1.
        mask: leave out tokens of little influence. On models trained from scratch it slows learning a lot.
        beta: the mask's threshold, in smallest means of a correct completion.
        quantile: instead the threshold is this quantile of the group's absolute values.
        exclude_self: leave a token's own completion out.
        restricted: only vocabulary items that occur in the group; False: all, two more products with the head.
    """

    name = "thr"
    length_normalize = True

    def __init__(
        self,
        *,
        p: Steering = 0.1,
        mask: bool = True,
        beta: Number = 1.0,
        quantile: Share | None = None,
        exclude_self: bool = False,
        restricted: bool = True,
    ) -> None:
        self.p, self.mask, self.beta, self.quantile = p, mask, beta, quantile
        self.exclude_self, self.restricted = exclude_self, restricted

    def __call__(self, step: RolloutStep) -> None:
        influence, correct = self.influence(step)
        values = token_hidden_rewards(influence, step.segments, correct)
        tau = None
        if self.mask:
            tau = influence_threshold(
                values, step.segments, step.group, correct, beta=self.beta, quantile=self.quantile
            )
        weights = thr_weights(values, step.segments, step.group, correct, tau, p=self.p)
        self.weigh(step, weights)
        step.quantities["thr"] = values
        self._measure(step, values, weights, correct, tau)

    def _measure(self, step: RolloutStep, values: Tensor, weights: Tensor, correct: Tensor, tau: Tensor | None) -> None:
        mixed = mixed_groups(step.segments, step.group, correct)
        inside, right = mixed[step.group][step.segments.ids], correct.bool()[step.segments.ids]
        chosen = (weights != 0) & inside
        step.metrics |= {
            "thr/mixed": mean(mixed.float()),
            "thr/selected": mean(chosen[inside].float()),
            "thr/positive_correct": mean((values[inside & right] > 0).float()),
            "thr/positive_incorrect": mean((values[inside & ~right] > 0).float()),
        }
        if tau is not None:
            step.metrics["thr/tau"] = mean(tau[mixed])
        if "entropy" in step.quantities:
            step.metrics["thr/entropy_overlap"] = overlap(values[inside].abs(), step.quantities["entropy"][inside])


class NTHR(_Influence):
    """Takes penalties off tokens of incorrect completions that the correct ones share: eta times the advantage.

    Args:
        beta: threshold, in smallest means of a correct completion; 0 in one of the paper's runs.
        exclude_self, restricted: as for `THR`.
    """

    name = "nthr"
    length_normalize = False

    def __init__(self, *, beta: Number = 1.0, exclude_self: bool = False, restricted: bool = True) -> None:
        self.beta, self.exclude_self, self.restricted = beta, exclude_self, restricted

    def __call__(self, step: RolloutStep) -> None:
        influence, correct = self.influence(step)
        tau = influence_threshold(influence, step.segments, step.group, correct, beta=self.beta)
        weights = nthr_weights(influence, step.segments, step.group, correct, tau)
        self.weigh(step, weights)
        step.quantities["thr"] = influence
        mixed = mixed_groups(step.segments, step.group, correct)[step.group]
        wrong = (mixed & ~correct.bool())[step.segments.ids]
        step.metrics |= {
            "nthr/penalties_eased": mean((weights[wrong] != 1).float()),
            "nthr/weight": mean(weights[wrong]),
        }


def overlap(values: Tensor, entropy: Tensor, share: float = 0.2) -> float:
    """Of the tokens with the largest values, the share that is among those of the largest entropy."""
    count = int(share * len(values))
    if not count:
        return 0.0
    top = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    top[values.topk(count).indices] = True
    return float(top[entropy.topk(count).indices].double().mean())
