"""Normalisers, and the selection of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.errors import RecipeError
from tokengrain.loss import NORMALISERS, Counts, LossOutput, make_normaliser, select_tokens, select_where, span_ids
from tokengrain.method import OBJECTIVES, BoundObjective
from tokengrain.method import make_objective as make

F64 = torch.float64
LENGTHS = [(4, 2), (1, 6), (3, 3), (7, 1), (2, 5)]
SETTINGS = {
    "simpo": {"sft_weight": 0.3},
    "dpo": {"sft_weight": 0.2, "ld_alpha": 0.5},
    "tgdpo": {"alpha": 0.2},
}
CONSTANT = 7.5
TRAINED = {"aligndistil": "teacher_kl", "qrm": "token_scores"}
"""The quantity that carries the gradient, where it is not logps."""


def _vectors(objective: BoundObjective, names: Iterable[str]) -> list[dict[str, Tensor]]:
    """Per pair: flat vectors of all quantities."""
    generator = torch.Generator().manual_seed(3)
    drawn = [
        {name: torch.randn(sum(pair), dtype=F64, generator=generator) for name in ("logps", *names)} for pair in LENGTHS
    ]
    if objective.name == "ti_dpo":  # its token rewards are importances, which are at least 0
        drawn = [pair | {"token_rewards": pair["token_rewards"].abs()} for pair in drawn]
    return drawn


def _step(objective: BoundObjective, normaliser: str, cut: list[list[int]]) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradient per pair of a step whose pairs are cut into the given micro-batches."""
    names, trained = {objective.main, *objective.needs}, TRAINED.get(objective.name, "logps")
    pairs = _vectors(objective, sorted(objective.needs))
    for p in pairs:
        p |= {"token_scores": p["logps"]}
        p[trained] = p[trained].clone().requires_grad_()
    normalise = make_normaliser(normaliser, CONSTANT if normaliser == "constant" else None)
    batches = [Segments.from_lengths([n for i in batch for n in LENGTHS[i]]) for batch in cut]
    parts = [
        Counts.of(segments, pairs=objective.unit == "pairs", prompts=len(batch))
        for segments, batch in zip(batches, cut, strict=True)
    ]
    counts = sum(parts[1:], start=parts[0])
    total = torch.zeros((), dtype=F64)
    for segments, batch in zip(batches, cut, strict=True):
        output = objective(segments=segments, **{n: torch.cat([pairs[i][n] for i in batch]) for n in names})
        total = total + normalise(output, counts)
    return total.detach(), list(torch.autograd.grad(total, [p[trained] for p in pairs]))


@pytest.mark.filterwarnings("ignore:tgdpo")
@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_micro_batches_and_order(name: str, normaliser: str) -> None:
    objective = make(name, **SETTINGS.get(name, {}))
    loss, grads = _step(objective, normaliser, [[0, 1, 2, 3, 4]])
    for cut in ([[0], [1], [2], [3], [4]], [[3, 0, 4], [2, 1]], [[1], [4, 2, 0, 3]]):
        other_loss, other_grads = _step(objective, normaliser, cut)
        torch.testing.assert_close(other_loss, loss, rtol=1e-12, atol=1e-12)
        for a, b in zip(grads, other_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:tgdpo")
@pytest.mark.parametrize("garbage", [0.0, float("nan"), float("inf"), float("-inf"), 1e30])
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_padding_does_not_matter(name: str, garbage: float) -> None:
    objective = make(name, **SETTINGS.get(name, {}))
    lengths = [n for pair in LENGTHS for n in pair]
    segments = Segments.from_lengths(lengths)
    counts = Counts.of(segments, pairs=objective.unit == "pairs")
    trained = TRAINED.get(name, "logps")
    flat = {
        n: torch.cat([p[n] for p in _vectors(objective, sorted(objective.needs))]) for n in ("logps", *objective.needs)
    }
    flat = {objective.main if n == "logps" else n: values for n, values in flat.items()}
    expected = make_normaliser("mean")(objective(segments=segments, **flat), counts)
    width, mask = 14, torch.zeros(len(lengths), 14, dtype=torch.bool)
    for row, length in enumerate(lengths):  # right-padded, left-padded and with holes, in turn
        places = [range(length), range(width - length, width), range(0, 2 * length, 2)][row % 3]
        mask[row, list(places)] = True
    padded = {}
    for quantity, values in flat.items():
        array = torch.full(mask.shape, garbage, dtype=F64)
        array[mask] = values
        padded[quantity] = array.requires_grad_(quantity == trained)
    again = {n: Segments.from_padded(array, mask)[0] for n, array in padded.items()}
    loss = make_normaliser("mean")(objective(segments=Segments.from_padded(mask, mask)[1], **again), counts)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(loss, padded[trained])
    assert torch.equal(grad[~mask], torch.zeros_like(grad[~mask]))
    assert torch.isfinite(grad).all()


def test_the_normalisers_by_hand() -> None:
    segments = Segments.from_lengths([2, 1, 3, 2])
    counts = Counts.of(segments, pairs=True, prompts=2)
    assert counts == Counts(pairs=2, completions=4, tokens=8, chosen_tokens=5, prompts=2)
    output = LossOutput(torch.tensor([1.0, 3.0]), token_losses=torch.tensor([10.0]))
    term = 10 / 5
    assert make_normaliser("mean")(output, counts) == 4 / 2 + term
    assert make_normaliser("token_mean")(output, counts) == 4 / 8 + term
    assert make_normaliser("constant", 0.5)(output, counts) == 4 / 0.5 + term
    assert make_normaliser("sum")(output, counts) == 4 + term
    completions = LossOutput(torch.ones(4), unit="completions")
    assert make_normaliser("mean")(completions, counts) == 1
    assert make_normaliser("prompt_mean")(completions, counts) == 4 / 2
    with pytest.raises(ValueError, match="number of prompts"):
        make_normaliser("prompt_mean")(completions, Counts.of(segments, pairs=True))


def test_counts_add_up_and_travel_as_a_tensor() -> None:
    a = Counts.of(Segments.from_lengths([2, 1]), pairs=True)
    b = Counts.of(Segments.from_lengths([4, 0, 1, 1]), pairs=True)
    assert a + b == Counts(3, 6, 9, 7)
    assert Counts.from_tensor(a.to_tensor() + b.to_tensor()) == a + b
    assert Counts.of(Segments.from_lengths([2, 1, 5]), pairs=False) == Counts(0, 3, 8, 0)


@pytest.mark.parametrize(
    ("name", "constant", "message"),
    [
        ("meen", None, "did you mean 'mean'"),
        ("constant", None, "needs a positive normaliser_constant, got None"),
        ("constant", 0.0, "needs a positive normaliser_constant"),
        ("mean", 3.0, "takes no normaliser_constant"),
    ],
)
def test_bad_normalisers(name: str, constant: float | None, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_normaliser(name, constant)


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
