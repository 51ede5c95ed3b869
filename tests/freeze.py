"""The numbers of every recipe, written down so that two commits can be compared to the bit.

    python -m tests.freeze new.json --against old.json     # run all recipes, compare with an earlier file
    python -m tests.freeze new.json --recipes dpo,grpo     # only these; without the demo
    python -m tests.freeze new.json --against old.json --no-run
    python -m tests.freeze --write-values                  # write tests/freeze_values.json anew

Each recipe runs on its world, shortened: 3 optimiser steps per stage, or 2 rollouts of an online stage. The file has,
stage by stage, all that was logged, the sha256 of the weights, of stored credit and of recorded rollouts; and the
resolved recipe, for the world and for a model of one's own. `tokengrain demo` is recorded likewise, at full length.
To freeze another commit, put its `src` first in PYTHONPATH: only what tokengrain promises its users is used here, so
that this script runs whatever the modules are called.

Hashes mean something on one machine only: processors differ in rounding. Everything runs on one thread. The base
models of the worlds come from `$TOKENGRAIN_CACHE` (by default ~/.cache/tokengrain) and are made on first use, which
takes three minutes. What `make test` compares, with a tolerance, is in `tests/freeze_values.json`: see
`tests/test_freeze.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tokengrain

SOURCE = Path(tokengrain.__file__).resolve().parents[1]
RECIPES = SOURCE.parent / "recipes"
STEPS = 3
ROLLOUTS = 2
ONLINE = {"prompts_per_rollout": 16, "num_generations": 8, "rollout_samples_every": 1, "eval_generations": 1}
DEMO = "demo"
EVALUATED = {"dpo": 2, "grpo": 2, "dro": 2}
"""Recipes whose run is also judged by `tokengrain evaluate`, one of each world, with so many samples per prompt."""

VOLATILE = ("seconds", "runtime", "per_second", "output_dir", "versions", "version", "date", "machine")
"""A key that is one of these, begins with one and `/`, or ends with `_` and one, says nothing about the numbers."""


# ---- Running ----


def run_recipe(name: str, folder: Path) -> dict[str, Any]:
    """The record of one recipe, run in a process of its own.

    Raises:
        RuntimeError: the run failed.
    """
    recipe = RECIPES / f"{name}.yaml"
    command = ["train", str(recipe), "--output", str(folder)]
    for key, value in shortened(recipe).items():
        command += ["--set", f"{key}={value}"]
    call(command, folder.parent)
    if name in EVALUATED:
        call(["evaluate", str(folder), "--samples", str(EVALUATED[name])], folder.parent)
    return {**record(folder), "resolved": resolved(recipe)}


def run_demo(folder: Path) -> dict[str, Any]:
    """The record of `tokengrain demo`: its table, and its five runs."""
    call(["demo", "--output", str(folder)], folder.parent)
    runs = sorted(path.parent for path in folder.glob("*/run.json"))
    numbers = json.loads((folder / "metrics.json").read_text())
    return {
        "table": without_volatile(numbers["methods"]),
        "frontier": numbers["frontier"],
        "runs": {run.name: record(run) for run in runs},
    }


def call(command: list[str], folder: Path) -> None:
    """Run tokengrain's command line on one thread, from the source that this script was started with."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    source = os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **threads, "PYTHONPATH": source, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "tokengrain", *command], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"tokengrain {' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def shortened(recipe: Path) -> dict[str, Any]:
    """Keys for `--set`: few steps of every stage, each of them logged, none with a learning rate of 0."""
    values = plain(tokengrain.load_recipe(recipe))
    found: dict[str, Any] = {}
    for name, stage in values["stages"].items():
        if stage["kind"] == "annotate":
            continue
        training = {**values["training"], **(stage.get("training") or {})}
        keys = {"max_steps": STEPS, "logging_steps": 1, "warmup_steps": 0}
        if stage["kind"] == "online":
            minibatches = min(2, training.get("minibatches", 1))
            keys |= {**ONLINE, "minibatches": minibatches, "max_steps": ROLLOUTS * minibatches}
        found |= {f"stages.{name}.training.{key}": value for key, value in keys.items()}
    return found


def resolved(recipe: Path) -> dict[str, Any]:
    """The recipe with everything that it extends, on its world and on a model of one's own."""
    own = tokengrain.load_recipe(recipe, model="my/model", data="rows.jsonl")
    return without_volatile({"world": plain(tokengrain.load_recipe(recipe)), "own": plain(own)})


def plain(recipe: Any) -> dict[str, Any]:
    """A loaded recipe as dictionaries, with what was given and no defaults."""
    return recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)


# ---- Recording ----


def record(folder: Path) -> dict[str, Any]:
    """What a run folder says about a run's numbers."""
    run = tokengrain.read_run(folder)
    found = {
        "recipe": run.recipe,
        "stages": {stage.name: record_stage(stage) for stage in run.stages},
        "metrics": run.metrics,
        "credit_samples": digests(folder / "credit_samples.json"),
        "evaluation": read_json(folder / "evaluation.json"),
    }
    return without_volatile(found, hidden=str(folder))


