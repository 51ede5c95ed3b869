from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.vectors.rows import Rows
from tests.vectors.runner import Case, adapter
from tokengrain.methods._clipped import value_loss
from tokengrain.methods._shaping import Moments, scale_scores
from tokengrain.methods.ppo import adapted, gae, ppo_policy_loss, whitened
from tokengrain.methods.rto import RTO, RTORewards

VARIANTS: dict[str, Any] = {
    "rto": "rto",
    "semi_rto": "semi",
    "ddpo_delayed": "delayed",
    "rs_ppo": "shaping",
    "ppo": "ppo",
}
PER_SEQUENCE = "mean over tokens per sequence, then mean over sequences"


@adapter("rto", "rto_token_reward")
def token_reward(case: Case) -> dict[str, Any]:
    rows, settings = Rows.of(case), _reward_settings(case.params)
    found = _rewards(case, rows, case.inputs["sentence_reward"], **settings)
    return {
        "dpo_token_reward": rows.padded(found.dense),
        "kl_per_token": rows.padded(found.kl),
        "kl_mean": found.metrics["kl/ref"],
        "token_reward": rows.padded(found.rewards),
        "return_sum": rows.segments.sum(found.rewards),
    }


@adapter("rto", "rto_reward_variants")
def reward_variants(case: Case) -> dict[str, Any]:
    rows, settings = Rows.of(case), _reward_settings(case.params)
    sentences = rows.flat(case.inputs["segment_ids"])
    ends = torch.ones_like(sentences, dtype=torch.bool)
    ends[:-1] = sentences[1:] != sentences[:-1]
    return {
        name: rows.padded(
            _rewards(case, rows, case.inputs["sentence_reward"], variant=variant, ends=ends, **settings).rewards
        )
        for name, variant in VARIANTS.items()
    }


@adapter("rto", "gae")
def advantages(case: Case) -> dict[str, Any]:
    rows = Rows.of(case)
    found = gae(
        rows.flat(case.inputs["rewards"]),
        rows.segments,
        values=rows.take(case, "values").get("values"),
        **case.settings("gamma", "lam"),
    )
    return {"advantages": rows.padded(found.advantages), "returns": rows.padded(found.returns)}


@adapter("rto", "whiten_advantages")
def whitening(case: Case) -> dict[str, Any]:
    rows, settings = Rows.of(case), case.settings("scope", "unbiased", var_floor="variance_floor")
    if settings.pop("unbiased") or "whole rollout" not in settings.pop("scope"):
        raise ValueError("only the population's variance over the whole rollout")
    return {"whitened": rows.padded(whitened(rows.flat(case.inputs["advantages"]), **settings))}


@adapter("rto", "ppo_policy_loss")
def policy_loss(case: Case) -> dict[str, Any]:
    rows, settings = Rows.of(case), case.settings("reduction", clip_eps="clip_range")
    _check(settings.pop("reduction"))
    output = ppo_policy_loss(
        segments=rows.segments,
        reduction="mean",
        **rows.sampled(case),
        **settings,
    )
    clipped = output.metrics["clip/tokens"] * rows.segments.lengths
    ratio = torch.ones(rows.mask.shape, dtype=torch.float64)
    ratio[rows.mask] = output.tokens["ratio"]
    return {
        "loss": rows.normalised(output, "mean"),
        "per_example": output.losses,
        "ratio": ratio,
        "clip_fraction": clipped.sum() / rows.segments.total,
    }


@adapter("rto", "ppo_value_loss")
def critic_loss(case: Case) -> dict[str, Any]:
    rows, settings = Rows.of(case), case.settings("reduction", clip_eps="clip_range", coef="weight")
    _check(settings.pop("reduction"))
    output = value_loss(
        segments=rows.segments, reduction="mean", **rows.take(case, "values", "old_values", "returns"), **settings
    )
    return {"loss": rows.normalised(output, "mean"), "per_example": output.losses}


@adapter("rto", "rto_ppo_step")
def whole_step(case: Case) -> dict[str, Any]:
    p = dict(case.params)
    mean, std, gamma, lam, clip, value_clip = (
        p.pop(k) for k in ("reward_mean", "reward_std", "gamma", "lam", "clip_eps", "value_clip_eps")
    )
    rows = Rows.of(case)
    sentence = scale_scores(case.inputs["raw_sentence_reward"], "zscore", Moments(1, mean, std**2))
    new_logps = rows.flat(case.inputs["new_logps"])
    old_logps = rows.old(case, "old_logps", new_logps)
    found = _rewards(case, rows, sentence, policy=old_logps, **_reward_settings(p))
    old_values = rows.flat(case.inputs["old_values"])
    estimate = gae(found.rewards, rows.segments, values=old_values, gamma=gamma, lam=lam)
    white = whitened(estimate.advantages)
    policy = ppo_policy_loss(
        new_logps,
        rows.segments,
        old_logps=old_logps,
        advantages=white,
        clip_range=clip,
        reduction="mean",
    )
    critic = value_loss(
        rows.flat(case.inputs["new_values"]),
        rows.segments,
        returns=estimate.returns,
        old_values=old_values,
        clip_range=value_clip,
        weight=0.5,
        reduction="mean",
    )
    losses = rows.normalised(policy, "mean"), rows.normalised(critic, "mean")
    return {
        "normalized_sentence_reward": sentence,
        "token_reward": rows.padded(found.rewards),
        "advantages_raw": rows.padded(estimate.advantages),
        "returns": rows.padded(estimate.returns),
        "advantages_whitened": rows.padded(white),
        "policy_loss": losses[0],
        "value_loss": losses[1],
        "loss": losses[0] + losses[1],  # no term of one depends on the other's input
    }


@adapter("rto", "adaptive_kl_controller")
def adaptive_kl(case: Case) -> dict[str, Any]:
    settings = case.settings("target", "horizon", "n_steps", init_kl_coef="coef")
    completions = settings.pop("n_steps")
    coef, coefs = settings.pop("coef"), []
    for kl in case.inputs["current_kl"].tolist():
        coef = adapted(coef, kl, completions, **settings)
        coefs.append(coef)
    return {"kl_coef_after_each": coefs}


def _rewards(
    case: Case,
    rows: Rows,
    sentence: Tensor,
    *,
    policy: Tensor | None = None,
    ends: Tensor | None = None,
    **settings: Any,
) -> RTORewards:
    """The guide's log-probabilities are given: no model is asked."""
    given = rows.take(case, "policy_logps", "ref_logps", "dpo_logps")
    logps = given["policy_logps"] if policy is None else policy
    credit = RTO(model="given", tokenizer="given", **settings)
    quantities = {name: given[name] for name in ("ref_logps", "dpo_logps")}
    return credit.rewards(logps, rows.segments, **quantities, sentence_rewards=sentence, ends=ends)


def _reward_settings(params: dict[str, Any]) -> dict[str, Any]:
    names = {"dpo_reward_clip": "clip", "sentence_reward_clip": "sentence_clip"}
    settings = {names.get(name, name): value for name, value in params.items()}
    if settings.get("clip") is not None and settings["clip"] <= 0:
        settings["clip"] = None  # that means no clip to the authors
    return settings


def _check(reduction: str) -> None:
    if reduction != PER_SEQUENCE:
        raise ValueError(f"unknown reduction {reduction!r}")
