"""The kinds of stages that train a model."""

from __future__ import annotations

import math
import shutil
import signal
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tokengrain import models
from tokengrain.annotation import is_annotated
from tokengrain.batch import PromptRole
from tokengrain.data.rows import Rows
from tokengrain.errors import (
    DataError,
    ModelError,
    RecipeError,
    fingerprint,
    read_json,
    require,
    write_json,
    write_text,
)
from tokengrain.loss import resolve_role
from tokengrain.method import (
    FROZEN,
    OBJECTIVES,
    ROLLOUT_CREDIT,
    TAUGHT,
    BoundObjective,
    BoundRolloutCredit,
    check_together,
    make_credit,
    make_objective,
    resolve_rollout_credit,
    why_not,
)
from tokengrain.recipe import schema
from tokengrain.recipe.check import Mistakes, check_training
from tokengrain.report.rows import FILE
from tokengrain.rewards.builtin import REWARDS, check_reward, make_reward, reward_objects
from tokengrain.rewards.reward_model import check_completion_model
from tokengrain.rewards.suite import RewardFunction, RewardSuite
from tokengrain.rollout.local import answering
from tokengrain.rollout.sampler import (
    PromptItem,
    SamplingConfig,
    check_reachable,
    check_sampler,
    deciding,
    decode,
)
from tokengrain.run import show
from tokengrain.run.build import CreditSpec, RunModels, length_by_hand, named_source, open_rows, tokenize_config
from tokengrain.run.stages import (
    LANGUAGE,
    Asked,
    Stage,
    check_given_files,
    check_source,
    credit_asks,
    credit_content,
    first_pairs,
    in_words,
    model_content,
    store_credit,
)
from tokengrain.runs import ANSWERS, EQUAL, LOG_RATIO
from tokengrain.scoring.model import lift_positions, positions
from tokengrain.scoring.prepare import prompt_role, unwrapped
from tokengrain.scoring.reference import ADAPTER_OFF, ColumnReference
from tokengrain.screen import counting, labelled, progress_bar
from tokengrain.settings import keyword_types, load_callable, source_of, validate_settings
from tokengrain.specs import LoraSpec, ModelSpec, TeacherSpec
from tokengrain.training.card import model_card
from tokengrain.training.checkpoint import STAGING, checkpoints, last_complete_checkpoint, remove_folder
from tokengrain.training.config import OnlineConfig, PreferenceConfig
from tokengrain.training.critic import Critic
from tokengrain.training.online import (
    OnlineTrainer,
    check_ahead,
    check_credits,
    check_rewards,
    check_sharding,
    check_tasks,
    with_implied,
)
from tokengrain.training.rollout import PromptDataset
from tokengrain.training.trainer import SYNC_NEEDS, PreferenceTrainer, with_adapter
from tokengrain.worlds import is_world, load_world

ANSWERED, ANSWER_TOKENS = 3, 48
"""Prompts whose answers before and after training are shown in the report, and most tokens of an answer."""

WORLD_REWARD = "world"
"""Name of the reward that a world includes."""

DEFAULTS: dict[str, Any] = {"save_strategy": "steps", "save_steps": 0.2, "save_total_limit": 1, "disable_tqdm": True}
"""Where a recipe does not say otherwise: five checkpoints a stage, the last one kept; our own progress."""

_NEUTRAL = """
    logging_dir logging_strategy logging_steps logging_first_step log_level log_level_replica report_to run_name
    disable_tqdm project trackio_space_id eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size
    eval_accumulation_steps save_strategy save_steps save_total_limit max_tokens_per_microbatch chunk_tokens log_entropy
    rollout_samples rollout_samples_every eval_generations eval_temperature task_column use_cpu dataloader_num_workers
    dataloader_pin_memory dataloader_prefetch_factor dataloader_persistent_workers
"""
NEUTRAL = frozenset(_NEUTRAL.split())
"""Keys of `training:` that do not change what is learned; they are not part of a stage's fingerprint."""

_CHOOSING = "eval_strategy eval_steps eval_delay save_strategy save_steps eval_generations eval_temperature"
CHOOSING = frozenset(_CHOOSING.split())
"""Of these, those that do where evaluation decides which weights are kept, or the learning rate."""


OF_ROWS = ("per_device_train_batch_size", "gradient_accumulation_steps")
"""Keys of `training:` that say how many rows a step reads; an online stage reads rollouts."""


