from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.vectors.layout import Pairs, from_logits, pair_results
from tests.vectors.runner import Case, adapter
from tests.vectors.simpo import simpo_settings
from tokengrain.batch import Segments
from tokengrain.loss import LossOutput
from tokengrain.methods.treg import contrastive_token_rewards, treg_loss, treg_simpo_loss


@adapter("treg", "treg_dpo_loss")
def on_dpo(case: Case) -> dict[str, Any]:
    pairs = Pairs.of(case)
    logps, ref = (pairs.take(case, f"{model}_{{}}_per_token_logps") for model in ("policy", "ref"))
    rewards = _rewards(case, pairs)
    settings = case.settings("beta", "alpha", "sequence_weight")
    output = treg_loss(logps, pairs.segments, ref_logps=ref, token_rewards=rewards, **settings)
    return _results(output, pairs, rewards)


@adapter("treg", "treg_simpo_loss")
def on_simpo(case: Case) -> dict[str, Any]:
    pairs = Pairs.of(case)
    logps, rewards = pairs.take(case, "policy_{}_per_token_logps"), _rewards(case, pairs)
    settings = simpo_settings(case, "alpha", "sequence_weight", "margin_in_sequence_weight")
    output = treg_simpo_loss(logps, pairs.segments, token_rewards=rewards, **settings)
    return _results(output, pairs, rewards)


@adapter("treg", "contrastive_token_rewards")
def token_rewards(case: Case) -> dict[str, Any]:
    mask = case.inputs["mask"].bool()
    better, worse = (
        Segments.from_padded(case.inputs[f"{side}_per_token_logps"], mask)[0] for side in ("better", "worse")
    )
    out = torch.zeros_like(case.inputs["mask"])
    out[mask] = contrastive_token_rewards(better, worse)
    return {"token_rewards": out}


@adapter("treg", "contrastive_token_rewards_from_logits")
def token_rewards_from_logits(case: Case) -> dict[str, Any]:
    """The same completions behind instructions of different lengths."""
    logps = {}
    for side in ("better", "worse"):
        labels = case.inputs[f"{side}_labels"][:, 1:]
        logits, segments = Segments.from_padded(case.inputs[f"{side}_logits"][:, :-1], labels != -100)
        ids, _ = Segments.from_padded(labels, labels != -100)
        logps[side] = from_logits(logits, ids, ("logps",))["logps"]
    width = len(case.expected["token_rewards"][0])  # the files' arrays may be wider than the longest completion

    def aligned(flat: Tensor) -> Tensor:
        padded, _ = segments.to_padded(flat)
        return F.pad(padded, (0, width - padded.shape[1]))

    return {
        "response_ids": aligned(ids),
        "response_mask": aligned(torch.ones_like(ids)),
        "better_response_logps": aligned(logps["better"]),
        "worse_response_logps": aligned(logps["worse"]),
        "token_rewards": aligned(contrastive_token_rewards(logps["better"], logps["worse"])),
    }


def _rewards(case: Case, pairs: Pairs) -> Tensor:
    if "chosen_token_rewards" in case.inputs:
        return pairs.take(case, "{}_token_rewards")
    better, worse = (pairs.take(case, f"{side}_{{}}_per_token_logps") for side in ("better", "worse"))
    return contrastive_token_rewards(better, worse)


def _results(output: LossOutput, pairs: Pairs, rewards: Tensor) -> dict[str, Any]:
    return pair_results(output, pairs) | {
        "base_per_example": output.metrics["loss/base"],
        "sequence_weights": output.metrics["sequence_weights"],
        "reg_chosen": output.metrics["regulariser/chosen"],
        "reg_rejected": output.metrics["regulariser/rejected"],
        **pairs.by_side("{}_token_rewards", rewards),
    }
