"""The blocks of a recipe: models, tokenizers, data, adapters, teachers, prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from tokengrain.errors import require

WORLD = "world://"

Named = Annotated[str, StringConstraints(min_length=1)]
"""A path or a name; one that is empty, as an unset variable of a shell, would mean the working directory."""


class Strict(BaseModel):
    """Unknown keys are errors; a number is not taken for a string, nor a string for a number."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class TokenizerSpec(Strict):
    """A tokenizer that is made for the run (`model.tokenizer` of a model built from scratch)."""

    type: Literal["bpe", "byte"] = Field(default="bpe", description="byte-level BPE trained on the data, or bytes")
    vocab_size: int = Field(default=4096, ge=259, le=2**22, description="tokens of the BPE; a byte tokenizer has 258")


class ModelSpec(Strict):
    """The model a run starts from: one that exists (`path`), or one built from scratch (`config`)."""

    path: Named | None = Field(default=None, description="folder, hub name, world://NAME, or @stage (an earlier stage)")
    config: dict[str, Any] | None = Field(
        default=None, description="build from scratch: `model_type` and the fields of that architecture's config"
    )
    tokenizer: TokenizerSpec | str | None = Field(
        default=None, description="with `config`: {type: bpe|byte, vocab_size}, or the path of a tokenizer"
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(default="float32", description="type of weights")
    load_in_4bit: bool | None = Field(default=None, description="frozen weights in 4 bits (nf4), for lora: QLoRA")
    load_in_8bit: bool | None = Field(default=None, description="frozen weights in 8 bits, for lora")
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="type of the finished model on disk; default: as it was trained"
    )
    attn_implementation: str | None = Field(default=None, description="eager, sdpa, flash_attention_2, ...")
    decoder_start_id: int | None = Field(
        default=None, ge=0, description="of an encoder-decoder whose config lacks it: the token before every completion"
    )
    freeze: Literal["vision"] | None = Field(
        default=None, description="vision: train all weights but those of the vision tower and its projector"
    )
    trust_remote_code: bool = Field(default=False, description="run the Python code of a model on the hub")

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_kind(self) -> ModelSpec:
        got = "both" if self.path is not None else "neither"
        one = (self.path is None) != (self.config is None)
        require(one, ValueError, f"got {got} of path and config; expected exactly one of them")
        built = self.config is not None
        what = "config has no model_type; expected for example model_type: llama"
        require(not built or "model_type" in (self.config or {}), ValueError, what)
        what = "tokenizer goes with config (a model built from scratch); a model at a path has its own"
        require(built or self.tokenizer is None, ValueError, what)
        both = self.load_in_4bit and self.load_in_8bit
        require(not both, ValueError, "load_in_4bit and load_in_8bit are both set; expected one of them")
        what = "a model built from scratch is not loaded in 4 or 8 bits; drop load_in_4bit and load_in_8bit"
        require(not (built and self.quantised), ValueError, what)
        return self

    @property
    def quantised(self) -> bool:
        """Whether the weights are loaded in 4 or 8 bits, so that only an adapter can be trained."""
        return bool(self.load_in_4bit or self.load_in_8bit)

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


class SeriesSpec(Strict):
    """How rows with a `series` become prompts with a plot of it (`data.series`)."""

    question: str = Field(description="what is asked of every plot: the text of the user's message")
    classes: dict[str, str] = Field(
        default_factory=dict, description="{label: name}; without it labels stay as they are"
    )
    width: float = Field(default=6.0, gt=0, le=100, description="of the figure in inches, before it is trimmed")
    height: float = Field(default=2.5, gt=0, le=100, description="the same")
    dpi: int = Field(default=100, gt=0, le=1000, description="dots per inch")
    line_width: float = Field(default=2.0, gt=0, le=100, description="in points")
    font: str = Field(default="DejaVu Sans", description="family of the letters; the default comes with matplotlib")
    font_size: float = Field(default=8.0, gt=0, le=100, description="in points")
    xlabel: str = Field(default="Timestamp", description="text below the plot")
    ylabel: str = Field(default="Value", description="text beside it")
    title: str = Field(default="", description="text above it, which must not give the class away")


