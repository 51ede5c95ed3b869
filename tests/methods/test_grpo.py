"""GRPO, DAPO, Dr. GRPO: the loss against its plain form, KL estimators, advantages within groups, filter, penalty."""

from __future__ import annotations

import math
import statistics
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.rollouts import F64, Rollouts, plain_token_loss, rollouts, rows
from tokengrain.batch import Segments
from tokengrain.errors import RecipeError
from tokengrain.loss import NORMALISERS, Counts, LossOutput, make_normaliser
from tokengrain.method import make_rollout_credit
from tokengrain.methods._clipped import kl_estimate
from tokengrain.methods._shaping import GroupStatistics
from tokengrain.methods.grpo import group_advantages, grpo_loss, informative_groups, overlong_penalty


def _loss(x: Rollouts, **settings: Any) -> LossOutput:
    return grpo_loss(x.logps, x.segments, old_logps=x.old_logps, advantages=x.advantages, **settings)


def _same(x: Rollouts, fast: Tensor, slow: Tensor) -> None:
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.gradient(fast), x.gradient(slow), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cap", [None, 1.4])
@pytest.mark.parametrize("high", [None, 0.28])
def test_equals_the_plain_form_in_value_and_gradient(high: float | None, cap: float | None) -> None:
    x = rollouts()
    output = _loss(x, epsilon_high=high, ratio_cap=cap)
    tokens = plain_token_loss(x, 0.8, 1 + (high or 0.2), cap)
    torch.testing.assert_close(output.tokens["loss"], tokens.detach())
    _same(x, x.normalised(output), rows(x, tokens, torch.mean).mean())
    clipped = output.tokens["clipped"] != 0
    assert 0 < int(clipped.sum()) < len(clipped)
    assert torch.equal(x.gradient(tokens.sum()) == 0, clipped)


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("importance", [False, True])
def test_weights_act_outside_the_clip_and_not_on_the_kl_term(kl: Any, importance: bool) -> None:
    x = rollouts()
    output = _loss(x, ref_logps=x.ref_logps, beta=0.3, kl=kl, kl_importance=importance, weights=x.weights)
    d = x.ref_logps - x.logps
    divergence = {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1}[kl]
    if importance:
        divergence = divergence * torch.exp(x.logps - x.old_logps)
    tokens = x.weights * plain_token_loss(x, 0.8, 1.2) + 0.3 * divergence
    _same(x, x.normalised(output), rows(x, tokens, torch.mean).mean())


def test_reductions_and_normalisers_are_the_published_ones() -> None:
    x = rollouts()
    tokens = plain_token_loss(x, 0.8, 1.2)
    means, sums = rows(x, tokens, torch.mean), rows(x, tokens, torch.sum)
    published = {
        "GRPO": (_loss(x), "mean", means.mean()),
        "DAPO": (_loss(x, reduction="sum"), "token_mean", sums.sum() / len(tokens)),
        "Dr. GRPO": (_loss(x, reduction="constant", max_length=9), "mean", sums.sum() / (len(sums) * 9)),
        "DCPO, two prompts": (_loss(x), "prompt_mean", means.sum() / 2),
        "sum": (_loss(x, reduction="sum"), "sum", sums.sum()),
    }
    for output, normaliser, expected in published.values():
        _same(x, x.normalised(output, normaliser), expected)


def test_on_policy_the_loss_is_minus_the_advantage() -> None:
    x = rollouts(spread=0.0)
    x.advantages = x.segments.broadcast(torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=F64))
    output = _loss(x)
    torch.testing.assert_close(output.losses, -x.segments.mean(x.advantages))
    expected = -x.advantages / (4 * x.segments.broadcast(x.segments.lengths))
    torch.testing.assert_close(x.gradient(x.normalised(output)), expected)
    assert output.metrics["ratio/mean"].tolist() == [1.0] * 4
    assert float(output.metrics["kl/old"].abs().max()) == 0


def test_without_clipping_it_is_the_importance_weighted_policy_gradient() -> None:
    x = rollouts(spread=2.0)
    output = _loss(x, epsilon=1e9)
    expected = rows(x, -torch.exp(x.logps - x.old_logps) * x.advantages, torch.mean).mean()
    _same(x, x.normalised(output), expected)
    assert float(output.metrics["clip/tokens"].sum()) == 0


def test_equal_lengths_make_the_normalisers_agree() -> None:
    x = rollouts((3, 3, 3, 3))
    mean = x.normalised(_loss(x))
    torch.testing.assert_close(x.normalised(_loss(x, reduction="sum"), "token_mean"), mean)
    torch.testing.assert_close(x.normalised(_loss(x, reduction="constant", max_length=8)) * 8 / 3, mean)


