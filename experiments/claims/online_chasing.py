"""AEPO with a model, on pointer chasing: does it stop checking what is easy? Specification: ares.md, section 7."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.claims.chasing_task import LONGEST, PROMPT, VOCABULARY, Chasing, checks_of, is_right
from experiments.claims.framework import Arm, Group, Measures, Source
from experiments.claims.tiny_lm import copy_of, sft, tiny_llama
from experiments.training import TrainingSizes, train_online
from tokengrain.evaluation.credit import spearman
from tokengrain.method import make_objective
from tokengrain.rollout.local import HFGenerate
from tokengrain.rollout.sampler import SamplingConfig, encode_prompts

EASY, HARD = 2, 5
"""Most hops of a prompt that counts as easy here, fewest of a hard one."""


@dataclass(frozen=True)
class Scale(TrainingSizes):
    """Length of the two trainings; `samples` are per prompt."""

    sft_steps: int = 800
    sft_batch: int = 64
    sft_rate: float = 2e-3
    rollouts: int = 100
    minibatches: int = 4
    learning_rate: float = 3e-5  # at 1e-4 nine of ten samples are right after a quarter
    samples: int = 32


@dataclass
class Context:
    """What the arms of a seed share."""

    seed: int
    scale: Scale
    task: Chasing
    start: Any


def prepare(seed: int, scale: Scale) -> Context:
    task = Chasing(seed)
    start = tiny_llama(len(VOCABULARY), PROMPT + LONGEST, seed)
    sft(start, task.trace_batches(scale.sft_steps, scale.sft_batch), scale.sft_rate)
    return Context(seed, scale, task, start)


def run(context: Context, arm: Arm) -> Measures:
    scale = context.scale
    if arm.settings["credit"] is None:
        return {**evaluated(context, context.start), "counted": None}
    done = train_online(
        context.task,
        make_objective("grpo", epsilon=0.2, epsilon_high=0.3, ratio_cap=3.0, clamp=True, beta=0.01),
        arm.settings["credit"],
        context.seed,
        model=copy_of(context.start),
        **scale.training,
    )
    return {**evaluated(context, done.model), "counted": done.late("aepo/hwe")}


def evaluated(context: Context, model: Any) -> Measures:
    """Accuracy, lengths with their end (tokens) and checks of samples at temperature 1, on all prompts."""
    task, n = context.task, context.scale.samples
    rows = task.prompts()
    sampling = SamplingConfig(max_new_tokens=LONGEST, seed=context.seed)
    drawn = HFGenerate(model, task.tokenizer).sample(encode_prompts(rows, task.tokenizer), n=n, sampling=sampling)
    pairs = [(row, c.ids) for row, group in zip(rows, drawn.groups, strict=True) for c in group]
    hops = torch.tensor([float(row["hops"]) for row, _ in pairs])
    length = torch.tensor([float(len(ids)) for _, ids in pairs])
    checks = torch.tensor([float(checks_of(ids)) for _, ids in pairs])
    right = torch.tensor([float(is_right(ids, row["answer"])) for row, ids in pairs])
    found: Measures = {"accuracy": float(right.mean()), "rank_correlation": _known(spearman(length, hops))}
    for name, values in (("length", length), ("checks", checks), ("right", right)):
        found |= {f"{name}_easy": _mean(values, hops <= EASY), f"{name}_hard": _mean(values, hops >= HARD)}
    return found


def _mean(values: Tensor, chosen: Tensor) -> float:
    return float(values[chosen].mean())


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


STEP: dict[str, Any] = {"name": "aepo", "tokenizer": None}  # None: the task's
GROUP_ADVANTAGES: dict[str, Any] = {"name": "group"}
ARMS = (
    Arm("start", "sft", {"credit": None}),
    Arm("GRPO", "grpo", {"credit": (GROUP_ADVANTAGES,)}),
    Arm("AEPO", "aepo", {"credit": (STEP, GROUP_ADVANTAGES)}),
    Arm("AEPO's KL alone", "aepo", {"credit": ({**STEP, "shape": "none"}, GROUP_ADVANTAGES)}),
)


SOURCE = Source("aepo", "ares.md 7; arXiv 2510.08457")


CLAIMS = (
    SOURCE.claim(
        "AEPO is as accurate as GRPO or more",
        "AEPO",
        "GRPO",
        "accuracy",
        "above",
        threshold=-0.01,
        judged="mean",
        reported="equal or better; 55.7 and 53.4 at 7B",
    ),
    SOURCE.claim("Its completions of easy prompts get shorter", "AEPO", "start", "length_easy", "below"),
    SOURCE.claim(
        "and are shorter than GRPO's",
        "AEPO",
        "GRPO",
        "length_easy",
        "below",
        reported="at 7B 332 tokens before and 279 after on GSM8K",
    ),
    SOURCE.claim("Length follows difficulty more closely", "AEPO", "start", "rank_correlation", "above"),
    SOURCE.claim("and than under GRPO", "AEPO", "GRPO", "rank_correlation", "above"),
    SOURCE.claim(
        "GRPO keeps three quarters of the checks on easy prompts, or more",
        "GRPO",
        "start",
        "checks_easy",
        "above",
        threshold=0.75,
        form="ratio",
        judged="mean",
        reported="keeps redundancy",
    ),
    SOURCE.claim(
        "AEPO spends more than GRPO on hard prompts",
        "AEPO",
        "GRPO",
        "length_hard",
        "above",
        judged="mean",
        reported="at 7B 17,895 tokens before and 22,619 after on AIME25",
        source="arXiv 2510.08457",
    ),
    SOURCE.claim(
        "The reward does it, not the KL: easy completions are shorter than with AEPO's KL alone",
        "AEPO",
        "AEPO's KL alone",
        "length_easy",
        "below",
        source="our expectation",
    ),
)

GROUP = Group(
    name="chasing",
    title="Pointer chasing: AEPO",
    setting=(
        "Prompts `f^n(a)`, n from 1 to 6, over a random permutation of 16 letters per seed: 96, all of them for "
        "training and for measuring. A Llama of 2 layers, width 48, is fitted to traces (800 steps of 64) in which "
        "the i-th hop slips with probability 0.08 i and 0 to 4 checks, as many on easy prompts as on hard ones, do a "
        "random hop again, mostly rightly: `wait` or `check`, four words of musing, and the hop. Without the words "
        "what follows a trigger would be the most certain text there is, and none would count. Then 100 rollouts of "
        "32 prompts with 8 completions, 4 updates each, Adam 3e-5, clip 0.2 / 0.3, dual clip 3, KL 0.01; AEPO with "
        "the released window of 4, quantile 0.95 and KL target 0.01; its first rollout only sets the threshold. The "
        "learning rate was chosen for GRPO, on another seed, to keep learning until the end. Measured on 32 samples "
        "per prompt at temperature 1; *easy* is n ≤ 2, *hard* n ≥ 5, *ρ* Spearman's correlation of length and n over "
        "all samples (which rises wherever checks get fewer, since hops follow n), *counted* the high-entropy "
        "triggers per completion that AEPO counts, in the last quarter of the rollouts. AEPO itself sorts by the share "
        "of right completions, not by n."
    ),
    scales=(
        Scale(),
        Scale(sft_steps=3, sft_batch=8, rollouts=3, prompts=4, generations=4, minibatches=2, samples=2),
    ),
    arms=ARMS,
    claims=CLAIMS,
    prepare=prepare,
    run=run,
    columns={
        "accuracy": "accuracy",
        "length_easy": "length, easy",
        "length_hard": "length, hard",
        "rank_correlation": "ρ",
        "checks_easy": "checks, easy",
        "checks_hard": "checks, hard",
        "right_easy": "right, easy",
        "right_hard": "right, hard",
        "counted": "counted",
    },
)
