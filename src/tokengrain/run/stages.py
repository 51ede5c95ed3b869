"""The kinds of stages, one class each: what a recipe may say, a dry build, the build, and the run.

Init        a model built from scratch
Annotate    a credit source over the data, stored
Index, Negatives, Retrieve    docids, pairs of them, search among them (retrieval.py)
Trained     everything that trains a model
  Sft         supervised fine-tuning
  Reward      a token-level reward model
  Policy      a policy, against a reference and perhaps towards a teacher
    Train       on preference pairs
    Online      on completions that the policy samples itself
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from tokengrain import models
from tokengrain.annotation import annotate, check_manifest, check_storable, is_annotated, load_annotated
from tokengrain.batch import PromptRole, TokenBatch
from tokengrain.corruption import self_check
from tokengrain.data.dataset import prepare_pairs, prepare_sft
from tokengrain.data.rows import Rows
from tokengrain.data.tokens import template_text, tokenizer_fingerprint
from tokengrain.errors import ModelError, RecipeError, fingerprint, read_json, require, write_json
from tokengrain.method import CREDIT
from tokengrain.recipe.check import Mistakes, check_data, check_reference
from tokengrain.recipe.schema import INIT, Recipe
from tokengrain.report.pictures import patch_credit
from tokengrain.report.rows import FILE, collect_credit_samples
from tokengrain.run.build import (
    CreditSpec,
    RunModels,
    data_fingerprint,
    length_by_hand,
    locate,
    open_rows,
    tokenize_config,
)
from tokengrain.runs import FORMAT
from tokengrain.scoring.prepare import prepare
from tokengrain.scoring.reference import FrozenReference
from tokengrain.scoring.vision import placeholders
from tokengrain.screen import labelled
from tokengrain.specs import DataSpec, ModelSpec
from tokengrain.training.checkpoint import STAGING, publish, saving
from tokengrain.worlds import is_world, load_world

LANGUAGE = (INIT, "index", "sft", "train", "online")
"""Kinds of stages that make a language model."""

ROWS = ("annotate", "index", "negatives")
"""Kinds of stages that make rows for others, as their `data: '@stage'`."""

SAMPLED_PAIRS = 8  # whose credit is stored in the run folder for `report` and `inspect`
CHECKED_ANSWERS = 32  # of a credit's self-check


class Asked(NamedTuple):
    """A model that a stage asks beside its own, and the kinds of stages that can make it."""

    spec: ModelSpec
    kinds: tuple[str, ...] = LANGUAGE
    own_text: bool = False  # it reads completions as text, so it may have a tokenizer of its own


@dataclass(frozen=True)
class Stage(ABC):
    """A stage of a recipe, with everything it inherits, and the stages `above` it by name."""

    name: str
    recipe: Recipe
    own: Any  # what the recipe says of this stage alone
    model: ModelSpec  # what it starts from (annotate: the model whose log-probabilities are stored)
    data: DataSpec
    above: Mapping[str, Stage] = field(default_factory=dict, repr=False)

    kind: ClassVar[str]
    makes: ClassVar[str] = "a language model"

    training: ClassVar[Any] = {}
    needs_causal: ClassVar[str] = ""  # why no encoder-decoder will do, where that is so
    trains_weights: ClassVar[Any] = False  # all of the model's own, not an adapter's

    # What a stage has only where its kind says so.
    objective = property(lambda self: getattr(self.own, "objective", None))
    credit = property(lambda self: getattr(self.own, "credit", None))
    reference = property(lambda self: getattr(self.own, "reference", None))
    teacher = property(lambda self: getattr(self.own, "teacher", None))

    @property
    def asks(self) -> dict[str, Asked]:
        """Every other model that the stage asks, by its key in the recipe."""
        return {}

    @property
    def inputs(self) -> list[str]:
        """Earlier stages that this one uses."""
        names = [self.model.stage, *(asked.spec.stage for asked in self.asks.values()), self.data.stage]
        return list(dict.fromkeys(name for name in names if name))

    @property
    def existing(self) -> Stage:
        """The stage, going back from this one, whose starting model exists before the run or is built first."""
        return self if self.model.stage in (None, INIT) else self.above[str(self.model.stage)].existing

    # ---- check: a dry build, without models ----

    def check(self, found: Mistakes) -> None:
        """Note what the constructors of the stage's parts refuse."""
        where = f"stages.{self.name}"
        check_data(self.own.data if isinstance(self.own.data, dict) else {}, f"{where}.data", found)
        with found.at(f"{where}.credit"):  # a model that is none
            for key, asked in {"model": Asked(self.model, self._starts), **self.asks}.items():
                if asked.spec.stage is not None:
                    place = f"{where}.{key}"
                    check_reference(place, asked.spec.stage, asked.kinds, self.above, self.recipe, found)
        if self.data.stage is not None:
            check_reference(f"{where}.data", self.data.stage, ROWS, self.above, self.recipe, found)

    _starts: ClassVar[tuple[str, ...]] = LANGUAGE

    @property
    def unread(self) -> dict[str, str]:
        """Settings that would be without effect in this stage, and why. The recipe may have them for other stages."""
        what = "completions is both, but no stage here learns from single completions, so nothing would change"
        return {"data.completions": f"{what}; expected a stage that does (sft, or the objective aligndistil), or none"}

    def blocks(self) -> dict[str, Callable[[], Any]]:
        """Constructors of blocks that stages inherit from the recipe; they know what does not go together."""
        return {"data": lambda: tokenize_config(self.data)}

    def check_together(self, found: Mistakes) -> None:  # noqa: B027  # most kinds have none
        """Note parts of the stage that are legal and do not go together, as the trainer's constructor would."""

    def decides(self, run_dir: Path, above: Mapping[str, str]) -> dict[str, Any]:
        """Everything that decides the stage's result, as JSON-like values; `above`: earlier stages' fingerprints."""
        return {
            "format": FORMAT,
            "kind": self.kind,
            "seed": self.recipe.seed,
            "model": model_content(self.model, run_dir, above),
            "data": self._data_content(above),
        }

    def _data_content(self, above: Mapping[str, str]) -> dict[str, Any]:
        read = read_template(self.data)
        if self.data.stage is not None:
            return {"content": above[self.data.stage], "tokenize": self.data.tokenize | read}
        options = self.data.model_dump(exclude={"train", "eval"}, exclude_none=True) | read
        spans = tokenize_config(self.data).span_config
        # A function of the user's counts with its source: another body marks other spans.
        marked = {"spans": spans.describe()} if spans is not None else {}
        return {**options, **marked, "content": data_fingerprint(self.data)}

    # ---- build: rows ----

    @abstractmethod
    def describe(self) -> str:
        """One line: what the stage does, to what, with what."""

    def rows(self) -> tuple[Rows, Rows | None]:
        """`(training rows, held-out rows or None)`."""
        return open_rows(self.data, self.recipe.seed)

    @property
    def row_form(self) -> Any:
        """What its rows become; stages of one form share them."""
        return "pairs"

    def prepare(self, rows: Any, tokenizer: Any, positions: int | None, role: PromptRole) -> Any:
        """Rows as the data set that the stage reads."""
        make = prepare_pairs if self.row_form == "pairs" else prepare_sft
        config = replace(tokenize_config(self.data), prompt_role=role)
        dataset: Any = make(rows, tokenizer, config, model_positions=positions)
        dataset.max_length = length_by_hand(self.recipe, self.data)
        return dataset.swapped() if self.data.swap_pairs else dataset

    # ---- run ----

    def check_models(self, run: RunModels) -> None:
        """Models that exist already must be loadable and share the stage's vocabulary."""
        if self.model.stage not in (None, INIT) and not Path(run.path(self.model)).exists():
            return  # an earlier stage will make it, from a model that is checked
        tokenizer = run.tokenizer(self.model)
        config = models.load_config(self.model, run.path(self.model))
        seeing = self.model.freeze is None or placeholders(config)
        require(seeing, ModelError, f"model.freeze is vision, and {self.model.path} has no vision tower")
        models.check_vocabulary(tokenizer, config, str(self.model.path), str(self.model.path))
        what = f"{self.model.path} is an encoder-decoder; a stage of kind {self.kind} needs a causal language model, "
        fits = not (self.needs_causal and getattr(config, "is_encoder_decoder", False))
        require(fits, ModelError, what + self.needs_causal)
        for role, asked in self.asks.items():
            if asked.spec.stage is None and not asked.own_text:
                names = f"the policy {self.model.path}", f"the {role} {asked.spec.path}"
                models.check_same_vocabulary(tokenizer, run.tokenizer(asked.spec), *names)

    def check_server(self, *, patient: bool = True) -> None:  # noqa: B027  # most kinds have none
        """Raises `RolloutError` if the stage samples from a server that does not answer."""

    def check_golds(self) -> None:  # noqa: B027  # most kinds have none
        """Raises `DataError` for a row whose right answer a reward cannot read, or that does not name its task."""

    def check_rows(self, run: RunModels, settings: Mapping[str, Any]) -> None:
        """Tokenise the rows, with the tokenizer of the model that the stage's own will come from."""
        if self.data.stage is None:
            run.datasets(self, like=self.existing.model)

    @abstractmethod
    def run(self, run: RunModels, folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Do it, from the start or from what is in the folder; returns its metrics."""


def model_content(spec: ModelSpec, run_dir: Path, above: Mapping[str, str]) -> dict[str, Any]:
    """What decides a model's numbers: how it is loaded, and a fingerprint of its content."""
    values = spec.model_dump(exclude={"path"}, exclude_none=True)
    if spec.stage is not None:
        return {**values, "content": above[spec.stage]}
    if spec.is_world:  # its base model need not be there yet
        return {**values, "content": load_world(str(spec.path)).fingerprint}
    if spec.path is not None:
        return {**values, "content": models.model_fingerprint(locate(spec, run_dir))}
    if isinstance(spec.tokenizer, str):
        values["tokenizer"] = models.model_fingerprint(spec.tokenizer)
    return values


def in_words(name: Any, settings: Mapping[str, Any]) -> str:
    """A name with its settings, for people."""
    inside = ", ".join(f"{k} {v}" for k, v in settings.items() if k not in ("name", "templates"))
    return f"{name} ({inside})" if inside else str(name)


class Init(Stage):
    """Builds a model from scratch, and its tokenizer."""

    kind = INIT

    def check(self, found: Mistakes) -> None:
        if (wrong := models.check_config(self.model.config or {})) is not None:
            found.lines.append(f"model.{wrong}")

    def describe(self) -> str:
        tokenizer = self.model.tokenizer
        made = getattr(tokenizer, "type", tokenizer) or "bpe"
        return f"{self.model.describe()}, {made} tokenizer, from {self.data.train}"

    def run(self, run: RunModels, folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
        target = folder / "model"
        if run.state.is_main_process:
            staged = folder / STAGING / "model"
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
            with saving("the new model", staged):
                models.build(self.model, self.rows()[0], self.recipe.seed, staged)
                publish(staged, target)
            staged.parent.rmdir()
        run.state.wait_for_everyone()
        config = models.load_config(self.model, str(target))
        return {"vocabulary": config.get_text_config().vocab_size, "model_type": config.model_type}


# ---- Credit that a stage makes, and annotated files ----


def credit_asks(credit: Mapping[str, Any] | None) -> dict[str, Asked]:
    if credit is None:
        return {}
    name = str(credit.get("name"))
    judged = (name in CREDIT or ":" in name) and CREDIT.find(name).reward_model  # an unknown name is said elsewhere
    named = {k: ModelSpec.model_validate(credit[k]) for k in CreditSpec.MODELS if credit.get(k) is not None}
    return {f"credit.{k}": Asked(spec, ("reward",) if judged else LANGUAGE, judged) for k, spec in named.items()}


def check_source(credit: Mapping[str, Any], where: str, found: Mistakes) -> None:
    """Note what the source of a `credit:` refuses, and models that are missing or not asked."""
    with found.at(where):
        spec = CreditSpec.of(credit)
        kind = spec.kind
        kind.settings(spec.settings)
        for wanted in ("model", "reverse"):
            optional = kind.judges_itself and wanted == "model"
            if wanted in kind.objects and wanted not in spec.models and not optional:
                found.add(f"{where}.{wanted}", "missing; expected '@STAGE' or a path")
        for extra in sorted(set(spec.models) - kind.objects):
            found.add(f"{where}.{extra}", f"credit {spec.name} asks no such model; drop it")


def credit_content(credit: Mapping[str, Any] | None, run_dir: Path, above: Mapping[str, str]) -> Any:
    if credit is None:
        return None
    spec = CreditSpec.of(credit)
    contents = {key: model_content(model, run_dir, above) for key, model in spec.models.items()}
    return spec.kind.describe(spec.settings) | contents | ({} if spec.role is None else {"as": spec.role})


def annotated_files(folder: Path) -> tuple[Path, Path]:
    """Files of an annotate stage: training rows, held-out rows (which may not exist)."""
    return folder / "train.parquet", folder / "eval.parquet"


def read_template(data: DataSpec) -> dict[str, Any]:
    """The chat template that rows are given, itself in place of a file's path, which tells nothing of its content."""
    text = template_text(data.tokenize.get("chat_template"))
    return {} if text is None else {"chat_template": text}


def file_marks(
    run: RunModels, stage: Stage, settings: Mapping[str, Any], rows: DataSpec, like: ModelSpec
) -> dict[str, str]:
    """What an annotated file of `rows` depends on beside its credit source, by the names that its manifest uses.

    The numbers must belong to the model of `stage`; `like` exists already and has its tokenizer.
    """
    reader, config = run.reader(like), tokenize_config(stage.data)
    marks = {
        "model": settings["model"]["content"],
        "tokenizer": tokenizer_fingerprint(reader),
        "chat_template": fingerprint([template_text(config.chat_template) or reader.chat_template]),
        "tokenize": fingerprint(stage.data.tokenize | read_template(stage.data)),
        "data": data_fingerprint(rows),
    }
    if stage.reference not in (None, "columns"):  # the stored ref_logps are not used, nor is the model that made them
        del marks["model"]
    return marks


def check_given_files(run: RunModels, stage: Stage, settings: Mapping[str, Any]) -> None:
    """Annotated files that a recipe gives as ordinary data must belong to its model and tokenizer too."""
    given = [source for source in (stage.data.train, stage.data.eval) if source is not None and is_annotated(source)]
    if stage.data.stage is None and given:
        marks = file_marks(run, stage, settings, stage.data, stage.existing.model)
        del marks["data"]  # the rows are in the file itself, with a digest
        for source in given:
            check_manifest(source, marks)


def store_credit(run: RunModels, stage: Stage, batch: TokenBatch, source: str, values: Tensor, **pictures: Any) -> None:
    """Put the entries of one source into the run's file, in place of earlier ones of that source.

    `pictures`: `maps` and `by` of `collect_credit_samples`.
    """
    data = run.recipe.data.train
    truth = load_world(data).advantages(batch) if is_world(data) else None
    path = run.run_dir / FILE
    kept = [entry for entry in (read_json(path) if path.exists() else []) if entry.get("source") != source]
    made = collect_credit_samples(batch, run.tokenizer(stage.model), {source: values}, truth=truth, **pictures)
    write_json(path, kept + made)


def first_pairs(dataset: Any) -> TokenBatch:
    return TokenBatch.from_samples([dataset[i] for i in range(min(SAMPLED_PAIRS, len(dataset)))])


def same_rewards(file: Path) -> float | None:
    """The one token reward that all counted tokens of an annotated file have; None if there are several."""
    dataset = load_annotated(file)
    values = (torch.tensor(c.columns["token_rewards"]) for sample in dataset.samples for c in sample.completions)
    found: set[float] = set()
    for part in values:
        found |= set(part.unique().tolist())
        if len(found) > 1:
            return None
    return found.pop() if found else None


class Annotate(Stage):
    """Runs a credit source over the rows and stores one number per token."""

    kind = "annotate"
    makes = "token rewards, not a model"

    @property
    def asks(self) -> dict[str, Asked]:
        return credit_asks(self.credit)

    @property
    def layout(self) -> dict[str, Any]:
        """The layout that the policy will be scored in, where the recipe names one."""
        given = self.recipe.training.get("layout")
        return {} if given is None else {"layout": given}

    @property
    def bf16(self) -> bool:
        """As the policy will be scored: a reference in another precision is not equal to it at the start."""
        return bool(self.recipe.training.get("bf16", False))

    def check(self, found: Mistakes) -> None:
        super().check(found)
        where = f"stages.{self.name}"
        if self.data.streaming:
            found.add(where, "a streamed data set cannot be annotated; set data.streaming: false")
        check_source(self.credit, f"{where}.credit", found)
        name = str(self.credit.get("name"))
        if self.own.self_check and name in CREDIT and CREDIT.find(name).column:
            found.add(f"{where}.self_check", f"credit {name} comes with the rows, and says nothing of other answers")

    def describe(self) -> str:
        return f"credit {in_words(self.credit.get('name'), self.credit)} of {self.data.train}"

    def decides(self, run_dir: Path, above: Mapping[str, str]) -> dict[str, Any]:
        options = {k: getattr(self.own, k) for k in ("reference_logps", "shard_rows", "max_tokens")}
        credit = credit_content(self.credit, run_dir, above)
        return {**super().decides(run_dir, above), "credit": credit, **options, "bf16": self.bf16, **self.layout}

    def check_rows(self, run: RunModels, settings: Mapping[str, Any]) -> None:
        super().check_rows(run, settings)
        for rows in self.rows() if self.data.stage is None else ():
            if rows is not None:
                check_storable(rows)  # before the models are trained that the credit asks

    def made(self, run: RunModels, user: Stage, settings: Mapping[str, Any]) -> tuple[Any, Any]:
        """The annotated data sets, checked to belong to the stage that uses them."""
        marks = file_marks(run, user, settings, self.data, user.model)
        files = annotated_files(run.run_dir / self.name)
        given = run.reader(user.model), marks, tokenize_config(user.data)
        require(files[0].exists(), RecipeError, f"stage {self.name!r} has written no {files[0].name}")
        train, held_out = (load_annotated(f, *given) if f.exists() else None for f in files)
        return train, held_out

    def run(self, run: RunModels, folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Write the rows with their token credit; finished shards of an earlier attempt are kept."""
        tokenizer, files, counts = run.tokenizer(self.model), annotated_files(folder), {}
        frozen = run.frozen(self.model) if self.own.reference_logps else None
        reference = None if frozen is None else FrozenReference(frozen)
        if frozen is not None and self.layout:
            prepare(frozen, **self.layout)
        source = run.credit(self.credit, self.model)
        checked = self._self_check(run, source) if self.own.self_check else {}
        marks = file_marks(run, self, settings, self.data, self.model)
        for dataset, rows, output in zip(run.datasets(self), self.rows(), files, strict=True):
            if dataset is None:
                continue
            with torch.autocast(run.state.device.type, torch.bfloat16, enabled=self.bf16):
                annotate(
                    dataset,
                    tokenizer,
                    tokenize_config(self.data),
                    {"token_rewards": source},
                    reference,
                    output,
                    {**marks, "source": fingerprint(settings["credit"])},
                    shard_rows=self.own.shard_rows,
                    max_tokens=self.own.max_tokens,
                    device=run.state.device,
                    rows=rows,
                    progress=run.state.is_main_process and not run.console.quiet,
                )
            counts[output.stem] = len(dataset)
        if run.state.is_main_process:  # held-out pairs, if there are any
            file, spec = files[1] if files[1].exists() else files[0], CreditSpec.of(self.credit)
            batch = first_pairs(load_annotated(file, run.reader(self.model), marks, tokenize_config(self.data)))
            rated: dict[str, Any] = {}
            if batch.sees and (by := spec.kind.patches) is not None:
                rated = {"maps": patch_credit(run.frozen(spec.models.get("model", self.model)), batch, by), "by": by}
            store_credit(run, self, batch, f"credit: {spec.name}", batch.columns["token_rewards"], **rated)
            if (same := same_rewards(files[0])) is not None:
                what = f"every token reward is {same:g}, so all tokens count alike. Is the model that the "
                what += "credit asks the same as its reference, or was it trained at all?"
                run.console.print(labelled("  warning", what), soft_wrap=True)
        return {"rows": counts, **checked}

    def _self_check(self, run: RunModels, source: Any) -> dict[str, Any]:
        """Whether credit falls at corrupted tokens of held-out answers, or of training's if there are none."""
        dataset = next(d for d in reversed(run.datasets(self)) if d is not None)
        samples = [dataset[i] for i in range(min(CHECKED_ANSWERS, len(dataset)))]
        found = self_check(source, samples, run.tokenizer(self.model), seed=self.recipe.seed)
        said = found.what() if found.low > 0.5 else labelled("warning", found.what())
        run.console.print("  ", said, sep="", highlight=False)
        return {"self_check": found._asdict()}
