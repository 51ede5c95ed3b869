"""The keys of a recipe, with their types and meanings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tokengrain.recipe.reading import WORLD

CREDIT_MODELS = ("model", "reference", "reverse")
"""Keys of a `credit:` that are models."""

NAME = r"^[A-Za-z][A-Za-z0-9_-]*$"


class Strict(BaseModel):
    """Unknown keys are errors; a number is not taken for a string, nor a string for a number."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class TokenizerSpec(Strict):
    """A tokenizer that is made for the run (`model.tokenizer` of a model built from scratch)."""

    type: Literal["bpe", "byte"] = Field(
        default="bpe", description="byte-level BPE trained on the data, or plain bytes"
    )
    vocab_size: int = Field(default=4096, ge=259, description="tokens of the BPE; a byte tokenizer has 258")


class ModelSpec(Strict):
    """The model a run starts from: one that exists (`path`), or one built from scratch (`config`)."""

    path: str | None = Field(default=None, description="folder, hub name, world://NAME, or @stage (an earlier stage)")
    config: dict[str, Any] | None = Field(
        default=None,
        description="build from scratch: `model_type` and the fields of that architecture's config",
    )
    tokenizer: TokenizerSpec | str | None = Field(
        default=None, description="with `config`: {type: bpe|byte, vocab_size}, or the path of a tokenizer"
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        default="float32", description="type of the weights"
    )
    attn_implementation: str | None = Field(default=None, description="eager, sdpa, flash_attention_2, ...")
    trust_remote_code: bool = Field(
        default=False, description="run the Python code that a model on the hub brings along"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_kind(self) -> ModelSpec:
        if (self.path is None) == (self.config is None):
            got = "both" if self.path is not None else "neither"
            raise ValueError(f"got {got} of path and config; expected exactly one of them")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config has no model_type; expected for example model_type: llama")
        if self.config is None and self.tokenizer is not None:
            raise ValueError("tokenizer goes with config (a model built from scratch); a model at a path has its own")
        return self

    @property
    def stage(self) -> str | None:
        """The stage that the model comes from, if it comes from one."""
        return self.path[1:] if self.path is not None and self.path.startswith("@") else None

    @property
    def is_world(self) -> bool:
        return self.path is not None and self.path.startswith(WORLD)

    def at(self, path: str) -> ModelSpec:
        """The same loading options for another path."""
        return self.model_copy(update={"path": path, "config": None, "tokenizer": None})

    def describe(self) -> str:
        return self.path if self.path is not None else f"new {(self.config or {}).get('model_type')} model"


class DataSpec(Strict):
    """Where rows come from; the other keys of `data:` say how they become tokens (`TokenizeConfig`)."""

    model_config = ConfigDict(extra="allow", strict=True)

    train: str = Field(description="file (.json .jsonl .csv .parquet, also .gz), hub name, world://NAME, or @stage")
    eval: str | None = Field(
        default=None, description="held-out rows; without it `eval_fraction` of the rows are held out"
    )
    split: str | None = Field(default=None, description="split of a hub data set, for train")
    eval_split: str | None = Field(default=None, description="split of a hub data set, for eval")
    eval_fraction: float = Field(
        default=0.1, ge=0, lt=1, description="share of the rows held out when eval is not given"
    )
    limit: int | None = Field(
        default=None, gt=0, description="use only this many rows, the first ones (before holding out)"
    )
    streaming: bool = Field(default=False, description="read the rows while training: for sets larger than memory")
    swap_pairs: bool = Field(default=False, description="exchange chosen and rejected: for a reverse DPO model")
    completions: Literal["chosen", "both"] = Field(
        default="chosen", description="of pairs, what an objective on single completions (aligndistil) learns from"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"train": value} if isinstance(value, str) else value

    @property
    def stage(self) -> str | None:
        return self.train[1:] if self.train.startswith("@") else None

    @property
    def tokenize(self) -> dict[str, Any]:
        """The keys that belong to `TokenizeConfig`."""
        return dict(self.model_extra or {})


class LoraSpec(Strict):
    """LoRA adapters (peft): only they are trained; the reference is the model with them switched off."""

    r: int = Field(default=16, gt=0, description="rank")
    alpha: int = Field(default=32, gt=0, description="scale: the update is multiplied by alpha / r")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: str | list[str] | None = Field(default="all-linear", description="which modules get an adapter")
    modules_to_save: list[str] | None = Field(default=None, description="modules trained in full and saved beside it")
    use_rslora: bool = Field(default=False, description="divide alpha by the square root of r instead of r")


class TeacherSpec(Strict):
    """Two frozen models that an objective distils from: z* = z_target + s (z_target - z_contrast)."""

    target: ModelSpec = Field(description="the model to go beyond: '@normal' or a path")
    contrast: ModelSpec | None = Field(
        default=None, description="the model to go away from: '@reverse', a path, or the starting model"
    )
    form: Literal["adaptive", "constant", "theorem1", "interpolation", "distil"] = Field(
        default="adaptive", description="how strong the extrapolation is; the paper's is adaptive"
    )
    r: float = Field(default=20.0, ge=0, description="adaptive: strength at total variation 1")
    epsilon: float = Field(default=1e-3, gt=0, description="adaptive: strength where the models agree")
    beta: float | None = Field(default=None, gt=0, description="constant, theorem1: strength is beta0 / beta")
    temperature: float = Field(default=1.0, gt=0, description="divides the logits of policy and teacher")

    @model_validator(mode="before")
    @classmethod
    def _without_numbers_as_ints(cls, value: Any) -> Any:
        keys = ("r", "epsilon", "beta", "temperature")
        whole = {k: float(value[k]) for k in keys if isinstance(value, dict) and type(value.get(k)) is int}
        return {**value, **whole} if whole else value


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
        description="copy | adapter_off | columns | a model; default: adapter_off with lora, else stored "
        "ref_logps where the data have them and they suffice, else a frozen copy of the starting weights",
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


class AnnotateStage(_Stage):
    """Run a credit source over the data once and store one number per completion token."""

    kind: Literal["annotate"]
    credit: dict[str, Any] = Field(description="{name: guide, model: '@guide', beta: 0.1} and the like")
    reference_logps: bool = Field(default=True, description="store the starting model's log-probabilities as well")
    shard_rows: int = Field(default=512, gt=0, description="rows per shard: what a kill can lose")
    max_tokens: int | None = Field(default=None, gt=0, description="token budget of one forward pass")

    _from_name = field_validator("credit", mode="before")(_named)


Stage = Annotated[SftStage | TrainStage | RewardStage | AnnotateStage, Field(discriminator="kind")]


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


@dataclass(frozen=True)
class ResolvedStage:
    """A stage with everything it inherits.

    Attributes:
        name: its name, and its folder's.
        kind: "init" (a model built from scratch), "sft", "train", "reward" or "annotate".
        model: what it starts from (annotate: the model whose log-probabilities are stored).
        data: its rows and how they become tokens.
        lora: adapters, if any.
        training: keys of `PreferenceConfig`.
        objective: name and hyper-parameters ("sft" for an sft stage).
        credit: name and settings of the credit source, if any.
        reference: see `TrainStage.reference`.
        teacher: what is distilled, if anything.
        options: what only this kind has (annotate: `reference_logps`, `shard_rows`, `max_tokens`, `bf16`).
    """

    name: str
    kind: Literal["init", "sft", "train", "reward", "annotate"]
    model: ModelSpec
    data: DataSpec
    lora: LoraSpec | None = None
    training: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] | None = None
    credit: dict[str, Any] | None = None
    reference: str | None = None
    teacher: TeacherSpec | None = None
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
