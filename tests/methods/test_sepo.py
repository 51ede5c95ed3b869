"""SePO."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.examples import F64, Example, example, gradient, mean_loss
from tokengrain.batch import Segments
from tokengrain.loss import LossOutput, select_tokens
from tokengrain.methods.sepo import sepo_loss, sepo_reads
from tokengrain.methods.simpo import simpo_loss


def _selected(x: Example) -> Tensor:
    return select_tokens(x.token_rewards, x.segments, chosen=0.5, rejected=0.4)


def test_every_token_selected_is_simpo_in_value_and_gradient() -> None:
    x = example()
    every = torch.ones(x.segments.total)

    def sepo(logps: Tensor) -> Tensor:
        return mean_loss(sepo_loss(logps, x.segments, selected=every, gamma=1.7, margin=0.4), x.segments)

    def simpo(logps: Tensor) -> Tensor:
        return mean_loss(simpo_loss(logps, x.segments, beta=1.7, gamma=0.4), x.segments)

    assert sepo(x.logps).item() == simpo(x.logps).item()
    assert torch.equal(gradient(sepo, x.logps), gradient(simpo, x.logps))


@pytest.mark.parametrize(("gamma", "margin"), [(2.1, 0.0), (1.0, 0.6)])
def test_closed_form_gradient_and_exact_zeros(gamma: float, margin: float) -> None:
    x = example()
    selected = _selected(x)
    settings = {"selected": selected, "gamma": gamma, "margin": margin}
    u = sepo_loss(x.logps, x.segments, **settings).metrics["rewards/margins"]
    count = x.segments.sum(selected.to(F64))
    c = gamma * torch.sigmoid(margin - u).repeat_interleave(2) / (x.pairs * count)
    signed = x.segments.broadcast(c) * torch.where(x.segments.is_chosen, -1.0, 1.0)
    expected = torch.where(selected, signed, 0.0)
    found = gradient(lambda p: mean_loss(sepo_loss(p, x.segments, **settings), x.segments), x.logps)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert bool((found[~selected] == 0).all())
    assert bool((found[selected] != 0).all())


def test_log_2_at_equal_scores_and_monotone() -> None:
    segments, selected = Segments.from_lengths([2, 3]), torch.tensor([1, 0, 1, 1, 0])

    def loss(chosen: float, margin: float = 0.0) -> float:
        logps = torch.tensor([chosen, -9.0, -1.0, -2.0, -9.0], dtype=F64)
        return sepo_loss(logps, segments, selected=selected, margin=margin).losses.item()

    assert loss(-1.5) == pytest.approx(math.log(2))
    assert loss(-1.4) < loss(-1.5) < loss(-1.6)
    assert loss(-1.5, 0.2) > loss(-1.5, 0.1) > loss(-1.5)


def test_a_side_without_selected_tokens_counts_as_zero() -> None:
    x = example((3, 2, 2, 4, 0, 2))
    selected = torch.tensor([1, 1, 0, 1, 0, 1, 1, 0, 0, 0, 0, 1, 1])
    output = sepo_loss(x.logps, x.segments, selected=selected, margin=0.3)
    assert output.losses[1:].tolist() == [0, 0]
    alone = sepo_loss(x.logps[:5], Segments.from_lengths([3, 2]), selected=selected[:5], margin=0.3)
    torch.testing.assert_close(mean_loss(output, x.segments), alone.losses[0] / 3)  # stays in the count
    grad = torch.autograd.grad(output.losses.sum(), x.logps)[0]
    assert bool((grad[5:] == 0).all())
    assert torch.isfinite(grad).all()
    for name, value in {"rewards/accuracies": 0.5, "rewards/margins": 0.0}.items():  # nothing is compared with nothing
        assert output.metrics[name][1:].tolist() == [value, value]
        assert output.metrics[name][0] == alone.metrics[name][0]


def test_only_selected_tokens_matter() -> None:
    """Scored on them alone, loss, gradient and metrics are the same; garbage elsewhere is not seen."""
    x = example()
    selected = _selected(x).to(F64)
    keep = sepo_reads(x.segments, selected=selected)
    whole = sepo_loss(x.logps, x.segments, selected=selected)
    narrow = sepo_loss(x.logps[keep], x.segments.narrow(keep), selected=selected[keep])
    torch.testing.assert_close(narrow.losses, whole.losses)
    torch.testing.assert_close(narrow.metrics, whole.metrics)
    grads = [torch.autograd.grad(o.losses.sum(), x.logps)[0] for o in (whole, narrow)]
    torch.testing.assert_close(*grads)
    for garbage in (float("nan"), float("-inf"), 1e30):
        other = sepo_loss(torch.where(keep, x.logps, garbage), x.segments, selected=selected)
        assert torch.equal(other.losses, whole.losses)


def test_order_and_number_of_pairs_do_not_matter() -> None:
    x = example()
    selected = _selected(x)
    whole = sepo_loss(x.logps, x.segments, selected=selected).losses
    pieces = [v.split(x.segments.lengths.tolist()) for v in (x.logps, selected)]

    def of(completions: list[int]) -> LossOutput:
        logps, chosen = (torch.cat([p[c] for c in completions]) for p in pieces)
        return sepo_loss(logps, Segments.from_lengths([len(pieces[0][c]) for c in completions]), selected=chosen)

    torch.testing.assert_close(of([4, 5, 2, 3, 0, 1]).losses, whole.flip(0))
    torch.testing.assert_close(of([2, 3]).losses, whole[1:2])


def test_metrics() -> None:
    x = example()
    selected = _selected(x)
    metrics = sepo_loss(x.logps, x.segments, selected=selected, gamma=3.0).metrics
    rows = [row[keep].detach() for row, keep in zip(x.segments.split(x.logps), x.segments.split(selected), strict=True)]
    assert metrics["selected/chosen"].tolist() == [len(row) for row in rows[0::2]]
    assert metrics["selected/rejected"].tolist() == [len(row) for row in rows[1::2]]
    torch.testing.assert_close(metrics["rewards/chosen"], torch.stack([3 * row.mean() for row in rows[0::2]]))
    torch.testing.assert_close(metrics["logps/rejected"], torch.stack([row.sum() for row in rows[1::2]]))
    assert all(not v.requires_grad and v.shape == (3,) for v in metrics.values())


@pytest.mark.parametrize("selected", [torch.ones(3), torch.ones(18, 1)])
def test_a_selection_of_another_batch_is_refused(selected: Any) -> None:
    x = example()
    with pytest.raises(ValueError, match="selected has shape"):
        sepo_loss(x.logps, x.segments, selected=selected)
