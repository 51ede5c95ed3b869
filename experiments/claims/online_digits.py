"""DCPO, DAPO and GSPO on digit sums: which samples and tokens does an update use?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

from experiments.claims.digit_sums import DIGITS, GROUP_SIZE, HIDDEN, Groups, Task, Trainer, accuracy, sample_groups
from experiments.claims.framework import Arm, Group, Measures, Source
from experiments.claims.published import DAPO, DCPO
from experiments.claims.tiny_gru import GRUPolicy
from tokengrain.method import make_objective
from tokengrain.methods import dcpo
from tokengrain.methods.grpo import group_advantages, informative_groups

RATE = 3e-3
MOST_ROUNDS = 10


@dataclass(frozen=True)
class Scale:
    """Steps and sizes; `prompts` of every modulus."""

    prompts: int = 10
    steps: int = 60
    minibatches: int = 20
    evaluation: int = 64


@dataclass
class Context:
    """What the arms of a seed share."""

    seed: int
    scale: Scale
    task: Task


def prepare(seed: int, scale: Scale) -> Context:
    return Context(seed, scale, Task.draw(scale.prompts, torch.Generator().manual_seed(seed)))


def run(context: Context, arm: Arm) -> Measures:
    settings, scale, task = dict(arm.settings), context.scale, context.task
    generator = torch.Generator().manual_seed(context.seed + 1)
    policy = GRUPolicy(len(task), DIGITS, HIDDEN, context.seed)
    objective = make_objective(settings["objective"], **settings.get("hyper", {}))
    trainer = Trainer(policy, objective, settings.get("normaliser", "mean"), RATE)
    history = dcpo.DCPO() if settings.get("smooth") else None
    used, clipped, drawn = [], [], 0
    for _ in range(scale.steps):
        groups = _sampled(policy, task, generator, refill=settings.get("refill", False))
        drawn += groups.drawn
        advantages = _advantages(groups, history)
        used.append(float((advantages != 0).float().mean()))
        per_token = groups.segments.broadcast(advantages)
        clipped.append(fmean(trainer.update(groups, per_token, scale.minibatches, generator)))
    right = accuracy(policy, task, scale.evaluation, torch.Generator().manual_seed(context.seed + 2))
    half = scale.steps // 2
    return {"utilisation": fmean(used[half:]), "clipped": fmean(clipped), "accuracy": right, "drawn": float(drawn)}


def _advantages(groups: Groups, history: dcpo.DCPO | None) -> Tensor:
    """One per completion, standardised in its group, or smoothed over the visits of its prompt."""
    rewards = groups.correct.double()
    if history is None:
        return group_advantages(rewards, groups.group).float()
    found = history.smooth(rewards, groups.group, groups.prompts[::GROUP_SIZE].tolist())
    history.visits |= found.visits
    return found.advantages.float()


def _sampled(policy: GRUPolicy, task: Task, generator: torch.Generator, *, refill: bool) -> Groups:
    """A group for every prompt; with refill as many with right and wrong completions, of up to ten rounds.

    If no round has such a group, those of the last one.
    """
    found = sample_groups(policy, task, generator)
    most, parts, drawn = len(found.prompts), [_mixed(found)], found.drawn
    while refill and sum(len(p.prompts) for p in parts) < most and len(parts) < MOST_ROUNDS:
        found = sample_groups(policy, task, generator)
        parts.append(_mixed(found))
        drawn += found.drawn
    if not refill or not any(len(p.prompts) for p in parts):
        return replace(found, drawn=drawn)
    columns = [torch.cat([getattr(p, name) for p in parts]) for name in ("prompts", "tokens", "correct")]
    # Which of too many are left out must not depend on the modulus, by which prompts are ordered.
    chosen = torch.randperm(len(columns[0]) // GROUP_SIZE, generator=generator)[: len(task)]
    prompts, tokens, correct = (c.unflatten(0, (-1, GROUP_SIZE))[chosen].flatten(0, 1) for c in columns)
    return Groups(prompts, tokens, correct, drawn)


def _mixed(groups: Groups) -> Groups:
    return groups.kept(informative_groups(groups.correct, groups.group))


ARMS = (
    Arm("GRPO", "grpo", {"objective": "grpo"}),
    Arm("DCPO, clipping alone", "dcpo", DCPO),
    Arm("DCPO, smoothing alone", "dcpo", {"objective": "grpo", "smooth": True}),
    Arm("DCPO", "dcpo", {**DCPO, "smooth": True}),
    Arm("DAPO", "dapo", {**DAPO, "refill": True}),
    Arm("GSPO ε 3e-4", "gspo", {"objective": "gspo"}),
    Arm("GSPO ε 0.1", "gspo", {"objective": "gspo", "hyper": {"epsilon": 0.1, "epsilon_high": 0.13}}),
)


DAPO_SPEC, DCPO_SPEC, GRPO_SPEC, GSPO_SPEC = (Source(m, f"{m}.md 7") for m in ("dapo", "dcpo", "grpo", "gspo"))


CLAIMS = (
    GRPO_SPEC.claim(
        "GRPO rises from chance, about 0.21, to above 0.75 in 60 steps",
        "GRPO",
        None,
        "accuracy",
        "above",
        threshold=0.75,
        judged="mean",
        reported="0.81",
    ),
    DCPO_SPEC.sure(
        "Smoothed advantages use nearly all completions",
        "DCPO",
        None,
        "utilisation",
        "above",
        threshold=0.9,
        reported="1.00",
    ),
    DCPO_SPEC.sure("and more than GRPO", "DCPO", "GRPO", "utilisation", "above", reported="1.00 and 0.67"),
    DCPO_SPEC.sure(
        "Adaptive bounds clip less than half as many tokens",
        "DCPO",
        "GRPO",
        "clipped",
        "below",
        form="ratio",
        threshold=0.5,
        reported="0.010 and 0.037",
    ),
    DCPO_SPEC.claim(
        "DCPO is more accurate after as many updates",
        "DCPO",
        "GRPO",
        "accuracy",
        "above",
        judged="mean",
        reported="0.90 and 0.81",
    ),
    DCPO_SPEC.claim(
        "The bounds alone are as well",
        "DCPO, clipping alone",
        "GRPO",
        "accuracy",
        "above",
        judged="mean",
        reported="0.93 and 0.81",
    ),
    DAPO_SPEC.sure("Refilled, all completions are used", "DAPO", None, "utilisation", "above", threshold=0.99),
    DAPO_SPEC.sure(
        "for more than 1.3 times the samples",
        "DAPO",
        "GRPO",
        "drawn",
        "above",
        form="ratio",
        threshold=1.3,
        reported="2.3",
    ),
    DAPO_SPEC.claim(
        "DAPO is more accurate after as many updates",
        "DAPO",
        "GRPO",
        "accuracy",
        "above",
        judged="mean",
        reported="0.91 and 0.81",
    ),
    GSPO_SPEC.claim(
        "The published range clips more than a tenth of the tokens",
        "GSPO ε 3e-4",
        None,
        "clipped",
        "above",
        threshold=0.1,
        reported="11 to 15 % at 7B and 14B",
    ),
    GSPO_SPEC.claim(
        "and is too tight for four tokens",
        "GSPO ε 3e-4",
        "GSPO ε 0.1",
        "accuracy",
        "below",
        judged="mean",
    ),
)

GROUP = Group(
    name="digits",
    title="DCPO, DAPO, GSPO: digit sums",
    setting=(
        "40 prompts, a target and a modulus out of 2, 5, 10, 20; a completion is four digits and right if its sum has "
        "the target as remainder. A GRU of width 48 from random weights; a step samples 8 completions of every prompt "
        "and makes 20 updates of two groups each, Adam 3e-3, gradients clipped at 1; 60 steps. *Utilisation* is the "
        "share of completions with an advantage other than 0 in the second half of training, *clipped* the share of "
        "tokens that the clip takes the gradient of, *accuracy* that of 64 samples per prompt at the end, *drawn* all "
        "completions sampled in training. DAPO refills from up to ten rounds."
    ),
    scales=(Scale(), Scale(prompts=2, steps=3, minibatches=2, evaluation=4)),
    arms=ARMS,
    claims=CLAIMS,
    prepare=prepare,
    run=run,
    columns={"accuracy": "accuracy", "utilisation": "utilisation", "clipped": "clipped", "drawn": "drawn"},
)
