"""What the stages of a run share: the rows, models and credit sources that a recipe names, each loaded once."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from tokengrain import models
from tokengrain.batch import PromptRole
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.encode import picture_files
from tokengrain.data.rows import Rows, load_rows, split_rows, with_columns
from tokengrain.data.series import plotted
from tokengrain.data.tokens import dated, template_text, text_tokenizer, tokenizer_fingerprint
from tokengrain.errors import ModelError, RecipeError, file_fingerprint, fingerprint, require, shown
from tokengrain.method import CREDIT, ROLLOUT_CREDIT, CreditKind
from tokengrain.recipe.schema import Recipe
from tokengrain.rewards.reward_model import load_completion_model
from tokengrain.run import show
from tokengrain.scoring.model import lift_positions, positions_of
from tokengrain.scoring.reference import AdapterReference, FrozenReference, is_peft
from tokengrain.specs import DataSpec, ModelSpec
from tokengrain.worlds import is_world, load_world

# ---- Rows ----


OfWorld = Literal["pairs", "prompts", "demonstrations"]


def open_rows(
    data: DataSpec, seed: int, *, prompts: bool = False, demonstrations: bool = False
) -> tuple[Rows, Rows | None]:
    """`(training rows, held-out rows or None)` of a source.

    A world has pairs, `prompts`, and perhaps `demonstrations`, single completions to imitate; without them its pairs
    serve. Without `data.eval` a world gives fresh rows, and of any other source a part is held out.
    """
    wanted: OfWorld = "prompts" if prompts else "demonstrations" if demonstrations else "pairs"
    train: Any = _source(data.train, data.split, data, "train", wanted)
    if data.limit is not None:
        train = train.subset(range(min(data.limit, len(train))))
    if data.eval is not None:
        return train, _source(data.eval, data.eval_split, data, "eval", wanted)
    if data.eval_fraction == 0:
        return train, None
    if is_world(data.train):
        return train, _source(data.train, None, data, "eval", wanted)
    return split_rows(train, data.eval_fraction, seed)


def _source(source: Any, split: str | None, data: DataSpec, part: str, wanted: OfWorld = "pairs") -> Rows:
    if not is_world(source):
        rows = load_rows(source, split=split, streaming=data.streaming)
        rows = rows if data.series is None else plotted(rows, data.series)
        return with_columns(rows, data.columns) if data.columns else rows
    own = {"columns": data.columns, "split": split, "series": data.series}
    name, given = next(((name, given) for name, given in own.items() if given), ("", None))
    require(not given, RecipeError, f"data.{name} is {given!r}; expected none beside {source}, whose rows are its own")
    world: Any = load_world(source)
    if wanted != "prompts":
        return load_rows(getattr(world, wanted, world.pairs)(part))
    has_prompts = callable(getattr(world, "prompts", None))  # those of `stories` are plain texts
    require(
        has_prompts, RecipeError, f"world {world.name} has no prompts with checkable answers; use world://arithmetic"
    )
    return load_rows(world.prompts(part))


def data_fingerprint(data: DataSpec) -> str:
    """Identifies the content of the sources (not their names)."""
    sources = [(data.train, data.split, "train"), (data.eval, data.eval_split, "eval")]
    contents: list[Any] = []
    for source, split, part in sources:
        if is_world(source):
            contents.append(load_world(source).fingerprint)
        elif source is not None:
            rows = _source(source, split, data, part)
            contents.append(rows.fingerprint)
            if files := picture_files(rows, TokenizeConfig(image=data.tokenize.get("image"))):
                contents.append(file_fingerprint(*files))
    return fingerprint(contents)


def tokenize_config(data: DataSpec) -> TokenizeConfig:
    return TokenizeConfig(**data.tokenize)


def length_by_hand(recipe: Recipe, data: DataSpec) -> int | None:
    """The `max_length` up to which models are to read, beyond their positions if need be; None: no further than these.

    On a world it is the default of a recipe for larger models, and the rows are short.
    """
    return None if recipe.model.is_world else data.tokenize.get("max_length")


# ---- Credit ----


@dataclass(frozen=True)
class CreditSpec:
    """A recipe's `credit:` in its parts."""

    name: str
    settings: dict[str, Any]
    models: dict[str, ModelSpec]  # by what they are to the source
    role: Any  # how the credit enters the objective; None: the recipe does not say

    MODELS = ("model", "reference", "reverse")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> CreditSpec:
        """Credit of which only the role is given is the data's own column."""
        name = given.get("name", "column" if "as" in given else None)
        if not isinstance(name, str):
            raise RecipeError("name is missing; expected for example `name: guide`")
        named = {k: ModelSpec.model_validate(given[k]) for k in cls.MODELS if given.get(k) is not None}
        settings = {k: v for k, v in given.items() if k not in ("name", "as", *cls.MODELS)}
        return cls(name, settings, named, given.get("as"))

    @property
    def kind(self) -> CreditKind:
        """What is registered under the name. Raises `RecipeError` if nothing is."""
        return CREDIT.find(self.name)


