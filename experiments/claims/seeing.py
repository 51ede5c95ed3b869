"""TimeMaster on the world `series`, RRPO on `clips` and AEPO on `shapes`: claims about policies that see.

Specifications: timemaster.md, rrpo.md and ares.md, sections 7.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from experiments.claims.framework import Arm, Group, Measures, SeedAndSizes, Source
from experiments.training import OnlineRun, TrainingSizes, train_online
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
from tokengrain.worlds.shapes import CHECKS

# ---- TimeMaster ----


@dataclass(frozen=True)
class Rollouts(TrainingSizes):
    """One update per rollout; `held_out` scenes, of which a policy says four things."""

    rollouts: int = 60
    minibatches: int = 1
    held_out: int = 200


def seen_world(context: SeedAndSizes[Any], name: str, options: str = "") -> Any:
    """A world of pictures with the training rows of a seed."""
    world: Any = load_world(f"world://{name}?seed={context.seed}{options}")
    world.held_out = context.scale.held_out
    return world


def taught(context: SeedAndSizes[Rollouts], world: Any, objective: Any, credit: list[Any], rewards: Any) -> OnlineRun:
    """A copy of the world's base model, trained online."""
    model = deepcopy(world.reference).requires_grad_(True)
    return train_online(world, objective, credit, context.seed, model=model, rewards=rewards, **context.scale.training)


def run_series(context: SeedAndSizes[Rollouts], arm: Arm) -> Measures:
    scale, world, model, leads = context.scale, seen_world(context, "series"), None, None
    if arm.settings:
        reward = TimeMaster(labels=list(CLASSES), extension="none", **arm.settings)
        done = taught(context, world, make_objective("grpo", epsilon=0.2, beta=0.0), [{"name": "group"}], reward)
        every = scale.prompts * scale.generations
        form, hard = (f"reward/timemaster/timemaster/{part}" for part in ("format", "hard"))
        model, leads = done.model, float(done.reached(hard, 0.85 * every) - done.reached(form, 0.95 * every))
    found = world.evaluate(model or world.reference, seed=context.seed if arm.settings else 0)
    names = ("form", "accuracy", "greedy_accuracy", "nearest_accuracy", "best_accuracy")
    return {name: found[name] for name in names} | {"form_leads": leads}


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
    scale, world = context.scale, seen_world(context, "clips", arm.settings.get("options", ""))
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

# ---- AEPO ----

CLIPPED: dict[str, Any] = {"epsilon": 0.2, "epsilon_high": 0.3, "ratio_cap": 3.0, "clamp": True, "beta": 0.01}


def run_shapes(context: SeedAndSizes[Rollouts], arm: Arm) -> Measures:
    world = seen_world(context, "shapes")
    model = world.reference
    if arm.settings:
        credit = arm.settings["credit"]
        model = taught(context, world, make_objective("grpo", **CLIPPED), credit, world.reward).model
    found = world.evaluate(model, seed=context.seed)
    return {name: found[name] for name in ("form", "accuracy", "greedy_accuracy")} | checks(world, model, context.seed)


def checks(world: Any, model: Any, seed: int) -> dict[str, float]:
    """Checks per sampled completion, on easy and on hard pictures; 4 samples of each held-out one."""
    scenes = world.drawn("prompts", "eval", world.held_out)
    said = world.said(model, [world.row(s, str(i)) for i, s in enumerate(scenes)], 4, world.sampling(seed))
    each = [(s.truth["level"], sum(w in CHECKS for w in words)) for s, four in zip(scenes, said) for words in four]
    return {f"checks_{level}": fmean([n for own, n in each if own == level] or [0]) for level in ("easy", "hard")}


GRPO, AEPO = "GRPO", "AEPO"
_aepo = Source("aepo", "ares.md 7; arXiv 2510.08457")
_GROUP = {"name": "group"}
SHAPES = Group(
    "shapes",
    "AEPO: the world shapes",
    "Red squares among look-alikes, counted one by one, with checks that nobody has to make; a Qwen2.5-VL of 0.31 "
    "million parameters. 60 rollouts of 32 pictures × 8, one update each, Adam 3e-4, the loss of recipe `aepo`; the "
    "reward is 1 for the right count, and AEPO's entropy reward and weights of the KL beside it. Four samples of each "
    "of 200 held-out pictures, and how many checks they have on easy pictures (up to 3 squares, fewer with others) and "
    "on hard ones.",
    (Rollouts(), Rollouts(rollouts=2, prompts=4, generations=4, held_out=8)),
    (
        Arm(BASE, "sft"),
        Arm(GRPO, "grpo", {"credit": [_GROUP]}),
        Arm(
            AEPO,
            "aepo",
            {
                "credit": [
                    {"name": "aepo", "tokenizer": None, "triggers": "english", "window": 4, "kl_target": 0.05},
                    _GROUP,
                ]
            },
        ),
    ),
    (
        _aepo.sure("AEPO counts better than the base", AEPO, BASE, "accuracy", "above", threshold=0.1),
        _aepo.claim("It counts as well as GRPO", AEPO, GRPO, "accuracy", "within", threshold=0.03),
        _aepo.claim("and checks easy pictures less", AEPO, GRPO, "checks_easy", "below"),
        _aepo.claim("and hard ones more", AEPO, GRPO, "checks_hard", "above"),
    ),
    SeedAndSizes,
    run_shapes,
    {
        "accuracy": "count right",
        "greedy_accuracy": "greedy",
        "form": "form",
        "checks_easy": "checks, easy",
        "checks_hard": "checks, hard",
    },
)
