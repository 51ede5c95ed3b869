"""One forward pass of a reference for everything that is asked of it about the same batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

from tokengrain.batch import TokenBatch


class Remembered:
    """A reference that answers a second question about the same batch from memory."""

    def __init__(self, reference: Callable[..., Any]) -> None:
        self.reference = reference
        self.batch: TokenBatch | None = None
        self.answer: Any = None

    def __call__(self, batch: TokenBatch, want: Collection[str]) -> Any:
        if set(want) != {"logps"}:
            return self.reference(batch, want)
        if self.batch is not batch:
            self.batch, self.answer = batch, self.reference(batch, {"logps"})
        return self.answer


def asking(source: Any, reference: Any, shared: Remembered) -> Any:
    """`source`; if it asks the same frozen model, a copy that shares the forward pass of the stored logps."""
    asked = getattr(source, "reference", None)
    if asked is None or _frozen_model(asked) is not _frozen_model(reference):
        return source
    source = copy.copy(source)
    source.reference = shared
    return source


def _frozen_model(reference: Any) -> Any:
    """What answers for a reference: the model of a `FrozenReference`, else the reference itself."""
    from tokengrain.scoring.reference import FrozenReference

    return reference.model if isinstance(reference, FrozenReference) else reference
