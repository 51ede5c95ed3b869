"""How well token credit agrees with the exact soft advantage, over seeds, sources and regimes."""

from __future__ import annotations

import math
import multiprocessing
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

from rich.console import Console

from tokengrain.bench.page import append_line, repair_log, summarise
from tokengrain.bench.questions import GENERATIONS, QUESTIONS, Draw, questions_of
from tokengrain.bench.sources import SOURCES, Bench, BenchSource, chosen_sources, fit_sources, left_out, own_source
from tokengrain.bench.training import PAIRS
from tokengrain.errors import RecipeError, fingerprint, read_log, write_json
from tokengrain.worlds import load_world

FORMAT = 2
"""Raised when what is measured changes: earlier lines of a log are then not used again."""
LOG, RESULT = "credit.jsonl", "credit.json"
SHOWN = 4
"""Prompts of the first seed whose credit is kept for the heat maps, with two completions each."""


@dataclass(frozen=True)
class Unit:
    """One (regime, question, seed): what one process does in one go. `missing` are the sources to run."""

    uri: str
    regime: str
    seed: int
    steps: int
    pairs: int
    prompts: int | None
    keep_samples: bool
    question: str = "pairs"
    generations: int = GENERATIONS
    missing: tuple[str, ...] = ()


def bench_credit(
    world: str = "world://stories",
    *,
    sources: Sequence[str] | None = None,
    credit: Sequence[str | Callable[..., Any]] = (),
    seeds: int = 5,
    regimes: Sequence[str] = (),
    jobs: int = 1,
    output: str | Path = "runs/bench/credit",
    steps: int | None = None,
    pairs: int = PAIRS,
    prompts: int | None = None,
    generations: int = GENERATIONS,
    console: Console | None = None,
) -> dict[str, Any]:
    """Compare credit sources with the exact credit of a world.

    Every seed has its own pairs, its own trainings and its own completions to judge. Finished (seed, source)s
    are kept in `credit.jsonl`; calling it again does what is missing. Writes `credit.json` and `credit.html`.

    Args:
        world: address; its option `seed` is set for every run.
        sources: names in `SOURCES` (None: all that the world offers).
        credit: your own: functions `(batch) -> [N]`, or import strings of them.
        seeds: how many; seeds 0, 1, ...
        regimes: values of the world's option `regime` (empty: as in the address).
        jobs: processes, one thread each.
        output: folder of log, result and page.
        steps, pairs: of each training (None: 120 steps, and 60 in the worlds of chains).
        prompts: prompts to judge completions of, per seed (None: the world's default).
        generations: completions per prompt in the worlds of chains; elsewhere there are two.
        console: where progress is shown.

    Returns:
        The content of `credit.json`: `sources`, one entry per regime, question and source with mean, 95 % t interval
        and the value of every seed for each measure; `runs`, the single runs; `left_out`, sources that a question is
        not put to, and why; and how it was made.

    Raises:
        RecipeError: unknown world, source or function; a source that has no answer in this world; a function that
            other processes cannot load; a number that is too small.
    """
    from tokengrain.bench.page import write_markdown, write_page

    output, console = Path(output), console or Console(stderr=True)
    if seeds < 1 or jobs < 1:
        raise RecipeError(f"seeds and jobs must be at least 1, got {seeds} and {jobs}")
    if generations < 2:
        raise RecipeError(f"generations must be at least 2, one right and one wrong, got {generations}")
    first, own = load_world(world), [own_source(c) for c in credit]
    listed = [*chosen_sources(sources, first), *own]
    if len({s.name for s in listed}) < len(listed):
        raise RecipeError(f"two sources have one name: {', '.join(s.name for s in listed)}")
    if jobs > 1 and any(not isinstance(c, str) for c in credit):
        raise RecipeError("with jobs > 1 give your own source as 'module:function' or 'path.py:function'")
    units = [
        Unit(
            with_options(world, regime=regime or None, seed=seed),
            regime,
            seed,
            steps or question.steps,
            pairs,
            prompts,
            seed == 0,
            question.name,
            generations,
        )
        for regime in (regimes or ("",))
        for question in questions_of(first)
        for seed in range(seeds)
    ]
    log = output / LOG
    fit = {q.name: fit_sources(listed, first, q) for q in questions_of(first)}
    keys = {key_of(unit, source): (unit, source) for unit in units for source in fit[unit.question]}
    known = {line["key"]: line for line in read_log(log) if line.get("key") in keys}
    missing = [key for key in keys if key not in known]
    first.base_model()
    run_units(_work(keys, missing), listed, list(credit), jobs, log, console, len(keys))
    lines = {line["key"]: line for line in read_log(log) if line.get("key") in keys}
    runs = [lines[key] for key in keys]
    result = {
        "kind": "bench-credit",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread per process, {jobs} at a time",
        "world": world,
        "seeds": seeds,
        "steps": units[0].steps,
        "pairs": pairs,
        "generations": generations if units[0].question != "pairs" else None,
        "left_out": left_out(first, listed if sources is not None else [*SOURCES.values(), *own]),
        "sources": summarise(runs, listed),
        "runs": [{k: v for k, v in run.items() if k not in ("key", "samples")} for run in runs],
        "samples": [entry for run in runs for entry in run["samples"]],
    }
    write_json(output / RESULT, result)
    write_page(result, output)
    write_markdown(result, output)
    return result


