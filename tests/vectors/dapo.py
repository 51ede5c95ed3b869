from __future__ import annotations

from typing import Any

import torch

from tests.vectors.rows import Rows, numbered
from tests.vectors.runner import Case, adapter
from tokengrain.loss import make_normaliser
from tokengrain.methods.grpo import grpo_loss, informative_groups, overlong_penalty


@adapter("dapo", "overlong_penalty")
def penalty(case: Case) -> dict[str, Any]:
    settings = case.settings("factor", max_len="max_length", buffer_len="buffer")
    return {"penalty": overlong_penalty(case.inputs["response_lengths"], **settings)}


@adapter("dapo", "dynamic_sampling_mask")
def dynamic_sampling(case: Case) -> dict[str, Any]:
    case.settings()
    group, names = numbered(case.inputs["group_ids"])
    keep = informative_groups(case.inputs["metric"], group)
    return {"keep_rows": keep[group], "kept_groups": [n for n, k in zip(names, keep.tolist(), strict=True) if k]}


@adapter("dapo", "loss")
def loss(case: Case) -> dict[str, Any]:
    rows = Rows.of(case)
    settings = case.settings(
        "epsilon_high", "mask_truncated", "micro_batches", epsilon_low="epsilon", dual_clip_c="ratio_cap"
    )
    if settings.pop("mask_truncated", False):
        rows.mask = rows.mask & ~case.inputs["truncated"].bool()[:, None]
    cuts = settings.pop("micro_batches", None) or [[0, len(rows.mask)]]
    normalise, losses, per_token, clipped = make_normaliser("token_mean"), [], [], []
    for start, end in cuts:
        part = Rows(rows.mask[start:end])
        taken = Case(case.name, {}, {n: x[start:end] for n, x in case.inputs.items()}, {})
        output = grpo_loss(segments=part.segments, reduction="sum", **part.sampled(taken), **settings)
        losses.append(normalise(output, rows.counts))
        per_token.append(part.padded(output.tokens["loss"]))
        clipped.append((output.metrics["clip/low"] + output.metrics["clip/high"]) * part.segments.lengths)
    return {
        "loss": sum(losses),
        "micro_batch_losses": torch.stack(losses),
        "per_token_loss": torch.cat(per_token),
        "num_tokens": rows.counts.tokens,
        "clip_fraction": torch.cat(clipped).sum() / max(rows.counts.tokens, 1),
    }
