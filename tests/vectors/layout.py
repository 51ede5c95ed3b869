"""Between the padded arrays of the vectors and the library's flat tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.vectors.runner import Case
from tokengrain.batch import Segments
from tokengrain.loss import Counts, LossOutput, make_normaliser
from tokengrain.scoring.fused import head_quantities
from tokengrain.scoring.head import Distribution, Head, Teacher


@dataclass
class Pairs:
    """Preference pairs of a case: two masks `[B, T_w]`, `[B, T_l]` of tokens that count."""

    chosen_mask: Tensor
    rejected_mask: Tensor

    @classmethod
    def of(cls, case: Case) -> Pairs:
        """From masks, or from labels: counted labels, the first position having none."""
        if "chosen_mask" in case.inputs:
            return cls(case.inputs["chosen_mask"].bool(), case.inputs["rejected_mask"].bool())
        return cls(*(case.inputs[f"{side}_labels"][:, 1:] != -100 for side in ("chosen", "rejected")))

    @property
    def segments(self) -> Segments:
        return Segments.from_padded(self._interleaved(self.chosen_mask, self.rejected_mask), self._mask)[1]

    @property
    def counts(self) -> Counts:
        return Counts.of(self.segments, pairs=True)

    def flat(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """`([B, T_w, ...], [B, T_l, ...]) -> [N, ...]`, in the order chosen, rejected, chosen, ..."""
        return Segments.from_padded(self._interleaved(chosen, rejected), self._mask)[0]

    def take(self, case: Case, name: str) -> Tensor:
        """Flat `[N]` from inputs such as `policy_{}_per_token_logps`, `{}` being chosen or rejected."""
        return self.flat(case.inputs[name.format("chosen")], case.inputs[name.format("rejected")])

    def padded(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `flat`; 0 where masked."""
        out = flat.new_zeros((*self._mask.shape, *flat.shape[1:]))
        out[self._mask] = flat.detach()
        width = self.chosen_mask.shape[1], self.rejected_mask.shape[1]
        return out[0::2, : width[0]], out[1::2, : width[1]]

    def by_side(self, name: str, flat: Tensor) -> dict[str, Tensor]:
        """Expected keys of a flat vector: `name` with `{}` replaced by chosen and by rejected."""
        return dict(zip((name.format("chosen"), name.format("rejected")), self.padded(flat), strict=True))

    @property
    def _mask(self) -> Tensor:
        return self._interleaved(self.chosen_mask, self.rejected_mask)

    def _interleaved(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        width = max(self.chosen_mask.shape[1], self.rejected_mask.shape[1])
        sides = [F.pad(side, (0, 0) * (side.dim() - 2) + (0, width - side.shape[1])) for side in (chosen, rejected)]
        return torch.stack(sides, dim=1).flatten(0, 1)


def logits_and_labels(case: Case, name: str, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Flat logits `[N, V]` and labels `[N]` from `{name}_{side}_logits`: position t scores label t + 1."""
    logits = pairs.flat(*(case.inputs[f"{name}_{side}_logits"][:, :-1] for side in ("chosen", "rejected")))
    labels = pairs.flat(*(case.inputs[f"{side}_labels"][:, 1:] for side in ("chosen", "rejected")))
    return logits, labels


def from_logits(
    logits: Tensor,
    labels: Tensor,
    want: tuple[str, ...],
    ref_logits: Tensor | None = None,
    teacher: Teacher | None = None,
) -> dict[str, Tensor]:
    """The library's head on given logits: hidden states are the logits, the weight is the identity."""
    finite = bool(torch.isfinite(logits).all()) and (ref_logits is None or bool(torch.isfinite(ref_logits).all()))
    if finite:
        reference = None if ref_logits is None else Distribution(*_as_head(ref_logits))
        return head_quantities(*_as_head(logits), labels, want, reference, teacher)
    # An infinite logit cannot pass a product with zeros; as a bias it can, and a bias is for one token.
    parts = []
    for i in range(len(labels)):
        row = slice(i, i + 1)
        reference = None if ref_logits is None else Distribution(*_as_head(ref_logits[row]))
        taught = None if teacher is None else teacher.map(lambda d, row=row: d.at(row))
        parts.append(head_quantities(*_as_head(logits[row]), labels[row], want, reference, taught))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _as_head(logits: Tensor) -> tuple[Tensor, Head]:
    weight = torch.eye(logits.shape[1], dtype=logits.dtype)
    if bool(torch.isfinite(logits).all()):
        return logits, Head(weight)
    finite = torch.isfinite(logits)
    bias = torch.where(finite, 0.0, logits.detach())[0]
    return torch.where(finite, logits, 0.0), Head(weight, bias)


def pair_results(output: LossOutput, pairs: Pairs) -> dict[str, Tensor]:
    """What every pair loss gives: the batch-mean loss, the losses, the logged rewards and sums."""
    m = output.metrics
    return {
        "loss": make_normaliser("mean")(output, pairs.counts),
        "per_example": output.losses,
        "chosen_rewards": m["rewards/chosen"],
        "rejected_rewards": m["rewards/rejected"],
        "reward_accuracy": m["rewards/accuracies"],
        "chosen_logps": m["logps/chosen"],
        "rejected_logps": m["logps/rejected"],
    }
