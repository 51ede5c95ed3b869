"""Where R3 does not help, without a model: other laws of noise over the tokens, and smaller groups.

Sigma measures variability, not relevance. Specification: dro.md, section 7, "Limits to document".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.claims.framework import Arm, Group, Measures, SeedAndSizes
from experiments.claims.online_r3 import GROUP_SIZE, KINDS, SOURCE, TELLING, TRACE_GAIN, TRACE_NOISE, ranked

SIZES = (2, 4, 8, 64)


@dataclass(frozen=True)
class Scale:
    """`traces` in all, in groups of the arm's size, and the tokens of a reference."""

    traces: int = 16_000
    length: int = 100


def run(context: SeedAndSizes[Scale], arm: Arm) -> Measures:
    scale, size = context.scale, arm.settings["size"]
    generator = torch.Generator().manual_seed(context.seed)
    quality = torch.randn(scale.traces // size, size, generator=generator)
    noise = torch.randn(*quality.shape, scale.length, generator=generator)
    spread = deviations(arm.settings["noise"], len(quality), scale.length, generator)
    return {"ranked": ranked(quality, noise * spread[:, None], arm.settings["power"])}


def deviations(law: str, prompts: int, length: int, generator: torch.Generator) -> Tensor:
    """Deviation of each reference token's noise, `[P, L]`, nats.

    Args:
        law: "small": 0.15; "heavy": log-normal around 0.15, one draw for each token of each prompt; "large": 0.6, as
            much as a telling token gains per unit of quality; "alike": 0.15 on the telling tokens, and on the others
            what makes them vary exactly as much as these do.
    """
    found = torch.full((prompts, length), TRACE_NOISE)
    if law == "heavy":
        return found * torch.randn(prompts, length, generator=generator).exp()
    if law == "large":
        return torch.full_like(found, TRACE_GAIN)
    if law == "alike":
        found[:, TELLING:] = (TRACE_GAIN**2 + TRACE_NOISE**2) ** 0.5
    return found


def _name(kind: str, noise: str, size: int = GROUP_SIZE) -> str:
    return f"{kind}, {noise} noise, G {size}"


ARMS = (
    *(
        Arm(_name(kind, noise), "dro", {"power": power, "noise": noise, "size": GROUP_SIZE})
        for noise in ("small", "large", "alike", "heavy")
        for kind, power in KINDS.items()
    ),
    *(
        Arm(_name(kind, "small", size), "dro", {"power": KINDS[kind], "noise": "small", "size": size})
        for size in SIZES
        for kind in ("R3", "R3, variance")
    ),
)


CLAIMS = (
    SOURCE.claim(
        "A limit: with heavy-tailed noise over the tokens R3 ranks traces worse than the plain mean",
        _name("R3", "heavy"),
        _name("mean", "heavy"),
        "ranked",
        "below",
        reported="0.59 and 0.64",
    ),
    SOURCE.claim(
        "Where the noise is as large as the signal the gain vanishes",
        _name("R3", "large"),
        _name("mean", "large"),
        "ranked",
        "within",
        threshold=0.05,
        reported="0.63 and 0.60; 0.91 and 0.78 with small noise",
    ),
    SOURCE.claim(
        "and where noise tokens vary exactly as much as the telling ones",
        _name("R3", "alike"),
        _name("mean", "alike"),
        "ranked",
        "within",
        threshold=0.05,
        reported="0.63 and 0.60",
    ),
    SOURCE.sure(
        "Two traces per prompt rank worse than sixteen",
        _name("R3", "small", 2),
        _name("R3", "small"),
        "ranked",
        "below",
        reported="0.82 and 0.92",
    ),
    SOURCE.sure(
        "and sixty-four hardly better than sixteen",
        _name("R3", "small", 64),
        _name("R3", "small"),
        "ranked",
        "within",
        threshold=0.02,
        reported="0.92 and 0.92",
    ),
    SOURCE.claim(
        "With the variance as the weight two traces are too few as well",
        _name("R3, variance", "small", 2),
        _name("R3, variance", "small"),
        "ranked",
        "below",
    ),
)

GROUP = Group(
    name="r3-limits",
    title="R3: limits",
    setting=(
        "No model: the test *ranked* of group `r3` with 100 reference tokens and 16,000 traces in groups of G. Three "
        "tokens gain 0.6 nats per unit of a trace's standard normal quality. All tokens have normal noise; its "
        "deviation is 0.15 (*small*), 0.6 (*large*), or on the tokens that tell nothing 0.62, which makes them vary "
        "exactly as much as the three, whose noise stays at 0.15 (*alike*). *Heavy*: every token of every prompt has a "
        "deviation of its own, log-normal with median 0.15 and log-deviation 1; the source does not say which law it "
        "used. *Ranked* is the share of pairs of a group's traces that the reward puts in the order of their quality."
    ),
    scales=(Scale(), Scale(traces=128, length=20)),
    arms=ARMS,
    claims=CLAIMS,
    prepare=SeedAndSizes,
    run=run,
    columns={"ranked": "ranked right"},
)
