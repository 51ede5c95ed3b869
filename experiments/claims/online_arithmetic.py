"""The group methods on the world `arithmetic`, with the trainer: samples used, tokens clipped, samples drawn."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any

from experiments.claims.framework import Arm, Group, Measures, Source
from experiments.claims.published import DAPO, DCPO
from experiments.training import TrainingSizes, train_online
from tokengrain.method import make_objective
from tokengrain.worlds import load_world


@dataclass(frozen=True)
class Scale(TrainingSizes):
    """The world and the length of training; `samples` are per held-out prompt."""

    size: str = "full"
    levels: str = "1-3"
    held_out: int = 60
    samples: int = 16
    learning_rate: float = 1e-4  # falls to 0: at a constant 1e-4 it stops learning half-way, at 3e-4 it unlearns


@dataclass
class Context:
    """What the arms of a seed share."""

    seed: int
    scale: Scale
    world: Any


def prepare(seed: int, scale: Scale) -> Context:
    world: Any = load_world(f"world://arithmetic?size={scale.size}&levels={scale.levels}&seed={seed}")
    world.base_model()
    return Context(seed, scale, world)


def run(context: Context, arm: Arm) -> Measures:
    settings, scale, world = dict(arm.settings), context.scale, context.world
    done = train_online(
        world,
        make_objective(settings["objective"], **settings.get("hyper", {})),
        settings["credit"],
        context.seed,
        **scale.training,
        lr_scheduler_type="linear",
        normaliser=settings.get("normaliser", "mean"),
    )
    held_out = world.evaluate(done.model, scale.samples, seed=context.seed, prompts=scale.held_out)
    correct = done.curve("reward/correct")
    return {
        "held_out": held_out["accuracy"],
        "utilisation": done.late("rollout/utilisation"),
        "clipped": fmean(done.curve("clip/tokens")),
        "on_the_way": fmean(correct),
        "drawn": sum(done.curve("rollout/completions")),
        "pass_at_k": held_out[f"pass@{scale.samples // 2}"],
    }


GROUP_ADVANTAGES = ({"name": "group"},)
ARMS = (
    Arm("GRPO", "grpo", {"objective": "grpo", "credit": GROUP_ADVANTAGES}),
    Arm("DCPO", "dcpo", {**DCPO, "credit": ({"name": "dcpo"},)}),
    Arm("DAPO", "dapo", {**DAPO, "credit": ({"name": "filter_groups", "refill": True}, *GROUP_ADVANTAGES)}),
    Arm("GSPO ε 3e-4", "gspo", {"objective": "gspo", "credit": GROUP_ADVANTAGES}),
    Arm(
        "GSPO ε 0.01",
        "gspo",
        {"objective": "gspo", "hyper": {"epsilon": 0.01, "epsilon_high": 0.013}, "credit": GROUP_ADVANTAGES},
    ),
)


DAPO_SPEC, DCPO_SPEC, GSPO_SPEC = (Source(m, f"worlds-online.md; {m}.md 7") for m in ("dapo", "dcpo", "gspo"))


CLAIMS = (
    DCPO_SPEC.sure(
        "Late in training DCPO uses nearly all completions",
        "DCPO",
        None,
        "utilisation",
        "above",
        threshold=0.9,
        reported="0.95 to 0.97; 0.72 on average at 7B and 14B",
    ),
    DCPO_SPEC.sure(
        "where GRPO uses less than half",
        "GRPO",
        None,
        "utilisation",
        "below",
        threshold=0.5,
        reported="0.28 to 0.34; 0.44 at 7B and 14B",
    ),
    DCPO_SPEC.sure(
        "DCPO clips less than half as many tokens",
        "DCPO",
        "GRPO",
        "clipped",
        "below",
        form="ratio",
        threshold=0.5,
        reported="0.0001 to 0.0002 and 0.0004 to 0.0010; a tenth at 7B and 14B",
    ),
    DAPO_SPEC.sure(
        "DAPO draws more than 1.5 times the samples",
        "DAPO",
        "GRPO",
        "drawn",
        "above",
        form="ratio",
        threshold=1.5,
        reported="3.5 times, 3 to 5 at 7B and 14B",
    ),
    DAPO_SPEC.claim(
        "and is more accurate after as many updates",
        "DAPO",
        "GRPO",
        "held_out",
        "above",
        judged="mean",
        reported="0.94 and 0.91",
    ),
    GSPO_SPEC.claim(
        "GSPO's published range clips more than a tenth of the tokens",
        "GSPO ε 3e-4",
        None,
        "clipped",
        "above",
        threshold=0.1,
        reported="0.21; 0.11 to 0.15 at 7B and 14B",
    ),
    GSPO_SPEC.claim(
        "and learns more slowly than a wider one",
        "GSPO ε 3e-4",
        "GSPO ε 0.01",
        "on_the_way",
        "below",
        judged="mean",
        reported="0.90 to 0.93 and 0.94 to 0.95 at the end",
    ),
    DCPO_SPEC.claim("DCPO is as accurate as GRPO", "DCPO", "GRPO", "held_out", "same", reported="0.90 and 0.91"),
)

GROUP = Group(
    name="arithmetic",
    title="The world `arithmetic`: DCPO, DAPO, GSPO",
    setting=(
        "World `arithmetic`, full size, levels 1 to 3, from its warm-started base model, which all seeds share; 120 "
        "training prompts per seed. 40 rollouts of 32 prompts with 8 completions, 8 updates each, Adam with β₂ 0.95,"
        " its rate falling from 1e-4 to 0. *Held out* is the accuracy on 60 other prompts, 16 samples each, at "
        "temperature 1; *utilisation* the share of completions with an advantage other than 0 in the last quarter of"
        " the rollouts (of those trained on, for DAPO), *clipped* the mean share of tokens that the clip takes the "
        "gradient of, *on the way* the mean accuracy of all that was sampled, *drawn* all completions sampled in "
        "training."
    ),
    scales=(
        Scale(),
        Scale(size="small", levels="1-2", rollouts=2, prompts=4, held_out=4, generations=4, minibatches=2, samples=4),
    ),
    arms=ARMS,
    claims=CLAIMS,
    prepare=prepare,
    run=run,
    columns={
        "held_out": "held out",
        "utilisation": "utilisation",
        "clipped": "clipped",
        "on_the_way": "on the way",
        "drawn": "drawn",
        "pass_at_k": "pass@8",
    },
)
