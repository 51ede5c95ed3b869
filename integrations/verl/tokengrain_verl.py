"""tokengrain in verl: the losses `tokengrain_NAME` for `LOSSES`, and estimators of advantages.

verl loads this module by its entry point in every process (or by VERL_USE_EXTERNAL_MODULES=tokengrain_verl).
Hyper-parameters come from the environment, since verl's config has no place for them:

    TOKENGRAIN_VERL='{"grpo": {"epsilon_high": 0.28, "ratio_cap": 3.0}, "group": {"baseline": "leave_one_out"}}'

A mistake in it is an error when the loss is first called: verl logs errors of loading at debug level only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, register_adv_est, register_policy_loss

from tokengrain.batch import Segments
from tokengrain.errors import RecipeError, require
from tokengrain.method import BoundObjective, make_objective
from tokengrain.methods._shaping import Scaling, scale_scores
from tokengrain.methods.grpo import group_advantages
from tokengrain.methods.ppo import rescored
from tokengrain.settings import validate_settings

LOSSES = ("grpo", "gspo", "dcpo", "reinforce")
OTHERS = ("group", "tokens", "token_rewards")
VARIABLE = "TOKENGRAIN_VERL"
OWN_MEAN = frozenset({"gspo"})
"""Losses that are means over a completion's tokens whatever their settings; the others take `reduction`."""


@cache
def settings(given: str) -> dict[str, dict[str, Any]]:
    """What the environment variable says, by name. Raises RecipeError for what is no such thing."""
    try:
        found = json.loads(given or "{}")
    except ValueError as error:
        raise RecipeError(f"{VARIABLE} is no JSON: {error}") from None
    known = isinstance(found, dict) and all(isinstance(one, dict) for one in found.values())
    require(known, RecipeError, f"{VARIABLE} is {given}; expected an object of objects, such as {{'grpo': {{...}}}}")
    strange = sorted(set(found) - {*LOSSES, *OTHERS})
    what = f"{VARIABLE} has {', '.join(strange)}; expected {', '.join(LOSSES)}, {' or '.join(OTHERS)}"
    require(not strange, RecipeError, what)
    return found


@cache
def objective(name: str, given: str) -> BoundObjective:
    own = settings(given).get(name, {})
    what = f"{VARIABLE}: {name} has reduction; expected verl's loss_agg_mode, which says how tokens are added up"
    require("reduction" not in own, RecipeError, what)
    return make_objective(name, **own, **({} if name in OWN_MEAN else {"reduction": "mean"}))


def policy_loss(name: str) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """A loss as verl calls it: padded tensors `[B, T]` in, a scalar and metrics out."""

    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, dict[str, float]]:
        bound, mask = objective(name, os.environ.get(VARIABLE, "")), response_mask.bool()
        logps, segments = Segments.from_padded(log_prob, mask)
        given = {"old_logps": old_log_prob[mask], "advantages": advantages[mask]}
        if rollout_is_weights is not None:
            given["weights"] = rollout_is_weights[mask]
        taken = {column: values for column, values in given.items() if column in bound.needs | bound.optional}
        out = bound(segments=segments, logps=logps, **taken)
        # A completion's mean at each of its tokens: all of verl's ways to add up then give what they give of tokens.
        spread = torch.zeros_like(log_prob, dtype=out.losses.dtype)
        spread = spread.masked_scatter(mask, segments.broadcast(out.losses))
        counts = {} if config is None else config.global_batch_info
        metrics = {f"actor/{metric}": float(values.detach().mean()) for metric, values in out.metrics.items()}
        return agg_loss(spread, mask, loss_agg_mode, **counts), metrics

    return loss


def group(
    token_level_rewards: Tensor, response_mask: Tensor, index: Sequence[Any], config: Any = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """Advantages and returns `[B, T]`: a completion's reward against those of its group (`index`: prompts)."""
    rewards = token_level_rewards.sum(-1)  # verl puts one at the last token, also where that is a tool's
    number = {prompt: place for place, prompt in enumerate(dict.fromkeys(index))}
    own = dict(settings(os.environ.get(VARIABLE, "")).get("group", {}))
    if config is not None and config.get("norm_adv_by_std_in_grpo", True) is False:
        own.setdefault("scale", "none")
    groups = torch.tensor([number[prompt] for prompt in index], device=rewards.device)
    advantages = group_advantages(rewards, groups, **own)[:, None] * response_mask
    return advantages, advantages


def tokens(token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **_: Any) -> tuple[Tensor, Tensor]:
    """Advantages and returns `[B, T]`: each token's own reward, scaled over the tokens of the batch (as in Q-RM)."""
    mask = response_mask.bool()
    rewards, segments = Segments.from_padded(token_level_rewards, mask)
    own = settings(os.environ.get(VARIABLE, "")).get("tokens", {})
    taken = validate_settings(f"{VARIABLE}: tokens", token_advantages, own, excluded=("rewards", "segments"))
    flat = token_advantages(rewards, segments, **taken)
    advantages = torch.zeros_like(token_level_rewards, dtype=flat.dtype).masked_scatter(mask, flat)
    return advantages, advantages


def token_advantages(
    rewards: Tensor, segments: Segments, *, scaling: Scaling = "zscore", rescore_last: bool = False
) -> Tensor:
    """The setting `tokens`, as in the rollout credit `reinforce`: `[N] -> [N]`."""
    scaled = scale_scores(rewards, scaling)
    return rescored(scaled, segments) if rescore_last else scaled


for _name in LOSSES:
    register_policy_loss(f"tokengrain_{_name}")(policy_loss(_name))
register_adv_est("tokengrain_group")(group)
register_adv_est("tokengrain_tokens")(tokens)
