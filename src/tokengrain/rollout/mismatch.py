"""How far a sampler's log-probabilities are from the trainer's, and weights that correct for it.

Engines compute in other precisions, with other kernels and sometimes with older weights than the trainer. Then
what is called on-policy is not (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
Training"): measure it at every step, and weight tokens or sequences by truncated importance ratios if it
matters.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.rollout.base import RolloutError

Correction = Literal["none", "token", "sequence"]


def sampler_mismatch(sampling_logps: Tensor, trainer_logps: Tensor, segments: Segments) -> dict[str, float]:
    """Metrics of the mismatch of the same tokens under both. All 0 (ratios 1) if they agree.

    Args:
        sampling_logps: `[N]`, the sampler's: `raw_logps` if the trainer scores at temperature 1 (equal to
            `sampling_logps` there when nothing was truncated).
        trainer_logps: `[N]`, the trainer's, of the weights that were sampled from.
        segments: the N tokens' completions.

    Returns:
        Nats per token: `mean_abs` and `max_abs` difference; `k1` and `k3` estimate KL(sampler || trainer), k3
        never negative. Ratios trainer/sampler: `max_ratio` and `min_ratio` of a token, `max_sequence_ratio` of a
        whole completion (as far as it can be represented).

    Raises:
        RolloutError: different lengths, or values that are not finite.
    """
    d = _log_ratio(sampling_logps, trainer_logps, segments)
    if not d.numel():
        d = d.new_zeros(1)
        sums = d
    else:
        sums = segments.sum(d)
    values = {
        "mean_abs": d.abs().mean(),
        "max_abs": d.abs().max(),
        "k1": -d.mean(),
        "k3": (d.expm1() - d).mean(),
        "max_ratio": d.max().exp(),
        "min_ratio": d.min().exp(),
        "max_sequence_ratio": sums.max().exp(),
    }
    return {f"mismatch/{name}": float(value) for name, value in values.items()}


def importance_weights(
    sampling_logps: Tensor,
    trainer_logps: Tensor,
    segments: Segments,
    *,
    kind: Correction = "none",
    cap: float = 2.0,
) -> Tensor:
    """Truncated importance weights `[N]`, without gradient: factors of the per-token loss.

    Args:
        sampling_logps: `[N]` under the distribution the tokens were drawn from.
        trainer_logps: `[N]` under the trainer's weights at the time of sampling.
        segments: the N tokens' completions.
        kind: "none": ones; "token": min(ratio of the token, cap); "sequence": min(ratio of the whole completion,
            cap), the same for all its tokens.
        cap: bound from above.

    Raises:
        RolloutError: as `sampler_mismatch`; an unknown kind, a cap that is not positive.
    """
    if kind not in ("none", "token", "sequence") or not cap > 0:
        raise RolloutError(f"kind is {kind!r} and cap {cap}; expected none, token or sequence, and a cap > 0")
    d = _log_ratio(sampling_logps, trainer_logps, segments)
    if kind == "none":
        return torch.ones_like(d)
    if kind == "sequence":
        d = segments.broadcast(segments.sum(d))
    # Bounding the exponent instead of the weight keeps exp from overflowing.
    return d.clamp(max=math.log(cap)).exp()


def _log_ratio(sampling_logps: Tensor, trainer_logps: Tensor, segments: Segments) -> Tensor:
    expected = (segments.total,)
    for name, values in (("sampling_logps", sampling_logps), ("trainer_logps", trainer_logps)):
        if values.shape != expected:
            raise RolloutError(f"{name} has shape {tuple(values.shape)}; expected {expected}, one per token")
        if not bool(torch.isfinite(values).all()):
            token = int((~torch.isfinite(values)).nonzero()[0])
            raise RolloutError(
                f"{name} is {float(values[token])} for token {token} (completion {int(segments.ids[token])}); "
                "expected finite numbers"
            )
    return trainer_logps.detach() - sampling_logps.detach().to(trainer_logps)