class DataSpec(Strict):
    """Where rows come from; the other keys of `data:` say how they become tokens (`TokenizeConfig`)."""

    model_config = ConfigDict(extra="allow", strict=True)

    train: Named | list[Named] | dict[Named, float] = Field(
        description="file (.json .jsonl .csv .parquet .ts, also .gz), folder, pattern, hub name, world://NAME, or "
        "@stage; several as a list, or as a mapping to weights"
    )
    eval: Named | None = Field(
        default=None, description="held-out rows: a file, hub name, ...; without it `eval_fraction` of the rows"
    )
    split: str | None = Field(default=None, description="split of a hub data set, for train")
    eval_split: str | None = Field(default=None, description="split of a hub data set, for eval")
    eval_fraction: float = Field(default=0.1, ge=0, lt=1, description="share of rows held out when eval is not given")
    limit: int | None = Field(default=None, gt=0, description="use only this many rows, the first (before holding out)")
    columns: dict[str, str] | None = Field(
        default=None,
        description="{prompt: question, completion: '{answer}'}: columns made from the rows' own, by name or template",
    )
    series: SeriesSpec | None = Field(
        default=None, description="rows with a `series` column become prompts with a plot of it; its settings"
    )
    streaming: bool = Field(default=False, description="read the rows while training: for sets larger than memory")
    swap_pairs: bool = Field(default=False, description="exchange chosen and rejected: for a reverse DPO model")
    completions: Literal["chosen", "both"] = Field(
        default="chosen", description="of pairs, what an objective on single completions (aligndistil) learns from"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"train": value} if isinstance(value, (str, list)) else value

    @model_validator(mode="after")
    def _limit_of_rows(self) -> DataSpec:
        require(self.series is None or not self.streaming, ValueError, "data.series does not go with data.streaming")
        what = "data.limit does not go with data.streaming; use training.max_steps"
        require(self.limit is None or not self.streaming, ValueError, what)
        return self

    @property
    def stage(self) -> str | None:
        """The stage that the rows come from, if they come from one."""
        return self.train[1:] if isinstance(self.train, str) and self.train.startswith("@") else None

    @property
    def tokenize(self) -> dict[str, Any]:
        """The keys that belong to `TokenizeConfig`."""
        return dict(self.model_extra or {})


class LoraSpec(Strict):
    """LoRA adapters (peft): only they are trained; the reference is the model with them switched off."""

    r: int = Field(default=16, gt=0, le=2**16, description="rank")
    alpha: int = Field(default=32, gt=0, description="scale: the update is multiplied by alpha / r")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: str | list[str] | None = Field(
        default="all-linear", description="which modules get an adapter; all-linear: those of the language model"
    )
    modules_to_save: list[str] | None = Field(default=None, description="modules trained in full and saved beside it")
    use_rslora: bool = Field(default=False, description="divide alpha by the square root of r instead of r")
    use_dora: bool = Field(default=False, description="weights as magnitude and direction, of which LoRA is the latter")
    init_lora_weights: Literal[True, "gaussian", "pissa", "olora"] = Field(
        default=True,
        description="how the adapter starts; pissa: as the largest singular vectors of the weights, olora: as their QR "
        "decomposition, which both leave the rest in the base",
    )


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

    def settings(self, objective: Mapping[str, Any]) -> dict[str, Any]:
        """What a teacher takes beside its models; `beta0` is a setting of the objective."""
        return {**self.model_dump(exclude={"target", "contrast"}), "beta0": objective.get("beta0", 0.1)}


class PromptSpec(Strict):
    """How rows become prompts of an online stage."""

    column: str = Field(default="prompt", description="the column with the prompt: text, or a list of messages")
    template: str | None = Field(default=None, description="text with {column} slots, for prompts of several columns")
    chat: bool = Field(default=False, description="wrap a text prompt as a user's message for the chat template")
