"""RRPO: Refined Regularized Preference Optimization (arXiv 2504.12083): span rewards and a token-wise KL.

L = -log σ(r_w - r_l) + α Σ_t KL(ref ‖ π) of the whole chosen completion
r = β Σ_t (log π_t - log ref_t) over the spans in which chosen and rejected differ
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokengrain.batch import Segments, TokenBatch, row_of
from tokengrain.errors import DataError, require
from tokengrain.loss import LossOutput
from tokengrain.method import Card, credit, objective
from tokengrain.methods._pairs import completion_lengths, log_ratios, margin_loss, pair_difference, pair_metrics
from tokengrain.settings import NonNegative, Positive

CARD = Card(
    "rrpo",
    "RRPO",
    "ranks only the spans that differ",
    "Self-alignment of Large Video Language Models with Refined Regularized Preference Optimization",
    "2504.12083",
    "NeurIPS 2025",
    credit="spans in which chosen and rejected differ",
)


@credit("spans", values="marks", column="spans")
def spans(batch: TokenBatch) -> Tensor:
    """+1 on the spans of chosen, -1 on those of rejected completions, else 0 (RRPO).

    Where the spans come from is a matter of the data (`TokenizeConfig.spans`, `data.spans` in a recipe). Raises
    `DataError` if they have none, or a prompt does not have two completions.
    """
    row, expected = row_of(batch, 0), "data.spans in the recipe: diff, tags, column or a function"
    given = {"row": row, "value": sorted(batch.columns), "expected": expected}
    require("spans" in batch.columns, DataError, "the data have no spans", **given)
    counts = f"{batch.n_completions} completions of {batch.n_prompts} prompts"
    given = {"row": row, "value": counts, "expected": "a chosen and a rejected completion for every prompt"}
    require(batch.is_pairs, DataError, "spans as credit need pairs", **given)
    inside = (batch.columns["spans"] > 0).float()
    return inside.where(batch.is_chosen, -inside)


@objective(
    "rrpo",
    reads=lambda segments, given, hyper: rrpo_reads(segments, spans=given["spans"], alpha=hyper["alpha"]),
    unless_zero={"kl": "alpha"},
)
def rrpo_loss(
    logps: Tensor,
    segments: Segments,
    *,
    ref_logps: Tensor,
    kl: Tensor | None = None,
    spans: Tensor,
    beta: Positive = 0.5,
    alpha: NonNegative = 0.05,
    average_kl: bool = False,
) -> LossOutput:
    """Rank the spans in which chosen and rejected differ; keep the whole chosen completion near the reference.

    Args:
        kl: forward KL(reference || policy) over the full vocabulary in the state before each token `[N]`, nats, with
            gradient to the policy. Only that of chosen tokens is trained. Not needed with alpha 0.
        spans: 0 on shared text, k > 0 on the k-th differing span `[N]`. The two sides need not have equally many; all
            span tokens add up.
        beta: reward per nat.
        alpha: weight of the KL, a sum over the chosen tokens, so that it grows with their number. With 0 and short
            spans the span tokens of both sides tend to fall: see "displacement" in the metrics.
        average_kl: divide the KL of each chosen completion by its length (ours, not the authors').

    Returns:
        `losses` [P]. Metrics: rewards are beta * log-ratio summed over span tokens; everything else is over the tokens
        that `rrpo_reads` names; "logratios/chosen" is the change of the chosen log-probability since the reference
        and "displacement" whether it fell. Without `kl` there are none of it.
    """
    if alpha and kl is None:
        raise ValueError(f"rrpo_loss: alpha = {alpha} needs kl, that to the reference over the whole vocabulary")
    read = rrpo_reads(segments, spans=spans, alpha=alpha)
    d = log_ratios(logps, ref_logps)
    # `where`, not a product: what stands at a token that is not read never matters.
    rewards = beta * segments.sum(torch.where(spans > 0, d, 0.0))  # r of every span, added up
    losses = margin_loss(pair_difference(rewards, segments))  # -log σ(u)
    moved = segments.pairs(segments.sum(torch.where(read, d, 0.0).detach()))[0]
    metrics = pair_metrics(rewards, torch.where(read, logps, 0.0), segments)
    metrics["logratios/chosen"], metrics["displacement"] = moved, (moved < 0).to(moved.dtype)
    if kl is not None:
        K_chosen, K_rejected = segments.pairs(segments.sum(torch.where(read, kl, 0.0)))
        metrics["kl/chosen"], metrics["kl/rejected"] = K_chosen.detach(), K_rejected.detach()
        tkl = K_chosen / completion_lengths(segments, K_chosen)[0::2] if average_kl else K_chosen
        if alpha:
            losses = losses + alpha * tkl  # the authors' code; the paper's display has the sign reversed
    inside = spans > 0
    numbered = torch.stack([segments.ids[inside], spans[inside].to(segments.ids.dtype)])
    counts = torch.bincount(torch.unique(numbered, dim=1)[0], minlength=len(segments))  # of distinct spans
    metrics["spans/chosen"], metrics["spans/rejected"] = segments.pairs(counts.to(d.dtype))
    return LossOutput(losses, metrics)


def rrpo_reads(segments: Segments, *, spans: Tensor, alpha: float) -> Tensor:
    """The tokens whose scores `rrpo_loss` uses, bool `[N]`: span tokens, and with a KL all chosen tokens."""
    return (spans > 0) | segments.is_chosen if alpha else spans > 0


def span_rewards(logps: Tensor, segments: Segments, *, ref_logps: Tensor, spans: Tensor, beta: float = 0.5) -> Tensor:
    """Reward of every span, beta * sum of its log-ratios: `[C, K]`, K the highest span number, detached.

    Column k - 1 is span k; 0 where a completion has no such span. A row adds up to the completion's reward.
    """
    d = log_ratios(logps.detach(), ref_logps)
    inside = spans > 0
    per_span = d.new_zeros((len(segments), int(spans.max()) if len(spans) else 0))
    at = (segments.ids[inside], spans[inside].long() - 1)
    return per_span.index_put(at, beta * d[inside], accumulate=True)
