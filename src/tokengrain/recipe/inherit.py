"""What each stage inherits from the recipe and from the stages before it."""

from __future__ import annotations

from typing import Any

import pydantic
import torch

from tokengrain.recipe.reading import merge
from tokengrain.recipe.schema import AnnotateStage, OnlineStage, Recipe, ResolvedStage, RewardStage, SftStage, Stage
from tokengrain.recipe.specs import DataSpec, LoraSpec, ModelSpec

INIT = "init"

DEFAULTS: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 0.2,
    "save_total_limit": 1,
    "disable_tqdm": True,
}
"""Where a recipe does not say otherwise: five checkpoints a stage, the last one kept; our own progress."""


class StageDataError(Exception):
    """A stage's `data:` that does not fit; `error` names keys below `stages.<stage>.data`."""

    def __init__(self, stage: str, error: pydantic.ValidationError) -> None:
        super().__init__(f"stages.{stage}.data: {error}")
        self.stage, self.error = stage, error


def resolve_stages(recipe: Recipe) -> list[ResolvedStage]:
    """The stages in order, each with everything it inherits; `init` first if the model is built from scratch.

    A stage starts from its own `model`, else from the last sft stage before it, else from the recipe's model.
    `data` and `training` of a stage are laid over the recipe's, key by key.
    """
    out: list[ResolvedStage] = []
    model = recipe.model
    if model.config is not None:
        out.append(ResolvedStage(INIT, "init", model, recipe.data))
        model = model.at("@" + INIT)
    for name, stage in recipe.stages.items():
        out.append(_resolve(name, stage, recipe, stage.model or model))
        if isinstance(stage, SftStage):
            model = model.at("@" + name)
    return out


def training_keys(stage: ResolvedStage) -> dict[str, Any]:
    """Keys for `PreferenceConfig`: the stage's over our defaults; `use_cpu` without an accelerator."""
    return {**DEFAULTS, "use_cpu": not torch.accelerator.is_available(), **stage.training}


def _resolve(name: str, stage: Stage, recipe: Recipe, model: ModelSpec) -> ResolvedStage:
    try:
        data = _data(recipe.data, stage.data)
    except pydantic.ValidationError as error:
        raise StageDataError(name, error) from None
    if isinstance(stage, AnnotateStage):
        options = {
            "reference_logps": stage.reference_logps,
            "shard_rows": stage.shard_rows,
            "max_tokens": stage.max_tokens,
            "bf16": bool(recipe.training.get("bf16", False)),
        }
        return ResolvedStage(name, "annotate", model, data, credit=stage.credit, options=options)
    training = {**recipe.training, **stage.training}
    lora = _lora(recipe.lora, stage)
    if isinstance(stage, SftStage):
        return ResolvedStage(name, "sft", model, data, lora, training, objective={"name": "sft"})
    if isinstance(stage, RewardStage):
        return ResolvedStage(name, "reward", model, data, lora, training, stage.objective)
    if isinstance(stage, OnlineStage):
        return ResolvedStage(
            name,
            "online",
            model,
            data,
            lora,
            training,
            stage.objective,
            reference=stage.reference,
            teacher=stage.teacher,
            online=stage,
        )
    return ResolvedStage(
        name, "train", model, data, lora, training, stage.objective, stage.credit, stage.reference, stage.teacher
    )


def _data(base: DataSpec, over: dict[str, Any] | str | None) -> DataSpec:
    if over is None:
        return base
    values = base.model_dump(exclude_unset=True)
    if isinstance(over, str):
        over = {"train": over}
    if "train" in over:  # another source has its own held-out rows
        values = {k: v for k, v in values.items() if k not in ("eval", "split", "eval_split", "limit")}
    return DataSpec.model_validate(merge(values, over))


def _lora(base: LoraSpec | None, stage: Stage) -> LoraSpec | None:
    own = getattr(stage, "lora", None)
    if "lora" not in stage.model_fields_set:
        return base
    if own is None or base is None:
        return own
    return base.model_copy(update=own.model_dump(exclude_unset=True))
