"""Selection of tokens by credit: counts, ties, nesting, sides, and the numbering of runs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.loss import select_tokens, select_where, span_ids


def _by_hand(values: Tensor, segments: Segments, chosen: float, rejected: float) -> list[list[int]]:
    """Places of the selected tokens per completion, by sorting Python tuples."""
    places = []
    for c, row in enumerate(segments.split(values)):
        share, sign = (chosen, -1) if c % 2 == 0 else (rejected, 1)
        order = sorted(range(len(row)), key=lambda i: (sign * float(row[i]), i))
        count = max(1, math.floor(share * len(row) + 1e-9)) if len(row) else 0
        places.append(sorted(order[:count]))
    return places


def _places(selected: Tensor, segments: Segments) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in segments.split(selected)]


def _random(lengths: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Segments]:
    segments = Segments.from_lengths(lengths)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, (segments.total,), generator=generator).double() / 2, segments  # many ties


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.57, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_equals_sorting_by_hand(share: float, seed: int) -> None:
    values, segments = _random((7, 1, 0, 12, 100, 9), seed)
    selected = select_tokens(values, segments, chosen=share, rejected=1.0 - share / 2)
    assert _places(selected, segments) == _by_hand(values, segments, share, 1.0 - share / 2)


def test_shares_that_binary_numbers_miss() -> None:
    assert 0.57 * 100 < 57  # the trap
    segments = Segments.from_lengths([100, 100])
    selected = select_tokens(torch.randn(200), segments, chosen=0.57, rejected=0.29)
    assert segments.sum(selected.long()).tolist() == [57, 29]


def test_at_least_one_token_of_every_completion_that_has_any() -> None:
    segments = Segments.from_lengths([3, 2, 0, 1])
    selected = select_tokens(torch.randn(6), segments, chosen=0.01, rejected=0.01)
    assert segments.sum(selected.long()).tolist() == [1, 1, 0, 1]


def test_sets_are_nested_in_the_share() -> None:
    values, segments = _random((40, 31, 5, 8))
    previous = torch.zeros(segments.total, dtype=torch.bool)
    for share in (0.1, 0.2, 0.3, 0.5, 0.9, 1.0):
        selected = select_tokens(values, segments, chosen=share, rejected=share)
        assert not bool((previous & ~selected).any())
        previous = selected
    assert bool(previous.all())


def test_equal_values_give_the_earliest_tokens() -> None:
    segments = Segments.from_lengths([5, 5])
    assert _places(select_tokens(torch.zeros(10), segments, chosen=0.4, rejected=0.6), segments) == [[0, 1], [0, 1, 2]]
    signed = torch.tensor([0.0, -0.0, 0.0, -0.0, 0.0] * 2)
    assert _places(select_tokens(signed, segments, chosen=0.4, rejected=0.4), segments) == [[0, 1], [0, 1]]


def test_negated_values_swap_highest_and_lowest() -> None:
    values = torch.randn(20, dtype=torch.float64)
    segments, swapped = Segments.from_lengths([10, 10]), values.view(2, 10).flip(0).flatten()
    a = select_tokens(values, segments, chosen=0.3, rejected=0.4)
    b = select_tokens(-swapped, segments, chosen=0.4, rejected=0.3)
    assert torch.equal(a.view(2, 10), b.view(2, 10).flip(0))


def test_a_positive_factor_and_the_other_completions_change_nothing() -> None:
    values, segments = _random((7, 4, 9, 3))
    base = select_tokens(values, segments)
    assert torch.equal(select_tokens(3.7 * values, segments), base)
    order = [2, 3, 0, 1]
    rows, chosen = segments.split(values), segments.split(base)
    reordered = Segments.from_lengths([len(rows[i]) for i in order])
    selected = select_tokens(torch.cat([rows[i] for i in order]), reordered)
    assert torch.equal(selected, torch.cat([chosen[i] for i in order]))


def test_without_the_first_token() -> None:
    values, segments = _random((6, 6, 1, 2))
    values[segments.positions == 0] = torch.where(segments.is_chosen, 9.0, -9.0)[segments.positions == 0].double()
    with_first = select_tokens(values, segments, chosen=0.4, rejected=0.4)
    without = select_tokens(values, segments, chosen=0.4, rejected=0.4, score_first_token=False)
    assert bool(with_first[segments.positions == 0].all())
    assert not bool(without[segments.positions == 0].any())
    assert segments.sum(without.long()).tolist() == [2, 2, 0, 1]  # 0.4 of 5; nothing is left of one token


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan")])
def test_bad_shares_are_refused(share: float) -> None:
    segments = Segments.from_lengths([2, 2])
    with pytest.raises(ValueError, match="chosen must lie in"):
        select_tokens(torch.zeros(4), segments, chosen=share)
    with pytest.raises(ValueError, match="rejected must lie in"):
        select_tokens(torch.zeros(4), segments, rejected=share)


def test_values_without_an_order_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        select_tokens(torch.tensor([0.0, float("nan")]), Segments.from_lengths([1, 1]))


def test_by_threshold() -> None:
    segments = Segments.from_lengths([4, 4])
    values = torch.tensor([1.0, 0.5, -2.0, 0.6, 1.0, -0.5, -2.0, -0.6])
    assert _places(select_where(values, segments, above=0.5), segments) == [[0, 3], [2, 3]]
    assert not bool(select_where(values, segments, above=5.0).any())


def test_runs_are_numbered_within_their_completion() -> None:
    segments = Segments.from_lengths([5, 0, 3, 4])
    selected = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 0, 0, 1, 1])
    assert span_ids(selected, segments).tolist() == [1, 1, 0, 2, 2, 1, 0, 2, 0, 0, 1, 1]
    assert span_ids(torch.zeros(0), Segments.from_lengths([0, 0])).tolist() == []
    assert span_ids(torch.zeros(12), segments).tolist() == [0.0] * 12
