"""What a run will do: each stage's fingerprint, and whether it runs, resumes or is reused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokengrain.data.tokens import template_text
from tokengrain.errors import RunError, fingerprint, shown
from tokengrain.method import CREDIT
from tokengrain.models import locate, model_fingerprint
from tokengrain.recipe.schema import (
    ROLE,
    Recipe,
    ResolvedStage,
    credit_role,
    credit_settings,
    online_models,
    resolve_stages,
)
from tokengrain.rollout.sampler import check_sampler, deciding
from tokengrain.run.inputs import data_fingerprint, tokenize_config
from tokengrain.runs import FORMAT, StageRecord, is_run, read_run, read_stage
from tokengrain.settings import load_callable, source_of
from tokengrain.specs import ModelSpec
from tokengrain.worlds import load_world

Action = Literal["run", "resume", "reuse"]

NEUTRAL = frozenset(
    [
        "logging_dir",
        "logging_strategy",
        "logging_steps",
        "logging_first_step",
        "log_level",
        "log_level_replica",
        "report_to",
        "run_name",
        "disable_tqdm",
        "project",
        "trackio_space_id",
        "eval_strategy",
        "eval_steps",
        "eval_delay",
        "eval_on_start",
        "per_device_eval_batch_size",
        "eval_accumulation_steps",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "max_tokens_per_microbatch",
        "chunk_tokens",
        "log_entropy",
        "rollout_samples",
        "rollout_samples_every",
        "eval_generations",
        "eval_temperature",
        "use_cpu",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "dataloader_persistent_workers",
    ]
)
"""Keys of `training:` that do not change what is learned; they are not part of a stage's fingerprint."""

CHOOSING = frozenset(
    ["eval_strategy", "eval_steps", "eval_delay", "save_strategy", "save_steps", "eval_generations", "eval_temperature"]
)
"""Of these, those that do where evaluation decides which weights are kept, or the learning rate."""


@dataclass
class StagePlan:
    """A stage and what will be done about it.

    Attributes:
        stage: the stage with everything it inherits.
        path: its folder.
        settings: what decides its result: settings, and fingerprints of its inputs.
        record: what is on disk, if it was started before with the same settings.
        action: "run" from the start, "resume" from what is there, or "reuse" the finished result.
    """

    stage: ResolvedStage
    path: Path
    settings: dict[str, Any]
    record: StageRecord | None = None
    action: Action = "run"

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.settings)


def make_plan(recipe: Recipe, *, overwrite: bool = False) -> list[StagePlan]:
    """Decide for every stage whether it runs, resumes or is reused. Reads, and changes nothing.

    Args:
        overwrite: results of other settings in the run folder are to be replaced.

    Raises:
        RunError: the run folder holds something else, and `overwrite` is False; says what differs.
    """
    run_dir = Path(recipe.output_dir)
    plans: list[StagePlan] = []
    for stage in resolve_stages(recipe):
        above = {plan.stage.name: plan.fingerprint for plan in plans}
        settings = stage_settings(stage, recipe.seed, run_dir, above)
        plans.append(StagePlan(stage, run_dir / stage.name, settings))
    check_folder(recipe, plans, overwrite)
    for plan in plans:
        record = read_stage(plan.path)
        if record is not None and record.fingerprint == plan.fingerprint:
            plan.record = record
            plan.action = "reuse" if record.status == "done" else "resume"
    return plans


def stage_settings(stage: ResolvedStage, seed: int, run_dir: Path, above: dict[str, str]) -> dict[str, Any]:
    """Everything that decides a stage's result, as JSON-like values.

    Args:
        above: fingerprints of the stages before it.
    """
    settings: dict[str, Any] = {
        "format": FORMAT,
        "kind": stage.kind,
        "seed": seed,
        "model": _model_settings(stage.model, run_dir, above),
        "data": _data_settings(stage, seed, above),
    }
    if stage.kind == "init":
        return settings
    if stage.kind == "annotate":
        return {**settings, "credit": _credit_settings(stage, run_dir, above), **stage.options}
    reference = stage.reference_model
    teacher = {"teacher": _teacher_settings(stage, run_dir, above)} if stage.teacher is not None else {}
    return {
        **settings,
        "objective": _objective_settings(stage),
        "credit": _credit_settings(stage, run_dir, above),
        "reference": _model_settings(reference, run_dir, above) if reference else stage.reference,
        "lora": stage.lora.model_dump() if stage.lora else None,
        "training": _deciding(stage.training),
        **teacher,
        **(_online_settings(stage, run_dir, above) if stage.online is not None else {}),
    }


def _deciding(training: dict[str, Any]) -> dict[str, Any]:
    """The keys of `training:` that change what is learned."""
    chosen = training.get("load_best_model_at_end") or training.get("lr_scheduler_type") == "reduce_lr_on_plateau"
    neutral = NEUTRAL - CHOOSING if chosen else NEUTRAL
    return {key: value for key, value in training.items() if key not in neutral}


