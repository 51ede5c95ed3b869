"""The loss of a step does not depend on how it is cut, padded or ordered; every objective, float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.errors import RecipeError
from tokengrain.loss import NORMALISERS, Counts, LossOutput, make_normaliser
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


def _vectors(names: Sequence[str]) -> list[dict[str, Tensor]]:
    """Per pair: flat vectors of all quantities."""
    generator = torch.Generator().manual_seed(3)
    return [
        {name: torch.randn(sum(pair), dtype=F64, generator=generator) for name in ("logps", *names)} for pair in LENGTHS
    ]


def _step(objective: BoundObjective, normaliser: str, cut: list[list[int]]) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradient per pair of a step whose pairs are cut into the given micro-batches."""
    names, trained = {objective.main, *objective.needs}, TRAINED.get(objective.name, "logps")
    pairs = _vectors(sorted(objective.needs))
    for p in pairs:
        p |= {"token_scores": p["logps"]}
        p[trained] = p[trained].clone().requires_grad_()
    normalise = make_normaliser(normaliser, CONSTANT if normaliser == "constant" else None)  # type: ignore[arg-type]
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
    flat = {n: torch.cat([p[n] for p in _vectors(sorted(objective.needs))]) for n in ("logps", *objective.needs)}
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
        make_normaliser(name, constant)  # type: ignore[arg-type]
