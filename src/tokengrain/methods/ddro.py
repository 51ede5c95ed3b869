"""DDRO: Direct Document Relevance Optimization for generative retrieval (arXiv 2504.05181, equations 4 to 6).

A document is generated as its docid d, a sequence of tokens; d+ is relevant for the query q, d- is not.

    r(q, d) = β Σ_t (log π(d_t | d_<t, q) - log ref(d_t | d_<t, q))
    L = -log σ(r(q, d+) - r(q, d-)) + λ · mean over the tokens of d+ of -log π

The first term is DPO's on the sums over docids, never their means. λ = 0 in the paper. Without that term
log-probabilities of d+ may fall together with those of d-, into sequences that are no docids; search among docids
hides it, as it generates nothing else. Where d+ and d- begin alike their gradients cancel.
"""

from __future__ import annotations

from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.loss import LossOutput
from tokengrain.method import Card, objective
from tokengrain.methods.dpo import dpo_loss
from tokengrain.settings import NonNegative, Positive

CARD = Card(
    "ddro",
    "DDRO",
    "relevant docids over others",
    "Lightweight and Direct Document Relevance Optimization for Generative Information Retrieval",
    "2504.05181",
    "SIGIR 2025",
    trains="encoder-decoder, offline pairs of docids",
)


@objective("ddro")
def ddro_loss(
    logps: Tensor, segments: Segments, *, ref_logps: Tensor, beta: Positive = 0.4, nll_weight: NonNegative = 0.0
) -> LossOutput:
    """DDRO on pairs of docids: the relevant one first.

    Args:
        logps, ref_logps: of the docids' tokens under policy and frozen reference `[N]`, the end token included
            where a docid has one.
        beta: strength of the tie to the reference; in the paper 0.4 does best, 0.2 is unstable.
        nll_weight: λ, of an added cross-entropy on the relevant docids' tokens (not in the paper).

    Returns:
        `losses` [P]; rewards in the metrics are r(q, d).
    """
    return dpo_loss(logps, segments, ref_logps=ref_logps, beta=beta, sft_weight=nll_weight)
