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
from tests.training.tiny import make_samples, make_trainer


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


def test_the_curves_of_tensorboard_stand_in_the_stages_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what is evaluated before training; transformers' own would begin in the working folder."""
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    samples = make_samples(4)
    trainer = make_trainer(tmp_path / "out", samples, eval_dataset=samples, max_steps=1, report_to=["tensorboard"])
    trainer.evaluate()
    trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    found = EventAccumulator(str(tmp_path / "out" / "runs"))
    found.Reload()
    assert {"train/loss", "eval/accuracy"} <= set(found.Tags()["scalars"])


PROGRAM = """
import sys
from pathlib import Path
from tests.test_stages import DPO, run, values
recipe = values(Path(sys.argv[2]), {"guide": DPO, "train": DPO})
recipe["training"] |= {"report_to": [sys.argv[1]], "project": "mine"}
run(recipe)
"""


def report_to(tracker: str, folder: Path, **environment: str) -> None:
    """Train two stages in a process of its own: trackers start threads and keep their places in constants."""
    found = os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))  # MLflow keeps pages where it runs
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": found, **environment}
    command = [sys.executable, "-c", PROGRAM, tracker, str(folder)]
    subprocess.run(command, env=environment, cwd=folder, check=True, timeout=600)


def test_trackio(tmp_path: Path) -> None:
    report_to("trackio", tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"))
    (file,) = (path for path in (tmp_path / "trackio").glob("*.db") if path.stem.startswith("mine"))
    with sqlite3.connect(file) as store:
        rows = store.execute("select run_name, metrics from metrics").fetchall()
    assert {name for name, _ in rows} == {"run/guide", "run/train"}
    assert any("train/rewards/margins" in str(metrics) for _, metrics in rows)
    kept = [metrics for _, metrics in rows if "token credit" in str(metrics)]
    assert ["html" in str(metrics).lower() for metrics in kept] == [True, True]


@pytest.mark.slow
def test_wandb(tmp_path: Path) -> None:
    """Each stage is a run of its own, with its name, its curves and its page."""
    pytest.importorskip("wandb")
    report_to("wandb", tmp_path, WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    runs = sorted(tmp_path.glob("wandb/offline-run-*"))
    names = []
    for folder in runs:
        (log,) = folder.glob("*.wandb")
        kept = log.read_bytes()
        names += [name for name in (b"run/guide", b"run/train") if name in kept]
        assert b"train/rewards/margins" in kept
        assert b"eval/accuracy" in kept
        (page,) = (folder / "files" / "media" / "html").glob("token credit*.html")
        assert "log-ratio of" in page.read_text()
    assert sorted(names) == [b"run/guide", b"run/train"]


@pytest.mark.slow
def test_mlflow(tmp_path: Path) -> None:
    """As for wandb; the evaluation after training is in the stage's run too, and there is no other."""
    mlflow = pytest.importorskip("mlflow")
    place = f"sqlite:///{tmp_path / 'mlflow.db'}"
    report_to("mlflow", tmp_path, MLFLOW_TRACKING_URI=place)
    client = mlflow.MlflowClient(place)
    runs = {one.info.run_name: one for one in client.search_runs(["0"])}
    assert {name: one.info.status for name, one in runs.items()} == {"run/guide": "FINISHED", "run/train": "FINISHED"}
    for one in runs.values():
        (page,) = client.list_artifacts(one.info.run_id)
        assert page.path == "token-credit-4.html"
        assert [point.step for point in client.get_metric_history(one.info.run_id, "loss")] == [1, 2, 3, 4]
        assert len(client.get_metric_history(one.info.run_id, "eval_accuracy")) == 2
        assert one.data.params["hidden_size"] == "16"
