"""How well token credit agrees with a world's exact credit, over seeds, sources and regimes."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlencode

import transformers
from rich.console import Console

from tokengrain.bench.page import write_pages
from tokengrain.bench.questions import GENERATIONS, QUESTIONS, Draw, measure, questions_of
from tokengrain.bench.sources import PAIRS, SOURCES, Bench, BenchSource, chosen_sources, left_out, own_source
from tokengrain.errors import RecipeError, fingerprint, read_log, require, write_text
from tokengrain.evaluation.statistics import mean_of_runs
from tokengrain.method import CREDIT
from tokengrain.report.pictures import By, patch_credit
from tokengrain.report.rows import collect_credit_samples
from tokengrain.screen import Screen, progress_bar
from tokengrain.worlds import load_world
from tokengrain.worlds.base_models import single_thread

FORMAT = 3  # raised when what is measured changes: earlier lines of a log are then not used again
LOG = "credit.jsonl"
SHOWN = 4  # prompts of the first seed whose credit is kept for the heat maps, with two completions each
MEASURES = (
    "spearman", "auc", "auc_harm", "top1", "top1_chance", "alarm", "scale", "r2", "ece", "skill",
    "auc_inside", "place1", "place3", "share", "place1_chance", "place3_chance",
    "seconds", "passes", "reads", "training_seconds",
)  # fmt: skip


class Unit(NamedTuple):
    """One (regime, question, seed): what one process does in one go. `missing` are the sources to run."""

    uri: str
    regime: str
    question: str
    seed: int
    steps: int
    prompts: int | None
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
    prompts: int | None = None,
    generations: int = GENERATIONS,
    console: Console | None = None,
) -> dict[str, Any]:
    """Compare credit sources with the exact credit of a world; writes `credit.json`, `credit.md` and `credit.html`.

    Every seed has pairs, trainings and completions of its own. Finished ones are kept in `credit.jsonl`; a second call
    does what is missing.

    Args:
        sources: names in `SOURCES` (None: all that the world offers).
        credit: your own: functions `(batch) -> [N]`, or import strings of them.
        regimes: values of the world's option `regime` (empty: as in the address).
        steps: of each training (None: 120, and 60 in the worlds of chains).
        prompts: prompts to judge completions of, per seed (None: the world's default).
        generations: completions per prompt in the worlds of chains; elsewhere there are two.

    Returns: The content of `credit.json`: `sources`, one entry per regime, question and source with mean, 95 % t
    interval and the value of every seed for each measure; `runs`; `left_out`, sources that a question is not put to,
    and why.
    """
    output, console = Path(output), console or Screen(stderr=True)
    require(min(seeds, jobs) >= 1, RecipeError, f"seeds and jobs must be at least 1, got {seeds} and {jobs}")
    enough = generations >= 2
    require(enough, RecipeError, f"generations must be at least 2, one right and one wrong, got {generations}")
    first, own = load_world(world), [own_source(c) for c in credit]
    listed = [*chosen_sources(sources, first), *own]
    names = [s.name for s in listed]
    require(len(set(names)) == len(names), RecipeError, f"two sources have one name: {', '.join(names)}")
    message = "with jobs > 1 give your own source as 'module:function' or 'path.py:function'"
    require(jobs == 1 or all(isinstance(c, str) for c in credit), RecipeError, message)

    place, _, query = world.partition("?")
    keys: dict[str, tuple[Unit, BenchSource]] = {}
    for regime in regimes or ("",):
        own_regime = {"regime": regime} if regime else {}
        for question in questions_of(first):
            for seed in range(seeds):
                uri = f"{place}?{urlencode(dict(parse_qsl(query)) | own_regime | {'seed': seed})}"
                unit = Unit(uri, regime, question.name, seed, steps or question.steps, prompts, generations)
                keys |= {key_of(unit, s): (unit, s) for s in listed if not s.unfit(first, question)}
    log = output / LOG
    known = {line["key"] for line in read_log(log)}
    missing: dict[Unit, list[str]] = {}
    for unit, source in (pair for key, pair in keys.items() if key not in known):
        missing.setdefault(unit, []).append(source.name)
    first.base_model()
    if missing:
        units = [unit._replace(missing=tuple(sources)) for unit, sources in missing.items()]
        run_units(units, [s.name for s in listed if s.kind != "own"], list(credit), jobs, log, console, len(keys))

    lines = {line["key"]: line for line in read_log(log)}
    runs = [lines[key] for key in keys]
    units = [unit for unit, _ in keys.values()]
    result = {
        "kind": "bench-credit",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread per process, {jobs} at a time",
        "world": world,
        "seeds": seeds,
        "steps": units[0].steps,
        "pairs": PAIRS,
        "generations": generations if units[0].question != "pairs" else None,
        "left_out": left_out(first, listed if sources is not None else [*SOURCES.values(), *own]),
        "sources": summarise(runs, listed),
        "runs": [{k: v for k, v in run.items() if k not in ("key", "samples")} for run in runs],
        "samples": [entry for run in runs for entry in run["samples"]],
    }
    write_pages(result, output)
    return result


def key_of(unit: Unit, source: BenchSource) -> str:
    """Identifies a run: world, data, trainings, and a source of one's own by its code."""
    settings = [unit.uri, unit.seed, unit.steps, unit.prompts, unit.question, unit.generations]
    return fingerprint([FORMAT, PAIRS, *settings, load_world(unit.uri).fingerprint, source.name, source.code])


def run_units(
    units: Sequence[Unit], names: Sequence[str], credit: list[Any], jobs: int, log: Path, console: Console, total: int
) -> None:
    """Run what is missing, in this process or in several, and show how far it is."""
    log.parent.mkdir(parents=True, exist_ok=True)
    repair_log(log)
    done = total - sum(len(u.missing) for u in units) - len(read_log(log))
    with progress_bar("sources × seeds", total, console=console) as update:

        def show() -> None:
            update(completed=done + len(read_log(log)))

        if jobs == 1:
            for unit in units:
                run_unit(unit, names, credit, log, show)
            return
        # A forked copy of a process that has used threads can hang.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context, initializer=_quiet) as pool:
            futures = {pool.submit(run_unit, unit, names, credit, log) for unit in units}
            try:
                while futures:
                    finished, futures = wait(futures, timeout=1.0, return_when="FIRST_COMPLETED")
                    for future in finished:
                        future.result()
                    show()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _quiet() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def run_unit(
    unit: Unit, names: Sequence[str], credit: Sequence[Any], log: Path, after: Callable[[], None] = lambda: None
) -> None:
    """The missing sources of one seed; appends one line each."""
    world, question = load_world(unit.uri), QUESTIONS[unit.question]
    sources = [*chosen_sources(names, world), *(own_source(c) for c in credit)]
    with single_thread():
        truth = question.draw(world, Draw(unit.prompts, unit.generations, unit.seed))
        bench = Bench(world, unit.seed, unit.steps, question, unit.generations)
        for source in sources:
            if source.name not in unit.missing:
                continue
            found, values = measure(source.build(bench), truth, question)
            samples = []
            if unit.seed == 0:
                first = truth.batch.select(range(min(SHOWN, truth.batch.n_prompts)))
                n = first.segments.total
                credit_of = {source.name: values[:n]}
                by: By = (CREDIT[source.name].patches if source.name in CREDIT else None) or "gradient"
                maps = patch_credit(world.reference, first, by) if first.vision else ()
                exact = truth.advantages[:n]
                samples = collect_credit_samples(first, world.tokenizer, credit_of, truth=exact, maps=maps, by=by)
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


def append_line(log: Path, line: dict[str, Any]) -> None:
    """Append one line in one write, so that lines of several processes do not mix."""
    with log.open("ab", buffering=0) as file:
        file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())


