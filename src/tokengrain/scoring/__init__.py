"""Scoring: `(model, TokenBatch)` to per-token quantities. The hot path of every method.

`score` gives log-probabilities, entropies, hidden states, full-vocabulary KL to a reference or a teacher, a reward
model's token scores and a critic's values, flat over the counted tokens. Prompts are computed once for all their
completions where the model can do it, the head is projected for completion tokens only, and `[tokens, vocabulary]`
never exists for more than a chunk.
"""

from tokengrain.scoring.forward import ModelPlan
from tokengrain.scoring.fused import head_quantities
from tokengrain.scoring.head import Distribution, Head, reference_head_quantities
from tokengrain.scoring.install import causal_lm, prepare, scored_model
from tokengrain.scoring.layouts import Layout
from tokengrain.scoring.reference import (
    AdapterOffReference,
    AdapterReference,
    ColumnReference,
    FrozenReference,
    Reference,
    ReferenceScores,
)
from tokengrain.scoring.score import Scores, Want, distribution_of, head_of, score
from tokengrain.scoring.teacher import Teacher

__all__ = [
    "AdapterOffReference",
    "AdapterReference",
    "ColumnReference",
    "Distribution",
    "FrozenReference",
    "Head",
    "Layout",
    "ModelPlan",
    "Reference",
    "ReferenceScores",
    "Scores",
    "Teacher",
    "Want",
    "causal_lm",
    "distribution_of",
    "head_of",
    "head_quantities",
    "prepare",
    "reference_head_quantities",
    "score",
    "scored_model",
]
