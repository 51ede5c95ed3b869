"""`OnlineTrainer`: `PreferenceTrainer` whose batches are rollouts of the policy itself."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback

from tokengrain.data.config import TokenizeConfig
from tokengrain.objectives import BoundObjective
from tokengrain.report.rollouts import ROLLOUT_FILE
from tokengrain.rollout import Sampler
from tokengrain.rollout.registry import check_reachable, make_sampler
from tokengrain.scoring import head_of
from tokengrain.scoring.reference import ColumnReference
from tokengrain.training.checks import check_vocabulary, models_in
from tokengrain.training.counting import HostBatch
from tokengrain.training.losses import resolve_objective
from tokengrain.training.online import checks
from tokengrain.training.online.config import OnlineConfig
from tokengrain.training.online.evaluation import OnlineEvaluationMixin
from tokengrain.training.online.loop import RolloutLoop
from tokengrain.training.online.prompts import PromptDataset
from tokengrain.training.online.record import RolloutRecord
from tokengrain.training.online.registry import make_step, resolve_steps
from tokengrain.training.online.scoring import RolloutScorer
from tokengrain.training.online.serving import refresh_sampler, release_sampler
from tokengrain.training.online.setting import LoopParts, Ranks
from tokengrain.training.online.state import OnlineStateMixin, described
from tokengrain.training.online.step import CriticLike, RolloutStep
from tokengrain.training.reference import resolve_reference
from tokengrain.training.trainer import PreferenceTrainer

_REFERENCE = frozenset({"ref_logps", "kl"})


class OnlineTrainer(OnlineEvaluationMixin, OnlineStateMixin, PreferenceTrainer):
    """Trains a policy on its own completions: sample, reward, score, assign credit, update, again.

    One rollout is used for `minibatches * rollout_epochs` optimiser steps. All completions of a prompt stay on one
    rank, all ranks take equally many steps, and everything that `PreferenceTrainer` says of losses, checkpoints and
    resuming holds: a run killed at any point goes on exactly, state of credit steps and of the critic included.

    Written to `args.output_dir` beside the log: `rollouts.jsonl`, see `tokengrain.training.online.record`.

    Args:
        model: the policy, a causal language model of transformers or a PEFT model of one.
        args: settings.
        objective: a bound objective (`make_objective`), its name, or a loss function.
        rewards: a `RewardSuite`, a reward or a list of them: `RewardFunction`, function, name, or mapping with `name`
            and settings. None: the rewards are those of a credit step.
        credit: credit steps: objects, names, or mappings with `name` and settings. A step that sets advantages is
            added if the objective needs one and there is none: "group".
        sampler: where completions come from: a `Sampler`, a name, or a mapping with `name` and settings, as in a
            recipe; None: `HFGenerate` on the policy.
        reference: as for `PreferenceTrainer`; it is made, and asked, only if objective or credit needs it.
        critic: gives values, for credit steps that need them.
        teacher: as for `PreferenceTrainer`.
        train_dataset, eval_dataset: prompts: rows (`{"prompt": ..., <columns for rewards>}`; "id" names a row),
            `PromptItem`s or a `PromptDataset`; `eval_dataset` also a mapping of several.
        processing_class: the tokenizer.
        peft_config: wrap the model in a new adapter.
        tokenize: how rows become prompts.
        kwargs: passed on to `transformers.Trainer`.

    Raises:
        ModelError, DataError: a model, prompt or vocabulary that does not fit.
        RecipeError: settings that cannot work together.
        RolloutError: the sampler's server does not answer.
    """

    args: OnlineConfig

    def __init__(
        self,
        model: nn.Module,
        args: OnlineConfig,
        *,
        objective: Any = "grpo",
        rewards: Any = None,
        credit: Any = None,
        sampler: Any = None,
        reference: Any = None,
        critic: CriticLike | None = None,
        teacher: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        tokenize: TokenizeConfig | None = None,
        **kwargs: Any,
    ) -> None:
        args = checks.own_settings(args, kwargs)
        bound: BoundObjective = resolve_objective(objective)
        checks.check_objective(bound)
        self.steps = resolve_steps(credit)
        if checks.ADVANTAGES in bound.needs and not any(s.phase == "advantages" for s in self.steps):
            self.steps = resolve_steps([*self.steps, make_step("group")])
        checks.check_steps(bound, self.steps, args, critic=critic)
        self._needs = checks.needed(bound, self.steps)
        self._described_steps = [described(step) for step in self.steps]
        self._tokenizer, self._tokenize, self.critic = processing_class, tokenize, critic
        self._max_new_tokens = args.max_new_tokens
        self.rewards = checks.resolve_rewards(rewards, processing_class, self.steps, bound)
        checks.check_correct_from(args, self.rewards)
        prompts = self._prompts(train_dataset, "train")
        if isinstance(eval_dataset, Mapping):
            eval_dataset = {name: self._prompts(data, name) for name, data in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._prompts(eval_dataset, "eval")
        checks.check_shares(args)
        args.per_device_train_batch_size = args.prompts_per_rollout // (args.world_size * args.minibatches)
        if args.max_steps <= 0:
            rollouts = math.ceil(args.num_train_epochs * len(prompts) / args.prompts_per_rollout)
            args.max_steps = rollouts * args.steps_per_rollout
        super().__init__(
            model,
            args,
            objective=bound,
            reference=reference,
            teacher=teacher,
            train_dataset=prompts,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            **kwargs,
        )
        self.sampler: Sampler = make_sampler(sampler, self.model, processing_class)
        self.ranks = Ranks(self.accelerator.process_index, self.accelerator.num_processes, self._exchange)
        self.ranks.together(lambda: check_reachable(self.sampler))
        self.record = RolloutRecord(
            self.output_path / ROLLOUT_FILE,
            processing_class,
            count=args.rollout_samples if self.is_world_process_zero() else 0,
            every=args.rollout_samples_every,
        )
        self.loop = RolloutLoop(self._loop_parts(prompts), self._measured, self._rolled_out)
        self.callback_handler.callbacks.insert(0, _AfterStep(self))  # before those that log and save
        self._critic_ready = False
        self._minibatch: HostBatch | None = None
        self._handed_out = 0.0

    def _loop_parts(self, prompts: PromptDataset) -> LoopParts:
        options = self._loss.score_options
        known = frozenset(getattr(self.objective, "optional", ())) | self.objective.needs
        required = {name for name in self._needs if name in checks.SCORED or name == "ref_logps"}
        return LoopParts(
            args=self.args,
            model=self.model,
            prompts=prompts,
            sampler=self.sampler,
            rewards=self.rewards,
            steps=self.steps,
            scorer=RolloutScorer(
                self.model,
                self.reference,
                self.critic,
                max_tokens=self.args.max_tokens_per_microbatch,
                mixed_precision=self.accelerator.autocast,
                options=options,
            ),
            wanted=known | ({"values", "returns"} if self.critic is not None else set()),
            required=frozenset(required | ({"entropy"} if self.args.log_entropy else set())),
            weights_taken="weights" in known,
            refresh=self._refresh_sampler,
            head_of=lambda: head_of(self.model).detach(),
            device=self.args.device,
            ranks=self.ranks,
        )

    # ---- What PreferenceTrainer asks ----

    @property
    def reference(self) -> Any:
        """What the policy is compared with, or None."""
        return self._live_reference

    def _resolve_reference(self, reference: Any, model: nn.Module) -> Any:
        """The live reference scores rollouts; the loss reads their column."""
        wanted = self._needs & _REFERENCE
        self._live_reference = resolve_reference(reference, model, wanted, False) if wanted else None
        for other in models_in(self._live_reference):
            check_vocabulary(model, other, "reference")
        if "kl" in self.objective.needs:
            return self._live_reference
        takes = "ref_logps" in self.objective.needs | getattr(self.objective, "optional", frozenset())
        return ColumnReference() if takes and "ref_logps" in self._needs else None

    def _prompts(self, data: Any, name: str) -> PromptDataset:
        return PromptDataset.of(data if data is not None else [], self._tokenizer, name=name, config=self._tokenize)

    def _check_data(self, model: nn.Module, credit: Any) -> None:
        for dataset in self._datasets.values():
            if dataset is not None:
                checks.check_prompts(dataset, model, self._max_new_tokens)

    def _all_have(self, column: str) -> bool:
        return False  # prompts have no tokens to have columns of

    def _measured_in_training(self) -> tuple[str, ...]:
        return ()  # entropy is measured when a rollout is scored

    def get_train_dataloader(self) -> Any:
        """Minibatches of rollouts, without end; see `RolloutLoop`."""
        return _Minibatches(self)

    # ---- One optimiser step ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[HostBatch], num_batches: int, device: torch.device
    ) -> tuple[list[HostBatch], None]:
        """The minibatch of one optimiser step."""
        self._place_reference()
        found = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._minibatch = found[0][0] if found[0] else None
        self._handed_out = time.perf_counter()
        return found

    def finish_step(self) -> None:
        """Called between the last backward pass of a step and the optimiser; updates the critic."""
        self.record.update(self._records)
        super().finish_step()
        if self.critic is not None and self._minibatch is not None:
            batch = self._minibatch.batch.to(self.args.device)
            for name, value in self.critic.update(batch, real=self._minibatch.real).items():
                self._measured(name, value)

    def after_step(self) -> None:
        """Called after the optimiser's step, before anything is logged or saved."""
        self._minibatch = None
        self.state.epoch = self.loop.passes
        # Seconds per rollout: every step is a part of one.
        self._window.add("seconds/update", time.perf_counter() - self._handed_out, 1 / self.loop.steps_of_rollout)
        if self.loop.buffer is not None and self.loop.buffer.done:
            self.record.write()

    def _measured(self, name: str, value: float) -> None:
        self._window.add(name, value, 1.0)

    def _rolled_out(self, step: RolloutStep, keep: Tensor) -> None:
        self.record.begin(step, keep, self.state.global_step)
        step.quantities.pop("hidden", None)  # large

    def _exchange(self, value: Any) -> list[Any]:
        return list(gather_object([value])) if self.accelerator.num_processes > 1 else [value]

    def _refresh_sampler(self) -> None:
        refresh_sampler(self)

    def _release_sampler(self) -> None:
        release_sampler(self)

    # ---- State ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see `PreferenceTrainer.train`."""
        self._begin_critic()
        try:
            return super().train(*args, **kwargs)
        finally:
            self._release_sampler()

    def _begin_critic(self) -> None:
        if self.critic is not None and not self._critic_ready:
            self.critic.begin(
                self.args.device,
                max_steps=self.args.max_steps,
                max_tokens=self.args.max_tokens_per_microbatch,
                autocast=self.accelerator.autocast,
            )
            self._critic_ready = True


class _Minibatches:
    """What `transformers.Trainer` iterates over."""

    def __init__(self, trainer: OnlineTrainer) -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[HostBatch]:
        trainer = self.trainer
        while trainer.state.global_step < trainer.args.max_steps:
            yield trainer.loop.next()


class _AfterStep(TrainerCallback):
    """Tells the trainer that an optimiser step is done."""

    def __init__(self, trainer: OnlineTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.after_step()
