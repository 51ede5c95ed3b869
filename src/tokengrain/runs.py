"""The run folder: its layout, its status files, and reading it back.

    runs/tgdpo/
      recipe.yaml       the resolved recipe: everything merged, nothing left to defaults of other files
      run.json          method, versions, status, stages with their fingerprints
      metrics.json      written last
      init/             only when the model is built from scratch: model/
      guide/  train/    stage.json, log.jsonl, metrics.json, answers.json, model/ (weights, tokenizer, card)
      credit/           stage.json, train.parquet, eval.parquet, manifest.json

Every file is written atomically, so whatever is there is whole; `status` says what is not there yet.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import TypeAdapter

from tokengrain.errors import RunError, foreign, read_json, read_log, read_text, require, shown, some, write_json
from tokengrain.settings import parse_yaml

NAME = r"^[A-Za-z][A-Za-z0-9_-]*$"  # what a stage may be called; its folder has the same name
CHECKPOINT = re.compile(r"checkpoint-(\d+)")  # names of the folders of checkpoints
TIME = "template_time"
"""In `run.json`: the local time that chat templates write, the same for all stages and for `evaluate`."""
INPUTS = "inputs"
"""Folder of rows and models that were given in memory, from Python."""
ROLLOUT_FILE = "rollouts.jsonl"
ANSWERS = "answers.json"
"""In the folder of a stage: `prompts`, and what the model said to them at the `start` and when `trained`."""
FORMAT = 1  # of the layout and of what the fingerprints cover; part of every fingerprint
TRAINED = ("sft", "train", "reward", "online")  # kinds of stages that make a trained model
LOG_RATIO = "log-ratio of "  # begins the name of a source that is no credit, but what a stage's policy learned
EQUAL = "no difference yet"  # `comparison` in metrics: the policy still is its reference
TITLES = {
    "accuracy": "pair accuracy",
    "reward": "reward",
    "correct": "correct, share of completions",
    "length": "tokens per completion",
    "truncated": "truncated, share of completions",
    "rewards/margins": "reward margin",
    "kl/teacher": "KL to the teacher, nats per token",
    "kl": "KL to the reference, nats per token",
    "entropy": "entropy, nats per token",
    "perplexity": "perplexity",
    "loss": "loss",
    "MRR@10": "MRR@10",
    "Hit@10": "Hit@10",
    "mass": "probability of docids",
}
"""Held-out numbers for people, in order."""
Status = Literal["running", "interrupted", "failed", "done"]


@dataclass
class StageRecord:
    """What is on disk about one stage, in the folder of its name."""

    name: str
    path: Path
    kind: str
    status: Status  # "running" also when the process was killed
    fingerprint: str  # of settings and inputs
    settings: dict[str, Any] = field(default_factory=dict)  # what the fingerprint was made of, to name a difference
    seconds: float = 0.0  # over all attempts

    @property
    def model_path(self) -> Path:
        return self.path / "model"

    @property
    def metrics(self) -> dict[str, Any]:
        """Content of `metrics.json`: `before`, `after`, `train`; empty if the stage has none yet."""
        return read_object(self.path / "metrics.json")

    def log(self) -> list[dict[str, Any]]:
        """Rows of `log.jsonl`; a last line that was cut off by a kill is left out."""
        return read_log(self.path / "log.jsonl")

    def save(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "stage.json", {name: value for name, value in vars(self).items() if name != "path"})


@dataclass
class Run:
    path: Path
    info: dict[str, Any]  # content of `run.json`
    recipe: dict[str, Any]  # content of `recipe.yaml`
    stages: list[StageRecord]  # in order; stages that have not started are missing

    @property
    def method(self) -> str:
        return str(self.info.get("method"))

    @property
    def status(self) -> Status:
        return self.info["status"]

    @property
    def names(self) -> list[str]:
        """Names of all stages; they become folders that are written and removed, so only plain ones are allowed."""
        listed = self.info.get("stages", [])
        names: list[str] = []
        for stage in listed if isinstance(listed, list) else [listed]:
            name = stage.get("name") if isinstance(stage, dict) else stage
            plain = isinstance(name, str) and re.fullmatch(NAME, name) and not CHECKPOINT.fullmatch(name)
            what = f"a stage is called {shown(name)}; expected letters, digits, - and _"
            require(plain, RunError, f"{self.path / 'run.json'} is damaged: {what}")
            names.append(str(name))
        return names

    @property
    def metrics(self) -> dict[str, Any]:
        return read_object(self.path / "metrics.json")

    @property
    def template_time(self) -> str | None:
        with foreign(f"{self.path / 'run.json'} is damaged: {TIME}: "):
            return datetime.fromisoformat(self.info[TIME]).isoformat() if self.info.get(TIME) is not None else None

    @property
    def credit_stages(self) -> list[StageRecord]:
        return [s for s in self.stages if s.kind == "annotate" and s.status == "done"]

    @property
    def final_stage(self) -> StageRecord:
        """The last stage that trained a model. Raises `RunError` if the run is not finished."""
        trained = [s for s in self.stages if s.kind in TRAINED and s.status == "done"]
        if not trained or self.status != "done":
            raise RunError(unfinished_message(self))
        return trained[-1]

    @property
    def model_path(self) -> Path:
        return self.final_stage.model_path


def read_stage(path: Path) -> StageRecord | None:
    if not (path / "stage.json").exists():
        return None
    with foreign(f"{path / 'stage.json'} is not a stage record of tokengrain: "):
        record = StageRecord(path=path, **read_object(path / "stage.json"))
        return TypeAdapter(StageRecord).validate_python(vars(record))


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a run, {} if there is no such file. Raises `RunError` if it holds something else."""
    if not path.exists():
        return {}
    found = read_json(path)
    require(isinstance(found, dict), RunError, f"{path} is damaged: got {shown(found)}; expected an object")
    return found