def test_dapo_gradients_do_not_depend_on_the_length_of_the_completion() -> None:
    x = rollouts((6, 2), spread=0.0)
    x.advantages = torch.ones(8, dtype=F64)
    grad = x.gradient(x.normalised(_loss(x, reduction="sum"), "token_mean"))
    torch.testing.assert_close(grad, torch.full((8,), -1 / 8, dtype=F64))
    grad = x.gradient(x.normalised(_loss(x)))  # GRPO: inversely proportional to it
    torch.testing.assert_close(grad[0] * 6, grad[-1] * 2)


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_micro_batches_add_up(normaliser: Any) -> None:
    x = rollouts((4, 2, 1, 5, 3, 3))
    normalise = make_normaliser(normaliser, 7.0 if normaliser == "constant" else None)
    reduction = "mean" if normaliser in ("mean", "prompt_mean") else "sum"
    counts = Counts.of(x.segments, pairs=False, prompts=3)
    whole = normalise(_loss(x, reduction=reduction), counts)
    lengths, parts = x.segments.lengths.tolist(), []
    for start, end in ((0, 2), (2, 6)):
        tokens = slice(sum(lengths[:start]), sum(lengths[:end]))
        output = grpo_loss(
            x.logps[tokens],
            Segments.from_lengths(lengths[start:end]),
            old_logps=x.old_logps[tokens],
            advantages=x.advantages[tokens],
            reduction=reduction,
        )
        parts.append(normalise(output, counts))
    _same(x, sum(parts), whole)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_ratios_beyond_the_range_of_the_type_give_no_nan(dtype: torch.dtype) -> None:
    old = torch.zeros(4, dtype=dtype)
    logps = torch.tensor([2000.0, -2000.0, 2000.0, -2000.0], dtype=dtype, requires_grad=True)
    A = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=dtype)
    output = grpo_loss(logps, Segments.from_lengths([4]), old_logps=old, advantages=A, reduction="sum", ratio_cap=10.0)
    torch.testing.assert_close(output.tokens["loss"], torch.tensor([-1.2, 0.0, 10.0, 0.8], dtype=dtype))
    (grad,) = torch.autograd.grad(output.losses.sum(), logps)
    assert grad.tolist() == [0.0] * 4


def test_without_a_cap_a_negative_advantage_is_not_bounded() -> None:
    def loss(**settings: Any) -> float:
        zero, one = torch.zeros(1, dtype=F64), Segments.from_lengths([1])
        return float(grpo_loss(zero + 50, one, old_logps=zero, advantages=zero - 2, **settings).losses)

    assert loss() == pytest.approx(2 * math.exp(50))
    assert loss(ratio_cap=3.0) == pytest.approx(6)
    assert loss(clamp=True) == pytest.approx(2 * math.exp(20))


def test_completions_without_tokens_stay_in_the_count() -> None:
    x = rollouts((3, 0, 2, 0))
    output = _loss(x, ref_logps=x.ref_logps, beta=0.1)
    assert output.losses[1] == output.losses[3] == 0
    assert all(torch.isfinite(m).all() for m in output.metrics.values())
    torch.testing.assert_close(x.normalised(output), output.losses.sum() / 4)
    nothing = torch.zeros(0, dtype=F64, requires_grad=True)
    empty = grpo_loss(nothing, Segments.from_lengths([0]), old_logps=nothing, advantages=nothing, reduction="sum")
    assert make_normaliser("token_mean")(empty, Counts(completions=1)) == 0


def test_gradient_flows_into_the_policy_only() -> None:
    x = rollouts()
    others = [t.requires_grad_() for t in (x.old_logps, x.ref_logps, x.advantages, x.weights)]
    output = _loss(x, ref_logps=x.ref_logps, beta=0.1, weights=x.weights, kl_importance=True)
    grads = torch.autograd.grad(output.losses.sum(), others, allow_unused=True)
    assert grads == (None,) * 4
    assert not any(m.requires_grad for m in [*output.metrics.values(), *output.tokens.values()])


def test_metrics_by_hand() -> None:
    ratio = torch.tensor([0.5, 1.5, 0.5, 1.5, 1.0, 4.0], dtype=F64)
    A = torch.tensor([-1.0, 1.0, 1.0, -1.0, 1.0, -1.0], dtype=F64)
    zero = torch.zeros(6, dtype=F64)
    m = grpo_loss(
        ratio.log(), Segments.from_lengths([4, 2]), old_logps=zero, advantages=A, ratio_cap=3.0, entropy=zero + 0.7
    ).metrics
    expected = {
        "clip/low": [0.25, 0.0],
        "clip/high": [0.25, 0.0],
        "clip/cap": [0.0, 0.5],
        "clip/tokens": [0.5, 0.5],
        "ratio/mean": [1.0, 2.5],
        "ratio/max": [1.5, 4.0],
        "kl/old": [-(math.log(0.5) + math.log(1.5)) / 2, (3 - math.log(4)) / 2],
        "advantages/mean": [0.0, 0.0],
        "entropy": [0.7, 0.7],
    }
    assert set(m) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(m[name], torch.tensor(values, dtype=F64), msg=name)


