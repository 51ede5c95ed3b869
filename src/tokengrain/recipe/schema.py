"""The stages of a recipe, the recipe, and a stage with everything it inherits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
import torch
from pydantic import Field, field_validator

from tokengrain.errors import RecipeError
from tokengrain.recipe.reading import merge
from tokengrain.specs import DataSpec, LoraSpec, ModelSpec, PromptSpec, Strict, TeacherSpec

if TYPE_CHECKING:
    pass

CREDIT_MODELS = ("model", "reference", "reverse")
"""Keys of a `credit:` that are models."""

NAME = r"^[A-Za-z][A-Za-z0-9_-]*$"


class _Stage(Strict):
    model: ModelSpec | None = Field(
        default=None,
        description="what to start from; default: the last `sft` stage before it, else the recipe's model",
    )
    data: dict[str, Any] | str | None = Field(default=None, description="keys on top of the recipe's data, or a source")


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class SftStage(_Stage):
    """Supervised fine-tuning on the chosen completions (or on `prompt` and `completion`)."""

    kind: Literal["sft"]
    lora: LoraSpec | None = Field(default=None, description="on top of the recipe's lora; null: none in this stage")
    training: dict[str, Any] = Field(default_factory=dict, description="keys on top of the recipe's training")


class TrainStage(_Stage):
    """Training on preference pairs with an objective."""

    kind: Literal["train"]
    objective: dict[str, Any] = Field(description="{name: dpo, beta: 0.1, ...}; `tokengrain methods` lists them")
    credit: dict[str, Any] | None = Field(
        default=None,
        description="{name: guide, model: ..., as: selection}: token credit made while training; default: from the "
        "data. `as` says how it enters: reward, weight, selection or span, or {name: selection, share: 0.3}",
    )
    teacher: TeacherSpec | None = Field(default=None, description="{target: '@normal', contrast: '@reverse', ...}")
    reference: str | None = Field(
        default=None,
        description="copy | adapter_off | columns | a model; default: stored ref_logps where the data have them and "
        "they suffice, else adapter_off with lora, else a frozen copy of the starting weights",
    )
    lora: LoraSpec | None = Field(default=None, description="on top of the recipe's lora; null: none in this stage")
    training: dict[str, Any] = Field(default_factory=dict, description="keys on top of the recipe's training")

    _from_name = field_validator("objective", "credit", mode="before")(_named)


class RewardStage(_Stage):
    """Training a token-level reward model (a token classifier with one label) on preference pairs."""

    kind: Literal["reward"]
    objective: dict[str, Any] = Field(
        default_factory=lambda: {"name": "qrm"}, description="{name: qrm, beta: 0.2, gamma: 2.0}"
    )
    lora: LoraSpec | None = Field(default=None, description="on top of the recipe's lora; null: none in this stage")
    training: dict[str, Any] = Field(default_factory=dict, description="keys on top of the recipe's training")

    _from_name = field_validator("objective", mode="before")(_named)


def _steps(value: Any) -> Any:
    """One step or a list of them; a name is short for `{name: ...}`."""
    value = [value] if isinstance(value, (str, dict)) else value
    return [_named(one) for one in value] if isinstance(value, list) else value


class OnlineStage(_Stage):
    """Training on completions that the policy samples itself, scored by reward functions."""

    kind: Literal["online"]
    objective: dict[str, Any] = Field(
        default_factory=lambda: {"name": "grpo"}, description="{name: grpo | gspo | dcpo | ppo | reinforce, ...}"
    )
    rewards: list[dict[str, Any]] = Field(
        default_factory=list,
        description="[{name: math, weight: 1.0}, ...]: names, import strings, or `world` for the world's own; "
        "{name: reward_model, model: '@reward', scaling: zscore}",
    )
    credit: list[dict[str, Any]] = Field(
        default_factory=list, description="[{name: group}, {name: thr, p: 0.5}, ...]: from rewards to token advantages"
    )
    sampler: dict[str, Any] = Field(
        default_factory=lambda: {"name": "hf"},
        description="what draws completions: hf | continuous | {name: server, url: ..., model: ..., refresh: "
        "checkpoint | adapter} | {name: branching, sampler: hf, window: 4, ...}",
    )
    critic: dict[str, Any] | None = Field(
        default=None, description="{model: '@reward', lr: 1e-5}: a value model; default: starts from the policy"
    )
    teacher: TeacherSpec | None = Field(default=None, description="for aligndistil: {target: '@normal', contrast: ...}")
    prompts: PromptSpec = Field(default_factory=PromptSpec, description="{column: prompt, template: null, chat: false}")
    reference: str | None = Field(default=None, description="copy | adapter_off | a model; default: as for `train`")
    lora: LoraSpec | None = Field(default=None, description="on top of the recipe's lora; null: none in this stage")
    training: dict[str, Any] = Field(
        default_factory=dict, description="keys on top of the recipe's training (OnlineConfig)"
    )

    _from_name = field_validator("objective", "sampler", mode="before")(_named)
    _from_names = field_validator("rewards", "credit", mode="before")(_steps)


class AnnotateStage(_Stage):
    """Run a credit source over the data once and store one number per completion token."""

    kind: Literal["annotate"]
    credit: dict[str, Any] = Field(description="{name: guide, model: '@guide', beta: 0.1} and the like")
    reference_logps: bool = Field(default=True, description="store the starting model's log-probabilities as well")
    shard_rows: int = Field(default=512, gt=0, description="rows per shard: what a kill can lose")
    max_tokens: int | None = Field(default=None, gt=0, description="token budget of one forward pass")

    _from_name = field_validator("credit", mode="before")(_named)


Stage = Annotated[SftStage | TrainStage | RewardStage | OnlineStage | AnnotateStage, Field(discriminator="kind")]


class Recipe(Strict):
    """A validated recipe. `load_recipe` reads one; `tokengrain.training.stages.run_recipe` runs it."""

    method: Annotated[str, Field(description="name of the method, for tables and reports")]
    model: ModelSpec = Field(description="what to train")
    data: DataSpec = Field(description="preference pairs")
    output_dir: str = Field(description="the run folder")
    seed: int = Field(default=0, ge=0, description="order of the rows, held-out rows, dropout, new weights")
    lora: LoraSpec | None = Field(default=None, description="train LoRA adapters instead of all weights")
    training: dict[str, Any] = Field(
        default_factory=dict,
        description="PreferenceConfig (all of transformers' TrainingArguments), for all stages",
    )
    stages: dict[Annotated[str, Field(pattern=NAME)], Stage] = Field(min_length=1, description="run in this order")


def online_models(stage: OnlineStage) -> dict[str, ModelSpec]:
    """The models that an online stage's rewards, credit steps and critic name, by their key in the recipe."""
    from tokengrain.rewards.builtin import reward_objects

    found = {}
    for index, reward in enumerate(stage.rewards):
        if "model" in reward_objects(str(reward.get("name"))) and reward.get("model") is not None:
            found[f"rewards[{index}].model"] = ModelSpec.model_validate(reward["model"])
    for index, step in enumerate(stage.credit):
        source = step.get("source")
        places = {f"credit[{index}]": step, f"credit[{index}].source": source if isinstance(source, dict) else {}}
        for where, given in places.items():
            for name in CREDIT_MODELS:
                if given.get(name) is not None:
                    found[f"{where}.{name}"] = ModelSpec.model_validate(given[name])
    if (critic := (stage.critic or {}).get("model")) is not None:
        found["critic.model"] = ModelSpec.model_validate(critic)
    return found


