"""THR on digit sums: does p steer how fast correct completions become likely?"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from experiments.claims.digit_sums import (
    DIGITS,
    HIDDEN,
    LENGTH,
    Groups,
    Task,
    Trainer,
    accuracy,
    sample_groups,
    warm_start,
)
from experiments.claims.framework import Arm, Claim, Group, Measures, Source
from experiments.claims.tiny_gru import GRUPolicy
from tokengrain.method import make_objective
from tokengrain.methods.grpo import group_advantages
from tokengrain.methods.thr import correct_influence, influence_threshold, thr_weights, token_hidden_rewards

RATE, SCRATCH_RATE = 1e-3, 3e-3


@dataclass(frozen=True)
class Scale:
    """Steps and sizes; `prompts` of every modulus."""

    prompts: int = 10
    warm_steps: int = 300
    steps: int = 60
    minibatches: int = 20
    evaluation: int = 64


@dataclass
class Context:
    """What the arms of a seed share."""

    seed: int
    scale: Scale
    task: Task
    start: GRUPolicy


def prepare(seed: int, scale: Scale) -> Context:
    generator = torch.Generator().manual_seed(seed)
    task = Task.draw(scale.prompts, generator)
    start = GRUPolicy(len(task), DIGITS, HIDDEN, seed)
    warm_start(start, task, scale.warm_steps, 0.5, generator)
    return Context(seed, scale, task, start)


def run(context: Context, arm: Arm) -> Measures:
    scale, task, settings = context.scale, context.task, dict(arm.settings)
    scratch = settings.pop("scratch", False)
    policy = GRUPolicy(len(task), DIGITS, HIDDEN, context.seed) if scratch else context.start.copy()
    generator = torch.Generator().manual_seed(context.seed + 1)
    trainer = Trainer(policy, make_objective("grpo"), "mean", SCRATCH_RATE if scratch else RATE)
    changes, kept = [], []
    for _ in range(scale.steps):
        groups = sample_groups(policy, task, generator)
        before = correct_likelihood(policy, groups)
        weights = token_weights(policy, groups, **settings)
        advantages = group_advantages(groups.correct.float(), groups.group)
        trainer.update(groups, groups.segments.broadcast(advantages) * weights, scale.minibatches, generator)
        kept.append(float((weights != 0).float().mean()))
        if bool(groups.correct.any()):
            changes.append(correct_likelihood(policy, groups) - before)
    right = accuracy(policy, task, scale.evaluation, torch.Generator().manual_seed(context.seed + 2))
    return {"change": fmean(changes) if changes else None, "accuracy": right, "kept": fmean(kept)}


@torch.no_grad()
def token_weights(policy: GRUPolicy, groups: Groups, p: float | None, beta: float | None) -> Tensor:
    """THR's weights `[N]`; p None: 1, plain GRPO. beta None: without the mask."""
    segments, group, correct = groups.segments, groups.group, groups.correct
    if p is None:
        return torch.ones(segments.total)
    labels = groups.tokens.flatten()
    hidden = policy.hidden(groups.prompts, groups.tokens)
    influence = correct_influence(hidden, policy.head, labels, segments, group, correct)
    values = token_hidden_rewards(influence, segments, correct)
    tau = None if beta is None else influence_threshold(values, segments, group, correct, beta=beta)
    return thr_weights(values, segments, group, correct, tau, p=p)


@torch.no_grad()
def correct_likelihood(policy: GRUPolicy, groups: Groups) -> float:
    """Mean log-probability of the tokens of correct completions, nats; NaN if there are none."""
    logps = policy.logps(groups.prompts, groups.tokens).view(-1, LENGTH)
    return float(logps[groups.correct].mean())


ARMS = (
    Arm("GRPO", "grpo", {"p": None, "beta": None}),
    *(Arm(f"THR p {p:+g}", "thr", {"p": p, "beta": None}) for p in (-0.5, 0.5)),
    *(Arm(f"THR p {p:+g}, mask", "thr", {"p": p, "beta": 1.0}) for p in (-0.5, 0.0, 0.5)),
    Arm("GRPO from scratch", "grpo", {"p": None, "beta": None, "scratch": True}),
    *(
        Arm(f"THR p +0, mask {beta:g}, from scratch", "thr", {"p": 0.0, "beta": beta, "scratch": True})
        for beta in (0.1, 1.0)
    ),
)


SOURCE = Source("thr", "thr.md 7; arXiv 2510.03669")


def _sure(says: str, first: str, second: str, **more: Any) -> Claim:
    return SOURCE.sure(says, first, second, "change", "above", **more)


CLAIMS = (
    _sure(
        "p 0.5 raises the likelihood of correct completions faster than p 0",
        "THR p +0.5",
        "GRPO",
        reported="0.0086 and 0.0076 per step",
    ),
    _sure("and p 0 faster than p −0.5", "GRPO", "THR p -0.5", reported="0.0076 and 0.0037"),
    _sure(
        "The same among the masked ones: p 0.5 and p 0",
        "THR p +0.5, mask",
        "THR p +0, mask",
        reported="0.0064 and 0.0057",
    ),
    _sure("and p 0 and p −0.5", "THR p +0, mask", "THR p -0.5, mask", reported="0.0057 and 0.0028"),
    SOURCE.claim(
        "From random weights the mask slows learning down",
        "THR p +0, mask 1, from scratch",
        "GRPO from scratch",
        "accuracy",
        "below",
        judged="mean",
        reported="0.30 and 0.985 after 120 steps",
    ),
    SOURCE.claim(
        "and a mask that keeps more does so less",
        "THR p +0, mask 0.1, from scratch",
        "THR p +0, mask 1, from scratch",
        "accuracy",
        "above",
        judged="mean",
        reported="0.91 and 0.30",
    ),
)

GROUP = Group(
    name="thr",
    title="THR: digit sums",
    setting=(
        "The task of group `digits`; the GRU is first fitted to random completions of which half are right (300 steps "
        "of 64). Then 60 steps of GRPO, Adam 1e-3, 20 updates each. THR multiplies the advantages of tokens by 1 + p "
        "where training on them makes the group's correct completions likelier, by 1 − p where less likely; with the "
        "mask (β 1) the others get 0. p 0 without a mask is GRPO. *From scratch*: random weights, Adam 3e-3. *Change* "
        "is the mean over steps of what the update adds to the mean log-probability of the sampled correct "
        "completions' tokens, nats."
    ),
    scales=(Scale(), Scale(prompts=2, warm_steps=3, steps=3, minibatches=2, evaluation=4)),
    arms=ARMS,
    claims=CLAIMS,
    prepare=prepare,
    run=run,
    columns={"change": "change", "accuracy": "accuracy", "kept": "kept tokens"},
)
