"""Rankings by words, BM25 and LSA; and negatives, drawn from a ranking in strata of ranks."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tokengrain.errors import DataError, require
from tokengrain.settings import check_choice

Strata = Sequence[tuple[int, int]]
STRATA: Strata = ((1, 100), (101, 500), (501, 1000))
Remainder = Literal["last", "first"]


def words(text: str) -> list[str]:
    """The words and numbers of a text, in small letters."""
    return re.findall(r"[^\W\d_]+|\d+", text.lower())


class BM25:
    """BM25 as Lucene computes it, over documents that are lists of words.

    score(q, d) = Σ_w log(1 + (N - n_w + ½) / (n_w + ½)) · f / (f + k1 (1 - b + b |d| / mean |d|))

    Args:
        documents: their words.
        k1, b: the defaults are those that Anserini tuned on MS MARCO passages.
    """

    def __init__(self, documents: Sequence[Sequence[str]], k1: float = 0.82, b: float = 0.68) -> None:
        require(documents, DataError, "BM25 needs documents, got none")
        self.count = len(documents)
        lengths = np.array([len(d) for d in documents], dtype=np.float64)
        norm = k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-9))
        found: dict[str, list[tuple[int, int]]] = {}
        for place, document in enumerate(documents):
            for word, times in Counter(document).items():
                found.setdefault(word, []).append((place, times))
        self.postings: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for word, entries in found.items():
            where, times = np.array(entries).T
            self.postings[word] = where, self._rarity(len(entries)) * times / (times + norm[where])

    def _rarity(self, documents: int) -> float:
        return math.log(1 + (self.count - documents + 0.5) / (documents + 0.5))

    def rarity(self, word: str) -> float:
        """Weight of a word that few documents have, nats."""
        return self._rarity(len(self.postings[word][0]) if word in self.postings else 0)

    def scores(self, query: Sequence[str]) -> np.ndarray:
        """The score of every document, float64 `[documents]`."""
        total = np.zeros(self.count)
        for word in query:
            if word in self.postings:
                where, weight = self.postings[word]
                total[where] += weight
        return total

    def ranking(self, query: Sequence[str]) -> list[int]:
        """All documents, the best first; of equal ones the earlier."""
        return best_first(self.scores(query))


def best_first(scores: np.ndarray) -> list[int]:
    return list(map(int, np.argsort(-scores, kind="stable")))


class LSA:
    """Latent semantic analysis: documents as vectors, the first singular vectors of their words' weights.

    A weight is log(1 + times) · rarity, a document's weights have length 1, and so has its vector.

    Args:
        documents: their words.
        dimensions: of the vectors; fewer where there are fewer documents or words.
    """

    def __init__(self, documents: Sequence[Sequence[str]], dimensions: int = 64, seed: int = 0) -> None:
        self._bm25 = BM25(documents)
        self._column = {word: i for i, word in enumerate(self._bm25.postings)}
        require(self._column, DataError, "the documents have no words to make vectors from")
        rows = torch.stack([self._weights(d).to_sparse() for d in documents]).coalesce()
        dimensions = min(dimensions, *rows.shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            left, size, self._right = torch.svd_lowrank(rows, q=dimensions, niter=4)
        self.vectors = torch.nn.functional.normalize(left * size, dim=1)

    def _weights(self, document: Sequence[str]) -> Tensor:
        weights = torch.zeros(len(self._column), dtype=torch.float64)
        for word, times in Counter(document).items():
            if word in self._column:
                weights[self._column[word]] = math.log1p(times) * self._bm25.rarity(word)
        return torch.nn.functional.normalize(weights, dim=0)

    def ranking(self, query: Sequence[str]) -> list[int]:
        """All documents, the nearest first."""
        return best_first((self.vectors @ (self._weights(query) @ self._right)).numpy())


def stratum_sizes(count: int, strata: int = 3, remainder: Remainder = "last") -> tuple[list[int], int]:
    """How many negatives each stratum gives, and how many more the first one gives again.

    Args:
        remainder: "last": what does not divide comes from the last stratum (the authors on MS MARCO); "first": it is
            drawn again from the first one, with replacement (theirs on Natural Questions).
    """
    check_choice("remainder", remainder, Remainder)
    each, over = divmod(count, strata)
    sizes = [each] * strata
    if remainder == "first":
        return sizes, over
    sizes[-1] += over
    return sizes, 0


def draw_negatives(
    ranking: Sequence[int],
    excluded: Sequence[bool],
    count: int,
    generator: random.Random,
    *,
    strata: Strata = STRATA,
    remainder: Remainder = "last",
) -> list[int]:
    """`count` documents of a ranking, by strata of ranks, none excluded; fewer where there are no more.

    Args:
        ranking: documents, the best first.
        excluded: per document, whether it may not be drawn: it is relevant, or shares its docid with one that is.
        strata: first and last rank of each, counted from 1. What a stratum lacks comes from the best of the rest.
    """
    sizes, again = stratum_sizes(count, len(strata), remainder)
    drawn: list[int] = []
    groups = [[d for d in ranking[low - 1 : high] if not excluded[d]] for low, high in strata]
    for group, size in zip(groups, sizes, strict=True):
        drawn += generator.sample(group, min(size, len(group)))
    if again and groups[0]:
        drawn += generator.choices(groups[0], k=again)
    taken = set(drawn)
    rest = (d for d in ranking if not excluded[d] and d not in taken)
    return drawn + [d for d, _ in zip(rest, range(count - len(drawn)))]
