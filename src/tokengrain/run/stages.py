"""Running a recipe: its stages in order, each of them run, resumed or reused."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tokengrain import models
from tokengrain.annotation import annotate, check_manifest, is_annotated, load_annotated
from tokengrain.batch import TokenBatch
from tokengrain.data.tokens import tokenizer_fingerprint
from tokengrain.errors import ModelError, RecipeError, RolloutError, fingerprint, read_json, write_json
from tokengrain.method import FROZEN, make_objective
from tokengrain.recipe.schema import Recipe, ResolvedStage, credit_role, is_reward_model, resolve_stages, training_keys
from tokengrain.rewards.reward_model import check_completion_model
from tokengrain.rollout.sampler import check_reachable
from tokengrain.run import inputs, show
from tokengrain.run.build import (
    Workshop,
    build_credit,
    build_reference,
    build_teacher,
    columns_needed,
    ready_for_teacher,
)
from tokengrain.run.folder import RunFolder
from tokengrain.run.plan import StagePlan, make_plan
from tokengrain.run.show import ShowProgress
from tokengrain.runs import read_run, resume_command
from tokengrain.scoring.reference import FrozenReference
from tokengrain.specs import LoraSpec, ModelSpec
from tokengrain.training.checkpoint import (
    STAGING,
    checkpoints,
    last_complete_checkpoint,
    publish,
    remove_folder,
    saving,
)

# ----------------------------------------------------------------------------------------------------
# A few pairs with the credit of every token, stored in the run folder for `report` and `inspect`.

COUNT = 8


def of_credit(shop: Workshop, plan: StagePlan, files: tuple[Path, Path]) -> None:
    """Store the token credit of the first annotated pairs, held-out ones if there are any."""
    from tokengrain.annotation import load_annotated

    batch = _first(load_annotated(files[1] if files[1].exists() else files[0]))
    _store(shop, plan, batch, f"credit: {(plan.stage.credit or {}).get('name')}", batch.columns["token_rewards"])


def of_policy(shop: Workshop, plan: StagePlan, trainer: Any) -> None:
    """Store each token's log-ratio of the trained policy to its reference (nats). All processes take part."""
    dataset = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    if plan.stage.kind != "train" or trainer.reference is None or not hasattr(dataset, "__len__"):
        return
    batch = _first(dataset)
    model = trainer.evaluation_model().eval()
    with torch.no_grad():
        judged = trainer.judge(model, batch.to(trainer.args.device), measure=("log_ratio", "whole"))
    if shop.state.is_main_process and judged.log_ratio is not None:
        _store(shop, plan, batch, f"log-ratio of {plan.stage.name}", judged.log_ratio.float().cpu())


def _first(dataset: Any) -> TokenBatch:
    return TokenBatch.from_samples([dataset[i] for i in range(min(COUNT, len(dataset)))])


def _store(shop: Workshop, plan: StagePlan, batch: TokenBatch, source: str, values: Tensor) -> None:
    """Put the entries of one source into the run's file, in place of earlier ones of that source."""
    from tokengrain.report.rows import FILE, collect_credit_samples
    from tokengrain.worlds import is_world, load_world

    data = shop.recipe.data.train
    truth = load_world(data).advantages(batch) if is_world(data) else None
    tokenizer = shop.tokenizer(plan.stage.model)
    path = shop.run_dir / FILE
    kept = [entry for entry in (read_json(path) if path.exists() else []) if entry.get("source") != source]
    write_json(path, kept + collect_credit_samples(batch, tokenizer, {source: values}, truth=truth))


# ----------------------------------------------------------------------------------------------------
# The annotate stage, and the check that stored token credit belongs to what is trained with it.


