"""Supervised fine-tuning: cross-entropy on completions."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.callables import check_choice
from tokengrain.objectives.output import LossOutput

Per = Literal["token", "sequence"]


def sft_loss(logps: Tensor, segments: Segments, *, per: Per = "token") -> LossOutput:
    """Cross-entropy, for any number of completions per prompt.

    Args:
        logps: log-probabilities under the policy `[N]`, nats.
        segments: cuts `[N]` into C completions.
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
