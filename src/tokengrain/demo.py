"""`tokengrain demo`: six policies on the world `stories`, measured against the exact optimum."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from tokengrain.errors import RunError, is_temporary, read_json, require, write_json
from tokengrain.evaluation.statistics import Z
from tokengrain.report.html import write_report
from tokengrain.run.load import load_recipe
from tokengrain.run.runner import run_recipe
from tokengrain.runs import typed
from tokengrain.screen import Screen, labelled, progress_bar
from tokengrain.worlds import load_world
from tokengrain.worlds.base_models import single_thread

WORLD = "world://stories?regime=noisy"
METHODS = {"dpo": "DPO", "simpo": "SimPO", "tdpo2": "TDPO2", "tgdpo": "TGDPO", "treg": "T-REG"}
_SOURCES = {"log-ratio of train": "policy", "credit: guide": "guide", "credit: contrastive": "contrastive prompting"}


def run_demo(
    output: str | Path = "runs/demo", *, samples: int = 64, overwrite: bool = False, console: Console | None = None
) -> Path:
    """Train DPO, SimPO, TDPO2, TGDPO and T-REG from their recipes on `stories` and compare them; the report's path.

    Each method is an ordinary run below `output`; finished ones are reused unless `overwrite`. Every policy is sampled
    and measured against the optimum that dynamic programming gives.
    """
    output, console = Path(output), console or Screen()
    require(not output.exists() or output.is_dir(), RunError, f"{output} is a file; the demo needs a folder")
    # An earlier demo may be continued; anything else in the folder is someone's work.
    known = {*METHODS, "metrics.json", "credit_samples.json", "report.html"}
    there = [path for path in output.iterdir() if not is_temporary(path)] if output.exists() else []
    others = sorted({path.name for path in there} - known)
    message = f"{output} holds something else ({', '.join(others[:3])}); give another folder with --output"
    require(not others, RunError, message)
    what = (
        "which tokens earned the reward?\nA tiny model tells short stories. Their true reward is known token by token, "
        "and so is the best policy that any method could reach. Five methods learn from the same 1,000 preference "
        "pairs; a third of the labels are wrong."
    )
    console.print(labelled("tokengrain demo", what, "bold"))
    try:
        rows, world = _train_all(output, samples, overwrite, console)
    except KeyboardInterrupt:
        console.print(f"stopped; what was done is kept in {output}; the same command resumes from there", markup=False)
        raise
    write_json(output / "credit_samples.json", _samples(output))
    write_json(output / "metrics.json", _metrics(rows, world, samples))
    report = write_report(output)
    console.print(results_table(rows))
    console.print(
        "True reward: mean per story, ± its 95 % interval. KL: distance from the base model, nats per story. Frontier: "
        "share of the best reward possible at that KL. Wins: stories better than the base's, ties half. Credit: how "
        "well the policy's token log-ratios rank the exact advantages. s: training time.",
        highlight=False,
    )
    console.print(f"\nReport:  {report}\nNumbers: {output / 'metrics.json'}", soft_wrap=True, markup=False)
    return report


def _train_all(output: Path, samples: int, overwrite: bool, console: Console) -> tuple[list[dict[str, Any]], Any]:
    """One row of results per method, the base first; and the world."""
    world: Any = load_world(WORLD)
    world.base_model()
    with single_thread(), progress_bar("base", len(METHODS) + 1, stays=True, console=console) as update:
        rows = [_row("base", "base", world.evaluate(world.reference, n=samples), seconds=0.0)]
        for method, title in METHODS.items():
            update(advance=1, description=title)
            recipe = load_recipe(method, model=WORLD, data=WORLD, output=output / method)
            result = run_recipe(recipe, overwrite=overwrite, console=Screen(quiet=True))
            model = AutoModelForCausalLM.from_pretrained(result.model_path)
            seconds = float(sum(stage.get("seconds") or 0.0 for stage in result.metrics["stages"].values()))
            rows.append(_row(method, title, world.evaluate(model, n=samples), seconds=seconds))
        update(advance=1, description="done")
    return rows, world


def _row(name: str, title: str, found: dict[str, Any], *, seconds: float) -> dict[str, Any]:
    def error(key: str) -> float:
        return (found[f"{key}_high"] - found[f"{key}_low"]) / (2 * Z)

    return {
        "name": title,
        "method": name,
        "true_reward": found["reward"],
        "true_reward_se": error("reward"),
        "kl": found["kl"],
        "kl_se": error("kl"),
        "best_reward": found["best_reward"],
        **{f"frontier_{k}": found[k] for k in ("share", "share_low", "share_high")},
        **{k: found[k] for k in ("win_rate", "win_rate_low", "win_rate_high", "credit_spearman")},
        "credit_auc": found["credit_auc"] if found["credit_spearman"] is not None else None,
        **{k: found[k] for k in ("broken", "length", "entropy")},
        "seconds": seconds,
    }


def _samples(output: Path) -> list[dict[str, Any]]:
    return [
        {**entry, "source": f"{title}: {_SOURCES.get(entry['source'], entry['source'])}"}
        for method, title in METHODS.items()
        if (path := output / method / "credit_samples.json").exists()
        for entry in read_json(path)
        if entry["source"] != "log-ratio of guide"  # TGDPO's guide is DPO once more
    ]


def _metrics(rows: Sequence[dict[str, Any]], world: Any, samples: int) -> dict[str, Any]:
    curve = world.frontier.curve(max_kl=1.5 * max(row["kl"] for row in rows), points=120)
    return {
        "kind": "demo",
        "date": date.today().isoformat(),
        "command": typed(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "world": WORLD,
        "seed": 0,
        "samples_per_prompt": samples,
        "versions": {name: version(name) for name in ("tokengrain", "torch", "transformers")},
        "methods": list(rows),
        "frontier": [list(point) for point in zip(curve["kl"], curve["reward"], strict=True)],
    }


def results_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The demo's result as a table that fits a terminal of 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "true reward", "KL", "frontier", "wins (95 % CI)", "credit ρ", "AUC", "s"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        credit = [f"{row[k]:.2f}" if row[k] is not None else "–" for k in ("credit_spearman", "credit_auc")]
        wins, low, high = (100 * row[k] for k in ("win_rate", "win_rate_low", "win_rate_high"))
        table.add_row(
            row["name"],
            f"{row['true_reward']:.2f} ± {Z * row['true_reward_se']:.2f}",
            f"{row['kl']:.2f}",
            f"{100 * row['frontier_share']:.0f} %" if row["kl"] > 0.01 else "–",
            f"{wins:.0f} % ({low:.0f}–{high:.0f})",
            *credit,
            f"{row['seconds']:.0f}",
        )
    return table
