"""Spans as credit."""

from __future__ import annotations

import pytest
import torch

from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.errors import DataError
from tokengrain.method import CreditSource, make_credit


def batch(*spans: list[float], completions: int = 2) -> TokenBatch:
    made = [Completion(list(range(len(s))), None, {"spans": s}) for s in spans]
    samples = [
        Sample([1], made[i : i + completions], row=f"r{i // completions}") for i in range(0, len(made), completions)
    ]
    return TokenBatch.from_samples(samples)


def test_chosen_spans_gain_and_rejected_ones_lose() -> None:
    found = batch([0.0, 1.0, 2.0], [1.0, 0.0], [0.0], [0.0, 0.0, 7.0])
    credit = make_credit("spans")(found)
    assert credit.tolist() == [0, 1, 1, -1, 0, 0, 0, 0, -1]
    assert credit.is_floating_point()
    assert not credit.requires_grad
    # Renaming or merging spans changes nothing.
    torch.testing.assert_close(
        make_credit("spans")(found.with_columns(spans=found.columns["spans"].clamp(max=1))), credit
    )


def test_uncounted_tokens_are_left_out() -> None:
    chosen = Completion([1, 2, 3], [True, False, True], {"spans": [0.0, 3.0]})
    sample = Sample([1], [chosen, Completion([4], None, {"spans": [0.0]})])
    assert make_credit("spans")(TokenBatch.from_samples([sample])).tolist() == [0, 1, 0]


def test_what_it_needs() -> None:
    plain = TokenBatch.from_samples([Sample([1], [Completion([2]), Completion([3])], row="r0")])
    with pytest.raises(DataError, match=r"row r0: the data have no spans; got \[\]; expected data.spans"):
        make_credit("spans")(plain)
    with pytest.raises(DataError, match="need pairs; got '2 completions of 2 prompts'"):
        make_credit("spans")(batch([1.0], [0.0], completions=1))


def test_it_is_a_source() -> None:
    assert isinstance(make_credit("spans"), CreditSource)
    assert make_credit("spans").fingerprint() == make_credit("spans").fingerprint()
    assert make_credit("spans").name == "spans"
