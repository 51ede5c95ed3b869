"""The update phase of a rollout, in two implementations that share nothing but the rollout.

Each class builds its own policy and frozen reference from the same seed and offers `update() -> losses`:
log-probabilities under the policy (unless there is one minibatch, which scores the rollout itself) and under the
reference for the whole rollout, then for each minibatch forward, loss, backward, AdamW step. Sampling, rewards and
advantages are outside, the same for all.
"""

from __future__ import annotations

import random
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.setting import Setting, build_model, word_tokenizer
from benchmarks.steps import optimiser_of
from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.loss import Counts, make_normaliser
from tokengrain.method import Rollout, make_objective
from tokengrain.scoring.prepare import prepare
from tokengrain.scoring.reference import ColumnReference, FrozenReference
from tokengrain.training.rollout import RolloutScorer
from tokengrain.training.step import PreferenceLoss

BETA = 0.04
TWICE = Setting(prompt=(192, 320), completion=(64, 192))
"""Prompts twice as long as completions."""


@dataclass(frozen=True)
class OnlineSetting:
    """One benchmark setting: the model's and the lengths' of `model`, and what a rollout is.

    Attributes:
        model: `pairs` is not used.
        prompts, generations: prompts of a rollout, completions of each.
        minibatches: optimiser steps on a rollout, each on whole groups of equal number.
        mixed: weights in float32, products in bfloat16 (`bf16=True` of the trainers).
    """

    model: Setting = TWICE
    prompts: int = 4
    generations: int = 8
    minibatches: int = 2
    mixed: bool = False

    def __post_init__(self) -> None:
        if self.prompts % self.minibatches:
            raise ValueError(f"{self.prompts} prompts do not go into {self.minibatches} minibatches of equal size")

    @property
    def per_minibatch(self) -> int:
        """Completions per optimiser step."""
        return self.prompts * self.generations // self.minibatches

    def label(self) -> str:
        lengths = self.model.label().partition("pairs, ")[2]
        label = f"{self.prompts} prompts x {self.generations}, {self.minibatches} minibatches, {lengths}"
        return label + (", products in bfloat16" if self.mixed else "")

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision, as a trainer has it around every forward pass."""
        return torch.autocast(self.model.device, torch.bfloat16) if self.mixed else nullcontext()

    def with_(self, **changes: Any) -> OnlineSetting:
        own = {k: changes.pop(k) for k in ("prompts", "generations", "minibatches", "mixed") if k in changes}
        return replace(self, model=self.model.with_(**changes), **own)


def build_rollout(setting: OnlineSetting) -> tuple[TokenBatch, Tensor]:
    """Random prompts and completions, the same for the same seed, and random advantages `[C]` with mean 1/2.

    Advantages that add up to 0 in every group would make the losses 0 whatever they are computed from.
    """
    rng, model = random.Random(setting.model.seed), setting.model

    def tokens(bounds: tuple[int, int]) -> list[int]:
        return [rng.randrange(3, model.vocabulary) for _ in range(rng.randint(*bounds))]

    samples = [
        Sample(
            tokens(model.prompt), [Completion(tokens(model.completion)) for _ in range(setting.generations)], row=row
        )
        for row in range(setting.prompts)
    ]
    batch = TokenBatch.from_samples(samples)
    advantages = torch.tensor([rng.gauss(0.5, 1.0) for _ in range(batch.n_completions)])
    return batch.to(model.device), advantages.to(model.device)


class OursUpdate:
    """tokengrain: the online trainer's own parts from rollout to losses.

    Args:
        layout: "auto" as the trainer has it, or "separate": every completion with a prompt of its own.
    """

    def __init__(self, setting: OnlineSetting, layout: Any = "auto") -> None:
        self.name = "tokengrain" if layout == "auto" else f"tokengrain, {layout} layout"
        model = setting.model
        self.policy, frozen = build_model(model, model.attention), build_model(model, model.attention)
        for one in (self.policy, frozen):
            prepare(one, layout=layout)
        self.batch, self.advantages = build_rollout(setting)
        size = setting.prompts // setting.minibatches
        self.minibatches = [range(i, i + size) for i in range(0, setting.prompts, size)]
        objective = make_objective("grpo", beta=BETA, kl_importance=True)
        self.loss = PreferenceLoss(objective, ColumnReference(), None, on_policy=True)
        self.normalise = make_normaliser("mean")
        self.scorer = RolloutScorer(
            self.policy,
            FrozenReference(frozen),
            None,
            max_tokens=max(self.batch.select(part).n_tokens for part in self.minibatches),
            mixed_precision=setting.autocast,
            options=self.loss.score_options,
        )
        self.autocast = setting.autocast
        self.optimiser = optimiser_of(self.policy)

    def update(self) -> list[float]:
        """One rollout's optimiser steps; the loss of each."""
        batch = replace(self.batch, columns={})
        step = Rollout(batch, self.advantages, {}, batch.rows, 0)
        self.scorer.add(step, {"old_logps", "ref_logps"} if len(self.minibatches) > 1 else {"ref_logps"})
        batch = step.batch.with_columns(advantages=step.broadcast(self.advantages))
        losses = []
        for prompts in self.minibatches:
            part = batch.select(prompts)
            with self.autocast():
                output = self.loss(self.policy, part).output
            loss = self.normalise(output, Counts.of(part.segments, pairs=False, prompts=part.n_prompts))
            loss.backward()
            self.optimiser.step()
            self.optimiser.zero_grad()
            losses.append(loss.item())
        return losses


