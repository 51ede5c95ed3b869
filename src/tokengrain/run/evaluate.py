"""`tokengrain evaluate RUN`: a finished run's model on held-out pairs, and in its world."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from tokengrain.errors import RunError, write_json
from tokengrain.methods.qrm import RewardModelCredit
from tokengrain.recipe.load import load_recipe
from tokengrain.run.build import Workshop
from tokengrain.run.plan import make_plan
from tokengrain.run.show import counted
from tokengrain.run.stages import build_trainer, plain_metrics
from tokengrain.runs import read_run
from tokengrain.worlds import is_world, load_world

FILE = "evaluation.json"


def evaluate_run(
    run_dir: str | Path, *, data: str | None = None, samples: int | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Evaluate the model of a finished run and write `evaluation.json` into its folder.

    Args:
        run_dir: the run folder.
        data: rows to evaluate on, instead of the run's own held-out ones.
        samples: samples per prompt. In a world None means the world's own number, 64 of stories and 16 of the others.
            Elsewhere of an online run alone: completions per held-out prompt, instead of `eval_generations`; of several
            at `eval_temperature` 0 all would be alike, so they are drawn at the training's `temperature`.
        console: where progress is shown.

    Returns:
        `held_out` (the objective's metrics, accuracy with its 95 % interval) if there are held-out rows; of an online
        run `sampling` (completions per held-out prompt, and their temperature); for a world `world` and `world_base`:
        true reward, KL, frontier share, win rate, ... of both; of a reward model how well its token scores agree with
        the exact advantage.

    Raises:
        RunError: not a run folder, or a run that is not finished; `samples` where nothing is sampled.
    """
    from accelerate import PartialState

    run = read_run(run_dir)
    final = run.final_stage
    recipe = load_recipe(run.path / "recipe.yaml", output=run.path)
    in_world = is_world(recipe.data.train) and recipe.model.is_world and final.kind != "reward"
    if samples is not None and not in_world and final.kind != "online":
        raise RunError(
            f"{run.path}: samples is {samples}, but nothing is sampled: the model is evaluated on rows with "
            "completions; expected a policy in a world, or one that was trained online"
        )
    plan = next(p for p in make_plan(recipe) if p.stage.name == final.name)
    shop = Workshop(recipe, console or Console(quiet=True), PartialState())
    found: dict[str, Any] = {"run": str(run.path), "method": run.method, "data": data or recipe.data.train}
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build_trainer(shop, plan, Path(scratch), str(final.model_path), eval_data=data)
        if final.kind == "online":
            found["sampling"] = _sampling(trainer.args, None if in_world else samples)
        if trainer.eval_dataset is not None:
            found["objective"] = trainer.objective.describe()
            shop.console.print("  held-out rows")
            found["held_out"] = plain_metrics(trainer.evaluate())
        model = trainer.evaluation_model()
    if is_world(recipe.data.train) and final.kind == "reward":
        credit = RewardModelCredit(model=shop.reward_model(plan.stage.model.at(str(final.model_path))))
        found["world"] = load_world(recipe.data.train).credit_recovery(credit)
    elif in_world:
        world = load_world(recipe.data.train)
        for key, judged in (("world", model), ("world_base", shop.frozen(recipe.model))):
            title = f"samples of the {'trained' if key == 'world' else 'base'} model in the world {world.name}"
            with counted(shop.console, title) as progress:
                found[key] = world.evaluate(judged, n=samples, seed=recipe.seed, progress=progress)
    if not {"held_out", "world"} & set(found):
        raise RunError(f"{run.path} has no held-out rows; give rows to evaluate on with --data")
    if shop.state.is_main_process:
        write_json(run.path / FILE, found)
    return found


def _sampling(args: Any, samples: int | None) -> dict[str, Any]:
    """How held-out prompts are completed, `samples` times if given; changes `args`."""
    if samples is not None:
        args.eval_generations = samples
        if samples > 1 and args.eval_temperature == 0:
            args.eval_temperature = args.temperature
    return {"samples": args.eval_generations, "temperature": args.eval_temperature}
