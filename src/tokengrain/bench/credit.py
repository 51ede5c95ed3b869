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

from tokengrain.bench.log import append_line, read_log, repair_log
from tokengrain.bench.sources import Bench, BenchSource, chosen_sources, own_source
from tokengrain.bench.training import PAIRS, STEPS
from tokengrain.errors import RecipeError
from tokengrain.evaluation.intervals import mean_of_runs
from tokengrain.files import fingerprint, write_json
from tokengrain.worlds import load_world

FORMAT = 1
"""Raised when what is measured changes: earlier lines of a log are then not used again."""
LOG, RESULT = "credit.jsonl", "credit.json"
SHOWN = 4
"""Pairs of the first seed whose credit is kept for the heat maps."""
MEASURES = (
    "spearman", "auc", "auc_harm", "top1", "top1_chance", "alarm", "scale", "r2", "ece", "skill",
    "seconds", "passes", "reads", "training_seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """One (regime, seed): what one process does in one go. `missing` are the sources to run."""

    uri: str
    regime: str
    seed: int
    steps: int
    pairs: int
    prompts: int | None
    keep_samples: bool
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
    steps: int = STEPS,
    pairs: int = PAIRS,
    prompts: int | None = None,
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
        steps, pairs: of each training.
        prompts: pairs of completions to judge per seed (None: the world's default).
        console: where progress is shown.

    Returns:
        The content of `credit.json`: `sources`, one entry per regime and source with mean, 95 % t interval and
        the value of every seed for each measure; `runs`, the single runs; and how it was made.

    Raises:
        RecipeError: unknown world, source or function; a function that other processes cannot load.
    """
    from tokengrain.bench.markdown import write_markdown
    from tokengrain.bench.page import write_page

    output, console = Path(output), console or Console(stderr=True)
    if seeds < 1 or jobs < 1:
        raise RecipeError(f"seeds and jobs must be at least 1, got {seeds} and {jobs}")
    own = [own_source(c) for c in credit]
    listed = [*chosen_sources(sources, load_world(world)), *own]
    if len({s.name for s in listed}) < len(listed):
        raise RecipeError(f"two sources have one name: {', '.join(s.name for s in listed)}")
    if jobs > 1 and any(not isinstance(c, str) for c in credit):
        raise RecipeError("with jobs > 1 give your own source as 'module:function' or 'path.py:function'")
    units = [
        Unit(with_options(world, regime=regime or None, seed=seed), regime, seed, steps, pairs, prompts, seed == 0)
        for regime in (regimes or ("",))
        for seed in range(seeds)
    ]
    log = output / LOG
    keys = {key_of(unit, source): (unit, source) for unit in units for source in listed}
    known = {line["key"]: line for line in read_log(log) if line.get("key") in keys}
    missing = [key for key in keys if key not in known]
    load_world(world).base_model()
    run_units(_work(keys, missing), listed, list(credit), jobs, log, console, len(keys))
    lines = {line["key"]: line for line in read_log(log) if line.get("key") in keys}
    runs = [lines[key] for key in keys]
    result = {
        "kind": "bench-credit",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread per process, {jobs} at a time",
        "world": world,
        "seeds": seeds,
        "steps": steps,
        "pairs": pairs,
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
    from tokengrain.bench.measure import measure
    from tokengrain.report import collect_credit_samples
    from tokengrain.worlds.threads import single_thread

    world = load_world(unit.uri)
    sources = [*chosen_sources(names, world), *(own_source(c) for c in credit)]
    with single_thread():
        truth = world.credit_truth(unit.prompts, seed=unit.seed)
        bench = Bench(world, unit.seed, unit.steps, unit.pairs)
        for source in sources:
            if source.name not in unit.missing:
                continue
            found, values = measure(source.build(bench), truth)
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
                "seed": unit.seed,
                "source": source.name,
                **{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in found.items()},
                "training_seconds": sum(bench.seconds[name] for name in source.trains),
                "samples": [{**entry, "regime": unit.regime} for entry in samples],
            }
            append_line(log, line)
            after()


# ---------------------------------------------------------------------------------------------------------- summary


def summarise(runs: Sequence[dict[str, Any]], sources: Sequence[BenchSource]) -> list[dict[str, Any]]:
    """One entry per regime and source, best rank correlation first."""
    entries = []
    for regime in dict.fromkeys(run["regime"] for run in runs):
        for source in sources:
            mine = [r for r in runs if r["regime"] == regime and r["source"] == source.name]
            mine.sort(key=lambda r: r["seed"])
            measures = {m: _over_seeds([r[m] for r in mine]) for m in MEASURES}
            trains = list(source.trains)
            entry = {"regime": regime, "source": source.name, "kind": source.kind, "what": source.what}
            entries.append({**entry, "trains": trains, "seeds": len(mine), "measures": measures})
    regimes = list(dict.fromkeys(e["regime"] for e in entries))
    return sorted(entries, key=lambda e: (regimes.index(e["regime"]), -_sortable(e["measures"]["spearman"])))


def _sortable(measure: dict[str, Any]) -> float:
    return -2.0 if measure["mean"] is None else measure["mean"]


def _over_seeds(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, 95 % t interval and the values; a measure that is not defined in some seed has neither."""
    known = [float(v) for v in values if v is not None]
    if len(known) < len(values) or not known:
        return {"mean": None, "low": None, "high": None, "by_seed": list(values)}
    found = mean_of_runs(known) if len(known) > 1 else None
    mean = found.value if found else known[0]
    return {"mean": mean, "low": found and found.low, "high": found and found.high, "by_seed": known}
