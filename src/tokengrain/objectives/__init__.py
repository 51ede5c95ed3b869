"""Objectives: how token credit becomes a loss. Pure functions of flat tensors, one file per method.

output = dpo_loss(logps, batch.segments, ref_logps=ref_logps, beta=0.1)
loss = make_normaliser("mean")(output, Counts.of(batch.segments, pairs=True))
"""

from tokengrain.objectives.dpo import dpo_loss
from tokengrain.objectives.normalise import NORMALISERS, Counts, Normaliser, make_normaliser
from tokengrain.objectives.output import LossOutput
from tokengrain.objectives.registry import OBJECTIVES, BoundObjective, Objective, make_objective
from tokengrain.objectives.sft import sft_loss
from tokengrain.objectives.simpo import simpo_loss
from tokengrain.objectives.tdpo import tdpo_loss, tdpo_token_rewards
from tokengrain.objectives.tgdpo import tgdpo_loss
from tokengrain.objectives.token_weighted import token_weighted_loss, token_weights
from tokengrain.objectives.treg import treg_loss, treg_simpo_loss

__all__ = [
    "NORMALISERS",
    "OBJECTIVES",
    "BoundObjective",
    "Counts",
    "LossOutput",
    "Normaliser",
    "Objective",
    "dpo_loss",
    "make_normaliser",
    "make_objective",
    "sft_loss",
    "simpo_loss",
    "tdpo_loss",
    "tdpo_token_rewards",
    "tgdpo_loss",
    "token_weighted_loss",
    "token_weights",
    "treg_loss",
    "treg_simpo_loss",
]
