"""BM25 and negatives by strata."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from tokengrain.errors import DataError
from tokengrain.retrieval.words import BM25, draw_negatives, stratum_sizes, words

CORPUS = ["The cat sat on the mat.", "Dogs and cats; cats and dogs!", "A mat, a mat: 3 mats", "nothing here", "dog"]


def test_words() -> None:
    assert words("It's 3 Über-mats_x") == ["it", "s", "3", "über", "mats", "x"]


def test_bm25_is_that_of_bm25s() -> None:
    bm25s = pytest.importorskip("bm25s")
    corpus = [words(text) for text in CORPUS]
    theirs = bm25s.BM25(method="lucene", k1=0.82, b=0.68)
    theirs.index(corpus, show_progress=False)
    for query in ("cat mat", "dogs dog", "3"):
        np.testing.assert_allclose(BM25(corpus).scores(words(query)), theirs.get_scores(words(query)), rtol=1e-5)


def test_unknown_words_and_equal_scores() -> None:
    bm25 = BM25([words(text) for text in CORPUS])
    assert bm25.ranking(["nowhere"]) == [0, 1, 2, 3, 4]
    assert bm25.ranking(["mat"])[0] == 2
    with pytest.raises(DataError, match="needs documents"):
        BM25([])


@pytest.mark.parametrize(
    ("count", "remainder", "sizes", "again"),
    [(16, "last", [5, 5, 6], 0), (8, "first", [2, 2, 2], 2), (1, "first", [0, 0, 0], 1), (1, "last", [0, 0, 1], 0)],
)
def test_sizes_of_strata(count: int, remainder: Any, sizes: list[int], again: int) -> None:
    assert stratum_sizes(count, remainder=remainder) == (sizes, again)


def test_negatives_come_from_their_strata_and_never_from_what_is_excluded() -> None:
    ranking = list(range(1000))
    excluded = [d % 10 == 0 for d in ranking]
    drawn = draw_negatives(ranking, excluded, 16, random.Random(0))
    assert len(set(drawn)) == 16
    assert not any(excluded[d] for d in drawn)
    assert [sum(low <= d < high for d in drawn) for low, high in ((0, 100), (100, 500), (500, 1000))] == [5, 5, 6]
    assert drawn != draw_negatives(ranking, excluded, 16, random.Random(1))


def test_a_short_ranking_gives_its_best_for_what_strata_lack() -> None:
    drawn = draw_negatives([3, 1, 0, 2], [False, True, False, False], 5, random.Random(0))
    assert sorted(drawn) == [0, 2, 3]
