"""Reading a run folder that is not finished."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokengrain.errors import RunError, write_json
from tokengrain.runs import StageRecord, read_run


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
