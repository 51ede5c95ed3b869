"""Credit from a model's own uncertainty: baselines that have seen no preference."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from tokengrain.batch import TokenBatch
from tokengrain.credit.base import checked_credit, scorer_fingerprint, scorer_logps
from tokengrain.files import fingerprint


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


class Surprise(_OfModel):
    """Log-probability of every token: what the model finds improbable counts as bad.

    A credit that finds a corrupted token no better than this has found what is unusual, not what is wrong.

    Args:
        model: normally the starting model: a model, or anything called like a `Reference`.
    """

    name = "surprise"

    def _measured(self, batch: TokenBatch) -> Tensor:
        return scorer_logps(self.model, batch)


class Entropy(_OfModel):
    """Entropy, in nats, of the distribution that every token was drawn from: large where much was open.

    It says where something was decided, not whether the decision was good.

    Args:
        model: normally the starting model: a model, or anything called like a `Reference`.
    """

    name = "entropy"

    def _measured(self, batch: TokenBatch) -> Tensor:
        from tokengrain.scoring import head_quantities, score
        from tokengrain.scoring.forward import evaluating

        if isinstance(self.model, nn.Module):
            with evaluating(self.model):
                values = score(self.model, batch, ("entropy",)).entropy
            assert values is not None  # it was asked for
            return values
        own = self.model(batch, {"distribution"}).distribution
        labels = batch.labels.to(own.hidden.device)
        return head_quantities(own.hidden, own.head, labels, ("entropy",))["entropy"]
