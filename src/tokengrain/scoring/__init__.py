"""Scoring: `(model, TokenBatch)` to per-token quantities. The hot path of every method.

`score` gives log-probabilities, entropies, hidden states and full-vocabulary KL to a reference, flat over the
counted tokens. Prompts are computed once for all their completions where the model can do it, the head is
projected for completion tokens only, and `[tokens, vocabulary]` never exists for more than a chunk.
"""

from tokengrain.scoring.forward import ModelPlan
from tokengrain.scoring.fused import head_quantities
from tokengrain.scoring.head import Distribution, Head, reference_head_quantities
from tokengrain.scoring.install import causal_lm, prepare
from tokengrain.scoring.layouts import Layout
from tokengrain.scoring.reference import (
    AdapterOffReference,
    ColumnReference,
    FrozenReference,
    Reference,
    ReferenceScores,
)
from tokengrain.scoring.score import Scores, Want, distribution_of, head_of, score

__all__ = [
    "AdapterOffReference",
    "ColumnReference",
    "Distribution",
    "FrozenReference",
    "Head",
    "Layout",
    "ModelPlan",
    "Reference",
    "ReferenceScores",
    "Scores",
    "Want",
    "causal_lm",
    "distribution_of",
    "head_of",
    "head_quantities",
    "prepare",
    "reference_head_quantities",
    "score",
]
