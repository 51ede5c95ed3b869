"""Which findings about token credit hold on the world `stories`, against the exact optimum.

Every run trains with `PreferenceTrainer` on pairs of its own seed. `noisy` (1,000 pairs, slope 0.3) and `clean` (4,000
pairs, slope 1) are two groups, since the regime decides which method wins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from experiments.claims.framework import Arm, Group, Measures
from experiments.claims.stories_claims import CLAIMS_BY_REGIME
from tokengrain.bench.sources import exchanged, train_on, world_samples
from tokengrain.method import Transformed, make_credit, make_objective
from tokengrain.methods.aligndistil import ContrastiveTeacher
from tokengrain.scoring.reference import FrozenReference
from tokengrain.worlds import load_world

HALF_STEP, QUARTER_STEP = 1e-4, 5e-5


@dataclass(frozen=True)
class Scale:
    """Steps and sizes. `samples` are per prompt (12 prompts)."""

    regime: str
    steps: int = 120
    pairs: int = 32
    samples: int = 64
    size: str = "full"
    credit: bool = True


@dataclass
class Context:
    """What the arms of a seed share."""

    seed: int
    scale: Scale
    world: Any
    rows: Sequence[Any]

    @cached_property
    def guide(self) -> Any:
        """TGDPO's guide, SePO's oracle and AlignDistil's target: DPO on the same pairs."""
        return self.train("dpo", {"beta": 0.3}, rows=self.rows)

    @cached_property
    def reverse(self) -> Any:
        """DPO on the same pairs with chosen and rejected exchanged."""
        return self.train("dpo", {"beta": 0.3}, rows=exchanged(self.rows))

    def train(self, objective: str, hyper: Mapping[str, Any], **options: Any) -> Any:
        """A model after training from the base; options: of `train_on`."""
        rows = options.pop("rows", self.rows)
        sizes = {"steps": self.scale.steps, "pairs": self.scale.pairs}
        return train_on(self.world, make_objective(objective, **hyper), rows, self.seed, **sizes, **options)


def prepare(seed: int, scale: Scale) -> Context:
    world: Any = load_world(f"world://stories?regime={scale.regime}&seed={seed}&size={scale.size}")
    return Context(seed, scale, world, world_samples(world))


def run(context: Context, arm: Arm) -> Measures:
    settings = dict(arm.settings)
    options: dict[str, Any] = {"learning_rate": settings.get("learning_rate", 2e-4)}
    if "credit" in settings:
        options["credit"] = credit_source(settings["credit"], context)
    if "select" in settings:
        options["credit_as"] = {"name": "selection", "share": settings["select"]}
    if "teacher" in settings:
        options |= {"teacher": _teacher(context, settings["teacher"]), "rows": _chosen_only(context.rows)}
    model = context.train(settings["objective"], settings["hyper"], **options)
    scale = context.scale
    return context.world.evaluate(model, n=scale.samples, seed=context.seed, credit=scale.credit)


def credit_source(name: str, context: Context) -> Any:
    """Where an arm's token credit comes from."""
    world = context.world
    if name in ("contrastive", "swapped"):
        source = make_credit(
            "contrastive", model=world.reference, tokenizer=world.tokenizer, templates=world.contrastive_templates
        )
        return source if name == "contrastive" else Transformed(source, scale=-1.0)
    if name == "guide":
        return make_credit("guide", model=context.guide, reference=world.reference, beta=0.3)
    if name == "random":
        return make_credit("random")
    # Advantages have the size of rewards. A quarter of them is what T-REG's ½·tanh(½·A) is for small A; clipped
    # but not scaled, they made T-REG collapse (KL above 40 nats in 2 of 2 seeds).
    return Transformed(world.credit(), scale=-0.25 if name == "flipped" else 0.25, clip=0.5)


def _teacher(context: Context, settings: Mapping[str, Any]) -> Any:
    contrast = None if settings["form"] == "distil" else FrozenReference(context.reverse)
    return ContrastiveTeacher(target=FrozenReference(context.guide), contrast=contrast, beta0=0.3, **settings)


def _chosen_only(rows: Sequence[Any]) -> list[Any]:
    return [replace(row, completions=row.completions[:1]) for row in rows]


def _arm(name: str, method: str, objective: str, hyper: Mapping[str, Any], **more: Any) -> Arm:
    return Arm(name, method, {"objective": objective, "hyper": dict(hyper), **more})


def _sepo(name: str, credit: str, learning_rate: float) -> Arm:
    return _arm(name, "sepo", "sepo", {"gamma": 2.0}, credit=credit, select=0.3, learning_rate=learning_rate)


