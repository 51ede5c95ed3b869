"""The command line: output, statuses, and errors without tracebacks."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.test_stages import DPO, TGDPO, values
from tokengrain.cli import main
from tokengrain.runs import read_run

COMMANDS = ("train", "annotate", "evaluate", "report", "inspect", "methods")


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run a command in this process: (status, standard output, standard error)."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    found = capsys.readouterr()
    return int(stop.value.code or 0), found.out, found.err


def recipe_file(folder: Path, **over: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values(folder, **over), sort_keys=False))
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(capsys: pytest.CaptureFixture[str], command: str) -> None:
    status, out, _ = call(capsys, command, "--help")
    assert status == 0
    assert "Usage: tokengrain " + command in re.sub(r"\s+", " ", out)
    if command != "methods":
        assert f"tokengrain {command} " in re.sub(r"\s+", " ", out.split("Example")[1])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, "--version")
    assert status == 0
    assert re.fullmatch(r"tokengrain \d+\.\d+\.\d+\n", out)


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, "methods", "--json")
    listed = json.loads(out)
    assert status == 0
    assert {"dpo", "simpo", "tdpo1", "tdpo2", "tgdpo", "treg"} <= {m["name"] for m in listed}
    assert all({"paper", "credit", "objective", "trains", "recipe"} <= m.keys() for m in listed)
    status, out, _ = call(capsys, "methods", "--matrix")
    assert status == 0
    assert "I importance" in out
    status, out, _ = call(capsys, "methods")
    assert status == 0
    assert {"tgdpo", "aligndistil_online"} <= {line.partition(" ")[0] for line in out.splitlines()}
    assert all(m["recipe"] == f"recipes/{m['name']}.yaml" for m in listed)


def test_train_evaluate_report_inspect(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = recipe_file(tmp_path)
    other = str(tmp_path / "other")
    status, out, err = call(capsys, "train", str(path), "--set", "training.max_steps=2", "--output", other)
    assert status == 0, err
    assert "held-out accuracy" in out
    assert "95 % CI" in out
    assert other in out
    status, out, _ = call(capsys, "train", str(path), "-s", "training.max_steps=2", "-o", other, "--dry-run")
    assert status == 0
    assert out.count("reuse") == 2
    status, out, _ = call(capsys, "evaluate", other, "--json")
    assert status == 0
    assert 0 <= json.loads(out)["held_out"]["accuracy"] <= 1
    status, out, err = call(capsys, "report", other)
    assert status == 0, err
    assert Path(out.strip().replace("\n", "")).is_file()
    status, out, err = call(capsys, "inspect", other, "--count", "1")
    assert status == 0, err
    assert "chosen" in out


def test_annotate_then_train(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    stages = {
        "credit": {"kind": "annotate", "credit": {"name": "random"}},
        "train": {"kind": "train", "data": "@credit", "objective": "tgdpo"},
    }
    path = str(recipe_file(tmp_path, stage_values=stages))
    status, out, err = call(capsys, "annotate", path)
    assert status == 0, err
    assert "train.parquet" in out
    assert not (tmp_path / "run" / "train").exists()
    status, out, err = call(capsys, "train", path)
    assert status == 0, err
    assert out.count("reuse") == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("train", "{recipe}", "--set", "sed=1"), "did you mean 'seed'"),
        (("train", "{folder}/nothing.yaml"), "no such recipe file"),
        (("train", "nothing"), "no such recipe file"),
        (("train", "{recipe}", "--data", "{folder}/nothing.jsonl"), "nothing.jsonl"),
        (("train", "{recipe}", "--model", "{folder}/nothing"), "nothing; there is no such folder"),
        (("train", "{recipe}", "--model", "world://storys", "--data", "world://stories"), "did you mean 'stories'"),
        (("train", "{recipe}", "--model", "world://stories"), "give --model and --data together"),
        (("train", "dpo", "--data", "{folder}/rows.jsonl"), "give --model and --data together"),
        (("annotate", "{recipe}"), "nothing to annotate"),
        (("evaluate", "{folder}"), "is not a run folder"),
        (("report", "{folder}/nothing"), "nothing"),
        (("inspect", "{folder}/nothing.jsonl"), "nothing.jsonl"),
        (("methods", "--markdown"), "--markdown goes with --matrix"),
        (("methods", "--json", "--matrix"), "drop --json or --matrix"),
        (("inspect", "{recipe}", "--spans", "diff", "--column", "ref_logps"), "drop --column ref_logps or --spans"),
        (("train", "{recipe}", "--output", "{recipe}/run"), "Not a directory"),
        (("train",), "Missing argument"),
        (("trian", "x"), "No such command"),
        (("train", "{recipe}", "--modle", "x"), "No such option"),
    ],
)
def test_errors_are_messages(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...], expected: str
) -> None:
    path = recipe_file(tmp_path)
    filled = [a.format(recipe=path, folder=tmp_path) for a in arguments]
    status, out, err = call(capsys, *filled)
    assert status == 2
    assert expected in re.sub(r"\s+", " ", err)
    assert "Traceback" not in out + err
    assert not (tmp_path / "run").exists()


def test_ctrl_c_is_status_130(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokengrain.run import trained

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trained.Train, "run", stop)
    status, out, err = call(capsys, "train", str(recipe_file(tmp_path)))
    assert status == 130
    assert "to continue: tokengrain train" in out
    assert "Traceback" not in out + err


def test_python_m_tokengrain(tmp_path: Path) -> None:
    path = recipe_file(tmp_path)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-m", "tokengrain", "train", str(path), "--set", "seed=x"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert found.returncode == 2
    assert found.stderr.startswith("error: ")
    assert "seed: got 'x'" in found.stderr


def test_two_processes(tmp_path: Path) -> None:
    """All kinds of stages under a launcher; the ranks agree and one of them writes."""
    path = recipe_file(tmp_path, stage_values=TGDPO)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    found = subprocess.run(
        [*launcher, "-m", "tokengrain", "train", str(path)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    run = read_run(tmp_path / "run")
    assert [s.status for s in run.stages] == ["done"] * 5
    assert found.stdout.count("run folder:") == 1
    assert run.metrics["stages"]["credit"]["rows"] == {"train": 9, "eval": 3}
    steps = [row["step"] for row in run.stages[-1].log() if "learning_rate" in row]
    assert steps == [1, 2, 3, 4]


def test_the_trainer_from_python(tmp_path: Path) -> None:
    """The lines that the README shows."""
    import tokengrain
    from tests.test_stages import write_rows
    from tokengrain.models import load_model, load_tokenizer
    from tokengrain.specs import ModelSpec

    tokengrain.train(recipe_file(tmp_path, stage_values={"train": DPO}), quiet=True, training__max_steps=1)
    path = str(tmp_path / "run" / "train" / "model")
    model, tokenizer = load_model(ModelSpec(path=path), path), load_tokenizer(ModelSpec(path=path), path)

    pairs = tokengrain.prepare_pairs(str(write_rows(tmp_path / "pairs.jsonl")), tokenizer)
    args = tokengrain.PreferenceConfig(str(tmp_path / "out"), max_steps=2, use_cpu=True, disable_tqdm=True)
    trainer = tokengrain.PreferenceTrainer(
        model, args, objective="tdpo2", train_dataset=pairs, eval_dataset=pairs, processing_class=tokenizer
    )
    trainer.train()
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1


def test_training_from_python(tmp_path: Path) -> None:
    import tokengrain

    path = recipe_file(tmp_path, stage_values={"train": DPO})
    result = tokengrain.train(path, output=tmp_path / "py", quiet=True, training__max_steps=1, seed=4)
    assert result.path == tmp_path / "py"
    assert result.model_path.is_dir()
    assert tokengrain.read_run(tmp_path / "py").recipe["seed"] == 4