def run_annotation(shop: Workshop, plan: StagePlan) -> dict[str, Any]:
    """Write the rows with their token credit; finished shards of an earlier attempt are kept."""
    stage = plan.stage
    tokenizer = shop.tokenizer(stage.model)
    reference = FrozenReference(shop.frozen(stage.model)) if stage.options["reference_logps"] else None
    source = build_credit(stage, tokenizer, shop)
    counts = {}
    files = inputs.annotated_files(shop.run_dir, stage.name)
    all_rows = inputs.open_rows(stage.data, shop.recipe.seed)
    # As the policy will be scored: a reference in another precision is not equal to it at the start.
    precision = torch.autocast(shop.state.device.type, torch.bfloat16, enabled=stage.options["bf16"])
    for dataset, rows, output in zip(shop.datasets(stage), all_rows, files, strict=True):
        if dataset is None:
            continue
        with precision:
            annotate(
                dataset,
                tokenizer,
                inputs.tokenize_config(stage.data),
                {"token_rewards": source},
                reference,
                output,
                {**_marks(shop, stage, plan, stage.model), "source": fingerprint(plan.settings["credit"])},
                shard_rows=stage.options["shard_rows"],
                max_tokens=stage.options["max_tokens"],
                device=shop.state.device,
                rows=rows,
                progress=shop.state.is_main_process and not shop.console.quiet,
            )
        counts[output.stem] = len(dataset)
    if shop.state.is_main_process:
        of_credit(shop, plan, files)
    return {"rows": counts}


def _marks(shop: Workshop, annotating: ResolvedStage, plan: StagePlan, like: ModelSpec) -> dict[str, str]:
    """What an annotated file depends on beside its credit source, by the names its manifest uses.

    Args:
        annotating: the stage whose data are annotated.
        plan: the stage that annotates or trains; its model is what the numbers must belong to.
        like: a model with that stage's tokenizer.
    """
    tokenizer = shop.tokenizer(like)
    tokenize = inputs.tokenize_config(plan.stage.data)
    return {
        "model": plan.settings["model"]["content"],
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "chat_template": fingerprint([tokenize.chat_template or tokenizer.chat_template]),
        "tokenize": fingerprint(plan.stage.data.tokenize),
        "data": inputs.data_fingerprint(annotating.data),
    }


def _without_unused_model(stage: ResolvedStage, marks: dict[str, str]) -> dict[str, str]:
    """Where the stored ref_logps are not used, the model they were made with does not matter."""
    if stage.reference in (None, "columns"):
        return marks
    return {name: mark for name, mark in marks.items() if name != "model"}


def annotated(shop: Workshop, plan: StagePlan) -> tuple[Any, Any]:
    """The data sets that an annotate stage made, checked to belong to this stage.

    Raises:
        RunError: made with another model, tokenizer, template, data or settings; says which.
    """
    stage = plan.stage
    maker = next(s for s in resolve_stages(shop.recipe) if s.name == stage.data.stage)
    marks = _without_unused_model(stage, _marks(shop, maker, plan, stage.model))
    tokenizer = shop.tokenizer(stage.model)
    files = inputs.annotated_files(shop.run_dir, str(stage.data.stage))
    train, held_out = (load_annotated(f, tokenizer, marks) if f.exists() else None for f in files)
    if train is None:
        raise RecipeError(f"stage {stage.data.stage!r} has written no {files[0].name}")
    return train, held_out


def check_given_files(shop: Workshop, plan: StagePlan, like: ModelSpec) -> None:
    """Annotated files that a recipe gives as ordinary data must belong to its model and tokenizer too.

    Args:
        like: a model that exists already and has the stage's tokenizer.

    Raises:
        RunError: made with another model, tokenizer or template, or changed since; says which.
    """
    data = plan.stage.data
    given = [source for source in (data.train, data.eval) if source is not None and is_annotated(source)]
    if plan.stage.kind not in ("train", "reward") or not given:
        return
    marks = _without_unused_model(plan.stage, _marks(shop, plan.stage, plan, like))
    del marks["data"]  # the rows are in the file itself, with a digest
    for source in given:
        check_manifest(source, marks)


# ----------------------------------------------------------------------------------------------------
# Ctrl-C while training: finish the step, save a checkpoint, stop.


class StopOnSignal(TrainerCallback):
    """Turns the first SIGINT or SIGTERM into "save and stop after this optimiser step".

    A second signal acts at once, as it would without this. Use it as a context manager around `train`. It
    does nothing outside the main thread (Python handles no signals there) or with several processes, which
    would not stop at the same step; the last periodic checkpoint serves there.
    """

    def __init__(self, processes: int = 1) -> None:
        self.requested = False
        self._active = processes == 1 and threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if self._active:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.requested:
            control.should_save = True
            control.should_training_stop = True


# ----------------------------------------------------------------------------------------------------
# Carrying out one stage: build a model, train, or annotate.

# ------------------------------------------------------------------------------------------------------ build


