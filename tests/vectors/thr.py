from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.vectors.rows import Rows, numbered
from tests.vectors.runner import Case, adapter
from tokengrain.loss import LossOutput
from tokengrain.methods.grpo import group_advantages, grpo_loss
from tokengrain.methods.thr import (
    correct_influence,
    influence_threshold,
    nthr_eta,
    nthr_weights,
    thr_weights,
    token_hidden_rewards,
)
from tokengrain.scoring.fused import head_quantities
from tokengrain.scoring.head import Head

AGGREGATIONS = {"token_mean": ("sum", "token_mean"), "seq_mean": ("mean", "mean")}


@dataclass
class Groups:
    """Rollouts of a case with the old policy's hidden states."""

    case: Case
    rows: Rows
    group: Tensor
    names: list[Any]

    @classmethod
    def of(cls, case: Case) -> Groups:
        return cls(case, Rows.of(case), *numbered(case.inputs["group_ids"]))

    @property
    def where(self) -> tuple[Any, Tensor, Tensor]:
        return self.rows.segments, self.group, self.case.inputs["correct"]

    def influence(self, **settings: Any) -> Tensor:
        flat, inputs = self.rows.flat, self.case.inputs
        head = Head(inputs["lm_head"])
        return correct_influence(flat(inputs["hidden"]), head, flat(inputs["token_ids"]), *self.where, **settings)

    def thr(self, **settings: Any) -> Tensor:
        return token_hidden_rewards(self.influence(**settings), self.rows.segments, self.case.inputs["correct"])

    def tau(self, values: Tensor, beta: float | None) -> Tensor | None:
        """By its beta; or as the case gives it, a number for all groups, by group or by the group's name."""
        given = self.case.params.get("tau", self.case.inputs.get("tau"))
        if given is None:
            return None if beta is None else influence_threshold(values, *self.where, beta=beta)
        if isinstance(given, dict):
            given = [given[str(name)] for name in self.names]
        return torch.as_tensor(given, dtype=values.dtype).expand(len(self.names))

    def advantages(self, eps: float = 1e-6) -> Tensor:
        return group_advantages(self.case.inputs["correct"], self.group, eps=eps)

    def by_name(self, values: Tensor) -> dict[str, Tensor]:
        return {str(name): value for name, value in zip(self.names, values, strict=True)}

    def weighted(self, values: Tensor, tau: Tensor | None, weights: Tensor, eps: float) -> dict[str, Any]:
        segments = self.rows.segments
        found = {
            "weights": self.rows.padded(weights),
            "group_advantages": self.advantages(eps),
            "token_advantages": self.rows.padded(weights * segments.broadcast(self.advantages(eps))),
        }
        if tau is not None:
            distance = (values - segments.broadcast(tau[self.group])).abs()
            found |= {"tau": self.by_name(tau), "smallest_distance_to_threshold": distance.min()}
        return found


@adapter("thr", "thr")
def thr(case: Case) -> dict[str, Any]:
    x = Groups.of(case)
    settings = case.settings("p", "tau", "tau_beta", "length_normalize", "std_eps")
    normalize = settings.get("length_normalize", True)
    values = x.thr(length_normalize=normalize)
    tau = x.tau(values, settings.get("tau_beta"))
    weights = thr_weights(values, *x.where, tau, p=settings["p"])
    restricted = x.thr(length_normalize=normalize, restricted=True)
    return {
        "thr": x.rows.padded(values),
        "thr_restricted_vocab": x.rows.padded(restricted),
        "prediction_error": _prediction_errors(x),
        **x.weighted(values.abs(), tau, weights, settings.get("std_eps", 1e-6)),
    }


@adapter("thr", "nthr")
def nthr(case: Case) -> dict[str, Any]:
    x, settings = Groups.of(case), case.settings("beta", "tau", "std_eps")
    score = x.influence(length_normalize=False)
    tau = x.tau(score, settings.get("beta"))
    assert tau is not None
    weights = nthr_weights(score, *x.where, tau)
    eta = nthr_eta(x.group, case.inputs["correct"], torch.float64)
    return {
        "score": x.rows.padded(score),
        "eta": x.by_name(eta),
        **x.weighted(score, tau, weights, settings.get("std_eps", 1e-6)),
    }


@adapter("thr", "grpo_with_thr")
def grpo_with_thr(case: Case) -> dict[str, Any]:
    x = Groups.of(case)
    settings = case.settings("p", "tau", "tau_beta", "aggregation", "std_eps", "epsilon_high", epsilon_low="epsilon")
    values = x.thr()
    settings.pop("tau", None)
    tau = x.tau(values, settings.pop("tau_beta", None))
    weights = thr_weights(values, *x.where, tau, p=settings.pop("p"))
    found = x.weighted(values.abs(), tau, weights, settings.pop("std_eps", 1e-6))
    reduction, normaliser = AGGREGATIONS[settings.pop("aggregation")]

    def loss(advantages: Tensor) -> LossOutput:
        vectors = {**x.rows.sampled(case), "advantages": x.rows.flat(advantages)}
        return grpo_loss(segments=x.rows.segments, reduction=reduction, **vectors, **settings)

    return {
        "thr": x.rows.padded(values),
        **found,
        "loss": x.rows.normalised(loss(found["token_advantages"]), normaliser),
        "loss_without_thr": x.rows.normalised(loss(found["group_advantages"]), normaliser),
    }


@adapter("thr", "first_order_effect")
def first_order_effect(case: Case) -> dict[str, Any]:
    x, settings = Groups.of(case), case.settings("p_values", "tau", "tau_beta")
    values, segments = x.thr(), x.rows.segments
    tau, advantages = x.tau(values, settings.get("tau_beta")), x.advantages()
    size = segments.broadcast(advantages.abs()) * values
    slopes = [(thr_weights(values, *x.where, tau, p=p) * size).sum() for p in settings["p_values"]]
    return {"thr": x.rows.padded(values), "advantages": advantages, "slope": torch.stack(slopes)}


def _prediction_errors(x: Groups) -> Tensor:
    """onehot - softmax is the gradient of the label's log-probability in the logits."""
    flat = x.rows.flat
    logits = (flat(x.case.inputs["hidden"]) @ x.case.inputs["lm_head"].t()).requires_grad_()
    identity = Head(torch.eye(logits.shape[1], dtype=logits.dtype))
    logps = head_quantities(logits, identity, flat(x.case.inputs["token_ids"]), ("logps",))["logps"]
    return x.rows.padded(torch.autograd.grad(logps.sum(), logits)[0])
