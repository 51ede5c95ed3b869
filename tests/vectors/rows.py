"""Sampled completions of a case: padded `[B, T]` arrays with one mask, and groups of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.vectors.runner import Case
from tokengrain.batch import Segments
from tokengrain.loss import Counts, LossOutput, NormaliserName, make_normaliser


@dataclass
class Rows:
    """B completions by their mask `[B, T]` of tokens that count."""

    mask: Tensor

    @classmethod
    def of(cls, case: Case) -> Rows:
        return cls(case.inputs["mask"].bool())

    @property
    def segments(self) -> Segments:
        return Segments.from_padded(self.mask, self.mask)[1]

    @property
    def counts(self) -> Counts:
        """One prompt: the vectors of a loss say nothing about prompts."""
        return Counts.of(self.segments, pairs=False, prompts=1)

    def flat(self, values: Tensor) -> Tensor:
        """`[B, T, ...]`, or one value per row `[B]`, to `[N, ...]`."""
        return self.segments.broadcast(values) if values.dim() == 1 else Segments.from_padded(values, self.mask)[0]

    def take(self, case: Case, *names: str) -> dict[str, Tensor]:
        """Flat vectors of those of these inputs that the case has."""
        return {name: self.flat(case.inputs[name]) for name in names if case.inputs.get(name) is not None}

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


def numbered(ids: Any) -> tuple[Tensor, list[Any]]:
    """Ids of groups, names or numbers, as `(long [C] counted from 0 in order of appearance, names [G])`."""
    listed: Sequence[Any] = ids.tolist() if isinstance(ids, Tensor) else ids
    names = list(dict.fromkeys(listed))
    return torch.tensor([names.index(i) for i in listed]), names
