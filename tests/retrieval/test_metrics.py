"""Metrics of rankings, against ir-measures and against all orders of ties."""

from __future__ import annotations

import itertools
import random
from statistics import fmean
from typing import Any

import pytest

from tokengrain.errors import DataError, RecipeError
from tokengrain.retrieval.metrics import mean_metrics, ranking_metrics
from tokengrain.worlds import load_world

NAMES = ("MRR@3", "MRR", "R@2", "R@5", "P@3", "Hit@1", "Hit@3", "NDCG@4", "MAP@4", "MAP")


def one(ranked: Any, truth: Any, names: Any = NAMES) -> dict[str, float]:
    return ranking_metrics([ranked], [truth], names)[0]


def test_a_perfect_ranking() -> None:
    assert set(one(list("abc"), {"a", "b", "c"}, ("MRR@10", "R@3", "P@3", "Hit@1", "NDCG@10", "MAP@10")).values()) == {
        1.0
    }


def test_metrics_are_those_of_ir_measures() -> None:
    ir = pytest.importorskip("ir_measures")
    pairs = {"RR@10": "MRR@10", "R@5": "R@5", "P@5": "P@5", "Success@1": "Hit@1", "AP": "MAP", "nDCG@20": "NDCG@20"}
    draw = random.Random(0)
    documents = [f"d{i}" for i in range(20)]
    ranked = [draw.sample(documents, 20) for _ in range(30)]
    truth = [set(draw.sample(documents, draw.randint(1, 4))) for _ in ranked]
    qrels = [ir.Qrel(str(q), d, 1) for q, t in enumerate(truth) for d in t]
    run = [ir.ScoredDoc(str(q), d, -float(i)) for q, r in enumerate(ranked) for i, d in enumerate(r)]
    mine = ranking_metrics(ranked, truth, tuple(pairs.values()))
    for theirs in ir.iter_calc([ir.parse_measure(name) for name in pairs], qrels, run):
        assert mine[int(theirs.query_id)][pairs[str(theirs.measure)]] == pytest.approx(theirs.value, abs=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_ties_count_with_the_mean_over_their_orders(seed: int) -> None:
    draw = random.Random(seed)
    documents = list("abcdefg")
    draw.shuffle(documents)
    cuts = sorted(draw.sample(range(1, 7), 2))
    ties = [documents[a:b] for a, b in zip([0, *cuts], [*cuts, 7])]
    truth = set(draw.sample("abcdefgz", 3))
    orders = [list(itertools.chain(*o)) for o in itertools.product(*(list(itertools.permutations(t)) for t in ties))]
    each = [one(order, truth) for order in orders]
    expected = {name: fmean(m[name] for m in each) for name in NAMES}
    assert one(ties, truth) == pytest.approx(expected, abs=1e-12)


def test_a_document_counts_once() -> None:
    assert one(["x", "a", "a", "b"], {"a", "b"}, ("R@3", "MRR")) == {"R@3": 1.0, "MRR": 0.5}
    assert one([("a", "a"), "a"], {"a"}, ("R@1", "P@3")) == {"R@1": 1.0, "P@3": 1.0}


def test_what_is_always_true() -> None:
    draw = random.Random(1)
    ranked = [draw.sample(range(30), 15) for _ in range(50)]
    truth = [set(draw.sample(range(30), 3)) for _ in ranked]
    for m in ranking_metrics(ranked, truth, ("R@1", "R@5", "R@10", "MRR@10", "Hit@10")):
        assert m["R@1"] <= m["R@5"] <= m["R@10"]
        assert m["MRR@10"] <= m["Hit@10"]


def test_no_relevant_document_and_no_ranking() -> None:
    per_query = ranking_metrics([["a"], []], [set(), {"a"}], ("MRR@10", "NDCG@10", "P@1"))
    assert per_query == [{"MRR@10": 0.0, "NDCG@10": 0.0, "P@1": 0.0}] * 2
    assert mean_metrics(per_query)["MRR@10"] == 0


@pytest.mark.parametrize("name", ["MMR@10", "MRR@0", "MRR@x", ""])
def test_an_unknown_metric(name: str) -> None:
    with pytest.raises(DataError, match="there is no metric"):
        ranking_metrics([["a"]], [{"a"}], (name,))


def test_the_library_refuses_what_would_have_no_effect() -> None:
    world = load_world("world://library")
    with pytest.raises(RecipeError, match="slope must be None, got 2"):
        world.pairs(slope=2.0)
    with pytest.raises(RecipeError, match="the ranking is exact, nothing is sampled; got 8 samples"):
        world.evaluate(None, n=8)