def named_source(given: Any) -> Mapping[str, Any]:
    """The offline source of a step: a name, or a mapping with one."""
    source = {"name": given} if isinstance(given, str) else given
    require(isinstance(source, Mapping), RecipeError, f"got {shown(source)}; expected a name, or a mapping with one")
    return source


# ---- All of it, loaded once ----


def locate(spec: ModelSpec, run_dir: Path) -> str:
    """The folder or hub name of a model; a world's base model is put into the cache now."""
    if spec.stage is not None:
        return str(run_dir.resolve() / spec.stage / "model")
    if spec.is_world:
        return str(load_world(str(spec.path)).base_model())
    missing = "the model is built from scratch by the run's init stage and does not exist yet"
    require(spec.path is not None, ModelError, missing)
    return os.path.expanduser(str(spec.path))


@dataclass
class RunModels:
    """What the stages of one run share: process state, and the data and models that were loaded already."""

    recipe: Recipe
    console: Console
    state: Any  # accelerate's `PartialState`
    time: str | None = None  # that chat templates write, ISO; None: now
    stop_requested: bool = False  # by a signal that came when a stage had no step left to stop before
    _tokenizers: dict[str, Any] = field(default_factory=dict)
    _datasets: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    _frozen: dict[str, Any] = field(default_factory=dict)

    @property
    def run_dir(self) -> Path:
        return Path(self.recipe.output_dir)

    def path(self, spec: ModelSpec) -> str:
        return locate(spec, self.run_dir)

    def tokenizer(self, spec: ModelSpec, *, own_template: bool = False) -> Any:
        """A model's tokenizer, with the recipe's chat template if it has one.

        A reward model that reads text for itself needs its own template.
        """
        return text_tokenizer(self.reader(spec, own_template=own_template))

    def reader(self, spec: ModelSpec, *, own_template: bool = False) -> Any:
        """What reads rows for a model: its processor if it sees, else its tokenizer; the template as above."""
        path = self.path(spec)
        key = f"{path} {own_template}"
        if key not in self._tokenizers:
            reader = models.load_reader(spec, path)
            template = template_text(self.recipe.data.tokenize.get("chat_template"))
            if template is not None and not own_template:  # so that it is saved with the trained model
                reader.chat_template = text_tokenizer(reader).chat_template = template
            self._tokenizers[key] = reader
        return self._tokenizers[key]

    def datasets(self, stage: Any, like: ModelSpec | None = None) -> tuple[Any, Any]:
        """`(training, held-out or None)` of a stage, every row checked; prepared once per form and settings.

        `like` lends its tokenizer and positions while the stage's own model does not exist yet.
        """
        model = like or stage.model
        reader = self.reader(model)
        config = models.load_config(model, self.path(model))
        positions = positions_of(config, length_by_hand(self.recipe, stage.data))
        role: PromptRole = "encoder" if getattr(config, "is_encoder_decoder", False) else "prefix"
        form = [positions, stage.row_form, role]
        key = fingerprint([stage.data.model_dump(), tokenizer_fingerprint(reader), *form])
        if key not in self._datasets:
            prepare = partial(stage.prepare, tokenizer=reader, positions=positions, role=role)
            made = [prepare(rows) if rows is not None else None for rows in stage.rows()]
            for dated in made if self.time is not None else ():
                if dated is not None:
                    dated.set_time(datetime.fromisoformat(str(self.time)))
            self._datasets[key] = made[0], made[1]
            for part, dataset in zip(("training", "held-out"), made, strict=True):
                show.print_rows(self.console, f"{stage.data.train}, {part} rows for {stage.kind}", dataset)
        return self._datasets[key]

    def frozen(self, spec: ModelSpec) -> Any:
        """A model that is only asked, never trained; loaded once per stage, like the two below."""
        return self._once("model", spec, lambda path: models.load_model(spec, path, merge_adapter=True).eval())

    def reward_model(self, spec: ModelSpec) -> Any:
        return self._once("reward", spec, models.load_trained_reward_model)

    def completion_model(self, spec: ModelSpec) -> Any:
        trust = spec.trust_remote_code
        return self._once("completions", spec, lambda path: load_completion_model(path, trust_remote_code=trust))

    def _once(self, kind: str, spec: ModelSpec, load: Callable[[str], Any]) -> Any:
        key = fingerprint([kind, spec.model_dump(), self.path(spec)])
        if key not in self._frozen:
            self._frozen[key] = load(self.path(spec)).requires_grad_(False).to(self.state.device)
            lift_positions(self._frozen[key], length_by_hand(self.recipe, self.recipe.data))
        return self._frozen[key]

    def beside(self, policy: Any, spec: ModelSpec, name: str) -> Any:
        """A frozen model as a `Reference`: an adapter is loaded into the policy if both sit on the same base."""
        path = self.path(spec)
        if is_peft(policy) and models.is_adapter(path):
            base = policy.peft_config[policy.active_adapter].base_model_name_or_path
            if base and models.model_fingerprint(base) == models.model_fingerprint(models.base_of_adapter(path)):
                found = policy.load_adapter(path, adapter_name=name, is_trainable=False)
                models.check_tensors(path, "this adapter", found.missing_keys, found.unexpected_keys)
                return AdapterReference(policy, name)
        return FrozenReference(self.frozen(spec))

    def credit(self, given: Mapping[str, Any], start: ModelSpec) -> Any:
        """The credit source of a recipe's mapping, with the models that it asks.

        One that the mapping does not name (a guide's reference, say) is `start`, from which the stage starts.
        """
        spec = CreditSpec.of(given)
        objects, settings = dict[str, Any](), dict(spec.settings)
        for wanted in spec.kind.objects:
            if wanted == "tokenizer":
                tokenizer = objects[wanted] = self.tokenizer(start)
                template = settings.get("chat_template") or tokenizer.chat_template
                if self.time is not None and template and "chat_template" in spec.kind.settings(settings):
                    settings["chat_template"] = dated(template, datetime.fromisoformat(self.time))
            elif wanted == "reward_tokenizer":
                objects[wanted] = self.tokenizer(spec.models["model"], own_template=True)
            elif spec.kind.reward_model:
                objects[wanted] = self.reward_model(spec.models[wanted])
            else:
                objects[wanted] = self.frozen(spec.models.get(wanted, start))
        return spec.kind.make(**objects, **settings)

    def rollout_credit(self, given: Mapping[str, Any], start: ModelSpec) -> Any:
        """A step from rewards to the credit of tokens, with the models and the offline source that it asks."""
        spec = CreditSpec.of(given)
        kind, arguments = ROLLOUT_CREDIT.find(spec.name), dict(spec.settings)
        source = arguments.pop("source", None)
        arguments |= {name: self.frozen(model) for name, model in spec.models.items()}
        if "tokenizer" in kind.objects:
            arguments["tokenizer"] = self.tokenizer(start)
        if source is not None:
            arguments["source"] = self.credit(named_source(source), start)
        return kind.make(**arguments)

    def release(self) -> None:
        """Forget loaded models."""
        self._frozen.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
