"""The status files of a run, written so that a true status is left behind whatever happens."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from tokengrain.errors import RunError, TokengrainError, write_json, write_text
from tokengrain.recipe.load import dump_recipe
from tokengrain.recipe.schema import Recipe
from tokengrain.run.plan import StagePlan
from tokengrain.runs import FORMAT, TRAINED, Run, StageRecord, Status, read_run, resume_command


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
        needed = max((_size(p.stage.model.path) for p in self.plans if p.stage.kind != "init"), default=0)
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
                    console.print(f"stopped; what was done is kept in {self.path}")
                    console.print(f"to continue: {resume_command(run)}", soft_wrap=True)
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
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for name in ("tokengrain", "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
