"""What a recipe may say: the settings of every kind of stage, and of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator

from tokengrain.recipe.reading import merge
from tokengrain.runs import NAME
from tokengrain.settings import write_yaml
from tokengrain.specs import DataSpec, LoraSpec, ModelSpec, Named, PromptSpec, Strict, TeacherSpec

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
    self_check: bool = Field(default=False, description="ask for credit of corrupted answers; warn if it does not fall")

    _from_name = field_validator("credit", mode="before")(_named)


class IndexStage(StageSettings):
    """Docids for documents, a model that has their tokens, and rows that teach it where documents are."""

    kind: Literal["index"]
    scheme: Literal["given", "pq", "hierarchical", "title_url"] = Field(
        default="given",
        description="given: the documents' `docid`, or a table; pq: product quantisation; hierarchical: clusters of "
        "clusters; title_url: text of URL or title",
    )
    documents: str | None = Field(
        default=None,
        description="rows with key, title, text, url, docid; default: the world's, or those that rows name",
    )
    docids: str | None = Field(default=None, description="a parquet table of docids (columns key and docid)")
    levels: int = Field(default=3, gt=0, description="pq, hierarchical: tokens per docid (the paper's pq: 24)")
    codes: int = Field(default=16, gt=1, description="pq, hierarchical: codes per level (the paper's pq: 256)")
    dimensions: int = Field(default=64, gt=0, description="of the vectors that LSA makes of documents")
    vectors: str | None = Field(default=None, description="a .npy file with a vector per document, in place of LSA's")
    own_head: bool = Field(default=False, description="an output layer of its own for the model (the paper's pq)")
    pad_counts: bool = Field(
        default=False,
        description="pad the docids that the sft stage learns to the longest; padding counts, as in the authors' code",
    )
    passages: int = Field(default=1, ge=0, description="passages of each document that the sft stage learns from")
    passage_words: int = Field(default=48, gt=0, description="words of a passage")
    terms: int = Field(default=4, ge=0, description="stand-ins for queries per document: 4 to 12 of its words")


class NegativesStage(StageSettings):
    """Pairs of docids: a relevant document's and another's."""

    kind: Literal["negatives"]
    source: Literal["auto", "rows", "bm25", "model"] = Field(
        default="auto", description="rows: those given; bm25; model: its own ranking; auto: the first that there is"
    )
    count: int = Field(default=8, gt=0, description="negatives per query")
    strata: list[list[int]] | None = Field(
        default=None, description="first and last rank of each; default: bm25 1-100, 101-500, 501-1000, model its beams"
    )
    remainder: Literal["last", "first"] = Field(
        default="last", description="what does not divide by the strata comes from the last, or again from the first"
    )
    beams: int = Field(default=20, gt=0, description="model: docids found per query")


class RetrieveStage(StageSettings):
    """Search among docids for the held-out queries, and metrics of the rankings."""

    kind: Literal["retrieve"]
    before: ModelSpec | None = Field(default=None, description="another model to search with: '@sft'")
    beams: int = Field(default=20, gt=0, description="beams; as many as docids give the exact ranking")
    length: Literal["sum", "mean"] = Field(default="sum", description="log-probabilities summed, or their mean")
    renormalise: bool = Field(default=False, description="probabilities among the tokens of docids alone")
    metrics: list[str] = Field(
        default_factory=lambda: ["MRR@10", "Hit@1", "Hit@10", "R@10", "NDCG@10"], description="see docs/retrieval.md"
    )
    baselines: bool = Field(default=True, description="BM25 and LSA beside the model, where documents have text")


Stage = Annotated[
    SftStage | TrainStage | RewardStage | OnlineStage | AnnotateStage | IndexStage | NegativesStage | RetrieveStage,
    Field(discriminator="kind"),
]
KINDS: dict[str, type[StageSettings]] = {
    get_args(kind.model_fields["kind"].annotation)[0]: kind for kind in get_args(get_args(Stage)[0])
}


class Recipe(Strict):
    """A validated recipe. `load_recipe` reads one; `run_recipe` runs it."""

    method: Annotated[str, Field(description="name of the method, for tables and reports")]
    model: ModelSpec = Field(description="what to train")
    data: DataSpec = Field(description="preference pairs")
    output_dir: Named = Field(description="the run folder")
    seed: int = Field(default=0, ge=0, lt=2**32, description="order of the rows, held-out rows, dropout, new weights")
    lora: LoraSpec | None = Field(default=None, description="train LoRA adapters instead of all weights")
    settings: Literal["fitted", "paper"] = Field(
        default="fitted",
        description="fitted: rate, batch, epochs and warm-up that are not set follow from rows and model (not in a "
        "world); paper: those that the method was published with",
    )
    training: dict[str, Any] = Field(
        default_factory=dict, description="PreferenceConfig (all of transformers' TrainingArguments), for all stages"
    )
    stages: dict[Annotated[str, Field(pattern=NAME)], Stage] = Field(min_length=1, description="run in this order")


def dump_recipe(recipe: Recipe, *, anchored: bool = False) -> str:
    """The recipe as YAML that loads to the same recipe: merged, with nothing left to other files.

    If `anchored`, models and data that are files or folders have absolute paths, so that it works from any folder.
    """
    values = {**recipe.model_dump(mode="json", exclude_unset=True), "seed": recipe.seed}
    return write_yaml(_anchored(values) if anchored else values)


_PLACES = {"model", "path", "data", "train", "eval", "reference", "reverse", "target", "contrast", "tokenizer"}
_PLACES |= {"documents", "docids", "vectors"}  # of an index stage
_PLACES |= {"chat_template"}  # unless it is one itself
_AS_THEY_ARE = ("rewards", "critic", "sampler", "objective", "training")  # they count as they are written


def _anchored(values: Any, key: str = "") -> Any:
    if isinstance(values, dict):
        if key == "train" and values and all(isinstance(weight, (int, float)) for weight in values.values()):
            return {_anchored(source, key): weight for source, weight in values.items()}
        return {k: v if k in _AS_THEY_ARE else _anchored(v, str(k)) for k, v in values.items()}
    if isinstance(values, list):
        return [_anchored(value, key) if key in _PLACES else value for value in values]
    if key in _PLACES and isinstance(values, str) and "{" not in values:
        place = Path(values).expanduser()
        return str(place.resolve()) if place.exists() else values
    return values


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
