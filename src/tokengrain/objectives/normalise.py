"""From losses per pair to the scalar that is optimised, independent of how the batch is cut.

One optimiser step sees some pairs, on some ranks, in some micro-batches. For every micro-batch
    loss = normaliser(output, counts),   counts = those of the whole step (all micro-batches, all ranks),
and the loss of the step is the SUM of these over its micro-batches and ranks; so are the gradients. The
caller must therefore not divide by the number of micro-batches, and where gradients are averaged over
ranks (DDP, FSDP) must multiply by their number.

Given losses l_i of U units (pairs or completions), of P prompts, with N counted tokens in the whole step:
    mean         sum_i l_i / U           (default; the objective as the papers write it)
    token_mean   sum_i l_i / N           (a step weighs by its tokens; for losses that are sums over tokens)
    prompt_mean  sum_i l_i / P           (sums over the completions of a prompt, as DCPO's)
    constant     sum_i l_i / constant    (a fixed divisor, as Dr. GRPO's)
    sum          sum_i l_i
`token_losses`, where an objective has them, always add their sum divided by the step's number of such
tokens: they are defined as a token mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Literal

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.callables import nearest
from tokengrain.errors import RecipeError
from tokengrain.objectives.output import LossOutput

NormaliserName = Literal["mean", "token_mean", "prompt_mean", "constant", "sum"]
NORMALISERS: tuple[NormaliserName, ...] = ("mean", "token_mean", "prompt_mean", "constant", "sum")


@dataclass(frozen=True)
class Counts:
    """What a batch holds; added up over micro-batches and ranks.

    Attributes:
        pairs: preference pairs (0 if the completions do not come in pairs).
        completions: completions.
        tokens: counted tokens.
        chosen_tokens: counted tokens of the chosen completions (0 without pairs).
        prompts: prompts (0 where nobody counted them).
    """

    pairs: int = 0
    completions: int = 0
    tokens: int = 0
    chosen_tokens: int = 0
    prompts: int = 0

    @classmethod
    def of(cls, segments: Segments, *, pairs: bool, prompts: int = 0) -> Counts:
        """Count a batch: `Counts.of(batch.segments, pairs=batch.is_pairs, prompts=batch.n_prompts)`."""
        lengths = segments.lengths
        chosen = int(segments.pairs(lengths)[0].sum()) if pairs else 0
        return cls(len(segments) // 2 if pairs else 0, len(segments), segments.total, chosen, prompts)

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def to_tensor(self, device: torch.device | str | None = None) -> Tensor:
        """Long `[5]`, ready for an all-reduce with SUM."""
        return torch.tensor(astuple(self), dtype=torch.long, device=device)

    @classmethod
    def from_tensor(cls, counts: Tensor) -> Counts:
        """The inverse of `to_tensor`."""
        return cls(*counts.tolist())


Normaliser = Callable[[LossOutput, Counts], Tensor]


def make_normaliser(name: NormaliserName = "mean", constant: float | None = None) -> Normaliser:
    """A normaliser by name; `constant` is the divisor of "constant" and of no other.

    Raises:
        RecipeError: an unknown name, or a constant that is missing, not positive, or not wanted.
    """
    if name not in NORMALISERS:
        raise RecipeError(f"normaliser: unknown name {name!r}{nearest(name, NORMALISERS)}")
    if name == "constant" and not (constant is not None and constant > 0):
        raise RecipeError(f"normaliser 'constant' needs a positive normaliser_constant, got {constant!r}")
    if name != "constant" and constant is not None:
        raise RecipeError(f"normaliser {name!r} takes no normaliser_constant, got {constant!r}")

    def normalise(output: LossOutput, counts: Counts) -> Tensor:
        if name == "prompt_mean" and counts.completions and not counts.prompts:
            raise ValueError("normaliser 'prompt_mean' needs the number of prompts in the counts, got 0")
        loss = output.losses.sum() / _divisor(name, output, counts, constant)
        if output.token_losses is not None:
            loss = loss + output.token_losses.sum() / max(getattr(counts, output.token_unit), 1)
        return loss

    return normalise


def _divisor(name: NormaliserName, output: LossOutput, counts: Counts, constant: float | None) -> float:
    if name == "constant" and constant is not None:
        return constant
    if name == "sum":
        return 1
    unit = {"token_mean": "tokens", "prompt_mean": "prompts"}.get(name, output.unit)
    return max(getattr(counts, unit), 1)
