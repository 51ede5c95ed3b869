from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.vectors.layout import from_logits
from tests.vectors.rows import Rows
from tests.vectors.runner import Case, adapter
from tokengrain.batch import Segments
from tokengrain.methods.dro import (
    R3,
    Reflection,
    Rule,
    filter_prompts,
    length_rewards,
    token_ranks,
    worst_ranks,
)
from tokengrain.methods.grpo import group_advantages, grpo_loss

RULES: dict[str, Rule] = {"threshold": "threshold", "top": "top", "top_fraction": "top", "fraction": "top"}
KINDS = {"grpo": ("mean", "mean"), "dr_grpo": ("constant", "mean"), "dapo": ("sum", "token_mean")}


@adapter("dro", "r3")
def reward(case: Case) -> dict[str, Any]:
    lp = case.inputs["ref_logprobs"]
    mask = case.inputs.get("ref_mask", torch.ones_like(lp[0])).bool()
    found = _r3(case.params, lp, mask, case.inputs.get("masked_ref_logprobs"))
    return {**_of_tokens(found, mask, len(lp)), **_advantages(found.rewards)}


@adapter("dro", "r3_from_logits")
def reward_from_logits(case: Case) -> dict[str, Any]:
    """Ties and rounding are as its parameters say: `rank_ties`, `rank_base`, `rho_count`."""
    p = {k: v for k, v in case.params.items() if k not in ("rho", "rank_base", "rank_ties", "rho_count")}
    logits, labels = case.inputs["logits"], case.inputs["ref_tokens"].long()
    rollouts, length, _ = logits.shape
    flat, repeated = logits.flatten(0, 1), labels.repeat(rollouts)
    logps = from_logits(flat, repeated, ("logps",))["logps"].view(rollouts, length)
    ranks, mask = token_ranks(flat, repeated), torch.ones(length, dtype=torch.bool)
    found = _r3(p, logps, mask, None)
    return {
        **_of_tokens(found, mask, rollouts),
        "ref_logprobs": logps,
        "rank": ranks.view(rollouts, length),
        "worst_rank_mean": worst_ranks(ranks, Segments.from_lengths([length] * rollouts), case.params["rho"]),
    }


@adapter("dro", "reward")
def with_length(case: Case) -> dict[str, Any]:
    p, x = case.settings("length_beta", "r3_weight", "length_weight", "std_ddof", "std_eps"), case.inputs
    length = length_rewards(x["answer_lengths"], x["reference_length"], slope=p["length_beta"])
    rewards = p["r3_weight"] * x["r3"] + p["length_weight"] * length
    group = torch.zeros(len(rewards), dtype=torch.long)
    return {
        "length_reward": length,
        "reward": rewards,
        "advantages": group_advantages(rewards, group, eps=p["std_eps"], ddof=p["std_ddof"]),
    }


@adapter("dro", "filter")
def both_filters(case: Case) -> dict[str, Any]:
    """Ties and rounding are as its parameters say: `rho_count`, `rank_base`, `drop_count`, `tie_break`."""
    p, lp = case.params, case.inputs["ref_logprobs"]
    prompts, rollouts, _ = lp.shape
    mask = case.inputs["ref_mask"].bool()[:, None, :].expand_as(lp).flatten(0, 1)
    logps, segments = Segments.from_padded(lp.flatten(0, 1), mask)
    ranks, _ = Segments.from_padded(case.inputs["ref_ranks"].flatten(0, 1), mask)
    group = torch.arange(prompts).repeat_interleave(rollouts)
    found = filter_prompts(
        logps,
        ranks,
        segments,
        group,
        rho=p["rho"],
        top_k=p["top_k"],
        drop=p["drop_fraction"],
        ddof=p["sigma_ddof"],
    )
    return {
        "worst_rank_mean": found.worst_rank.view(prompts, rollouts),
        "best_worst_rank": found.best,
        "keep_stage1": found.reachable,
        "max_sigma": found.spread,
        "order_stage2": found.order,
        "keep": found.keep,
    }


@adapter("dro", "grpo_loss")
def policy_loss(case: Case) -> dict[str, Any]:
    p, rows = dict(case.params), Rows.of(case)
    reduction, normaliser = KINDS[p["loss_type"]]
    given = rows.take(case, "logprobs", "ref_logprobs", "advantages")
    output = grpo_loss(
        given["logprobs"],
        rows.segments,
        old_logps=rows.old(case, "old_logprobs", given["logprobs"]),
        ref_logps=given.get("ref_logprobs"),
        advantages=given["advantages"],
        epsilon=p["eps_low"],
        epsilon_high=p["eps_high"],
        beta=p["kl_beta"],
        reduction=reduction,
        max_length=p["max_completion_length"] if reduction == "constant" else None,
    )
    return {"loss": rows.normalised(output, normaliser)}


def _r3(params: dict[str, Any], lp: Tensor, mask: Tensor, masked: Tensor | None) -> Reflection:
    p = dict(params)
    mode, ddof = p.pop("mode"), p.pop("sigma_ddof")
    chosen = {name: p.pop(name) for name in ("power", "threshold", "normalize")}
    rollouts = len(lp)
    whole = mask.expand_as(lp)
    logps, segments = Segments.from_padded(lp, whole)
    group = torch.zeros(rollouts, dtype=torch.long)
    baseline, settings = None, {}
    if mode == "baseline":
        assert masked is not None
        # One per rollout, or one that the group shares.
        baseline = masked[whole] if masked.dim() == 2 else masked[mask].repeat(rollouts)
    if mode == "propagation":
        rule = RULES[p.pop("reflective_rule")]
        settings = {"gamma": p.pop("gamma"), "span": p.pop("window"), "share": p.pop("reflective_value"), "rule": rule}
    if p or mode not in ("plain", "baseline", "propagation"):
        raise ValueError(f"unknown mode {mode!r} or parameters {sorted(p)}")
    places = torch.arange(lp.shape[1]).expand_as(lp)[whole]
    r3 = R3(tokenizer=None, propagation=mode == "propagation", ddof=ddof, **chosen, **settings)
    return r3.reflect(logps, segments, group, baseline=baseline, positions=places)


def _of_tokens(found: Reflection, mask: Tensor, rollouts: int) -> dict[str, Any]:
    def padded(flat: Tensor) -> Tensor:
        out = flat.new_zeros(rollouts, len(mask))
        out[:, mask] = flat.view(rollouts, -1)
        return out

    values = {
        "sigma": padded(found.sigma)[0],
        "token_weights": padded(found.weights)[0],
        "token_rewards": padded(found.tokens),
        "r3": found.rewards,
    }
    if found.log_propagation is not None and found.reflective is not None:
        values["reflective_mask"] = padded(found.reflective)[0]
        values["log_propagation"] = padded(found.log_propagation)
    return values


def _advantages(rewards: Tensor) -> dict[str, Tensor]:
    group = torch.zeros(len(rewards), dtype=torch.long)
    return {
        "advantages_ddof0": group_advantages(rewards, group, eps=1e-8, ddof=0),
        "advantages_ddof1_eps1e-4": group_advantages(rewards, group, eps=1e-4, ddof=1),
    }