class Trained(Stage):
    """Trains a model and saves it."""

    config: ClassVar[type[PreferenceConfig]] = PreferenceConfig
    trainer: ClassVar[type[PreferenceTrainer]] = PreferenceTrainer

    @property
    def has_reference(self) -> bool:
        """Whether a frozen copy of the starting model stands beside the policy."""
        return self.reference in (None, "copy") and self.data.stage is None and bool(self.bound.needs & FROZEN)

    @property
    def lora(self) -> LoraSpec | None:
        return schema.stage_lora(self.recipe.lora, self.own)

    trains_weights = property(lambda self: self.lora is None)

    @property
    def training(self) -> dict[str, Any]:
        """Keys of `training:`, the stage's over the recipe's."""
        return {**self.recipe.training, **self.own.training}

    def args(self, folder: Path | str) -> Any:
        """The trainer's settings."""
        named = {"run_name": f"{Path(self.recipe.output_dir).name}/{self.name}"}
        given = {**DEFAULTS, **named, "use_cpu": not torch.accelerator.is_available(), **self.training}
        return self.config(output_dir=str(folder), seed=self.recipe.seed, **given)

    @cached_property
    def bound(self) -> BoundObjective:
        """The objective with its hyper-parameters."""
        named = isinstance(self.objective.get("name"), str)
        require(named, RecipeError, "name is missing; `tokengrain methods` lists the objectives")
        return make_objective(**self.objective)

    # ---- check ----

    def check(self, found: Mistakes) -> None:
        super().check(found)
        where = f"stages.{self.name}"
        check_training(self.own.training, self.config, f"{where}.training", found)
        if self.model.quantised and self.lora is None:
            what = "weights in 4 or 8 bits are not trained; set lora, or drop load_in_4bit and load_in_8bit"
            found.add(f"{where}.model", what)
        if self.model.quantised and self.kind == "reward":
            found.add(f"{where}.model", "a reward model is not loaded in 4 or 8 bits; drop load_in_4bit, load_in_8bit")
        if self.data.streaming:
            if self.data.eval is None and self.data.eval_fraction > 0:
                found.add(where, "rows cannot be held out of a stream; give data.eval, or set data.eval_fraction: 0")
            if self.training.get("max_steps", -1) <= 0:
                found.add(where, "a stream has no known length; set training.max_steps")
        before = len(found.lines)
        with found.at(f"{where}.objective"):
            self.check_objective(self.bound)
        if len(found.lines) == before:
            self.check_parts(where, self.bound, found)
            if self.data.swap_pairs and self.row_form != "pairs":
                what = "swap_pairs is true, but the stage reads no pairs, so nothing would be exchanged"
                found.add(f"{where}.data", f"{what}; expected a stage that does, or none")

    @property
    def unread(self) -> dict[str, str]:
        found, training = super().unread, self.training
        if training.get("normaliser") != "constant":
            found["training.normaliser_constant"] = "is the divisor of normaliser: constant, which is not set"
        if not training.get("sync_ref_model"):
            for name in ("ref_model_sync_steps", "ref_model_mixup_alpha"):
                found[f"training.{name}"] = "says how the reference follows the policy; expected sync_ref_model: true"
        if self.bound.unit != "pairs" and not self.samples_rows:
            del found["data.completions"]
        return found

    def check_objective(self, objective: BoundObjective) -> None:
        """Raises `RecipeError` unless a stage of this kind can train with the objective."""
        kind = "reward" if objective.main == "token_scores" else "train"
        fits = (kind == "reward") == (self.kind == "reward")
        require(fits, RecipeError, f"{objective.name} belongs in a stage of kind {kind}, not {self.kind}")

    def check_parts(self, where: str, objective: BoundObjective, found: Mistakes) -> None:
        """Note what goes wrong beside the objective, or with it."""

    def blocks(self) -> dict[str, Callable[[], Any]]:
        return {**super().blocks(), "training": lambda: self.args("unused")}

    def check_together(self, found: Mistakes) -> None:
        with found.at(f"stages.{self.name}.training"):
            lacks = "lora" if self.lora is not None else "reference: columns" if self.reference == "columns" else None
            follows = lacks is None or not self.training.get("sync_ref_model")
            require(follows, RecipeError, f"{SYNC_NEEDS}; the stage has {lacks}")

    def decides(self, run_dir: Path, above: Mapping[str, str]) -> dict[str, Any]:
        chosen = self.training.get("load_best_model_at_end")
        chosen = chosen or self.training.get("lr_scheduler_type") == "reduce_lr_on_plateau"
        neutral = NEUTRAL - CHOOSING if chosen else NEUTRAL
        return {
            **super().decides(run_dir, above),
            "objective": self.bound.describe(),
            "lora": self.lora.model_dump() if self.lora else None,
            "training": {key: value for key, value in self.training.items() if key not in neutral},
        }

    # ---- build ----

    @property
    def row_form(self) -> Any:
        return "pairs" if self.bound.unit == "pairs" or self.data.completions == "both" else "completions"

    def describe(self) -> str:
        lora = ", LoRA" if self.lora else ""
        what = in_words(self.objective.get("name", "?"), self.objective)
        return f"{what} from {self.model.describe()}{lora} on {self.data.train}"

    def load(self, path: str, **options: Any) -> Any:
        """The model to train."""
        return models.load_model(self.model, path, **options)

    is_adapter = staticmethod(models.is_adapter)

    lora_config: Any = staticmethod(models.lora_config)

    def compared(
        self, metrics: dict[str, Any], reference: Any, rounding: float | None = None, *, before: bool = False
    ) -> dict[str, Any]:
        """Metrics of held-out rows; of a policy that still is its reference, no pair is preferred: all are ties.

        Before training, where an annotate stage stored the starting model's log-probabilities, only rounding is left
        between the two: `rounding`, nats per completion (root mean square).
        """
        annotated = self.data.stage is not None or is_annotated(self.data.train)  # by this model: that is checked
        stored = before and annotated and isinstance(reference, ColumnReference)
        if metrics.get("rewards/margins") != 0 and not stored:
            return metrics
        tie = {key: 0.0 if key.endswith("_low") else 1.0 if key.endswith("_high") else 0.5 for key in metrics}
        noise = {"rounding": rounding} if stored and rounding is not None else {}
        metrics = {k: v for k, v in metrics.items() if not k.startswith("rewards/margins_")}  # no interval of rounding
        return metrics | {k: v for k, v in tie.items() if "accura" in k} | {"comparison": EQUAL} | noise

    def policy(self, run: RunModels, weights: str | None) -> tuple[Any, Any]:
        """`(model, configuration of a new adapter or None)`; see `build`. An adapter that exists is trained on."""
        torch.manual_seed(self.recipe.seed)
        path, options = weights or run.path(self.model), {}
        if self.lora is None or weights is not None:
            options = {"merge_adapter": self.lora is None}
        elif self.is_adapter(path):
            _check_same_lora(self.lora, path)
            options = {"train_adapter": True}
        model = self.load(path, **options)
        if self.model.freeze is not None and self.lora is None:
            models.freeze_vision(model)
        lift_positions(unwrapped(model), length_by_hand(self.recipe, self.data))
        if self.lora is None or options:
            return model, None
        if Path(path).is_dir():  # the adapter names its base; a relative path would hold in this directory only
            model.name_or_path = str(Path(path).resolve())
        own = {"task_type": "SEQ_2_SEQ_LM"} if prompt_role(model) == "encoder" else {}
        return model, self.lora_config(self.lora, model, **own)

    def datasets(self, run: RunModels, settings: Mapping[str, Any], eval_data: str | None) -> tuple[Any, Any]:
        """`(training, held-out or None)`; `eval_data`: held-out rows from another source."""
        maker: Any = self.above.get(str(self.data.stage))
        train, held_out = run.datasets(self) if maker is None else maker.made(run, self, settings)
        if eval_data is not None:
            data = self.data.model_copy(update={"train": eval_data, "eval": None, "eval_fraction": 0.0})
            held_out = run.datasets(replace(self, data=data))[0]
        return train, held_out

    def build(
        self,
        run: RunModels,
        folder: Path,
        settings: Mapping[str, Any],
        weights: str | None = None,
        eval_data: str | None = None,
    ) -> Any:
        """The trainer, which writes into `folder`.

        To evaluate a finished model, `weights` are the policy's instead of those that the stage starts from (the
        reference stays what it was), and `eval_data` is another source of held-out rows.
        """
        train, held_out = self.datasets(run, settings, eval_data)
        args = self.args(folder)
        model, peft_config, teacher = self.build_taught(run, args, weights)
        return self.trainer(
            model,
            args,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=run.reader(self.model),
            peft_config=peft_config,
            **self.parts(run, model, weights, None if eval_data is None else held_out),
            teacher=teacher,
        )

    def build_taught(self, run: RunModels, args: Any, weights: str | None) -> tuple[Any, Any, Any]:
        """`(policy, configuration of a new adapter or None, teacher or None)`."""
        return *self.policy(run, weights), None

    def parts(self, run: RunModels, model: Any, weights: str | None, other_rows: Any) -> dict[str, Any]:
        """What the trainer of this kind takes beside model and data; `other_rows`: those of `eval_data`."""
        return {"objective": self.bound}

    # ---- run ----

    def run(self, run: RunModels, folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Train, evaluating the held-out rows before and after; resumes from the last checkpoint.

        Raises KeyboardInterrupt, with a checkpoint saved, if the user stopped it.
        """
        main = run.state.is_main_process
        trainer = self.build(run, folder, settings)
        trackers = show.Trackers(trainer, run.run_dir / FILE, partial(self.store_samples, run, trainer))
        checkpoint = last_complete_checkpoint(folder)
        metrics_file = folder / "metrics.json"
        metrics: dict[str, Any] = read_json(metrics_file) if checkpoint and metrics_file.exists() else {}
        has_eval = trainer.eval_dataset is not None
        if has_eval and hasattr(trainer.eval_dataset, "__len__"):
            metrics["held_out"] = len(trainer.eval_dataset)  # how many rows an interval is of
        if has_eval and "before" not in metrics:
            before = plain_metrics(trainer.evaluate())
            metrics["before"] = self.compared(before, trainer.reference, trainer.log_ratio_rms, before=True)
            if main:
                write_json(metrics_file, metrics)
        said = read_json(folder / ANSWERS) if checkpoint and (folder / ANSWERS).exists() else {}
        self.note_answers(run, trainer, said, "start")
        run.console.print(models.trained(trainer.model, whole=self.lora is None))
        progress = show.ShowProgress(run.console, self.name)
        trainer.add_callback(progress)
        try:
            with StopOnSignal(run.state.num_processes) as stop:
                trainer.add_callback(stop)
                result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            progress.close()
        if stop.requested and trainer.state.global_step < trainer.state.max_steps:
            raise KeyboardInterrupt
        run.stop_requested = stop.requested
        show.print_end(run.console, trainer)
        metrics["train"] = {"steps": result.global_step, "loss": result.training_loss}
        if has_eval:
            metrics["after"] = self.compared(plain_metrics(trainer.evaluate()), trainer.reference, before=False)
        trackers.close()
        metrics |= self.save(run, trainer, folder / "model")
        if main:
            if self.model.save_dtype is not None:
                models.recast(folder / "model", self.model.save_dtype)
            facts: dict[str, Any] = {
                "base": self.recipe.model.path or "",
                "name": f"{self.recipe.method}-{self.name}",
                "method": self.recipe.method,
                "metrics": metrics,
            }
            rows = self.recipe.data.train if self.data.stage is not None else self.data.train
            write_text(folder / "model" / "README.md", model_card(trainer, **facts, data=rows))
        if main and "save_total_limit" not in self.training:  # the finished model is what is wanted
            for path in checkpoints(folder):
                remove_folder(path)
            shutil.rmtree(folder / STAGING, ignore_errors=True)
        self.note_answers(run, trainer, said, "trained")
        self.store_samples(run, trainer)
        return metrics

    def save(self, run: RunModels, trainer: Any, folder: Path) -> dict[str, Any]:
        """Save the finished model; returns further metrics of it."""
        trainer.save_model(str(folder))
        return {}

    def note_answers(self, run: RunModels, trainer: Any, said: dict[str, Any], when: str) -> None:
        """Note, if it is a policy, how it continues a few prompts. All processes take part."""

    def store_samples(self, run: RunModels, trainer: Any) -> None:
        """Store what the trained model says of a few pairs, if that is credit. All processes take part."""

    # ---- evaluate ----

    samples_rows: ClassVar[bool] = False
    """Whether held-out rows are prompts, which the policy completes."""

    @property
    def in_world(self) -> bool:
        """Whether a world knows the truth about what the model samples."""
        return is_world(self.recipe.data.train) and self.recipe.model.is_world

    def held_out(self, trainer: Any, samples: int | None) -> dict[str, Any]:
        """The objective's metrics of the held-out rows, if there are any."""
        if trainer.eval_dataset is None:
            return {}
        metrics = self.compared(plain_metrics(trainer.evaluate()), trainer.reference, before=False)
        count = {"rows": len(trainer.eval_dataset)} if hasattr(trainer.eval_dataset, "__len__") else {}
        return {"objective": trainer.objective.describe(), **count, "held_out": metrics}

    def world_numbers(self, run: RunModels, model: Any, weights: str, samples: int | None) -> dict[str, Any]:
        """What the world says of the model, and of the one that the run started from."""
        if not self.in_world:
            return {}
        world, found = load_world(str(self.recipe.data.train)), {}
        for key, judged in (("world", model), ("world_base", run.frozen(self.recipe.model))):
            title = f"samples of the {'trained' if key == 'world' else 'base'} model in the world {world.name}"
            with progress_bar(title, quiet=run.console.quiet) as update:
                found[key] = world.evaluate(judged, n=samples, seed=self.recipe.seed, progress=counting(update))
        return found


def _without_objects(step: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a rollout credit, as its function takes them."""
    return {k: v for k, v in step.items() if k not in ("name", "source", *CreditSpec.MODELS)}


def _check_same_lora(lora: LoraSpec, path: str) -> None:
    saved = read_json(Path(path) / models.ADAPTER)
    for ours, theirs in (("r", "r"), ("alpha", "lora_alpha"), ("use_rslora", "use_rslora"), ("use_dora", "use_dora")):
        value, there = getattr(lora, ours), saved.get(theirs, False)
        require(
            value == there,
            ModelError,
            f"lora.{ours} is {value}, but the stage resumes from adapter {path}, where it is {there}; give the same "
            "value, or set lora: null to train all weights",
        )


def plain_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Evaluation metrics without what only says how fast they were measured."""
    hidden = ("_runtime", "_per_second", "epoch")
    return {k.removeprefix("eval_"): v for k, v in metrics.items() if not k.endswith(hidden)}


class StopOnSignal(TrainerCallback):
    """Turns the first SIGINT or SIGTERM into "save and stop after this optimiser step".

    A context manager; a second signal acts at once. It does nothing outside the main thread, where Python handles no
    signals, or with several processes, which would not stop at the same step: the last checkpoint serves there.
    """

    def __init__(self, processes: int = 1) -> None:
        self.requested = False
        self._active = processes == 1 and threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if self._active:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.__exit__()

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.requested:
            control.should_save = True
            control.should_training_stop = True


class Sft(Trained):
    """Supervised fine-tuning on the chosen completions (or on `prompt` and `completion`)."""

    kind = "sft"

    def rows(self) -> tuple[Rows, Rows | None]:
        return open_rows(self.data, self.recipe.seed, demonstrations=True)

    @property
    def objective(self) -> dict[str, Any]:
        return {"name": "sft"}


class Reward(Trained):
    """Trains a token-level reward model on preference pairs."""

    kind = "reward"
    needs_causal = "whose decoder has read prompt and completion where it scores a token"
    makes = "a reward model, for a reward or credit {name: reward_model}"
    _starts = (*LANGUAGE, "reward")
    lora_config = staticmethod(models.reward_lora_config)

    def check_rows(self, run: RunModels, settings: Mapping[str, Any]) -> None:
        check_given_files(run, self, settings)
        super().check_rows(run, settings)

    def load(self, path: str, **options: Any) -> Any:
        return models.load_reward_model(self.model, path, **options)

    @staticmethod
    def is_adapter(path: str) -> bool:
        return models.is_adapter(path) and models.is_reward_adapter(path)

    def save(self, run: RunModels, trainer: Any, folder: Path) -> dict[str, Any]:
        """Also measures and stores the distribution of scores, of tokens and of completions."""
        model, rows = trainer.evaluation_model(), trainer.train_dataset
        statistics = models.measure_both(model, rows, trainer.objective.hyper["pooling"])
        trainer.save_model(str(folder))
        if run.state.is_main_process:
            models.save_statistics(folder, *statistics)
        return {"scores": {name: value for one in statistics for name, value in one.as_dict().items()}}

    @property
    def in_world(self) -> bool:
        return False

    def world_numbers(self, run: RunModels, model: Any, weights: str, samples: int | None) -> dict[str, Any]:
        """How well the token scores agree with the exact advantage."""
        if not is_world(self.recipe.data.train):
            return {}
        credit = make_credit("reward_model", model=run.reward_model(self.model.at(weights)))
        return {"world": load_world(self.recipe.data.train).credit_recovery(credit)}


class Policy(Trained):
    """Trains a policy, against a reference and perhaps towards a teacher."""

    @property
    def reference_model(self) -> ModelSpec | None:
        """The reference, if it is a model of its own."""
        named = self.reference in (None, "copy", ADAPTER_OFF, "columns")
        return None if named else ModelSpec.model_validate(self.reference)

    @property
    def asks(self) -> dict[str, Asked]:
        teacher = self.teacher
        named = {f"teacher.{role}": getattr(teacher, role, None) for role in ("target", "contrast")}
        named = {"reference": self.reference_model, **named}
        return {key: Asked(spec) for key, spec in named.items() if spec is not None}

    def check_parts(self, where: str, objective: BoundObjective, found: Mistakes) -> None:
        if self.reference == ADAPTER_OFF and self.lora is None:
            found.add(f"{where}.reference", "adapter_off needs lora; without it the weights change: use copy")
        if self.teacher is not None:  # without a contrast nothing else can be wrong
            with found.at(f"{where}.teacher{'.contrast' if self.teacher.contrast is None else ''}"):
                self.make_teacher(self.teacher, lambda spec, name: spec)

    def decides(self, run_dir: Path, above: Mapping[str, str]) -> dict[str, Any]:
        spec, reference = self.teacher, self.reference_model
        values = super().decides(run_dir, above)
        values["reference"] = model_content(reference, run_dir, above) if reference else self.reference
        if spec is not None:
            roles = {"target": spec.target, "contrast": spec.contrast}
            contents = {k: model_content(m, run_dir, above) if m is not None else None for k, m in roles.items()}
            values["teacher"] = spec.model_dump(exclude=set(roles)) | contents
        return values

    def build_reference(self, run: RunModels) -> Any:
        """What the trainer gets as `reference`; None leaves the choice to it."""
        if self.reference == "columns":
            return ColumnReference()
        spec = self.model if self.reference == "copy" else self.reference_model
        return self.reference if spec is None else run.frozen(spec)  # None or "adapter_off"

    def build_taught(self, run: RunModels, args: Any, weights: str | None) -> tuple[Any, Any, Any]:
        """`(policy, configuration of a new adapter or None, teacher or None)`.

        Teachers that are adapters on the policy's own base are loaded beside its adapter, which it then has already.
        """
        model, peft_config = self.policy(run, weights)
        if self.teacher is None:
            return model, peft_config, None
        if peft_config is not None:
            model, peft_config = with_adapter(model, args, peft_config), None
        return model, peft_config, self.make_teacher(self.teacher, partial(run.beside, model))

    def make_teacher(self, spec: TeacherSpec, found: Callable[[ModelSpec, str], Any]) -> Any:
        """The objective's teacher; `found(spec, name)` gives its models. None if the objective has none."""
        build = OBJECTIVES.find(self.objective["name"]).teacher
        if build is None:
            return None  # said elsewhere
        roles = {"target": spec.target, "contrast": spec.contrast}
        models = {name: found(asked, name) for name, asked in roles.items() if asked is not None}
        return build(**models, **spec.settings(self.objective))


class Train(Policy):
    """Trains on preference pairs."""

    kind = "train"

    @property
    def asks(self) -> dict[str, Asked]:
        return {**credit_asks(self.credit), **super().asks}

    def describe(self) -> str:
        maker = self.above.get(str(self.data.stage)) if self.credit is None else None
        given = self.credit if maker is None or maker.credit is None else {"name": maker.credit.get("name")}
        if not self.bound.roles or not given:
            return super().describe()
        role = resolve_role(given.get("as"), self.bound.roles, self.bound.name, self.bound.no_credit)
        return f"{super().describe()}, credit {given.get('name', 'column')} as {role.name}"

    def check(self, found: Mistakes) -> None:
        if self.credit is not None:
            check_source(self.credit, f"stages.{self.name}.credit", found)
        super().check(found)

    def check_parts(self, where: str, objective: BoundObjective, found: Mistakes) -> None:
        super().check_parts(where, objective, found)
        if self.credit is None:
            with found.at(f"{where}.teacher"):
                check_together(objective, None, self.teacher)
        elif not found.about(f"{where}.credit"):
            with found.at(f"{where}.credit"):
                self._check_credit_fits(objective, CreditSpec.of(self.credit))
        if self.reference is not None and not objective.needs & FROZEN:
            found.add(f"{where}.reference", f"objective {objective.name} has no reference; drop it")
        if self.reference == "columns" and "kl" in objective.needs:
            found.add(
                f"{where}.reference",
                f"objective {objective.name} needs the reference's whole distribution, which stored ref_logps do not "
                "hold; use copy or adapter_off",
            )

    def _check_credit_fits(self, objective: BoundObjective, credit: CreditSpec) -> None:
        """Credit must suit the objective in its role, and come from one place."""
        role = resolve_role(credit.role, objective.roles, objective.name, objective.no_credit)
        check_together(objective, role, self.teacher)
        alone = self.data.stage is None or credit.kind.column_with(credit.settings)
        require(alone, RecipeError, f"the data '@{self.data.stage}' have token rewards already; drop one")
        reason = why_not(credit.kind.values_with(credit.settings), role.uses)
        require(not reason, RecipeError, f"{credit.name} as {role.name}: {reason}")

    def decides(self, run_dir: Path, above: Mapping[str, str]) -> dict[str, Any]:
        return {**super().decides(run_dir, above), "credit": credit_content(self.credit, run_dir, above)}

    def check_rows(self, run: RunModels, settings: Mapping[str, Any]) -> None:
        """The rows must also have the per-token columns that nothing else gives."""
        check_given_files(run, self, settings)
        super().check_rows(run, settings)
        if self.data.stage is not None:
            return
        for part, dataset in enumerate(run.datasets(self, like=self.existing.model)):
            if dataset is not None:
                needed = self._columns_needed(getattr(dataset, "columns", ()))
                stored = {"ref_logps"} if self.reference == "columns" and part == 0 else set()
                self._require_columns(dataset, needed | stored)

    def _columns_needed(self, present: Collection[str]) -> set[str]:
        """Per-token columns that the rows, which have those `present`, must have: nothing else gives them."""
        if self.credit is not None:
            credit = CreditSpec.of(self.credit)
            return {credit.kind.column_with(credit.settings)} - {""}
        needed = set(self.bound.needs) - FROZEN - TAUGHT
        if "selected" in needed - set(present) or ("spans" in needed - set(present) and "token_rewards" in present):
            return needed - {"selected", "spans"} | {"token_rewards"}
        return needed

    def _require_columns(self, dataset: Any, needed: Iterable[str]) -> None:
        missing = sorted(set(needed) - set(getattr(dataset, "columns", needed)))
        columns = ", ".join(f"{side}_{name}" for name in missing for side in ("chosen", "rejected"))
        expected = f"columns {columns} in the data, an annotate stage (data: '@stage'), or `credit:`"
        if missing == ["spans"]:
            expected = "data.spans: diff, tags, column or a function; or `credit:` to mark them by"
        what = f"stage {self.name!r} needs {', '.join(missing)}, and nothing gives them"
        require(not missing, DataError, what, file=self.data.train, expected=expected)

    def parts(self, run: RunModels, model: Any, weights: str | None, other_rows: Any) -> dict[str, Any]:
        objective, credit = (self.bound, self.credit) if other_rows is None else self._for_rows_of(other_rows)
        reference = self.build_reference(run)
        if weights is not None and reference in (None, ADAPTER_OFF) and objective.needs & FROZEN:
            reference = run.frozen(self.model)
        return {
            "objective": objective,
            "credit": run.credit(credit, self.model) if credit is not None else None,
            "credit_as": (credit or {}).get("as"),
            "reference": reference,
        }

    def _for_rows_of(self, rows: Any) -> tuple[BoundObjective, dict[str, Any] | None]:
        """Objective and credit for other rows than the stage's, which may lack the credit that came with its data.

        DPO or SimPO then judges them, with the same settings where the whole completion is scored.
        """
        objective, present = self.bound, getattr(rows, "columns", ())
        if self._columns_needed(present) <= set(present):
            return objective, self.credit
        compared = "ref_logps" in objective.needs
        keys = ("beta",) if compared else ("beta", "gamma", "gamma_beta_ratio")
        shared = {} if "selected" in objective.needs else {k: objective.hyper[k] for k in keys if k in objective.hyper}
        return make_objective("dpo" if compared else "simpo", **shared), None

    def note_answers(self, run: RunModels, trainer: Any, said: dict[str, Any], when: str) -> None:
        """Of the run's last stage: what the model says to a few held-out prompts, greedily, for the report.

        Not where it cannot be sampled from as it stands: sharded.
        """
        dataset = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
        last, plain = self.name == list(self.recipe.stages)[-1], hasattr(dataset, "__len__")
        if not (last and plain) or trainer.is_fsdp_enabled or when in said:
            return
        model = trainer.evaluation_model()
        held_out = [dataset[i] for i in range(min(ANSWERED, len(dataset)))]
        before = 0 if prompt_role(model) == "encoder" else max(len(sample.prompt_ids) for sample in held_out)
        room = (positions(unwrapped(model)) or math.inf) - before
        if not run.state.is_main_process or room < 1:
            return
        tokenizer, most = run.tokenizer(self.model), int(min(ANSWER_TOKENS, room))
        items = [PromptItem(s.prompt_ids, row=number, vision=s.vision) for number, s in enumerate(held_out)]
        sampling = SamplingConfig(temperature=0, max_new_tokens=most)
        said["prompts"] = decode(tokenizer, [item.ids for item in items])
        try:
            found = answering(model, tokenizer).sample(items, n=1, sampling=sampling)
        except Exception as error:  # whatever it is: these are for show, and the run continues
            run.console.print(f"no answers for the report: {error}", markup=False)
            return
        said[when] = found.texts(tokenizer)
        write_json(Path(trainer.args.output_dir) / ANSWERS, said)

    def store_samples(self, run: RunModels, trainer: Any) -> None:
        """Store each token's log-ratio of the trained policy to its reference (nats)."""
        dataset = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
        if trainer.reference is None or not hasattr(dataset, "__len__"):
            return
        batch = first_pairs(dataset)
        model = trainer.evaluation_model().eval()
        with torch.no_grad():
            judged = trainer.judge(model, batch.to(trainer.args.device), measure=("log_ratio", "whole"))
        if run.state.is_main_process and judged.log_ratio is not None:
            store_credit(run, self, batch, f"{LOG_RATIO}{self.name}", judged.log_ratio.float().cpu())


class Online(Policy):
    """Trains on completions that the policy samples itself, scored by reward functions."""

    kind = "online"
    needs_causal = "since samplers continue the prompt's own tokens"
    config = OnlineConfig
    trainer = OnlineTrainer
    credit = property(lambda self: None)  # the steps of its `credit:` are no source of credit for rows
    samples_rows = True

    @property
    def training(self) -> dict[str, Any]:
        """Without what the recipe says of the other stages' batches of rows."""
        own = self.own.training
        return {k: v for k, v in super().training.items() if k not in OF_ROWS or k in own}

    @property
    def asks(self) -> dict[str, Asked]:
        found = {}
        for index, reward in enumerate(self.own.rewards):
            if "model" in reward_objects(str(reward.get("name"))) and reward.get("model") is not None:
                found[f"rewards[{index}].model"] = Asked(ModelSpec.model_validate(reward["model"]), ("reward",), True)
        either = (*LANGUAGE, "reward")
        for index, step in enumerate(self.own.credit):
            source = step.get("source")
            for where, given in {"": step, ".source": source if isinstance(source, dict) else {}}.items():
                for name, asked in credit_asks(given).items():
                    key = f"credit[{index}]{where}.{name.removeprefix('credit.')}"
                    found[key] = Asked(asked.spec, either, bool(where) and asked.own_text)
        if (critic := (self.own.critic or {}).get("model")) is not None:
            found["critic.model"] = Asked(ModelSpec.model_validate(critic), either)
        return {**found, **super().asks}

    # ---- check ----

    def check_objective(self, objective: BoundObjective) -> None:
        what = f"{objective.name} does not learn from samples' advantages; use a stage of kind train"
        require(objective.needs & (TAUGHT | {"advantages"}), RecipeError, what)

    def check(self, found: Mistakes) -> None:
        super().check(found)
        where, own = f"stages.{self.name}", self.own
        phases = [self._check_step(step, f"{where}.credit[{i}]", found) for i, step in enumerate(own.credit)]
        setters = [str(step["name"]) for step, phase in zip(own.credit, phases, strict=True) if phase == "advantages"]
        if len(setters) > 1:
            found.add(f"{where}.credit", f"{' and '.join(setters)} all set the advantages; expected one of them")
        if self.teacher is None:  # who learns from a teacher needs no reward
            if not own.rewards and "rewards" not in phases:
                hint = "expected for example [{name: math}], or a step such as token_rewards"
                found.add(f"{where}.rewards", f"missing; {hint}")
            for index, reward in enumerate(own.rewards):
                self._check_reward(reward, f"{where}.rewards[{index}]", found)
        with found.at(f"{where}.sampler"):
            self._check_refresh(check_sampler(own.sampler), f"{where}.sampler", found)
        with found.at(f"{where}.training"):
            check_sharding(self.training.get("fsdp"), own.sampler)
        if own.critic is not None:
            with found.at(f"{where}.critic"):
                validate_settings("critic", Critic, {k: v for k, v in own.critic.items() if k != "model"})

    def check_parts(self, where: str, objective: BoundObjective, found: Mistakes) -> None:
        super().check_parts(where, objective, found)
        with found.at(f"{where}.teacher"):
            check_together(objective, None, self.teacher)
        with found.at(f"{where}.training"):
            check_ahead(self.training.get("max_staleness", 0), self.own.sampler, objective)
        if self.reference == "columns":
            what = "sampled completions have no stored columns; use copy, adapter_off or a model"
            found.add(f"{where}.reference", what)

    def check_together(self, found: Mistakes) -> None:
        super().check_together(found)
        where, args, objective = f"stages.{self.name}", self.args("unused"), self.bound
        planned, weights = [], dict[str, float | None]()
        for step in self.own.credit:
            kind = ROLLOUT_CREDIT.find(step["name"])
            if kind.own:
                return  # what one's own asks and gives may depend on its constructor
            planned.append(BoundRolloutCredit(kind, {}, kind.settings(_without_objects(step))))
        shared = keyword_types(RewardFunction)
        for reward in self.own.rewards:
            given = RewardFunction.settings(reward["name"], {k: v for k, v in reward.items() if k in shared})
            name = given["name"] or reward["name"].rpartition(":")[2]
            weights[name] = None if given["evaluate_only"] else given["weight"]
        with found.at(f"{where}.credit"):
            credits = with_implied(resolve_rollout_credit(planned), objective, args)
            check_credits(objective, credits, args, self.own.critic)
            with found.at(f"{where}.rewards"):
                check_rewards(objective, credits, args.correct_from, weights)

    @property
    def unread(self) -> dict[str, str]:
        found = super().unread
        what = "which says nothing of rollouts; expected prompts_per_rollout and minibatches"
        given = {**self.recipe.training, **self.own.training}
        if "per_device_train_batch_size" not in self.own.training:  # the recipe's is for stages that read rows
            given.pop("per_device_train_batch_size", None)
        found |= {f"training.{n}": f"is {given[n]}, {what}" for n in OF_ROWS if given.get(n, 1) != 1}
        found["data.spans"] = "sampled completions have no spans; expected a stage that learns from pairs, or none"
        kinds = [(ROLLOUT_CREDIT.find(step["name"]), step) for step in self.own.credit]
        if not any(":" in step["name"] or kind.attributes(step)["refill"] for kind, step in kinds):  # one's own may
            what = "says how often dropped prompts are replaced, and no credit drops any to be replaced"
            found["training.max_refills"] = f"{what}; expected a filter such as {{name: filter_groups, refill: true}}"
        return found

    def _check_reward(self, reward: dict[str, Any], where: str, found: Mistakes) -> None:
        name = reward.get("name")
        asked = reward_objects(str(name)) & {"model"}
        settings = {k: v for k, v in reward.items() if k != "name" and k not in asked}
        if asked and reward.get("model") is None:
            found.add(f"{where}.model", "missing; expected '@STAGE' (a stage of kind reward) or a path")
        if not isinstance(name, str):
            found.add(f"{where}.name", "missing")
            return
        with found.at(where):
            if name != WORLD_REWARD:
                check_reward(name, settings)
                return
            RewardFunction.settings(name, settings)
            what = "the data are no world, so there is no reward of a world; expected another one, such as [numeric]"
            hint = "given --model as well, a recipe takes its reward for real prompts"
            require(is_world(self.data.train), RecipeError, f"{what} ({hint})")

    def _check_step(self, step: dict[str, Any], where: str, found: Mistakes) -> str | None:
        """Note what a rollout credit refuses; returns its phase."""
        name = step.get("name")
        with found.at(where):
            if not isinstance(name, str):
                raise RecipeError("name is missing; expected for example {name: group}")
            kind = ROLLOUT_CREDIT.find(name)
            kind.settings(_without_objects(step))
            for key in sorted({"source", *CreditSpec.MODELS} & set(step) - kind.objects):
                found.add(f"{where}.{key}", f"credit {name} takes no {key}; drop it")
            if step.get("source") is not None:
                with found.at(f"{where}.source"):
                    source = CreditSpec.of(named_source(step["source"]))
                    source.kind.settings(source.settings)
            return str(kind.attributes({})["phase"])
        return None

    def _check_refresh(self, sampler: dict[str, Any], where: str, found: Mistakes) -> None:
        """A server needs to know how it gets the present weights."""
        given = self.own.sampler
        if "sampler" in sampler:
            sampler, given, where = sampler["sampler"], given.get("sampler"), f"{where}.sampler"
        fitting = "adapter" if self.lora is not None else "checkpoint"
        if "refresh" in sampler and "refresh" not in given:
            hint = f"expected {fitting}, or none for a server that keeps the weights it has"
            found.add(f"{where}.refresh", f"missing; {hint}")
        elif sampler.get("refresh", "none") not in (fitting, "none", "nccl" if self.lora is None else fitting):
            why = "an adapter is trained" if self.lora is not None else "no adapter is trained (no lora)"
            found.add(f"{where}.refresh", f"got {sampler['refresh']!r}, but {why}; expected {fitting}")

    def decides(self, run_dir: Path, above: Mapping[str, str]) -> dict[str, Any]:
        own = self.own
        values = own.model_dump(include={"rewards", "credit", "critic", "prompts"})
        sampler = check_sampler(own.sampler)
        values["sampler"] = deciding(sampler)
        parts = [*own.rewards, *own.credit, own.sampler, sampler.get("sampler")]  # which branching has within
        named = [part["name"] for part in parts if part and ":" in part.get("name", "")]
        kinds = [(REWARDS[reward["name"]], reward) for reward in own.rewards if reward["name"] in REWARDS]
        named += [str(reward[key]) for kind, reward in kinds for key in kind.code if reward.get(key) is not None]
        # Another body is another reward.
        functions = {name: fingerprint(source_of(load_callable(name))) for name in named}
        sources = [named_source(step["source"]) for step in own.credit if step.get("source") is not None]
        return {
            **super().decides(run_dir, above),
            "online": values,
            "asked": {k: model_content(a.spec, run_dir, above) for k, a in self.asks.items()},
            "functions": functions,
            "sources": [credit_content(source, run_dir, above) for source in sources],
        }

    # ---- build ----

    def describe(self) -> str:
        names = {key: " ".join(one.get("name", "?") for one in getattr(self.own, key)) for key in ("rewards", "credit")}
        what = f"{in_words(self.objective.get('name', '?'), self.objective)} from {self.model.describe()}"
        credit = f", credit {names['credit']}" if names["credit"] else ""
        lora = ", LoRA" if self.lora else ""
        return f"{what}{lora}, rewards {names['rewards']}{credit}, sampler {self.own.sampler['name']}"

    def rows(self) -> tuple[Rows, Rows | None]:
        return open_rows(self.data, self.recipe.seed, prompts=True)

    @property
    def row_form(self) -> Any:
        return self.own.prompts.model_dump()

    def check_golds(self) -> None:
        given = [dict(reward) for reward in self.own.rewards]
        names = [reward.pop("name") for reward in given]
        compares = [n in REWARDS and hasattr(REWARDS[n].build, "unreadable") for n in names]
        rewards = [make_reward(n, **r) for n, r, own in zip(names, given, compares, strict=True) if own]
        tasks = self.training.get("task_column")
        for rows in self.rows() if rewards or tasks is not None else ():
            if rows is not None:
                if rewards:
                    RewardSuite(rewards).check_golds((*rows.place(place), row) for place, row in rows)
                check_tasks(tasks, ((*rows.place(place), row) for place, row in rows))

    def prepare(self, rows: Any, tokenizer: Any, positions: int | None, role: PromptRole) -> Any:
        config, options = tokenize_config(self.data), self.own.prompts.model_dump()
        return PromptDataset.from_rows(rows, tokenizer, config, name=rows.name, **options)

    def parts(self, run: RunModels, model: Any, weights: str | None, other_rows: Any) -> dict[str, Any]:
        """A finished policy is sampled from in this process, whatever the stage's sampler."""
        rewards = [self._reward(run, reward) for reward in self.own.rewards]
        return {
            "objective": self.bound,
            "rewards": RewardSuite(rewards, tokenizer=run.tokenizer(self.model)) if rewards else None,
            "credit": [run.rollout_credit(step, self.model) for step in self.own.credit],
            "sampler": self.own.sampler if weights is None else None,
            "critic": self._critic(run, model),
            "reference": self.build_reference(run),
        }

    def _reward(self, run: RunModels, reward: dict[str, Any]) -> RewardFunction:
        """A reward with the models and tokenizers that it takes beside its settings."""
        name, settings = reward["name"], {k: v for k, v in reward.items() if k != "name"}
        if name == WORLD_REWARD:
            world: Any = load_world(str(self.data.train))
            return RewardFunction(world.reward, **{"name": WORLD_REWARD, **settings})
        takes = reward_objects(name)
        if "model" in takes:
            spec = ModelSpec.model_validate(reward["model"])
            settings["model"] = run.completion_model(spec)
            settings.setdefault("chat", self.own.prompts.chat)
            if "tokenizer" in takes:
                settings["tokenizer"] = run.tokenizer(self.model)
            if "reward_tokenizer" in takes:
                settings["reward_tokenizer"] = run.tokenizer(spec, own_template=True)
        return make_reward(name, **settings)

    def _critic(self, run: RunModels, policy: Any) -> Critic | None:
        """It starts from the model that `critic:` names, else from the policy."""
        if self.own.critic is None:
            return None
        settings = {k: v for k, v in self.own.critic.items() if k != "model"}
        if self.own.critic.get("model") is None:
            return Critic(policy, **settings)
        spec = ModelSpec.model_validate(self.own.critic["model"])
        source = models.load_reward_model(spec, run.path(spec), merge_adapter=True)
        return Critic(source.to(run.state.device), **settings)

    # ---- run ----

    def check_models(self, run: RunModels) -> None:
        super().check_models(run)
        self.check_server()
        for key, asked in self.asks.items():
            if key.startswith("rewards[") and asked.spec.stage is None:
                check_completion_model(asked.spec, run.path(asked.spec))

    def check_server(self, *, patient: bool = True) -> None:
        check_reachable(self.own.sampler, patient=patient)

    def save(self, run: RunModels, trainer: Any, folder: Path) -> dict[str, Any]:
        """Also says where groups of completions taught nothing, if those are most."""
        if (groups := trainer.groups).equal > groups.seen / 2:
            run.console.print(labelled("  warning", str(groups)), soft_wrap=True)
        return {**super().save(run, trainer, folder), "groups": vars(groups)}

    def held_out(self, trainer: Any, samples: int | None) -> dict[str, Any]:
        """Also says how held-out prompts are completed: `samples` times if given, unless the world samples."""
        args = trainer.args
        if samples is not None and not self.in_world:
            args.eval_generations = samples
            if samples > 1 and args.eval_temperature == 0:
                args.eval_temperature = args.temperature
        how = {"samples": args.eval_generations, "temperature": args.eval_temperature}
        return {"sampling": how, **super().held_out(trainer, samples)}
