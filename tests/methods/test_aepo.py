"""AEPO: buckets, targets, both reward shapes, KL controllers; the credit's counts, lag, ranks, state and errors."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.rollouts import rollouts
from tests.training.online.made import close, made_batch, made_step, on_two_ranks, part, reloaded
from tests.vectors.adacs import adacs_select
from tokengrain.batch import TokenBatch
from tokengrain.errors import DataError, RecipeError, RunError
from tokengrain.method import make_rollout_credit
from tokengrain.methods.aepo import (
    AEPO,
    BUCKETS,
    LinearBucketKL,
    LogBucketKL,
    Observation,
    SmoothShape,
    bucket_means,
    bucket_sums,
    controlled_kl,
    difficulty,
    kl_token_weights,
    per_bucket,
    smooth_score,
)
from tokengrain.methods.grpo import group_advantages, grpo_loss

F64 = torch.float64
ALPHA, TARGET = 0.5, 20.0


def _aepo(**settings: Any) -> AEPO:
    return AEPO(triggers=None, **settings)


def _score(correct: float, counts: Tensor, bucket: str, alpha: float = ALPHA, **settings: Any) -> Tensor:
    n = len(counts)
    places = torch.full((n,), BUCKETS.index(bucket))
    full = torch.full((n,), correct, dtype=F64)
    state = {"target": torch.full((n,), TARGET), "alpha": torch.full((n,), alpha, dtype=F64)}
    return smooth_score(full, counts, places, **state, **settings)


@pytest.mark.parametrize(
    ("size", "expected"), [(3, [2, 1, 0, 0]), (6, [2, 2, 1, 1, 0, 0, 0]), (8, [2] * 3 + [1] * 3 + [0] * 3)]
)
def test_buckets_at_every_pass_rate(size: int, expected: list[int]) -> None:
    correct = torch.tensor([[1.0] * k + [0.0] * (size - k) for k in range(size + 1)]).flatten()
    group = torch.arange(size + 1).repeat_interleave(size)
    assert difficulty(correct, group).tolist() == expected
    assert difficulty(correct, group, easy=2 / 3, medium=1 / 3).tolist() == expected


def test_buckets_without_a_score() -> None:
    correct = torch.tensor([math.nan, 1.0, 1.0, math.nan, math.nan])
    group = torch.tensor([0, 0, 0, 1, 1])
    buckets = difficulty(correct, group)
    assert buckets.tolist() == [0, -1]
    sums = bucket_sums(torch.tensor([4.0, 7.0]), buckets)
    assert bucket_means(sums) == {"easy": 4.0}
    found = per_bucket({"easy": 0.25}, torch.tensor([0, 2, -1]))
    torch.testing.assert_close(found, torch.tensor([0.25, math.nan, math.nan], dtype=F64), equal_nan=True)
    rewards = _aepo().reward(correct, torch.ones(5), buckets[group])
    assert rewards.isnan().tolist() == [True, False, False, True, True]


def test_the_score_is_bounded_monotone_and_continuous_but_for_one_jump() -> None:
    counts = torch.linspace(0, 60, 6001, dtype=F64)
    for place, bucket in enumerate(BUCKETS):
        cap = ALPHA * SmoothShape().cap[place]
        right, wrong = (_score(c, counts, bucket) for c in (1.0, 0.0))
        assert right.abs().max() <= cap + 1e-12
        assert (wrong >= SmoothShape().wrong[place] * cap / 2 - 1e-12).all()
        assert (wrong <= SmoothShape().wrong[place] * cap + 1e-12).all()
        assert (wrong.diff() >= -1e-15).all()
        assert wrong.diff().abs().max() < 0.01
        jumps = (right.diff().abs() > 0.01).nonzero().flatten()
        if bucket == "hard":
            assert (right.diff() >= -1e-15).all()
            assert len(jumps) == 1
            assert counts[jumps[0] + 1].item() == pytest.approx(TARGET - 0.35 * TARGET)
            assert right.diff()[jumps[0]].item() == pytest.approx(cap / 2, abs=1e-3)
        else:
            assert len(jumps) == 0
        if bucket == "easy":
            assert (right.diff() <= 1e-15).all()


@pytest.mark.parametrize(("bucket", "alpha"), [("easy", 0.625), ("medium", 1 / 1.8), ("hard", 1 / 2.4)])
def test_when_a_wrong_completion_can_outscore_a_correct_one(bucket: str, alpha: float) -> None:
    counts = torch.linspace(0, 200, 2001, dtype=F64)

    def gap(alpha: float, **settings: Any) -> float:
        """Worst correct minus best wrong completion. Hard ones stay above their bound, 1 - cap, which is taken."""
        right, wrong = (_score(correct, counts, bucket, alpha, **settings) for correct in (1.0, 0.0))
        worst = -wrong.max() if bucket == "hard" else right.min()
        assert right.min() >= worst
        return float(1 + worst - wrong.max())

    assert gap(alpha - 0.01) > 0 > gap(alpha + 0.01)
    assert gap(2.0, preserve_order=True) == pytest.approx(0, abs=1e-12)


def test_examples_of_the_paper() -> None:
    def one(correct: float, count: float, target: float, bucket: str, alpha: float = 0.5) -> float:
        places = torch.tensor([BUCKETS.index(bucket)])
        state = {"target": torch.tensor([target]), "alpha": torch.tensor([alpha], dtype=F64)}
        return float(smooth_score(torch.tensor([correct]), torch.tensor([count]), places, **state))

    assert one(0.0, 84, 55, "medium", 0.475) == pytest.approx(0.38, abs=0.005)
    assert one(0.0, 24, 55, "medium", 0.475) == pytest.approx(0.19, abs=0.005)
    assert one(1.0, 51, 28, "easy") == pytest.approx(-0.5)


def _step(state: AEPO, correct: Tensor, counts: Tensor, group: Tensor) -> Tensor:
    buckets = difficulty(correct, group)
    state.observe(Observation.of(counts, group, buckets))
    return state.reward(correct, counts, buckets[group])


def _rollout(seed: int, prompts: int = 6, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rate = torch.linspace(0.1, 0.95, prompts, dtype=F64)[:, None].expand(-1, size).flatten()
    correct = (torch.rand(prompts * size, dtype=F64, generator=generator) < rate).to(F64)
    counts = torch.randint(0, 60, (prompts * size,), generator=generator)
    return correct, counts, torch.arange(prompts).repeat_interleave(size)


@pytest.mark.filterwarnings("ignore:shape 'lagrange'")
def test_the_papers_reward_with_a_target_of_the_same_batch_is_accuracy() -> None:
    state = _aepo(shape="lagrange")
    for seed in range(4):
        correct, counts, group = _rollout(seed)
        assert torch.equal(_step(state, correct, counts, group), correct)
    lagged = _aepo(shape="lagrange", targets="lagged", strength_cap=0.01)
    first = _rollout(0)
    assert torch.equal(_step(lagged, *first), first[0])  # nothing to lag behind
    correct, counts, group = _rollout(1)
    shaped = _step(lagged, correct, counts + 10, group)
    assert torch.equal(shaped[correct == 1], correct[correct == 1])
    assert (shaped[correct == 0] < 0).any()
    assert max(lagged.strength.values()) == 0.01


def test_the_degenerate_setting_warns() -> None:
    with pytest.warns(UserWarning, match="plain accuracy"):
        _aepo(shape="lagrange")


def test_targets_and_alpha() -> None:
    state = _aepo()
    correct = torch.tensor([1.0] * 4 + [0.0] * 4)
    group = torch.arange(2).repeat_interleave(4)
    _step(state, correct, torch.tensor([1, 2, 2, 5, 10, 10, 10, 12]), group)  # means 2.5 and 10.5: halves to even
    assert state.target == {"easy": 2.0, "hard": 10.0}
    assert state.alpha == pytest.approx({"easy": 0.525, "medium": 0.5, "hard": 0.475})
    none = _aepo(shape="none")
    assert torch.equal(_step(none, correct, torch.arange(8), group), correct)
    smooth = _aepo(target_ema=0.5, targets="lagged")
    for counts in ([4.0] * 8, [8.0] * 8, [0.0] * 8):
        _step(smooth, correct, torch.tensor(counts), group)
    assert smooth.target["easy"] == 6.0  # (4 + 8) / 2, without the last


def test_two_ranks_see_what_one_sees() -> None:
    correct, counts, group = _rollout(3)
    whole, halves = _aepo(), _aepo()
    whole.observe(Observation.of(counts, group, difficulty(correct, group)))
    parts = []
    for keep, first in ((group < 2, 0), (group >= 2, 2)):
        own = group[keep] - first
        parts.append(Observation.of(counts[keep], own, difficulty(correct[keep], own)))
    halves.observe(parts[0] + parts[1])
    assert halves.target == whole.target
    assert halves.alpha == pytest.approx(whole.alpha)


def test_state_round_trips_through_json() -> None:
    for settings in ({}, {"shape": "lagrange", "targets": "lagged", "target_ema": 0.3}):
        state, resumed = _aepo(**settings), _aepo(**settings)
        for seed in range(3):
            _step(state, *_rollout(seed))
        resumed.load_state_dict(json.loads(json.dumps(state.state_dict())))
        a, b = (_step(s, *_rollout(9)) for s in (state, resumed))
        assert torch.equal(a, b)
        assert state.state_dict() == resumed.state_dict()


# KL weights and controllers


@pytest.mark.parametrize("controller", [LogBucketKL(interval=1), LinearBucketKL()])
def test_kl_above_its_target_raises_the_weight(controller: LogBucketKL | LinearBucketKL) -> None:
    buckets = torch.tensor([0, 1, 2])
    medium = 0.0101 if isinstance(controller, LogBucketKL) else 0.01
    controller.update(bucket_sums(torch.tensor([0.02, medium, 0.005], dtype=F64), buckets))
    assert controller.weights["easy"] > 1 > controller.weights["hard"]
    assert controller.weights["medium"] == pytest.approx(1.0, abs=1e-12)  # in the dead zone, or at the target
    resumed = type(controller)(**({"interval": 1} if isinstance(controller, LogBucketKL) else {}))
    resumed.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    for c in (controller, resumed):
        c.update(bucket_sums(torch.tensor([0.5, 0.3]), torch.tensor([1, 2])))
    assert controller.state_dict() == resumed.state_dict()


def test_the_released_interval_and_bounds() -> None:
    controller = LogBucketKL()
    sums = bucket_sums(torch.tensor([5.0]), torch.tensor([0]))
    for _ in range(99):
        controller.update(sums)
    assert controller.weights["easy"] == 1.0
    controller.update(sums)
    assert 1.0 < controller.weights["easy"] <= math.exp(0.05 * 0.2) + 1e-12
    fast = LogBucketKL(interval=1, lr=50.0, high=3.0, low=0.5)
    fast.update(sums)
    assert fast.weights["easy"] == 3.0
    linear = LinearBucketKL(target={"easy": 0.01, "medium": 1.0, "hard": 1.0}, high=2.0)
    linear.update(sums)
    assert linear.weights == {"easy": 2.0, "medium": 1.0, "hard": 1.0}


def test_kl_weights_scale_the_gradient_and_1_is_plain_kl() -> None:
    x = rollouts()
    relaxed = torch.tensor([True, False] * 6)
    ones = torch.ones(len(x.segments), dtype=F64)
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=F64)

    def gradient(kl_weights: Tensor | None) -> Tensor:
        zeros = torch.zeros_like(x.advantages)
        return x.gradient(
            grpo_loss(x.logps, x.segments, old_logps=x.old_logps, ref_logps=x.ref_logps, advantages=zeros, beta=0.1,
                      kl_weights=kl_weights).losses.sum()
        )  # fmt: skip

    plain = gradient(None)
    assert torch.equal(gradient(kl_token_weights(ones, x.segments, relaxed, rho=1.0)), plain)
    assert torch.equal(gradient(kl_token_weights(ones, x.segments, torch.zeros(12), rho=0.5)), plain)
    each = kl_token_weights(weights.requires_grad_(), x.segments, relaxed, rho=0.25)
    torch.testing.assert_close(gradient(each), plain * each)
    assert not each.requires_grad
    assert each[0] == 0.25
    assert each[1] == 1.0
    torch.testing.assert_close(controlled_kl(x.weights, x.segments, ~relaxed), x.segments.mean(x.weights * relaxed))


def test_adacs() -> None:
    rates = [0.0, 0.0, 0.5, 0.5, 0.5, 1.0]
    lengths = [300, 100, 90, 110, 500, 20]
    found = adacs_select(["a"] * 6, rates, lengths, per_bracket=1, levels=[0.0, 0.5, 1.0])
    assert found.target == {("a", 0.0): 200.0, ("a", 0.5): 110.0, ("a", 1.0): 20.0}
    assert found.selected == [0, 3, 5]  # 300 and 100 are equally far from 200
    with pytest.raises(DataError, match="source 'a' has no response with pass rate 1"):
        adacs_select(["a", "a"], [0.0, 0.5], [1, 2], per_bracket=1, levels=[0.0, 0.5, 1.0])
    with pytest.raises(DataError, match="none of the levels"):
        adacs_select(["a"], [0.3], [1], per_bracket=1)


# The mechanism, without a model


def _trained(shape: str, seed: int, **settings: Any) -> tuple[list[float], Tensor]:
    """E[N] per bucket after REINFORCE on a distribution over numbers of HWE tokens, easier or harder to solve."""
    generator = torch.Generator().manual_seed(seed)
    N = torch.arange(61, dtype=F64)
    solved = torch.stack([0.97 - 0.004 * N, torch.full_like(N, 0.5), 0.03 + 0.004 * N])
    logits = (-((N - 30) ** 2) / (2 * 12**2)).repeat(3, 1)
    state = _aepo(shape=shape, **settings)
    prompts, size = 8, 8
    bucket_of = torch.arange(3).repeat_interleave(prompts)
    group = torch.arange(3 * prompts).repeat_interleave(size)
    places = bucket_of[group]
    rewards = torch.zeros(0)
    for _ in range(300):
        p = logits.softmax(1)
        drawn = torch.multinomial(p, prompts * size, replacement=True, generator=generator).flatten()
        luck = torch.rand(len(drawn), dtype=F64, generator=generator)
        correct = (luck < solved[places, drawn]).to(F64)
        state.observe(Observation.of(drawn, group, bucket_of))
        rewards = state.reward(correct, drawn, places)
        advantages = group_advantages(rewards, group)
        score = torch.zeros_like(logits).index_put((places, drawn), advantages, accumulate=True)
        total = torch.zeros(3, dtype=F64).index_add(0, places, advantages)[:, None]
        logits = logits + 0.5 * (score - total * p) / (prompts * size)
    return (logits.softmax(1) @ N).tolist(), logits


@pytest.mark.filterwarnings("ignore:shape 'lagrange'")
def test_easy_prompts_get_fewer_and_hard_ones_more() -> None:
    for seed in range(2):
        plain, logits = _trained("none", seed)
        shaped, _ = _trained("smooth", seed)
        assert shaped[0] < plain[0] - 1
        assert shaped[2] > plain[2] + 2
        assert abs(shaped[1] - plain[1]) < 2
        _, degenerate = _trained("lagrange", seed)
        assert torch.equal(degenerate, logits)


# 4 of 4, 3 of 4, 2 of 4, 1 of 4 right: easy, easy, medium, hard.
CORRECT = torch.tensor([1, 1, 1, 1, 1, 1, 1, 0, 1, 0, 1, 0, 0, 0, 0, 1], dtype=torch.bool)
OF_PROMPTS = ("easy", "easy", "medium", "hard")


def batch(seed: int = 0) -> TokenBatch:
    return made_batch(generations=4, seed=seed, longest=20)


def rollout(seed: int = 0, **changes):
    return made_step(batch(seed), **{"correct": CORRECT, "rewards": CORRECT.float(), **changes})


def windows(step, c: int, size: int) -> list[float]:
    """Mean entropy of the `size` tokens after each token that has so many."""
    h = step.segments.split(step.quantity("entropy"))[c]
    return [float(h[t + 1 : t + 1 + size].mean()) for t in range(len(h) - size)]


def threshold(step, size: int, quantile: float) -> float:
    each = []
    for c in range(len(step.segments)):
        complete = windows(step, c, size)
        n = int(step.segments.lengths[c])
        h = float(step.segments.split(step.quantity("entropy"))[c][0])
        filled = complete + [sum(complete) / len(complete) if complete else h] * (n - len(complete))
        each.append(torch.tensor(filled).quantile(quantile))
    return float(torch.stack(each).quantile(0.5))


SETTINGS = {"triggers": None, "window": 2, "quantile": 0.7, "decay": 0.5, "kl": "none"}


def test_the_first_rollout_is_not_counted_and_the_second_with_its_threshold():
    credit = make_rollout_credit("aepo", **SETTINGS)
    first = rollout()
    credit(first)
    assert torch.equal(first.rewards, CORRECT.float())
    assert "hwe" not in first.quantities
    tau = threshold(first, 2, 0.7)
    assert credit.state_dict()["threshold"]["value"] == pytest.approx(tau)
    step = rollout(seed=1)
    credit(step)
    counts = torch.tensor([sum(w >= tau for w in windows(step, c, 2)) for c in range(16)]).double()
    assert float(counts.max()) > 1
    close(step.segments.sum(step.quantities["hwe"]), counts)
    means = counts.view(4, 4).mean(1)
    target = {
        name: round(float(means[[i for i in range(4) if OF_PROMPTS[i] == name]].mean())) for name in set(OF_PROMPTS)
    }
    drift = {n: float(means[[i for i in range(4) if OF_PROMPTS[i] == n]].mean()) - t for n, t in target.items()}
    alpha = {n: 0.5 + 0.05 * (-1 if n == "hard" else 1) * drift[n] for n in target}
    places = torch.tensor([("easy", "medium", "hard").index(b) for b in OF_PROMPTS for _ in range(4)])
    each = {"target": target, "alpha": alpha}
    vectors = {k: torch.tensor([float(v[b]) for b in OF_PROMPTS for _ in range(4)]) for k, v in each.items()}
    close(step.rewards, CORRECT + smooth_score(CORRECT.double(), counts, places, **vectors))
    assert step.metrics["aepo/tau"] == pytest.approx(tau)
    assert step.metrics["aepo/easy"] == 0.5
    assert credit.state_dict()["threshold"]["value"] == pytest.approx(0.5 * tau + 0.5 * threshold(step, 2, 0.7))


def test_state_survives_a_resume_and_another_order_of_prompts():
    make = lambda: make_rollout_credit("aepo", **{**SETTINGS, "kl": "log_ema"})  # noqa: E731
    credit = make()
    for seed in (0, 1):
        credit(rollout(seed))
    plain, again = rollout(2), part(rollout(2), [2, 0, 3, 1])
    fresh = reloaded(credit, make)
    credit(plain)
    fresh(again)
    close(again.rewards, part(plain, [2, 0, 3, 1]).rewards)
    close(again.quantities["kl_weights"], part(plain, [2, 0, 3, 1]).quantities["kl_weights"])


@pytest.mark.parametrize("mode", ["code", "paper", "token_semantic"])
def test_two_ranks_are_one(mode):
    make = lambda: make_rollout_credit("aepo", **{**SETTINGS, "mode": mode, "kl": "multiplicative", "rho": 0.5})  # noqa: E731
    one, credits = make(), [make(), make()]
    for seed in range(3):
        left = iter(credits)
        shares, credits = on_two_ranks(rollout(seed), lambda: reloaded(next(left), make))  # noqa: B023
        step = rollout(seed)
        one(step)
        for rank, share in enumerate(shares):
            own = part(step, range(rank, 4, 2))
            close(share.rewards, own.rewards)
            close(share.quantities["kl_weights"], own.quantities["kl_weights"])
    assert credits[0].state_dict() == credits[1].state_dict()
    found, expected = (c.state_dict()["shaping"]["alpha"] for c in (credits[0], one))
    assert found == pytest.approx(expected)
    assert mode == "code" or one.state_dict()["threshold"]["value"] is None


def test_kl_weights_follow_the_kl_by_difficulty():
    step = rollout()
    lift = torch.tensor([0.0, 0.0, 0.5, 3.0])[step.group][step.segments.ids]
    step.quantities["ref_logps"] = step.quantity("old_logps") - lift
    make_rollout_credit("aepo", **{**SETTINGS, "kl": "multiplicative", "kl_target": 0.1, "kl_step": 0.1})(step)
    k3 = {name: math.exp(-d) + d - 1 for name, d in (("easy", 0.0), ("medium", 0.5), ("hard", 3.0))}
    for place, name in enumerate(OF_PROMPTS):
        weight = 1 + 0.1 * (k3[name] / 0.1 - 1)
        own = step.group[step.segments.ids] == place
        close(step.quantities["kl_weights"][own], torch.full((int(own.sum()),), weight))
    assert step.metrics["aepo/kl_weight_hard"] > 1 > step.metrics["aepo/kl_weight_easy"]


def test_paper_mode_relaxes_the_kl_where_windows_fire():
    step = rollout()
    make_rollout_credit("aepo", mode="paper", window=1, kl="log_ema", kl_interval=100)(step)
    entropy = step.quantity("entropy")
    tau = torch.stack([h.quantile(0.95) for h in step.segments.split(entropy)]).mean()
    fires = entropy >= tau
    assert torch.equal(step.quantities["hwe"] > 0, fires)
    close(step.quantities["kl_weights"], torch.where(fires, 0.5, 1.0))
    assert not torch.equal(step.rewards, CORRECT.float())


def test_triggers_are_words_of_the_vocabulary():
    class Words:
        def __len__(self):
            return 90  # the model has more

        def convert_ids_to_tokens(self, ids):
            return ["\u0120Wait" if i % 5 == 0 else f"w{i}" for i in ids]

    credit = make_rollout_credit("aepo", **{**SETTINGS, "triggers": ["wait"]}, tokenizer=Words())
    credit(rollout())
    step = rollout(1)
    credit(step)
    marked = step.quantities["hwe"] > 0
    assert marked.any()
    assert (step.batch.labels[marked] % 5 == 0).all()
    assert (step.batch.labels[marked] < 90).all()
    with pytest.raises(RecipeError, match="none of the 1 trigger words is a token"):
        make_rollout_credit("aepo", triggers=["however"], tokenizer=Words())
    with pytest.raises(RecipeError, match="needs a tokenizer"):
        make_rollout_credit("aepo")


def test_what_was_not_scored_stays_out():
    step = rollout(rewards=torch.where(torch.arange(16) == 3, torch.nan, CORRECT.float()))
    make_rollout_credit("aepo", mode="paper", kl="none", window=1)(step)
    assert torch.isnan(step.rewards).nonzero().flatten().tolist() == [3]
    assert step.metrics["aepo/easy"] == 0.5


def test_refusals():
    with pytest.raises(RecipeError, match="expected medium < easy"):
        make_rollout_credit("aepo", triggers=None, easy=0.2)
    with pytest.raises(RunError, match="what is correct"):
        make_rollout_credit("aepo", triggers=None)(rollout(correct=None))
    with pytest.raises(RunError, match="another setting of `kl`"):
        reloaded(
            make_rollout_credit("aepo", triggers=None), lambda: make_rollout_credit("aepo", triggers=None, kl="none")
        )
    assert make_rollout_credit("aepo", triggers=None).needs == {"entropy", "ref_logps"}
    assert make_rollout_credit("aepo", triggers=None, kl="none").needs == {"entropy"}
    with pytest.warns(UserWarning, match="plain accuracy"):
        make_rollout_credit("aepo", triggers=None, shape="lagrange")
