"""The experiments behind the claims about online methods: their parts, quick runs of all, and (slow) what is robust."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from experiments.claims import (
    online_aepo,
    online_arithmetic,
    online_digits,
    online_r3,
    online_revision,
    online_rto,
    online_thr,
)
from experiments.claims.digit_sums import DIGITS, GROUP_SIZE, HIDDEN, Task, mixed_completions, sample_groups
from experiments.claims.framework import SeedAndSizes
from experiments.claims.groups import GROUPS
from experiments.claims.runner import judge_all, run_claims
from experiments.claims.tiny_gru import GRUPolicy
from experiments.training import OnlineRun
from rich.console import Console

from tests.experiments.test_claims_experiments import held, robust

QUIET = Console(quiet=True)
SMALL = ("rto", "digits", "thr", "aepo", "r3", "r3-limits", "slots")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_recurrent_policy_samples_what_it_scores() -> None:
    policy = GRUPolicy(2, 3, 8, seed=0)
    prompts = torch.ones(20000, dtype=torch.long)
    drawn = policy.sample(prompts, 2, generator())
    every = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    with torch.no_grad():
        expected = policy.logps(torch.ones(9, dtype=torch.long), every).view(9, 2).sum(1).exp()
    seen = torch.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=9) / len(drawn)
    assert float(expected.sum()) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(seen, expected, atol=0.015)


def test_bigrams_earn_and_repetitions_cost() -> None:
    tokens = torch.tensor([[2, 5, 7, 7], [5, 2, 2, 2], [0, 1, 0, 1]])
    assert online_rto.true_rewards(tokens).tolist() == [1.5, -1.0, 0.0]


def test_digit_sums_are_right_by_their_remainder() -> None:
    task = Task(targets=torch.tensor([1, 3]), moduli=torch.tensor([2, 20]))
    tokens = torch.tensor([[9, 9, 9, 0], [9, 9, 5, 0], [9, 9, 4, 0]])
    assert task.correct(torch.tensor([0, 1, 1]), tokens).tolist() == [True, True, False]
    drawn = Task.draw(10, generator())
    assert bool((drawn.targets < drawn.moduli).all())
    prompts = torch.full((1000,), 35)  # of the prompts with modulus 20
    right = drawn.correct(prompts, mixed_completions(drawn, prompts, 0.5, generator()))
    assert 0.45 < float(right.float().mean()) < 0.6


def test_refilled_groups_are_all_mixed_and_cost_samples() -> None:
    task, policy = Task.draw(3, generator()), GRUPolicy(12, DIGITS, HIDDEN, seed=0)
    groups = online_digits._sampled(policy, task, generator(1), refill=True)
    by_group = groups.correct.view(-1, GROUP_SIZE)
    assert len(by_group) == len(task)
    assert bool((by_group.any(1) & ~by_group.all(1)).all())
    assert bool((groups.prompts.view(-1, GROUP_SIZE) == groups.prompts[::GROUP_SIZE, None]).all())
    assert torch.equal(task.correct(groups.prompts, groups.tokens), groups.correct)
    once = online_digits._sampled(policy, task, generator(1), refill=False)
    assert groups.drawn > once.drawn == len(task) * GROUP_SIZE


def test_thr_weights_of_the_task_are_those_of_p() -> None:
    task, policy = Task.draw(3, generator()), GRUPolicy(12, DIGITS, HIDDEN, seed=0)
    groups = sample_groups(policy, task, generator())
    low, high = (online_thr.token_weights(policy, groups, p, None) for p in (-0.5, 0.5))
    assert set(high.unique().tolist()) == {0.5, 1.0, 1.5}  # 1: groups that are not mixed
    assert torch.equal(low + high, torch.full_like(low, 2.0))
    masked = online_thr.token_weights(policy, groups, 0.0, 1.0)
    assert set(masked.unique().tolist()) == {0.0, 1.0}


def test_the_reward_of_aepo_as_in_the_text_changes_nothing() -> None:
    context = SeedAndSizes(0, online_aepo.Scale(steps=20))
    arms = {arm.name: online_aepo.run(context, arm) for arm in online_aepo.ARMS}
    assert arms["AEPO as in the text"] == arms["accuracy alone"]
    assert arms["AEPO"] != arms["accuracy alone"]


def test_plain_r3_is_the_mean_and_r3_ranks_better() -> None:
    logps = torch.randn(2, online_r3.GROUP_SIZE, 30, generator=generator())
    assert torch.allclose(online_r3.rewards(logps, 0.0), logps.mean(-1), atol=1e-6)
    context = SeedAndSizes(0, online_r3.Scale(traces=30))
    mean, weighed = (online_r3._ranked(context, power, 200) for power in (0.0, 1.0))
    assert weighed > mean + 0.05


def test_curves_of_a_run() -> None:
    rows = [{"reward/correct": value} for value in (0.1, 0.2, 0.3, 0.6, 0.6, 0.6, 0.2, 0.4)]
    run = OnlineRun(None, [*rows, {"other": 1.0}])
    assert run.curve("other") == [1.0]
    assert run.late("reward/correct") == pytest.approx(0.3)
    assert run.late("missing") is None
    assert run.reached("reward/correct", 0.5) == 5  # rollouts 3 to 5 have 0.5 on average
    assert run.reached("reward/correct", 0.9) == 8


def test_quick_runs_of_the_small_tasks(tmp_path: Path) -> None:
    groups = [GROUPS[name] for name in SMALL]
    results = run_claims(groups, [0, 1], tmp_path, quick=True, console=QUIET)
    assert len(results) == 2 * sum(len(group.arms) for group in groups)
    for row in results:
        assert all(math.isfinite(v) for v in row["measures"].values() if v is not None), row
        assert set(row["measures"]) == set(GROUPS[row["group"]].columns)
    found = {(f.group, f.claim.says) for f in judge_all(groups, results)}
    missing = [c for group in groups for c in group.claims if (group.name, c.says) not in found]
    assert all(c.form == "ratio" for c in missing)  # of so few steps a divisor may be 0
    again = run_claims(groups[:2], [1], tmp_path / "again", quick=True, console=QUIET)
    first = {(r["group"], r["arm"]): r["measures"] for r in results if r["seed"] == 1}
    assert all(first[r["group"], r["arm"]] == r["measures"] for r in again)  # a run is a function of its seed


@pytest.mark.parametrize(("module", "names"), [(online_arithmetic, ("DCPO", "DAPO")), (online_revision, ("R3",))])
def test_quick_runs_with_the_trainer(module: Any, names: tuple[str, ...]) -> None:
    group = module.GROUP
    scale = group.scales[True]
    context = group.prepare(0, scale)
    for arm in group.arms:
        if arm.name in names:
            found = group.run(context, arm)
            assert set(found) == set(group.columns)
            assert all(v is not None and math.isfinite(v) for v in found.values()), (arm.name, found)
            if arm.name == "DAPO":
                assert found["drawn"] >= scale.rollouts * scale.prompts * scale.generations


# -- what the specifications hold for robust ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SMALL, "arithmetic"])
def test_robust_claims_of_online_methods(name: str, tmp_path: Path) -> None:
    findings = robust(name, tmp_path, [0, 1])
    assert findings
    assert not [f.as_dict() for f in findings if not held(f)]
