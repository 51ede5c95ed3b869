"""Windowed entropy: estimators, windows, thresholds, counting and where to branch, against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.errors import RecipeError
from tokengrain.method import make_rollout_credit
from tokengrain.methods._entropy_window import (
    TRIGGERS,
    Mode,
    batch_threshold,
    branch_positions,
    completion_thresholds,
    high_entropy,
    measured,
    segment_quantiles,
    topk_entropy,
    trigger_table,
    window_means,
)
from tokengrain.methods.aepo import running

F64 = torch.float64
LENGTHS = [9, 0, 3, 5, 14, 1]
MODES: tuple[Mode, ...] = ("code", "paper", "token_semantic")


@pytest.fixture
def segments() -> Segments:
    return Segments.from_lengths(LENGTHS)


@pytest.fixture
def entropy(segments: Segments) -> Tensor:
    return 2 * torch.rand(segments.total, dtype=F64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def triggers(segments: Segments) -> Tensor:
    return torch.rand(segments.total, generator=torch.Generator().manual_seed(1)) < 0.5


def test_topk_entropy_is_a_lower_bound_and_exact_when_the_rest_is_one_token() -> None:
    logp = torch.randn(20, 9, dtype=F64, generator=torch.Generator().manual_seed(2)).log_softmax(1)
    full = -(logp.exp() * logp).sum(1)
    top = logp.sort(1, descending=True).values
    for k in range(1, 10):
        estimate = topk_entropy(top[:, :k])
        assert (estimate <= full + 1e-12).all()
        assert (topk_entropy(top[:, :k], tail=False) <= estimate + 1e-12).all()
        if k >= 8:
            torch.testing.assert_close(estimate, full)
    uniform = torch.full((1, 5), -math.log(5), dtype=F64)
    torch.testing.assert_close(topk_entropy(uniform), torch.tensor([math.log(5)], dtype=F64))
    assert topk_entropy(torch.tensor([[0.0, -math.inf, -math.inf]])).tolist() == [0.0]


@pytest.mark.parametrize("window", [1, 2, 4, 20])
@pytest.mark.parametrize("own", [False, True])
def test_window_means(segments: Segments, entropy: Tensor, window: int, own: bool) -> None:
    expected = []
    for row in segments.split(entropy):
        for t in range(len(row)):
            start = t if own else t + 1
            part = row[start : start + window]
            expected.append(float(part.mean()) if len(part) == window else math.nan)
    found = window_means(entropy, segments, window=window, own=own)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    if window == 1 and own:
        assert torch.equal(found, entropy)
    with pytest.raises(RecipeError, match="window = 0"):
        make_rollout_credit("aepo", triggers=None, window=0)


def test_windows_are_linear(segments: Segments, entropy: Tensor) -> None:
    other = entropy.flip(0)
    torch.testing.assert_close(
        window_means(2 * entropy + other, segments),
        2 * window_means(entropy, segments) + window_means(other, segments),
        equal_nan=True,
    )


def test_quantiles_are_those_of_numpy(segments: Segments, entropy: Tensor) -> None:
    for q in (0.0, 0.3, 0.5, 0.95, 1.0):
        found = segment_quantiles(entropy, segments, q)
        for row, value in zip(segments.split(entropy), found.tolist(), strict=True):
            assert math.isnan(value) if not len(row) else value == pytest.approx(np.quantile(row.numpy(), q), rel=1e-12)


def _released_threshold(row: list[float], window: int, percentile: float) -> float:
    """The released code's list of window means, as it is written there."""
    means: list[float] = []
    for i in range(len(row)):
        if len(row) - i - 1 >= window:
            means.append(float(np.mean(row[i + 1 : i + 1 + window])))
        else:
            means.append(float(np.mean(means)) if means else row[i])
    return float(np.percentile(means, percentile)) if means else 0.0


