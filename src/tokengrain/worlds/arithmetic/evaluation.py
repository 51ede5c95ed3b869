"""Evaluation of a policy in the world `arithmetic`, from several samples per prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from tokengrain.evaluation.intervals import Estimate
from tokengrain.evaluation.online import by_group, mean_over_prompts, sample_metrics
from tokengrain.worlds.arithmetic.audit import MARKER, Ending, Kind, audit, fits, read, symbols, upto
from tokengrain.worlds.arithmetic.problems import DIGITS, EOS, Problem

if TYPE_CHECKING:
    from tokengrain.rollout import Rollouts


def stated_answer(tokens: Sequence[str], ending: Ending = "answer") -> str | None:
    """The two digits that a completion ends with, or (with `marker`) the total before the last separator."""
    last = upto(tokens, ending)[-4:]
    kinds = (MARKER, DIGITS, DIGITS, EOS) if ending == "answer" else (DIGITS, DIGITS, ";,", MARKER)
    if len(last) < 4 or not all(fits(token, kind) for token, kind in zip(last, kinds)):
        return None
    return "".join(last[1:3] if ending == "answer" else last[:2])


def chain_metrics(
    problems: Sequence[Problem], rollouts: Rollouts, ending: Ending = "answer", k: int | None = None
) -> dict[str, float | None]:
    """Measures of a policy's samples.

    Args:
        problems: P, those of the rollouts' prompts.
        rollouts: n samples of each prompt.
        k: the largest k (None: n).

    Returns:
        Those of `sample_metrics` (accuracy, pass@j, avg@k, maj@k, utilisation), each with `_low` and `_high` of a
        95 % interval over prompts; `accuracy_level_L` and `pass@k_level_L` likewise; `length`, `length_correct`,
        `length_wrong` (tokens; None without such samples); `truncated`, `well_formed` (shares); and
        `culprit_KIND`, the share of wrong samples whose culprit is of this kind (None without wrong samples).
    """
    tokens = [[symbols(c.ids) for c in group] for group in rollouts.groups]
    audits = [[audit(p, t, ending) for t in group] for p, group in zip(problems, tokens, strict=True)]
    correct = torch.tensor([[a.correct for a in group] for group in audits])
    answers = [[stated_answer(t, ending) for t in group] for group in tokens]
    per_prompt = sample_metrics(correct, answers, k)
    k = correct.shape[1] if k is None else k
    found: dict[str, float | None] = {}
    for name, values in per_prompt.items():
        found |= _flat(name, mean_over_prompts(values))
    levels = [p.level for p in problems]
    for name in ("accuracy", f"pass@{k}"):
        groups = by_group(per_prompt[name], levels)
        for level in sorted(set(levels)):
            found |= _flat(f"{name}_level_{level}", groups[level])
    lengths = torch.tensor([[float(len(c.ids)) for c in group] for group in rollouts.groups])
    for suffix, kept in (("", torch.ones_like(correct)), ("_correct", correct), ("_wrong", ~correct)):
        found[f"length{suffix}"] = _mean(lengths[kept])
    formed = [[read(t, len(p.steps), ending)[1] is None for t in group] for p, group in zip(problems, tokens)]
    found["truncated"] = _mean(rollouts.truncated.float())
    found["well_formed"] = _mean(torch.tensor(formed).float())
    kinds = [a.kind for group in audits for a in group if not a.correct]
    for kind in get_args(Kind):
        found[f"culprit_{kind}"] = kinds.count(kind) / len(kinds) if kinds else None
    return found


def _flat(name: str, estimate: Estimate) -> dict[str, float | None]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _mean(values: Tensor) -> float | None:
    mean = float(values.mean()) if values.numel() else math.nan
    return None if math.isnan(mean) else mean
