"""The credit step of DCPO (arXiv 2509.02333): advantages against everything that a prompt has earned so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch

from tokengrain.credit.dcpo import PromptHistory
from tokengrain.errors import RecipeError
from tokengrain.training.online.parts import mean, scored, shares
from tokengrain.training.online.step import Phase, RolloutStep


class DCPOAdvantages:
    """Smooth advantage standardisation, one advantage per completion.

    Statistics are by row id: they survive shuffles, epochs, resumes and another number of ranks. A prompt that stands
    twice in a rollout, on whichever ranks, is one visit.

    Args:
        ddof: of a visit's deviation: 1 as in the released code, 0 as in the paper.
        window: weigh the past as at most so many visits; None: all of it.
        normalize_by_std: False: differences to the means only.
        solved: what a prompt's advantages are once its mean reward of all visits is the highest reward it can earn
            (max_reward): "keep", or "zero", so that solved prompts are not pushed on.
        max_reward: the highest reward, for solved "zero".

    Raises:
        RecipeError: solved "zero" without max_reward; a window below 1.
    """

    name = "dcpo"
    phase: Phase = "advantages"
    needs: frozenset[str] = frozenset()

    def __init__(
        self,
        *,
        ddof: Literal[0, 1] = 1,
        window: int | None = None,
        normalize_by_std: bool = True,
        solved: Literal["keep", "zero"] = "keep",
        max_reward: float | None = None,
    ) -> None:
        if solved == "zero" and max_reward is None:
            raise RecipeError("credit 'dcpo': solved is 'zero', which needs max_reward")
        if window is not None and window < 1:
            raise RecipeError(f"credit 'dcpo': window is {window}; expected at least 1 visit, or none")
        self.history = PromptHistory(ddof=ddof, window=window, normalize_by_std=normalize_by_std)
        self.limit = max_reward if solved == "zero" else None

    def __call__(self, step: RolloutStep) -> None:
        total = step.total
        known = scored(step)
        rewards = [r if k else None for r, k in zip(total.double().tolist(), known.tolist(), strict=True)]
        parts, own = shares(step, (list(step.prompt_ids), rewards, step.group.tolist()))
        prompts = [p for ids, _, _ in parts for p in ids]
        firsts = [sum(len(ids) for ids, _, _ in parts[:rank]) for rank in range(len(parts))]
        group = torch.tensor([first + g for first, (_, _, groups) in zip(firsts, parts, strict=True) for g in groups])
        everything = [math.nan if r is None else r for _, rs, _ in parts for r in rs]
        found = self.history.smooth(torch.tensor(everything, dtype=torch.float64), group, prompts)
        self.history.record(found.visits)
        start = sum(len(rs) for _, rs, _ in parts[:own])
        advantages = found.advantages[start : start + len(rewards)].to(total)
        if self.limit is not None:
            # Rewards are float32, which holds 0.7 a little below 0.7; a mean over visits rounds as well.
            limit = self.limit - 1e-6 * max(1.0, abs(self.limit))
            solved = torch.tensor([self.history[p].mean >= limit for p in step.prompt_ids], device=total.device)
            advantages = torch.where(solved[step.group], 0.0, advantages)
        step.advantages = step.broadcast(advantages)
        used = (advantages != 0) & known
        visits = [self.history[p].count for p in step.prompt_ids]
        step.metrics |= {
            "dcpo/utilisation": mean(used.float()),
            "dcpo/visits": sum(visits) / max(len(visits), 1),
            "dcpo/prompts": float(len(self.history.visits)),
        }

    def state_dict(self) -> dict[str, Any]:
        return self.history.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.history.load_state_dict(state)
