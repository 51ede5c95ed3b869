"""Objectives: how token credit becomes a loss. Pure functions of flat tensors, one file per method.

output = dpo_loss(logps, batch.segments, ref_logps=ref_logps, beta=0.1)
loss = make_normaliser("mean")(output, Counts.of(batch.segments, pairs=True))
"""

from tokengrain.objectives.aligndistil import Strength, aligndistil_loss, teacher_strength
from tokengrain.objectives.dpo import dpo_loss
from tokengrain.objectives.normalise import NORMALISERS, Counts, Normaliser, make_normaliser
from tokengrain.objectives.output import LossOutput
from tokengrain.objectives.ppo import ppo_policy_loss, value_loss
from tokengrain.objectives.qrm import pooled_scores, qrm_loss
from tokengrain.objectives.registry import OBJECTIVES, BoundObjective, Objective, make_objective
from tokengrain.objectives.reinforce import reinforce_loss
from tokengrain.objectives.rrpo import rrpo_loss, rrpo_reads, span_rewards
from tokengrain.objectives.selection import select_tokens, select_where, span_ids
from tokengrain.objectives.sepo import sepo_loss, sepo_reads
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
    "Strength",
    "aligndistil_loss",
    "dpo_loss",
    "make_normaliser",
    "make_objective",
    "pooled_scores",
    "ppo_policy_loss",
    "qrm_loss",
    "reinforce_loss",
    "rrpo_loss",
    "rrpo_reads",
    "select_tokens",
    "select_where",
    "sepo_loss",
    "sepo_reads",
    "sft_loss",
    "simpo_loss",
    "span_ids",
    "span_rewards",
    "tdpo_loss",
    "tdpo_token_rewards",
    "teacher_strength",
    "tgdpo_loss",
    "token_weighted_loss",
    "token_weights",
    "treg_loss",
    "treg_simpo_loss",
    "value_loss",
]
