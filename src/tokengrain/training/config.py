"""`PreferenceConfig`: `transformers.TrainingArguments` with the settings of preference training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from tokengrain.errors import RecipeError
from tokengrain.objectives.normalise import NormaliserName
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
