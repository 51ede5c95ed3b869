from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.vectors.layout import Pairs, from_logits
from tests.vectors.runner import Case, adapter
from tokengrain.batch import Segments
from tokengrain.loss import Counts, LossOutput, make_normaliser
from tokengrain.methods._shaping import penalised, q_advantages, rescore_last, sampled_kl, scale_scores
from tokengrain.methods.ppo import ppo_policy_loss, reinforce_loss, value_loss
from tokengrain.methods.qrm import qrm_loss
from tokengrain.methods.tgdpo import guide_token_rewards

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
    p = _rl_settings(case)
    mask = case.inputs["mask"].bool()
    z, V, old, ref = (case.inputs[n][mask] for n in ("token_scores", "values", "old_logprobs", "ref_logprobs"))
    kl = sampled_kl(old, ref, KL_FORMS.get(p["kl_form"], p["kl_form"]))
    rewards = penalised(scale_scores(z, p["normalize"]), kl, p["kl_coef"])
    scaling = p["normalize"] if p["normalize_values"] else "none"
    return {
        "rewards": _padded(rewards, mask),
        "advantages": _padded(q_advantages(rewards, V, value_coef=p["value_coef"], value_scaling=scaling), mask),
        "returns": _padded(rewards, mask),  # the critic learns the scaled score itself
        "values_used": _padded(scale_scores(V, scaling), mask),
    }


@adapter("qrm", "rl_advantages_paper")
def advantages_of_the_paper(case: Case) -> dict[str, Any]:
    p = _rl_settings(case)
    mask = case.inputs["mask"].bool()
    policy, ref = (case.inputs[f"{model}_logits"][mask] for model in ("policy", "ref"))
    # `kl` is KL(second || first): the policy stands where the losses have their reference.
    kl = from_logits(ref, torch.zeros(len(ref), dtype=torch.long), ("kl",), policy)["kl"]
    scores = scale_scores(case.inputs["token_scores"][mask], p["normalize"])
    scaling = p["normalize"] if p["normalize_values"] else "none"
    advantages = q_advantages(
        penalised(scores, kl, p["kl_coef"]),
        case.inputs["values"][mask],
        value_coef=p["value_coef"],
        value_scaling=scaling,
    )
    return {"z_std": _padded(scores, mask), "advantages": _padded(advantages, mask), "kl": _padded(kl, mask)}


@adapter("qrm", "reinforce_loss")
def reinforce(case: Case) -> dict[str, Any]:
    p = case.settings("normalize", "rescore_eos", "reduction")
    mask, segments, logps = _policy(case)
    weights = scale_scores(case.inputs["token_scores"][mask], p["normalize"])
    if p["rescore_eos"]:
        weights = rescore_last(weights, segments)
    loss = _token_mean(reinforce_loss(logps, segments, advantages=weights), segments)
    (grad,) = torch.autograd.grad(loss, logps, retain_graph=True)
    return {"token_weights": _padded(weights, mask), "loss": loss, "grad_logprobs": _padded(grad, mask)}


@adapter("qrm", "ppo_policy_loss")
def ppo(case: Case) -> dict[str, Any]:
    p = case.settings("clip_range", "reduction")
    mask, segments, logps = _policy(case)
    old, advantages = (case.inputs[name][mask] for name in ("old_logprobs", "advantages"))
    clip = p["clip_range"] or None  # 0 means no clipping to the authors
    output = ppo_policy_loss(logps, segments, old_logps=old, advantages=advantages, clip_range=clip)
    outside = output.metrics["ratio/outside"] * segments.lengths
    return {"loss": _token_mean(output, segments), "clip_fraction": outside.sum() / segments.total}


@adapter("qrm", "critic_loss")
def critic(case: Case) -> dict[str, Any]:
    case.settings("reduction")
    mask = case.inputs["mask"].bool()
    values, segments = Segments.from_padded(case.inputs["values"], mask)
    return {"loss": _token_mean(value_loss(values, segments, returns=case.inputs["returns"][mask]), segments)}


@adapter("qrm", "dpo_rm_token_rewards")
def dpo_rewards(case: Case) -> dict[str, Any]:
    mask = case.inputs["mask"].bool()
    policy, ref = (case.inputs[f"{model}_logprobs"][mask] for model in ("policy", "ref"))
    return {"token_scores": _padded(guide_token_rewards(policy, ref, **case.settings("beta")), mask)}


def _rl_settings(case: Case) -> dict[str, Any]:
    names = ("normalize", "kl_coef", "kl_form", "value_coef", "normalize_values", "std_ddof", "std_scope")
    settings = case.settings(*names, "reward_is_q")
    if settings["std_ddof"] != 0 or not settings.get("reward_is_q", True):
        raise ValueError("only population statistics, and rewards that are Q-values")
    return settings


def _policy(case: Case) -> tuple[Tensor, Segments, Tensor]:
    mask = case.inputs["mask"].bool()
    logits, segments = Segments.from_padded(case.inputs["logits"], mask)
    return mask, segments, from_logits(logits, case.inputs["actions"][mask].long(), ("logps",))["logps"]


def _token_mean(output: LossOutput, segments: Segments) -> Tensor:
    return make_normaliser("token_mean")(output, Counts.of(segments, pairs=False))


def _padded(flat: Tensor, mask: Tensor) -> Tensor:
    out = flat.new_zeros(mask.shape)
    out[mask] = flat.detach()
    return out
