"""Generalised advantage estimation (arXiv 1506.02438) on flat tokens, and whitening of what it gives.

One time step is one counted token. Tokens that do not count (tool output, a user's turn) are not in the flat
vectors, so nothing decays through a gap. After the last token of a completion there is no value to bootstrap from,
truncated or not, as in the authors' code of RTO (arXiv 2404.18922).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.credit.shaping import Moments


@dataclass(frozen=True)
class Advantages:
    """What the policy and the critic learn from, `[N]` each, without gradient.

    Attributes:
        advantages: A, not whitened.
        returns: A + V, the critic's target.
    """

    advantages: Tensor
    returns: Tensor


def gae(
    rewards: Tensor, segments: Segments, *, values: Tensor | None = None, gamma: float = 1.0, lam: float = 0.95
) -> Advantages:
    """A_t = delta_t + gamma lam A_{t+1} with delta_t = r_t + gamma V_{t+1} - V_t, per completion.

    Args:
        rewards: one per token `[N]`.
        segments: cuts `[N]` into C completions.
        values: V of the state before each token `[N]`; None: 0, without a critic (lam = 1 then gives the
            discounted reward that is still to come).
        gamma: discount per token, in [0, 1].
        lam: weight of the next token's advantage, in [0, 1]: 0 gives the one-step error, 1 the return minus V.

    Raises:
        ValueError: gamma or lam outside [0, 1], or values of another shape.
    """
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0 <= number <= 1:
            raise ValueError(f"gae: {name} must lie in [0, 1], got {number}")
    r = rewards.detach()
    if values is not None and values.shape != r.shape:
        raise ValueError(f"gae: values have shape {tuple(values.shape)}, expected {tuple(r.shape)}: one per token")
    V = torch.zeros_like(r) if values is None else values.detach()
    dtype = torch.promote_types(torch.promote_types(r.dtype, V.dtype), torch.float32)
    r, V = r.to(dtype), V.to(dtype)
    following = torch.where(segments.is_last, 0.0, V.roll(-1))
    delta = r + gamma * following - V
    A, mask = segments.to_padded(delta)
    advantages = _discounted_sums(A, gamma * lam)[mask]
    return Advantages(advantages, advantages + V)


def whiten(advantages: Tensor, moments: Moments | None = None, *, variance_floor: float = 1e-8) -> Tensor:
    """Mean 0 and population variance 1 over all tokens of the rollout: `[N] -> [N]`, detached.

    Args:
        advantages: `[N]`, of the whole rollout, not of a minibatch or a completion.
        moments: those of all ranks' tokens, which add up; None: those of `advantages`.
        variance_floor: the least variance that is divided by, so that constant advantages give 0.
    """
    moments = Moments.of(advantages) if moments is None else moments
    return (advantages.detach() - moments.mean) / max(moments.std**2, variance_floor) ** 0.5


def _discounted_sums(x: Tensor, factor: float) -> Tensor:
    """sum over i >= 0 of factor^i x[:, t + i] for every t: `[C, T] -> [C, T]`, zeros standing after the row.

    Sums over 1, 2, 4, ... steps: log2(T) operations on whole rows instead of T on columns.
    """
    step = 1
    while step < x.shape[1]:
        tail = torch.zeros_like(x)
        tail[:, :-step] = x[:, step:]
        x, step = x + factor**step * tail, 2 * step
    return x
