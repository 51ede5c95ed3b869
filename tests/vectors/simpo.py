from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.vectors.layout import Pairs, from_logits, logits_and_labels, pair_results
from tests.vectors.runner import Case, adapter
from tokengrain.loss import make_normaliser
from tokengrain.methods.dpo import sft_loss
from tokengrain.methods.simpo import simpo_loss


def simpo_settings(case: Case, *more: str) -> dict[str, Any]:
    """The files give gamma and its ratio to beta at once; the library takes one of them."""
    settings = case.settings("beta", "gamma", "gamma_beta_ratio", *more)
    if settings.get("gamma") is not None:
        settings.pop("gamma_beta_ratio", None)
    return settings


def _results(case: Case, pairs: Pairs, logps: Tensor) -> dict[str, Any]:
    settings = simpo_settings(case, "label_smoothing", "loss_type", "sft_weight")
    segments = pairs.segments
    output = simpo_loss(logps, segments, **settings)
    means = segments.pairs(segments.mean(logps))
    return pair_results(output, pairs) | {
        "sft_loss": _chosen_cross_entropy(pairs, logps),
        "chosen_mean_logps": means[0],
        "rejected_mean_logps": means[1],
        **pairs.by_side("{}_per_token_logps", logps),
    }


def _chosen_cross_entropy(pairs: Pairs, logps: Tensor) -> Tensor:
    chosen = Pairs(pairs.chosen_mask, pairs.chosen_mask[:, :0])
    output = sft_loss(logps[pairs.segments.is_chosen], chosen.segments)
    return make_normaliser("mean")(output, chosen.counts)


@adapter("simpo", "simpo_loss")
def token_logps(case: Case) -> dict[str, Any]:
    pairs = Pairs.of(case)
    return _results(case, pairs, pairs.take(case, "policy_{}_per_token_logps"))


@adapter("simpo", "simpo_from_logits")
def logits(case: Case) -> dict[str, Any]:
    pairs = Pairs.of(case)
    return _results(case, pairs, from_logits(*logits_and_labels(case, "policy", pairs), ("logps",))["logps"])