class TrlUpdate:
    """TRL's `GRPOTrainer`: its scoring of a rollout and its `training_step`, without gradient checkpointing.

    Args:
        parts: forward passes per minibatch, of equally many completions; scoring has batches of that size as well.
    """

    def __init__(self, setting: OnlineSetting, parts: int = 1) -> None:
        from trl import GRPOConfig, GRPOTrainer

        self.name = "TRL" if parts == 1 else f"TRL, {parts} passes per minibatch"
        self.parts, self.steps = parts, setting.minibatches
        self._folder = tempfile.TemporaryDirectory()
        start = f"{self._folder.name}/start"
        build_model(setting.model).save_pretrained(start)
        args = GRPOConfig(
            output_dir=f"{self._folder.name}/out",
            per_device_train_batch_size=setting.per_minibatch // parts,
            gradient_accumulation_steps=parts,
            steps_per_generation=parts * setting.minibatches,
            num_generations=setting.generations,
            max_completion_length=setting.model.completion[1],
            loss_type="grpo",
            beta=BETA,
            gradient_checkpointing=False,
            bf16=setting.mixed,
            use_cpu=setting.model.device == "cpu",
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
        )
        # The trainer finds the reference under the name that the policy was loaded from.
        policy = AutoModelForCausalLM.from_pretrained(start, dtype=setting.model.dtype).to(setting.model.device)
        self.trainer = GRPOTrainer(
            model=policy,
            args=args,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            train_dataset=Dataset.from_list([{"prompt": "w3"}] * setting.prompts),
            processing_class=word_tokenizer(setting.model.vocabulary),
        )
        self.policy = self.trainer.model.train()
        self.trainer.current_gradient_accumulation_steps = parts  # set by its training loop, which is not timed
        self.trainer._prepare_inputs = lambda piece: piece  # the rollout is there: nothing to sample
        self.inputs = trl_inputs(*build_rollout(setting))
        self.optimiser = optimiser_of(self.policy)

    def update(self) -> list[float]:
        """One rollout's optimiser steps; the loss of each."""
        inputs, trainer = dict(self.inputs), self.trainer
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        size = trainer.args.per_device_train_batch_size
        scored = {"old_per_token_logps": self.policy, "ref_per_token_logps": trainer.ref_model}
        if self.steps == 1:
            del scored["old_per_token_logps"]
        with torch.no_grad():
            for column, model in scored.items():
                inputs[column] = trainer._get_per_token_logps_and_entropies(
                    model, ids, mask, inputs["completion_ids"].shape[1], batch_size=size
                )[0]
        losses = []
        for step in range(self.steps):
            loss = 0.0
            for part in range(self.parts):
                first = (step * self.parts + part) * size
                piece = {k: v[first : first + size] if v.dim() else v for k, v in inputs.items()}
                loss += float(trainer.training_step(self.policy, piece, num_items_in_batch=None))
            self.optimiser.step()
            self.optimiser.zero_grad()
            losses.append(loss)
        return losses


def trl_inputs(batch: TokenBatch, advantages: Tensor) -> dict[str, Tensor]:
    """A rollout as TRL pads it: prompts on the left, completions on the right."""
    prompts = [batch.prompt(int(g)) for g in batch.group]
    width = max(len(p) for p in prompts)
    ids = torch.stack([torch.cat([p.new_zeros(width - len(p)), p]) for p in prompts])
    lengths = torch.tensor([len(p) for p in prompts], device=ids.device)
    mask = (torch.arange(width, device=ids.device) >= width - lengths[:, None]).long()
    completions, counted = batch.to_padded(batch.completion_ids)
    return {
        "prompt_ids": ids,
        "prompt_mask": mask,
        "completion_ids": completions,
        "completion_mask": counted.long(),
        "advantages": advantages,
        "num_items_in_batch": counted.sum(),
    }


def fastest_trl(setting: OnlineSetting) -> TrlUpdate:
    """TRL with as many passes per minibatch as are fastest here: 1, 2, 4 or 8, one timed update each."""
    best: tuple[float, TrlUpdate] | None = None
    for parts in (1, 2, 4, 8):
        if setting.per_minibatch % parts:
            continue
        found = TrlUpdate(setting, parts)
        found.update()
        started = time.perf_counter()
        found.update()
        seconds = time.perf_counter() - started
        if best is None or seconds < best[0]:
            best = seconds, found
    assert best is not None  # one pass always goes
    return TrlUpdate(setting, best[1].parts)