def repair_log(log: Path) -> None:
    """Take out a line that a kill cut off, so that the next one does not stick to it."""
    if log.exists() and not log.read_bytes().endswith(b"\n"):
        write_text(log, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in read_log(log)))


def summarise(runs: Sequence[dict[str, Any]], sources: Sequence[BenchSource]) -> list[dict[str, Any]]:
    """Single runs as one entry per regime, question and source, the best first: means over seeds with intervals."""
    parts = list(dict.fromkeys((run["regime"], run["question"]) for run in runs))
    entries = []
    for (regime, question), source in product(parts, sources):
        mine = [r for r in runs if (r["regime"], r["question"], r["source"]) == (regime, question, source.name)]
        if mine:
            about = {"regime": regime, "question": question, "source": source.name, "kind": source.kind}
            about |= {"what": source.what, "trains": list(source.trains), "seeds": len(mine)}
            entries.append({**about, "measures": {m: _over_seeds([r[m] for r in mine]) for m in MEASURES}})

    def place(entry: dict[str, Any]) -> tuple[int, float]:
        mean = entry["measures"][QUESTIONS[entry["question"]].ranked_by]["mean"]
        return parts.index((entry["regime"], entry["question"])), 2.0 if mean is None else -mean

    return sorted(entries, key=place)


def _over_seeds(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, 95 % t interval and the values; a measure that is not defined in some seed has neither."""
    known = [float(v) for v in values if v is not None]
    found: tuple[float | None, ...] = (None, None, None)
    if len(known) == len(values) > 0:
        found = mean_of_runs(known) if len(known) > 1 else (known[0], None, None)
        values = known
    return dict(zip(("mean", "low", "high"), found)) | {"by_seed": list(values)}
