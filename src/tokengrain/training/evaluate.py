"""Evaluation: on held-out rows with sums over the whole set, divided once; and by sampling, with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from tokengrain.batch import PromptRole, Sample, TokenBatch
from tokengrain.errors import DataError, require
from tokengrain.evaluation.statistics import (
    interval_of_moments,
    mean_interval,
    mean_over_prompts,
    pass_at_k,
    wilson,
)
from tokengrain.loss import Counts, LossOutput, make_normaliser
from tokengrain.training.step import HostBatch, Judged, WeightedMeans, all_reduce, counts_of, wide

MEASURES = ("entropy", "kl", "log_ratio")
MARGINS = "rewards/margins"
WHOLE = "whole"
"""Measured as well: what the policy prefers when all tokens count, also those an objective does not read."""


def chosen_dataset(trainer: Trainer, eval_dataset: Any) -> Any:
    """The data that `Trainer.evaluate` was asked for: these, one of several by name, or the trainer's own."""
    own: Any = trainer.eval_dataset
    dataset = own[eval_dataset] if isinstance(eval_dataset, str) else own if eval_dataset is None else eval_dataset
    require(dataset is not None, DataError, "evaluation needs an eval_dataset")
    return dataset


def loop_output(metrics: Mapping[str, float], prefix: str, count: int) -> EvalLoopOutput:
    """What an evaluation loop returns: metrics under their prefix, of `count` samples; no predictions are kept."""
    nothing: Any = None
    return EvalLoopOutput(nothing, nothing, {f"{prefix}_{name}": value for name, value in metrics.items()}, count)


class EvalBatches:
    """This rank's share of an evaluation set (rows rank, rank + world, ...), cut into micro-batches.

    Those after the first `n_real` repeat one without weight, so that all ranks run the model equally often.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        batch_size: int,
        max_tokens: int | None,
        *,
        rank: int,
        world: int,
        role: PromptRole = "prefix",
        device: torch.device,
    ) -> None:
        self.n_samples = len(samples)  # on all ranks
        own = [samples[i] for i in range(rank, len(samples), world)]
        batches = [TokenBatch.from_samples(own[i : i + batch_size], role) for i in range(0, len(own), batch_size)]
        self._parts = [HostBatch(part) for batch in batches for part in batch.split(max_tokens)]
        self.n_real = len(self._parts)
        passes = int(all_reduce(torch.tensor([self.n_real]), device, "max"))
        filler = self._parts[-1] if own else HostBatch(TokenBatch.from_samples([samples[0]], role))
        self._parts += [filler] * (passes - self.n_real)

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[HostBatch]:
        return iter(self._parts)


class EvalSums:
    """What evaluation adds up, and the metrics made of it."""

    def __init__(self) -> None:
        self.means = WeightedMeans()
        self.counts = Counts()
        self.losses = torch.zeros(2, dtype=torch.float64)  # sums of the per-pair and of the token terms
        self.squares = torch.zeros(2, dtype=torch.float64)  # of completions' log-ratios: their sum, and how many
        self.margins = torch.zeros(1, dtype=torch.float64)  # the sum of their squares
        self.units: tuple[Any, Any] = ("pairs", "chosen_tokens")

    def add(self, batch: TokenBatch, judged: Judged, real: bool) -> None:
        """Add a micro-batch; of one that is not real only its kind counts."""
        out, pairs = judged.output, judged.output.unit == "pairs"
        self.units = (out.unit, out.token_unit)
        if not real:
            return
        self.means.add_metrics(out.metrics, out.losses.numel())
        if MARGINS in out.metrics:
            self.margins += wide(out.metrics[MARGINS]).square().sum().cpu()
        self.means.add_lengths(batch.segments, batch.is_first if pairs else None)
        chosen = batch.is_chosen if pairs else None
        for name in MEASURES:
            if getattr(judged, name) is None:
                continue
            values = wide(getattr(judged, name))
            self.means.add(name, float(values.sum()), values.numel())
            for side, mask in (("chosen", chosen), ("rejected", ~chosen)) if chosen is not None else ():
                self.means.add(f"{name}_per_token/{side}", float(values[mask].sum()), int(mask.sum()))
        if judged.log_ratio is not None:
            sums = batch.segments.sum(wide(judged.log_ratio))
            self.squares += torch.tensor([float(sums.square().sum()), float(sums.numel())], dtype=torch.float64)
        self.counts = self.counts + counts_of(batch)
        extra = wide(out.token_losses).sum() if out.token_losses is not None else torch.zeros(())
        self.losses += torch.stack([wide(out.losses).sum().cpu(), extra.double().cpu()])

    def log_ratio_rms(self, device: torch.device) -> float | None:
        """How far policy and reference are apart, nats per completion (root mean square); None if it is not known."""
        total, count = all_reduce(self.squares, device).tolist()
        return math.sqrt(total / count) if count else None

    def metrics(self, normaliser: str, device: torch.device) -> dict[str, float]:
        """Metrics of the whole set: `loss`, the objective's own, accuracy and margin with 95 % intervals, measures."""
        losses = all_reduce(self.losses, device)
        counts = Counts.from_tensor(all_reduce(self.counts.to_tensor(), device))
        means = self.means.reduced()
        # A sum over an evaluation set, or one over a constant meant for a step, says nothing: use the mean.
        name: Any = normaliser if normaliser in ("mean", "token_mean") else "mean"
        output = LossOutput(losses[:1], {}, losses[1:], *self.units)
        found = {"loss": float(make_normaliser(name)(output, counts)), **means.means()}
        # Tokens that were selected with the labels in hand rank pairs too well: whole completions are what counts.
        ranked = next((name for name in ("whole/accuracies", "rewards/accuracies") if name in found), None)
        if ranked is not None:
            # Pairs of one prompt are not independent: an interval is as wide as that of so many prompts.
            right = means.sums[ranked] * counts.prompts / max(counts.pairs, 1)
            found |= wilson(right, counts.prompts).named("accuracy")
        square = float(all_reduce(self.margins, device)) / max(counts.pairs, 1)
        if found.get(MARGINS) and counts.prompts > 1:  # not of a policy that still is its reference
            found |= interval_of_moments(found[MARGINS], square, counts.prompts).named(MARGINS)
        if "nll/token" in found:  # sft: all of its losses are negative log-likelihoods
            found["perplexity"] = math.exp(min(float(losses.sum()) / max(counts.tokens, 1), 700.0))
        return found