def _online_settings(stage: ResolvedStage, run_dir: Path, above: dict[str, str]) -> dict[str, Any]:
    assert stage.online is not None
    asked = {key: _model_settings(spec, run_dir, above) for key, spec in online_models(stage.online).items()}
    values = stage.online.model_dump(include={"rewards", "credit", "critic", "prompts"})
    values["sampler"] = deciding(check_sampler(stage.online.sampler))
    given = (*stage.online.rewards, *stage.online.credit, stage.online.sampler)
    named = [one["name"] for one in given if ":" in one.get("name", "")]
    sources = {name: fingerprint(source_of(load_callable(name))) for name in named}  # another body is another reward
    return {"online": values, "asked": asked, "functions": sources}


def _teacher_settings(stage: ResolvedStage, run_dir: Path, above: dict[str, str]) -> dict[str, Any]:
    assert stage.teacher is not None
    values = stage.teacher.model_dump(exclude={"target", "contrast"})
    for name in ("target", "contrast"):
        spec = getattr(stage.teacher, name)
        values[name] = _model_settings(spec, run_dir, above) if spec is not None else None
    return values


def _model_settings(spec: ModelSpec, run_dir: Path, above: dict[str, str]) -> dict[str, Any]:
    values = spec.model_dump(exclude={"path"}, exclude_none=True)
    if spec.stage is not None:
        return {**values, "content": above[spec.stage]}
    if spec.is_world:  # its base model need not be there yet
        return {**values, "content": load_world(str(spec.path)).fingerprint}
    if spec.path is not None:
        return {**values, "content": model_fingerprint(locate(spec, run_dir))}
    if isinstance(spec.tokenizer, str):
        values["tokenizer"] = model_fingerprint(spec.tokenizer)
    return values


def _data_settings(stage: ResolvedStage, seed: int, above: dict[str, str]) -> dict[str, Any]:
    given = stage.data.tokenize.get("chat_template")
    text = template_text(given)
    template = {"template": fingerprint(text)} if text != given else {}  # of a file: what is in it
    if stage.data.stage is not None:
        return {"content": above[stage.data.stage], "tokenize": stage.data.tokenize, **template}
    options = stage.data.model_dump(exclude={"train", "eval"}, exclude_none=True)
    spans = tokenize_config(stage.data).span_config
    # A function of the user's counts with its source: another body marks other spans.
    marked = {"spans": spans.describe()} if spans is not None else {}
    return {**options, **marked, **template, "content": data_fingerprint(stage.data)}


def _objective_settings(stage: ResolvedStage) -> dict[str, Any]:
    from tokengrain.method import make_objective

    return make_objective(**(stage.objective or {})).describe()


def _credit_settings(stage: ResolvedStage, run_dir: Path, above: dict[str, str]) -> dict[str, Any] | None:
    if stage.credit is None:
        return None
    content = {k: _model_settings(model, run_dir, above) for k, model in stage.credit_models.items()}
    name, settings = credit_settings(stage.credit)
    role = {ROLE: credit_role(stage)} if credit_role(stage) is not None else {}
    return {**CREDIT.find(name).describe(settings), **content, **role}


# ----------------------------------------------------------------------------------------- the folder's owner


def check_folder(recipe: Recipe, plans: list[StagePlan], overwrite: bool) -> None:
    """The run folder must be new, or hold this run.

    Raises:
        RunError: naming what is there and what differs. A folder that is no run is never overwritten.
    """
    run_dir = Path(recipe.output_dir)
    if not run_dir.exists():
        return
    if not run_dir.is_dir():
        raise RunError(f"output_dir {run_dir} is a file; choose a folder that does not exist yet")
    if not is_run(run_dir):
        if any(run_dir.iterdir()):
            read_error = "is not empty and not a run of tokengrain (no run.json)"
            raise RunError(f"output_dir {run_dir} {read_error}; choose another with --output")
        return
    if overwrite:
        return
    run = read_run(run_dir)
    advice = "choose another folder with --output, or replace what differs with --overwrite"
    if run.method != recipe.method:
        raise RunError(f"{run_dir} holds a run of method {run.method}, this is {recipe.method}; {advice}")
    by_name = {plan.stage.name: plan for plan in plans}
    for record in run.stages:
        if record.name not in by_name:
            raise RunError(
                f"{run_dir} holds another run: it has a stage {record.name!r}, this recipe has none; {advice}"
            )
        plan = by_name[record.name]
        if record.fingerprint != plan.fingerprint:
            found = (
                "; ".join(differences(record.settings, plan.settings)[:3]) or "made by another version of tokengrain"
            )
            raise RunError(f"{run_dir} holds another run: stage {record.name!r} differs: {found}; {advice}")


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """What differs between two stages' settings, as `key: old there, new here`."""
    if isinstance(old, dict) and isinstance(new, dict):
        out = []
        for key in [*old, *(k for k in new if k not in old)]:
            out += differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return out
    if old == new:
        return []
    if path.endswith("content"):
        return [f"{path.rpartition('.')[0]}: other content than there"]
    return [f"{path}: {shown(old)} there, {shown(new)} here"]
