"""The run folder: which stages run, resume or are reused, and status files that stay true whatever happens."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from tokengrain.errors import RunError, TokengrainError, fingerprint, require, shown, write_json, write_text
from tokengrain.recipe.schema import INIT, Recipe, dump_recipe
from tokengrain.run.load import resolve_stages
from tokengrain.run.stages import Stage
from tokengrain.runs import FORMAT, TRAINED, Run, StageRecord, Status, is_run, read_run, read_stage, resume_command

# ---- The plan ----

Action = Literal["run", "resume", "reuse"]


@dataclass
class StagePlan:
    """A stage and what will be done about it.

    Attributes:
        stage: the stage with everything it inherits.
        path: its folder.
        settings: what decides its result: settings, and fingerprints of its inputs.
        record: what is on disk, if it was started before with the same settings.
        action: "run" from the start, "resume" from what is there, or "reuse" the finished result.
    """

    stage: Stage
    path: Path
    settings: dict[str, Any]
    record: StageRecord | None = None
    action: Action = "run"

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.settings)


def make_plan(recipe: Recipe, *, overwrite: bool = False) -> list[StagePlan]:
    """Decide for every stage whether it runs, resumes or is reused. Reads, and changes nothing.

    Args:
        overwrite: results of other settings in the run folder are to be replaced.

    Raises:
        RunError: the run folder holds something else, and `overwrite` is False; says what differs.
    """
    run_dir = Path(recipe.output_dir)
    plans: list[StagePlan] = []
    for stage in resolve_stages(recipe):
        above = {plan.stage.name: plan.fingerprint for plan in plans}
        plans.append(StagePlan(stage, run_dir / stage.name, stage.decides(run_dir, above)))
    _check_folder(recipe, plans, overwrite)
    for plan in plans:
        record = read_stage(plan.path)
        if record is not None and record.fingerprint == plan.fingerprint:
            plan.record = record
            plan.action = "reuse" if record.status == "done" else "resume"
    return plans


def _check_folder(recipe: Recipe, plans: list[StagePlan], overwrite: bool) -> None:
    """The run folder must be new, or hold this run. A folder that is no run is never overwritten."""
    run_dir = Path(recipe.output_dir)
    if not run_dir.exists():
        return
    require(run_dir.is_dir(), RunError, f"output_dir {run_dir} is a file; choose a folder that does not exist yet")
    if not is_run(run_dir):
        what = "is not empty and not a run of tokengrain (no run.json)"
        require(not any(run_dir.iterdir()), RunError, f"output_dir {run_dir} {what}; choose another with --output")
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
        if record.name not in by_name:
            raise RunError(f"{what}it has a stage {record.name!r}, this recipe has none; {advice}")
        plan = by_name[record.name]
        if record.fingerprint != plan.fingerprint:
            found = "; ".join(differences(record.settings, plan.settings)[:3])
            found = found or "made by another version of tokengrain"
            raise RunError(f"{what}stage {record.name!r} differs: {found}; {advice}")


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """What differs between two stages' settings, as `key: old there, new here`."""
    if isinstance(old, dict) and isinstance(new, dict):
        out = []
        for key in [*old, *(k for k in new if k not in old)]:
            out += differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return out
    if old == new:
        return []
    if path.endswith("content"):
        return [f"{path.rpartition('.')[0]}: other content than there"]
    return [f"{path}: {shown(old)} there, {shown(new)} here"]


# ---- The status files ----


class RunFolder:
    """Writes the status files of a run; in one process only.

    Args:
        writes: whether this process is the one.
    """

    def __init__(self, recipe: Recipe, plans: list[StagePlan], writes: bool) -> None:
        self.path = Path(recipe.output_dir)
        self.recipe, self.plans, self.writes = recipe, plans, writes
        self._began = False
        self._info: dict[str, Any] = {}

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
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "versions": versions(),
            "stages": [{"name": p.stage.name, "kind": p.stage.kind, "fingerprint": p.fingerprint} for p in self.plans],
        }
        if not self.writes:
            return
        self._drop_others()
        write_text(self.path / "recipe.yaml", dump_recipe(self.recipe))
        self._save("running")

    def _drop_others(self) -> None:
        kept = {p.stage.name for p in self.plans if p.action != "run" or p.record is not None}
        for record in read_run(self.path).stages if (self.path / "run.json").exists() else ():
            if record.name not in kept:
                shutil.rmtree(record.path)
        (self.path / "metrics.json").unlink(missing_ok=True)

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
        plan.record.seconds += time.monotonic() - started
        if self.writes:
            with suppress(*((OSError,) if status != "done" else ())):
                plan.record.save()

    def check_space(self) -> None:
        """Refuse to start where not even one set of weights could be saved.

        Raises:
            RunError: with the free and the needed space.
        """
        base = self.path
        while not base.exists():
            base = base.parent
        free = shutil.disk_usage(base).free
        needed = max((_size(p.stage.model.path) for p in self.plans if p.stage.kind != INIT), default=0)
        if free < needed:
            raise RunError(
                f"{base} has {free / 2**30:.1f} GiB free; the model alone takes {needed / 2**30:.1f} GiB. "
                "Choose another disk with --output"
            )

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
        """Leave a true status behind, whatever happens, and say how to go on."""
        try:
            yield
        except BaseException as error:
            status: Status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            if self._began:
                with suppress(OSError):
                    self._save(status)
                run = Run(self.path, self._info, {}, [])
                if isinstance(error, KeyboardInterrupt):
                    console.print(f"stopped; what was done is kept in {self.path}", markup=False)
                    console.print(f"to continue: {resume_command(run)}", soft_wrap=True, markup=False)
            if not isinstance(error, TokengrainError) and _disk_is_full(error):
                raise RunError(
                    f"no space left on the disk of {self.path}; what was finished is kept. Free some space "
                    f"and run {resume_command(Run(self.path, {}, {}, []))}"
                ) from error
            raise


def _disk_is_full(error: BaseException) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT)
    return (isinstance(error, OSError) and error.errno in full) or "No space left on device" in str(error)


def _size(path: str | None) -> int:
    folder = Path(os.path.expanduser(path or ""))
    return sum(f.stat().st_size for f in folder.glob("*.safetensors")) if path and folder.is_dir() else 0


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    found = {"python": sys.version.split()[0]}
    for name in ("tokengrain", "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