def run_init(shop: Workshop, plan: StagePlan) -> dict[str, Any]:
    """Build the model and its tokenizer."""
    target = plan.path / "model"
    if shop.state.is_main_process:
        train, _ = inputs.open_rows(plan.stage.data, shop.recipe.seed)
        staged = plan.path / STAGING / "model"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        with saving("the new model", staged):
            models.build(plan.stage.model, train, shop.recipe.seed, staged)
            publish(staged, target)
        staged.parent.rmdir()
    shop.state.wait_for_everyone()
    config = models.load_config(plan.stage.model, str(target))
    return {"vocabulary": config.get_text_config().vocab_size, "model_type": config.model_type}


# ------------------------------------------------------------------------------------------------------ train


def build_trainer(
    shop: Workshop, plan: StagePlan, folder: Path, model_path: str | None = None, eval_data: str | None = None
) -> Any:
    """The trainer of a stage.

    Args:
        folder: where it writes.
        model_path: other weights for the policy than those the stage starts from (to evaluate a finished
            model); the reference stays what it was.
        eval_data: held-out rows from another source.
    """
    from tokengrain.scoring.reference import ADAPTER_OFF
    from tokengrain.training.config import PreferenceConfig
    from tokengrain.training.trainer import PreferenceTrainer

    stage = plan.stage
    if stage.kind == "online":
        return _build_online(shop, plan, folder, model_path, eval_data)
    objective = make_objective(**(stage.objective or {}))
    train, held_out = shop.datasets(stage) if stage.data.stage is None else annotated(shop, plan)
    if eval_data is not None:
        data = stage.data.model_copy(update={"train": eval_data, "eval": None, "eval_fraction": 0.0})
        held_out = shop.datasets(replace(stage, data=data))[0]
        objective, stage = _for_other_rows(objective, stage, held_out)
    tokenizer = shop.tokenizer(stage.model)
    model, peft_config = _policy(shop, stage, model_path)
    reference = build_reference(stage, shop)
    if model_path is not None and reference in (None, ADAPTER_OFF) and objective.needs & FROZEN:
        reference = shop.frozen(stage.model)
    args = PreferenceConfig(output_dir=str(folder), seed=shop.recipe.seed, **training_keys(stage))
    model, peft_config = ready_for_teacher(stage, model, peft_config, args)
    return PreferenceTrainer(
        model,
        args,
        objective=objective,
        credit=build_credit(stage, tokenizer, shop),
        credit_as=credit_role(stage),
        reference=reference,
        teacher=build_teacher(stage, model, shop),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def _build_online(shop: Workshop, plan: StagePlan, folder: Path, model_path: str | None, eval_data: str | None) -> Any:
    from tokengrain.run.build import build_online_trainer

    datasets = shop.datasets(plan.stage)
    if eval_data is not None:
        data = plan.stage.data.model_copy(update={"train": eval_data, "eval": None, "eval_fraction": 0.0})
        datasets = datasets[0], shop.datasets(replace(plan.stage, data=data))[0]
    policy = _policy(shop, plan.stage, model_path)
    return build_online_trainer(shop, plan, folder, *policy, datasets, finished=model_path is not None)


def _for_other_rows(objective: Any, stage: ResolvedStage, rows: Any) -> tuple[Any, ResolvedStage]:
    """Objective and stage for rows that it was not made for.

    Credit that comes with the data is not there for other rows: then the objective's base (DPO, SimPO) judges them.
    """
    present = getattr(rows, "columns", ())
    if columns_needed(objective, stage, present) <= set(present):
        return objective, stage
    base, keys = (
        ("dpo", ("beta",)) if "ref_logps" in objective.needs else ("simpo", ("beta", "gamma", "gamma_beta_ratio"))
    )
    hyper = {} if objective.name == "sepo" else {k: objective.hyper[k] for k in keys if k in objective.hyper}
    return make_objective(base, **hyper), replace(stage, credit=None)


def _policy(shop: Workshop, stage: ResolvedStage, model_path: str | None) -> tuple[Any, Any]:
    """`(model, configuration of a new adapter or None)`. An adapter that exists is trained on."""
    import torch

    torch.manual_seed(shop.recipe.seed)
    path = model_path or shop.path(stage.model)
    load = models.load_reward_model if stage.kind == "reward" else models.load_model
    if stage.lora is None or model_path is not None:
        return load(stage.model, path, merge_adapter=stage.lora is None), None
    if models.is_adapter(path) and (stage.kind != "reward" or models.is_reward_adapter(path)):
        _check_same_lora(stage.lora, path)
        return load(stage.model, path, train_adapter=True), None
    model: Any = load(stage.model, path)
    if Path(path).is_dir():  # the adapter names its base; a relative path would hold in this directory only
        model.name_or_path = str(Path(path).resolve())
    make = models.reward_lora_config if stage.kind == "reward" else lora_config
    return model, make(stage.lora)


def lora_config(lora: LoraSpec) -> Any:
    """The recipe's `lora:` as peft's configuration."""
    peft = models.import_peft()
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save,
        use_rslora=lora.use_rslora,
    )


