"""`RolloutSource`: draws prompts, samples and rewards completions, filters and refills."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from tokengrain.rewards import RewardResult
from tokengrain.rollout.base import PromptItem, Rollouts
from tokengrain.training.online.joining import kept, merge, select_prompts
from tokengrain.training.online.measures import Drawn
from tokengrain.training.online.prompts import PromptOrder
from tokengrain.training.online.setting import LoopParts
from tokengrain.training.online.step import RolloutStep

PHASES = ("rollout", "reward", "scoring", "credit")


class Stopwatch:
    """Seconds spent in each phase of a rollout."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - started


class RolloutSource:
    """Completions with their rewards.

    Args:
        parts: see `LoopParts`.

    Attributes:
        drawn: prompts drawn so far, on all ranks.
    """

    def __init__(self, parts: LoopParts) -> None:
        self.parts, self.args, self.ranks = parts, parts.args, parts.ranks
        seed = parts.args.seed if parts.args.data_seed is None else parts.args.data_seed
        self.order = PromptOrder(len(parts.prompts), seed, shuffle=parts.args.shuffle_prompts)
        self.drawn = 0

    def sample(self, index: int, drawn: Drawn, timed: Stopwatch) -> RolloutStep:
        """Rollout number `index`: sampled, rewarded, filtered and refilled. `keep` is set only where nothing is left.

        Args:
            drawn: what was sampled is added to it.

        Raises:
            RolloutError, RewardError: sampling or a reward failed; `RunError`: on another rank.
        """
        filters = [s for s in self.parts.steps if s.phase == "filter"]
        refill = any(getattr(s, "refill", False) for s in filters)
        target = count = self.args.prompts_per_rollout // self.ranks.world
        rounds: list[RolloutStep] = []
        sampled = found = 0.0
        while True:
            step = self._round(index, len(rounds), count, drawn, timed)
            with timed("credit"):
                for one in filters:
                    self.parts.scorer.add(step, one.needs)
                    one(step)
            rounds.append(step)
            missing = self.ranks.largest(target - sum(int(kept(s).sum()) for s in rounds))
            if not refill or missing <= 0 or len(rounds) > self.args.max_refills:
                break
            sampled += self.ranks.total(count)
            found += self.ranks.total(int(kept(step).sum()))
            # As many as are likely to give what is missing.
            count = target if not found else min(target, -int(-missing * sampled // found))
        drawn.refills = len(rounds) - 1
        return self._chosen(rounds, target) if filters else rounds[0]

    def _chosen(self, rounds: Sequence[RolloutStep], target: int) -> RolloutStep:
        """The first `target` prompts that filters kept; if there is none, one that they did not, marked so."""
        parts, left = [], target
        for step in rounds:
            prompts = kept(step).nonzero()[:left, 0].tolist()
            left -= len(prompts)
            if prompts:
                parts.append(select_prompts(step, prompts))
        if parts:
            return merge(parts)
        # Every rank takes part in what credit steps exchange.
        alone = select_prompts(rounds[0], [0])
        alone.keep = torch.zeros(1, dtype=torch.bool, device=self.parts.device)
        return alone

    def _round(self, index: int, number: int, count: int, drawn: Drawn, timed: Stopwatch) -> RolloutStep:
        """Sample `count` prompts on every rank and reward the completions."""
        items, seeds = self._draw(count)
        sampling = self.args.sampling().at(index)
        sampling = sampling.at(number) if number else sampling

        def sample() -> tuple[Rollouts, RewardResult | None]:
            with timed("rollout"), self.parts.scorer.mixed_precision():  # as the trainer computes
                rollouts = self.parts.sampler.sample(seeds, n=self.args.num_generations, sampling=sampling)
                rollouts = replace(rollouts, prompts=tuple(items))
            with timed("reward"):
                return rollouts, self._rewarded(rollouts)

        rollouts, result = self.ranks.together(sample)
        step = self._step(index, rollouts, result)
        drawn.add(rollouts, step, result)
        return step

    def _draw(self, count: int) -> tuple[list[PromptItem], list[PromptItem]]:
        """This rank's share of the next prompts, and the same with what their random numbers go by.

        Prompt i of a draw is rank i % world's, so that a minibatch holds the same prompts whatever the ranks.
        """
        world, seen = self.ranks.world, Counter[int]()
        items, seeds = [], []
        for place in range(count * world):
            prompt = self.order[self.drawn + place]
            if place % world == self.ranks.rank:
                item = self.parts.prompts[prompt]
                items.append(item)
                # Drawn twice, at the end of one pass and at the start of the next, it must not give the same twice.
                seeds.append(replace(item, row=f"{item.row}/{seen[prompt]}") if seen[prompt] else item)
            seen[prompt] += 1
        self.drawn += count * world
        return items, seeds

    def _rewarded(self, rollouts: Rollouts) -> RewardResult | None:
        suite = self.parts.rewards
        if suite is None:
            return None
        texts = None if suite.tokenizer is not None else [""] * len(rollouts.completions)
        return suite.score(rollouts, texts)

    def _step(self, index: int, rollouts: Rollouts, result: RewardResult | None) -> RolloutStep:
        batch = rollouts.to_batch().to(self.parts.device)
        step = RolloutStep(
            batch=batch,
            rewards=torch.zeros(batch.n_completions, device=self.parts.device),
            by_name={},
            prompt_ids=batch.rows,
            index=index,
            max_new_tokens=self.args.max_new_tokens,
            max_tokens=self.args.max_tokens_per_microbatch,
            model=self.parts.model,
            head_of=self.parts.head_of,
            exchange=self.ranks.exchange,
        )
        if result is not None:
            step.rewards = result.outcome.to(self.parts.device)
            step.by_name = {name: values.to(self.parts.device) for name, values in result.by_name.items()}
            name = self.args.correct_from or next(iter(result.by_name))
            step.correct = step.by_name[name] > 0.5  # NaN: not correct
            if result.token_rewards is not None:
                step.token_rewards = result.token_rewards.to(self.parts.device)
        return step
