from __future__ import annotations

from typing import Any

import torch

from tests.vectors.rows import Rows, numbered
from tests.vectors.runner import Case, adapter
from tokengrain.loss import make_normaliser
from tokengrain.methods._clipped import kl_estimate
from tokengrain.methods.grpo import group_advantages, grpo_loss


@adapter("grpo", "group_advantages")
def advantages(case: Case) -> dict[str, Any]:
    group, _ = numbered(case.inputs["group_ids"])
    return {"advantages": group_advantages(case.inputs["rewards"], group, **case.settings("scale", "eps", "ddof"))}


@adapter("grpo", "kl_estimators")
def kl_estimators(case: Case) -> dict[str, Any]:
    case.settings()
    rows = Rows.of(case)
    logps, ref = (rows.flat(case.inputs[name]) for name in ("logps", "ref_logps"))
    logps = logps.detach().requires_grad_()
    estimates = {k: kl_estimate(logps, ref, k) for k in ("k1", "k2", "k3")}
    (estimates["grad_k3_sum_wrt_logps"],) = torch.autograd.grad(estimates["k3"].sum(), logps)
    return {name: rows.padded(values) for name, values in estimates.items()}


@adapter("grpo", "loss")
def loss(case: Case) -> dict[str, Any]:
    rows = Rows.of(case)
    vectors = rows.sampled(case, "ref_logps")
    settings = case.settings(
        "beta", "epsilon_high", epsilon_low="epsilon", delta="ratio_cap", max_len_constant="max_length"
    )
    max_length = settings.pop("max_length", None)
    kinds = {
        "seq_mean": ("mean", None, "mean"),
        "token_mean": ("sum", None, "token_mean"),
        "constant": ("constant", max_length, "mean"),
    }
    outputs, losses = {}, {}
    for kind, (reduction, length, normaliser) in kinds.items():
        if kind not in case.expected["loss"]:
            continue
        outputs[kind] = grpo_loss(segments=rows.segments, reduction=reduction, max_length=length, **vectors, **settings)
        losses[kind] = make_normaliser(normaliser)(outputs[kind], rows.counts)
    output = next(iter(outputs.values()))
    return {
        "loss": losses,
        "per_token_loss": rows.padded(output.tokens["loss"]),
        "clip_fraction_low": rows.share(output, "clip/low"),
        "clip_fraction_high": rows.share(output, "clip/high"),
    }