def completion_metrics(entries: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Metrics of an evaluation, from lists over completions per prompt: lengths, truncated, reward, by_name, correct.

    `reward` and `correct` get the ends of a 95 % interval (prompts are independent, completions of a prompt are not).
    Of prompts with a `task` they are also given task by task.
    """
    lengths = [n for e in entries for n in e["lengths"]]
    truncated = sum(t for e in entries for t in e["truncated"])
    metrics = {"length": sum(lengths) / len(lengths), "truncated": truncated / len(lengths)}
    if not any("reward" in e for e in entries):
        return metrics
    metrics |= _earned("", entries)
    for name in entries[0]["by_name"]:
        metrics |= _with_interval(f"reward_{name}", [_mean(e["by_name"][name]) for e in entries], interval=False)
    for task in sorted({e["task"] for e in entries if "task" in e}):
        metrics |= _earned(f"task/{task}/", [e for e in entries if e.get("task") == task])
    whole = [e["correct"] for e in entries if all(c == c for c in e["correct"])]
    if whole and (n := len(whole[0])) > 1:
        right = torch.tensor([int(sum(one)) for one in whole])
        for k in (2**i for i in range(n.bit_length())):
            metrics[f"pass@{k}"] = float(pass_at_k(n, right, k).mean())
    return metrics


def _earned(prefix: str, entries: Sequence[dict[str, Any]]) -> dict[str, float]:
    """`reward` and `correct` over prompts, with their intervals, where some reward applies."""
    metrics = _with_interval(f"{prefix}reward", [_mean(e["reward"]) for e in entries])
    if known := [share for share in (_mean(e["correct"]) for e in entries) if share == share]:
        metrics |= mean_over_prompts(torch.tensor(known)).named(f"{prefix}correct")
    return metrics


def _mean(values: Sequence[float]) -> float:
    known = [v for v in values if v == v]
    return sum(known) / len(known) if known else math.nan


def _with_interval(name: str, per_prompt: Sequence[float], *, interval: bool = True) -> dict[str, float]:
    known = [v for v in per_prompt if v == v]
    if not known:
        return {}
    if len(known) < 2 or not interval:
        return {name: sum(known) / len(known)}
    return mean_interval(known).named(name)
