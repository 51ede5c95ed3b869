"""Reading a run folder that is not finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tokengrain.errors import RunError, write_json
from tokengrain.runs import StageRecord, read_run, read_stage, spoken, typed


def test_an_unfinished_run_says_how_far_it_got(tmp_path: Path) -> None:
    stages = [{"name": name} for name in ("guide", "train")]
    write_json(tmp_path / "run.json", {"method": "tgdpo", "status": "interrupted", "stages": stages})
    StageRecord("guide", tmp_path / "guide", "train", "done", "0").save()
    StageRecord("train", tmp_path / "train", "train", "interrupted", "0").save()
    with pytest.raises(RunError, match=r"finished stages: guide of guide, train; .*\(no checkpoint yet\)"):
        _ = read_run(tmp_path).final_stage
    for name in ("checkpoint-8", "checkpoint-16", "checkpoint-20.bak", "checkpoint-best"):  # two of them a user's
        (tmp_path / "train" / name).mkdir()
    with pytest.raises(RunError, match=r"'train' is interrupted \(checkpoint at step 16\); to continue: tokengrain"):
        _ = read_run(tmp_path).model_path


def test_a_misspelt_run_gets_a_suggestion(tmp_path: Path) -> None:
    (tmp_path / "tgdpo").mkdir()
    (tmp_path / "tgdpo" / "run.json").write_text("{}")
    with pytest.raises(RunError, match=r"tgdp: no such run folder; did you mean '.*tgdpo'"):
        read_run(tmp_path / "tgdp")


def test_a_stage_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = StageRecord("train", tmp_path / "train", "train", "done", "f", {"a": 1}, 2.5)
    written.save()
    assert read_stage(tmp_path / "train") == written
    record = json.loads((tmp_path / "train" / "stage.json").read_text())
    for wrong in ({"seconds": {}}, {"status": "odd"}, {"name": 3}, {"settings": []}, {"more": 1}):
        (tmp_path / "train" / "stage.json").write_text(json.dumps({**record, **wrong}))
        with pytest.raises(RunError, match=r"stage\.json is not a stage record of tokengrain"):
            read_stage(tmp_path / "train")


def test_metrics_for_people() -> None:
    """A resumed run reads the null that stands for NaN, on which the model's card stopped."""
    metrics: dict[str, Any] = {"reward": None, "kl": float("nan"), "loss": 0.5, "correct": 0.25}
    metrics |= {"correct_low": 0.1, "correct_high": 0.4}
    shown = [spoken(metrics, name) for name in ("reward", "kl", "loss", "correct")]
    assert shown == ["none", "none", "0.500", "0.250 (95 % CI 0.100 to 0.400)"]
    assert spoken({"accuracy": 0.5, "comparison": "no difference yet"}, "accuracy") == "no difference yet"
    margins = [spoken({"rewards/margins": -0.6}, "rewards/margins", start) for start in ({}, {"rewards/margins": -0.7})]
    assert margins == ["-0.600", "-0.600 (+0.100)"]
    assert spoken({"rewards/margins": -1e-9}, "rewards/margins") == "0.000"


@pytest.mark.parametrize("program", ["/venv/bin/tokengrain", "/venv/lib/tokengrain/__main__.py"])
def test_the_command_can_be_pasted(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [program, "train", "dpo", "lora={r: 8}"])
    assert typed() == "tokengrain train dpo 'lora={r: 8}'"
