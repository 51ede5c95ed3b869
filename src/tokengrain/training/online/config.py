"""`OnlineConfig`: the settings of `OnlineTrainer`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from transformers.trainer_utils import SchedulerType

from tokengrain.errors import RecipeError
from tokengrain.rollout.base import SamplingConfig, derived_seed
from tokengrain.training.config import PreferenceConfig
from tokengrain.training.streams import refuse_epochs


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
            stop=tuple(self.stop),
            stop_ids=None if self.stop_ids is None else tuple(self.stop_ids),
            seed=self.seed,
        )

    def eval_sampling(self) -> SamplingConfig:
        """How evaluation samples: every time with the same seed."""
        greedy = self.eval_temperature == 0
        return SamplingConfig(
            temperature=self.eval_temperature,
            top_p=1.0 if greedy else self.top_p,
            top_k=0 if greedy else self.top_k,
            min_p=0.0 if greedy else self.min_p,
            max_new_tokens=self.max_new_tokens,
            stop=tuple(self.stop),
            stop_ids=None if self.stop_ids is None else tuple(self.stop_ids),
            seed=derived_seed(self.seed, "evaluation"),
        )


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
