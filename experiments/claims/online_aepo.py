"""AEPO without a model: does its reward spend fewer uncertain tokens on easy prompts and more on hard ones?

A policy is, per difficulty, a distribution over how many high-entropy tokens a completion has; more of them cost
accuracy on easy prompts and earn some on hard ones. Specification: ares.md, section 7.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.claims.framework import Arm, Group, Measures, SeedAndSizes, Source
from tokengrain.methods.aepo import AEPO, BUCKETS, Observation, difficulty
from tokengrain.methods.grpo import group_advantages

MOST, CENTRE, SPREAD = 60, 30.0, 12.0
GROUP_SIZE = 8
COUNTS = torch.arange(MOST + 1, dtype=torch.float64)
P_CORRECT = torch.stack([0.97 - 0.004 * COUNTS, torch.full_like(COUNTS, 0.5), 0.03 + 0.004 * COUNTS])
"""Chance that a completion with so many tokens is right, per bucket: `[3, 61]`."""


@dataclass(frozen=True)
class Scale:
    """Steps and sizes; `prompts` of every bucket."""

    steps: int = 300
    prompts: int = 8
    rate: float = 0.5


def run(context: SeedAndSizes[Scale], arm: Arm) -> Measures:
    scale, generator = context.scale, torch.Generator().manual_seed(context.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the paper's form has no effect is what is to be seen
        shaping = AEPO(triggers=None, kl="none", **arm.settings)
    logits = (-((COUNTS - CENTRE) ** 2) / (2 * SPREAD**2)).repeat(3, 1)
    for _ in range(scale.steps):
        logits = logits + scale.rate * _direction(logits, shaping, scale.prompts, generator)
    policy = logits.softmax(-1)
    used, right = (policy * COUNTS).sum(-1).tolist(), (policy * P_CORRECT).sum(-1).tolist()
    found = {f"tokens_{name}": value for name, value in zip(BUCKETS, used, strict=True)}
    return {**found, **{f"right_{name}": value for name, value in zip(BUCKETS, right, strict=True)}}


def _direction(logits: Tensor, shaping: AEPO, prompts: int, generator: torch.Generator) -> Tensor:
    """REINFORCE's gradient of one step, the mean over the completions of a bucket: `[3, 61]`."""
    policy = logits.softmax(-1)
    each = prompts * GROUP_SIZE
    drawn = torch.multinomial(policy, each, replacement=True, generator=generator)
    chance = P_CORRECT.gather(1, drawn)
    correct = (torch.rand(chance.shape, generator=generator, dtype=torch.float64) < chance).double().flatten()
    counts = drawn.flatten().double()
    group = torch.arange(3 * prompts).repeat_interleave(GROUP_SIZE)
    buckets = difficulty(correct, group)
    shaping.observe(Observation.of(counts, group, buckets))
    rewards = shaping.reward(correct, counts, buckets[group])
    advantages = group_advantages(rewards, group).view(3, each)
    taken = torch.zeros_like(policy).scatter_add(1, drawn, advantages)
    return (taken - policy * advantages.sum(1, keepdim=True)) / each


ARMS = (
    Arm("accuracy alone", "grpo", {"shape": "none"}),
    Arm("AEPO", "aepo", {"shape": "smooth"}),
    Arm("AEPO, order kept", "aepo", {"shape": "smooth", "preserve_order": True}),
    Arm("AEPO as in the text", "aepo", {"shape": "lagrange"}),
    Arm("AEPO as in the text, lagged target", "aepo", {"shape": "lagrange", "targets": "lagged", "target_ema": 0.9}),
)


SOURCE = Source("aepo", "ares.md 7; arXiv 2510.08457")


CLAIMS = (
    SOURCE.sure(
        "AEPO spends fewer tokens on easy prompts than accuracy alone",
        "AEPO",
        "accuracy alone",
        "tokens_easy",
        "below",
        reported="24.3 and 27.8, no overlap between seeds",
    ),
    SOURCE.sure("and more on hard ones", "AEPO", "accuracy alone", "tokens_hard", "above", reported="37.5 and 32.1"),
    SOURCE.claim(
        "Easy prompts are answered better for it", "AEPO", "accuracy alone", "right_easy", "above", reported="0.873 now"
    ),
    SOURCE.claim("and hard ones", "AEPO", "accuracy alone", "right_hard", "above", reported="0.180 now, 0.158 before"),
    SOURCE.sure(
        "The reward as the text has it is plain accuracy, draw for draw",
        "AEPO as in the text",
        "accuracy alone",
        "tokens_hard",
        "within",
        threshold=1e-9,
        reported="equal",
    ),
    SOURCE.claim(
        "With a lagged target it saves tokens on easy prompts",
        "AEPO as in the text, lagged target",
        "accuracy alone",
        "tokens_easy",
        "below",
    ),
)

GROUP = Group(
    name="aepo",
    title="AEPO: how many uncertain tokens a prompt is worth",
    setting=(
        "No model: per difficulty (easy, medium, hard) a table of logits over 0 to 60 high-entropy tokens, at first a "
        "bell around 30 (deviation 12). A completion with N of them is right with probability 0.97 − 0.004 N, 0.5, "
        "0.03 + 0.004 N. REINFORCE on 8 prompts of each difficulty, 8 completions each, advantages standardised per "
        "prompt, rate 0.5, 300 steps. AEPO knows the difficulty from the share of right completions alone. *Tokens* "
        "and *right* are exact expectations of the final policy."
    ),
    scales=(Scale(), Scale(steps=5, prompts=2)),
    arms=ARMS,
    claims=CLAIMS,
    prepare=SeedAndSizes,
    run=run,
    columns={
        **{f"tokens_{name}": f"tokens, {name}" for name in BUCKETS},
        **{f"right_{name}": f"right, {name}" for name in BUCKETS},
    },
)
