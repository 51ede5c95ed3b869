"""Credit steps of online training as credit sources: one adapter, and the critic that one of them needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokengrain.batch import TokenBatch
from tokengrain.training.online.scoring import OLD_LOGPS, RolloutScorer
from tokengrain.training.online.step import RolloutStep

MAX_TOKENS = 8192
"""Tokens of one forward pass."""


class OnlineCredit:
    """Credit of sampled completions as the steps of online training give it in the first rollout.

    The policy is the world's base model, which is also the reference; completions are graded by the world's reward.
    Every call is a rollout of its own, with steps without a past.

    Args:
        world: `arithmetic` or `revision`.
        steps: credit steps as `resolve_steps` takes them, in order; made anew for every call.
        read: what of the rollout is the credit, `[N]`; it may also look at the steps.
        critic: gives `values`, if a step needs them.
    """

    def __init__(
        self,
        world: Any,
        steps: Callable[[], Sequence[Any]],
        read: Callable[[RolloutStep, Sequence[Any]], Tensor],
        *,
        needs: frozenset[str] = frozenset(),
        critic: Any = None,
    ) -> None:
        self.world, self.steps, self.read, self.needs, self.critic = world, steps, read, needs, critic

    def __call__(self, batch: TokenBatch) -> Tensor:
        from tokengrain.training.online.registry import resolve_steps

        steps = resolve_steps(self.steps())
        needs = {OLD_LOGPS, *self.needs, *(name for step in steps for name in step.needs)}
        rollout = self._rollout(batch, needs)
        for step in steps:
            step(rollout)
        return self.read(rollout, steps)

    def _rollout(self, batch: TokenBatch, needs: set[str]) -> RolloutStep:
        from contextlib import nullcontext

        from tokengrain.scoring import head_of

        world = self.world
        texts = [world.decode(batch.prompt(g).tolist()) for g in batch.group.tolist()]
        ids = [batch.completion(c).tolist() for c in range(batch.n_completions)]
        rewards = torch.tensor(world.reward(texts, [""] * len(ids), ids))
        rollout = RolloutStep(
            batch=batch.with_columns(),  # steps add columns of their own
            rewards=rewards,
            by_name={"world": rewards},
            prompt_ids=batch.rows,
            index=0,
            correct=rewards > 0.5,
            max_new_tokens=world.max_new_tokens,
            max_tokens=MAX_TOKENS,
            model=world.reference,
            head_of=lambda: head_of(world.reference).detach(),
        )
        scorer = RolloutScorer(
            world.reference, None, self.critic, max_tokens=MAX_TOKENS, mixed_precision=nullcontext, options={}
        )
        scorer.add(rollout, needs - {"ref_logps"})
        rollout.quantities["ref_logps"] = rollout.quantity(OLD_LOGPS)  # nothing has been trained yet
        return rollout


def column(name: str) -> Callable[[RolloutStep, Sequence[Any]], Tensor]:
    """Reads a column that a step left in the rollout."""
    return lambda rollout, steps: rollout.quantity(name)


def advantages(rollout: RolloutStep, steps: Sequence[Any]) -> Tensor:
    """Reads what the policy's loss would get."""
    assert rollout.advantages is not None  # one of the steps sets them
    return rollout.advantages


def train_critic(
    world: Any, *, seed: int, steps: int, generations: int, prompts: int = 8, learning_rate: float = 1e-3
) -> Any:
    """A critic that starts from the base model and learns the outcomes of its samples on the training prompts.

    Args:
        seed: of samples, order and the head's first weights.
        steps: updates, of `prompts` prompts with `generations` completions each.
    """
    from tokengrain.rollout import HFGenerate
    from tokengrain.training.online.critic import Critic
    from tokengrain.worlds.arithmetic.problems import parse_prompt, rng_of, seed_of

    items = world.items([parse_prompt(row["prompt"]) for row in world.prompts()])
    sampling = world.sampling(seed_of("critic", seed))
    batch = HFGenerate(world.reference).sample(items, n=generations, sampling=sampling).to_batch()
    outcomes: Mapping[str, Any] = {"name": "gae", "lam": 1.0, "use_values": False, "whiten": False}
    returns = OnlineCredit(world, lambda: [outcomes], column("returns"))(batch)
    batch = batch.with_columns(returns=returns)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        critic = Critic(world.reference, lr=learning_rate, clip_range=None, max_tokens_per_microbatch=MAX_TOKENS)
    critic.begin(max_steps=steps)
    rng = rng_of("critic", seed)
    for _ in range(steps):
        critic.update(batch.select(sorted(rng.sample(range(batch.n_prompts), min(prompts, batch.n_prompts)))))
    return critic
