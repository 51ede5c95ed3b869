"""DRO on the world `revision`, with the trainer: R3 against the mean log-probability of the reference."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from experiments.claims.framework import Arm, Group, Measures, Source
from experiments.claims.online_r3 import POWERS, r3_of_chains
from experiments.training import TrainingSizes, train_online
from tokengrain.method import make_objective
from tokengrain.methods.dro import variability
from tokengrain.rewards.suite import RewardFunction
from tokengrain.rollout.local import HFGenerate
from tokengrain.rollout.sampler import encode_prompts
from tokengrain.scoring.score import score
from tokengrain.worlds import load_world

REACHED = 0.5


@dataclass(frozen=True)
class Scale(TrainingSizes):
    """The world and the length of training; `samples` are per held-out prompt."""

    options: str = "filler=12&style=0.4&totals=last"
    plain: str = "filler=12&style=0&totals=last"  # no word depends on the chain
    rollouts: int = 30
    prompts: int = 16
    minibatches: int = 4
    samples: int = 16


@dataclass
class Context:
    """What the arms of a seed share."""

    seed: int
    scale: Scale
    world: Any
    found: float
    found_plain: float


def prepare(seed: int, scale: Scale) -> Context:
    world, plain = (
        load_world(f"world://revision?size=small&seed={seed}&{options}".rstrip("&"))
        for options in (scale.options, scale.plain)
    )
    return Context(seed, scale, world, _found(world, scale, seed), _found(plain, scale, seed))


def _found(world: Any, scale: Scale, seed: int) -> float:
    """Share of prompts whose reference token with the largest deviation over the base model's chains depends on them.

    One token each, since chains often disagree about one digit only; and over the training prompts with right and
    wrong chains: where all come to the same, no likelihood can depend on them.
    """
    rows = world.prompts()
    items = encode_prompts(rows, world.tokenizer)
    rollouts = HFGenerate(world.reference).sample(items, n=scale.generations, sampling=world.sampling(seed))
    batch, usable = world.with_references(rollouts.to_batch())
    with torch.no_grad():
        logps = score(world.reference, batch).logps
    assert logps is not None
    sigma = variability(logps, batch.segments, batch.group, usable=usable)
    depends = world.reasoning_tokens(batch)
    prompts = [row["prompt"] for row in rows for _ in range(scale.generations)]
    right = world.reward(prompts, rollouts.texts(world.tokenizer), [c.ids for c in rollouts.completions])
    hits = []
    for start in range(0, batch.n_completions, scale.generations):
        if 0 < sum(right[start : start + scale.generations]) < scale.generations:
            tokens = slice(*batch.segments.offsets[start : start + 2].tolist())
            hits.append(float(depends[tokens][sigma[tokens].argmax()]))
    return fmean(hits)


def run(context: Context, arm: Arm) -> Measures:
    scale, world = context.scale, context.world
    sampling = world.sampling(context.seed)  # only the chain: of the answer nothing is rewarded
    done = train_online(
        world,
        make_objective("grpo"),
        r3_of_chains(">", **arm.settings),
        context.seed,
        rewards=RewardFunction(world.reward, name="world", weight=0.0),  # for the log alone
        **scale.training,
        max_new_tokens=sampling.max_new_tokens,
        stop_ids=list(sampling.stop_ids),
    )
    held_out = world.evaluate(done.model, scale.samples, seed=context.seed)
    return {
        "on_the_way": fmean(done.curve("reward/correct")),
        "rollouts_needed": float(done.reached("reward/correct", REACHED)),
        "end": done.late("reward/correct"),
        "held_out": held_out["accuracy"],
        "found": context.found,
        "found_plain": context.found_plain,
    }


SOURCE = Source("dro", "dro.md 7, another task there; arXiv 2506.13351")


CLAIMS = (
    SOURCE.claim(
        "The token with the largest deviation depends on the chain, in nine of ten references without noise",
        "R3",
        None,
        "found_plain",
        "above",
        threshold=0.9,
        judged="mean",
        reported="the two that depend on it are the two largest, above 0.9, in a template of 40 tokens",
    ),
    SOURCE.claim(
        "With R3 more chains are right on the way than with the plain mean",
        "R3",
        "mean",
        "on_the_way",
        "above",
        judged="mean",
    ),
    SOURCE.claim(
        "and half of them are sooner",
        "R3",
        "mean",
        "rollouts_needed",
        "below",
        judged="mean",
        reported="16 and 20 steps to half of the prompts, 33 and 43 to nine of ten, without a model and 200 tokens",
    ),
    SOURCE.claim("R3 generalises better", "R3", "mean", "held_out", "above", judged="mean", source="our expectation"),
    SOURCE.claim(
        "The variance as the weight is better than the deviation", "R3, variance", "R3", "on_the_way", "above"
    ),
)

GROUP = Group(
    name="revision",
    title="The world `revision`: R3",
    setting=(
        "World `revision`, small, with 12 words per sentence, style 0.4 and only the last total in the reference, from "
        "its warm-started base model, which all seeds share; 80 training prompts per seed. 30 rollouts of 16 prompts "
        "with 8 chains, 4 updates each, Adam 3e-4. The reward is how likely the current policy finds the reference "
        "after the chain: the mean log-probability, or R3 with weights by deviation or variance. Whether a chain is "
        "right is measured and never rewarded: *on the way* is the mean over all rollouts, *needed* the rollouts until "
        f"three of them have {REACHED:.0%}, *held out* the share on 30 other prompts, 16 samples each; *found*, before "
        "any training, the share of references whose token with the largest deviation over 8 chains is one of the last "
        "total's, among prompts with right and wrong chains; also with style 0, where no word depends on the chain."
    ),
    scales=(Scale(), Scale(options="", plain="", rollouts=2, prompts=4, generations=4, minibatches=2, samples=4)),
    arms=POWERS,
    claims=CLAIMS,
    prepare=prepare,
    run=run,
    columns={
        "on_the_way": "on the way",
        "rollouts_needed": "rollouts needed",
        "end": "at the end",
        "held_out": "held out",
        "found": "found",
        "found_plain": "found, style 0",
    },
)