@dataclass(frozen=True)
class ResolvedStage:
    """A stage with everything it inherits.

    Attributes:
        name: its name, and its folder's.
        kind: "init" (a model built from scratch), "sft", "train", "reward", "online" or "annotate".
        model: what it starts from (annotate: the model whose log-probabilities are stored).
        data: its rows and how they become tokens.
        lora: adapters, if any.
        training: keys of `PreferenceConfig`.
        objective: name and hyper-parameters ("sft" for an sft stage).
        credit: name and settings of the credit source, if any.
        reference: see `TrainStage.reference`.
        teacher: what is distilled, if anything.
        online: the stage itself, if it is an online one: rewards, credit steps, sampler, critic, prompts.
        options: what only this kind has (annotate: `reference_logps`, `shard_rows`, `max_tokens`, `bf16`).
    """

    name: str
    kind: Literal["init", "sft", "train", "reward", "online", "annotate"]
    model: ModelSpec
    data: DataSpec
    lora: LoraSpec | None = None
    training: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] | None = None
    credit: dict[str, Any] | None = None
    reference: str | None = None
    teacher: TeacherSpec | None = None
    online: OnlineStage | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def credit_models(self) -> dict[str, ModelSpec]:
        """The models that the credit source names, by what they are to it: "model", "reference", "reverse"."""
        given = self.credit or {}
        return {name: ModelSpec.model_validate(given[name]) for name in CREDIT_MODELS if given.get(name) is not None}

    @property
    def models(self) -> dict[str, ModelSpec]:
        """Every other model that the stage asks, by its key in the recipe."""
        found = {f"credit.{name}": spec for name, spec in self.credit_models.items()}
        found |= online_models(self.online) if self.online is not None else {}
        if self.reference_model is not None:
            found["reference"] = self.reference_model
        if self.teacher is not None:
            found["teacher.target"] = self.teacher.target
            if self.teacher.contrast is not None:
                found["teacher.contrast"] = self.teacher.contrast
        return found

    @property
    def reference_model(self) -> ModelSpec | None:
        """The reference, if it is a model of its own."""
        if self.reference in (None, "copy", "adapter_off", "columns"):
            return None
        return ModelSpec.model_validate(self.reference)

    @property
    def inputs(self) -> list[str]:
        """Earlier stages that this one uses."""
        names = [m.stage for m in (self.model, *self.models.values()) if m.stage is not None]
        return list(dict.fromkeys([*names, *([self.data.stage] if self.data.stage else [])]))


