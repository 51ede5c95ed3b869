"""Whether credit points at the right tokens of a completion: for worlds that know which tokens matter."""

from __future__ import annotations

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.evaluation.credit import auc, lowest_hits

TOP = 3


def pointing_scores(
    credit: Tensor, marked: Tensor, among: Tensor, segments: Segments, *, low: bool = True
) -> dict[str, float]:
    """How well credit points at the marked tokens of each completion, whatever it says about others.

    Only completions with a marked token count, each the same. Credit that is equal for all tokens of a completion, such
    as its outcome, is at chance in each of these.

    Args:
        credit: `[N]`.
        marked: bool `[N]`, the tokens to point at.
        among: bool `[N]`, the tokens they are compared with in `auc_inside`.
        segments: cuts `[N]` into completions.
        low: whether low credit points at a token; False: high credit.

    Returns:
        `auc_inside`: chance that a marked token is pointed at more than another of `among` in the same completion, a
        tie counting half; `place1`: share of completions whose most pointed-at token is marked; `place3`: of the three
        most pointed-at tokens (or as many as are marked, if fewer), the share that is marked: with one marked token,
        how often it is among the three; `share`: of the sum of |credit| over all tokens of the completion, the part at
        marked tokens; `place1_chance` and `place3_chance`: what credit without knowledge reaches (the first also for
        `share`). NaN without a marked token. Ties count by expectation, and so does a completion whose credit is all 0.
    """
    credit, marked, among = (
        credit.detach().cpu().double(),
        marked.bool().cpu(),
        among.bool().cpu() | marked.bool().cpu(),
    )
    pointed = credit if low else -credit
    numbers = segments.sum(marked.double())
    has = numbers > 0
    if not has.any():
        names = ("auc_inside", "place1", "place3", "share", "place1_chance", "place3_chance")
        return dict.fromkeys(names, float("nan"))
    places = segments.lengths.clamp(max=TOP)
    reachable = torch.minimum(places.double(), numbers)
    hits = lowest_hits(pointed, marked, segments, places) * places / reachable
    sizes, chance = segments.sum(credit.abs()), segments.mean(marked.double())
    at_marked = segments.sum(credit.abs() * marked)
    share = torch.where(sizes > 0, at_marked / torch.where(sizes > 0, sizes, 1.0), chance)
    parts = zip(segments.split(pointed), segments.split(marked), segments.split(among), strict=True)
    inside = torch.tensor([auc(-p[a], m[a]) for p, m, a in parts if bool(m.any())], dtype=torch.float64)
    return {
        "auc_inside": float(inside.nanmean()),
        "place1": float(lowest_hits(pointed, marked, segments)[has].mean()),
        "place3": float(hits[has].mean()),
        "share": float(share[has].mean()),
        "place1_chance": float(chance[has].mean()),
        "place3_chance": float((places * chance / reachable)[has].mean()),
    }
