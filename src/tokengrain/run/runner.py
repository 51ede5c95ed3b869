"""Running a recipe, stage by stage, and evaluating a finished run."""

from __future__ import annotations

import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.text import Text

from tokengrain import settings
from tokengrain.errors import RecipeError, RolloutError, RunError, require, write_json
from tokengrain.recipe.schema import INIT, Recipe
from tokengrain.run import show
from tokengrain.run.build import RunModels
from tokengrain.run.folder import RunFolder, StagePlan, check_made, locked, make_plan
from tokengrain.run.load import load_recipe
from tokengrain.run.trained import Trained
from tokengrain.runs import read_run, resume_command
from tokengrain.screen import Screen
from tokengrain.settings import code_named_by, nearest

EVALUATION_FILE = "evaluation.json"


@dataclass
class RunResult:
    """What a run produced: its folder, and the content of its `metrics.json`."""

    path: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)  # names of the stages whose finished result was used

    @property
    def model_path(self) -> Path:
        """Folder of the trained model."""
        return read_run(self.path).model_path


def run_recipe(
    recipe: Recipe,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    until: str | None = None,
    console: Console | None = None,
) -> RunResult:
    """Run a recipe's stages in order, in one process or in all processes of a launcher.

    A finished stage with the same settings and inputs is reused, an interrupted one resumes from its last
    checkpoint. All rows of all stages are checked before anything is trained.

    Args:
        overwrite: replace results of other settings that are in the run folder.
        dry_run: show the plan and stop.
        until: the last stage to run; the run can be continued after it.
        console: where progress is shown (default: the standard output).

    Raises:
        RecipeError, DataError, ModelError: something does not fit; nothing was trained.
        RolloutError: a server to sample from does not answer.
        RunError: the run folder holds another run or is in use, or the disk is full.
        NonFiniteLossError: the loss became NaN or infinite.
        KeyboardInterrupt: stopped by the user; the state is kept.
    """
    state = PartialState()
    console = (console or Screen()) if state.is_main_process else Screen(quiet=True)
    with locked(Path(recipe.output_dir)) if state.is_main_process and not dry_run else nullcontext():
        return _run(recipe, state, console, overwrite=overwrite, dry_run=dry_run, until=until)


def _run(
    recipe: Recipe, state: Any, console: Console, *, overwrite: bool, dry_run: bool, until: str | None
) -> RunResult:
    plans = make_plan(recipe, overwrite=overwrite, processes=state.num_processes)
    recipe = plans[0].stage.recipe
    names = [plan.stage.name for plan in plans]
    require(until is None or until in names, RecipeError, f"until is {until!r}, no stage{nearest(str(until), names)}")
    wanted = plans[: 1 + names.index(until)] if until is not None else plans
    check_made(wanted)
    stages = [(p.stage.name, p.stage.kind, p.stage.describe(), p.action) for p in wanted]
    show.print_plan(console, f"{recipe.method}: {recipe.output_dir}", stages)
    show.print_outlooks(console, {p.stage.name: p.outlook for p in wanted if p.outlook is not None})
    state.wait_for_everyone()
    if dry_run:
        run = RunModels(recipe, console, state)
        pending = [plan for plan in wanted if plan.action != "reuse"]
        _check(run, pending, [plan for plan in pending if _can_be_read(run, plan)])
        _warn_of_servers(console, wanted)
        return RunResult(Path(recipe.output_dir))
    reused = [plan.stage.name for plan in wanted if plan.action == "reuse"]
    folder = RunFolder(recipe, plans, writes=state.is_main_process)
    run = RunModels(recipe, console, state, *broadcast_object_list([folder.template_time]))
    folder.tidy()
    with folder.kept_in_order(console):
        _prepare(run, wanted, folder)
        for plan in wanted:
            if plan.action != "reuse":
                _run_stage(run, plan, folder)
                if run.stop_requested and plan is not wanted[-1]:
                    raise KeyboardInterrupt
        if wanted != plans and plans[len(wanted)].record is None:
            folder.pause()
            state.wait_for_everyone()
            command = resume_command(read_run(folder.path))
            console.print(f"to continue training: {command}", soft_wrap=True, markup=False)
            return RunResult(folder.path, {}, reused)
        metrics = folder.finish()
    state.wait_for_everyone()
    show.print_result(console, metrics, folder.path)
    return RunResult(folder.path, metrics, reused)


def _prepare(run: RunModels, plans: list[StagePlan], folder: RunFolder) -> None:
    """Everything that can fail before training does so here: models, vocabularies, rows, disk."""
    pending = [plan for plan in plans if plan.action != "reuse"]
    if not pending:
        return
    if pending[0].stage.kind == INIT:
        pending[0].stage.rows()
        folder.begin()
        _run_stage(run, pending[0], folder)
        pending.pop(0).action = "reuse"
    _check(run, pending, pending)
    folder.check_space()
    folder.begin()


