"""`PreferenceConfig` and `OnlineConfig`: `transformers.TrainingArguments` with the settings of our trainers."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from importlib.util import find_spec
from itertools import count
from typing import Any, Literal, Self, cast, get_args

import torch
from torch.utils.data import IterableDataset
from transformers import TrainingArguments, get_scheduler
from transformers.integrations import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from tokengrain.batch import Sample
from tokengrain.errors import DataError, RecipeError, require
from tokengrain.loss import NormaliserName
from tokengrain.rollout.sampler import SamplingConfig, derived_seed
from tokengrain.scoring.layouts import Layout
from tokengrain.settings import nearest

LAUNCHER = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_USE_")}
"""What `accelerate launch` was asked for. Read at import: where a setting asks for FSDP, the same variables are set."""

_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "push_to_hub": ((False,), "push the finished model folder"),
    "deepspeed": ((None,), "use fsdp (FSDP2) to shard the model"),
    "parallelism_config": ((None,), "ranks hold different rows (DDP or FSDP2)"),
    "auto_find_batch_size": ((False,), "bound memory by max_tokens_per_microbatch"),
    "include_num_input_tokens_seen": (("no", False), "the log always has num_tokens"),
    "label_smoothing_factor": ((0.0,), "it is a setting of the objective: label_smoothing of dpo and simpo"),
    "neftune_noise_alpha": ((None,), "its noise depends on how prompts are laid out and cut into micro-batches"),
    "train_sampling_strategy": (("random", "sequential"), "max_tokens_per_microbatch cuts batches by length"),
    "torch_empty_cache_steps": ((None,), "bound memory by max_tokens_per_microbatch"),
    "bf16_full_eval": ((False,), "evaluation computes as training does: set bf16"),
    "fp16_full_eval": ((False,), "evaluation computes as training does: set fp16"),
    "batch_eval_metrics": ((False,), "evaluation keeps no predictions"),
    "include_for_metrics": (([], None), "evaluation keeps no predictions"),
}
"""Inherited settings that would be without effect, or with a wrong one: the values that are allowed, and the reason."""

_MOST: dict[str, int] = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 2**24
    ),
    **dict.fromkeys(("prompts_per_rollout", "num_generations", "eval_generations", "max_new_tokens"), 2**24),
    **dict.fromkeys(("minibatches", "rollout_epochs", "num_train_epochs", "dataloader_prefetch_factor"), 10**6),
    **dict.fromkeys(("max_steps", "warmup_steps", "top_k"), 2**40),
    **dict.fromkeys(("seed", "data_seed"), 2**32 - 1),
    "dataloader_num_workers": 256,
}
"""The most that a number can mean; more would take the machine's memory or processes before anything is said."""


_OF_TRL = {
    **dict.fromkeys(("beta", "epsilon", "epsilon_high"), "objective=make_objective(NAME, {name}=...)"),
    "loss_type": "objective=make_objective('dpo', loss_type=...), or another objective",
    **dict.fromkeys(("max_length", "max_prompt_length"), "tokenize=TokenizeConfig({name}=...)"),
    "max_completion_length": "max_new_tokens of OnlineConfig",
    "num_iterations": "rollout_epochs of OnlineConfig",
    "group_by_length": "nothing to set: batches are cut by length (max_tokens_per_microbatch)",
    "model_init_kwargs": "a loaded model",
}
"""Where the settings of TRL's configs are here: arguments of the trainer, if nothing else is said."""