def _align(name: str, **teacher: Any) -> Arm:
    return _arm(name, "aligndistil", "aligndistil", {"beta0": 0.3}, teacher=teacher)


HALF = {"beta": 0.3, "alpha": 0.5}
ARMS = (
    *(_arm(f"DPO β {b:g}", "dpo", "dpo", {"beta": b}) for b in (0.1, 0.3, 1.0)),
    *(_arm(f"TDPO2 β 0.1 α {a:g}", "tdpo", "tdpo2", {"beta": 0.1, "alpha": a}) for a in (0.1, 0.25, 0.5)),
    _arm("T-REG β 0.3 α 0.25", "treg", "treg", {"beta": 0.3, "alpha": 0.25}, credit="contrastive"),
    _arm("T-REG β 0.3 α 0.5", "treg", "treg", HALF, credit="contrastive"),
    *(_arm(f"T-REG β 0.3 α 0.5, {c}", "treg", "treg", HALF, credit=c) for c in ("swapped", "random", "exact")),
    _arm("TGDPO β 0.3 α 0.5", "tgdpo", "tgdpo", HALF, learning_rate=HALF_STEP, credit="guide"),
    _arm("TGDPO β 1 α 0.5", "tgdpo", "tgdpo", {"beta": 1.0, "alpha": 0.5}, credit="guide"),
    _arm("DPO β 0.3, half step", "dpo", "dpo", {"beta": 0.3}, learning_rate=HALF_STEP),
    *(
        _arm(f"TGDPO β 0.3 α 0.5, {c}", "tgdpo", "tgdpo", HALF, learning_rate=HALF_STEP, credit=c)
        for c in ("random", "flipped", "exact")
    ),
    _arm("SimPO β 10 γ 3", "simpo", "simpo", {"beta": 10.0, "gamma": 3.0}),
    _sepo("SePO k 0.3 γ 2", "guide", QUARTER_STEP),
    _sepo("SePO k 0.3 γ 2, random tokens", "random", QUARTER_STEP),
    _sepo("SePO k 0.3 γ 2, exact credit", "exact", QUARTER_STEP),
    _sepo("SePO k 0.3 γ 2, half step", "guide", HALF_STEP),
    _align("DPO β 0.3 distilled", form="distil"),
    _align("AlignDistil β₀ 0.3 r 1", form="adaptive", r=1.0),
    _align("AlignDistil β₀ 0.3 r 4", form="adaptive", r=4.0),
)

COLUMNS = {
    "reward": "true reward",
    "kl": "KL",
    "share": "frontier share",
    "entropy": "entropy",
    "broken": "broken",
    "credit_spearman": "credit ρ",
    "credit_auc": "credit AUC",
}
OTHER_BASE = (
    "All runs start from one base model, so the intervals say nothing about other base models. One other was tried by "
    "accident, with the demo (seed 0, noisy, 2026-11-20): pre-trained by the same code on two threads, which sums in "
    "another order, it moved further at the same learning rate: DPO 1.74 at KL 2.28, TDPO2 1.79 at 0.89, T-REG 2.35 at "
    "3.55, TGDPO 1.57 at 4.82, that is, TGDPO *below* DPO. Pre-training now runs on one thread."
)


def remarks(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What holds for all runs together."""
    shares = [r["measures"]["share"] for r in results]
    above = sum(r["measures"]["share_low"] > 1 for r in results)
    return [
        OTHER_BASE,
        f"No policy may pass the frontier: of {len(results)} runs, {above} lie above it by more than their 95 % "
        f"interval (largest share {max(shares):.2f}).",
    ]


def _group(regime: str, pairs: str) -> Group:
    tiny = Scale(regime, steps=2, pairs=4, samples=2, size="one-phrase", credit=False)
    return Group(
        name=f"stories-{regime}",
        title=f"The world `stories`, {regime}: {pairs}",
        setting=(
            f"{pairs}; each seed has preference pairs, order of rows and evaluation samples of its own. 120 steps of "
            "32 pairs, Adam 2e-4 (*half step* and TGDPO at β 0.3: 1e-4; other SePO: 5e-5, since it moves further per "
            "step); 64 samples for each of 12 prompts. Guide, oracle and target are DPO β 0.3 on the same pairs. "
            "Reward is the true reward per story (base 0), KL in nats per story against the base model, frontier share "
            "is the part of the best reward possible at that KL."
        ),
        scales=(Scale(regime), tiny),
        arms=ARMS,
        claims=CLAIMS_BY_REGIME[regime],
        prepare=prepare,
        run=run,
        columns=COLUMNS,
        remarks=remarks,
    )


NOISY = _group("noisy", "1,000 pairs, slope 0.3")
CLEAN = _group("clean", "4,000 pairs, slope 1")
