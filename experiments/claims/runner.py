"""Running groups of claims over seeds: every finished run is a line in a log, and the next call resumes from there."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.claims.framework import Finding, Group, judge
from experiments.claims.groups import GROUPS
from tokengrain.bench.credit import append_line, repair_log
from tokengrain.errors import RecipeError, read_log
from tokengrain.worlds.base_models import single_thread

LOG = "runs.jsonl"


def find_groups(groups: Sequence[str] | None = None, methods: Sequence[str] | None = None) -> list[Group]:
    """The groups of these names that have claims about these methods (None: all).

    Raises:
        RecipeError: an unknown group or method; no such claim in any of them.
    """
    known = {"group": list(GROUPS), "method": sorted({m for g in GROUPS.values() for m in g.methods})}
    for what, names in (("group", groups), ("method", methods)):
        if unknown := [name for name in names or () if name not in known[what]]:
            raise RecipeError(f"unknown {what} {unknown[0]!r} of claims; expected some of {', '.join(known[what])}")
    found = [GROUPS[name] for name in GROUPS if groups is None or name in groups]
    chosen = [group for group in found if group.chosen(methods)[1]]
    if not chosen:
        about = sorted({m for group in found for m in group.methods})
        raise RecipeError(f"no claim of these groups is about {', '.join(methods or ())}; theirs: {', '.join(about)}")
    return chosen


def run_claims(
    groups: Sequence[Group],
    seeds: Sequence[int],
    folder: Path,
    *,
    methods: Sequence[str] | None = None,
    jobs: int = 1,
    quick: bool = False,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Run what is not in the log yet, and return the runs asked for.

    Args:
        groups: experiments, each in `tokengrain.bench.claims.groups.GROUPS` if `jobs` > 1.
        seeds: of data, models and training; the arms of a seed share them.
        folder: where the log is.
        methods: only arms of these methods and those they are compared with (None: all).
        jobs: processes, one thread each.
        quick: the small sizes. Quick and full runs never mix.

    Returns:
        One dictionary per run: group, arm, seed, key, seconds and measures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / LOG
    repair_log(log)
    done = {(r["key"], r["seed"]) for r in read_log(log)}
    wanted = {(g.key(arm, quick), seed) for g in groups for arm in g.chosen(methods)[0] for seed in seeds}
    tasks = []
    for group in groups:
        for seed in seeds:
            arms = [a.name for a in group.chosen(methods)[0] if (group.key(a, quick), seed) not in done]
            if arms:
                tasks.append((group, seed, quick, arms, log))
    with _bar(console) as bar:
        task = bar.add_task("groups × seeds", total=len(tasks))
        for _ in _worked_off(tasks, jobs):
            bar.update(task, advance=1)
    # Another call with the same log may have done the same run meanwhile.
    found = {(r["key"], r["seed"]): r for r in read_log(log)}
    return [run for place, run in found.items() if place in wanted]


def _bar(console: Console | None) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console or Console(stderr=True))


def _worked_off(tasks: Sequence[tuple[Group, int, bool, list[str], Path]], jobs: int) -> Iterator[None]:
    """Run the tasks, yielding after each."""
    if jobs <= 1 or len(tasks) <= 1:
        for group, seed, quick, arms, log in tasks:
            run_seed(group, seed, quick, arms, log)
            yield
        return
    with _one_thread_per_process():
        # A forked copy of a process that has used torch may hang.
        pool = ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=multiprocessing.get_context("spawn"))
        with pool:
            futures = [pool.submit(_run_named, task[0].name, *task[1:]) for task in tasks]
            try:
                for future in as_completed(futures):
                    future.result()
                    yield
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


@contextmanager
def _one_thread_per_process() -> Iterator[None]:
    """What child processes inherit."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _run_named(name: str, seed: int, quick: bool, arms: list[str], log: Path) -> None:
    run_seed(GROUPS[name], seed, quick, arms, log)


def run_seed(group: Group, seed: int, quick: bool, arms: Sequence[str], log: Path) -> None:
    """Prepare a seed of a group and run these arms of it; one line in the log as each of them ends."""

    transformers.logging.set_verbosity_error()
    with single_thread():
        context = group.prepare(seed, group.scales[quick])
        for arm in group.arms:
            if arm.name not in arms:
                continue
            start = time.perf_counter()
            measures = group.run(context, arm)
            seconds = time.perf_counter() - start
            line = {
                "group": group.name,
                "arm": arm.name,
                "seed": seed,
                "quick": quick,
                "key": group.key(arm, quick),
                "seconds": round(seconds, 2),
                "measures": measures,
            }
            append_line(log, line)


def judge_all(
    groups: Sequence[Group], results: Sequence[dict[str, Any]], methods: Sequence[str] | None = None
) -> list[Finding]:
    """The findings of all chosen claims for which there are results."""
    found = [judge(group.name, claim, results) for group in groups for claim in group.chosen(methods)[1]]
    return [finding for finding in found if finding is not None]
