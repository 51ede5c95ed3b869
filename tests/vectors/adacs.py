"""AdaCS: supervised data whose length follows difficulty (ARES, arXiv 2510.08457, section 3.1).

Every prompt was sampled several times by a strong model; its pass rate says how hard it is. The target length of a
pass rate p lies on the line between the medians of what was never and of what was always solved,

L(p) = (1 - p) L(0) + p L(1),

per source. Kept are, in every bracket of a source, the responses whose lengths are nearest to the line, the same
number from each bracket, those of p = 1 included. The authors publish no code of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from tokengrain.errors import DataError, require

EIGHTHS = tuple(k / 8 for k in range(9))


@dataclass(frozen=True)
class AdaptiveLengths:
    """What AdaCS chose.

    Attributes:
        target: length by (source, pass rate), tokens.
        selected: the responses to keep, in order.
    """

    target: dict[tuple[str, float], float]
    selected: list[int]


def adacs_select(
    sources: Sequence[str],
    pass_rates: Sequence[float],
    lengths: Sequence[float],
    *,
    per_bracket: int,
    levels: Sequence[float] = EIGHTHS,
) -> AdaptiveLengths:
    """Choose responses by their lengths.

    Args:
        sources, pass_rates, lengths: one per response; lengths in tokens.
        per_bracket: how many to keep of each source and pass rate; ties go to the earlier one. A bracket with fewer
            gives all it has.
        levels: the pass rates there are, 0 and 1 among them.

    Raises:
        DataError: a source without responses of pass rate 0, or of 1, so that it has no line; or a pass rate that
            is not one of the levels.
    """
    brackets: dict[tuple[str, float], list[int]] = {(s, p): [] for s in dict.fromkeys(sources) for p in levels}
    for i, (source, rate) in enumerate(zip(sources, pass_rates, strict=True)):
        level, one = min(levels, key=_distance_to(rate)), f"one of {list(levels)}"
        fits = abs(level - rate) <= 1e-6
        require(fits, DataError, "the pass rate is none of the levels", row=i, value=rate, expected=one)
        brackets[source, level].append(i)
    target, selected = {}, []
    for source in dict.fromkeys(sources):
        short, long = (_median(source, p, brackets, lengths) for p in (1.0, 0.0))
        for p in levels:
            goal = target[source, p] = (1 - p) * long + p * short
            distance = _distance_to(goal)
            near = sorted(brackets[source, p], key=lambda i: distance(lengths[i]))
            selected += near[:per_bracket]
    return AdaptiveLengths(target, sorted(selected))


def _distance_to(goal: float) -> Callable[[float], float]:
    return lambda value: abs(value - goal)


def _median(source: str, rate: float, brackets: dict[tuple[str, float], list[int]], lengths: Sequence[float]) -> float:
    found = [lengths[i] for i in brackets.get((source, rate), [])]
    expected = "responses at pass rates 0 and 1: their median lengths are the ends of the line"
    require(found, DataError, f"source {source!r} has no response with pass rate {rate:g}", expected=expected)
    return float(median(found))
