"""Running a recipe: its stages in order, each of them run, resumed or reused."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from tokengrain.errors import RecipeError
from tokengrain.files import write_json
from tokengrain.recipe import Recipe, ResolvedStage, resolve_stages
from tokengrain.rollout.base import RolloutError
from tokengrain.rollout.registry import check_reachable
from tokengrain.runs import read_run, resume_command
from tokengrain.training import inputs, models, tables
from tokengrain.training.annotation import check_given_files, run_annotation
from tokengrain.training.completion_models import check_completion_model
from tokengrain.training.credit import columns_needed
from tokengrain.training.execute import run_init, run_training
from tokengrain.training.folder import RunFolder
from tokengrain.training.plan import StagePlan, make_plan
from tokengrain.training.sources import is_reward_model
from tokengrain.training.workshop import Workshop

_RUNNERS = {
    "init": run_init,
    "sft": run_training,
    "train": run_training,
    "reward": run_training,
    "online": run_training,
    "annotate": run_annotation,
}


@dataclass
class RunResult:
    """What a run produced.

    Attributes:
        path: the run folder.
        metrics: content of its `metrics.json`.
        reused: names of the stages whose finished result was used.
    """

    path: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)

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

    A finished stage with the same settings and inputs is reused, an interrupted one goes on from its last
    checkpoint. All rows of all stages are checked before anything is trained.

    Args:
        overwrite: replace results of other settings that are in the run folder.
        dry_run: show the plan and stop.
        until: the last stage to run; the run can be continued after it.
        console: where progress is shown (default: the standard output).

    Raises:
        RecipeError, DataError, ModelError: something does not fit; nothing was trained.
        RolloutError: a server to sample from does not answer.
        RunError: the run folder holds another run, or the disk is full.
        NonFiniteLossError: the loss became NaN or infinite.
        KeyboardInterrupt: stopped by the user; the state is kept.
    """
    from accelerate import PartialState

    state = PartialState()
    console = console or Console()
    if not state.is_main_process:
        console = Console(quiet=True)
    plans = make_plan(recipe, overwrite=overwrite)
    wanted = plans[: 1 + [p.stage.name for p in plans].index(until)] if until is not None else plans
    tables.print_plan(console, recipe, wanted)
    state.wait_for_everyone()
    if dry_run:
        _warn_of_servers(console, wanted)
        return RunResult(Path(recipe.output_dir))
    reused = [plan.stage.name for plan in wanted if plan.action == "reuse"]
    shop = Workshop(recipe, console, state)
    folder = RunFolder(recipe, plans, writes=state.is_main_process)
    with folder.kept_in_order(console):
        _prepare(shop, wanted, folder)
        for plan in wanted:
            if plan.action != "reuse":
                _run_stage(shop, plan, folder)
        if wanted != plans and plans[len(wanted)].record is None:
            folder.pause()
            state.wait_for_everyone()
            console.print(f"to go on with training: {resume_command(read_run(folder.path))}", soft_wrap=True)
            return RunResult(folder.path, {}, reused)
        metrics = folder.finish()
    state.wait_for_everyone()
    tables.print_result(console, metrics, folder.path)
    return RunResult(folder.path, metrics, reused)


def _prepare(shop: Workshop, plans: list[StagePlan], folder: RunFolder) -> None:
    """Everything that can fail before training does so here: models, vocabularies, rows, disk."""
    pending = [plan for plan in plans if plan.action != "reuse"]
    if not pending:
        return
    for plan in pending:
        if plan.stage.kind == "init":
            inputs.open_rows(plan.stage.data, shop.recipe.seed)
            folder.begin()
            _run_stage(shop, plan, folder)
            plan.action = "reuse"
    with shop.console.status("checking models and data") if shop.console.is_terminal else nullcontext():
        for plan in pending:
            if plan.stage.kind != "init":
                _check_models(shop, plan.stage)
        for plan in pending:
            if plan.stage.kind != "init" and plan.stage.data.stage is None:
                check_given_files(shop, plan, _existing_ancestor(shop, plan.stage).model)
                _check_rows(shop, plan.stage)
    folder.check_space()
    folder.begin()


def _check_models(shop: Workshop, stage: ResolvedStage) -> None:
    """Models that exist already must be loadable and share the policy's vocabulary."""
    made_before = stage.model.stage not in (None, "init")
    if made_before and not Path(models.locate(stage.model, shop.run_dir)).exists():
        return  # an earlier stage will make it, from a model that is checked
    tokenizer = shop.tokenizer(stage.model)
    if stage.online is not None:
        check_reachable(stage.online.sampler)
    config = models.load_config(stage.model, shop.path(stage.model))
    models.check_vocabulary(tokenizer, config, str(stage.model.path), str(stage.model.path))
    for role, other in stage.models.items():
        if role.startswith("rewards[") and other.stage is None:
            check_completion_model(other, shop.path(other))
        if other.stage is None and not is_reward_model(stage, role):
            theirs = shop.tokenizer(other)
            models.check_same_vocabulary(
                tokenizer, theirs, f"the policy {stage.model.path}", f"the {role} {other.path}"
            )


def _warn_of_servers(console: Console, plans: list[StagePlan]) -> None:
    """Say which servers do not answer: they need not before their stage begins."""
    for plan in plans:
        if plan.stage.online is None or plan.action == "reuse":
            continue
        try:
            check_reachable(plan.stage.online.sampler, patient=False)
        except (RolloutError, RecipeError) as error:
            console.print(f"stage {plan.stage.name} cannot begin yet: {error}", soft_wrap=True, markup=False)


def _existing_ancestor(shop: Workshop, stage: ResolvedStage) -> ResolvedStage:
    """The stage, going back from this one, whose starting model exists already."""
    while stage.model.stage not in (None, "init"):
        stage = next(s for s in resolve_stages(shop.recipe) if s.name == stage.model.stage)
    return stage


def _check_rows(shop: Workshop, stage: ResolvedStage) -> None:
    """Tokenise the stage's rows now, with the tokenizer of the model that its own model will come from."""
    from tokengrain.objectives import make_objective

    like = _existing_ancestor(shop, stage).model
    for dataset in shop.datasets(stage, like=like):
        if dataset is not None and stage.kind == "train":
            objective = make_objective(**(stage.objective or {}))
            needed = columns_needed(objective, stage, getattr(dataset, "columns", ()))
            inputs.require_columns(dataset, needed, stage)
    if stage.reference == "columns":
        inputs.require_columns(shop.datasets(stage, like=like)[0], {"ref_logps"}, stage)


def _run_stage(shop: Workshop, plan: StagePlan, folder: RunFolder) -> None:
    shop.console.print(f"[bold]{plan.stage.name}[/]  {tables.describe(plan.stage)}")
    folder.start(plan)
    shop.state.wait_for_everyone()
    started = time.monotonic()
    try:
        metrics = _RUNNERS[plan.stage.kind](shop, plan)
        if folder.writes:
            write_json(plan.path / "metrics.json", metrics)
    except BaseException as error:
        folder.stop(plan, "interrupted" if isinstance(error, KeyboardInterrupt) else "failed", started)
        raise
    finally:
        shop.release()
    folder.stop(plan, "done", started)
    shop.state.wait_for_everyone()
    tables.print_stage(shop.console, plan, metrics)
