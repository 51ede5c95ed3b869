"""What a recipe may say: the settings of every kind of stage, and of the whole."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from tokengrain.recipe.reading import merge
from tokengrain.runs import NAME
from tokengrain.settings import write_yaml
from tokengrain.specs import DataSpec, LoraSpec, ModelSpec, PromptSpec, Strict, TeacherSpec

INIT = "init"
"""Name of the stage that builds a model from scratch."""


def _named(value: Any) -> Any:
    """A name is short for `{name: ...}`."""
    return {"name": value} if isinstance(value, str) else value


def _listed(value: Any) -> Any:
    """One entry or a list of them."""
    value = [value] if isinstance(value, (str, dict)) else value
    return [_named(one) for one in value] if isinstance(value, list) else value


class StageSettings(Strict):
    """Keys of every stage."""

    model: ModelSpec | None = Field(
        default=None, description="what to start from; default: the last `sft` stage before it, else the recipe's model"
    )
    data: dict[str, Any] | str | None = Field(default=None, description="keys on top of the recipe's data, or a source")


class TrainedSettings(StageSettings):
    """Keys of every stage that trains."""

    lora: LoraSpec | None = Field(default=None, description="on top of the recipe's lora; null: none in this stage")
    training: dict[str, Any] = Field(
        default_factory=dict, description="keys on top of the recipe's training (online: OnlineConfig)"
    )


class SftStage(TrainedSettings):
    """Supervised fine-tuning on the chosen completions (or on `prompt` and `completion`)."""

    kind: Literal["sft"]


class TrainStage(TrainedSettings):
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

    _from_name = field_validator("objective", "credit", mode="before")(_named)


class RewardStage(TrainedSettings):
    """Training a token-level reward model (a token classifier with one label) on preference pairs."""

    kind: Literal["reward"]
    objective: dict[str, Any] = Field(
        default_factory=lambda: {"name": "qrm"}, description="{name: qrm, beta: 0.2, gamma: 2.0}"
    )

    _from_name = field_validator("objective", mode="before")(_named)


class OnlineStage(TrainedSettings):
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

    _from_name = field_validator("objective", "sampler", mode="before")(_named)
    _from_names = field_validator("rewards", "credit", mode="before")(_listed)


class AnnotateStage(StageSettings):
    """Run a credit source over the data once and store one number per completion token."""

    kind: Literal["annotate"]
    credit: dict[str, Any] = Field(description="{name: guide, model: '@guide', beta: 0.1} and the like")
    reference_logps: bool = Field(default=True, description="store the starting model's log-probabilities as well")
    shard_rows: int = Field(default=512, gt=0, description="rows per shard: what a kill can lose")
    max_tokens: int | None = Field(default=None, gt=0, description="token budget of one forward pass")

    _from_name = field_validator("credit", mode="before")(_named)


Stage = Annotated[SftStage | TrainStage | RewardStage | OnlineStage | AnnotateStage, Field(discriminator="kind")]


class Recipe(Strict):
    """A validated recipe. `load_recipe` reads one; `run_recipe` runs it."""

    method: Annotated[str, Field(description="name of the method, for tables and reports")]
    model: ModelSpec = Field(description="what to train")
    data: DataSpec = Field(description="preference pairs")
    output_dir: str = Field(description="the run folder")
    seed: int = Field(default=0, ge=0, lt=2**32, description="order of the rows, held-out rows, dropout, new weights")
    lora: LoraSpec | None = Field(default=None, description="train LoRA adapters instead of all weights")
    training: dict[str, Any] = Field(
        default_factory=dict, description="PreferenceConfig (all of transformers' TrainingArguments), for all stages"
    )
    stages: dict[Annotated[str, Field(pattern=NAME)], Stage] = Field(min_length=1, description="run in this order")


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that loads to the same recipe: merged, with nothing left to other files."""
    return write_yaml({**recipe.model_dump(mode="json", exclude_unset=True), "seed": recipe.seed})


def stage_data(base: DataSpec, over: dict[str, Any] | str | None) -> DataSpec:
    """A stage's `data:` laid over the recipe's; another source has its own held-out rows."""
    if over is None:
        return base
    over = {"train": over} if isinstance(over, str) else over
    values = base.model_dump(exclude_unset=True)
    if "train" in over:
        values = {k: v for k, v in values.items() if k not in ("eval", "split", "eval_split", "limit")}
    return DataSpec.model_validate(merge(values, over))


def stage_lora(base: LoraSpec | None, own: TrainedSettings) -> LoraSpec | None:
    """A stage's `lora:` laid over the recipe's."""
    if "lora" not in own.model_fields_set:
        return base
    if own.lora is None or base is None:
        return own.lora
    return base.model_copy(update=own.lora.model_dump(exclude_unset=True))
