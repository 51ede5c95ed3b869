"""AlignDistil's credit: a DPO model against a DPO model trained on exchanged pairs (arXiv 2503.02832)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokengrain.batch import TokenBatch
from tokengrain.callables import Positive
from tokengrain.credit.base import checked_credit, scorer_fingerprint, scorer_logps
from tokengrain.credit.guide import guide_token_rewards
from tokengrain.files import fingerprint


class ContrastiveDPO:
    """Credit β·(log p_model − log p_reverse) of every token.

    Both models start from the same weights; the reverse one learned from the pairs with chosen and rejected
    exchanged, so it is worse than the start where the other is better, and the contrast is about twice the
    guide's.

    Args:
        model: trained by DPO on the pairs: a model, or anything called like a `Reference`.
        reverse: trained by DPO on the exchanged pairs. Same tokenizer.
        beta: reward per nat; the theory means the β that both were trained with.
    """

    name = "contrastive_dpo"
    values = "signed"

    def __init__(self, *, model: Any, reverse: Any, beta: Positive = 0.1) -> None:
        self.model, self.reverse, self.beta = model, reverse, float(beta)

    def __call__(self, batch: TokenBatch) -> Tensor:
        normal, reverse = scorer_logps(self.model, batch), scorer_logps(self.reverse, batch)
        return checked_credit(guide_token_rewards(normal, reverse, self.beta), batch, self.name)

    def fingerprint(self) -> str:
        models = [scorer_fingerprint(self.model), scorer_fingerprint(self.reverse)]
        return fingerprint([self.name, self.beta, *models])
