"""What a loss function returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Unit = Literal["pairs", "completions"]
TokenUnit = Literal["tokens", "chosen_tokens"]


@dataclass
class LossOutput:
    """Losses before any normalisation: a normaliser turns them into the scalar that is optimised.

    Attributes:
        losses: one per pair `[P]` or per completion `[C]` (see `unit`), in nats, with gradient.
        metrics: detached values for logging, one per pair `[P]` (per completion `[C]`) each; what is
            logged for a step is their mean over all pairs (completions) of the step.
        token_losses: an extra term, one value per token it is about, already weighted. Whatever the
            normaliser, it adds its sum divided by the number of `token_unit` in the whole optimiser step:
            a mean over tokens that does not depend on how the step is cut into micro-batches.
        unit: what `losses` has one of.
        token_unit: what `token_losses` has one of: all counted tokens, or those of chosen completions.
        tokens: detached values per counted token `[N]`, for pictures of single completions, for example
            "ratio" and "clipped". They are not logged.
    """

    losses: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    token_losses: Tensor | None = None
    unit: Unit = "pairs"
    token_unit: TokenUnit = "chosen_tokens"
    tokens: dict[str, Tensor] = field(default_factory=dict)
