"""The recipes for models that see, whole, on their worlds; and the quick sizes of the claims about them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from experiments.claims.groups import GROUPS
from experiments.claims.runner import run_claims
from rich.console import Console

import tokengrain
from tokengrain.run.runner import evaluate_run

pytestmark = pytest.mark.slow
RECIPES = Path(__file__).parents[1] / "recipes"


def trained(name: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the world says of the recipe's policy, and of the model that it started from."""
    torch.set_num_threads(2)
    start = time.process_time()  # of both threads: what else the machine does is not counted
    tokengrain.train(RECIPES / f"{name}.yaml", output=folder / name, quiet=True)
    seconds = time.process_time() - start
    print(f"{name}: {seconds:.0f} CPU seconds")
    assert seconds < 240
    found = evaluate_run(folder / name, console=Console(quiet=True))
    return found["world"], found["world_base"]


def test_timemaster(tmp_path: Path) -> None:
    after, before = trained("timemaster", tmp_path)
    assert after["form"] > 0.95 > before["form"]
    assert after["accuracy"] > before["accuracy"] + 0.3
    assert after["greedy_accuracy"] > before["greedy_accuracy"] - 0.1
    assert after["accuracy"] < after["best_accuracy"]


def test_rrpo_on_video(tmp_path: Path) -> None:
    after, before = trained("rrpo_video", tmp_path)
    assert after["frames"] > before["frames"] + 0.15
    assert abs(after["first_style"] - before["first_style"]) < 0.08


def test_aepo_on_images(tmp_path: Path) -> None:
    after, before = trained("aepo_images", tmp_path)
    assert after["accuracy"] > before["accuracy"] + 0.1
    assert after["form"] > 0.9


@pytest.mark.parametrize("name", ["series", "clips", "shapes"])
def test_quick_claims(name: str, tmp_path: Path) -> None:
    found = run_claims([GROUPS[name]], range(1), tmp_path, quick=True, console=Console(quiet=True))
    assert [run["arm"] for run in found] == [arm.name for arm in GROUPS[name].arms]
    assert all(run["measures"]["accuracy"] is not None for run in found)
