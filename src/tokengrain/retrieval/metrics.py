"""How good a ranking is: MRR, recall, precision, hits, nDCG and average precision, one number per query.

Documents that share a docid are tied: a model cannot put one before the other. What a metric gives for them is its
mean over their orders, all equally likely, so that no number depends on chance.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from tokengrain.errors import DataError, require
from tokengrain.settings import nearest

DEFAULT_METRICS = ("MRR@10", "Hit@1", "Hit@10", "R@1", "R@5", "R@10", "NDCG@10")


class Tie(NamedTuple):
    """Documents of one rank: how many stand before it, how many are in it, how many of these are relevant."""

    before: int
    size: int
    relevant: int


class Ranking(NamedTuple):
    """A ranked list as ties, in order, without documents that it has twice; `relevant`: how many there are in all."""

    ties: list[Tie]
    relevant: int

    @classmethod
    def of(cls, ranked: Sequence[Any], truth: Collection[Hashable]) -> Ranking:
        ties: list[Tie] = []
        seen: set[Hashable] = set()
        relevant = set(truth)
        for entry in ranked:
            tied = entry if isinstance(entry, (list, tuple, set, frozenset)) else [entry]
            new = set(tied) - seen
            if new:
                ties.append(Tie(len(seen), len(new), len(new & relevant)))
                seen |= new
        return cls(ties, len(relevant))

    @property
    def length(self) -> int:
        return sum(tie.size for tie in self.ties)


def _found(ranking: Ranking, k: int) -> float:
    """Relevant documents among the first k."""
    return sum(t.relevant * min(max(k - t.before, 0), t.size) / t.size for t in ranking.ties)


def recall(ranking: Ranking, k: int) -> float:
    return _found(ranking, k) / ranking.relevant


def precision(ranking: Ranking, k: int) -> float:
    """Of the k first, or of all that there are if they are fewer."""
    return _found(ranking, k) / max(min(k, ranking.length), 1)


def hit(ranking: Ranking, k: int) -> float:
    miss = 1.0
    for tie in ranking.ties:
        taken = min(max(k - tie.before, 0), tie.size)
        miss *= math.comb(tie.size - tie.relevant, taken) / math.comb(tie.size, taken)
    return 1 - miss


def reciprocal_rank(ranking: Ranking, k: int) -> float:
    """1 / rank of the first relevant document; 0 if that is beyond k."""
    first = next((tie for tie in ranking.ties if tie.relevant), None)
    if first is None:
        return 0.0
    before, n, r = first
    orders = math.comb(n, r)
    ranks = range(1, min(n - r + 1, k - before) + 1)
    return sum(math.comb(n - j, r - 1) / orders / (before + j) for j in ranks)


def ndcg(ranking: Ranking, k: int) -> float:
    """Gain 1 for a relevant document, discounted by log2(rank + 1), over that of a ranking with all of them first.

    As the authors of DDRO have it, the ideal is not cut at k.
    """
    gain = sum(t.relevant / t.size / math.log2(t.before + j + 1) for t in ranking.ties for j in _ranks(t, k))
    return gain / sum(1 / math.log2(rank + 1) for rank in range(1, ranking.relevant + 1))


def average_precision(ranking: Ranking, k: int) -> float:
    total, found = 0.0, 0
    for before, n, r in ranking.ties:
        for j in _ranks(Tie(before, n, r), k):
            # Relevant ones at and before place j of the tie, if that at j is relevant.
            so_far = found + 1 + ((j - 1) * (r - 1) / (n - 1) if n > 1 else 0)
            total += r / n * so_far / (before + j)
        found += r
    return total / ranking.relevant


def _ranks(tie: Tie, k: int) -> range:
    return range(1, min(tie.size, k - tie.before) + 1)


METRICS: Mapping[str, Callable[[Ranking, int], float]] = {
    "MRR": reciprocal_rank,
    "R": recall,
    "P": precision,
    "Hit": hit,
    "NDCG": ndcg,
    "MAP": average_precision,
}


def ranking_metrics(
    ranked: Sequence[Sequence[Any]],
    truth: Sequence[Collection[Hashable]],
    metrics: Sequence[str] = DEFAULT_METRICS,
) -> list[dict[str, float]]:
    """Metrics of each query; means over them are the usual figures.

    Args:
        ranked: per query its documents, best first; an entry that is a list or tuple is of documents that are tied.
        truth: per query the relevant documents; all metrics of a query without any are 0.
        metrics: names such as "MRR@10", "R@5" (recall), "P@5", "Hit@1", "NDCG@10", "MAP@20"; without @k of the whole
            list.

    Raises:
        DataError: an unknown metric.
    """
    wanted: dict[str, tuple[Callable[[Ranking, int], float], int | None]] = {}
    for name in metrics:
        found = re.fullmatch(r"(\w+?)(?:@([1-9]\d*))?", name)
        kind = found[1] if found else name
        require(kind in METRICS, DataError, f"there is no metric {name!r}{nearest(kind, METRICS)}")
        assert found is not None
        wanted[name] = METRICS[kind], int(found[2]) if found[2] else None
    results = []
    for listed, relevant in zip(ranked, truth, strict=True):
        ranking = Ranking.of(listed, relevant)
        results.append(
            {name: f(ranking, k or max(ranking.length, 1)) if relevant else 0.0 for name, (f, k) in wanted.items()}
        )
    return results


def mean_metrics(per_query: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over queries."""
    return {name: math.fsum(q[name] for q in per_query) / len(per_query) for name in per_query[0]}
