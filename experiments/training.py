"""Small online trainings on a world or a task of one's own, as the claims need them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any

from transformers import AutoModelForCausalLM

from tokengrain.training.config import OnlineConfig
from tokengrain.training.online import OnlineTrainer

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
        objective, credit: as `OnlineTrainer` takes them; rollout credits given as mappings get the world's tokenizer
            where they name it None.
        seed: of the order of prompts and of the samples.
        model: the policy, trained in place; None: a fresh copy of the world's base model.
        rewards: as `OnlineTrainer` takes them.
        rollouts: how many; prompts and generations: of each; minibatches: updates per rollout.
        settings: further fields of `OnlineConfig`.
    """
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
            processing_class=getattr(world, "processor", world.tokenizer),
        )
        trainer.train()
        history = trainer.state.log_history
    rows = [{k: float(v) for k, v in row.items() if isinstance(v, (int, float))} for row in history]
    return OnlineRun(trainer.model.eval(), [row for row in rows if "rollout/completions" in row])


def _with_tokenizer(step: Any, tokenizer: Any) -> Any:
    if isinstance(step, Mapping) and "tokenizer" in step:
        return {**step, "tokenizer": tokenizer}
    return step
