"""TGDPO: DPO with token-level reward guidance (arXiv 2506.14574)."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from tokengrain.batch import Segments, TokenBatch
from tokengrain.errors import fingerprint
from tokengrain.loss import LossOutput, token_weights
from tokengrain.method import Card, checked_credit, credit, objective
from tokengrain.methods._pairs import pair_metrics, token_weighted_loss, weight_metrics
from tokengrain.scoring.reference import scorer_fingerprint, scorer_logps
from tokengrain.settings import Number, Positive

CARD = Card(
    "tgdpo",
    "TGDPO",
    "DPO weighted by a guide's rewards",
    "TGDPO: Harnessing Token-Level Reward Guidance for Enhancing Direct Preference Optimization",
    "2506.14574",
    "ICML 2025",
    trains="guide, then policy, offline pairs",
    credit="log-ratio of a DPO- or SimPO-trained guide",
)


@objective("tgdpo")
def tgdpo_loss(
    logps: Tensor,
    segments: Segments,
    *,
    ref_logps: Tensor,
    token_rewards: Tensor,
    beta: Positive = 0.1,
    alpha: Number = 0.5,
    weight_clamp_min: Number | None = None,
    normalise_weights: bool = False,
) -> LossOutput:
    """DPO whose tokens weigh 1 + alpha r (chosen) and 1 - alpha r (rejected) inside the margin.

    Args:
        logps: log-probabilities under the policy `[N]`, nats.
        segments: cuts `[N]` into 2P completions: chosen, rejected, chosen, ...
        ref_logps: the same under the frozen reference `[N]`.
        token_rewards: r `[N]`, any token reward. The paper's is reward_beta * (log guide - log reference):
            `credit.GuideLogRatio`, with reward_beta = beta in the authors' code.
        beta: strength of the tie to the reference.
        alpha: strength of the guidance; 0 is DPO.
        weight_clamp_min: floor of the weights (None: none, as the authors). The theory needs them positive.
        normalise_weights: divide each completion's weights by their mean (ours, not the authors').

    Returns:
        `losses` [P]; rewards in the metrics are unweighted, "weighted/margins" is the margin that is trained.
    """
    f = token_weights(token_rewards, segments, alpha=alpha, clamp_min=weight_clamp_min, normalise=normalise_weights)
    # L = -log σ(beta * (sum_t f_w d_w - sum_t f_l d_l)), d = log policy - log reference
    core = token_weighted_loss(logps, f, segments, ref_logps=ref_logps, scale=beta, margin="weighted")
    metrics = pair_metrics(core.rewards, logps, segments)
    metrics |= weight_metrics(f, segments)
    metrics["weighted/margins"] = core.margin
    metrics["loss/base"] = core.base
    if bool((metrics["weights/nonpositive"] > 0).any()):
        warnings.warn(
            # Always the same words: Python shows each text once.
            "tgdpo: some token weights are not positive (the log has weights/min), so these tokens are pushed the "
            "wrong way; lower alpha, set weight_clamp_min, or scale the token rewards",
            stacklevel=2,
        )
    return LossOutput(core.losses, metrics)


# ----------------------------------------------------------------------------------------------------
# TGDPO's credit: how much a preference-trained guide raises each token over the reference.


def guide_token_rewards(guide_logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """r_t = beta * (log guide_t - log reference_t), `[N] -> [N]`, detached (arXiv 2506.14574, 2404.12358).

    With a guide trained by DPO with this beta it is DPO's implicit token reward. A SimPO-trained guide goes
    through the same formula.
    """
    return (beta * (guide_logps - ref_logps)).detach()


@credit("guide", values="signed")
class GuideLogRatio:
    """Credit from a guide trained with DPO or SimPO, against the reference it started from.

    Args:
        model: the guide: a model, or anything called like a `Reference`. Same tokenizer as the policy.
        reference: the frozen starting point of the guide, a `Reference` or a model.
        beta: reward per nat. The paper's theory means the beta the guide was trained with; the authors' code
            uses the beta of the run that is guided.
    """

    name = "guide"

    def __init__(self, *, model: Any, reference: Any, beta: Positive = 0.1) -> None:
        self.model, self.reference, self.beta = model, reference, float(beta)

    def __call__(self, batch: TokenBatch) -> Tensor:
        guide, reference = scorer_logps(self.model, batch), scorer_logps(self.reference, batch)
        return checked_credit(guide_token_rewards(guide, reference, self.beta), batch, self.name)

    def fingerprint(self) -> str:
        models = [scorer_fingerprint(self.model), scorer_fingerprint(self.reference)]
        return fingerprint([self.name, self.beta, *models])
