"""DRO on a tiny language model: is the value found sooner if the tokens that state it weigh more?

Specification: dro.md, section 7.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from experiments.claims.framework import Arm, Group, Measures
from experiments.claims.online_r3 import POWERS, SOURCE, r3_of_chains
from experiments.claims.slots_task import (
    CHAIN,
    LENGTH,
    MARKER,
    PROMPT,
    SLOTS,
    VOCABULARY,
    Slots,
    answers,
    draw_prompts,
    lookups,
    texts,
)
from experiments.claims.tiny_lm import copy_of, logps_of, sample, sft, tiny_llama, token_batch
from experiments.training import TrainingSizes, train_online
from tokengrain.method import make_objective
from tokengrain.methods.dro import variability
from tokengrain.rewards.suite import RewardFunction

HALFWAY, REACHED = 0.6, 0.9


@dataclass(frozen=True)
class Scale(TrainingSizes):
    """Length of the two trainings; `held_out` prompts to measure on."""

    lookup_steps: int = 800
    lookup_batch: int = 128
    sft_steps: int = 500
    sft_batch: int = 64
    sft_rate: float = 3e-3
    train_prompts: int = 256
    held_out: int = 400
    rollouts: int = 60
    prompts: int = 16
    minibatches: int = 4


@dataclass
class Context:
    """What the arms of a seed share; `held_out`: prompts `[P, 11]` with their right values `[P]`."""

    seed: int
    scale: Scale
    task: Slots
    start: Any
    held_out: tuple[Tensor, Tensor]
    top: tuple[float, float]


def prepare(seed: int, scale: Scale) -> Context:
    generator = torch.Generator().manual_seed(seed)
    start = tiny_llama(len(VOCABULARY), PROMPT + CHAIN + LENGTH + 1, seed)
    sft(start, lookups(scale.lookup_steps, scale.lookup_batch, generator), scale.sft_rate)
    sft(start, texts(scale.sft_steps, scale.sft_batch, generator), scale.sft_rate)
    prompts, values = draw_prompts(scale.held_out, generator)
    held_out = prompts, values[:, 0]
    top = found_slots(start, *held_out, scale.generations, generator)
    return Context(seed, scale, Slots(seed, scale.train_prompts), start, held_out, top)


@torch.no_grad()
def found_slots(
    model: Any, prompts: Tensor, values: Tensor, generations: int, generator: torch.Generator
) -> tuple[float, float]:
    """Over sampled chains: how often a reference's two tokens of largest deviation are the slots; that of its words.

    The first is a share of the prompts whose chains are not all the same: where they are, no deviation says anything.
    """
    repeated = prompts.repeat_interleave(generations, 0)
    chains = sample(model, repeated, CHAIN, generator)
    references = answers(values[:, None], generator).repeat_interleave(generations, 0)
    batch = token_batch(torch.cat([repeated, chains], 1), references[:, None])
    group = torch.arange(len(prompts)).repeat_interleave(generations)
    sigma = variability(logps_of(model, batch), batch.segments, group).view(-1, generations, LENGTH)[:, 0]
    said = chains.view(-1, generations, CHAIN)
    differ = (said != said[:, :1]).any(2).any(1)
    largest = sigma[differ].topk(len(SLOTS), 1).indices.sort(1).values
    words = torch.ones(LENGTH, dtype=torch.bool)
    words[list(SLOTS)] = False
    hits = (largest == torch.tensor(SLOTS)).all(1)
    return float(hits.float().mean()), float(sigma[differ][:, words].mean())


def run(context: Context, arm: Arm) -> Measures:
    scale = context.scale
    done = train_online(
        context.task,
        make_objective("grpo"),
        r3_of_chains(MARKER, **arm.settings),
        context.seed,
        model=copy_of(context.start),
        rewards=RewardFunction(context.task.reward, name="chain", weight=0.0),  # for the log alone
        **scale.training,
        stop=[MARKER],
    )
    right = done.curve("reward/correct")
    return {
        "on_the_way": fmean(right),
        "to_halfway": float(done.reached("reward/correct", HALFWAY)),
        "to_90": float(done.reached("reward/correct", REACHED)),
        "held_out": _right(done.model, *context.held_out),
        "start": _right(context.start, *context.held_out),
        "slots_on_top": context.top[0],
        "words": context.top[1],
    }


@torch.no_grad()
def _right(model: Any, prompts: Tensor, values: Tensor) -> float:
    """Mean probability of the right value."""
    return float(model(input_ids=prompts).logits[:, -1].softmax(-1).gather(1, values[:, None]).mean())


CLAIMS = (
    SOURCE.sure(
        "Before training the two tokens with the largest deviation are the two slots, in nine of ten references",
        "R3",
        None,
        "slots_on_top",
        "above",
        threshold=0.9,
        reported="above 0.9 expected",
    ),
    SOURCE.claim(
        "With R3 at least as many chains are right on the way as with the plain mean",
        "R3",
        "mean",
        "on_the_way",
        "above",
        judged="mean",
        reported="R3 >= mean expected",
    ),
    SOURCE.claim(
        "They hardly differ: no word depends on the chain, so there is no noise to leave out",
        "R3",
        "mean",
        "on_the_way",
        "within",
        threshold=0.02,
        source="our expectation",
    ),
)

GROUP = Group(
    name="slots",
    title="DRO: a value in two slots",
    setting=(
        "A prompt has four keys with their values and asks for one; the chain is one value, the answer a template of "
        "40 tokens with that value in two slots (12 and 30, counted from 0) and, at every other place, one of two "
        "words of its own, the first with 0.7, whatever the chain. Llama of 2 layers, width 48: 800 steps of 128 right "
        "values alone, since looking up is not learned from mostly wrong chains in reasonable time, then 500 steps of "
        "64 whole texts whose chain is right with 0.4 and else has one of the other three values; Adam 3e-3. "
        "There each slot has the chain's value with 0.95, else any of the four, so that the second is not simply a "
        "copy of the first. "
        "DRO: 256 prompts, 60 rollouts of 16 with 8 chains, 4 updates each, Adam 3e-4; the current policy scores the "
        "reference, which has the right value and words drawn once. *On the way* is the share of right chains over "
        f"all rollouts; *to* counts rollouts until three have {HALFWAY:.0%} or {REACHED:.0%} on average; *start* and "
        "*held out* are the mean probability of the right value on 400 other prompts. *Slots on top*, before training "
        "and on these: the share of references whose two tokens with the largest deviation over 8 chains are the "
        "slots, among prompts whose chains are not all the same; *words* is the mean deviation of the other 38, nats."
    ),
    scales=(
        Scale(),
        Scale(
            lookup_steps=2,
            lookup_batch=8,
            sft_steps=30,
            sft_batch=16,
            sft_rate=1e-2,
            train_prompts=8,
            held_out=8,
            rollouts=2,
            prompts=4,
            generations=4,
            minibatches=2,
        ),
    ),
    arms=POWERS,
    claims=CLAIMS,
    prepare=prepare,
    run=run,
    columns={
        "on_the_way": "on the way",
        "to_halfway": f"to {HALFWAY:.0%}",
        "to_90": f"to {REACHED:.0%}",
        "start": "start",
        "held_out": "held out",
        "slots_on_top": "slots on top",
        "words": "words",
    },
)