def _check(run: RunModels, plans: list[StagePlan], readable: list[StagePlan]) -> None:
    """Right answers; and of the stages whose model can be read, models, vocabularies and rows."""
    with run.console.status("checking models and data") if run.console.is_terminal else nullcontext():
        for plan in readable:
            plan.stage.check_models(run)
        for plan in plans:
            plan.stage.check_golds()
        for plan in readable:
            plan.stage.check_rows(run, plan.settings)


def _can_be_read(run: RunModels, plan: StagePlan) -> bool:
    """Whether a stage's rows can be tokenised before the run: a world's model may have to be made for that."""
    model = plan.stage.existing.model
    return plan.stage.kind != INIT and not model.is_world and (model.stage is None or Path(run.path(model)).exists())


def _warn_of_servers(console: Console, plans: list[StagePlan]) -> None:
    """Say which servers do not answer: they need not before their stage begins."""
    for plan in plans:
        if plan.action != "reuse":
            try:
                plan.stage.check_server(patient=False)
            except (RolloutError, RecipeError) as error:
                console.print(f"stage {plan.stage.name} cannot begin yet: {error}", soft_wrap=True, markup=False)


def _run_stage(run: RunModels, plan: StagePlan, folder: RunFolder) -> None:
    run.console.print(Text.assemble((plan.stage.name, "bold"), f"  {plan.stage.describe()}"))
    folder.start(plan)
    run.state.wait_for_everyone()
    started = time.monotonic()
    try:
        metrics = plan.stage.run(run, plan.path, plan.settings)
        if folder.writes:
            write_json(plan.path / "metrics.json", metrics)
    except BaseException as error:
        folder.stop(plan, "interrupted" if isinstance(error, KeyboardInterrupt) else "failed", started)
        raise
    finally:
        run.release()
    folder.stop(plan, "done", started)
    run.state.wait_for_everyone()
    show.print_stage(run.console, plan.record.seconds if plan.record else 0.0, metrics)


def evaluate_run(
    run_dir: str | Path,
    *,
    data: str | None = None,
    samples: int | None = None,
    console: Console | None = None,
    trust_run_code: bool = False,
) -> dict[str, Any]:
    """Evaluate the model of a finished run and write `evaluation.json` into its folder.

    Args:
        run_dir: the run folder.
        data: rows to evaluate on, instead of the run's own held-out ones.
        samples: samples per prompt. In a world None means the world's own number, 64 of stories and 16 of the others.
            Elsewhere of an online run alone: completions per held-out prompt, instead of `eval_generations`; of several
            at `eval_temperature` 0 all would be alike, so they are drawn at the training's `temperature`.
        console: where progress is shown.
        trust_run_code: run Python code that the run's recipe names.

    Returns:
        `held_out` (the objective's metrics, accuracy with its 95 % interval) if there are held-out rows; of an online
        run `sampling` (completions per held-out prompt, and their temperature); for a world `world` and `world_base`:
        true reward, KL, frontier share, win rate, ... of both; of a reward model how well its token scores agree with
        the exact advantage.

    Raises:
        RunError: not a run folder, or a run that is not finished; `samples` where nothing is sampled; code that the
            recipe names and that is not trusted.
    """
    with settings.trust_run_code(trust_run_code), code_named_by(Path(run_dir) / "recipe.yaml"):
        return _evaluate(run_dir, data, samples, console)


def _evaluate(run_dir: str | Path, data: str | None, samples: int | None, console: Console | None) -> dict[str, Any]:
    found_run = read_run(run_dir)
    final, weights = found_run.final_stage, str(found_run.model_path)
    recipe = load_recipe(found_run.path / "recipe.yaml", output=found_run.path)
    plan = next(p for p in make_plan(recipe) if p.stage.name == final.name)
    stage, recipe = plan.stage, plan.stage.recipe
    assert isinstance(stage, Trained)  # `final_stage` is one
    fits = samples is None or 1 <= samples <= 10**6
    require(fits, RecipeError, f"samples is {samples}; expected at least 1 and at most {10**6}")
    require(
        samples is None or stage.in_world or stage.samples_rows,
        RunError,
        f"{found_run.path}: samples is {samples}, but nothing is sampled: the model is evaluated on rows with "
        "completions; expected a policy in a world, or one that was trained online",
    )
    run = RunModels(recipe, console or Screen(quiet=True), PartialState(), found_run.template_time)
    found: dict[str, Any] = {"run": str(found_run.path), "method": found_run.method, "data": data or recipe.data.train}
    with tempfile.TemporaryDirectory() as scratch:
        trainer = stage.build(run, Path(scratch), plan.settings, weights, eval_data=data)
        if trainer.eval_dataset is not None:
            run.console.print("  held-out rows")
        found |= stage.held_out(trainer, samples)
        model = trainer.evaluation_model()
    found |= stage.world_numbers(run, model, weights, samples)
    what = f"{found_run.path} has no held-out rows; give rows to evaluate on with --data"
    require({"held_out", "world"} & set(found), RunError, what)
    if run.state.is_main_process:
        write_json(found_run.path / EVALUATION_FILE, found)
    return found