def record_stage(stage: Any) -> dict[str, Any]:
    """Log, metrics and hashes of one stage."""
    kept = [path for path in sorted(stage.path.rglob("*")) if "checkpoint-" not in str(path.relative_to(stage.path))]
    return {
        "kind": stage.kind,
        "log": stage.log(),
        "metrics": stage.metrics,
        "weights": {str(p.relative_to(stage.path)): hash_weights(p) for p in kept if p.suffix == ".safetensors"},
        "rows": {path.name: hash_rows(path) for path in kept if path.suffix == ".parquet"},
        "rollouts": digests(stage.path / "rollouts.jsonl"),
    }


def hash_weights(path: Path) -> str:
    """sha256 of the tensors of a safetensors file: names, types, shapes and bytes."""
    import torch
    from safetensors.torch import load_file

    found = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def hash_rows(path: Path) -> dict[str, str]:
    """sha256 of each column of a parquet file."""
    import pyarrow.parquet as parquet

    return {name: digest(values) for name, values in parquet.read_table(path).to_pydict().items()}


def digests(path: Path) -> list[dict[str, Any]]:
    """Of a file with entries (JSON, or one in each line): sha256 of every list and mapping in them; empty without."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    entries = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    return [{k: digest(v) if isinstance(v, (list, dict)) else v for k, v in entry.items()} for entry in entries]


def digest(value: Any) -> str:
    """The first half of the sha256 of a value's JSON, in which floats are exact."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def without_volatile(value: Any, hidden: str = "") -> Any:
    """`value` without keys that differ from run to run, and without the name of the run's folder in its texts."""
    if isinstance(value, dict):
        return {k: without_volatile(v, hidden) for k, v in value.items() if not is_volatile(str(k))}
    if isinstance(value, (list, tuple)):
        return [without_volatile(one, hidden) for one in value]
    return value.replace(hidden, "RUN") if hidden and isinstance(value, str) else value


def is_volatile(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}/") or key.endswith(f"_{name}") for name in VOLATILE)


# ---- Comparing ----


def compare(new: dict[str, Any], old: dict[str, Any]) -> list[str]:
    """One line for every value that differs, for recipes that are in both."""
    found = []
    for name in new:
        if name in old:
            a, b = dict(leaves(old[name])), dict(leaves(new[name]))
            for key in dict.fromkeys([*a, *b]):
                then, now = a.get(key, "nothing"), b.get(key, "nothing")
                if repr(then) != repr(now):
                    found.append(f"{name}  {key}: {then!r} -> {now!r}{distance(then, now)}")
    return found


def distance(then: Any, now: Any) -> str:
    if not (isinstance(then, float) and isinstance(now, float)) or then == 0:
        return ""
    return f"  (relative difference {abs(now - then) / abs(then):.1e})"


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that has no parts, with the keys that lead to it; entries of a log are named by their step."""
    parts: Any = ()
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list):
        parts = ((f"[{n}]{_step(one)}", one) for n, one in enumerate(value))
    if not isinstance(value, (dict, list)) or not value:
        yield key, value
    for name, part in parts:
        yield from leaves(part, f"{key}.{name}" if key else str(name))


def _step(entry: Any) -> str:
    return f"(step {entry['step']})" if isinstance(entry, dict) and "step" in entry else ""


# ---- The command line ----


def freeze(names: list[str], jobs: int) -> dict[str, Any]:
    """Records by recipe, of those that ran; `demo` is among the names if it is wanted."""
    with ThreadPoolExecutor(jobs) as pool:
        found = dict(zip(names, pool.map(freeze_one, names), strict=True))
    return {name: one for name, one in found.items() if one is not None}


def freeze_one(name: str) -> dict[str, Any] | None:
    """The record of a recipe or of the demo, in a folder of its own; None, and the reason is shown, if it failed."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="freeze-") as folder:
        try:
            found = run_demo(Path(folder) / "run") if name == DEMO else run_recipe(name, Path(folder) / "run")
        except RuntimeError as error:
            print(f"{name} FAILED: {error}", flush=True)
            return None
    print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, help="file to write")
    parser.add_argument("--recipes", help="only these, with commas between; `demo` is one of them")
    parser.add_argument("--against", type=Path, help="file of another commit to compare with")
    parser.add_argument("--no-run", action="store_true", help="compare the two files as they are")
    parser.add_argument("--jobs", type=int, default=1, help="recipes that run at a time, on one thread each")
    parser.add_argument("--write-values", action="store_true", help="write tests/freeze_values.json anew")
    given = parser.parse_args()
    if given.write_values:
        from tests.test_freeze import write_values

        write_values()
        return 0
    if given.out is None:
        parser.error("say which file to write")
    names: list[str] = []
    if not given.no_run:
        names = given.recipes.split(",") if given.recipes else [*sorted(p.stem for p in RECIPES.glob("*.yaml")), DEMO]
        print(f"tokengrain of {SOURCE}")
        given.out.write_text(json.dumps(freeze(names, given.jobs), indent=1) + "\n", encoding="utf-8")
    new = without_volatile(json.loads(given.out.read_text(encoding="utf-8")))
    failed = [name for name in names if name not in new]
    if given.against is None:
        return 1 if failed else 0
    old = without_volatile(json.loads(given.against.read_text(encoding="utf-8")))
    differences = compare(new, old)
    print("\n".join(differences))
    shared = [name for name in new if name in old]
    only = sorted(set(new) ^ set(old))
    print(f"{len(differences)} differences in {len(shared)} recipes" + (f"; not compared: {only}" if only else ""))
    return 1 if differences or failed or not shared else 0


if __name__ == "__main__":
    sys.exit(main())
