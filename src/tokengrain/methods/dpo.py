"""DPO: Direct Preference Optimization (arXiv 2305.18290, equation 7), its common variants, and supervised fine-tuning.

L = -log σ(β (Σ_t d_t of chosen - Σ_t d_t of rejected)),    d_t = log π_t - log ref_t
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.loss import LossOutput
from tokengrain.method import Card, objective
from tokengrain.methods._pairs import (
    MarginLoss,
    chosen_token_losses,
    completion_lengths,
    log_ratios,
    margin_loss,
    pair_difference,
    pair_metrics,
)
from tokengrain.settings import NonNegative, Positive, Share, Smoothing, check_choice

CARD = Card(
    "dpo",
    "DPO",
    "preferred over rejected, near the reference",
    "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
    "2305.18290",
    "NeurIPS 2023",
)

DPOLoss = Literal["sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "ipo_sum"]


@objective("dpo")
def dpo_loss(
    logps: Tensor,
    segments: Segments,
    *,
    ref_logps: Tensor | None = None,
    beta: Positive = 0.1,
    loss_type: DPOLoss = "sigmoid",
    label_smoothing: Smoothing = 0.0,
    reference_free: bool = False,
    ld_alpha: Share | None = None,
    sft_weight: NonNegative = 0.0,
) -> LossOutput:
    """DPO and its variants on preference pairs.

    Args:
        ref_logps: log-probabilities under the frozen reference `[N]`; may be None only if `reference_free`.
        beta: strength of the tie to the reference.
        loss_type: "sigmoid" (the paper), "robust", "hinge", "sigmoid_norm" (each side's log-ratio divided by
            its length), "ipo" (arXiv 2310.12036, length-normalised, the form TRL and the IPO authors use)
            or "ipo_sum" (IPO on summed log-ratios, as in the DPO authors' code).
        label_smoothing: assumed share of swapped labels, in [0, 0.5); needs a sigmoid form.
        reference_free: treat the reference as constant; if `ref_logps` is given it is still used for the
            logged rewards, as in the authors' code.
        ld_alpha: weight of the tokens beyond the shorter length of the pair (length-desensitised DPO).
        sft_weight: weight of an added token-mean cross-entropy on the chosen completions.

    Returns:
        `losses` [P]; rewards in the metrics are beta * sum of log-ratios.
    """
    check_choice("loss_type", loss_type, DPOLoss)
    if ref_logps is None and not reference_free:
        raise ValueError("dpo_loss needs ref_logps unless reference_free=True")
    if label_smoothing and loss_type in ("ipo", "ipo_sum"):
        raise ValueError(f"loss_type {loss_type!r} has no label smoothing, got {label_smoothing}")
    d = logps if reference_free or ref_logps is None else log_ratios(logps, ref_logps)
    if ld_alpha is not None:
        shared = segments.broadcast(torch.minimum(*segments.pairs(segments.lengths)).repeat_interleave(2))
        d = d * torch.where(segments.positions < shared, 1.0, ld_alpha).to(d.dtype)
    s = segments.sum(d)  # sum over tokens, never a mean
    if loss_type in ("sigmoid_norm", "ipo"):
        s = s / completion_lengths(segments, s)
    h = pair_difference(s, segments)
    if loss_type == "ipo" or loss_type == "ipo_sum":
        losses = (h - 1 / (2 * beta)) ** 2
    else:
        form: MarginLoss = "sigmoid" if loss_type == "sigmoid_norm" else loss_type
        losses = margin_loss(beta * h, form, label_smoothing)  # "sigmoid": equation 7
    logged = logps if ref_logps is None else logps - ref_logps
    metrics = pair_metrics(beta * segments.sum(logged.detach()), logps, segments)
    return LossOutput(losses, metrics, chosen_token_losses(logps, segments, sft_weight))


Per = Literal["token", "sequence"]


@objective("sft", unit="completions", roles=(), no_credit="it learns from every token of its data")
def sft_loss(logps: Tensor, segments: Segments, *, per: Per = "token") -> LossOutput:
    """Supervised fine-tuning: cross-entropy, for any number of completions per prompt.

    Args:
        per: "token": mean over all tokens of the optimiser step. "sequence": the sum over each completion,
            mean over completions, which is what the DPO and TDPO authors train their starting models with.

    Returns:
        "token": `losses` [C] of zeros, all of the loss is in `token_losses` [N]. "sequence": `losses` [C].
    """
    check_choice("per", per, Per)
    nll = -segments.sum(logps)
    metrics = {"nll/completion": nll.detach(), "nll/token": -segments.mean(logps.detach())}
    if per == "sequence":
        return LossOutput(nll, metrics, unit="completions")
    zeros = nll.detach() * 0
    return LossOutput(zeros, metrics, token_losses=-logps, unit="completions", token_unit="tokens")