def with_options(uri: str, **options: Any) -> str:
    """A world's address with options set; None leaves an option as it is."""
    place, _, query = uri.partition("?")
    merged = dict(parse_qsl(query)) | {k: v for k, v in options.items() if v is not None}
    return f"{place}?{urlencode(merged)}" if merged else place


def key_of(unit: Unit, source: BenchSource) -> str:
    """Identifies a run: world, data, trainings, and a source of one's own by its code."""
    settings = [unit.uri, unit.seed, unit.steps, unit.pairs, unit.prompts, unit.keep_samples]
    settings += [unit.question, unit.generations]
    return fingerprint([FORMAT, *settings, load_world(unit.uri).fingerprint, source.name, source.code])


def _work(keys: dict[str, tuple[Unit, BenchSource]], missing: Iterable[str]) -> list[Unit]:
    """The units in which something is missing, each with the names of the sources to run."""
    wanted: dict[Unit, list[str]] = {}
    for key in missing:
        unit, source = keys[key]
        wanted.setdefault(unit, []).append(source.name)
    return [replace(unit, missing=tuple(names)) for unit, names in wanted.items()]


# --------------------------------------------------------------------------------------------------------- running


def run_units(
    units: Sequence[Unit],
    sources: Sequence[BenchSource],
    credit: list[Any],
    jobs: int,
    log: Path,
    console: Console,
    total: int,
) -> None:
    """Run what is missing, in this process or in several, and show how far it is."""
    from rich.progress import Progress

    left = sum(len(u.missing) for u in units)
    if not left:
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    repair_log(log)
    had = len(read_log(log))
    names = [s.name for s in sources if s.kind != "own"]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("sources × seeds", total=total, completed=total - left)

        def update() -> None:
            progress.update(task, completed=total - left + len(read_log(log)) - had)

        if jobs == 1:
            for unit in units:
                run_unit(unit, names, credit, log, update)
            return
        # A forked copy of a process that has used threads can hang.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context, initializer=_quiet) as pool:
            futures = {pool.submit(run_unit, unit, names, credit, log) for unit in units}
            try:
                while futures:
                    done, futures = wait(futures, timeout=1.0, return_when="FIRST_COMPLETED")
                    for future in done:
                        future.result()
                    update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _quiet() -> None:
    import transformers

    os.environ["OMP_NUM_THREADS"] = "1"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def run_unit(
    unit: Unit,
    names: Sequence[str],
    credit: Sequence[Any],
    log: Path,
    after: Callable[[], None] = lambda: None,
) -> None:
    """The missing sources of one seed; appends one line each."""
    from tokengrain.bench.corruption import measure
    from tokengrain.report.rows import collect_credit_samples
    from tokengrain.worlds.base_models import single_thread

    world, question = load_world(unit.uri), QUESTIONS[unit.question]
    sources = [*chosen_sources(names, world), *(own_source(c) for c in credit)]
    with single_thread():
        truth = question.draw(world, Draw(unit.prompts, unit.generations, unit.seed))
        bench = Bench(world, unit.seed, unit.steps, unit.pairs, question, unit.generations)
        for source in sources:
            if source.name not in unit.missing:
                continue
            found, values = measure(source.build(bench), truth, question)
            samples = []
            if unit.keep_samples:
                first = truth.batch.select(range(min(SHOWN, truth.batch.n_prompts)))
                n = first.segments.total
                samples = collect_credit_samples(
                    first, world.tokenizer, {source.name: values[:n]}, truth=truth.advantages[:n]
                )
            line = {
                "key": key_of(unit, source),
                "regime": unit.regime,
                "question": unit.question,
                "seed": unit.seed,
                "source": source.name,
                **{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in found.items()},
                "training_seconds": sum(bench.seconds[name] for name in source.trains),
                "samples": [{**entry, "regime": unit.regime, "question": unit.question} for entry in samples],
            }
            append_line(log, line)
            after()
