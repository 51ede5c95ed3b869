from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.vectors.layout import Pairs, from_logits, pair_results
from tests.vectors.runner import Case, adapter
from tokengrain.data.marking import diff_spans, parse_span_tags
from tokengrain.methods.dpo import dpo_loss
from tokengrain.methods.rrpo import rrpo_loss, span_rewards

SIDES = ("chosen", "rejected")


@adapter("rrpo", "rrpo_loss")
def logits(case: Case) -> dict[str, Any]:
    spans = tuple(case.inputs[f"{side}_spans"] for side in SIDES)
    return _results(case, *spans, **case.settings("alpha", "beta"))


@adapter("rrpo", "span_diff_then_rrpo_loss")
def diff_then_loss(case: Case) -> dict[str, Any]:
    """Spans of the response tokens alone, then the loss."""
    settings = case.settings("alpha", "beta", "min_match_size", "keep_one_sided", "autojunk")
    hyper = {name: settings.pop(name) for name in ("alpha", "beta")}
    spans = {side: torch.zeros_like(case.inputs[f"{side}_ids"]) for side in SIDES}
    for row in range(len(spans["chosen"])):
        masks = [case.inputs[f"{side}_mask"][row].bool() for side in SIDES]
        ids = [case.inputs[f"{side}_ids"][row][mask].tolist() for side, mask in zip(SIDES, masks, strict=True)]
        for side, mask, marked in zip(SIDES, masks, diff_spans(*ids, **settings), strict=True):
            spans[side][row, mask] = torch.tensor(marked)
    found = {f"{side}_spans": spans[side] for side in SIDES}
    return _results(case, *spans.values(), **hyper) | found


@adapter("rrpo", "span_diff")
def diff(case: Case) -> dict[str, Any]:
    settings = case.settings("min_match_size", "keep_one_sided", "autojunk")
    chosen, rejected = diff_spans(*(case.inputs[f"{side}_ids"].tolist() for side in SIDES), **settings)
    return {"chosen_spans": chosen, "rejected_spans": rejected}


@adapter("rrpo", "parse_span_tags")
def tags(case: Case) -> dict[str, Any]:
    ids, spans = parse_span_tags(case.inputs["ids"].tolist(), **case.settings("space_id", "open_id", "close_id"))
    return {"ids": ids, "spans": spans}


def _results(case: Case, chosen_spans: Tensor, rejected_spans: Tensor, *, alpha: float, beta: float) -> dict[str, Any]:
    """Position t of the logits scores ids, mask and spans at t + 1."""
    pairs = Pairs(*(case.inputs[f"{side}_mask"][:, 1:].bool() for side in SIDES))
    labels = pairs.flat(*(case.inputs[f"{side}_ids"][:, 1:] for side in SIDES))
    policy, reference = (
        pairs.flat(*(case.inputs[f"{model}_{side}_logits"][:, :-1] for side in SIDES)) for model in ("policy", "ref")
    )
    spans = pairs.flat(chosen_spans[:, 1:], rejected_spans[:, 1:])
    scores = from_logits(policy, labels, ("logps", "kl"), reference)
    logps, kl = scores["logps"], scores["kl"]
    ref_logps = from_logits(reference, labels, ("logps",))["logps"]
    segments = pairs.segments
    output = rrpo_loss(logps, segments, ref_logps=ref_logps, kl=kl, spans=spans, beta=beta, alpha=alpha)
    results = pair_results(output, pairs) | {
        "chosen_reward": output.metrics["rewards/chosen"],
        "rejected_reward": output.metrics["rewards/rejected"],
        "chosen_token_kl": pairs.padded(kl)[0],
        "dpo_per_example": dpo_loss(logps, segments, ref_logps=ref_logps, beta=beta).losses,
    }
    margins = span_rewards(logps, segments, ref_logps=ref_logps, spans=spans, beta=1.0)
    for side, values in (("logps_sum", logps), ("token_kl_sum", kl)):
        results |= _by_side(side, segments.pairs(segments.sum(values)))
    results |= _by_side("span_margins", segments.pairs(margins))
    for side in SIDES:  # the files have a column for every span of that side alone
        width = len(case.expected.get(f"{side}_span_margins", [[]])[0])
        results[f"{side}_span_margins"] = results[f"{side}_span_margins"][:, :width]
    return results


def _by_side(name: str, values: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return dict(zip((f"{side}_{name}" for side in SIDES), values, strict=True))
