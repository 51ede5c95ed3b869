from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.vectors.layout import Pairs, from_logits, logits_and_labels, pair_results
from tests.vectors.runner import Case, adapter
from tokengrain.methods.dpo import dpo_loss

# The vectors are from the DPO authors' code, where "ipo" is on summed log-ratios.
LOSS_TYPES = {"ipo": "ipo_sum", "ipo_norm": "ipo"}


def _results(case: Case, pairs: Pairs, logps: Tensor, ref_logps: Tensor | None) -> dict[str, Any]:
    settings = case.settings("beta", "label_smoothing", "reference_free", "loss_type", "ld_alpha", "sft_weight")
    if "loss_type" in settings:
        settings["loss_type"] = LOSS_TYPES.get(settings["loss_type"], settings["loss_type"])
    output = dpo_loss(logps, pairs.segments, ref_logps=ref_logps, **settings)
    means = pairs.segments.pairs(pairs.segments.mean(logps))
    return pair_results(output, pairs) | {
        "chosen_mean_logps": means[0],
        "rejected_mean_logps": means[1],
        **pairs.by_side("{}_per_token_logps", logps),
    }


@adapter("dpo", "dpo_loss")
def token_logps(case: Case) -> dict[str, Any]:
    pairs = Pairs.of(case)
    logps = pairs.take(case, "policy_{}_per_token_logps")
    ref = pairs.take(case, "ref_{}_per_token_logps") if "ref_chosen_per_token_logps" in case.inputs else None
    return _results(case, pairs, logps, ref)


@adapter("dpo", "dpo_from_logits")
def logits(case: Case) -> dict[str, Any]:
    pairs = Pairs.of(case)
    logps = from_logits(*logits_and_labels(case, "policy", pairs), ("logps",))["logps"]
    ref = from_logits(*logits_and_labels(case, "ref", pairs), ("logps",))["logps"]
    sums = pairs.segments.pairs(pairs.segments.sum(ref))
    return _results(case, pairs, logps, ref) | {"ref_chosen_logps": sums[0], "ref_rejected_logps": sums[1]}
