from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.vectors.layout import Pairs, from_logits, logits_and_labels, pair_results
from tests.vectors.runner import Case, adapter
from tokengrain.loss import token_weights
from tokengrain.methods.tgdpo import guide_rewards, tgdpo_loss


def _results(case: Case, pairs: Pairs, logps: Tensor, ref_logps: Tensor, guide: Tensor | None) -> dict[str, Any]:
    settings = case.settings("beta", "alpha", "reward_beta", "weight_clamp_min")
    reward_beta = settings.pop("reward_beta", settings["beta"])
    rewards = pairs.take(case, "{}_token_rewards") if guide is None else guide_rewards(guide, ref_logps, reward_beta)
    segments = pairs.segments
    output = tgdpo_loss(logps, segments, ref_logps=ref_logps, token_rewards=rewards, **settings)
    weights = token_weights(rewards, segments, alpha=settings["alpha"], clamp_min=settings.get("weight_clamp_min"))
    return pair_results(output, pairs) | {
        "margin": output.metrics["weighted/margins"],
        **pairs.by_side("{}_token_rewards", rewards),
        **pairs.by_side("{}_token_weights", weights),
    }


@adapter("tgdpo", "tgdpo_loss")
def token_logps(case: Case) -> dict[str, Any]:
    pairs = Pairs.of(case)
    guided = "reward_chosen_per_token_logps" in case.inputs
    guide = pairs.take(case, "reward_{}_per_token_logps") if guided else None
    logps, ref = (pairs.take(case, f"{model}_{{}}_per_token_logps") for model in ("policy", "ref"))
    return _results(case, pairs, logps, ref, guide)


@adapter("tgdpo", "tgdpo_from_logits")
def logits(case: Case) -> dict[str, Any]:
    pairs = Pairs.of(case)
    logps, ref, guide = (
        from_logits(*logits_and_labels(case, model, pairs), ("logps",))["logps"]
        for model in ("policy", "ref", "reward")
    )
    return _results(case, pairs, logps, ref, guide)
