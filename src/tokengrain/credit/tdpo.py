"""TDPO's credit: the advantage of every token in a model that was trained with TDPO (arXiv 2404.11999)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokengrain.batch import TokenBatch
from tokengrain.callables import Positive
from tokengrain.credit.base import checked_credit, scorer_fingerprint
from tokengrain.files import fingerprint
from tokengrain.objectives.tdpo import tdpo_token_rewards


class TDPOAdvantage:
    """Credit β·(log p − log q + KL(q‖p)), p the trained model, q the reference, over the full vocabulary.

    The KL makes it an advantage: its mean over tokens drawn from the reference is 0 in every state. It needs a
    reference whose whole distribution is at hand: stored `ref_logps` are not enough.

    Args:
        model: trained with TDPO (any log-ratio policy works): a model, or anything called like a `Reference`.
        reference: the frozen starting point, a `Reference` or a model; a model stays frozen from now on.
        beta: reward per nat.
    """

    name = "tdpo"
    values = "signed"

    def __init__(self, *, model: Any, reference: Any, beta: Positive = 0.1) -> None:
        from tokengrain.scoring.reference import FrozenReference

        self.model, self.beta = model, float(beta)
        self.reference = FrozenReference(reference) if isinstance(reference, nn.Module) else reference

    def __call__(self, batch: TokenBatch) -> Tensor:
        reference = self.reference(batch, {"logps", "distribution"})
        assert reference.logps is not None  # they were asked for
        logps, kl = self._against(batch, reference.distribution)
        return checked_credit(tdpo_token_rewards(logps, reference.logps, kl, self.beta), batch, self.name)

    def _against(self, batch: TokenBatch, distribution: Any) -> tuple[Tensor, Tensor]:
        """Log-probabilities and KL(reference‖model), each `[N]`."""
        from tokengrain.scoring import head_quantities, score
        from tokengrain.scoring.forward import evaluating

        if isinstance(self.model, nn.Module):
            with evaluating(self.model):
                scores = score(self.model, batch, ("logps", "kl"), reference=distribution)
            assert scores.logps is not None  # they were asked for
            assert scores.kl is not None
            return scores.logps, scores.kl
        own = self.model(batch, {"distribution"}).distribution
        labels = batch.labels.to(own.hidden.device)
        found = head_quantities(own.hidden, own.head, labels, ("logps", "kl"), distribution)
        return found["logps"], found["kl"]

    def fingerprint(self) -> str:
        models = [scorer_fingerprint(self.model), scorer_fingerprint(self.reference)]
        return fingerprint([self.name, self.beta, *models])
