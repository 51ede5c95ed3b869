"""Run the three recipes for models that see, each whole on its world, and write a page with seconds and measures.

python -m benchmarks.seeing_recipes --output docs/results
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.timing import machine
from tokengrain.errors import write_json, write_text

MEASURES = {
    "timemaster": {
        "form": "form",
        "accuracy": "class right, sampled",
        "greedy_accuracy": "class right, greedy",
        "best_accuracy": "the most probable class given the series",
        "nearest_accuracy": "nearest training series, by values",
        "nearest_spectrum": "nearest training series, by spectrum",
    },
    "rrpo_video": {"frames": "frames right", "accuracy": "whole order right", "first_style": "first style"},
    "aepo_images": {"form": "form", "accuracy": "count right, sampled", "greedy_accuracy": "count right, greedy"},
}
LIMIT = 240  # seconds that a recipe may take on two cores


def tokengrain(*arguments: object) -> str:
    """What a command prints. Raises `CalledProcessError` where it fails."""
    command = [sys.executable, "-m", "tokengrain", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def cpu_seconds() -> float:
    """Of all commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def trained(name: str, runs: Path) -> dict[str, Any]:
    """One recipe from the command line, in a folder that must not exist yet, and what its world says of the policy."""
    before, start = cpu_seconds(), time.perf_counter()
    tokengrain("train", f"recipes/{name}.yaml", "--output", runs / name)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - before
    found = json.loads(tokengrain("evaluate", runs / name, "--json"))
    return {"seconds": seconds, "cpu_seconds": cpu, "trained": found["world"], "base": found["world_base"]}


def page(report: dict[str, Any]) -> str:
    m = report["machine"]
    lines = [
        "# Recipes for models that see",
        "",
        f"`{m['command']}`, {m['date']}, {m['cpu']}, {m['cores']} cores, torch {m['torch']}. Each is one command, "
        "`tokengrain train RECIPE`, then `tokengrain evaluate`: four samples of each of 200 held-out scenes at "
        "temperature 1, and one greedy answer. Seed 0, one run each, which ranks nothing: "
        "[claims over seeds](seeing.md).",
        "",
        f"| recipe | seconds (at most {LIMIT}) | CPU seconds |",
        "|---|---|---|",
    ]
    recipes = report["recipes"]
    lines += [f"| `{name}` | {one['seconds']:.0f} | {one['cpu_seconds']:.0f} |" for name, one in recipes.items()]
    lines += ["", "| recipe | measure | base model | trained |", "|---|---|---|---|"]
    for name, one in recipes.items():
        for key, title in MEASURES[name].items():
            lines.append(f"| `{name}` | {title} | {one['base'][key]:.3f} | {one['trained'][key]:.3f} |")
    return "\n".join([*lines, ""])


def main(
    output: Annotated[Path, typer.Option(help="folder for seeing_recipes.md and .json")] = Path("docs/results"),
    runs: Annotated[Path, typer.Option(help="folder of the runs, new")] = Path("runs/bench/seeing_recipes"),
) -> None:
    """Train the recipes and write the page; fails if one takes too long."""
    found = {name: trained(name, runs) for name in MEASURES}
    report = {"machine": machine("benchmarks.seeing_recipes"), "recipes": found}
    write_json(output / "seeing_recipes.json", report)
    write_text(output / "seeing_recipes.md", page(report))
    print(page(report))
    late = [name for name, one in found.items() if one["seconds"] > LIMIT]
    if late:
        raise SystemExit(f"longer than {LIMIT} s: {', '.join(late)}")


if __name__ == "__main__":
    typer.run(main)
