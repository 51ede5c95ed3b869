"""Scores of completions, best of n, and pair accuracy by length."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import get_args

import pytest
import torch
from tests.training.tiny import make_samples, tiny_llama

from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.evaluation.statistics import accuracy_by_length, best_of, score_completions
from tokengrain.models import reward_model_from
from tokengrain.scoring.token_scores import Pooling


def groups(*lengths: tuple[int, ...]) -> TokenBatch:
    """Prompts whose completions have these lengths; the token ids count up from 1."""
    samples, token = [], 1
    for row, several in enumerate(lengths):
        completions = []
        for n in several:
            completions.append(Completion(list(range(token, token + n))))
            token += n
        samples.append(Sample([1], completions, row=row))
    return TokenBatch.from_samples(samples)


def own_ids(batch: TokenBatch) -> torch.Tensor:
    return batch.labels.float()


def test_mean_and_never_the_sum() -> None:
    batch = groups((2, 4), (1,))
    assert score_completions(own_ids, batch).tolist() == [1.5, 4.5, 7.0]
    assert score_completions(own_ids, batch, "last").tolist() == [2.0, 6.0, 7.0]


def test_saying_it_twice_changes_nothing() -> None:
    once = TokenBatch.from_samples([Sample([1], [Completion([4, 8]), Completion([5])])])
    twice = TokenBatch.from_samples([Sample([1], [Completion([4, 4, 8, 8]), Completion([5, 5])])])
    assert torch.equal(score_completions(own_ids, once), score_completions(own_ids, twice))


def test_completions_without_counted_tokens_never_win() -> None:
    samples = [Sample([1], [Completion([3], [False]), Completion([2]), Completion([9], [False])])]
    batch = TokenBatch.from_samples(samples)
    for pooling in get_args(Pooling):
        scores = score_completions(lambda b: -own_ids(b), batch, pooling)
        assert scores.tolist() == [-math.inf, -2.0, -math.inf]
        assert best_of(batch, scores).tolist() == [1]


def test_a_models_scores_do_not_depend_on_batch_or_layout() -> None:
    torch.manual_seed(0)
    model = reward_model_from(tiny_llama().double())
    samples = make_samples(5, completions=3)
    whole = score_completions(model, TokenBatch.from_samples(samples))
    singles = [
        score_completions(model, TokenBatch.from_samples([Sample(s.prompt_ids, [c])]))
        for s in samples
        for c in s.completions
    ]
    torch.testing.assert_close(whole, torch.cat(singles), atol=1e-9, rtol=1e-9)
    assert not whole.requires_grad
    assert model.training  # as it was


def test_best_of_each_prompt() -> None:
    batch = groups((1, 1, 1), (1,), (1, 1))
    assert best_of(batch, torch.tensor([0.0, 2.0, 1.0, -5.0, 3.0, 3.0])).tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match=r"expected \(6,\)"):
        best_of(batch, torch.zeros(5))
    with pytest.raises(ValueError, match="completion 2 is NaN"):
        best_of(batch, torch.tensor([0.0, 1.0, math.nan, 0.0, 0.0, 0.0]))


def test_accuracy_by_length_shows_a_length_preference() -> None:
    """A model that scores by length alone is right on half of these pairs, and it shows where."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 50, (400,), generator=generator)
    lengths[1::2] += lengths[0::2] == lengths[1::2]
    found = accuracy_by_length(lengths.double(), lengths)
    assert sum(b.pairs for b in found) == 200
    assert all(90 >= b.pairs >= 30 for b in found)
    assert all(a.high < b.low for a, b in pairwise(found))
    assert found[0].accuracy.value == 0
    assert found[-1].accuracy.value == 1
    assert all(b.longer_preferred == 1 for b in found)
    assert (found[0].longer_chosen, found[-1].longer_chosen) == (0, 1)
    fair = accuracy_by_length(torch.randn(400, generator=generator), lengths)
    assert all(0.25 < b.longer_preferred < 0.75 for b in fair)


def test_accuracy_by_length_of_ties() -> None:
    scores = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    lengths = torch.tensor([2, 2, 2, 2, 9, 2, 9, 2])
    short, long = accuracy_by_length(scores, lengths, buckets=2)
    assert (short.low, short.high, short.pairs, short.accuracy.value) == (0, 0, 2, 0.75)
    assert (long.low, long.high, long.pairs, long.accuracy.value) == (7, 7, 2, 0.5)
    assert math.isnan(short.longer_preferred)
    (one,) = accuracy_by_length(scores[:4], lengths[:4], buckets=5)  # all differences are 0: one bucket
    assert one.pairs == 2
    with pytest.raises(ValueError, match="both"):
        accuracy_by_length(scores, lengths[:-1])


def test_accuracy_of_scores_that_are_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="the score of completion 1 is NaN"):
        accuracy_by_length(torch.tensor([0.0, float("nan")]), torch.tensor([1, 2]))
