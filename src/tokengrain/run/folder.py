"""The run folder: which stages run, resume or are reused, and status files that stay true whatever happens."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from rich.console import Console

from tokengrain import models
from tokengrain.errors import (
    ModelError,
    RunError,
    TokengrainError,
    explained,
    fault,
    fingerprint,
    is_temporary,
    read_json,
    remove_temporaries,
    require,
    shown,
    write_json,
    write_text,
)
from tokengrain.recipe.schema import INIT, Recipe, dump_recipe
from tokengrain.run.fit import Outlook, fit
from tokengrain.run.load import resolve_stages
from tokengrain.run.stages import LANGUAGE, Stage
from tokengrain.runs import (
    FORMAT,
    INPUTS,
    TIME,
    TRAINED,
    Run,
    StageRecord,
    Status,
    is_run,
    read_run,
    read_stage,
    resume_command,
    typed,
)
from tokengrain.training.checkpoint import STAGING

# ---- The plan ----

Action = Literal["run", "resume", "reuse"]


@dataclass
class StagePlan:
    """A stage, its folder and what will be done about it."""

    stage: Stage
    path: Path
    settings: dict[str, Any]  # what decides its result: settings, and fingerprints of its inputs
    outlook: Outlook | None = None  # of one that trains
    record: StageRecord | None = None  # what is on disk, if it was started before with the same settings
    action: Action = "run"

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.settings)


def make_plan(recipe: Recipe, *, overwrite: bool = False, processes: int = 1) -> list[StagePlan]:
    """Decide for every stage whether it runs, resumes or is reused. Reads, and changes nothing.

    The stages have the settings that were fitted to rows and model (`fit`), and so has their `recipe`.
    Raises `RunError`, saying what differs, if the run folder holds something else and is not to be overwritten.
    """
    recipe, outlooks = fit(recipe, processes)
    run_dir = Path(recipe.output_dir)
    plans: list[StagePlan] = []
    for stage in resolve_stages(recipe):
        above = {plan.stage.name: plan.fingerprint for plan in plans}
        settings, outlook = stage.decides(run_dir, above), outlooks.get(stage.name)
        plans.append(StagePlan(stage, run_dir / stage.name, settings, outlook))
    _check_folder(recipe, plans, overwrite)
    for plan in plans:
        record = read_stage(plan.path)
        if record is not None and record.fingerprint == plan.fingerprint:
            plan.record = record
            plan.action = "reuse" if record.status == "done" else "resume"
    return plans


def check_made(plans: Sequence[StagePlan]) -> None:
    """Raises `RunError`, which names the file, if a finished stage's model is needed but missing or cut off.

    The last trained model is needed, and what a stage takes that is yet to run; of an adapter its base, too.
    """
    trained = [plan.stage.name for plan in plans if plan.stage.kind in TRAINED]
    needed = set(trained[-1:])
    for plan in reversed(plans):
        name, path = plan.stage.name, str(plan.path / "model")
        if plan.action != "reuse":
            needed |= set(plan.stage.inputs)
        elif name in needed and plan.stage.kind in (*LANGUAGE, *TRAINED):
            try:
                models.check_saved(path)
            except ModelError as error:
                how = f"put it back, or remove {plan.path / 'stage.json'} to have the stage run again"
                raise RunError(f"stage {name!r} is done, but its model is not whole: {error}; {how}") from error
            needed |= {str(plan.stage.model.stage)} if models.is_adapter(path) else set()


def _check_folder(recipe: Recipe, plans: list[StagePlan], overwrite: bool) -> None:
    """The run folder must be new, or hold this run. A folder that is no run is never overwritten."""
    run_dir = Path(recipe.output_dir)
    if not run_dir.exists():
        return
    require(run_dir.is_dir(), RunError, f"output_dir {run_dir} is a file; choose a folder that does not exist yet")
    if not is_run(run_dir):
        what = "is not empty and not a run of tokengrain (no run.json)"
        own = (LOCK, OWNER, INPUTS)
        others = [path for path in run_dir.iterdir() if path.name not in own and not is_temporary(path)]
        require(not others, RunError, f"output_dir {run_dir} {what}; choose another with --output")
        return
    if overwrite:
        return
    run = read_run(run_dir)
    advice = "choose another folder with --output, or replace what differs with --overwrite"
    methods = f"a run of method {run.method}, this is {recipe.method}"
    require(run.method == recipe.method, RunError, f"{run_dir} holds {methods}; {advice}")
    by_name = {plan.stage.name: plan for plan in plans}
    for record in run.stages:
        what = f"{run_dir} holds another run: "
        known = record.name in by_name
        require(known, RunError, f"{what}it has a stage {record.name!r}, this recipe has none; {advice}")
        plan = by_name[record.name]
        found = "; ".join(differences(record.settings, plan.settings)[:3]) or "made by another version of tokengrain"
        same = record.fingerprint == plan.fingerprint
        require(same, RunError, f"{what}stage {record.name!r} differs: {found}; {advice}")


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """What differs between two stages' settings, as `key: old there, new here`."""
    if isinstance(old, dict) and isinstance(new, dict):
        below = (differences(old.get(k), new.get(k), f"{path}.{k}" if path else str(k)) for k in {**old, **new})
        return [line for lines in below for line in lines]
    if old == new:
        return []
    if path.endswith("content"):
        return [f"{path.rpartition('.')[0]}: other content than there"]
    if path.endswith("chat_template"):  # the beginnings of two are often the same
        return [f"{path}: another template than there"]
    return [f"{path}: {shown(old)} there, {shown(new)} here"]


