"""Trackers of transformers, offline: curves, the run's name and its settings arrive."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.test_stages import run, values


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    recipe = values(tmp_path)
    recipe["training"]["report_to"] = ["tensorboard"]
    run(recipe)
    found = EventAccumulator(str(tmp_path / "events"))
    found.Reload()
    assert {"train/loss", "train/rewards/margins", "eval/accuracy"} <= set(found.Tags()["scalars"])
    assert [event.step for event in found.Scalars("train/loss")] == [1, 2, 3, 4]
    (text,) = found.Tensors("token credit/text_summary")[0].tensor_proto.string_val
    assert b"| row | completion | credit | tokens |" in text
    assert b"log-ratio of train" in text
    assert '"run_name": "run/train"' in str(found.Tensors("args/text_summary")[0].tensor_proto.string_val[0])


PROGRAM = """
import sys
from pathlib import Path
from tests.test_stages import run, values
recipe = values(Path(sys.argv[1]))
recipe["training"] |= {"report_to": ["trackio"], "project": "mine"}
run(recipe)
"""


def test_trackio(tmp_path: Path) -> None:
    """In a process of its own: trackio starts threads and keeps its folder in a constant."""
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], env=environment, check=True, timeout=300)
    (file,) = (path for path in (tmp_path / "trackio").glob("*.db") if path.stem.startswith("mine"))
    with sqlite3.connect(file) as store:
        rows = store.execute("select run_name, metrics from metrics").fetchall()
    assert {name for name, _ in rows} == {"run/train"}
    assert any("train/rewards/margins" in str(metrics) for _, metrics in rows)
    (kept,) = [metrics for _, metrics in rows if "token credit" in str(metrics)]
    assert "html" in str(kept).lower()
