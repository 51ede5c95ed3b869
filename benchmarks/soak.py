"""Does online training leak? A recipe on a small world for many steps: memory by step, and what it leaves on disk.

    python -m benchmarks.soak                  # 500 optimiser steps, some minutes on one core
    python -m benchmarks.soak --steps 40       # only to see that it works

Prints the resident memory every 50 steps and the slope of a straight line through that of all steps after the first
100, which fill caches and pools. Exit status 1 if the slope exceeds the bound, or if a file is left that is not the
run's own. The bound allows for what a run keeps on purpose (its log, about 1 kB per step) and for the jitter of the
allocator over some hundred steps.
"""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import TrainerCallback, trainer

from tokengrain.run.load import load_recipe
from tokengrain.run.runner import run_recipe
from tokengrain.worlds import load_world

OWN = (
    "recipe.yaml",
    "run.json",
    "metrics.json",
    "train/stage.json",
    "train/log.jsonl",
    "train/metrics.json",
    "train/rollouts.jsonl",
    "train/model/*",
)
"""What an online run leaves in its folder, as patterns."""

WORLD = "world://arithmetic?size=small"
SMALLEST = {"prompts_per_rollout": 4, "num_generations": 4, "minibatches": 2}

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)
console = Console()


def slope(steps: list[int], values: list[float]) -> float:
    """Of the least-squares line through the points, in units of `values` per step.

    Raises:
        ValueError: fewer than two different steps.
    """
    x, y = torch.tensor(steps, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
    if len(set(steps)) < 2:
        raise ValueError(f"a line needs two different steps, got {len(set(steps))}")
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / x.square().sum())


def left_over(folder: Path, own: tuple[str, ...] = OWN) -> list[Path]:
    """Files in a folder, relative to it, that fit none of the patterns."""
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file() or path.is_symlink()]
    return [path for path in files if not any(path.match(pattern) and _as_deep(path, pattern) for pattern in own)]


def _as_deep(path: Path, pattern: str) -> bool:
    """`Path.match` looks at the end of a path alone."""
    return len(path.parts) == len(Path(pattern).parts)


class Memory:
    """The process's resident memory after every optimiser step, in bytes."""

    def __init__(self, every: int) -> None:
        import psutil

        self.process, self.every = psutil.Process(), every
        self.steps: list[int] = []
        self.sizes: list[float] = []

    def callback(self) -> Any:
        """For transformers' trainer."""
        memory = self

        class Measure(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                memory.add(state.global_step)

        return Measure

    def add(self, step: int) -> None:
        size = self.process.memory_info().rss
        self.steps.append(step)
        self.sizes.append(float(size))
        if step % self.every == 0 or step == 1:
            console.print(f"step {step:5d}   {size / 2**20:8.2f} MiB", highlight=False)

    def growth(self, first: int) -> float:
        """Bytes per step after step `first`."""
        late = [(s, m) for s, m in zip(self.steps, self.sizes, strict=True) if s > first]
        return slope([s for s, _ in late], [m for _, m in late])


@contextmanager
def _measured(memory: Memory) -> Any:
    """Every trainer that is made meanwhile reports its steps."""
    callback = memory.callback()
    trainer.DEFAULT_CALLBACKS.append(callback)
    try:
        yield
    finally:
        trainer.DEFAULT_CALLBACKS.remove(callback)


@contextmanager
def _temporary_files(folder: Path) -> Any:
    """Temporary files go into this folder meanwhile."""
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def soak(recipe: str, steps: int, every: int, warm_up: int, folder: Path) -> tuple[float, list[str]]:
    """Run a recipe at its smallest; bytes per step, and the files that were left.

    Args:
        folder: for the run folder and temporary files.
    """
    world: Any = load_world(WORLD)
    world.base_model()
    run, temporary = folder / "run", folder / "tmp"
    temporary.mkdir()
    settings = [f"stages.train.training.{name}={value}" for name, value in SMALLEST.items()]
    saving = ["training.save_strategy=steps", f"training.save_steps={max(steps // 5, 1)}"]
    own = [f"output_dir={run}", f"training.max_steps={steps}", *saving]
    loaded = load_recipe(recipe, WORLD, WORLD, [*own, *settings])
    memory = Memory(every)
    with _measured(memory), _temporary_files(temporary):
        run_recipe(loaded, console=Console(quiet=True))
    left = [f"run/{path}" for path in left_over(run)] + [f"tmp/{path}" for path in left_over(temporary, ())]
    return memory.growth(warm_up), left


@app.command(help=__doc__)
def main(
    steps: Annotated[int, typer.Option(min=4, help="Optimiser steps.")] = 500,
    every: Annotated[int, typer.Option(min=1, help="Steps from one line to the next.")] = 50,
    warm_up: Annotated[int, typer.Option(min=0, help="Steps that the line leaves out; at most half of them.")] = 100,
    bound: Annotated[float, typer.Option(help="Largest slope, bytes per step.")] = 20_000.0,
    recipe: Annotated[str, typer.Option(help="An online recipe that runs on the world arithmetic.")] = "grpo",
) -> None:
    torch.set_num_threads(1)
    warm_up = min(warm_up, steps // 2)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        growth, left = soak(recipe, steps, every, warm_up, Path(folder))
    console.print(f"slope after step {warm_up}: {growth:+,.0f} bytes per step (bound {bound:,.0f})", highlight=False)
    console.print("files left beside the run's own: " + (", ".join(left) or "none"), highlight=False, soft_wrap=True)
    if growth > bound or left:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