# ---- Whose the folder is ----

LOCK, OWNER = ".lock", ".owner.json"


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run folder, so that no second run writes into it. The lock of a process that died holds nobody."""
    if run_dir.exists() and not run_dir.is_dir():  # the plan says what is wrong
        yield
        return
    lock, owner = FileLock(run_dir / LOCK, timeout=0), run_dir / OWNER
    with explained():
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:  # an OSError too
            what = f"{run_dir} is in use{_owner(owner)}; wait for it, or choose another with --output"
            raise RunError(what) from None
    try:
        write_json(owner, {"pid": os.getpid(), "host": platform.node(), "since": _now()})
        yield
    finally:
        owner.unlink(missing_ok=True)
        (run_dir / LOCK).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # removes a folder in which nothing was done
            run_dir.rmdir()


def _owner(path: Path) -> str:
    try:
        found = read_json(path)
        return f" by process {found['pid']} on {found['host']}, since {found['since']}"
    except (RunError, KeyError, TypeError):  # it has just come, or is leaving
        return ""


def check_links(run_dir: Path) -> None:
    """Raises `RunError` if a symbolic link leads out of the folder: what is written or removed must lie in it."""
    root = run_dir.resolve()
    for folder, folders, files in os.walk(run_dir):
        for path in (Path(folder) / name for name in (*folders, *files)):
            inside = not path.is_symlink() or path.resolve().is_relative_to(root)
            require(inside, RunError, f"{path} links to {os.path.realpath(path)}, outside the run folder; remove it")


# ---- The status files ----


class RunFolder:
    """Writes the status files of a run, in the one process that `writes`."""

    def __init__(self, recipe: Recipe, plans: list[StagePlan], writes: bool) -> None:
        self.path = Path(recipe.output_dir)
        self.recipe, self.plans, self.writes = recipe, plans, writes
        resumed = any(plan.record is not None for plan in plans) and is_run(self.path)
        known = read_run(self.path).template_time if resumed else None
        self.template_time = known or datetime.now().isoformat()
        self._began = False
        self._info: dict[str, Any] = {}

    def tidy(self) -> None:
        """Remove what killed processes left: temporary files, and beside a finished result what it was made from."""
        if self.writes:
            check_links(self.path)
            remove_temporaries(self.path)
            for plan in (plan for plan in self.plans if plan.action == "reuse"):
                for left in (plan.path / STAGING, *plan.path.glob("*.shards")):
                    shutil.rmtree(left, ignore_errors=True)

    def begin(self) -> None:
        """Make the folder this run's: `recipe.yaml` and `run.json`; drop results of other settings."""
        if self._began:
            return
        self._began = True
        self._info = {
            "format": FORMAT,
            "method": self.recipe.method,
            "status": "running",
            "started": _now(),
            "finished": None,
            TIME: self.template_time,
            "command": typed(),
            "versions": versions(),
            "stages": [{"name": p.stage.name, "kind": p.stage.kind, "fingerprint": p.fingerprint} for p in self.plans],
        }
        if not self.writes:
            return
        kept = {p.stage.name for p in self.plans if p.action != "run" or p.record is not None}
        for record in read_run(self.path).stages if (self.path / "run.json").exists() else ():
            if record.name not in kept:
                shutil.rmtree(record.path)
        (self.path / "metrics.json").unlink(missing_ok=True)
        write_text(self.path / "recipe.yaml", dump_recipe(self.recipe, anchored=True))
        self._save("running")

    def _save(self, status: Status) -> None:
        self._info["status"] = status
        if status != "running":
            self._info["finished"] = _now()
        if self.writes:
            write_json(self.path / "run.json", self._info)

    def start(self, plan: StagePlan) -> None:
        """Record that a stage is running."""
        seconds = plan.record.seconds if plan.record is not None else 0.0
        plan.record = StageRecord(
            plan.stage.name, plan.path, plan.stage.kind, "running", plan.fingerprint, plan.settings, seconds
        )
        if self.writes:
            plan.record.save()

    def stop(self, plan: StagePlan, status: Status, started: float) -> None:
        """Record how a stage ended. A full disk must not hide the error that it caused."""
        assert plan.record is not None
        plan.record.status = status
        plan.record.seconds = round(plan.record.seconds + time.monotonic() - started, 3)
        if self.writes:
            with suppress(RunError) if status != "done" else nullcontext():
                plan.record.save()

    def check_space(self) -> None:
        """Raises `RunError` where not even one set of weights could be saved."""
        base = self.path
        while not base.exists():
            base = base.parent
        free = shutil.disk_usage(base).free
        needed = max((_size(p.stage.model.path) for p in self.plans if p.stage.kind != INIT), default=0)
        what = f"{base} has {free / 2**30:.1f} GiB free; the model alone takes {needed / 2**30:.1f} GiB"
        require(free >= needed, RunError, f"{what}. Choose another disk with --output")

    def finish(self) -> dict[str, Any]:
        """Write `metrics.json` and close the run. Nothing is written where everything was there already."""
        path = self.path / "metrics.json"
        run = Run(self.path, {"stages": [], "status": "running"}, {}, [p.record for p in self.plans if p.record])
        last = [r for r in run.stages if r.kind in TRAINED][-1:]
        metrics = {
            "method": self.recipe.method,
            "model": self.recipe.model.describe(),
            "data": self.recipe.data.train,
            "seed": self.recipe.seed,
            "seconds": round(sum(r.seconds for r in run.stages), 1),
            "stages": {r.name: {"kind": r.kind, "seconds": round(r.seconds, 1), **r.metrics} for r in run.stages},
            "final": last[0].metrics.get("after", {}) if last else {},
        }
        if self._began or not path.exists() or read_run(self.path).status != "done":
            self.begin()
            if self.writes:
                write_json(path, metrics)
            self._save("done")
        return metrics

    def pause(self) -> None:
        """Leave a run whose later stages are still to come."""
        if self._began:
            self._save("interrupted")

    @contextmanager
    def kept_in_order(self, console: Console) -> Iterator[None]:
        """Leave a true status behind, whatever happens, and say how to resume."""
        try:
            yield
        except BaseException as error:
            status: Status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            resume = resume_command(Run(self.path, {}, {}, []))
            if self._began:
                with suppress(RunError):
                    self._save(status)
                if status == "interrupted":
                    console.print(f"stopped; what was done is kept in {self.path}", markup=False)
                    console.print(f"to continue: {resume}", soft_wrap=True, markup=False)
            if isinstance(error, TokengrainError) or (reason := fault(error)) is None:
                raise
            raise RunError(f"{reason}. What was finished is kept in {self.path}; to continue: {resume}") from error


def _size(path: str | None) -> int:
    folder = Path(os.path.expanduser(path or ""))
    return sum(f.stat().st_size for f in folder.glob("*.safetensors")) if path and folder.is_dir() else 0


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


VERSIONED = ("tokengrain", "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "bitsandbytes")


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    found = {"python": sys.version.split()[0]}
    for name in VERSIONED:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
