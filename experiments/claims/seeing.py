"""TimeMaster on the world `series`, and RRPO on the world `clips`: claims about policies that see.

Specifications: timemaster.md and rrpo.md, sections 7.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from experiments.claims.framework import Arm, Group, Measures, SeedAndSizes, Source
from experiments.training import TrainingSizes, train_online
from tokengrain.batch import TokenBatch
from tokengrain.bench.sources import train_on
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.dataset import prepare_pairs
from tokengrain.data.rows import load_rows
from tokengrain.method import make_objective
from tokengrain.rewards.timemaster import TimeMaster
from tokengrain.scoring.score import distribution_of, score
from tokengrain.worlds import load_world
from tokengrain.worlds.series import CLASSES

# ---- TimeMaster ----


@dataclass(frozen=True)
class Rollouts(TrainingSizes):
    """One update per rollout; `held_out` scenes, of which a policy says four things."""

    rollouts: int = 60
    minibatches: int = 1
    held_out: int = 200


def run_series(context: SeedAndSizes[Rollouts], arm: Arm) -> Measures:
    scale, world = context.scale, load_series(context)
    if not arm.settings:
        return {**measured(world, world.reference), "form_leads": None}
    reward = TimeMaster(labels=list(CLASSES), extension="none", **arm.settings)
    done = train_online(
        world,
        make_objective("grpo", epsilon=0.2, beta=0.0),
        [{"name": "group"}],
        context.seed,
        model=deepcopy(world.reference).requires_grad_(True),
        rewards=reward,
        **scale.training,
    )
    every = scale.prompts * scale.generations
    form, hard = (f"reward/timemaster/timemaster/{part}" for part in ("format", "hard"))
    leads = done.reached(hard, 0.85 * every) - done.reached(form, 0.95 * every)
    return {**measured(world, done.model, context.seed), "form_leads": float(leads)}


def load_series(context: SeedAndSizes[Rollouts]) -> Any:
    world: Any = load_world(f"world://series?seed={context.seed}")
    world.held_out = context.scale.held_out
    return world


def measured(world: Any, model: Any, seed: int = 0) -> Measures:
    found = world.evaluate(model, seed=seed)
    return {name: found[name] for name in ("form", "accuracy", "greedy_accuracy", "nearest_accuracy", "best_accuracy")}


BASE, BOTH, FORM = "base", "GRPO", "GRPO, form only"
_timemaster = Source("timemaster", "timemaster.md 7; arXiv 2506.13705")
SERIES = Group(
    "series",
    "TimeMaster: the world series",
    "Noisy sine, square and saw waves as pictures of 28×56; a Qwen2.5-VL of 0.26 million parameters that sees well and "
    "speaks badly. GRPO, 60 rollouts of 32 pictures × 8, one update each, Adam 3e-4; reward 0.9 · class + 0.1 · form, "
    "or the form alone. Four samples of each of 200 held-out pictures, and one greedy answer.",
    (Rollouts(), Rollouts(rollouts=2, prompts=4, generations=4, held_out=8)),
    (
        Arm(BASE, "grpo"),
        Arm(BOTH, "timemaster", {"accuracy": 0.9, "format": 0.1}),
        Arm(FORM, "timemaster", {"accuracy": 0.0, "format": 1.0}),
    ),
    (
        _timemaster.sure("The form becomes right", BOTH, None, "form", "above", threshold=0.95, reported="0.97–0.998"),
        _timemaster.sure("and the class", BOTH, BASE, "accuracy", "above", threshold=0.3, reported="0.36 to 0.90"),
        _timemaster.claim("The form is right before the class is", BOTH, None, "form_leads", "above"),
        _timemaster.claim(
            "GRPO comes near the greedy answers of the model that it starts from",
            BOTH,
            BASE,
            "greedy_accuracy",
            "within",
            threshold=0.05,
        ),
        _timemaster.claim(
            "The form alone leaves the sampled class where it was", FORM, BASE, "accuracy", "within", threshold=0.05
        ),
        _timemaster.claim(
            "and destroys the greedy one",
            FORM,
            BASE,
            "greedy_accuracy",
            "below",
            threshold=-0.2,
            reported="0.880 to 0.360, one seed",
        ),
    ),
    SeedAndSizes,
    run_series,
    {
        "form": "form",
        "accuracy": "accuracy",
        "greedy_accuracy": "greedy accuracy",
        "form_leads": "rollouts from form .95 to class .85",
        "nearest_accuracy": "nearest neighbour",
        "best_accuracy": "best there is",
    },
)

# ---- RRPO ----


@dataclass(frozen=True)
class Pairs:
    """Steps of 32 pairs; `held_out` scenes."""

    steps: int = 120
    held_out: int = 200


def run_clips(context: SeedAndSizes[Pairs], arm: Arm) -> Measures:
    scale = context.scale
    world: Any = load_world(f"world://clips?seed={context.seed}{arm.settings.get('options', '')}")
    world.held_out = scale.held_out
    model = world.reference
    if "objective" in arm.settings:
        spans = TokenizeConfig(spans="column") if arm.settings["objective"] == "rrpo" else TokenizeConfig()
        made = prepare_pairs(load_rows(world.pairs()), world.processor, spans)
        rows = [made[i] for i in range(len(made))]
        objective = make_objective(arm.settings["objective"], beta=0.5, **arm.settings.get("hyper", {}))
        model = train_on(world, objective, rows, context.seed, learning_rate=3e-4, steps=scale.steps)
    found = world.evaluate(model, seed=context.seed)
    return {name: found[name] for name in ("frames", "accuracy", "first_style")} | {"kl": divergence(world, model)}


def divergence(world: Any, model: Any, count: int = 60) -> float:
    """KL of the base model to a policy, in nats per token, over true descriptions of held-out scenes."""
    made = prepare_pairs(load_rows(world.pairs("eval", min(count, world.held_out))), world.processor, TokenizeConfig())
    batch = TokenBatch.from_samples([made[i] for i in range(len(made))])
    with torch.no_grad():
        kl = score(model, batch, want=("kl",), reference=distribution_of(world.reference, batch)).kl
    assert kl is not None
    return float(kl[batch.is_chosen].mean())


DPO, RRPO, SHUFFLED = "DPO", "RRPO", "RRPO, answers to shuffled frames"
_rrpo = Source("rrpo", "rrpo.md 7; arXiv 2504.12083")
CLIPS = Group(
    "clips",
    "RRPO: the world clips",
    "Four frames with a coloured block each; a Qwen2.5-VL of 0.22 million parameters. Rejected sentences have the "
    "words of two frames exchanged, or are the base model's own wrong answers to the frames in another order; 70 % of "
    "the chosen ones have the first of two styles that mean nothing, and 30 % of the rejected ones. 120 steps of 32 "
    "pairs, Adam 3e-4, β 0.5, α 0.05. Four samples of each of 200 held-out clips.",
    (Pairs(), Pairs(steps=2, held_out=8)),
    (
        Arm(BASE, "sft"),
        Arm(DPO, "dpo", {"objective": "dpo"}),
        Arm(RRPO, "rrpo", {"objective": "rrpo", "hyper": {"alpha": 0.05}}),
        Arm(SHUFFLED, "rrpo", {"objective": "rrpo", "hyper": {"alpha": 0.05}, "options": "&rejected=shuffled"}),
    ),
    (
        _rrpo.sure("RRPO learns the colours", RRPO, BASE, "frames", "above", threshold=0.15, reported="0.63 to 0.90"),
        _rrpo.sure("DPO learns the style", DPO, BASE, "first_style", "above", threshold=0.2, reported="0.51 to 0.92"),
        _rrpo.sure("RRPO does not", RRPO, BASE, "first_style", "within", threshold=0.06, reported="0.49"),
        _rrpo.sure(
            "and stays nearer to the base",
            RRPO,
            DPO,
            "kl",
            "below",
            threshold=0.5,
            form="ratio",
            reported="0.158 against 0.735",
        ),
        _rrpo.claim("It learns from answers to shuffled frames too", SHUFFLED, BASE, "frames", "above"),
    ),
    SeedAndSizes,
    run_clips,
    {"frames": "frames right", "accuracy": "whole order", "first_style": "first style", "kl": "KL, nats per token"},
)
