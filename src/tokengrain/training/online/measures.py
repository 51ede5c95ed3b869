"""What is logged about a rollout, over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokengrain.credit.group import GroupStatistics
from tokengrain.objectives.kl import kl_estimate
from tokengrain.rewards import RewardResult
from tokengrain.rollout.base import Rollouts
from tokengrain.rollout.mismatch import sampler_mismatch
from tokengrain.training.metrics import wide
from tokengrain.training.online.step import RolloutStep


@dataclass
class Drawn:
    """What one rank sampled for a rollout, filtered prompts included: plain lists, one entry per completion.

    Attributes:
        context: tokens that completions only share with others they branch off from; they were drawn once.
        prompts: number of prompts; informative: those whose completions earned different rewards.
        total: the sum of a completion's rewards; NaN where it could not be scored.
        by_name: the same of each reward.
        seconds: of sampling; refills: rounds of sampling after the first.
    """

    lengths: list[int] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    correct: list[bool] = field(default_factory=list)
    by_name: dict[str, list[float]] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    context: int = 0
    prompts: int = 0
    informative: int = 0
    failures: int = 0
    refills: int = 0
    seconds: float = 0.0

    def add(self, rollouts: Rollouts, step: RolloutStep, result: RewardResult | None) -> None:
        """Add what was sampled in one go."""
        self.lengths += [len(c.ids) for c in rollouts.completions]
        self.context += sum(c.context for c in rollouts.completions)
        self.truncated += [c.truncated for c in rollouts.completions]
        self.prompts += len(rollouts.prompts)
        self.seconds += rollouts.seconds
        if result is None:
            return
        self.total += result.total.tolist()
        if step.correct is not None:
            self.correct += step.correct.tolist()
        for name, values in result.by_name.items():
            self.by_name.setdefault(name, []).extend(values.tolist())
        for name, value in result.counts.items():
            self.counts[name] = self.counts.get(name, 0.0) + value
        self.failures += len(result.failures)
        self.informative += int(GroupStatistics(result.total.double(), step.group.cpu()).varied.sum())


def drawn_metrics(parts: Sequence[Drawn]) -> dict[str, float]:
    """Metrics of what all ranks sampled.

    `reward/mean` and `reward/std` of the sum of all rewards, `reward/<name>/mean` and `/std` of each,
    `reward/correct`, `reward/invalid` (share of completions), `reward/failures`; `rollout/length` (tokens),
    `rollout/truncated` (share), `rollout/informative` (share of prompts whose completions earned different rewards).
    """
    lengths = torch.tensor([n for part in parts for n in part.lengths], dtype=torch.float64)
    tokens = float(lengths.sum()) - sum(part.context for part in parts)
    metrics = {
        "rollout/prompts": float(sum(part.prompts for part in parts)),
        "rollout/completions": float(len(lengths)),
        "rollout/refills": float(parts[0].refills),
        "rollout/tokens": tokens,
        "rollout/length": float(lengths.mean()),
        "rollout/length_max": float(lengths.max()),
        "rollout/truncated": _share([t for part in parts for t in part.truncated]),
        # Ranks sample at the same time.
        "rollout/tokens_per_second": tokens / max(max(part.seconds for part in parts), 1e-9),
    }
    if not any(part.total for part in parts):
        return metrics
    metrics |= _moments("reward", [r for part in parts for r in part.total])
    for name in parts[0].by_name:
        metrics |= _moments(f"reward/{name}", [r for part in parts for r in part.by_name.get(name, [])])
    if any(part.correct for part in parts):
        metrics["reward/correct"] = _share([c for part in parts for c in part.correct])
    metrics["reward/invalid"] = _share([r != r for part in parts for r in part.total])
    metrics["reward/failures"] = float(sum(part.failures for part in parts))
    for name in parts[0].counts:
        metrics[f"reward/{name}"] = sum(part.counts.get(name, 0.0) for part in parts)
    metrics["rollout/informative"] = sum(part.informative for part in parts) / metrics["rollout/prompts"]
    return metrics


def _share(flags: list[bool]) -> float:
    return sum(flags) / max(len(flags), 1)


def _moments(name: str, values: list[float]) -> dict[str, float]:
    """Mean and population deviation of the numbers that are there; NaN of nothing is not logged."""
    known = torch.tensor([v for v in values if v == v], dtype=torch.float64)
    if not known.numel():
        return {}
    return {f"{name}/mean": float(known.mean()), f"{name}/std": float(known.std(correction=0))}


def step_sums(step: RolloutStep, keep: Tensor) -> dict[str, tuple[float, float]]:
    """Of one rank's prompts to train on: (sum, weight) by name, to be added up over ranks.

    `rollout/utilisation`: share of completions with an advantage other than 0; `rollout/entropy` and `rollout/kl_ref`
    (k3): nats per token.

    Args:
        keep: bool `[C]`, the completions that are trained on.
    """
    sums: dict[str, tuple[float, float]] = {}
    if step.advantages is not None:
        signal = (step.segments.max(step.advantages.abs()) > 0) & keep
        sums["rollout/utilisation"] = (float(signal.sum()), float(keep.sum()))
    tokens = step.broadcast(keep)
    if "entropy" in step.quantities:
        entropy = wide(step.quantities["entropy"][tokens])
        sums["rollout/entropy"] = (float(entropy.sum()), float(entropy.numel()))
    if "ref_logps" in step.quantities:
        logps, ref_logps = wide(step.quantity("old_logps")), wide(step.quantities["ref_logps"])
        kl = kl_estimate(logps, ref_logps, "k3")[tokens]
        sums["rollout/kl_ref"] = (float(kl.sum()), float(kl.numel()))
    return sums


def mismatch(step: RolloutStep) -> dict[str, float]:
    """How far the sampler's log-probabilities are from the trainer's; nothing where the sampler has none."""
    if "raw_logps" not in step.quantities:
        return {}
    return sampler_mismatch(step.quantities["raw_logps"], step.quantity("old_logps"), step.segments)


def summed(parts: Sequence[dict[str, tuple[float, float]]]) -> dict[str, float]:
    """Weighted means of what `step_sums` gave on all ranks."""
    names: dict[str, Any] = dict.fromkeys(name for part in parts for name in part)
    found = {}
    for name in names:
        sums = [part[name] for part in parts if name in part]
        weight = sum(w for _, w in sums)
        if weight:
            found[name] = sum(s for s, _ in sums) / weight
    return found


MISMATCH_EXTREMES = {"max_abs": max, "max_ratio": max, "max_sequence_ratio": max, "min_ratio": min}


def joined_mismatch(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mismatch over ranks: extremes of extremes, means of means."""
    found = {}
    for name in parts[0]:
        values = [part[name] for part in parts if name in part]
        how = MISMATCH_EXTREMES.get(name.removeprefix("mismatch/"))
        found[name] = how(values) if how is not None else sum(values) / len(values)
    return found