def test_contradictions_are_refused() -> None:
    x = rollouts()
    with pytest.raises(ValueError, match="needs ref_logps"):
        _loss(x, beta=0.1)
    with pytest.raises(ValueError, match="max_length belongs to reduction 'constant'"):
        _loss(x, reduction="constant")
    with pytest.raises(ValueError, match="max_length belongs to reduction 'constant'"):
        _loss(x, max_length=4.0)
    with pytest.raises(ValueError, match="cap must not lie below"):
        _loss(x, ratio_cap=1.1)
    x.advantages = torch.ones(4, dtype=F64)
    with pytest.raises(ValueError, match=r"advantages have shape \(4,\), expected \(12,\)"):
        _loss(x)


def _distributions() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    logits, reference = (torch.randn(7, dtype=F64, generator=generator) for _ in range(2))
    return logits.requires_grad_(), torch.log_softmax(reference, -1)


def test_kl_estimators_in_expectation() -> None:
    logits, logq = _distributions()
    logp = torch.log_softmax(logits, -1)
    p = logp.exp().detach()
    forward = (logp.exp() * (logp - logq)).sum()
    backward = (logq.exp() * (logq - logp)).sum()
    for unbiased in ("k1", "k3"):
        torch.testing.assert_close((p * kl_estimate(logp, logq, unbiased)).sum(), forward)

    def gradient(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    of = {k: gradient((p * kl_estimate(logp, logq, k)).sum()) for k in ("k1", "k2", "k3")}
    torch.testing.assert_close(of["k1"], torch.zeros_like(of["k1"]))
    torch.testing.assert_close(of["k2"], gradient(forward))
    torch.testing.assert_close(of["k3"], gradient(backward))


def test_k3_is_never_negative_and_0_only_at_equality() -> None:
    d = torch.linspace(-5, 5, 101, dtype=F64)
    k3 = kl_estimate(-d, torch.zeros_like(d))
    assert (k3 >= 0).all()
    assert torch.equal(k3 == 0, d == 0)
    # Small differences in float32: exp(d) - d - 1 written that way would be 0 or negative.
    tiny = kl_estimate(torch.tensor([-1e-3]), torch.zeros(1))
    assert float(tiny) == pytest.approx(5e-7, rel=1e-2)


def test_verls_clamps() -> None:
    logps = torch.tensor([-3.0, -1.0, 30.0], dtype=F64, requires_grad=True)
    k3 = kl_estimate(logps, torch.zeros(3, dtype=F64), clamp=True)
    torch.testing.assert_close(k3[1:].detach(), torch.tensor([math.e - 2, 10.0], dtype=F64))
    assert k3[0] == 10
    (grad,) = torch.autograd.grad(k3.sum(), logps)
    assert grad[0] == grad[2] == 0
    torch.testing.assert_close(grad[1], torch.tensor(1 - math.e, dtype=F64))
    with pytest.raises(ValueError, match="'k1', 'k2' or 'k3'"):
        kl_estimate(logps, logps, "k4")


F64 = torch.float64
GROUP = torch.tensor([0, 1, 0, 2, 1, 0, 2, 0, 1])
REWARDS = torch.tensor([1.0, 0.3, 0.0, 0.1, 0.3, 0.5, 2.0, -1.0, 0.3], dtype=F64)


def _by_group(values: Tensor, group: Tensor) -> list[list[float]]:
    return [values[group == g].tolist() for g in range(int(group.max()) + 1)]


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("scale", ["group", "none", "batch"])
def test_equals_a_loop_over_groups(scale: Any, ddof: int) -> None:
    std = statistics.stdev if ddof else statistics.pstdev
    expected = torch.zeros_like(REWARDS)
    for i, g in enumerate(GROUP.tolist()):
        own = [r for r, h in zip(REWARDS.tolist(), GROUP.tolist(), strict=True) if h == g]
        divisor = {"group": std(own) + 1e-4, "none": 1.0, "batch": std(REWARDS.tolist()) + 1e-4}[scale]
        expected[i] = (float(REWARDS[i]) - statistics.mean(own)) / divisor
    torch.testing.assert_close(group_advantages(REWARDS, GROUP, scale=scale, eps=1e-4, ddof=ddof), expected)


def test_sums_and_squares() -> None:
    A = group_advantages(REWARDS, GROUP, eps=0.1)
    std = GroupStatistics(REWARDS, GROUP).std
    for g, own in enumerate(_by_group(A, GROUP)):
        assert sum(own) == pytest.approx(0, abs=1e-12)
        assert sum(a * a for a in own) == pytest.approx((len(own) - 1) * float(std[g] / (std[g] + 0.1)) ** 2)


def test_shift_scale_and_order() -> None:
    A = group_advantages(REWARDS, GROUP)
    torch.testing.assert_close(group_advantages(REWARDS + 5, GROUP), A)
    torch.testing.assert_close(group_advantages(REWARDS * 3, GROUP), A, rtol=1e-5, atol=1e-5)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(group_advantages(REWARDS[order], GROUP[order]), A[order])


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6, -7.7])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_equal_rewards_give_exactly_0(value: float, baseline: Any) -> None:
    for size in (2, 3, 7):
        rewards = torch.full((size,), value)
        A = group_advantages(rewards, torch.zeros(size, dtype=torch.long), baseline=baseline, eps=1e-30)
        assert A.tolist() == [0.0] * size


