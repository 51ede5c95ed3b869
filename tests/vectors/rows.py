"""Sampled completions of a case: padded `[B, T]` arrays with one mask, or rows of unequal length; groups of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tests.vectors.runner import Case
from tokengrain.batch import Segments
from tokengrain.loss import Counts, LossOutput, NormaliserName, make_normaliser


@dataclass
class Rows:
    """B completions by their mask `[B, T]` of tokens that count."""

    mask: Tensor

    @classmethod
    def of(cls, case: Case) -> Rows:
        """By the case's mask; without one, all tokens of its rows count."""
        mask = case.inputs.get("mask")
        if mask is None:
            rows = next(
                x for x in case.inputs.values() if isinstance(x, list) or (isinstance(x, Tensor) and x.dim() > 1)
            )
            mask = [torch.ones(len(row)) for row in rows]
        return cls(_padded(mask).bool())

    @property
    def segments(self) -> Segments:
        return Segments.from_padded(self.mask, self.mask)[1]

    @property
    def counts(self) -> Counts:
        """One prompt: the vectors of a loss say nothing about prompts."""
        return Counts.of(self.segments, pairs=False, prompts=1)

    def flat(self, values: Tensor | list[Tensor]) -> Tensor:
        """`[B, T, ...]`, B rows, or one value per row `[B]`, to `[N, ...]`. Masked values may be anything."""
        if isinstance(values, Tensor) and values.dim() == 1:
            return self.segments.broadcast(values)
        return Segments.from_padded(_padded(values, self.mask.shape[1]), self.mask)[0]

    def take(self, case: Case, *names: str) -> dict[str, Tensor]:
        """Flat vectors of those of these inputs that the case has."""
        return {name: self.flat(case.inputs[name]) for name in names if case.inputs.get(name) is not None}

    def old(self, case: Case, name: str, logps: Tensor) -> Tensor:
        """The sampling policy's log-probabilities `[N]`; where a case has none it is on-policy: those of the policy."""
        return self.take(case, name).get(name, logps.detach())

    def sampled(self, case: Case, *others: str) -> dict[str, Tensor]:
        """`logps`, `old_logps`, `advantages` and those of the others that the case has, flat."""
        vectors = self.take(case, "logps", "advantages", *others)
        return {**vectors, "old_logps": self.old(case, "old_logps", vectors["logps"])}

    def padded(self, flat: Tensor) -> Tensor:
        """The inverse of `flat` for `[B, T, ...]`; 0 where masked."""
        out = flat.new_zeros((*self.mask.shape, *flat.shape[1:]))
        out[self.mask] = flat.detach()
        return out

    def share(self, output: LossOutput, *metrics: str) -> Tensor:
        """Sum of metrics that are means over the tokens of a completion, as a mean over all tokens."""
        lengths = self.segments.lengths
        return sum((output.metrics[m] * lengths).sum() for m in metrics) / lengths.sum().clamp(min=1)

    def normalised(self, output: LossOutput, name: NormaliserName) -> Tensor:
        return make_normaliser(name)(output, self.counts)


def _padded(rows: Tensor | list[Tensor], width: int | None = None) -> Tensor:
    """`[B, T, ...]`, zeros behind rows that are shorter."""
    if isinstance(rows, Tensor):
        return rows
    out = pad_sequence(rows, batch_first=True)
    more = 0 if width is None else width - out.shape[1]
    return F.pad(out, (0, 0) * (out.dim() - 2) + (0, more))


def numbered(ids: Any) -> tuple[Tensor, list[Any]]:
    """Ids of groups, names or numbers, as `(long [C] counted from 0 in order of appearance, names [G])`."""
    listed: Sequence[Any] = ids.tolist() if isinstance(ids, Tensor) else ids
    names = list(dict.fromkeys(listed))
    return torch.tensor([names.index(i) for i in listed]), names