def is_run(path: str | Path) -> bool:
    return (Path(path) / "run.json").is_file()


def read_run(path: str | Path) -> Run:
    """Read a run folder, finished or not. Raises `RunError`, saying what is there instead, if it is none."""
    path = Path(path)
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir() if is_run(p)] if path.parent.is_dir() else []
        near = get_close_matches(path.name, beside, n=1)
        hint = f"did you mean {str(path.parent / near[0])!r}?" if near else "`tokengrain train RECIPE` makes one"
        raise RunError(f"{path}: no such run folder; {hint}")
    require(path.is_dir(), RunError, f"{path} is a file; expected the folder of a run (one with run.json in it)")
    if not is_run(path):
        raise RunError(f"{path} is not a run folder: it has no run.json ({_what_it_holds(path)}")
    info = read_object(path / "run.json")
    recipe_file = path / "recipe.yaml"
    recipe = parse_yaml(read_text(recipe_file), f"{recipe_file} is damaged", RunError) if recipe_file.exists() else {}
    readable = recipe is None or isinstance(recipe, dict)
    require(readable, RunError, f"{recipe_file} is damaged: got {shown(recipe)}; expected a recipe")
    written = info.get("status") in get_args(Status)
    require(written, RunError, f"{path / 'run.json'} was not written by `tokengrain train`: it has no status")
    run = Run(path, info, recipe or {}, stages=[])
    run.stages += [record for name in run.names if (record := read_stage(path / name)) is not None]
    return run


def _what_it_holds(path: Path) -> str:
    names = sorted(p.name for p in path.iterdir())
    found = f"it holds {some(names)})" if names else "it is empty)"
    runs = [name for name in names if is_run(path / name)]
    if runs:
        return f"{found}; it contains runs: {', '.join(runs[:8])}"
    return f"{found}; the run is the folder above: {path.parent}" if is_run(path.parent) else found


def spoken(metrics: Mapping[str, Any], name: str, before: Mapping[str, Any] | None = None) -> str:
    """A metric for people, `0.612 (95 % CI 0.551 to 0.670)`; NaN, which JSON holds as null, is "none".

    A margin that was not 0 `before`, as of objectives without a reference, comes with its change: `-0.629 (+0.076)`.
    """
    if name == "accuracy" and "comparison" in metrics:  # of a policy that still is its reference
        return str(metrics["comparison"])
    value, low, high = (metrics.get(key) for key in (name, f"{name}_low", f"{name}_high"))
    if value is None or value != value:
        return "none"
    start = (before or {}).get(name) or 0.0
    if name == "rewards/margins" and abs(start) >= 5e-4:
        return f"{value:z.3f} ({value - start:+z.3f})"
    return f"{value:z.3f}" + (f" (95 % CI {low:z.3f} to {high:z.3f})" if None not in (low, high) else "")


def unfinished_message(run: Run) -> str:
    done = [s.name for s in run.stages if s.status == "done"]
    status, stages = f"(status: {run.status})", ", ".join(run.names)
    parts = [f"{run.path} is not finished {status}", f"finished stages: {', '.join(done) or 'none'} of {stages}"]
    for stage in (s for s in run.stages if s.status != "done"):
        found = [CHECKPOINT.fullmatch(p.name) for p in stage.path.glob("checkpoint-*") if p.is_dir()]
        steps = [int(match[1]) for match in found if match]
        kept = f"checkpoint at step {max(steps)}" if steps else "no checkpoint yet"
        parts.append(f"stage {stage.name!r} is {stage.status} ({kept})")
    parts.append(f"to continue: {resume_command(run)}")
    return "; ".join(parts)


def typed() -> str:
    """The command that started this process."""
    program = Path(sys.argv[0])
    module = program.name == "__main__.py"  # `python -m tokengrain`
    return shlex.join([program.parent.name if module else program.name, *sys.argv[1:]])


def resume_command(run: Run) -> str:
    """The command that continues `run`; its folder holds the resolved recipe, so nothing else is needed."""
    return shlex.join(["tokengrain", "train", str(run.path / "recipe.yaml")])