@pytest.mark.parametrize("window", [1, 4, 8])
def test_thresholds_are_those_of_the_released_code(segments: Segments, entropy: Tensor, window: int) -> None:
    found = completion_thresholds(entropy, segments, window=window)
    expected = [_released_threshold(row.tolist(), window, 95) for row in segments.split(entropy)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    assert batch_threshold(entropy, segments, window=window) == pytest.approx(float(np.median(expected)))


def test_thresholds_of_the_paper(segments: Segments, entropy: Tensor) -> None:
    each = [np.quantile(row.numpy(), 0.95) for row in segments.split(entropy) if len(row)]
    assert batch_threshold(entropy, segments, mode="paper") == pytest.approx(np.mean(each))
    pooled = np.quantile(entropy.numpy(), 0.95)
    assert batch_threshold(entropy, segments, mode="token_semantic") == pytest.approx(pooled)


@pytest.mark.parametrize("mode", MODES)
def test_counting(segments: Segments, entropy: Tensor, triggers: Tensor, mode: Mode) -> None:
    values = measured(entropy, segments, mode=mode)
    found = high_entropy(values, segments, threshold=1.0, triggers=triggers)
    rows = zip(segments.split(values), segments.split(triggers), strict=True)
    for c, (row, allowed) in enumerate(rows):
        flagged = [v for v, t in zip(row.tolist(), allowed.tolist(), strict=True) if t and v >= 1.0]
        low = [v for v, t in zip(row.tolist(), allowed.tolist(), strict=True) if t and v < 1.0]
        assert found.count[c] == len(flagged)
        assert found.below[c] == len(low)
        assert found.excess[c].item() == pytest.approx(sum(v - 1.0 for v in flagged))
    assert int(found.count.sum()) == int(found.mask.sum()) > 0
    free = high_entropy(values, segments, threshold=0.0)
    most = {"code": 4, "paper": 3, "token_semantic": 0}[mode]
    assert free.count.tolist() == [max(0, n - most) for n in LENGTHS]


@pytest.mark.parametrize("mode", MODES)
def test_a_shift_of_all_entropies_and_the_order_of_completions_change_no_count(mode: Mode) -> None:
    generator = torch.Generator().manual_seed(7)
    rows = [2 * torch.rand(n, dtype=F64, generator=generator) for n in (30, 40, 50)]

    def counts(parts: list[Tensor]) -> tuple[float, list[int]]:
        cut = Segments.from_lengths([len(p) for p in parts])
        joined = torch.cat(parts)
        tau = batch_threshold(joined, cut, mode=mode, quantile=0.8)
        return tau, high_entropy(measured(joined, cut, mode=mode), cut, threshold=tau).count.tolist()

    tau, found = counts(rows)
    moved, shifted = counts([r + 0.75 for r in rows])
    assert moved == pytest.approx(tau + 0.75)
    assert shifted == found
    turned, backwards = counts(rows[::-1])
    assert turned == pytest.approx(tau)
    assert backwards == found[::-1]


def test_the_running_threshold_starts_with_the_first() -> None:
    assert running(None, 2.0, 0.99) == 2.0
    assert running(2.0, 1.0, 0.99) == pytest.approx(1.99)


def test_trigger_words() -> None:
    marked = trigger_table(["\u0120Wait", "\u2581\u2581 because ", "SO", "Ġ"], ["wait", "because", "so", "Ġ"])
    assert marked.tolist() == [True, True, True, False]
    table = trigger_table(["a", "\u0120Wait", "waiting", "wait"])
    assert table.tolist() == [False, True, False, True]
    assert trigger_table(["a", "b"], ["b"]).tolist() == [False, True]
    assert bool(trigger_table(TRIGGERS).all())
    assert trigger_table(["a", "b"]).tolist() == [False, False]


def test_empty_batches() -> None:
    none = Segments.from_lengths([0, 0])
    values = measured(torch.zeros(0), none)
    assert high_entropy(values, none, threshold=1.0).count.tolist() == [0, 0]
    assert completion_thresholds(torch.zeros(0), none).tolist() == [0.0, 0.0]
    assert branch_positions(torch.zeros(0, dtype=torch.bool), none).shape == (0,)


def _slow_branches(flags: list[list[int]], window: int, limit: int | None) -> list[int]:
    out = []
    for row in flags:
        last, used = -window, 0
        for t, flag in enumerate(row):
            fires = bool(flag) and t - last >= window and (limit is None or used < limit)
            out.append(int(fires))
            used += fires
            last = t if flag else last
    return out


@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("limit", [None, 0, 1, 2])
def test_branches_start_at_each_stretch_of_windows_once(window: int, limit: int | None) -> None:
    generator = torch.Generator().manual_seed(3)
    cut = Segments.from_lengths([12, 0, 5, 30])
    flags = torch.rand(cut.total, generator=generator) < 0.3
    found = branch_positions(flags, cut, window=window, limit=limit)
    assert found.long().tolist() == _slow_branches([r.tolist() for r in cut.split(flags)], window, limit)
    assert bool((flags | ~found).all())
