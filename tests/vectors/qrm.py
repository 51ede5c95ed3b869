from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.vectors.layout import Pairs, from_logits
from tests.vectors.rows import Rows
from tests.vectors.runner import Case, adapter
from tokengrain.batch import Segments
from tokengrain.loss import Counts, make_normaliser
from tokengrain.methods._clipped import sampled_kl, value_loss
from tokengrain.methods._shaping import scale_scores
from tokengrain.methods.ppo import gae, ppo_policy_loss, reinforce_loss, rescored
from tokengrain.methods.qrm import qrm_loss
from tokengrain.methods.tgdpo import guide_rewards

KL_FORMS = {"abs_logratio": "abs"}


@adapter("qrm", "loss")
def reward_model(case: Case) -> dict[str, Any]:
    """The mean is over pairs with tokens on both sides: data loading refuses the others."""
    pairs = Pairs.of(case)
    scores = pairs.flat(case.inputs["chosen_scores"], case.inputs["rejected_scores"])
    output = qrm_loss(scores, pairs.segments, **case.settings("beta", "gamma"))
    m, valid = output.metrics, output.metrics["valid"].bool()
    return {
        "loss": make_normaliser("mean")(output, Counts(pairs=int(valid.sum()))),
        "per_example": output.losses,
        "valid": m["valid"],
        "chosen_mean": m["rewards/chosen"],
        "rejected_mean": m["rewards/rejected"],
        "accuracy": m["rewards/accuracies"][valid].mean(),
    }


@adapter("qrm", "align_scores")
def alignment(case: Case) -> dict[str, Any]:
    """Flat, a token's score is the score of the action that produced it; padded, that stands one place left."""
    mask = case.inputs["response_mask"].bool()[:, 1:]  # no action produced the first token of all
    scores, _ = Segments.from_padded(case.inputs["sequence_scores"][:, 1:], mask)
    actions = torch.cat([mask, torch.zeros_like(mask[:, :1])], dim=1)
    return {"action_mask": actions.double(), "token_scores": _padded(scores, actions)}


@adapter("qrm", "rl_advantages")
def advantages(case: Case) -> dict[str, Any]:
    """With Q-values A = r - c V; with rewards that are not, GAE makes the advantages of them."""
    rows, p = Rows.of(case), _rl_settings(case)
    given = rows.take(case, "token_scores", "values", "old_logprobs", "ref_logprobs")
    rewards = scale_scores(given["token_scores"], p["normalize"])
    if {"old_logprobs", "ref_logprobs"} <= set(given):
        kl = sampled_kl(given["old_logprobs"], given["ref_logprobs"], KL_FORMS.get(p["kl_form"], p["kl_form"]))
        rewards = rewards - p["kl_coef"] * kl
    values = given.get("values")
    values = torch.zeros_like(rewards) if values is None else values
    used = scale_scores(values, _values_scaling(p))
    found, returns = rewards - p.get("value_coef", 0.0) * used, rewards  # the critic learns the scaled score itself
    if not p.get("reward_is_q", True):
        used = values
        found, returns = gae(rewards, rows.segments, values=values, gamma=p["gamma"], lam=p["lam"])
    flat = {"rewards": rewards, "advantages": found, "returns": returns, "values_used": used}
    return {name: rows.padded(x) for name, x in flat.items()}


@adapter("qrm", "rl_advantages_paper")
def advantages_of_the_paper(case: Case) -> dict[str, Any]:
    rows, p = Rows.of(case), _rl_settings(case)
    policy, ref = (rows.flat(case.inputs[f"{model}_logits"]) for model in ("policy", "ref"))
    # `kl` is KL(second || first): the policy stands where the losses have their reference.
    kl = from_logits(ref, torch.zeros(len(ref), dtype=torch.long), ("kl",), policy)["kl"]
    scores = scale_scores(rows.flat(case.inputs["token_scores"]), p["normalize"])
    values = scale_scores(rows.flat(case.inputs["values"]), _values_scaling(p))
    found = scores - p["kl_coef"] * kl - p["value_coef"] * values
    return {"z_std": rows.padded(scores), "advantages": rows.padded(found), "kl": rows.padded(kl)}


@adapter("qrm", "reinforce_loss")
def reinforce(case: Case) -> dict[str, Any]:
    p = case.settings("normalize", "rescore_eos", "reduction")
    rows, logps = _policy(case)
    weights = scale_scores(rows.flat(case.inputs["token_scores"]), p["normalize"])
    if p["rescore_eos"]:
        weights = rescored(weights, rows.segments)
    loss = rows.normalised(reinforce_loss(logps, rows.segments, advantages=weights), "token_mean")
    (grad,) = torch.autograd.grad(loss, logps, retain_graph=True)
    return {"token_weights": rows.padded(weights), "loss": loss, "grad_logprobs": rows.padded(grad)}


@adapter("qrm", "ppo_policy_loss")
def ppo(case: Case) -> dict[str, Any]:
    p = case.settings("clip_range", "reduction")
    rows, logps = _policy(case)
    old, advantages = rows.old(case, "old_logprobs", logps), rows.flat(case.inputs["advantages"])
    clip = p["clip_range"] or None  # 0 means no clipping to the authors
    output = ppo_policy_loss(logps, rows.segments, old_logps=old, advantages=advantages, clip_range=clip)
    return {"loss": rows.normalised(output, "token_mean"), "clip_fraction": rows.share(output, "ratio/outside")}


@adapter("qrm", "critic_loss")
def critic(case: Case) -> dict[str, Any]:
    case.settings("reduction")
    rows = Rows.of(case)
    values, returns = (rows.flat(case.inputs[name]) for name in ("values", "returns"))
    return {"loss": rows.normalised(value_loss(values, rows.segments, returns=returns), "token_mean")}


@adapter("qrm", "dpo_rm_token_rewards")
def dpo_rewards(case: Case) -> dict[str, Any]:
    rows = Rows.of(case)
    policy, ref = (rows.flat(case.inputs[f"{model}_logprobs"]) for model in ("policy", "ref"))
    return {"token_scores": rows.padded(guide_rewards(policy, ref, **case.settings("beta")))}


def _rl_settings(case: Case) -> dict[str, Any]:
    names = ("normalize", "kl_coef", "kl_form", "value_coef", "normalize_values", "std_ddof", "std_scope")
    gae_names = {"gamma": "gamma", "lam": "lam", "lambd": "lam", "lambda": "lam", "gae_lambda": "lam"}
    settings = case.settings(*names, "reward_is_q", **gae_names)
    if settings.get("std_ddof", 0) != 0:
        raise ValueError("only population statistics")
    return settings


def _values_scaling(settings: dict[str, Any]) -> Any:
    return settings["normalize"] if settings["normalize_values"] else "none"


def _policy(case: Case) -> tuple[Rows, Tensor]:
    rows = Rows.of(case)
    logits, actions = (rows.flat(case.inputs[name]) for name in ("logits", "actions"))
    return rows, from_logits(logits, actions.long(), ("logps",))["logps"]


def _padded(flat: Tensor, mask: Tensor) -> Tensor:
    out = flat.new_zeros(mask.shape)
    out[mask] = flat.detach()
    return out
