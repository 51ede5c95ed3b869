"""Small trainings on a world, as the benchmarks need them by the dozen."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tokengrain.batch import Sample

STEPS, PAIRS = 120, 32
LEARNING_RATE = 2e-4


def world_samples(world: Any, rows: Sequence[Mapping[str, Any]] | None = None) -> list[Sample]:
    """Preference rows of a world as the trainer takes them.

    Args:
        world: as `load_world` gives it.
        rows: pairs (None: the training pairs of the world's seed).
    """
    from tokengrain.data import TokenizeConfig, load_rows, prepare_pairs

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
    learning_rate: float = LEARNING_RATE,
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

    from tokengrain.training import PreferenceConfig, PreferenceTrainer

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
