"""TDPO: Token-level Direct Preference Optimization (arXiv 2404.11999), variants TDPO1 and TDPO2.

L  = -log σ(β (M_w - M_l - δ)),    M = Σ_t log π_t - log ref_t,    K = Σ_t KL(ref ‖ π) over the whole vocabulary
δ  = K_l - K_w                     TDPO1
δ  = α (K_l - sg(K_w))             TDPO2, sg: without gradient
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, cast

from torch import Tensor, nn

from tokengrain.batch import Segments, TokenBatch
from tokengrain.loss import LossOutput
from tokengrain.method import Card, credit, objective
from tokengrain.methods._pairs import completion_lengths, log_ratios, margin_loss, pair_difference, pair_metrics
from tokengrain.scoring.fused import head_quantities
from tokengrain.scoring.model import evaluating
from tokengrain.scoring.reference import FrozenReference
from tokengrain.scoring.score import score
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


@credit("tdpo", values="signed")
def tdpo(batch: TokenBatch, *, model: Any, reference: Any, beta: Positive = 0.1) -> Tensor:
    """a_t = β (log p - log q + KL(q‖p)): the advantage of each token under a trained model p, with its full KL (TDPO).

    The KL makes it an advantage: its mean over tokens drawn from the reference q is 0 in every state. It needs the
    reference's whole distribution: stored `ref_logps` are not enough.

    Args:
        model: trained with TDPO (any log-ratio policy works): a model, or anything called like a `Reference`.
        reference: the frozen starting point, a `Reference` or a model; a model stays frozen from now on.
        beta: reward per nat.
    """
    frozen_model = FrozenReference(reference) if isinstance(reference, nn.Module) else reference
    frozen = frozen_model(batch, {"logps", "distribution"})
    if isinstance(model, nn.Module):
        with evaluating(model):
            scores = score(model, batch, ("logps", "kl"), reference=frozen.distribution)
        logps, kl = cast(Tensor, scores.logps), cast(Tensor, scores.kl)
    else:
        own = model(batch, {"distribution"}).distribution
        labels = batch.labels.to(own.hidden.device)
        found = head_quantities(own.hidden, own.head, labels, ("logps", "kl"), frozen.distribution)
        logps, kl = found["logps"], found["kl"]
    return tdpo_token_rewards(logps, cast(Tensor, frozen.logps), kl, beta)


def tdpo_token_rewards(logps: Tensor, ref_logps: Tensor, kl: Tensor, beta: float = 0.1) -> Tensor:
    """a `[N]` from quantities `[N]`, detached."""
    return (beta * (logps - ref_logps + kl)).detach()


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
        kl: forward KL(reference || policy) over the full vocabulary in the state before each token `[N]`, nats, with
            gradient to the policy.
        beta: strength of the tie to the reference.
        alpha: weight of the difference of sequential KLs in TDPO2; TDPO1 has none (it is 1 there).
        variant: "tdpo2" (KL of the chosen side without gradient) or "tdpo1".
        average_log_prob: divide by the completion's length; in the authors' helper, never used by their training.

    Returns:
        `losses` [P]; rewards in the metrics are beta * (log-ratio + sequential KL) in both variants.
    """
    check_choice("variant", variant, Variant)
    M = segments.sum(log_ratios(logps, ref_logps))  # sequence log-ratio
    K = segments.sum(kl)  # sequential KL(ref || policy)
    if average_log_prob:
        M, K = M / completion_lengths(segments, M), K / completion_lengths(segments, K)
    K_chosen, K_rejected = segments.pairs(K)
    tdpo1 = K_rejected - K_chosen  # δ of the paper
    tdpo2 = alpha * (K_rejected - K_chosen.detach())  # α δ₂, sg on the chosen side
    z = pair_difference(M, segments) - (tdpo1 if variant == "tdpo1" else tdpo2)
    losses = margin_loss(beta * z)
    metrics = pair_metrics(beta * (M + K), logps, segments)
    metrics["logratios/chosen"], metrics["logratios/rejected"] = segments.pairs(M.detach())
    metrics["kl/chosen"], metrics["kl/rejected"] = K_chosen.detach(), K_rejected.detach()
    metrics["kl/gap"] = (K_rejected - K_chosen).detach()
    return LossOutput(losses, metrics)
