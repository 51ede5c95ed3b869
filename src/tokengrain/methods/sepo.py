"""SePO: Selective Preference Optimization (arXiv 2408.13518): SimPO on a selection of tokens.

    L = -log σ(u_w - u_l - λ),    u = γ · mean of log π_t over the selected tokens of the completion

Selected are the tokens of chosen completions that an oracle, trained by DPO, scores highest, and those of rejected ones
that it scores lowest: credit `guide` in the role "selection", see recipes/sepo.yaml.
"""

from __future__ import annotations

from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.loss import LossOutput
from tokengrain.method import Card, objective
from tokengrain.methods.simpo import simpo_loss
from tokengrain.settings import NonNegative, Positive

CARD = Card(
    "sepo",
    "SePO",
    "trains only the telling tokens",
    "Selective Preference Optimization via Token-Level Reward Function Estimation",
    "2408.13518",
    "EMNLP 2025",
    trains="oracle, then policy, offline pairs",
    credit="log-ratio of a DPO-trained oracle; its best and worst tokens are selected",
)


def sepo_reads(segments: Segments, *, selected: Tensor) -> Tensor:
    """The tokens whose log-probabilities `sepo_loss` uses, bool `[N]`: the selected ones."""
    if selected.shape != (segments.total,):
        raise ValueError(f"selected has shape {tuple(selected.shape)}, expected ({segments.total},)")
    return selected > 0


@objective("sepo", reads=lambda segments, given, hyper: sepo_reads(segments, selected=given["selected"]))
def sepo_loss(
    logps: Tensor, segments: Segments, *, selected: Tensor, gamma: Positive = 2.1, margin: NonNegative = 0.0
) -> LossOutput:
    """Contrast the mean log-probabilities of selected tokens; no reference.

    Args:
        logps: `[N]`; those of tokens not selected are never used.
        selected: 1 on the tokens to train on, 0 elsewhere `[N]`; see `tokengrain.loss.select_tokens`.
        gamma: scale of the mean log-probability (SimPO's beta).
        margin: target margin, λ of the paper (SimPO's gamma).

    Returns:
        `losses` [P]; a pair with nothing selected on one side has loss 0 and stays in the count. Metrics: rewards are u
        and logps are sums, both over selected tokens; "selected/..." is their number.
    """
    keep = sepo_reads(segments, selected=selected)
    kept = segments.narrow(keep)
    output = simpo_loss(logps[keep], kept, beta=gamma, gamma=margin)
    output.metrics["selected/chosen"], output.metrics["selected/rejected"] = kept.pairs(kept.lengths.to(logps.dtype))
    return output
