"""The soak test's own parts: the line through the memory's sizes, and what counts as left over."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.soak import Memory, left_over, slope


def test_slope_of_a_line_with_jitter() -> None:
    steps = list(range(1, 401))
    assert slope(steps, [5e8 + 300.0 * s for s in steps]) == pytest.approx(300.0)
    assert abs(slope(steps, [5e8 + 4096.0 * (s % 2) for s in steps])) < 1
    with pytest.raises(ValueError, match="two different steps"):
        slope([3], [1.0])


def test_growth_leaves_out_the_first_steps() -> None:
    memory = Memory(every=1000)
    memory.steps, memory.sizes = [1, 2, 3, 4, 5], [0.0, 9e9, 100.0, 110.0, 120.0]
    assert memory.growth(2) == pytest.approx(10.0)
    memory.add(6)
    assert memory.sizes[-1] > 1e6


def test_only_files_of_a_run_are_its_own(tmp_path: Path) -> None:
    for name in ("run.json", "train/log.jsonl", "train/model/config.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert left_over(tmp_path) == []
    for name in ("train/.saving/model", "train/checkpoint-20/trainer_state.json", "train/run.json", "log.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert {str(path) for path in left_over(tmp_path)} == {
        "train/.saving/model",
        "train/checkpoint-20/trainer_state.json",
        "train/run.json",
        "log.jsonl",
    }
    assert len(left_over(tmp_path, ())) == 7
