"""RTO on bigrams: does a reward on every token make PPO learn faster than one at the end?

Completions of 16 tokens out of 8 earn 1 for each `2 5` and `5 7` and lose ½ for each repetition. Specification: rto.md,
section 7.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from experiments.claims.framework import Arm, Group, Measures, Source
from experiments.claims.markov import sample as sample_chain
from experiments.claims.markov_training import scalar, steps
from experiments.claims.tiny_gru import GRUPolicy, equal_segments
from tokengrain.methods._clipped import value_loss
from tokengrain.methods.dpo import dpo_loss, sft_loss
from tokengrain.methods.ppo import gae, ppo_policy_loss, whitened
from tokengrain.methods.rto import RTO

TOKENS, LENGTH, HIDDEN = 8, 16, 48
CHAIN_SPREAD = 0.5
SLOPE, DPO_BETA, DPO_RATE = 1.5, 0.1, 1e-3
FIT_RATE, FIT_BATCH = 3e-3, 256
ACTOR_RATE, CRITIC_RATE = 1e-3, 3e-3
KL_WEIGHT, LAMBDA, CLIP = 0.01, 0.95, 0.2


@dataclass(frozen=True)
class Scale:
    """Steps and sizes. The middle is an average over `window` iterations from `middle` on."""

    samples: int = 3000
    fit_steps: int = 400
    dpo_steps: int = 250
    dpo_batch: int = 256
    iterations: int = 40
    rollout: int = 64
    minibatch: int = 16
    middle: int = 20
    window: int = 5


def true_rewards(tokens: Tensor) -> Tensor:
    """Rewards `[n]` of completions `[n, 16]`."""
    before, after = tokens[:, :-1], tokens[:, 1:]
    good = ((before == 2) & (after == 5)) | ((before == 5) & (after == 7))
    return good.sum(1) - 0.5 * (before == after).sum(1)


def no_prompts(n: int) -> Tensor:
    """There is one prompt."""
    return torch.zeros(n, dtype=torch.long)


@dataclass
class Context:
    """What the arms of a seed share.

    Attributes:
        start: the SFT policy, which is also the reference.
        guide: the same after DPO on pairs of its samples.
        mean, std: of the rewards of its samples, for sentence rewards.
    """

    seed: int
    scale: Scale
    start: GRUPolicy
    guide: GRUPolicy
    mean: float
    std: float

    @cached_property
    def plain(self) -> list[float]:
        """The curve of PPO, with which gains are compared."""
        return train_ppo(self, variant="ppo")


def prepare(seed: int, scale: Scale) -> Context:
    generator = torch.Generator().manual_seed(seed)
    chain = (CHAIN_SPREAD * torch.randn(TOKENS + 1, TOKENS, generator=generator)).log_softmax(-1)
    data = sample_chain(chain.expand(1, LENGTH, -1, -1), no_prompts(scale.samples), generator)
    start = GRUPolicy(1, TOKENS, HIDDEN, seed)
    segments = equal_segments(FIT_BATCH, LENGTH)

    def loss(step: int) -> Tensor:
        tokens = data[torch.randint(len(data), (FIT_BATCH,), generator=generator)]
        return scalar(sft_loss(start.logps(no_prompts(FIT_BATCH), tokens), segments), segments)

    steps(start, scale.fit_steps, FIT_RATE, loss)
    pairs = start.sample(no_prompts(2 * scale.samples), LENGTH, generator)
    earned = true_rewards(pairs)
    return Context(
        seed, scale, start, train_guide(start, pairs, scale, generator), float(earned.mean()), float(earned.std())
    )


def train_guide(start: GRUPolicy, completions: Tensor, scale: Scale, generator: torch.Generator) -> GRUPolicy:
    """`start` after DPO on neighbouring completions `[2 n, 16]` with Bradley-Terry labels."""
    both, earned = completions.unflatten(0, (-1, 2)), true_rewards(completions).unflatten(0, (-1, 2))
    first_wins = torch.rand(len(both), generator=generator) < torch.sigmoid(SLOPE * (earned[:, 0] - earned[:, 1]))
    pairs = torch.where(first_wins[:, None, None], both, both.flip(1))
    guide, segments, prompts = (
        start.copy(),
        equal_segments(2 * scale.dpo_batch, LENGTH),
        no_prompts(2 * scale.dpo_batch),
    )

    def loss(step: int) -> Tensor:
        tokens = pairs[torch.randint(len(pairs), (scale.dpo_batch,), generator=generator)].flatten(0, 1)
        with torch.no_grad():
            ref = start.logps(prompts, tokens)
        return scalar(dpo_loss(guide.logps(prompts, tokens), segments, ref_logps=ref, beta=DPO_BETA), segments)

    steps(guide, scale.dpo_steps, DPO_RATE, loss)
    return guide


class Critic(nn.Module):
    """V of the state before a token: a trunk as the policy's, and one number."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.trunk = GRUPolicy(1, TOKENS, HIDDEN, seed)
        self.value = nn.Linear(HIDDEN, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Values `[n * 16]` before the tokens of completions `[n, 16]`."""
        return self.value(self.trunk.hidden(no_prompts(len(tokens)), tokens))[:, 0]


def train_ppo(context: Context, **settings: Any) -> list[float]:
    """Mean true reward of each iteration's samples; settings: those of `RTO`."""
    scale, generator = context.scale, torch.Generator().manual_seed(context.seed + 1)
    policy, critic = context.start.copy(), Critic(context.seed + 2)
    actor = torch.optim.Adam(policy.parameters(), ACTOR_RATE, betas=(0.9, 0.95))
    other = torch.optim.Adam(critic.parameters(), CRITIC_RATE, betas=(0.9, 0.95))
    credit = RTO(model=context.guide, beta2=KL_WEIGHT, **settings)
    prompts, segments, curve = no_prompts(scale.rollout), equal_segments(scale.rollout, LENGTH), []
    for _ in range(scale.iterations):
        tokens = policy.sample(prompts, LENGTH, generator)
        earned = true_rewards(tokens)
        curve.append(float(earned.mean()))
        with torch.no_grad():
            old, values = policy.logps(prompts, tokens), critic(tokens)
            found = credit.rewards(
                old,
                segments,
                ref_logps=context.start.logps(prompts, tokens),
                sentence_rewards=(earned - context.mean) / context.std,
                dpo_logps=context.guide.logps(prompts, tokens),
            )
        estimate = gae(found.rewards, segments, values=values, lam=LAMBDA)
        columns = torch.stack([old, whitened(estimate.advantages), estimate.returns], -1).unflatten(0, (-1, LENGTH))
        for index in torch.randperm(scale.rollout, generator=generator).split(scale.minibatch):
            _update(policy, critic, (actor, other), tokens[index], columns[index].flatten(0, 1))
    return curve


def _update(policy: GRUPolicy, critic: Critic, optimisers: Any, tokens: Tensor, columns: Tensor) -> None:
    """One step of actor and critic on completions `[n, 16]`; columns: old log-probs, advantages, returns."""
    old, advantages, returns = columns.unbind(-1)
    segments = equal_segments(len(tokens), LENGTH)
    logps = policy.logps(no_prompts(len(tokens)), tokens)
    losses = (
        ppo_policy_loss(logps, segments, old_logps=old, advantages=advantages, clip_range=CLIP, reduction="mean"),
        value_loss(critic(tokens), segments, returns=returns, weight=0.5, reduction="mean"),
    )
    for optimiser, model, loss in zip(optimisers, (policy, critic), losses, strict=True):
        optimiser.zero_grad()
        scalar(loss, segments).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()


def run(context: Context, arm: Arm) -> Measures:
    settings = dict(arm.settings)
    curve = context.plain if settings["variant"] == "ppo" else train_ppo(context, **settings)
    scale = context.scale
    middle = slice(scale.middle, scale.middle + scale.window)
    reward, plain = (sum(c[middle]) / len(c[middle]) for c in (curve, context.plain))
    return {"middle": reward, "gain": reward - plain, "end": sum(curve[-3:]) / len(curve[-3:])}


ARMS = (
    Arm("PPO", "rto", {"variant": "ppo"}),
    Arm("RTO β₁ 0.05", "rto", {"variant": "rto", "beta1": 0.05}),
    Arm("RTO β₁ 0.3", "rto", {"variant": "rto", "beta1": 0.3}),
    Arm("delayed β₁ 0.3", "rto", {"variant": "delayed", "beta1": 0.3}),
    Arm("shaping β₁ 0.3", "rto", {"variant": "shaping", "beta1": 0.3}),
    Arm("RTO β₁ 1, no clip", "rto", {"variant": "rto", "beta1": 1.0, "clip": None}),
)


SOURCE = Source("rto", "rto.md 7; arXiv 2404.18922")


CLAIMS = (
    SOURCE.sure(
        "With a reward per token the middle of training is further",
        "RTO β₁ 0.3",
        "PPO",
        "middle",
        "above",
        judged="every seed",
        reported="0.79 and 0.31, 2.86 and 1.96, 5.13 and 3.00, 3.18 and 1.77 by seed",
    ),
    SOURCE.sure(
        "On the last token the same reward loses most of that",
        "delayed β₁ 0.3",
        "RTO β₁ 0.3",
        "gain",
        "below",
        form="ratio",
        threshold=0.5,
        judged="mean",
        reported="2.32 of 3.25, where PPO has 2.06: 0.22",
    ),
    SOURCE.claim(
        "Pure shaping keeps it",
        "shaping β₁ 0.3",
        "PPO",
        "middle",
        "above",
        judged="mean",
        reported="2.56 and 2.06",
    ),
    SOURCE.claim(
        "A weight of 0.05, as published, helps less", "RTO β₁ 0.05", "RTO β₁ 0.3", "middle", "below", judged="mean"
    ),
    SOURCE.claim(
        "A weight that dominates the sentence reward loses the gain",
        "RTO β₁ 1, no clip",
        "RTO β₁ 0.3",
        "middle",
        "below",
        judged="mean",
        reported="1.64 and 3.25",
    ),
    SOURCE.claim(
        "In the end all are equally far",
        "RTO β₁ 0.3",
        "PPO",
        "end",
        "same",
        reported="8.32 and 7.97: a statement about speed, not about the end",
    ),
)

GROUP = Group(
    name="rto",
    title="RTO: bigrams that earn something",
    setting=(
        "16 tokens out of 8, one prompt; a completion earns 1 for each `2 5` and `5 7` and loses ½ for each repeated "
        "token. The policy, a GRU of width 48, is fitted to 3,000 samples of a random chain (400 steps of 256); DPO "
        "(β 0.1, 250 steps of 256) on 3,000 pairs of its samples, Bradley-Terry slope 1.5, gives the guide. PPO: 40 "
        "iterations of 64 samples in minibatches of 16, actor 1e-3, critic 3e-3, λ 0.95, KL 0.01; the sentence reward "
        "is the true one, standardised. *Middle* is the mean reward of the samples of iterations 21–25, *gain* what it "
        "is above PPO's, *end* that of the last three."
    ),
    scales=(
        Scale(),
        Scale(
            samples=64, fit_steps=5, dpo_steps=3, dpo_batch=8, iterations=4, rollout=8, minibatch=4, middle=2, window=2
        ),
    ),
    arms=ARMS,
    claims=CLAIMS,
    prepare=prepare,
    run=run,
    columns={"middle": "reward in the middle", "gain": "gain over PPO", "end": "reward at the end"},
)
