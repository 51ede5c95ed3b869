"""Credit that needs no model: data columns, a user's function, random numbers; scaling and clipping."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokengrain.batch import TokenBatch
from tokengrain.errors import DataError, RecipeError, fingerprint
from tokengrain.method import checked_credit, credit
from tokengrain.scoring.reference import scorer_fingerprint, scorer_logps
from tokengrain.settings import Number, load_callable, source_of


@credit("column", column=lambda settings: settings["column"])
class ColumnCredit:
    """Credit that came with the data: `chosen_token_rewards`, `rejected_token_rewards`, or another column.

    Args:
        column: its name in `batch.columns`.

    Raises:
        DataError: when called, if the data have no such column.
    """

    name = "column"

    def __init__(self, *, column: str = "token_rewards") -> None:
        self.column = column

    def __call__(self, batch: TokenBatch) -> Tensor:
        if self.column not in batch.columns:
            raise DataError(
                f"the data have no per-token column {self.column!r}",
                row=batch.rows[0] if batch.rows else None,
                value=sorted(batch.columns),
                expected=f"chosen_{self.column} and rejected_{self.column} in every row, or another source",
            )
        return checked_credit(batch.columns[self.column], batch, f"{self.name} {self.column}")

    def fingerprint(self) -> str:
        return fingerprint([self.name, self.column])


@credit("function", code=("function",))
class FunctionCredit:
    """Credit from a function of the user's.

    Args:
        function: `(batch) -> Tensor [N]`, or a list with one sequence of numbers per completion, over the
            tokens that count; or an import string of it, "module:function" or "path.py:function".
    """

    name = "function"

    def __init__(self, *, function: str | Callable[[TokenBatch], Tensor | Sequence[Any]]) -> None:
        self.function = load_callable(function) if isinstance(function, str) else function
        self.name = f"function {getattr(self.function, '__qualname__', type(self.function).__qualname__)}"
        self._source = source_of(self.function)

    def __call__(self, batch: TokenBatch) -> Tensor:
        return checked_credit(self.function(batch), batch, self.name)

    def fingerprint(self) -> str:
        """By the function's source as it was loaded, where there is one; what it calls is not looked into."""
        return fingerprint([self.name, self._source])


@credit("random")
class RandomCredit:
    """Uniform numbers, a control: guidance that knows nothing must change nothing.

    A token's number depends on the seed, its row, its completion and its place in it, not on the batch, so it
    is the same in every epoch and micro-batch.

    Args:
        low, high: bounds.
        seed: another seed gives other numbers.
    """

    name = "random"

    def __init__(self, *, low: Number = -0.5, high: Number = 0.5, seed: int = 0) -> None:
        if not low < high:
            raise RecipeError(f"credit 'random' needs low < high, got low={low} and high={high}")
        self.low, self.high, self.seed = low, high, seed

    def __call__(self, batch: TokenBatch) -> Tensor:
        parts, seen = [], dict.fromkeys(range(batch.n_prompts), 0)
        for group, length in zip(batch.group.tolist(), batch.segments.lengths.tolist(), strict=True):
            row = batch.rows[group] if batch.rows else group
            key = f"{self.seed}/{row}/{seen[group]}".encode()
            seen[group] += 1
            generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:7], "big"))
            parts.append(torch.rand(length, generator=generator))
        values = self.low + (self.high - self.low) * torch.cat(parts)
        return checked_credit(values, batch, self.name)

    def fingerprint(self) -> str:
        return fingerprint([self.name, self.low, self.high, self.seed])


# ----------------------------------------------------------------------------------------------------
# Credit from a model's own uncertainty: baselines that have seen no preference.


class _OfModel(ABC):
    """Credit that a single model gives.

    Args:
        model: normally the starting model: a model, or anything called like a `Reference`.
    """

    name: str
    values = "order"

    def __init__(self, *, model: Any) -> None:
        self.model = model

    def __call__(self, batch: TokenBatch) -> Tensor:
        return checked_credit(self._measured(batch), batch, self.name)

    @abstractmethod
    def _measured(self, batch: TokenBatch) -> Tensor:
        """`[N]`, for every counted token."""

    def fingerprint(self) -> str:
        return fingerprint([self.name, scorer_fingerprint(self.model)])


@credit("surprise", values="order", judges_itself=True)
class Surprise(_OfModel):
    """Log-probability of every token: what the model finds improbable counts as bad.

    A credit that finds a corrupted token no better than this has found what is unusual, not what is wrong.

    Args:
        model: normally the starting model: a model, or anything called like a `Reference`.
    """

    name = "surprise"

    def _measured(self, batch: TokenBatch) -> Tensor:
        return scorer_logps(self.model, batch)


@credit("entropy", values="order", judges_itself=True)
class Entropy(_OfModel):
    """Entropy, in nats, of the distribution that every token was drawn from: large where much was open.

    It says where something was decided, not whether the decision was good.

    Args:
        model: normally the starting model: a model, or anything called like a `Reference`.
    """

    name = "entropy"

    def _measured(self, batch: TokenBatch) -> Tensor:
        from tokengrain.scoring.fused import head_quantities
        from tokengrain.scoring.model import evaluating
        from tokengrain.scoring.score import score

        if isinstance(self.model, nn.Module):
            with evaluating(self.model):
                values = score(self.model, batch, ("entropy",)).entropy
            assert values is not None  # it was asked for
            return values
        own = self.model(batch, {"distribution"}).distribution
        labels = batch.labels.to(own.hidden.device)
        return head_quantities(own.hidden, own.head, labels, ("entropy",))["entropy"]
