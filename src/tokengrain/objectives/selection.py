"""Which tokens to train on: the best of a chosen completion, the worst of a rejected one (arXiv 2408.13518).

Selection is per completion, never across a batch, and works on any token credit `[N]`. Completions are pairs:
even ones chosen, odd ones rejected. For the ablations of the paper feed other values: random ones, or the
negated credit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokengrain.batch import Segments


def select_tokens(
    values: Tensor,
    segments: Segments,
    *,
    chosen: float = 0.3,
    rejected: float = 0.3,
    score_first_token: bool = True,
) -> Tensor:
    """The highest share of every chosen and the lowest share of every rejected completion: bool `[N]`.

    Of n tokens max(1, floor(share * n)) are taken; among equal values the earliest. A completion without
    tokens gives none.

    Args:
        values: token credit `[N]`, without NaN.
        segments: cuts `[N]` into 2P completions: chosen, rejected, chosen, ...
        chosen: share of a chosen completion's tokens, in (0, 1].
        rejected: the same for rejected completions.
        score_first_token: False leaves out the first token of every completion, which then does not count
            in n either, as in the authors' code.

    Raises:
        ValueError: a share outside (0, 1], or NaN in `values`.
    """
    for name, share in (("chosen", chosen), ("rejected", rejected)):
        if not 0 < share <= 1:
            raise ValueError(f"select_tokens: {name} must lie in (0, 1], got {share}")
    if bool(torch.isnan(values).any()):
        raise ValueError("select_tokens: the values contain NaN, so they have no order")
    if not score_first_token:
        rest = segments.positions > 0
        selected = torch.zeros_like(rest)
        selected[rest] = select_tokens(values[rest], segments.narrow(rest), chosen=chosen, rejected=rejected)
        return selected
    return token_ranks(values, segments) < segments.broadcast(_wanted(segments, chosen, rejected))


def select_where(values: Tensor, segments: Segments, *, above: float) -> Tensor:
    """Chosen tokens with value > `above` and rejected ones with value < -`above`: bool `[N]`, perhaps none."""
    return torch.where(segments.is_chosen, values > above, values < -above)


def token_ranks(values: Tensor, segments: Segments) -> Tensor:
    """Place of every token in its completion, long `[N]`, 0 first: high values first in chosen completions,
    low ones first in rejected completions; earlier tokens first among equals."""
    # `values` may hold +0 and -0 or whole numbers: negation keeps their order and their ties.
    return _places(torch.where(segments.is_chosen, -values, values), segments)


def top_tokens(values: Tensor, segments: Segments, counts: Tensor) -> Tensor:
    """The `counts` (long `[C]`) highest values of every completion, the earliest among equals: bool `[N]`.

    The completions need not be pairs.
    """
    return _places(-values, segments) < segments.broadcast(counts)


def span_ids(selected: Tensor, segments: Segments) -> Tensor:
    """Numbers runs of neighbouring selected tokens: 0 where not selected, else 1, 2, ... within a completion.

    Args:
        selected: bool (or 0/1) `[N]`.

    Returns:
        Float `[N]`, the form of the column "spans".
    """
    selected = selected.bool()
    after = torch.zeros_like(selected)
    after[1:] = selected[:-1]
    starts = selected & ~(after & (segments.positions > 0))
    runs = starts.cumsum(0)  # runs begun so far, in all completions
    before = torch.cat([runs.new_zeros(1), runs])[segments.offsets[:-1]]
    return torch.where(selected, runs - segments.broadcast(before), 0).float()


def _places(values: Tensor, segments: Segments) -> Tensor:
    """Place of every token in its completion by value, long `[N]`, the least first, earlier tokens among equals."""
    order = torch.argsort(values, stable=True)
    order = order[torch.argsort(segments.ids[order], stable=True)]  # by completion, then by value, then by place
    ranks = torch.empty_like(order)
    ranks[order] = segments.positions
    return ranks


def _wanted(segments: Segments, chosen: float, rejected: float) -> Tensor:
    """Tokens to take of every completion, long `[2P]`."""
    lengths = segments.lengths.double()
    even = torch.arange(len(segments), device=lengths.device) % 2 == 0
    # 0.57 * 100 is 56.99999999999999 in binary and means 57.
    wanted = torch.where(even, chosen * lengths, rejected * lengths).add(1e-9).floor().long()
    return wanted.clamp(min=1)
