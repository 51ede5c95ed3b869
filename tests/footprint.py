"""Which of our own files a short run goes through: `python -m tests.footprint RECIPE [--list]`.

The recipe runs on its world for two optimiser steps a stage (two rollouts online), in this process. A file counts if
one of its functions runs; importing it does not count. Worlds, reports and the command line are left out: they are not
what a reader of a training step has to know.
"""

from __future__ import annotations

import argparse
import collections
import sys
import tempfile
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import tokengrain

SOURCE = Path(tokengrain.__file__).resolve().parent
LEFT_OUT = ("worlds", "report", "cli.py", "demo.py")
ONLINE = {"prompts_per_rollout": 8, "num_generations": 4, "minibatches": 1, "eval_generations": 1}


def shortened(recipe: str) -> list[str]:
    """Overrides that leave two steps of every stage that trains."""
    stages = tokengrain.load_recipe(recipe).model_dump(mode="json", exclude_unset=True)["stages"]
    found: dict[str, Any] = {}
    for name, stage in stages.items():
        if stage["kind"] == "annotate":
            continue
        keys = {"max_steps": 2, "logging_steps": 1, **(ONLINE if stage["kind"] == "online" else {})}
        found |= {f"stages.{name}.training.{key}": value for key, value in keys.items()}
    return [f"{key}={value}" for key, value in found.items()]


def files_that_run(recipe: str) -> dict[str, int]:
    """File (relative to the package): how many of its functions ran."""
    seen: set[CodeType] = set()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            seen.add(frame.f_code)

    with tempfile.TemporaryDirectory() as folder:
        run_recipe = tokengrain.run_recipe  # found before anything counts: `tokengrain` imports it on first use
        loaded = tokengrain.load_recipe(recipe, overrides=shortened(recipe), output=Path(folder) / "run")
        threading.setprofile(profile)
        sys.setprofile(profile)
        try:
            run_recipe(loaded)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    counts: collections.Counter[str] = collections.Counter()
    for code in seen:
        path = Path(code.co_filename)
        if code.co_name != "<module>" and code.co_name.isidentifier() and path.is_relative_to(SOURCE):
            relative = path.relative_to(SOURCE)
            if relative.parts[0] not in LEFT_OUT:
                counts[str(relative)] += 1
    return dict(sorted(counts.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--list", action="store_true", help="print each file with the number of its functions that ran")
    options = parser.parse_args()
    found = files_that_run(options.recipe)
    if options.list:
        for name, functions in found.items():
            print(f"{functions:5}  {name}")
    print(f"{options.recipe}: functions of {len(found)} files run")


if __name__ == "__main__":
    main()