def _check_same_lora(lora: LoraSpec, path: str) -> None:
    saved = read_json(Path(path) / models.ADAPTER)
    for ours, theirs in (("r", "r"), ("alpha", "lora_alpha"), ("use_rslora", "use_rslora")):
        if saved.get(theirs) != getattr(lora, ours):
            raise ModelError(
                f"lora.{ours} is {getattr(lora, ours)}, but the stage goes on with adapter {path}, where it "
                f"is {saved.get(theirs)}; give the same value, or set lora: null to train all weights"
            )


def run_training(shop: Workshop, plan: StagePlan) -> dict[str, Any]:
    """Train, evaluating the held-out rows before and after; resumes from the last checkpoint.

    Raises:
        KeyboardInterrupt: the user stopped it; a checkpoint was saved.
    """
    main = shop.state.is_main_process
    trainer = build_trainer(shop, plan, plan.path)
    checkpoint = last_complete_checkpoint(plan.path)
    metrics_file = plan.path / "metrics.json"
    metrics: dict[str, Any] = read_json(metrics_file) if checkpoint and metrics_file.exists() else {}
    has_eval = trainer.eval_dataset is not None
    if has_eval and "before" not in metrics:
        metrics["before"] = plain_metrics(trainer.evaluate())
        if main:
            write_json(metrics_file, metrics)
    progress = ShowProgress(shop.console, plan.stage.name)
    trainer.add_callback(progress)
    try:
        with StopOnSignal(shop.state.num_processes) as stop:
            trainer.add_callback(stop)
            result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        progress.close()
    if stop.requested and trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt
    metrics["train"] = {"steps": result.global_step, "loss": result.training_loss}
    if has_eval:
        metrics["after"] = plain_metrics(trainer.evaluate())
    if plan.stage.kind == "reward":
        statistics = _score_statistics(trainer)
        metrics["scores"] = {name: value for one in statistics for name, value in one.as_dict().items()}
    trainer.save_model(str(plan.path / "model"))
    if plan.stage.kind == "reward" and main:
        models.save_statistics(plan.path / "model", *statistics)
    if main and "save_total_limit" not in plan.stage.training:  # the finished model is what is wanted
        for path in checkpoints(plan.path):
            remove_folder(path)
        shutil.rmtree(plan.path / STAGING, ignore_errors=True)
    of_policy(shop, plan, trainer)
    return metrics


def _score_statistics(trainer: Any) -> tuple[Any, Any]:
    """Of a trained reward model's scores, of tokens and of completions."""
    model, rows = trainer.evaluation_model(), trainer.train_dataset
    pooling = trainer.objective.hyper["pooling"]
    return models.measure_scores(model, rows), models.measure_completions(model, rows, pooling=pooling)


def plain_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Evaluation metrics without what only says how fast they were measured."""
    hidden = ("_runtime", "_per_second", "epoch")
    return {k.removeprefix("eval_"): v for k, v in metrics.items() if not k.endswith(hidden)}


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
    show.print_plan(console, recipe, wanted)
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
    show.print_result(console, metrics, folder.path)
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
    from tokengrain.method import make_objective

    like = _existing_ancestor(shop, stage).model
    for dataset in shop.datasets(stage, like=like):
        if dataset is not None and stage.kind == "train":
            objective = make_objective(**(stage.objective or {}))
            needed = columns_needed(objective, stage, getattr(dataset, "columns", ()))
            inputs.require_columns(dataset, needed, stage)
    if stage.reference == "columns":
        inputs.require_columns(shop.datasets(stage, like=like)[0], {"ref_logps"}, stage)


def _run_stage(shop: Workshop, plan: StagePlan, folder: RunFolder) -> None:
    shop.console.print(f"[bold]{plan.stage.name}[/]  {show.describe(plan.stage)}")
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
    show.print_stage(shop.console, plan, metrics)