@dataclass
class PreferenceConfig(TrainingArguments):
    """Settings of `PreferenceTrainer`: everything in `transformers.TrainingArguments` and what is below.

    `per_device_train_batch_size` counts *prompts* (preference pairs). A batch is cut into micro-batches of whole
    prompts, so that `max_tokens_per_microbatch` bounds memory; the result does not depend on where the cuts fall.

    Some inherited defaults differ: `learning_rate` 1e-6, `report_to` "none" (a local `log.jsonl` is always
    written to `output_dir`), no filter over non-finite losses (they stop the run), and `data_seed` = `seed`.

    Args:
        max_tokens_per_microbatch: most tokens (each prompt once, plus its completions) in one forward pass;
            None: the whole device batch. A prompt that is larger on its own gets a pass of its own.
        normaliser: how per-pair losses become the loss of an optimiser step: "mean" (over all pairs of the
            step, on all ranks and accumulation steps), "token_mean", "prompt_mean", "constant" or "sum".
        normaliser_constant: divisor of the normaliser "constant".
        disable_dropout: switch dropout off in the policy (LoRA dropout included). The reference never has any.
        layout: of prompts in a forward pass: "shared", "separate", or "auto" (shared where a probe shows that the
            model gives the same answers).
        chunk_tokens: tokens whose logits are formed at a time; None: chosen by the scorer.
        log_entropy: also log the policy's entropy (nats per token) on training batches, at the cost of one more
            reduction over the vocabulary; evaluation always measures it.
        sync_ref_model: every `ref_model_sync_steps` optimiser steps, the reference's weights become
            `ref_model_mixup_alpha` times the policy's plus the rest of their own, as in TRL (TR-DPO, arXiv
            2404.09656). The reference must have weights of its own.
        early_stopping_patience: end training after so many evaluations without a better `metric_for_best_model`; needs
            `load_best_model_at_end`. None: never.
        overwrite_output_dir: delete checkpoints and log of an earlier run in `output_dir` when training
            starts from scratch. Otherwise their presence is an error.

    Raises:
        RecipeError: a value out of range, or an inherited setting that would have no effect or a wrong one.
    """

    learning_rate: float = 1e-6
    logging_steps: float = 10
    report_to: str | list[str] | None = "none"
    remove_unused_columns: bool = False
    logging_nan_inf_filter: bool = False
    dataloader_pin_memory: bool = False
    ddp_find_unused_parameters: bool | None = False
    fsdp: bool | str | None = None  # type: ignore[assignment]  # transformers takes true too
    # YAML reads `no` as false.
    eval_strategy: Literal[False] | str = "no"  # type: ignore[assignment]
    logging_strategy: Literal[False] | str = "steps"  # type: ignore[assignment]
    save_strategy: Literal[False] | str = "steps"  # type: ignore[assignment]
    max_tokens_per_microbatch: int | None = None
    normaliser: NormaliserName = "mean"
    normaliser_constant: float | None = None
    disable_dropout: bool = True
    layout: Layout = "auto"
    chunk_tokens: int | None = None
    log_entropy: bool = False
    sync_ref_model: bool = False
    ref_model_mixup_alpha: float = 0.6
    ref_model_sync_steps: int = 512
    early_stopping_patience: int | None = None
    overwrite_output_dir: bool = False

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        names = [f.name for f in fields(cls)]
        for name in sorted(settings.keys() - set(names)):
            here, near = _OF_TRL.get(name, "").format(name=name), get_close_matches(name, names, n=1)
            hint = f"; the {name} of TRL's configs is here: {here}" if here else ""
            hint = hint or (f"; did you mean {near[0]!r}?" if near else "")
            raise RecipeError(f"{cls.__name__} has no setting {name!r}{hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in _STRATEGIES:
            if getattr(self, name) is False:
                setattr(self, name, "no")
        self._refuse_what_cannot_work()
        if self.data_seed is None:
            self.data_seed = self.seed
        # Each rank cuts its own batches; accelerate's default for streams is to slice tensors on rank 0.
        if self.accelerator_config is None or isinstance(self.accelerator_config, dict):
            self.accelerator_config = {"dispatch_batches": False, **(self.accelerator_config or {})}
        super().__post_init__()
        next(learning_rates(self, 1.0, 1000))  # another rate and another number of steps may be fitted later

    def steps_for(self, rows: int) -> int:
        """Optimiser steps of training on so many rows."""
        if self.max_steps > 0:
            return self.max_steps
        batch = self.per_device_train_batch_size * self.world_size
        return pass_steps(self.num_train_epochs, rows, batch, self.gradient_accumulation_steps)

    @property
    def batch_in_words(self) -> str:
        """What an optimiser step learns from, for people."""
        pairs = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size
        return f"batch {pairs}"

    def _refuse_what_cannot_work(self) -> None:
        layouts, optimiser = get_args(Layout), str(getattr(self.optim, "value", self.optim))
        beta1, beta2, epsilon = (float(x) for x in (self.adam_beta1, self.adam_beta2, self.adam_epsilon))
        rate, most, chunk = self.learning_rate, self.max_tokens_per_microbatch, self.chunk_tokens
        waits = self.early_stopping_patience
        for name, fits, expected in (
            ("remove_unused_columns", self.remove_unused_columns is False, "False in preference training"),
            ("logging_nan_inf_filter", self.logging_nan_inf_filter is False, "False in preference training"),
            ("layout", self.layout in layouts, f"one of {', '.join(layouts)}"),
            ("learning_rate", 0 <= float(rate) < math.inf, "finite and at least 0"),
            ("adam_beta1", 0 <= beta1 < 1, "at least 0 and below 1"),
            ("adam_beta2", 0 <= beta2 < 1, "at least 0 and below 1"),
            ("adam_epsilon", 0 <= epsilon < math.inf, "finite and at least 0"),
            ("weight_decay", 0 <= float(self.weight_decay) < math.inf, "finite and at least 0"),
            ("num_train_epochs", self.max_steps > 0 or self.num_train_epochs >= 0, "at least 0, or max_steps above 0"),
            ("max_tokens_per_microbatch", most is None or _is_whole(most, 1), "a positive integer or null"),
            ("chunk_tokens", chunk is None or _is_whole(chunk, 1), "a positive integer or null"),
            ("early_stopping_patience", waits is None or _is_whole(waits, 1), "a positive integer or null"),
            ("ref_model_mixup_alpha", 0 <= float(self.ref_model_mixup_alpha) <= 1, "from 0 to 1"),
            ("ref_model_sync_steps", _is_whole(self.ref_model_sync_steps, 1), "a positive integer"),
        ):
            require(fits, RecipeError, f"{name} must be {expected}, got {getattr(self, name)!r}")
        what = f"early_stopping_patience is {waits}, which seeks the best model; expected load_best_model_at_end: true"
        require(waits is None or self.load_best_model_at_end, RecipeError, what)
        for name, kind in (("optim", OptimizerNames), ("lr_scheduler_type", SchedulerType)):
            value, known = getattr(self, name), [one.value for one in kind]
            value = getattr(value, "value", value)
            require(value in known, RecipeError, f"{name} is {value!r}{nearest(str(value), known)}")
        for name, most in _MOST.items():
            value = getattr(self, name, None)
            above = isinstance(value, (int, float)) and value > most
            require(not above, RecipeError, f"{name} is {value!r}; expected at most {most}")
        for name, (allowed, reason) in _REFUSED.items():
            value = getattr(self, name)
            shown = " and ".join(map(repr, allowed))
            message = f"{name} is not supported, except {shown}, got {value!r}; {reason}"
            require(getattr(value, "value", value) in allowed, RecipeError, message)
        parallel = "tensor, context or sequence parallelism"
        for variable, what in (
            ("DEEPSPEED", "DeepSpeed"),
            ("MEGATRON_LM", "Megatron-LM"),
            ("PARALLELISM_CONFIG", parallel),
        ):
            message = f"accelerate was started with {what}, which is not supported; use fsdp (FSDP2) to shard the model"
            require(not launched_with(variable), RecipeError, message)
        if optimiser in ("lomo", "adalomo") or optimiser.endswith("_layerwise"):
            raise RecipeError(
                f"optim is {optimiser!r}, which changes weights during the backward pass of a micro-batch; a step is "
                "all of its micro-batches. Expected one that steps after them, such as adamw_torch"
            )


def pass_steps(epochs: float, rows: int, batch: int, accumulated: int) -> int:
    """Optimiser steps of passes over rows, as transformers counts them; `batch`: rows of all devices at a time."""
    return math.ceil(epochs * max(1, math.ceil(math.ceil(rows / batch) / accumulated)))


def rollout_steps(epochs: float, prompts: int, per_rollout: int, each: int) -> int:
    """Optimiser steps of passes over prompts, `each` per rollout."""
    return math.ceil(epochs * prompts / per_rollout) * each


def launched_with(what: str) -> bool:
    return LAUNCHER.get(f"ACCELERATE_USE_{what}", "false").lower() in ("1", "true")


def check_processes(world: int) -> None:
    """Raises `RecipeError` if a launcher started several processes that do not know each other: each would train alone.

    accelerate joins them by LOCAL_RANK, which job scripts that set RANK and WORLD_SIZE themselves tend to forget.
    """
    started = os.environ.get("WORLD_SIZE", "1")
    what = f"WORLD_SIZE is {started}, but this process trains alone (world size {world}); expected RANK, LOCAL_RANK, "
    what += "WORLD_SIZE, MASTER_ADDR and MASTER_PORT in every process, as torchrun sets them"
    require(world > 1 or not started.isdecimal() or int(started) <= 1, RecipeError, what)


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


class RepeatedStream(IterableDataset[Sample]):
    """Passes over a stream without end; its `set_epoch(pass)` is called if it has one, so that it may shuffle.

    transformers does not know how long a pass is. Given a stream that ends, it would carry the gradient of an
    unfinished step into the next one, and on resuming skip as if there had been a single pass.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.name = getattr(stream, "name", "train")
        self.fingerprint = getattr(stream, "fingerprint", None)

    def __iter__(self) -> Iterator[Sample]:
        if hasattr(self.stream, "load_state_dict"):
            # It would continue where an earlier run in this process stopped.
            self.stream.load_state_dict({"next_row": 0})
        for number in count():
            if hasattr(self.stream, "set_epoch"):
                self.stream.set_epoch(number)
            empty = True
            for sample in self.stream:
                empty = False
                yield sample
            require(not empty, DataError, "the stream has no rows", file=self.name, expected="at least one row")


def endless(dataset: Any, args: PreferenceConfig) -> Any:
    """A stream repeated without end; rows in memory as they are."""
    if dataset is None or hasattr(dataset, "__len__"):
        return dataset
    require(args.max_steps > 0, RecipeError, "a stream has no known length; set max_steps")
    refuse_epochs(args, "a stream is one long pass")
    what = f"dataloader_num_workers is {args.dataloader_num_workers}; each of them would read the whole stream"
    require(args.dataloader_num_workers <= 1, RecipeError, f"{what}. Expected 0 or 1, or rows in memory")
    return RepeatedStream(dataset)


def learning_rates(args: PreferenceConfig, rate: float, steps: int) -> Iterator[float]:
    """The learning rate at each of so many optimiser steps, where the schedule starts from `rate`.

    Raises `RecipeError` for a schedule that its settings do not make.
    """
    kind, more = args.lr_scheduler_type, cast(Any, args.lr_scheduler_kwargs)
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    try:
        warmup = args.get_warmup_steps(steps)
        schedule: Any = get_scheduler(kind, optimiser, warmup, steps, scheduler_specific_kwargs=more)
        for _ in range(steps):
            yield optimiser.param_groups[0]["lr"]
            optimiser.step()
            schedule.step()
    except (TypeError, ValueError, ArithmeticError) as error:
        what = f"lr_scheduler_type is {str(getattr(kind, 'value', kind))!r}, lr_scheduler_kwargs {more or 'not set'}"
        raise RecipeError(f"{what}: {error}; expected the arguments that this schedule has") from error


def check_rate(args: PreferenceConfig, steps: int, where: str = "training") -> None:
    """Raises `RecipeError` if the learning rate is 0 at every one of so many optimiser steps."""
    rate = float(args.learning_rate)
    if rate and any(found > 0 for found in learning_rates(args, rate, steps)):
        return
    what = f"{where}: the learning rate is 0 at every one of {steps} steps, so nothing would be learned"
    how = f"learning_rate {args.learning_rate:g}, {args.get_warmup_steps(steps)} steps of warm-up"
    raise RecipeError(f"{what} ({how}); expected a smaller batch, more epochs or warmup_steps: 0")


def check_held_out(args: PreferenceConfig, rows: Any, where: str = "training") -> None:
    """Raises `RecipeError` if rows are to be evaluated while training, and there are none."""
    strategy = getattr(args.eval_strategy, "value", args.eval_strategy)
    what = f"{where}: eval_strategy is {strategy!r}, and there are no held-out rows"
    require(rows is not None or strategy == "no", RecipeError, f"{what}; expected some, or eval_strategy 'no'")


_TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "azure_ml": ("azureml",), "comet_ml": ("comet_ml",)}
_OPTIMISERS = {
    "bitsandbytes": r"8bit|bnb|paged|ademamix",
    "galore_torch": "galore",
    "schedulefree": "schedule_free",
    "apollo_torch": "apollo",
    "grokadamw": "grokadamw",
    "torchao": r"adamw_torch_\dbit",
    "optimi": "stable_adamw",
    "apex": "apex",
}


def check_packages(args: PreferenceConfig) -> None:
    """Raises `RecipeError` if a tracker or the optimiser needs a package that is not installed."""
    asked = args.report_to if isinstance(args.report_to, list) else [args.report_to]
    for name in filter(None, asked):
        what = f"report_to is {name!r}, which is no tracker{nearest(name, INTEGRATION_TO_CALLBACK)}"
        require(name in ("none", "all") or name in INTEGRATION_TO_CALLBACK, RecipeError, what)
        known = _TRACKERS.get(name, (name,)) if name in INTEGRATION_TO_CALLBACK else ()
        there = name in ("none", "all") or not known or any(find_spec(package) for package in known)
        what = f"report_to is {name!r}, and the package {' or '.join(known)} is not installed"
        require(there, RecipeError, f"{what}: pip install {known[0] if known else name}")
    optimiser = str(getattr(args.optim, "value", args.optim))
    needed = next((package for package, names in _OPTIMISERS.items() if re.search(names, optimiser)), None)
    if optimiser.startswith("adamw_torch_") and needed == "bitsandbytes":
        needed = "torchao"
    what = f"optim is {optimiser!r}, and the package {needed} is not installed"
    require(needed is None or find_spec(needed), RecipeError, f"{what}: pip install {needed}")


_STRATEGIES = ("logging_strategy", "eval_strategy", "save_strategy")


def refuse_epochs(args: PreferenceConfig, reason: str) -> None:
    """Raises `RecipeError` if something should happen at the end of every epoch, where training has but one."""
    for name in _STRATEGIES:
        value, steps = getattr(args, name), name.replace("strategy", "steps")
        what = f"{name} is 'epoch', but {reason}, and an epoch never ends before the run does"
        require(getattr(value, "value", value) != "epoch", RecipeError, f"{what}; expected 'steps', with {steps}")


_LEAST = {
    **dict.fromkeys(("prompts_per_rollout", "num_generations", "minibatches", "rollout_epochs", "max_new_tokens"), 1),
    **dict.fromkeys(("max_empty_rollouts", "eval_generations", "rollout_samples_every"), 1),
    **dict.fromkeys(("max_refills", "rollout_samples"), 0),
}


@dataclass
class OnlineConfig(PreferenceConfig):
    """Settings of `OnlineTrainer`: those of `PreferenceConfig` and what is below.

    One rollout is `prompts_per_rollout` prompts with `num_generations` completions each; it is used for
    `minibatches * rollout_epochs` optimiser steps. `max_steps` counts optimiser steps; without it,
    `num_train_epochs` is how often the prompts are gone through; more often where filters replace prompts or leave
    fewer than there are minibatches. `per_device_*_batch_size`, `gradient_accumulation_steps` and the settings of data
    loaders (`dataloader_*`) have no say. `data_seed` orders the prompts, `seed` draws completions. The best checkpoint
    is by default the one with the largest `eval_reward`.

    Args:
        prompts_per_rollout: prompts of a rollout, over all ranks.
        num_generations: completions per prompt, the group size; they stay on one rank.
        minibatches: optimiser steps per pass over a rollout.
        rollout_epochs: passes over a rollout.
        max_new_tokens: longest completion; without an end by then it is truncated.
        temperature, top_p, top_k, min_p, stop, stop_ids: see `SamplingConfig`.
        logps_at_temperature: all log-probabilities (of policy and reference) and entropies are taken at
            `temperature`, as TRL and verl take them. Otherwise at 1: then another `temperature` makes the samples
            off-policy, which the rollout credit "importance" can weigh.
        max_staleness: by how many rollouts' updates the weights may be behind that a rollout is sampled from. 1: the
            next rollout is sampled while the trainer learns from this one, and the rollout credit "importance" weighs
            its tokens (it is added if it is not among the credits). 0: they take turns.
        shuffle_prompts: a new order in every pass over the prompts.
        max_refills: how often, in one rollout, prompts that a filter with `refill` dropped are replaced by others.
            If there are still too few, the rollout is smaller.
        max_empty_rollouts: an error after so many rollouts in a row of which nothing was left to train on.
        correct_from: the reward whose values above 0.5 count as correct; None: the first one.
        task_column: a column of the rows; what is earned is also logged by its values, as `task/<value>/...`.
        eval_generations: completions per prompt in evaluation; several only where eval_temperature is above 0.
        eval_temperature: 0 takes the most probable token. Other sampling settings are those of training.
        rollout_samples: completions per rollout that go to `rollouts.jsonl` with their tokens' numbers; 0: none.
        rollout_samples_every: rollouts from one such record to the next.
        log_entropy: the policy's entropy is logged and recorded; on by default here.

    Raises:
        RecipeError: as `PreferenceConfig`; what cannot work online.
    """

    prompts_per_rollout: int = 32
    num_generations: int = 8
    minibatches: int = 1
    rollout_epochs: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    logps_at_temperature: bool = False
    stop: list[str] = field(default_factory=list)
    stop_ids: list[int] | None = None
    max_staleness: int = 0
    shuffle_prompts: bool = True
    max_refills: int = 10
    max_empty_rollouts: int = 10
    correct_from: str | None = None
    task_column: str | None = None
    eval_generations: int = 1
    eval_temperature: float = 0.0
    rollout_samples: int = 4
    rollout_samples_every: int = 5
    log_entropy: bool = True

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            what = f"{name} must be a whole number, at least {least}, got {value!r}"
            require(_is_whole(value, least), RecipeError, what)
        seeks_best = self.load_best_model_at_end or self.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU
        if self.metric_for_best_model is None and seeks_best:
            self.metric_for_best_model = "reward"  # evaluation by sampling has no loss
        self._refuse_what_cannot_work_online()
        self.sampling()  # checks the settings
        self.eval_sampling()
        self.ignore_data_skip = True  # a rollout under way is resumed from the checkpoint
        super().__post_init__()
        # The number of processes is known only now.
        device, own = self.per_device_train_batch_size, type(self).__dataclass_fields__["per_device_train_batch_size"]
        what = f"per_device_train_batch_size is {device}, which nothing reads in online training; set "
        what += "prompts_per_rollout and minibatches, and max_tokens_per_microbatch for memory"
        require(device in (own.default, self.prompts_per_minibatch), RecipeError, what)

    def _refuse_what_cannot_work_online(self) -> None:
        accumulated, best = self.gradient_accumulation_steps, self.metric_for_best_model
        strategy = self.train_sampling_strategy
        what = f"gradient_accumulation_steps is {accumulated}; in online training a minibatch is an optimiser step"
        instead = "set prompts_per_rollout and minibatches, and max_tokens_per_microbatch for memory"
        require(accumulated == 1, RecipeError, f"{what}: {instead}")
        many = max(self.prompts_per_rollout * self.num_generations, self.eval_generations)
        require(many <= 2**24, RecipeError, f"a rollout would have {many} completions; expected at most {2**24}")
        what = f"max_staleness is {self.max_staleness!r}; expected 0 (sample, then train) or 1 (one rollout ahead)"
        require(_is_whole(self.max_staleness, 0) and self.max_staleness <= 1, RecipeError, what)
        alike = "a prompt's completions would all be the same"
        what = f"temperature is 0: {alike}, and no objective could tell them apart"
        instead = "a temperature above 0 (eval_temperature may be 0)"
        require(self.temperature != 0, RecipeError, f"{what}; expected {instead}")
        what = f"train_sampling_strategy is {strategy!r}; online training draws prompts itself: set shuffle_prompts"
        require(getattr(strategy, "value", strategy) == "random", RecipeError, what)
        what = f"eval_generations is {self.eval_generations} and eval_temperature 0: {alike}"
        differ = self.eval_generations == 1 or self.eval_temperature != 0
        require(differ, RecipeError, f"{what}. Expected eval_generations 1, or a temperature above 0")
        what = f"metric_for_best_model is {best!r}; online evaluation samples and has no loss"
        instead = "one of its metrics, such as reward or correct"
        require(best not in ("loss", "eval_loss"), RecipeError, f"{what}. Expected {instead}")
        refuse_epochs(self, "online training is one long pass")

    @property
    def logps_temperature(self) -> float:
        """What divides the logits of all log-probabilities."""
        return self.temperature if self.logps_at_temperature else 1.0

    @property
    def steps_per_rollout(self) -> int:
        return self.minibatches * self.rollout_epochs

    @property
    def prompts_per_minibatch(self) -> int:
        """Of one process."""
        return self.prompts_per_rollout // (self.world_size * self.minibatches)

    def steps_for(self, rows: int) -> int:
        if self.max_steps > 0:
            return self.max_steps
        return rollout_steps(self.num_train_epochs, rows, self.prompts_per_rollout, self.steps_per_rollout)

    @property
    def batch_in_words(self) -> str:
        several = f" x {self.num_generations} completions" if self.num_generations > 1 else ""
        each = f", {self.steps_per_rollout} steps each" if self.steps_per_rollout > 1 else ""
        return f"rollouts of {self.prompts_per_rollout} prompts{several}{each}"

    def sampling(self) -> SamplingConfig:
        """How rollouts are sampled; `.at(rollout)` gives the seed of each."""
        names = ("temperature", "top_p", "top_k", "min_p", "max_new_tokens", "stop", "stop_ids", "seed")
        return SamplingConfig(**{name: getattr(self, name) for name in names})

    def eval_sampling(self) -> SamplingConfig:
        """How evaluation samples: every time with the same seed."""
        greedy: dict[str, Any] = {"top_p": 1.0, "top_k": 0, "min_p": 0.0} if self.eval_temperature == 0 else {}
        seed = derived_seed(self.seed, "evaluation")
        return replace(self.sampling(), temperature=self.eval_temperature, seed=seed, **greedy)
