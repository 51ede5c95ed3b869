"""`PreferenceConfig`: `transformers.TrainingArguments` with the settings of preference training."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch.utils.data import IterableDataset
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from tokengrain.batch import Sample
from tokengrain.errors import DataError, RecipeError
from tokengrain.loss import NormaliserName
from tokengrain.rollout.sampler import SamplingConfig, derived_seed
from tokengrain.scoring.layouts import Layout

LAYOUTS = ("auto", "shared", "separate")

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


@dataclass
class PreferenceConfig(TrainingArguments):
    """Settings of `PreferenceTrainer`: everything in `transformers.TrainingArguments` and what is below.

    `per_device_train_batch_size` counts *prompts* (preference pairs). The memory of a step is bounded by
    `max_tokens_per_microbatch`, not by the batch size: a batch is cut into micro-batches of whole prompts and
    the result does not depend on where the cuts fall.

    Some inherited defaults differ: `learning_rate` 1e-6, `report_to` "none" (a local `log.jsonl` is always
    written to `output_dir`), no filter over non-finite losses (they stop the run), and `data_seed` = `seed`.
    What cannot work here is refused with the reason.

    Args:
        max_tokens_per_microbatch: most tokens (each prompt once, plus its completions) in one forward pass;
            None: the whole device batch. A prompt that is larger on its own gets a pass of its own.
        normaliser: how per-pair losses become the loss of an optimiser step: "mean" (over all pairs of the
            step, on all ranks and accumulation steps), "token_mean", "prompt_mean", "constant" or "sum".
        normaliser_constant: divisor of the normaliser "constant".
        disable_dropout: switch dropout off in the policy (LoRA dropout included). The reference never has
            any.
        layout: how prompts are laid out in a forward pass: "shared", "separate", or "auto" (shared where a
            probe shows that the model gives the same answers).
        chunk_tokens: tokens whose logits are formed at a time; None: chosen by the scorer.
        log_entropy: also log the policy's entropy (nats per token) on training batches. It costs one more
            reduction over the vocabulary; evaluation always measures it.
        overwrite_output_dir: delete checkpoints and log of an earlier run in `output_dir` when training
            starts from scratch. Otherwise their presence is an error.

    Raises:
        RecipeError: a value out of range, or an inherited setting that would have no effect or a wrong one.
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Log every this many optimiser steps."})
    report_to: str | list[str] | None = field(
        default="none", metadata={"help": "Trackers to report to; a local log.jsonl is always written."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Always False: rows are Samples."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Always False: they stop the run."})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "Pin host memory of batches."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Passed to DistributedDataParallel."}
    )
    max_tokens_per_microbatch: int | None = field(
        default=None, metadata={"help": "Most tokens in one forward pass; None: the whole device batch."}
    )
    normaliser: NormaliserName = field(default="mean", metadata={"help": "What the losses of a step are divided by."})
    normaliser_constant: float | None = field(default=None, metadata={"help": "Divisor of the normaliser 'constant'."})
    disable_dropout: bool = field(default=True, metadata={"help": "Switch dropout off in the policy."})
    layout: Layout = field(default="auto", metadata={"help": "auto, shared or separate."})
    chunk_tokens: int | None = field(default=None, metadata={"help": "Tokens whose logits are formed at once."})
    log_entropy: bool = field(default=False, metadata={"help": "Log the policy's entropy in training."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete an earlier run's checkpoints when starting from scratch."}
    )

    def __post_init__(self) -> None:
        self._refuse_what_cannot_work()
        if self.data_seed is None:
            self.data_seed = self.seed
        # Each rank cuts its own batches; accelerate's default for streams is to slice tensors on rank 0.
        self.accelerator_config = _without_dispatch(self.accelerator_config)
        super().__post_init__()

    def _refuse_what_cannot_work(self) -> None:
        for name, allowed in (("remove_unused_columns", False), ("logging_nan_inf_filter", False)):
            if getattr(self, name) is not allowed:
                raise RecipeError(f"{name} must be {allowed} in preference training, got {getattr(self, name)!r}")
        if self.layout not in LAYOUTS:
            raise RecipeError(f"layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        if not 0 <= float(self.learning_rate) < math.inf:
            raise RecipeError(f"learning_rate must be finite and at least 0, got {self.learning_rate!r}")
        for name in ("max_tokens_per_microbatch", "chunk_tokens"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise RecipeError(f"{name} must be a positive integer or null, got {value!r}")
        for name, (allowed_values, reason) in _REFUSED.items():
            value = getattr(self, name)
            if getattr(value, "value", value) not in allowed_values:
                raise RecipeError(f"{name} is not supported, except {_shown(allowed_values)}, got {value!r}; {reason}")
        optimiser = str(getattr(self.optim, "value", self.optim))
        if optimiser in ("lomo", "adalomo") or optimiser.endswith("_layerwise"):
            raise RecipeError(
                f"optim is {optimiser!r}, which changes weights during the backward pass of a micro-batch; a step is "
                "all of its micro-batches. Expected one that steps after them, such as adamw_torch"
            )


def _shown(values: tuple[Any, ...]) -> str:
    return " and ".join(repr(value) for value in values)


def _without_dispatch(config: Any) -> Any:
    """`accelerator_config` with `dispatch_batches` False unless it says otherwise in a dictionary."""
    if config is None:
        return {"dispatch_batches": False}
    if isinstance(config, dict):
        return {"dispatch_batches": False, **config}
    return config


# ----------------------------------------------------------------------------------------------------
# Streams as training data: read again from the start when they end, so that a run has one long pass.


class RepeatedStream(IterableDataset[Sample]):
    """Passes over a stream without end.

    transformers does not know how long a pass is. Given a stream that ends, it would carry the gradient of an
    unfinished step into the next one, and on resuming skip as if there had been a single pass.

    Args:
        stream: an iterable data set; `set_epoch(pass)` is called if it has one, so that it may shuffle.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.name = getattr(stream, "name", "train")
        self.fingerprint = getattr(stream, "fingerprint", None)

    def __iter__(self) -> Iterator[Sample]:
        number = 0
        if hasattr(self.stream, "load_state_dict"):
            # It would go on where an earlier run in this process stopped.
            self.stream.load_state_dict({"next_row": 0})
        while True:
            if hasattr(self.stream, "set_epoch"):
                self.stream.set_epoch(number)
            empty = True
            for sample in self.stream:
                empty = False
                yield sample
            if empty:
                raise DataError("the stream has no rows", file=self.name, expected="at least one row")
            number += 1


def endless(dataset: Any, args: PreferenceConfig) -> Any:
    """A stream repeated without end; rows in memory as they are.

    Raises:
        RecipeError: it is a stream, and nothing says how long to train, something should happen at the end of an epoch,
            or several workers would read it, each of them all of it.
    """
    if dataset is None or hasattr(dataset, "__len__"):
        return dataset
    if args.max_steps <= 0:
        raise RecipeError("a stream has no known length; set max_steps")
    refuse_epochs(args, "a stream is one long pass")
    if args.dataloader_num_workers > 1:
        raise RecipeError(
            f"dataloader_num_workers is {args.dataloader_num_workers}; each of them would read the whole stream. "
            "Expected 0 or 1, or rows in memory"
        )
    return RepeatedStream(dataset)


def refuse_epochs(args: PreferenceConfig, reason: str) -> None:
    """Raises `RecipeError` if something should happen at the end of every epoch, where training has but one."""
    for name in ("logging_strategy", "eval_strategy", "save_strategy"):
        value = getattr(args, name)
        if getattr(value, "value", value) == "epoch":
            raise RecipeError(
                f"{name} is 'epoch', but {reason}, and an epoch never ends before the run does; expected 'steps', with "
                f"{name.replace('strategy', 'steps')}"
            )


# ----------------------------------------------------------------------------------------------------
# `OnlineConfig`: the settings of `OnlineTrainer`.


@dataclass
class OnlineConfig(PreferenceConfig):
    """Settings of `OnlineTrainer`: those of `PreferenceConfig` and what is below.

    One rollout is `prompts_per_rollout` prompts with `num_generations` completions each; it is used for
    `minibatches * rollout_epochs` optimiser steps. `max_steps` counts optimiser steps; without it,
    `num_train_epochs` is how often the prompts are gone through; more often where filters replace prompts or leave
    fewer than there are minibatches. `per_device_train_batch_size`, `per_device_eval_batch_size` and
    `gradient_accumulation_steps` have no say: a minibatch is a step, and `max_tokens_per_microbatch` bounds memory.
    Nor have the settings of data loaders (`dataloader_*`). `data_seed` orders the prompts, `seed` draws completions.
    The best checkpoint is by default the one with the largest `eval_reward`.

    Args:
        prompts_per_rollout: prompts of a rollout, over all ranks.
        num_generations: completions per prompt, the group size; they stay on one rank.
        minibatches: optimiser steps per pass over a rollout.
        rollout_epochs: passes over a rollout.
        max_new_tokens: longest completion; without an end by then it is truncated.
        temperature, top_p, top_k, min_p, stop, stop_ids: see `SamplingConfig`. Objectives take probabilities at
            temperature 1; another one makes the samples off-policy, which the credit step "importance" can weigh.
        shuffle_prompts: a new order in every pass over the prompts.
        max_refills: how often, in one rollout, prompts that a filter with `refill` dropped are replaced by others.
            If there are still too few, the rollout is smaller.
        max_empty_rollouts: an error after so many rollouts in a row of which nothing was left to train on.
        correct_from: the reward whose values above 0.5 count as correct; None: the first one.
        eval_generations: completions per prompt in evaluation; several only where eval_temperature is above 0.
        eval_temperature: 0 takes the most probable token. Other sampling settings are those of training.
        rollout_samples: completions per rollout that go to `rollouts.jsonl` with their tokens' numbers; 0: none.
        rollout_samples_every: rollouts from one such record to the next.
        log_entropy: the policy's entropy is logged and recorded; on by default here.

    Raises:
        RecipeError: as `PreferenceConfig`; what cannot work online.
    """

    prompts_per_rollout: int = field(default=32, metadata={"help": "Prompts of a rollout, over all ranks."})
    num_generations: int = field(default=8, metadata={"help": "Completions per prompt."})
    minibatches: int = field(default=1, metadata={"help": "Optimiser steps per pass over a rollout."})
    rollout_epochs: int = field(default=1, metadata={"help": "Passes over a rollout."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest completion, in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    top_p: float = field(default=1.0, metadata={"help": "Sample from the smallest set with this probability."})
    top_k: int = field(default=0, metadata={"help": "Sample from this many tokens; 0: all."})
    min_p: float = field(default=0.0, metadata={"help": "Sample from tokens this times as probable as the best."})
    stop: list[str] = field(default_factory=list, metadata={"help": "Strings that end a completion."})
    stop_ids: list[int] | None = field(default=None, metadata={"help": "Tokens that end a completion."})
    shuffle_prompts: bool = field(default=True, metadata={"help": "A new order of prompts in every pass."})
    max_refills: int = field(default=10, metadata={"help": "Rounds of replacing filtered prompts, per rollout."})
    max_empty_rollouts: int = field(default=10, metadata={"help": "Rollouts in a row with nothing to train on."})
    correct_from: str | None = field(default=None, metadata={"help": "Reward that says what is correct."})
    eval_generations: int = field(default=1, metadata={"help": "Completions per prompt in evaluation."})
    eval_temperature: float = field(default=0.0, metadata={"help": "Temperature in evaluation; 0: greedy."})
    rollout_samples: int = field(default=4, metadata={"help": "Completions recorded per rollout."})
    rollout_samples_every: int = field(default=5, metadata={"help": "Rollouts from one record to the next."})
    log_entropy: bool = field(default=True, metadata={"help": "Log the policy's entropy on rollouts."})

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise RecipeError(f"{name} must be a whole number, at least {least}, got {value!r}")
        if self.gradient_accumulation_steps != 1:
            raise RecipeError(
                f"gradient_accumulation_steps is {self.gradient_accumulation_steps}; in online training a minibatch is "
                "an optimiser step: set minibatches, and max_tokens_per_microbatch for memory"
            )
        if self.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
            where = f"fsdp is {self.fsdp!r}" if self.fsdp else "accelerate was started with FSDP"
            raise RecipeError(
                f"{where}; online training does not shard the model, because every process samples with all of it. "
                "Expected no fsdp: several processes each with a copy (accelerate launch --multi_gpu), and for memory "
                "lora, bf16 and max_tokens_per_microbatch"
            )
        refuse_epochs(self, "online training is one long pass")
        if getattr(self.train_sampling_strategy, "value", self.train_sampling_strategy) != "random":
            raise RecipeError(
                f"train_sampling_strategy is {self.train_sampling_strategy!r}; online training draws prompts itself: "
                "set shuffle_prompts"
            )
        if self.eval_generations > 1 and self.eval_temperature == 0:
            raise RecipeError(
                f"eval_generations is {self.eval_generations} and eval_temperature 0: a prompt's completions would all "
                "be the same. Expected eval_generations 1, or a temperature above 0"
            )
        self._find_best()
        self.sampling()
        self.eval_sampling()
        self.ignore_data_skip = True  # the loop goes on from its own state
        super().__post_init__()

    def _find_best(self) -> None:
        """By reward, unless it says otherwise: evaluation by sampling has no loss."""
        if self.metric_for_best_model is None and (
            self.load_best_model_at_end or self.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU
        ):
            self.metric_for_best_model = "reward"
        if self.metric_for_best_model in ("loss", "eval_loss"):
            raise RecipeError(
                f"metric_for_best_model is {self.metric_for_best_model!r}; online evaluation samples and has no loss. "
                "Expected one of its metrics, such as reward or correct"
            )

    @property
    def steps_per_rollout(self) -> int:
        return self.minibatches * self.rollout_epochs

    def sampling(self) -> SamplingConfig:
        """How rollouts are sampled; `.at(rollout)` gives the seed of each."""
        return SamplingConfig(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            max_new_tokens=self.max_new_tokens,
            stop=self.stop,
            stop_ids=self.stop_ids,
            seed=self.seed,
        )

    def eval_sampling(self) -> SamplingConfig:
        """How evaluation samples: every time with the same seed."""
        everything: dict[str, Any] = {"top_p": 1.0, "top_k": 0, "min_p": 0.0} if self.eval_temperature == 0 else {}
        seed = derived_seed(self.seed, "evaluation")
        return replace(self.sampling(), temperature=self.eval_temperature, seed=seed, **everything)


_LEAST = {
    "prompts_per_rollout": 1,
    "num_generations": 1,
    "minibatches": 1,
    "rollout_epochs": 1,
    "max_new_tokens": 1,
    "max_refills": 0,
    "max_empty_rollouts": 1,
    "eval_generations": 1,
    "rollout_samples": 0,
    "rollout_samples_every": 1,
}
