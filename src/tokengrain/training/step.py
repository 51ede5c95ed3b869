"""The record of the optimiser step under way: its losses and metrics, until it is known to be finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokengrain.batch import Segments, TokenBatch
from tokengrain.loss import Counts, LossOutput
from tokengrain.training.loss import Judged

# ----------------------------------------------------------------------------------------------------
# Means of metrics over many batches and ranks, with the right weights, and an interval for proportions.

AllReduce = Callable[[Tensor], Tensor]


def wide(values: Tensor) -> Tensor:
    """`values` in float64; on the host if their device has no such numbers (Apple's)."""
    return values.cpu().double() if values.device.type == "mps" else values.double()


class WeightedMeans:
    """Sums and weights of named quantities; `means` divides. Sums are float64, on the host.

    A mean of batch means is wrong as soon as batches differ in size; every quantity is added here as a sum
    over the things it is a mean of (pairs, tokens), with their number as the weight.
    """

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.weights: dict[str, float] = {}

    def add(self, name: str, total: float, weight: float) -> None:
        """Add `total`, the sum over `weight` things."""
        self.sums[name] = self.sums.get(name, 0.0) + float(total)
        self.weights[name] = self.weights.get(name, 0.0) + float(weight)

    def merge(self, other: WeightedMeans) -> None:
        for name, total in other.sums.items():
            self.add(name, total, other.weights[name])

    def scaled(self, factor: float) -> WeightedMeans:
        """The same quantities with sums and weights times `factor`; 0 keeps the names alone."""
        out = WeightedMeans()
        for name, total in self.sums.items():
            out.add(name, total * factor if factor else 0.0, self.weights[name] * factor)
        return out

    def clear(self) -> None:
        self.sums.clear()
        self.weights.clear()

    def means(self) -> dict[str, float]:
        """Mean of every quantity that has weight, in order of first use."""
        return {name: total / self.weights[name] for name, total in self.sums.items() if self.weights[name] > 0}

    def reduced(self, all_reduce: AllReduce) -> WeightedMeans:
        """The same over all ranks; every rank must hold the same names."""
        names = sorted(self.sums)
        values = [self.sums[n] for n in names] + [self.weights[n] for n in names]
        total = all_reduce(torch.tensor(values, dtype=torch.float64)).tolist()
        out = WeightedMeans()
        for i, name in enumerate(names):
            out.add(name, total[i], total[len(names) + i])
        return out

    def state(self) -> dict[str, Any]:
        """JSON-like state; floats survive JSON exactly."""
        return {"sums": dict(self.sums), "weights": dict(self.weights)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.sums, self.weights = dict(state["sums"]), dict(state["weights"])


def add_metrics(means: WeightedMeans, metrics: Mapping[str, Tensor], n_losses: int) -> None:
    """Add an objective's metrics: a vector is one value per pair, a scalar the mean over `n_losses` pairs."""
    vectors = {name: wide(value.detach()) for name, value in metrics.items()}
    totals = torch.stack([v.sum() if v.dim() else v * n_losses for v in vectors.values()]).tolist() if vectors else []
    for (name, value), total in zip(vectors.items(), totals, strict=True):
        means.add(name, total, value.numel() if value.dim() else n_losses)


@dataclass
class MicroRecord:
    """One micro-batch of the step, detached.

    Attributes:
        rows: row of each prompt.
        group: prompt of each completion, long `[C]`.
        labels: the counted tokens, long `[N]`.
        output: the objective's output.
        share: what the micro-batch adds to the loss of the step.
        entropy: nats per counted token `[N]`, or None.
        real: False: it stands in on a rank that has nothing in this step; only the names of its metrics count.
    """

    rows: tuple[int | str, ...]
    group: Tensor
    labels: Tensor
    segments: Segments
    output: LossOutput
    share: Tensor
    entropy: Tensor | None
    real: bool = True

    @classmethod
    def of(cls, batch: TokenBatch, judged: Judged, share: Tensor, real: bool = True) -> MicroRecord:
        out = judged.output
        tokens = out.token_losses.detach() if out.token_losses is not None else None
        output = replace(out, losses=out.losses.detach(), token_losses=tokens)
        return cls(batch.rows, batch.group, batch.labels, batch.segments, output, share.detach(), judged.entropy, real)

    def add_to(self, means: WeightedMeans) -> None:
        """Add the metrics, and the lengths, to a logging window."""
        if not self.real:
            own = WeightedMeans()
            replace(self, real=True).add_to(own)
            means.merge(own.scaled(0.0))
            return
        add_metrics(means, self.output.metrics, self.output.losses.numel())
        add_lengths(means, self.segments, self.output.unit == "pairs")
        if self.entropy is not None:
            means.add("entropy", float(wide(self.entropy).sum()), self.entropy.numel())

    def row_losses(self) -> list[tuple[int | str, float]]:
        """Loss of every pair (or completion) with its row; a token term is added where it belongs."""
        pairs = self.output.unit == "pairs"
        rows = self.rows if pairs else [self.rows[g] for g in self.group.tolist()]
        return list(zip(rows, self._with_token_term(pairs).tolist(), strict=True))

    def _with_token_term(self, pairs: bool) -> Tensor:
        losses, extra = self.output.losses, self.output.token_losses
        if extra is None:
            return losses
        lengths = self.segments.lengths
        if self.output.token_unit == "chosen_tokens":
            return losses + Segments.from_lengths(lengths[0::2].tolist(), lengths.device).sum(extra)
        per_completion = self.segments.sum(extra)
        return losses + (sum(self.segments.pairs(per_completion)) if pairs else per_completion)


def add_lengths(means: WeightedMeans, segments: Segments, pairs: bool) -> None:
    """Mean counted tokens per completion, by side for pairs."""
    lengths = segments.lengths.tolist()
    if pairs:
        means.add("lengths/chosen", sum(lengths[0::2]), len(lengths) // 2)
        means.add("lengths/rejected", sum(lengths[1::2]), len(lengths) // 2)
    else:
        means.add("lengths/completion", sum(lengths), len(lengths))


def totals(records: list[MicroRecord]) -> Tensor:
    """Float64 `[2]` on the host: the records' loss, and how many of their terms are not finite."""
    records = [r for r in records if r.real]
    if not records:
        return torch.zeros(2, dtype=torch.float64)
    share = torch.stack([wide(r.share) for r in records]).sum()
    terms = [r.output.losses.flatten() for r in records]
    terms += [r.output.token_losses.flatten() for r in records if r.output.token_losses is not None]
    bad = torch.stack([(~torch.isfinite(t)).sum() for t in terms]).sum()
    return torch.stack([share, bad.to(share)]).cpu()


def report(records: list[MicroRecord], rank: int) -> list[dict[str, Any]]:
    """Per micro-batch its rows and losses, for `nonfinite.json`; strings where JSON has no number."""
    return [
        {
            "rank": rank,
            "losses": [{"row": row, "loss": _json_number(loss)} for row, loss in record.row_losses()],
        }
        for record in records
        if record.real
    ]


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


# ----------------------------------------------------------------------------------------------------
# What an optimiser step is made of: batches on the host, their counts on all ranks, their micro-batches.


@dataclass(frozen=True)
class HostBatch:
    """A `TokenBatch` that stays in host memory when the data loader moves batches to the device.

    Counting and cutting read lengths, which on an accelerator would make the host wait. Its micro-batches
    are moved one by one when they are used; they are token ids, a few kilobytes.

    Attributes:
        real: False: this rank has nothing to learn from in the step and `batch` stands in, without weight, so that
            the rank takes part in what all ranks do together.
    """

    batch: TokenBatch
    real: bool = True

    def to(self, device: torch.device | str, non_blocking: bool = False) -> HostBatch:
        return self


@dataclass(frozen=True)
class StepPlan:
    """Of one optimiser step: counts over its batches on all ranks, and how often each rank runs the model.

    Attributes:
        counts: what the normaliser divides by.
        tokens: prompt and completion tokens, for the log.
        passes: for each of this rank's batches the number of forward passes that all ranks make; None: each
            rank makes as many as it needs.
    """

    counts: Counts
    tokens: int
    passes: tuple[int, ...] | None = None


def all_reduce(values: Tensor, device: torch.device, op: str = "sum") -> Tensor:
    """`values` summed ("sum") or maximised ("max") over ranks, on the host; itself if there is one rank."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    on_device = values.to(device)
    dist.all_reduce(on_device, op=dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
    return on_device.cpu()


def counts_of(batch: TokenBatch) -> Counts:
    return Counts.of(batch.segments, pairs=batch.is_pairs, prompts=batch.n_prompts)


def plan_step(
    batches: Sequence[HostBatch], max_tokens: int | None, device: torch.device, *, same_passes: bool
) -> StepPlan:
    """Count a step.

    Args:
        batches: this rank's batches of the step, one per accumulation step.
        same_passes: whether ranks must run the model equally often (FSDP: every pass is a collective).
    """
    counts = sum((counts_of(b.batch) for b in batches if b.real), Counts())
    tokens = torch.tensor([sum(b.batch.n_tokens for b in batches if b.real)])
    total = all_reduce(torch.cat([counts.to_tensor(), tokens]), device)
    passes = None
    if same_passes:
        own = torch.tensor([len(b.batch.split(max_tokens)) for b in batches])
        passes = tuple(all_reduce(own, device, "max").tolist())
    return StepPlan(Counts.from_tensor(total[:-1]), int(total[-1]), passes)


def micro_batches(batch: TokenBatch, max_tokens: int | None, passes: int | None) -> list[tuple[TokenBatch, bool]]:
    """Cut a batch into micro-batches, exactly `passes` of them if that is given.

    Returns:
        The micro-batches. False marks one that is there only for ranks to run the model equally often: a rank
        with too few prompts runs its smallest one again, and the caller gives it no weight.
    """
    parts = [(part, True) for part in batch.split(max_tokens, parts=passes or 1)]
    if passes is None or len(parts) == passes:
        return parts
    smallest = min((part for part, _ in parts), key=lambda part: part.n_tokens)
    return parts + [(smallest, False)] * (passes - len(parts))
