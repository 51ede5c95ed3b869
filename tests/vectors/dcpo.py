from __future__ import annotations

from typing import Any

import torch

from tests.vectors.rows import Rows, numbered
from tests.vectors.runner import Case, adapter
from tokengrain.method import OBJECTIVES
from tokengrain.methods.dcpo import DCPO, dcpo_bounds, dcpo_loss

BOUNDS = ("epsilon_low", "epsilon_high", "ratio_max")
DEFAULTS = {name: OBJECTIVES["dcpo"].bind().hyper[name] for name in BOUNDS}


@adapter("dcpo", "clip_bounds")
def bounds(case: Case) -> dict[str, Any]:
    old = case.inputs["old_logps"]
    low, high = dcpo_bounds(old, **DEFAULTS | case.settings(*BOUNDS))
    q = old.exp()
    return {"ratio_low": low, "ratio_high": high, "p_min": low * q, "p_max_uncapped_at_1": high * q}


@adapter("dcpo", "sas_advantage")
def smoothed(case: Case) -> dict[str, Any]:
    history = DCPO(**case.settings("normalize_by_std", "ddof"))
    start = case.inputs.get("initial_state") or {}
    names = list(start)
    history.load_state_dict({"prompts": names} | {k: [start[n][k] for n in names] for k in ("count", "mean", "std")})
    steps = []
    for step in case.inputs["steps"]:
        group, prompts = numbered(step["group_ids"])
        s = history.smooth(torch.tensor(step["rewards"], dtype=torch.float64), group, prompts)
        history.visits |= s.visits
        steps.append(
            {
                "advantages": s.advantages,
                "a_current": s.current,
                "a_cumulative": s.cumulative,
                "sa_current": s.smoothed_current,
                "sa_cumulative": s.smoothed_cumulative,
                "state_after": {k: vars(v) for k, v in history.visits.items()},
            }
        )
    return {"steps": steps}


@adapter("dcpo", "loss")
def loss(case: Case) -> dict[str, Any]:
    rows, settings = Rows.of(case), case.settings(*BOUNDS)
    vectors = rows.sampled(case)
    mean, total = (dcpo_loss(segments=rows.segments, reduction=r, **vectors, **settings) for r in ("mean", "sum"))
    old = case.inputs.get("old_logps")
    low, high = dcpo_bounds(
        rows.padded(vectors["old_logps"]) if old is None or isinstance(old, list) else old, **DEFAULTS | settings
    )
    return {
        "loss": {
            "otm_sum": rows.normalised(mean, "prompt_mean"),
            "seq_mean": rows.normalised(mean, "mean"),
            "token_mean": rows.normalised(total, "token_mean"),
        },
        "per_token_loss": rows.padded(mean.tokens["loss"]),
        "ratio_low": low,
        "ratio_high": high,
        "clipped_tokens": rows.padded(mean.tokens["clipped"]).abs(),
    }
