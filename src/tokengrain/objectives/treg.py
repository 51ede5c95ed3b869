"""T-REG: token-level reward regularisation (arXiv 2412.02685), on DPO and on SimPO."""

from __future__ import annotations

from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.callables import NonNegative, Number, Positive
from tokengrain.objectives.output import LossOutput
from tokengrain.objectives.pairwise import completion_lengths, pair_metrics
from tokengrain.objectives.simpo import simpo_gamma
from tokengrain.objectives.token_weighted import (
    SequenceWeight,
    TokenWeighted,
    token_weighted_loss,
    token_weights,
)


def treg_loss(
    logps: Tensor,
    segments: Segments,
    *,
    ref_logps: Tensor,
    token_rewards: Tensor,
    beta: Positive = 0.1,
    alpha: NonNegative = 0.25,
    sequence_weight: NonNegative | SequenceWeight = "dynamic",
) -> LossOutput:
    """DPO plus a regulariser that raises tokens with r > 0 and lowers those with r < 0, on both sides.

    L = -log σ(ρ_w - ρ_l) + alpha * w * (R_w + R_l),  R = -beta * sum_t r_t log p_t,  w = sg(σ(ρ_l - ρ_w))

    Args:
        logps: log-probabilities under the policy `[N]`, nats.
        segments: cuts `[N]` into 2P completions: chosen, rejected, chosen, ...
        ref_logps: the same under the frozen reference `[N]`.
        token_rewards: r `[N]`; the paper's lie in [-0.5, 0.5]: `credit.ContrastivePrompting`.
        beta: strength of the tie to the reference.
        alpha: strength of the regulariser; 0 is DPO.
        sequence_weight: "dynamic" (the paper) or a constant w.

    Returns:
        `losses` [P]. They contain raw log-probabilities: they may be negative and rise while training goes
        well. Judge by "loss/base" and the rewards in the metrics.
    """
    f = token_weights(token_rewards, segments, alpha=alpha)
    core = token_weighted_loss(
        logps,
        f,
        segments,
        ref_logps=ref_logps,
        scale=beta,
        margin="unweighted",
        sequence_weight=sequence_weight,
    )
    R = -beta * segments.sum(token_rewards.detach() * logps.detach())
    return LossOutput(core.losses, _metrics(core, R, token_rewards, logps, segments))


def treg_simpo_loss(
    logps: Tensor,
    segments: Segments,
    *,
    token_rewards: Tensor,
    beta: Positive = 2.0,
    gamma_beta_ratio: Number | None = None,
    gamma: Number | None = None,
    alpha: NonNegative = 0.25,
    sequence_weight: NonNegative | SequenceWeight = "dynamic",
    margin_in_sequence_weight: bool = True,
) -> LossOutput:
    """SimPO plus the same regulariser, with SimPO's implicit token reward (beta / length) * log p.

    The paper reports results for it without writing it out; this is the derivation by the same steps:
    R = -(beta / length) * sum_t r_t log p_t,  w = sg(σ(gamma - (ρ_w - ρ_l))).

    Args:
        logps, segments, token_rewards, alpha, sequence_weight: as in `treg_loss`; no reference.
        beta, gamma_beta_ratio, gamma: as in `simpo_loss`.
        margin_in_sequence_weight: whether w contains gamma, as SimPO's gradient does.
    """
    f = token_weights(token_rewards, segments, alpha=alpha)
    scale = beta / completion_lengths(segments, logps)
    core = token_weighted_loss(
        logps,
        f,
        segments,
        ref_logps=None,
        scale=scale,
        margin="unweighted",
        gamma=simpo_gamma(beta, gamma_beta_ratio, gamma),
        sequence_weight=sequence_weight,
        gamma_in_sequence_weight=margin_in_sequence_weight,
    )
    R = -scale * segments.sum(token_rewards.detach() * logps.detach())
    return LossOutput(core.losses, _metrics(core, R, token_rewards, logps, segments))


def _metrics(
    core: TokenWeighted, R: Tensor, token_rewards: Tensor, logps: Tensor, segments: Segments
) -> dict[str, Tensor]:
    r = token_rewards.detach()
    metrics = pair_metrics(core.rewards, logps, segments)
    metrics["loss/base"] = core.base
    metrics["loss/regulariser"] = core.losses.detach() - core.base
    metrics["regulariser/chosen"], metrics["regulariser/rejected"] = segments.pairs(R)
    metrics["sequence_weights"] = core.sequence_weights
    metrics["credit/abs_chosen"], metrics["credit/abs_rejected"] = segments.pairs(segments.mean(r.abs()))
    positive = segments.mean((r > 0).to(r.dtype))
    metrics["credit/positive_chosen"], metrics["credit/positive_rejected"] = segments.pairs(positive)
    return metrics
