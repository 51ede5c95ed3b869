from __future__ import annotations

from typing import Any

import torch

from tests.vectors.layout import Pairs, from_logits, logits_and_labels, pair_results
from tests.vectors.runner import Case, adapter
from tokengrain.methods.tdpo import tdpo_loss


@adapter("tdpo", "tdpo_from_logits")
def logits(case: Case) -> dict[str, Any]:
    pairs = Pairs.of(case)
    policy, labels = logits_and_labels(case, "policy", pairs)
    reference, _ = logits_and_labels(case, "ref", pairs)
    scores = from_logits(policy, labels, ("logps", "kl"), reference)
    ref_logps = from_logits(reference, labels, ("logps",))["logps"]
    return _results(case, pairs, scores["logps"], ref_logps, scores["kl"]) | {
        **pairs.by_side("{}_per_token_kl", scores["kl"]),
        **pairs.by_side("{}_per_token_logps", scores["logps"]),
        **pairs.by_side("{}_ref_per_token_logps", ref_logps),
    }


@adapter("tdpo", "tdpo_from_sequence_stats")
def sequence_stats(case: Case) -> dict[str, Any]:
    """A completion of one token whose log-ratio and KL are those of the sequence."""
    count = len(case.inputs["chosen_logratio"])
    pairs = Pairs(torch.ones(count, 1, dtype=torch.bool), torch.ones(count, 1, dtype=torch.bool))
    M, K = (
        pairs.flat(case.inputs[f"chosen_{name}"][:, None], case.inputs[f"rejected_{name}"][:, None])
        for name in ("logratio", "seq_kl")
    )
    return _results(case, pairs, M, torch.zeros_like(M), K)


def _results(
    case: Case, pairs: Pairs, logps: torch.Tensor, ref_logps: torch.Tensor, kl: torch.Tensor
) -> dict[str, Any]:
    settings = case.settings("beta", "alpha", "variant", "average_log_prob")
    output = tdpo_loss(logps, pairs.segments, ref_logps=ref_logps, kl=kl, **settings)
    results = pair_results(output, pairs)
    if settings.get("average_log_prob"):  # the authors' helper then averages these as well
        means = pairs.segments.pairs(pairs.segments.mean(logps))
        results |= {"chosen_logps": means[0], "rejected_logps": means[1]}
    for side in ("chosen", "rejected"):
        results[f"{side}_logratio"] = output.metrics[f"logratios/{side}"]
        results[f"{side}_seq_kl"] = output.metrics[f"kl/{side}"]
    return results
