"""TDPO: Token-level Direct Preference Optimization (arXiv 2404.11999), variants TDPO1 and TDPO2."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from tokengrain.batch import Segments, TokenBatch
from tokengrain.errors import fingerprint
from tokengrain.loss import LossOutput
from tokengrain.method import Card, checked_credit, credit, objective
from tokengrain.methods._pairs import completion_lengths, log_ratios, margin_loss, pair_difference, pair_metrics
from tokengrain.scoring.reference import scorer_fingerprint
from tokengrain.settings import NonNegative, Positive, check_choice

TDPO1 = Card(
    "tdpo1",
    "TDPO1",
    "DPO minus the KL difference",
    "Token-level Direct Preference Optimization",
    "2404.11999",
    "ICML 2024",
    credit="forward KL per token, whole vocabulary",
    page="tdpo",
)
TDPO2 = replace(TDPO1, name="tdpo2", title="TDPO2", idea="holds back the rejected side's KL", objective="tdpo2")

Variant = Literal["tdpo1", "tdpo2"]


_OWN_CREDIT = "its credit is the KL divergence that it measures itself"


@objective("tdpo1", fixed={"variant": "tdpo1"}, roles=(), no_credit=_OWN_CREDIT)
@objective("tdpo2", fixed={"variant": "tdpo2"}, roles=(), no_credit=_OWN_CREDIT)
@objective("tdpo", roles=(), no_credit=_OWN_CREDIT)
def tdpo_loss(
    logps: Tensor,
    segments: Segments,
    *,
    ref_logps: Tensor,
    kl: Tensor,
    beta: Positive = 0.1,
    alpha: NonNegative = 0.5,
    variant: Variant = "tdpo2",
    average_log_prob: bool = False,
) -> LossOutput:
    """TDPO on preference pairs.

    Args:
        logps: log-probabilities under the policy `[N]`, nats.
        segments: cuts `[N]` into 2P completions: chosen, rejected, chosen, ...
        ref_logps: the same under the frozen reference `[N]`.
        kl: forward KL(reference || policy) over the full vocabulary in the state before each token `[N]`,
            nats, with gradient to the policy.
        beta: strength of the tie to the reference.
        alpha: weight of the difference of sequential KLs in TDPO2; TDPO1 has none (it is 1 there).
        variant: "tdpo2" (KL of the chosen side without gradient) or "tdpo1".
        average_log_prob: divide log-ratio and KL of each completion by its length. The authors' helper has
            this switch; their training never uses it.

    Returns:
        `losses` [P]; rewards in the metrics are beta * (log-ratio + sequential KL) in both variants.
    """
    check_choice("variant", variant, Variant)
    M = segments.sum(log_ratios(logps, ref_logps))  # sequence log-ratio
    K = segments.sum(kl)  # sequential KL(ref || policy)
    if average_log_prob:
        M, K = M / completion_lengths(segments, M), K / completion_lengths(segments, K)
    K_chosen, K_rejected = segments.pairs(K)
    u = pair_difference(M, segments)
    tdpo1 = K_rejected - K_chosen  # δ of the paper
    tdpo2 = alpha * (K_rejected - K_chosen.detach())  # α δ₂, sg on the chosen side
    z = u - (tdpo1 if variant == "tdpo1" else tdpo2)
    losses = margin_loss(beta * z)
    metrics = pair_metrics(beta * (M + K), logps, segments)
    metrics["logratios/chosen"], metrics["logratios/rejected"] = segments.pairs(M.detach())
    metrics["kl/chosen"], metrics["kl/rejected"] = K_chosen.detach(), K_rejected.detach()
    metrics["kl/gap"] = (K_rejected - K_chosen).detach()
    return LossOutput(losses, metrics)


def tdpo_token_rewards(logps: Tensor, ref_logps: Tensor, kl: Tensor, beta: float = 0.1) -> Tensor:
    """TDPO's own token credit a_t = beta * (log p_t - log q_t + KL_t), `[N]`, detached.

    It is the advantage of the token in its state; its mean over tokens drawn from the reference is 0.
    """
    return (beta * (logps - ref_logps + kl)).detach()


# ----------------------------------------------------------------------------------------------------
# TDPO's credit: the advantage of every token in a model that was trained with TDPO (arXiv 2404.11999).


@credit("tdpo", values="signed")
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
        from tokengrain.scoring.fused import head_quantities
        from tokengrain.scoring.model import evaluating
        from tokengrain.scoring.score import score

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
