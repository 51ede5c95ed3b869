from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.vectors.layout import Pairs, from_logits, pair_results
from tests.vectors.runner import Case, adapter
from tokengrain.batch import Segments
from tokengrain.loss import LossOutput, select_tokens, token_ranks
from tokengrain.methods.sepo import sepo_loss
from tokengrain.methods.tgdpo import guide_rewards

SIDES = ("chosen", "rejected")


@adapter("sepo", "sepo_loss")
def selected_logps(case: Case) -> dict[str, Any]:
    """All columns of the arrays are response tokens; a row without selected ones counts as an empty side."""
    every = Pairs(*(torch.ones_like(case.inputs[f"{side}_mask"]).bool() for side in SIDES))
    selected = every.flat(*(case.inputs[f"{side}_mask"] for side in SIDES))
    logps = every.flat(*(case.inputs[f"{side}_logps"] for side in SIDES))
    return _results(sepo_loss(logps, every.segments, selected=selected, **case.settings("gamma", "margin")), every)


@adapter("sepo", "token_scores")
def token_scores(case: Case) -> dict[str, Any]:
    mask = _responses(case.inputs["input_ids"], case.inputs["prompt_lens"], case.inputs["seq_lens"])
    scores, segments = _log_ratios(case, mask, "oracle_logits", "ref_logits", "input_ids")
    rows = segments.split(scores)
    return {"scores": rows, "scores_code": [row[1:] for row in rows]}  # the authors leave out the first token


@adapter("sepo", "select_tokens")
def selection(case: Case) -> dict[str, Any]:
    """Every row once as a chosen and once as a rejected completion."""
    shares = case.settings("k", "count_rule", "ties")["k"]
    rows = [torch.as_tensor(row, dtype=torch.float64) for row in case.inputs["scores"] for _ in SIDES]
    segments, values = Segments.from_lengths([len(row) for row in rows]), torch.cat(rows)
    out: dict[str, Any] = {"highest": {}, "lowest": {}}
    for k in shares:
        places = _in_order(values, segments, select_tokens(values, segments, chosen=k, rejected=k))
        out["highest"][str(k)], out["lowest"][str(k)] = places[0::2], places[1::2]
    return out


@adapter("sepo", "pipeline")
def pipeline(case: Case) -> dict[str, Any]:
    settings = case.settings("k_chosen", "k_rejected", "gamma", "margin", "score_first_token")
    shares = {side: settings.pop(f"k_{side}") for side in SIDES}
    first = settings.pop("score_first_token")
    pairs = Pairs(
        *(
            _responses(case.inputs[f"{side}_ids"], case.inputs["prompt_lens"], case.inputs[f"{side}_lens"])
            for side in SIDES
        )
    )
    labels = pairs.flat(*(case.inputs[f"{side}_ids"][:, 1:] for side in SIDES))
    logps = {}
    for model in ("oracle", "ref", "policy"):
        logits = pairs.flat(*(case.inputs[f"{side}_{model}_logits"][:, :-1] for side in SIDES))
        logps[model] = from_logits(logits, labels, ("logps",))["logps"]
    scores, segments = guide_rewards(logps["oracle"], logps["ref"], 1.0), pairs.segments
    selected = select_tokens(scores, segments, **shares, score_first_token=first)
    places = _in_order(scores, segments, selected)
    output = sepo_loss(logps["policy"], segments, selected=selected, **settings)
    return _results(output, pairs) | {"chosen_selected": places[0::2], "rejected_selected": places[1::2]}


def _results(output: LossOutput, pairs: Pairs) -> dict[str, Any]:
    rewards = {f"{side}_score": output.metrics[f"rewards/{side}"] for side in SIDES}
    return pair_results(output, pairs) | rewards


def _responses(ids: Tensor, prompts: Tensor, lengths: Tensor) -> Tensor:
    """Positions whose logits predict a response token, bool `[B, L - 1]`."""
    position = torch.arange(ids.shape[1] - 1)
    return (position >= prompts[:, None] - 1) & (position < lengths[:, None] - 1)


def _log_ratios(case: Case, mask: Tensor, oracle: str, reference: str, ids: str) -> tuple[Tensor, Segments]:
    labels, segments = Segments.from_padded(case.inputs[ids][:, 1:], mask)
    logps = []
    for model in (oracle, reference):
        logits, _ = Segments.from_padded(case.inputs[model][:, :-1], mask)
        logps.append(from_logits(logits, labels, ("logps",))["logps"])
    return guide_rewards(logps[0], logps[1], 1.0), segments


def _in_order(values: Tensor, segments: Segments, selected: Tensor) -> list[list[int]]:
    """Places of the selected tokens in each completion, best first."""
    places = []
    for ranks, chosen in zip(segments.split(token_ranks(values, segments)), segments.split(selected), strict=True):
        places.append([p for p in torch.argsort(ranks).tolist() if chosen[p]])
    return places
