"""Small online trainings on a world, as the benchmarks need them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from statistics import fmean
from typing import Any

from tokengrain.batch import Sample

ROLLOUTS, PROMPTS, GENERATIONS, MINIBATCHES = 40, 32, 8, 8
LEARNING_RATE = 3e-4


@dataclass(frozen=True)
class TrainingSizes:
    """How long a claim's arms train, as `train_online` takes it; a `Scale` adds what is its experiment's own."""

    rollouts: int = ROLLOUTS
    prompts: int = PROMPTS
    generations: int = GENERATIONS
    minibatches: int = MINIBATCHES
    learning_rate: float = LEARNING_RATE

    @property
    def training(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(TrainingSizes)}


@dataclass(frozen=True)
class OnlineRun:
    """A policy after its training, and what was logged of each rollout.

    Attributes:
        model: in evaluation mode.
        rollouts: metrics by name, one mapping per rollout.
    """

    model: Any
    rollouts: list[dict[str, float]]

    def curve(self, name: str) -> list[float]:
        """A metric over the rollouts that have it."""
        return [row[name] for row in self.rollouts if name in row]

    def late(self, name: str, share: float = 0.25) -> float | None:
        """Mean of a metric over the last part of the rollouts; None if it was never logged."""
        values = self.curve(name)
        return fmean(values[-max(int(share * len(values)), 1) :]) if values else None

    def reached(self, name: str, value: float, window: int = 3) -> int:
        """Rollouts until the mean of a metric over `window` of them is this high; all of them, if never."""
        values = self.curve(name)
        for end in range(window, len(values) + 1):
            if fmean(values[end - window : end]) >= value:
                return end
        return len(values)


def train_online(
    world: Any,
    objective: Any,
    credit: Sequence[Any],
    seed: int,
    *,
    model: Any = None,
    rewards: Any = None,
    rollouts: int = ROLLOUTS,
    prompts: int = PROMPTS,
    generations: int = GENERATIONS,
    minibatches: int = MINIBATCHES,
    learning_rate: float = LEARNING_RATE,
    **settings: Any,
) -> OnlineRun:
    """A policy after a short online training.

    Adam with betas 0.9 and 0.95, two rollouts of warm-up, gradients clipped at 1.

    Args:
        world: gives tokenizer, prompts, `max_new_tokens`, and starting weights and reward where they are not given.
        objective, credit: as `OnlineTrainer` takes them; credit steps given as mappings get the world's tokenizer
            where they name it None.
        seed: of the order of prompts and of the samples.
        model: the policy, trained in place; None: a fresh copy of the world's base model.
        rewards: as `OnlineTrainer` takes them.
        rollouts: how many; prompts and generations: of each; minibatches: updates per rollout.
        settings: further fields of `OnlineConfig`.
    """
    from transformers import AutoModelForCausalLM

    from tokengrain.training.config import OnlineConfig
    from tokengrain.training.online import OnlineTrainer

    if model is None:
        model = AutoModelForCausalLM.from_pretrained(world.base_model())
    usual: dict[str, Any] = {
        "learning_rate": learning_rate,
        "adam_beta2": 0.95,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": min(2, rollouts // 4) * minibatches,
        "max_grad_norm": 1.0,
        "max_steps": rollouts * minibatches,
        "prompts_per_rollout": prompts,
        "num_generations": generations,
        "minibatches": minibatches,
        "max_new_tokens": world.max_new_tokens,
        "logging_steps": minibatches,
        "rollout_samples": 0,
        "seed": seed,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer = OnlineTrainer(
            model,
            OnlineConfig(output_dir=folder, **(usual | settings)),
            objective=objective,
            rewards=world.reward if rewards is None else rewards,
            credit=[_with_tokenizer(step, world.tokenizer) for step in credit],
            train_dataset=world.prompts(),
            processing_class=world.tokenizer,
        )
        trainer.train()
        history = trainer.state.log_history
    rows = [{k: float(v) for k, v in row.items() if isinstance(v, (int, float))} for row in history]
    return OnlineRun(trainer.model.eval(), [row for row in rows if "rollout/completions" in row])


def _with_tokenizer(step: Any, tokenizer: Any) -> Any:
    if isinstance(step, Mapping) and "tokenizer" in step:
        return {**step, "tokenizer": tokenizer}
    return step


# ----------------------------------------------------------------------------------------------------
# Small trainings on a world, as the benchmarks need them by the dozen.

STEPS, PAIRS = 120, 32
TRAINING_LEARNING_RATE = 2e-4


def world_samples(world: Any, rows: Sequence[Mapping[str, Any]] | None = None) -> list[Sample]:
    """Preference rows of a world as the trainer takes them.

    Args:
        world: as `load_world` gives it.
        rows: pairs (None: the training pairs of the world's seed).
    """
    from tokengrain.data.config import TokenizeConfig
    from tokengrain.data.dataset import prepare_pairs
    from tokengrain.data.rows import load_rows

    source = load_rows(list(world.pairs() if rows is None else rows))
    made = prepare_pairs(source, world.tokenizer, TokenizeConfig())
    return [made[i] for i in range(len(made))]


def exchanged(samples: Sequence[Sample]) -> list[Sample]:
    """The pairs with chosen and rejected exchanged: what a reverse DPO model learns from."""
    return [replace(s, completions=[s.completions[1], s.completions[0]]) for s in samples]


def train_on(
    world: Any,
    objective: Any,
    rows: Any,
    seed: int,
    *,
    model: Any = None,
    credit: Any = None,
    credit_as: Any = None,
    reference: Any = None,
    teacher: Any = None,
    learning_rate: float = TRAINING_LEARNING_RATE,
    steps: int = STEPS,
    pairs: int = PAIRS,
    **settings: Any,
) -> Any:
    """A model after a short training, in evaluation mode.

    Adam with β₂ 0.98, linear decay after 10 steps of warm-up, gradients clipped at 1: what `stories` needs.

    Args:
        world: where the starting weights and the tokenizer come from.
        objective: as `PreferenceTrainer` takes it.
        rows: `Sample`s or a data set of them, such as `world_samples(world)`.
        seed: of the order of rows.
        model: what to train (None: a fresh copy of the world's base model).
        credit, credit_as, reference, teacher: as `PreferenceTrainer` takes them.
        learning_rate: at its peak.
        steps: optimiser steps.
        pairs: rows per step.
        settings: further fields of `PreferenceConfig`.
    """
    from transformers import AutoModelForCausalLM

    from tokengrain.training.config import PreferenceConfig
    from tokengrain.training.trainer import PreferenceTrainer

    if model is None:
        model = AutoModelForCausalLM.from_pretrained(world.base_model())
    with tempfile.TemporaryDirectory() as folder:
        usual: dict[str, Any] = {
            "learning_rate": learning_rate,
            "lr_scheduler_type": "linear",
            "warmup_steps": min(10, steps // 10),
            "adam_beta2": 0.98,
            "max_grad_norm": 1.0,
            "max_steps": steps,
            "per_device_train_batch_size": pairs,
            "seed": seed,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        trainer = PreferenceTrainer(
            model,
            PreferenceConfig(output_dir=folder, **(usual | settings)),
            objective=objective,
            credit=credit,
            credit_as=credit_as,
            reference=reference,
            teacher=teacher,
            train_dataset=rows,
            processing_class=world.tokenizer,
        )
        trainer.train()
    return trainer.model.eval()
