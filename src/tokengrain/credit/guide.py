"""TGDPO's credit: how much a preference-trained guide raises each token over the reference."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokengrain.batch import TokenBatch
from tokengrain.callables import Positive
from tokengrain.credit.base import checked_credit, scorer_fingerprint, scorer_logps
from tokengrain.files import fingerprint


def guide_token_rewards(guide_logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """r_t = beta * (log guide_t - log reference_t), `[N] -> [N]`, detached (arXiv 2506.14574, 2404.12358).

    With a guide trained by DPO with this beta it is DPO's implicit token reward. A SimPO-trained guide goes
    through the same formula.
    """
    return (beta * (guide_logps - ref_logps)).detach()


class GuideLogRatio:
    """Credit from a guide trained with DPO or SimPO, against the reference it started from.

    Args:
        model: the guide: a model, or anything called like a `Reference`. Same tokenizer as the policy.
        reference: the frozen starting point of the guide, a `Reference` or a model.
        beta: reward per nat. The paper's theory means the beta the guide was trained with; the authors' code
            uses the beta of the run that is guided.
    """

    name = "guide"
    values = "signed"

    def __init__(self, *, model: Any, reference: Any, beta: Positive = 0.1) -> None:
        self.model, self.reference, self.beta = model, reference, float(beta)

    def __call__(self, batch: TokenBatch) -> Tensor:
        guide, reference = scorer_logps(self.model, batch), scorer_logps(self.reference, batch)
        return checked_credit(guide_token_rewards(guide, reference, self.beta), batch, self.name)

    def fingerprint(self) -> str:
        models = [scorer_fingerprint(self.model), scorer_fingerprint(self.reference)]
        return fingerprint([self.name, self.beta, *models])
