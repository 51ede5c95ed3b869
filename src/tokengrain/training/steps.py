"""The record of the optimiser step under way: its losses and metrics, until it is known to be finite."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokengrain.batch import Segments, TokenBatch
from tokengrain.objectives.output import LossOutput
from tokengrain.training.losses import Judged
from tokengrain.training.metrics import WeightedMeans, add_metrics, wide


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
