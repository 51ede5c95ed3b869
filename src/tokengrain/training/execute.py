"""Carrying out one stage: build a model, train, or annotate."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokengrain.errors import ModelError
from tokengrain.files import read_json, write_json
from tokengrain.objectives import make_objective
from tokengrain.recipe import LoraSpec, ResolvedStage
from tokengrain.recipe.inherit import training_keys
from tokengrain.training import annotation, inputs, models, reward_models, samples, scratch
from tokengrain.training.checkpoints import (
    STAGING,
    checkpoints,
    last_complete_checkpoint,
    publish,
    remove_folder,
    saving,
)
from tokengrain.training.credit import FROZEN, columns_needed
from tokengrain.training.interrupt import StopOnSignal
from tokengrain.training.plan import StagePlan
from tokengrain.training.progress import ShowProgress
from tokengrain.training.sources import build_credit, build_reference, build_teacher, credit_role, ready_for_teacher
from tokengrain.training.workshop import Workshop

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
            scratch.build(plan.stage.model, train, shop.recipe.seed, staged)
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
    from tokengrain.training import PreferenceConfig, PreferenceTrainer
    from tokengrain.training.reference import ADAPTER_OFF

    stage = plan.stage
    if stage.kind == "online":
        return _build_online(shop, plan, folder, model_path, eval_data)
    objective = make_objective(**(stage.objective or {}))
    train, held_out = shop.datasets(stage) if stage.data.stage is None else annotation.annotated(shop, plan)
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
    from tokengrain.training.online_stage import build_online_trainer

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
    load = reward_models.load_reward_model if stage.kind == "reward" else models.load_model
    if stage.lora is None or model_path is not None:
        return load(stage.model, path, merge_adapter=stage.lora is None), None
    if models.is_adapter(path) and (stage.kind != "reward" or reward_models.is_reward_adapter(path)):
        _check_same_lora(stage.lora, path)
        return load(stage.model, path, train_adapter=True), None
    model: Any = load(stage.model, path)
    if Path(path).is_dir():  # the adapter names its base; a relative path would hold in this directory only
        model.name_or_path = str(Path(path).resolve())
    make = reward_models.reward_lora_config if stage.kind == "reward" else lora_config
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
        reward_models.save_statistics(plan.path / "model", *statistics)
    if main and "save_total_limit" not in plan.stage.training:  # the finished model is what is wanted
        for path in checkpoints(plan.path):
            remove_folder(path)
        shutil.rmtree(plan.path / STAGING, ignore_errors=True)
    samples.of_policy(shop, plan, trainer)
    return metrics


def _score_statistics(trainer: Any) -> tuple[Any, Any]:
    """Of a trained reward model's scores, of tokens and of completions."""
    model, rows = trainer.evaluation_model(), trainer.train_dataset
    pooling = trainer.objective.hyper["pooling"]
    return reward_models.measure_scores(model, rows), reward_models.measure_completions(model, rows, pooling=pooling)


def plain_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Evaluation metrics without what only says how fast they were measured."""
    hidden = ("_runtime", "_per_second", "epoch")
    return {k.removeprefix("eval_"): v for k, v in metrics.items() if not k.endswith(hidden)}
