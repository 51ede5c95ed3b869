"""Runs of all kinds killed at random moments: the same command ends with the same files, bit for bit.

`make test-slow` kills 60, `make test` two others.

The moments follow from the number of the kill, as a share of what the run takes undisturbed. A third of the runs is
killed a second time while it goes on.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.security.test_processes import below
from tests.test_stages import DPO, TGDPO, values
from tokengrain.run.load import load_recipe
from tokengrain.run.runner import run_recipe

TIMED = ("seconds", "template_time", "runtime", "per_second", "started", "finished", "command", "total_flos", "since")
ONLINE: dict[str, Any] = {
    "kind": "online",
    "objective": {"name": "grpo"},
    "rewards": [{"name": "format", "pattern": "[a-z]", "whole": False}],
    "credit": [{"name": "group"}],
    "prompts": {"chat": False},
    "training": {
        "prompts_per_rollout": 4,
        "num_generations": 2,
        "minibatches": 2,
        "max_new_tokens": 6,
        "save_steps": 3,
    },
}
CREDIT = {
    "guide": {**DPO, "training": {"max_steps": 1}},
    "credit": {"kind": "annotate", "credit": {"name": "guide", "model": "@guide", "beta": 0.3}, "shard_rows": 2},
}
KINDS: dict[str, tuple[dict[str, Any], int, int]] = {  # stages, processes, kills
    "offline": ({"train": DPO}, 1, 14),
    "several stages": (TGDPO, 1, 12),
    "online": ({"train": ONLINE}, 1, 14),
    "annotate": (CREDIT, 1, 8),
    "annotate with two": (CREDIT, 2, 4),
    "offline with two": ({"train": DPO}, 2, 4),
    "online with two": ({"train": ONLINE}, 2, 4),
}
KILLS = [(kind, number) for kind, (_, _, count) in KINDS.items() for number in range(count)]
assert len(KILLS) == 60


# ---- Starting a run: a copy of this process, or torchrun with two ----


class Started:
    """A run under way; `end` waits for it and gives its exit status, `kill` ends all of its processes at once."""

    def __init__(self, recipe: Path, processes: int) -> None:
        if processes == 1:
            made = multiprocessing.get_context("fork").Process(target=_work, args=(recipe,))
            made.start()
            self.pid, self._wait = made.pid, lambda: made.join() or made.exitcode
        else:
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
            command += ["--master_port", str(random.SystemRandom().randint(20_000, 60_000)), "-m", "tokengrain"]
            log = open(recipe.with_suffix(".log"), "ab")  # noqa: SIM115 - as long as the process
            command += ["train", str(recipe)]
            child = subprocess.Popen(command, stdout=log, stderr=log, process_group=0)
            self.pid, self._wait = child.pid, child.wait

    def end(self) -> Any:
        return self._wait()

    def kill(self) -> None:
        assert self.pid is not None
        for process in (self.pid, *below(self.pid)):  # those of torchrun have sessions of their own
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.end()


def _work(recipe: Path) -> None:
    torch.set_num_threads(1)
    run_recipe(load_recipe(recipe), console=Console(quiet=True))
    os._exit(0)


def run_to_end(recipe: Path, processes: int) -> float:
    """Seconds that it took."""
    started = time.monotonic()
    status = Started(recipe, processes).end()
    log = recipe.with_suffix(".log")
    assert status == 0, log.read_text()[-2000:] if log.exists() else status
    return time.monotonic() - started


# ---- What a run leaves ----


def content(folder: Path) -> dict[str, str]:
    """Every file of a run by name, as a digest; without the times in it."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            parts = data.splitlines() if path.suffix == ".jsonl" else [data]
            data = json.dumps([_timeless(json.loads(part)) for part in parts]).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, list):
        return [_timeless(part) for part in value]
    if not isinstance(value, dict):
        return value
    return {k: _timeless(v) for k, v in value.items() if not any(word in k for word in TIMED)}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, float, dict[str, str]]]:
    """Of a kind: its recipe, how long it takes, and what it leaves."""
    known: dict[str, tuple[Path, float, dict[str, str]]] = {}

    def of(kind: str) -> tuple[Path, float, dict[str, str]]:
        if kind not in known:
            folder = tmp_path_factory.mktemp("kind")
            stages, processes, _ = KINDS[kind]
            made = values(folder, stages)
            made["training"]["per_device_train_batch_size"] = 2
            recipe = folder / "recipe.yaml"
            recipe.write_text(json.dumps(made))
            seconds = run_to_end(recipe, processes)
            known[kind] = recipe, seconds, content(folder / "run")
        return known[kind]

    return of


FAST = [("offline", 60), ("online", 60)]


@pytest.mark.parametrize(("kind", "number"), [*FAST, *(pytest.param(*kill, marks=pytest.mark.slow) for kill in KILLS)])
def test_killed(kind: str, number: int, undisturbed: Callable[[str], tuple[Path, float, dict[str, str]]]) -> None:
    recipe, seconds, expected = undisturbed(kind)
    processes, moments = KINDS[kind][1], random.Random(f"{kind} {number}")
    shutil.rmtree(recipe.parent / "run", ignore_errors=True)
    for _ in range(1 + (number % 3 == 2)):
        run = Started(recipe, processes)
        time.sleep(seconds * moments.uniform(0.05, 0.95))
        run.kill()
    run_to_end(recipe, processes)
    found = content(recipe.parent / "run")
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