def test_binary_rewards() -> None:
    rewards = torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0], dtype=F64)
    A, q = group_advantages(rewards, torch.zeros(8, dtype=torch.long), eps=0.0), 3 / 8
    shrink = math.sqrt(7 / 8)
    assert float(A[0]) == pytest.approx(shrink * math.sqrt((1 - q) / q))
    assert float(A[-1]) == pytest.approx(-shrink * math.sqrt(q / (1 - q)))


def test_leave_one_out() -> None:
    A = group_advantages(REWARDS, GROUP, baseline="leave_one_out", scale="none")
    for i, g in enumerate(GROUP.tolist()):
        others = [float(REWARDS[j]) for j in range(9) if j != i and int(GROUP[j]) == g]
        assert float(A[i]) == pytest.approx(float(REWARDS[i]) - statistics.mean(others))


def test_completions_that_could_not_be_scored() -> None:
    rewards = REWARDS.clone()
    rewards[5] = math.nan
    with_nan = group_advantages(rewards, GROUP)
    keep = torch.arange(9) != 5
    torch.testing.assert_close(with_nan[keep], group_advantages(REWARDS[keep], GROUP[keep]))
    assert with_nan[5] == 0
    assert group_advantages(torch.full((9,), math.nan), GROUP).tolist() == [0.0] * 9


def test_a_group_of_one_has_no_advantage_and_says_so() -> None:
    with pytest.warns(UserWarning, match="group of one"):
        A = group_advantages(torch.tensor([3.0, 1.0, 0.0]), torch.tensor([0, 1, 1]))
    assert A[0] == 0
    assert A[1] > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group_advantages(REWARDS, GROUP)


def test_dynamic_sampling_keeps_groups_that_vary() -> None:
    metric = torch.tensor([1, 1, 0, 1, 0, 0, 1])
    group = torch.tensor([0, 0, 1, 1, 2, 2, 3])
    keep = informative_groups(metric, group)
    assert keep.tolist() == [False, True, False, True]  # a group of one is kept
    rows = keep[group] & (group < 3)
    A = group_advantages(metric[rows].double(), group[rows])
    assert (A != 0).all()
    third = torch.full((3,), 1 / 3)
    assert informative_groups(third, torch.zeros(3, dtype=torch.long)).tolist() == [False]


def test_overlong_penalty() -> None:
    lengths = torch.arange(0, 200)
    penalty = overlong_penalty(lengths, max_length=100, buffer=20, factor=0.5)
    assert penalty[:81].tolist() == [0.0] * 81
    assert penalty[90] == -0.25
    assert (penalty[100:] == -0.5).all()
    steps = penalty.diff()
    assert (steps <= 0).all()
    assert float(steps.min()) == pytest.approx(-0.5 / 20, rel=1e-5)
    for buffer, message in ((0, "buffer = 0"), (-1, "buffer = -1"), (101, "buffer is 101; expected at most 100")):
        with pytest.raises(RecipeError, match=message):
            make_rollout_credit("overlong", max_length=100, buffer=buffer)


def test_the_buffer_is_a_fifth_of_what_is_sampled() -> None:
    """As in the paper, where it is 4096 of 20480; a recipe with other lengths needs no other buffer."""
    lengths = torch.tensor([16, 20, 18])
    found: Any = SimpleNamespace(
        max_new_tokens=20, segments=SimpleNamespace(lengths=lengths), rewards=torch.zeros(3), metrics={}
    )
    make_rollout_credit("overlong")(found)
    assert found.rewards.tolist() == [0.0, -1.0, -0.5]
    make_rollout_credit("overlong").check_limit(20)
