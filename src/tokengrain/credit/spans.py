"""Spans as credit: the tokens in which chosen and rejected differ earned the preference (RRPO's view)."""

from __future__ import annotations

from torch import Tensor

from tokengrain.batch import TokenBatch
from tokengrain.credit.base import checked_credit, row_of
from tokengrain.errors import DataError
from tokengrain.files import fingerprint


class SpanCredit:
    """+1 for the tokens of the chosen completion that are in a span, -1 for those of the rejected one, else 0.

    Where the spans come from is a matter of the data (`TokenizeConfig.spans`, `data.spans` in a recipe).

    Raises:
        DataError: when called, if the data have no spans, or a prompt does not have two completions.
    """

    name = "spans"
    values = "marks"

    def __call__(self, batch: TokenBatch) -> Tensor:
        if "spans" not in batch.columns:
            raise DataError(
                "the data have no spans",
                row=row_of(batch, 0),
                value=sorted(batch.columns),
                expected="data.spans in the recipe: diff, tags, column or a function",
            )
        if not batch.is_pairs:
            raise DataError(
                "spans as credit need pairs",
                row=row_of(batch, 0),
                value=f"{batch.n_completions} completions of {batch.n_prompts} prompts",
                expected="a chosen and a rejected completion for every prompt",
            )
        inside = (batch.columns["spans"] > 0).float()
        return checked_credit(inside.where(batch.segments.is_chosen, -inside), batch, self.name)

    def fingerprint(self) -> str:
        return fingerprint([self.name])
