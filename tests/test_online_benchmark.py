"""The online benchmark does the same work on all of its sides; its page holds what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import online_updates
from benchmarks.online_page import markdown, overhead
from benchmarks.online_rollouts import PHASES, rollout_speed, step_split, thr_share
from benchmarks.online_step import compare
from benchmarks.online_updates import OnlineSetting, OursUpdate, TrlUpdate, build_rollout
from benchmarks.rollout_ahead import compared
from benchmarks.setting import Setting

from tokengrain.errors import read_json

TINY = OnlineSetting(
    Setting(prompt=(10, 16), completion=(4, 8), vocabulary=101, hidden=32, layers=2, heads=4, intermediate=48),
    prompts=2,
    generations=4,
)


def weights(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_all_sides_do_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")

    def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
        # Adam's first steps are the gradient's sign, and where it is almost 0 rounding decides it.
        return torch.optim.SGD(model.parameters(), lr=0.5)

    monkeypatch.setattr(online_updates, "optimiser_of", sgd)
    sides = [OursUpdate(TINY), OursUpdate(TINY, "separate"), TrlUpdate(TINY), TrlUpdate(TINY, parts=2)]
    start = weights(sides[0].policy)
    rounds = [[side.update() for side in sides] for _ in range(3)]
    for losses in rounds:
        assert len(losses[0]) == TINY.minibatches
        for theirs in losses[1:]:
            assert theirs == pytest.approx(losses[0], rel=1e-4)
    # The losses move, and by the KL term as well: a side that skipped steps or reference would be seen.
    advantages = build_rollout(TINY)[1].chunk(TINY.minibatches)
    assert rounds[0][0][0] == pytest.approx(-float(advantages[0].mean()), abs=1e-5)
    assert abs(rounds[2][0][0] + float(advantages[0].mean())) > 1e-3
    moved = weights(sides[0].policy) - start
    for side in sides[1:]:
        assert float((weights(side.policy) - start - moved).norm()) < 1e-3 * float(moved.norm())


def test_mixed_precision_is_that_of_every_side() -> None:
    pytest.importorskip("trl")
    plain, mixed = TINY, TINY.with_(mixed=True)
    assert mixed.label() == plain.label() + ", products in bfloat16"
    exact = OursUpdate(plain).update()
    sides = [OursUpdate(mixed), OursUpdate(mixed, "separate"), TrlUpdate(mixed)]
    assert all(p.dtype == torch.float32 for side in sides for p in side.policy.parameters())
    for losses in (side.update() for side in sides):
        assert losses == pytest.approx(exact, abs=5e-3)
        assert max(abs(a - b) for a, b in zip(losses, exact, strict=True)) > 1e-7


def test_minibatches_must_be_equal() -> None:
    with pytest.raises(ValueError, match="equal size"):
        TINY.with_(prompts=3)


def test_compare_rollouts_and_page(tmp_path: Path) -> None:
    updates = compare(TINY, ["separate"], 2, tune=False)
    assert set(updates["loss_difference"]) == {"tokengrain, separate layout"}
    assert updates["loss_difference"]["tokengrain, separate layout"] < 1e-6
    rollouts = rollout_speed(TINY, 1)
    assert rollouts["tokens"] == 2 * 4 * 8
    found = step_split(TINY, 2)
    assert set(found["seconds"]) == set(PHASES)
    assert min(found["seconds"].values()) >= 0
    # Phases do not overlap: they add up to no more than the clock on the wall.
    assert 0 < sum(found["seconds"].values()) <= found["wall_s"] * 1.02
    assert overhead({"wall_s": 10.0, "seconds": dict.fromkeys(PHASES, 2.0)}) == pytest.approx(0.2)
    thr = thr_share(TINY, 1, 2)
    assert thr["mixed_groups"] > 0
    assert thr["share"]["median"] < 1
    report = {
        "machine": dict.fromkeys(("command", "date", "gpu", "cpu", "cores", "threads", "torch", "transformers"), "x"),
        "update": [updates],
        "rollout": [rollouts],
        "split": [found],
        "thr": thr | {"share": {"median": 0.1, "min": 0.05, "max": 0.123}},
    }
    page = markdown(report)
    for number in (f"{updates['sides'][1]['median_s']:.3f}", f"{found['wall_s']:.3f}", "5.0%–12.3%"):
        assert number in page
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


def test_a_page_that_is_there_is_complete() -> None:
    written = Path(__file__).parent.parent / "docs" / "results" / "online_step_cpu.json"
    if not written.exists():
        pytest.skip("the benchmark has not been run yet")
    report = read_json(written)
    assert len(report["update"]) == 6
    assert {"rollout", "split", "thr"} <= report.keys()
    for result in report["update"]:
        rounding = 1e-3 if "bfloat16" in result["setting"] else 1e-4
        assert max(result["loss_difference"].values()) < rounding


def test_ways_are_paired_by_seed() -> None:
    """Large differences between seeds widen nothing; the order of the runs does not matter."""
    values = {("turns", 0): 1.0, ("ahead", 0): 1.5, ("ahead", 1): 9.25, ("turns", 1): 9.0}
    runs = [{"way": way, "seed": seed, "seconds": value} for (way, seed), value in values.items()]
    turns, ahead, difference = compared(runs, lambda run: run["seconds"])
    assert (turns, ahead) == (5.0, 5.375)
    assert difference.value == pytest.approx(0.375)
    assert difference.high - difference.low == pytest.approx(2 * 12.706 * 0.125, rel=1e-3)