# ----------------------------------------------------------------------------------------------------
# What each stage inherits from the recipe and from the stages before it.

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


ROLE = "as"


def credit_settings(credit: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """`(name, settings without its models and its role)` of a recipe's `credit:`.

    Credit of which only the role is given is the data's own column.

    Raises:
        RecipeError: no name.
    """
    settings = {k: v for k, v in credit.items() if k not in ("name", ROLE, *CREDIT_MODELS)}
    name = credit.get("name", "column" if ROLE in credit else None)
    if not isinstance(name, str):
        raise RecipeError("name is missing; expected for example `name: guide`")
    return name, settings


def credit_role(stage: ResolvedStage) -> Any:
    """How the stage's credit enters its objective, as the recipe says it; None: it does not say."""
    return (stage.credit or {}).get(ROLE)


def reads_reward_model(stage: ResolvedStage) -> bool:
    """Whether the stage's credit comes from a token-level reward model."""
    from tokengrain.method import CREDIT

    name = str((stage.credit or {}).get("name"))
    return (name in CREDIT or ":" in name) and CREDIT.find(name).reward_model  # an unknown name is said elsewhere


def is_reward_model(stage: ResolvedStage, role: str) -> bool:
    """Whether the model in this place of the stage judges completions, and so may have a tokenizer of its own.

    Args:
        role: key of `stage.models`, such as "credit.model", "rewards[0].model" or "credit[1].source.model".
    """
    from tokengrain.method import CREDIT

    if role.startswith("credit."):
        return reads_reward_model(stage)
    step, _, rest = role.removeprefix("credit[").partition("].")
    if stage.online is not None and role.startswith("credit[") and rest.startswith("source."):
        return CREDIT.find(stage.online.credit[int(step)]["source"]["name"]).reward_model
    return role.startswith("rewards[")
