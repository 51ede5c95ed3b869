"""`OnlineTrainer`: `PreferenceTrainer` whose batches are rollouts of the policy itself."""

# An online step, in the order in which things happen:
#
#   get_batch_samples   the next minibatch of the rollout under way; if that is used up,
#     rollout             make another one:
#       _refresh_sampler    give the sampler the present weights
#       _sample             prompts, completions, rewards; filters, and new prompts for those that were dropped
#       _sample_ahead       `max_staleness`: begin with the next rollout, in a thread, while all that follows goes on
#       scorer.add          old log-probabilities, and what objective and credit need: reference, entropy, values; if
#                           there is one update and no credit needs the policy's, the update itself scores with it
#       _assign_credit      rewards -> advantages per token
#       _cut                into minibatches
#   training_step       loss of the minibatch, forward and backward (`PreferenceTrainer`)
#   finish_step         before the optimiser: the step is finite; the critic learns; a rollout that the update scored
#                       is logged
#   after_step          after the optimiser: time, and the record of a used-up rollout

from __future__ import annotations

import copy
import json
import math
import shutil
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from tokengrain.data.config import TokenizeConfig
from tokengrain.data.tokens import text_tokenizer
from tokengrain.errors import DataError, RecipeError, RolloutError, RunError, read_json, require, write_text
from tokengrain.method import (
    FROZEN,
    TAUGHT,
    BoundObjective,
    Rollout,
    RolloutCredit,
    make_rollout_credit,
    resolve_rollout_credit,
)
from tokengrain.methods._clipped import sampler_mismatch
from tokengrain.methods._shaping import reduce_groups
from tokengrain.models import StreamedWeights
from tokengrain.rewards.builtin import make_reward
from tokengrain.rewards.suite import RewardResult, RewardSuite
from tokengrain.rollout.sampler import (
    PromptItem,
    Rollouts,
    Sampler,
    check_reachable,
    derived_seed,
    describe_sampler,
    make_sampler,
)
from tokengrain.runs import ROLLOUT_FILE
from tokengrain.scoring.prepare import causal_lm
from tokengrain.scoring.reference import ColumnReference, LiveReference, gathered, is_peft, resolve_reference
from tokengrain.scoring.score import head_of
from tokengrain.settings import nearest
from tokengrain.training.buffer import RolloutBuffer
from tokengrain.training.checkpoint import no_progress_bar
from tokengrain.training.config import OnlineConfig, launched_with
from tokengrain.training.critic import Critic
from tokengrain.training.evaluate import chosen_dataset, completion_metrics, loop_output
from tokengrain.training.rollout import (
    PLACE,
    POLICY,
    PolicyCopy,
    PromptDataset,
    PromptOrder,
    PromptSource,
    Ranks,
    RolloutScorer,
    Round,
    chosen_prompts,
    kept,
    packed_round,
    take_scores,
    unpacked_round,
)
from tokengrain.training.rollout_log import RolloutRecord, RolloutStats, joined_mismatch, rollout_metrics
from tokengrain.training.step import OLD_LOGPS, CreditUse, HostBatch, resolve_objective
from tokengrain.training.trainer import PreferenceTrainer, check_arguments, loaded

CRITIC, BUFFER, AHEAD = "critic", "rollout", "ahead"
SAMPLER_FOLDER = ".sampler"
ADVANTAGES = "advantages"
LEAVE = 10.0
"""Seconds that a run which ends early waits for the rollout ahead: a server may be the reason, and not answer."""
FAR = 0.5
"""Nats per token that log-probabilities of sampler and trainer never differ by on average, whatever their precision."""
SCORED = frozenset({OLD_LOGPS, "entropy", "values"})
"""Quantities that the trainer computes for an objective, beside those of the reference."""


@dataclass
class Groups:
    """How many groups of completions this process has seen, and in how many of them all have the same reward."""

    seen: int = 0
    equal: int = 0
    right: int = 0  # of the equal ones, those in which all completions are correct
    wrong: int = 0  # completions of the other equal ones
    cut: int = 0  # of these, the truncated ones

    def add(self, rollout: Rollout) -> None:
        group, truncated = rollout.group, rollout.truncated
        correct = torch.zeros_like(truncated) if rollout.correct is None else rollout.correct
        low, high = (
            reduce_groups(rollout.rewards, group, x, how) for x, how in ((math.inf, "amin"), (-math.inf, "amax"))
        )
        right = reduce_groups(correct.to(group), group, 1, "amin") == 1
        equal = low == high
        wrong = (equal & ~right)[group]
        self.seen, self.equal = self.seen + rollout.batch.n_prompts, self.equal + int(equal.sum())
        self.right += int((equal & right).sum())
        self.wrong, self.cut = self.wrong + int(wrong.sum()), self.cut + int(truncated[wrong].bool().sum())

    def __str__(self) -> str:
        share = self.cut / max(self.wrong, 1)
        if self.equal < 2 * self.right:
            why = "this model solves these prompts already"
        elif share >= 0.25:
            why = f"{share:.0%} of their completions are cut at max_new_tokens"
        else:
            why = "this model rarely or never solves these prompts"
        return f"all rewards equal in {self.equal} of {self.seen} groups, which teach nothing: {why}"


class OnlineTrainer(PreferenceTrainer):
    """Trains a policy on its own completions: sample, reward, score, assign credit, update, again.

    One rollout is used for `minibatches * rollout_epochs` optimiser steps. All completions of a prompt stay on one
    rank, all ranks take equally many steps, and everything that `PreferenceTrainer` says of losses, checkpoints and
    resuming holds: a run killed at any point resumes exactly, state of rollout credits and of the critic included.

    Written to `args.output_dir` beside the log: `rollouts.jsonl`, see `RolloutRecord`.

    Args:
        model, args, objective, teacher, processing_class, peft_config, kwargs: as for `PreferenceTrainer`.
        rewards: a `RewardSuite`, a reward or a list of them: `RewardFunction`, function, name, or mapping with `name`
            and settings. None: the rewards are those of a rollout credit.
        credit: rollout credits: objects, names, or mappings with `name` and settings. One that sets advantages is
            added if the objective needs one and there is none: "group".
        sampler: a `Sampler`, a name, or a mapping with `name` and settings; None: `HFGenerate` on the policy.
        reference: as for `PreferenceTrainer`; it is made, and asked, only if objective or credit needs it.
        critic: gives values, for rollout credits that need them.
        train_dataset, eval_dataset: prompts: rows (`{"prompt": ..., <columns for rewards>}`; "id" names a row),
            a file's name, `PromptItem`s or a `PromptDataset`; `eval_dataset` also a mapping of several.
        tokenize: how rows become prompts.

    Attributes:
        rollouts: how many were made; the one in `buffer` is number `rollouts - 1`.
        buffer: the rollout under way; None before the first.

    Raises:
        ModelError, DataError: a model, prompt or vocabulary that does not fit.
        RecipeError: settings that cannot work together.
        RolloutError: the sampler's server does not answer.
    """

    args: OnlineConfig

    def __init__(
        self,
        model: Any,
        args: OnlineConfig | None = None,
        *,
        objective: Any = "grpo",
        rewards: Any = None,
        credit: Any = None,
        sampler: Any = None,
        reference: Any = None,
        critic: Critic | None = None,
        teacher: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        tokenize: TokenizeConfig | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or OnlineConfig()
        check_arguments(args, OnlineConfig, kwargs)
        model, processing_class = loaded(model, processing_class)
        causal_lm(model, "online training: samplers continue the prompt's own tokens")
        args = copy.copy(args)  # what follows from the prompts is set in it, and another trainer has others
        bound = resolve_objective(objective)
        tokenizer = processing_class and text_tokenizer(processing_class)
        self.rollout_credits = with_implied(resolve_rollout_credit(credit, tokenizer), bound, args)
        check_credits(bound, self.rollout_credits, args, critic)
        self._needs = frozenset(bound.needs).union(*(c.needs for c in self.rollout_credits))
        self._described_credits = [described(c) for c in self.rollout_credits]
        self._reader, self._tokenize, self.critic = processing_class, tokenize, critic
        self._max_new_tokens, self._temperature = args.max_new_tokens, args.logps_temperature
        self._task = args.task_column
        self.rewards = resolve_rewards(rewards, tokenizer)
        self.groups = Groups()
        functions = [] if self.rewards is None else self.rewards.functions
        weights = {f.name: None if f.evaluate_only else f.weight for f in functions}
        check_rewards(bound, self.rollout_credits, args.correct_from, weights)
        check_sharding(args.fsdp, sampler)
        check_ahead(args.max_staleness, sampler, bound)
        prompts = self._prompts(train_dataset, "train")
        if isinstance(eval_dataset, Mapping):
            eval_dataset = {name: self._prompts(data, name) for name, data in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._prompts(eval_dataset, "eval")
        held_out = eval_dataset.values() if isinstance(eval_dataset, Mapping) else [eval_dataset]
        every = (prompts, *(data for data in held_out if data is not None))
        if self.rewards is not None:
            for data in every:
                self.rewards.check_golds((data.name, item.row, item.raw) for item in data)
        set_lengths(args, len(prompts))
        kwargs |= {"reference": reference, "teacher": teacher, "peft_config": peft_config}
        kwargs |= {"processing_class": processing_class, "eval_dataset": eval_dataset}
        super().__init__(model, args, objective=bound, train_dataset=prompts, **kwargs)
        beyond = [i for i in args.stop_ids or () if self._limits.vocabulary and i >= self._limits.vocabulary]
        what = f"stop_ids has {beyond}, which no token is; expected ids below {self._limits.vocabulary}"
        require(not beyond, RecipeError, what)
        self.judge.temperature, self.judge.on_policy = args.logps_temperature, True
        if args.max_staleness:  # the threads would share casts, so that rounding depended on which is first
            self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        self._learns_once = self._one_update_scores()
        self.sampler: Sampler = make_sampler(sampler, self.model, tokenizer)
        self.ranks = Ranks(self.accelerator.process_index, self.accelerator.num_processes)
        asked = [item for data in every for item in data]
        self.ranks.together(lambda: check_reachable(self.sampler, prompts=asked))
        self._copy: PolicyCopy | None = None  # what is sampled from in this process, while the policy changes
        if args.max_staleness and not hasattr(self.sampler, "how"):
            self._copy = PolicyCopy(self.model)
            self.sampler.refresh(self._copy.model)
        self._check_room()
        seed = args.seed if args.data_seed is None else args.data_seed
        self.source = PromptSource(prompts, PromptOrder(len(prompts), seed, shuffle=args.shuffle_prompts), self.ranks)
        most, autocast, options = args.max_tokens_per_microbatch, self.accelerator.autocast, self.judge.score_options
        models = self.model, self.reference, critic
        self._passes = self.ranks.largest if self.is_fsdp_enabled else None
        self.scorer = RolloutScorer(
            *models, max_tokens=most, mixed_precision=autocast, options=options, passes=self._passes
        )
        path, shown = self.output_path / ROLLOUT_FILE, args.rollout_samples if self.is_world_process_zero() else 0
        self.record = RolloutRecord(path, tokenizer, count=shown, every=args.rollout_samples_every)
        self.rollouts = 0
        self.buffer: RolloutBuffer | None = None
        self._ahead: Round | None = None  # the first round of the next rollout, under way or done
        self._minibatch: HostBatch | None = None
        self._unscored: tuple[RolloutStats, Rollout, Tensor] | None = None  # and what is kept; its update scores it
        self._handed_out = 0.0
        self._critic_ready = False

    def _one_update_scores(self) -> bool:
        """Whether a rollout's only update can give what is logged of the policy, and nobody asks for it before."""
        args, objective = self.args, self.objective
        same = args.steps_per_rollout == 1 and args.disable_dropout  # the update computes what scoring would
        whole = objective.main == "logps" and objective.objective.reads is None
        asked = self.critic is not None or bool(objective.needs & (SCORED - {OLD_LOGPS}))
        asked |= not all(getattr(credit, "unscored", False) for credit in self.rollout_credits)
        return same and whole and not asked

    @property
    def reference(self) -> Any:
        return self._live_reference

    def _resolve_reference(self, reference: Any, model: nn.Module) -> Any:
        """The live reference scores rollouts; the loss reads their column."""
        wanted = self._needs & FROZEN
        self._live_reference = resolve_reference(reference, model, wanted, False) if wanted else None
        self._limits.check_models_in(self._live_reference, "reference")
        live: Any = self._live_reference
        if self._temperature != 1 and live is not None:
            what = f"logps_at_temperature: {type(live).__name__} gives them at 1 alone"
            require(isinstance(live, LiveReference), RecipeError, what)
            live.temperature = self._temperature
        if "kl" in self.objective.needs:
            return self._live_reference
        takes = "ref_logps" in self.objective.needs | self.objective.optional
        return ColumnReference() if takes and "ref_logps" in self._needs else None

    def _prompts(self, data: Any, name: str) -> PromptDataset:
        return PromptDataset.of(data if data is not None else [], self._reader, name=name, config=self._tokenize)

    def _check_data(self, credit: CreditUse | None) -> None:
        for dataset in self._datasets.values():
            if dataset is not None:
                self._check_prompts(dataset)

    def _check_prompts(self, prompts: PromptDataset) -> None:
        """Raises `DataError` if a prompt leaves no room for a completion, or has a token that the model does not."""
        most = self._max_new_tokens
        for item in prompts:
            shown = f"{len(item.ids)} prompt tokens and max_new_tokens {most}"
            hint = " together; set max_prompt_length or max_new_tokens"
            self._limits.check_length(len(item.ids) + most, shown, hint, file=prompts.name, row=item.row)
            self._limits.check_ids(item.ids, file=prompts.name, row=item.row)
        check_tasks(self._task, ((prompts.name, item.row, item.raw) for item in prompts))

    def _check_room(self) -> None:
        """Raises `DataError` if a prompt leaves no room for a completion on a server that takes less than the model."""
        longest = getattr(getattr(self.sampler, "sampler", self.sampler), "longest", None)
        if longest is not None and (self._limits.positions is None or longest < self._limits.positions):
            self._limits.positions, self._limits.whose = longest, "the server's max_model_len"
            self._check_data(None)

    def _all_have(self, column: str) -> bool:
        return False  # prompts have no tokens to have columns of

    def _measured_in_training(self) -> tuple[str, ...]:
        if self._unscored is None:
            return ()  # entropy was measured when the rollout was scored
        return ("logps", "entropy") if self.args.log_entropy else ("logps",)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see `PreferenceTrainer.train`."""
        if self.critic is not None and not self._critic_ready:
            steps, most = self.args.max_steps, self.args.max_tokens_per_microbatch
            autocast = self.accelerator.autocast
            self.critic.begin(self.args.device, max_steps=steps, max_tokens=most, autocast=autocast)
            self._critic_ready = True
        try:
            return super().train(*args, **kwargs)
        finally:
            self._leave_ahead()
            self._release_sampler()

    def get_train_dataloader(self) -> Any:
        while self.state.global_step < self.args.max_steps:
            yield self.next_minibatch()

    def get_batch_samples(
        self, epoch_iterator: Iterator[HostBatch], num_batches: int, device: torch.device
    ) -> tuple[list[HostBatch], None]:
        self._place_reference()
        found = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._minibatch = found[0][0] if found[0] else None
        self._handed_out = time.perf_counter()
        return found

    def next_minibatch(self) -> HostBatch:
        """The next minibatch, of a new rollout if the last one is used up."""
        empty, why = 0, ""
        while self.buffer is None or self.buffer.done:
            drawn = f"{empty} rollouts in a row (max_empty_rollouts; {self._drawn} prompts drawn so far)"
            what = f"nothing was left to train on in {drawn}; loosen the filters, or look at the rewards: {why}"
            require(empty < self.args.max_empty_rollouts, RunError, what)
            if empty and self.is_world_process_zero():
                warnings.warn(f"nothing was left to train on in rollout {self.rollouts}: {why}", stacklevel=2)
            self.buffer = self.ranks.together(self.rollout)
            empty += 1
            why = f"all of a prompt may earn the same; {self._stats.spoken()}"
            if self._stats.informative and 1 not in self._stats.correct:
                why = (
                    "they differ, but no completion was correct (reward above 0.5), by which filter_groups judges; "
                    "set its metric: reward, or name another reward in correct_from"
                )
            elif self._stats.total and all(map(math.isnan, self._stats.total)):
                why = "no reward applied to any completion (all gave None, or failed and were skipped)"
        return next(self.buffer)

    def rollout(self) -> RolloutBuffer | None:
        """Make a rollout: sample, reward, score, assign credit. None: nothing of it is left to train on."""
        stats = self._stats = RolloutStats(stale=0 if self.args.max_staleness else None)
        with stats.timed("rollout"):
            self._settle()
        if self._server() is not None or self._copy is not None:
            with stats.timed("refresh"):
                self._refresh_sampler()
        rollout = self._sample(stats)
        left = self.ranks.largest(int(kept(rollout).sum()))
        if self.args.max_staleness:
            self._sample_ahead(left)
        later = False
        if left:
            needed = {OLD_LOGPS, *(self._needs & (SCORED | {"ref_logps"}))}
            needed |= {name for credit in self.rollout_credits for name in credit.needs}
            needed |= {"entropy"} if self.args.log_entropy else set()
            with stats.timed("scoring"):
                self.scorer.add(rollout, needed - POLICY.keys() if self._learns_once else needed)
            with stats.timed("credit"):
                self._hold_head(rollout)
                self._assign_credit(rollout)
            # What is left out of the update is not scored by it.
            later = self._learns_once and not self.ranks.largest(int(rollout.masked is not None))
            if self._learns_once and not later:
                with stats.timed("scoring"):
                    self.scorer.add(rollout, needed)
        keep = kept(rollout)
        most = self.ranks.largest(int(keep.sum()))
        if later and most:
            self._unscored = stats, rollout, keep
        else:
            self._note(stats, rollout, keep)
        self.rollouts += 1
        return self._cut(rollout, keep, most) if most else None

    def _note(self, stats: RolloutStats, rollout: Rollout, keep: Tensor) -> None:
        """Log a rollout that the policy has scored, and begin its record; `keep`: bool `[G]`."""
        metrics = rollout_metrics(stats, rollout, keep, self.ranks.exchange)
        self._check_weights_of_server(metrics)
        for name, value in metrics.items():
            self._window.add(name, value, 1.0)
        version = stats.sampler.get("rollout/weights_version") if not (stats.stale and stats.refills) else None
        self.record.begin(rollout, keep, self.state.global_step, version)

    def finish_step(self) -> None:
        """Before the optimiser's step: record, check, and let the critic learn."""
        if self._unscored is not None:
            stats, rollout, keep = self._unscored
            self._unscored = None
            take_scores(rollout, self._records)
            self._records = [replace(record, entropy=None) for record in self._records]  # logged as the rollout's
            self._note(stats, rollout, keep)
        self.record.update(self._records)
        super().finish_step()
        if self.critic is not None and self._minibatch is not None:
            batch = self._minibatch.batch.to(self.args.device)
            for name, value in self.critic.update(batch, real=self._minibatch.real).items():
                self._window.add(name, value, 1.0)

    def after_step(self) -> None:
        """After the optimiser's step: time, and the record of a rollout that is used up."""
        super().after_step()
        self._minibatch = None
        self.state.epoch = self._drawn / len(self.source.prompts)
        # Seconds per rollout: every step is a part of one.
        steps = self.buffer.total if self.buffer is not None else self.args.steps_per_rollout
        self._window.add("seconds/update", time.perf_counter() - self._handed_out, 1 / steps)
        if self.buffer is not None and self.buffer.done:
            self.record.write()

    def _sample(self, stats: RolloutStats) -> Rollout:
        """This rank's share: sampled, rewarded, filtered and refilled. `keep` is set only where nothing is left."""
        filters = [c for c in self.rollout_credits if c.phase == "filter"]
        refill = any(getattr(c, "refill", False) for c in filters)
        target = count = self.args.prompts_per_rollout // self.ranks.world
        rounds: list[Rollout] = []
        sampled = found = 0.0
        while True:
            rollout = self._sample_round(len(rounds), count, stats)
            with stats.timed("credit"):
                for one in filters:
                    self.scorer.add(rollout, one.needs)
                    one(rollout)
            rounds.append(rollout)
            missing = self.ranks.largest(target - sum(int(kept(r).sum()) for r in rounds))
            if not refill or missing <= 0 or len(rounds) > self.args.max_refills:
                break
            sampled += sum(self.ranks.exchange(count))
            found += sum(self.ranks.exchange(int(kept(rollout).sum())))
            # As many as are likely to give what is missing.
            count = target if not found else min(target, -int(-missing * sampled // found))
        stats.refills = len(rounds) - 1
        return chosen_prompts(rounds, target) if filters else rounds[0]

    def _sample_round(self, number: int, count: int, stats: RolloutStats) -> Rollout:
        """Sample `count` prompts on every rank, unless that is done already, and reward the completions."""
        sample = self._ahead or self._round(self.rollouts, number, count)
        self._ahead = None

        def work() -> tuple[Rollouts, RewardResult | None]:
            with stats.timed("rollout"):
                sampled = sample()
            with stats.timed("reward"):
                return sampled, self._reward(sampled, evaluating=False)

        sampled, result = self.ranks.together(work)
        if stats.stale is not None and sample.step < self.state.global_step:
            stats.stale += len(sampled.completions)
        rollout = self._rewarded(sampled, result)
        if result is not None and self.args.num_generations > 1:
            self.groups.add(rollout)
        stats.add(sampled, rollout, result, self._task)
        return rollout

    def _round(self, rollout: int, number: int, count: int) -> Round:
        """A round of a rollout, with the next prompts."""
        items, seeds = self.source.draw(count)
        sampling = self.args.sampling().at(rollout)
        sampling = sampling.at(number) if number else sampling

        def work() -> Rollouts:
            with self.accelerator.autocast():  # as the trainer computes
                sampled = self.sampler.sample(seeds, n=self.args.num_generations, sampling=sampling)
            return replace(sampled, prompts=tuple(items))

        return Round(work, self.state.global_step)

    def _reward(self, sampled: Rollouts, *, evaluating: bool) -> RewardResult | None:
        if self.rewards is None or all(f.evaluate_only and not evaluating for f in self.rewards.functions):
            return None
        texts = None if self.rewards.tokenizer is not None else [""] * len(sampled.completions)
        return self.rewards.score(sampled, texts, evaluating=evaluating, trainer_state=self.state)

    def _rewarded(self, sampled: Rollouts, result: RewardResult | None) -> Rollout:
        """Completions and their rewards as rollout credits see them."""
        device = self.args.device
        batch = sampled.to_batch().to(device)
        if self._temperature != 1:  # what the sampler says of the distribution that `old_logps` are of
            batch.columns.pop("raw_logps", None)
            if "sampling_logps" in batch.columns and not sampled.sampling.truncates:
                batch.columns["raw_logps"] = batch.columns["sampling_logps"]
        by_name = {} if result is None else result.by_name
        tokens = None if result is None else result.token_rewards
        return Rollout(
            batch=batch,
            rewards=torch.zeros(batch.n_completions, device=device) if result is None else result.outcome.to(device),
            by_name={name: values.to(device) for name, values in by_name.items()},
            correct=None if result is None else result.correct(self.args.correct_from).to(device),
            token_rewards=None if tokens is None else tokens.to(device),
            prompt_ids=batch.rows,
            index=self.rollouts,
            max_new_tokens=self.args.max_new_tokens,
            max_tokens=self.args.max_tokens_per_microbatch,
            model=self.model,
            head_of=lambda: head_of(self.model).detach().tempered(self._temperature),
            exchange=self.ranks.exchange,
            passes=self._passes,
        )

    def _hold_head(self, rollout: Rollout) -> None:
        """Of a sharded policy, gather the head that credits may ask for: all ranks at once, not where one needs it."""
        if self.is_fsdp_enabled and any("hidden" in credit.needs for credit in self.rollout_credits):
            head = head_of(self.model).detach().tempered(self._temperature)
            rollout.head_of = lambda: head

    def _assign_credit(self, rollout: Rollout) -> None:
        """Rewards to advantages, token by token."""
        for one in self.rollout_credits:
            if one.phase != "filter":
                one(rollout)
        advantages = rollout.advantages
        if advantages is None:
            return
        if rollout.weights is not None and not self._takes("weights"):
            # Outside the clip and not negative: the same as weighing the losses.
            rollout.advantages = advantages = advantages * rollout.weights
        shape, expected = tuple(advantages.shape), (rollout.segments.total,)
        require(shape == expected, RunError, f"advantages have shape {shape}; expected {expected}")
        if not bool(torch.isfinite(advantages).all()):
            completion = int(rollout.segments.ids[(~torch.isfinite(advantages)).nonzero()[0, 0]])
            row = rollout.prompt_ids[int(rollout.group[completion])]
            raise RunError(f"rollout {rollout.index}: an advantage of row {row} is not a finite number")

    def _takes(self, name: str) -> bool:
        return name in self.objective.needs or name in self.objective.optional

    def _cut(self, rollout: Rollout, keep: Tensor, most: int) -> RolloutBuffer:
        """What to train on, in minibatches; of the columns those that the updates read."""
        read = {"values", "returns"} if self.critic is not None else set()
        columns = {n: v for n, v in rollout.quantities.items() if n in read or self._takes(n)}
        if rollout.advantages is not None:
            columns["advantages"] = rollout.advantages
        if rollout.weights is not None and self._takes("weights"):
            columns["weights"] = rollout.weights
        dtype = torch.float64 if self.model.dtype == torch.float64 else torch.float32  # as log-probabilities are
        columns = {n: v.detach().to(dtype) for n, v in columns.items()}
        if self._unscored is not None:
            columns[PLACE] = torch.arange(rollout.segments.total, device=rollout.rewards.device)
        whole = replace(rollout.batch, columns=columns)
        trained = None if rollout.masked is None else ~rollout.masked
        if trained is not None:
            keep = keep & (torch.bincount(whole.group[trained], minlength=whole.n_prompts) > 0)
        prompts = keep.nonzero()[:, 0].tolist()
        return RolloutBuffer(
            whole.select(prompts, trained) if prompts else None,
            whole.select([0]),
            minibatches=min(self.args.minibatches, most),
            epochs=self.args.rollout_epochs,
            seed=derived_seed(self.args.seed, "minibatches", rollout.index),
        )

    # ---- One rollout ahead. All ranks call these ----

    def _sample_ahead(self, left: int) -> None:
        """Begin with the next rollout, if there will be one; `left`: most prompts of this one on any rank."""
        steps = min(self.args.minibatches, left) * self.args.rollout_epochs
        if self.state.global_step + steps < self.args.max_steps:
            count = self.args.prompts_per_rollout // self.ranks.world
            self._ahead = self._round(self.rollouts + 1, 0, count).begin(self.args.device)

    def _settle(self) -> None:
        """Wait until no rank samples ahead any more. What went wrong is raised where the rollout is wanted."""
        if self._ahead is not None:
            self.ranks.together(self._ahead.settle)

    def _leave_ahead(self) -> None:
        """Training has ended: stop the rollout that is under way, which nobody wants any more."""
        if self._ahead is not None:
            if self._copy is not None:
                self._copy.stopped = True
            self._ahead.settle(LEAVE)
        self._ahead = None

    @property
    def _drawn(self) -> int:
        """Prompts drawn so far on all ranks, without those of the rollout ahead."""
        return self.source.drawn - (self.args.prompts_per_rollout if self._ahead is not None else 0)

    # ---- Samplers with weights of their own: give them the policy's present ones ----

    def _refresh_sampler(self) -> None:
        """Copy the policy, or give the server it or its adapter: in a folder, or sent. All ranks call this."""
        self._settle()
        if self._copy is not None:
            self._copy.refresh()
        server = self._server()
        if server is None:
            return
        adapter = is_peft(self.model)
        trained = "an adapter" if adapter else "no adapter"
        what = f"sampler {server.name!r}: refresh is {server.how!r}, but {trained} is trained"
        require(adapter == (server.how == "adapter"), RecipeError, what)

        def load() -> Any:
            main = self.is_world_process_zero()
            if server.how == "nccl":
                weights = StreamedWeights(self.model)
                if main:
                    server.refresh(weights)
                else:
                    deque(weights, maxlen=0)
                return server.weights if main else None
            state = gathered(self.model, trained_only=adapter, keep=main) if self.is_fsdp_enabled else None
            if not main:
                return None
            folder = self.output_path / SAMPLER_FOLDER
            policy: Any = self.model
            shutil.rmtree(folder, ignore_errors=True)
            with no_progress_bar():
                policy.save_pretrained(folder, state_dict=state)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            server.refresh(folder)  # the server may read it again: it stays until the next one
            return server.weights

        # Other ranks ask the same servers, for these weights.
        server.weights = next(f for f in self.ranks.exchange(self.ranks.together(load)) if f is not None)

    def _check_weights_of_server(self, metrics: Mapping[str, float]) -> None:
        """Raises `RolloutError` if a server that was given the policy's weights samples from another distribution."""
        off = metrics.get("mismatch/mean_abs", 0.0)
        if self._server() is None or not off > FAR:
            return
        if metrics.get("rollout/staleness"):  # the policy itself has moved since it sampled: ask for tokens of now
            off = self._present_mismatch()
        what = f"the server's log-probabilities differ from the policy's by {off:.2g} nats per token"
        what += "; expected a server started with this model, whose logps setting says what it gives"
        require(not off > FAR, RolloutError, what)

    def _present_mismatch(self) -> float:
        """How far the server is from the policy as it is now, on one prompt per rank: mean nats per token."""
        self._settle()
        prompt = self.source.prompts[self.ranks.rank % len(self.source.prompts)]
        n, sampling = self.args.num_generations, self.args.sampling().at(self.rollouts)
        sampled = self.ranks.together(lambda: self.sampler.sample([prompt], n=n, sampling=sampling))
        rollout = self._rewarded(sampled, None)
        self.scorer.add(rollout, {OLD_LOGPS})
        logps, own = rollout.quantities["raw_logps"], rollout.quantity(OLD_LOGPS)
        parts = self.ranks.exchange(sampler_mismatch(logps, own, rollout.segments))
        return joined_mismatch(parts)["mismatch/mean_abs"]

    def _release_sampler(self) -> None:
        """Remove what `_refresh_sampler` left, here and on the server, once no more is sampled. All ranks call this."""
        server = self._server()
        if server is None:
            return
        if self.is_world_process_zero():
            server.release()
            shutil.rmtree(self.output_path / SAMPLER_FOLDER, ignore_errors=True)

    def _server(self) -> Any:
        """The sampler that has to be given weights, also under one that branches; or None."""
        server: Any = getattr(self.sampler, "sampler", self.sampler)
        return None if getattr(server, "how", "none") == "none" else server

    # ---- Evaluation: sample, reward, average with intervals ----

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """This rank's share of the evaluation prompts."""
        prompts = self._prompts(chosen_dataset(self, eval_dataset), "eval")
        self._check_prompts(prompts)
        return list(prompts)[self.ranks.rank :: self.ranks.world]

    def evaluation_loop(self, dataloader: Any, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> EvalLoopOutput:
        """Sample completions of all evaluation prompts and average their rewards; see `completion_metrics`."""
        self.callback_handler.eval_dataloader = dataloader
        try:
            self._refresh_sampler()
            own = self.ranks.together(lambda: self._evaluated(dataloader))
            entries = [entry for part in self.ranks.exchange(own) for entry in part]
        finally:
            if not self.is_in_train:  # else the next rollout refreshes
                self._release_sampler()
        return loop_output(completion_metrics(entries), metric_key_prefix, len(entries))

    def _evaluated(self, prompts: list[PromptItem]) -> list[dict[str, Any]]:
        if not prompts:
            return []
        n = self.args.eval_generations
        sampler = getattr(self.sampler, "sampler", self.sampler)  # without branches
        with self.accelerator.autocast():
            sampled = sampler.sample(prompts, n=n, sampling=self.args.eval_sampling())
        result, entries = self._reward(sampled, evaluating=True), []
        correct = None if result is None else result.correct(self.args.correct_from)
        for index, (prompt, group) in enumerate(sampled):
            entry: dict[str, Any] = {"lengths": [len(c.ids) for c in group], "truncated": [c.truncated for c in group]}
            part = slice(index * n, (index + 1) * n)
            if result is not None and correct is not None:
                entry["reward"], entry["correct"] = result.total[part].tolist(), correct[part].tolist()
                entry["by_name"] = {name: values[part].tolist() for name, values in result.by_name.items()}
                entry |= {} if self._task is None else {"task": str(prompt.raw[self._task])}
            entries.append(entry)
        return entries

    # ---- What is in checkpoints beside the policy: rollout credits, the rollout under way, critic and record ----

    def _start_clean(self) -> None:
        fresh = not self.rollouts
        require(fresh, RunError, "this trainer has trained already; make a new one, or resume from its checkpoint")
        super()._start_clean()
        if self.is_world_process_zero():
            self.record.restart(0)

    def run_identity(self) -> dict[str, Any]:
        args = self.args
        return {
            **super().run_identity(),
            "credit": self._described_credits,
            "rewards": [[f.name, f.weight] for f in self.rewards.functions] if self.rewards is not None else None,
            "sampler": describe_sampler(self.sampler),
            "sampling": json.loads(json.dumps(asdict(args.sampling()))),  # as a checkpoint has it
            **{name: getattr(args, name) for name in ("correct_from", "num_generations", "prompts_per_rollout")},
            **{name: getattr(args, name) for name in ("rollout_epochs", "logps_at_temperature")},
            "critic": self.critic.describe() if self.critic is not None else None,
            "max_staleness": args.max_staleness or None,  # checkpoints from before it know nothing of it
        }

    def _warn_of_no_gradient(self) -> None:
        """Rollouts without a gradient are said as they come, and `groups` at the end."""

    def save_extra(self, staged: Path) -> dict[str, Any]:
        if self._minibatch is not None and self.buffer is not None:
            self.buffer.position -= 1  # saved because its loss was not finite: a resumed run meets it again
            self._minibatch = None
        if self.buffer is not None and not self.buffer.done:
            folder = staged / BUFFER
            folder.mkdir(parents=True, exist_ok=True)
            self.buffer.save(folder / f"rank-{self.ranks.rank}.pt")
        if self._ahead is not None:
            self._ahead.settle()
            # Of one that failed nothing is kept: it is sampled anew if the run is resumed.
            if not any(self.ranks.exchange(self._ahead.error is not None)):
                state = packed_round(self._ahead(), self._ahead.step)
                write_text(staged / AHEAD / f"rank-{self.ranks.rank}.json", json.dumps(state))
        if self.critic is not None and self.args.should_save:
            self.critic.save(staged / CRITIC)
        return {"rollouts": self.rollout_state(), "record": self.record.pending, "groups": vars(self.groups)}

    def rollout_state(self) -> dict[str, Any]:
        """What a checkpoint needs beside the buffer: JSON-like, the same on all ranks."""
        states = {key: credit.state_dict() for key, credit in self._credits_by_name().items()}
        return {"index": self.rollouts, "drawn": self._drawn, "credit": {k: s for k, s in states.items() if s}}

    def restore_extra(self, checkpoint: Path, extra: dict[str, Any]) -> None:
        state = extra["rollouts"]
        self.rollouts, self.source.drawn, self.buffer = state["index"], state["drawn"], None
        self.groups = Groups(**extra.get("groups", {}))  # checkpoints from before it do not count them
        credits = self._credits_by_name()
        for key, stored in state["credit"].items():
            credits[key].load_state_dict(stored)  # the same credits: `run_identity` has them
        self._ahead = None
        if states := [read_json(path) for path in by_rank(checkpoint / AHEAD)]:
            prompts, _ = self.source.draw(self.args.prompts_per_rollout // self.ranks.world)
            self._ahead = unpacked_round(states, prompts, self.args.sampling().at(self.rollouts), self.ranks)
        if paths := by_rank(checkpoint / BUFFER):
            raw = {row: item.raw for row, item in self.source.prompts.by_row.items()}
            self.buffer = RolloutBuffer.load(paths, self.ranks.rank, self.ranks.world, raw)
        if self.critic is not None:
            self.critic.load(checkpoint / CRITIC)
        if self.is_world_process_zero():
            self.record.restart(state["index"], extra["record"])

    def _credits_by_name(self) -> dict[str, RolloutCredit]:
        """Rollout credits by name; a second one of a name gets a number."""
        seen, found = Counter[str](), {}
        for credit in self.rollout_credits:
            seen[credit.name] += 1
            found[credit.name if seen[credit.name] == 1 else f"{credit.name}-{seen[credit.name]}"] = credit
        return found


def by_rank(folder: Path) -> list[Path]:
    """The files that all ranks wrote there, in the order of ranks."""
    return sorted(folder.glob("rank-*"), key=lambda path: int(path.stem.removeprefix("rank-")))


def check_ahead(max_staleness: int, sampler: Any, objective: BoundObjective) -> None:
    """Raises `RecipeError` if a rollout cannot be sampled while the policy is trained, or not be corrected for."""
    if not max_staleness:
        return
    below = sampler.get("sampler") if isinstance(sampler, Mapping) else getattr(sampler, "sampler", None)
    own, under = (
        one.get("name") if isinstance(one, Mapping) else getattr(one, "name", one) for one in (sampler, below)
    )
    what = f"max_staleness is {max_staleness}, and "
    why = "the sampler continuous seeds torch's random numbers, which training draws from at the same time"
    require("continuous" not in (own, under), RecipeError, f"{what}{why}; expected hf or server")
    why = "branching on a server reads the entropies of the policy while it is trained"
    require(under != "server", RecipeError, f"{what}{why}; expected server alone, or branching on hf")
    why = f"objective {objective.name!r} takes neither advantages nor weights, so nothing corrects for older weights"
    takes = {ADVANTAGES, "weights"} & (objective.needs | objective.optional)
    require(takes, RecipeError, f"{what}{why}; expected max_staleness 0")


def check_sharding(fsdp: Any, sampler: Any) -> None:
    """Raises `RecipeError` if the model is sharded and the sampler needs all of it in every process."""
    where = f"fsdp is {fsdp!r}" if fsdp else "accelerate was started with FSDP"
    name = sampler.get("name") if isinstance(sampler, Mapping) else sampler
    serves, name = name == "server" or hasattr(sampler, "how"), getattr(sampler, "name", name) or "hf"
    what = f"{where}; sampler {name!r} needs the whole model in every process, which has a shard of it"
    instead = "the sampler server, or no fsdp: several processes each with a copy (accelerate launch --multi_gpu), and "
    instead += "for memory lora, bf16 and max_tokens_per_microbatch"
    require(serves or not (fsdp or launched_with("FSDP")), RecipeError, f"{what}. Expected {instead}")


def set_lengths(args: OnlineConfig, prompts: int) -> None:
    """Set the batch size and the number of steps that follow from the prompts."""
    cuts = args.world_size * args.minibatches
    parts = f"{args.world_size} processes x {args.minibatches} minibatches"
    what = f"prompts_per_rollout is {args.prompts_per_rollout}, which {parts} do not divide"
    require(args.prompts_per_rollout % cuts == 0, RecipeError, f"{what}; expected a multiple of {cuts}")
    args.per_device_train_batch_size = args.prompts_per_minibatch
    args.max_steps = args.steps_for(prompts)


def with_implied(
    credits: Sequence[RolloutCredit], objective: BoundObjective, args: OnlineConfig
) -> list[RolloutCredit]:
    """Rollout credits, and those that the objective or a setting asks for and nobody gave."""
    made = list(credits)
    if ADVANTAGES in objective.needs and not any(c.phase == "advantages" for c in made):
        made = resolve_rollout_credit([*made, make_rollout_credit("group")])
    if args.max_staleness and not any("weights" in getattr(c, "provides", ()) for c in made):
        made = resolve_rollout_credit([*made, make_rollout_credit("importance")])
    return made


def check_rewards(
    objective: BoundObjective,
    credits: Sequence[RolloutCredit],
    correct_from: str | None,
    weights: Mapping[str, float | None],
) -> None:
    """Check that there is something to learn from; `weights` of rewards by name, None: in evaluation alone."""
    given = any(weights.values()) or any(c.phase == "rewards" for c in credits)
    found = "only rewards of weight 0 or for evaluation" if weights else "none"
    what = f"objective {objective.name!r} learns from rewards, got {found}"
    require(given or ADVANTAGES not in objective.needs, RecipeError, what)
    names = [name for name, weight in weights.items() if weight is not None]
    held = correct_from in weights
    why = ", which is evaluate_only; expected a reward of training" if held else nearest(str(correct_from), names)
    require(correct_from is None or correct_from in names, RecipeError, f"correct_from is {correct_from!r}{why}")


def check_tasks(column: str | None, rows: Iterable[tuple[Any, Any, Mapping[str, Any]]]) -> None:
    """Raises `DataError` for a row without the `column` that names its task; `rows` are (file, row, its columns)."""
    for file, row, raw in rows if column is not None else ():
        if column not in raw:
            what, expected = "the column that names tasks is missing", "a column of the rows as task_column"
            near = nearest(str(column), raw)
            raise DataError(what, file=file, row=row, field=column, expected=expected + near)


def check_credits(objective: BoundObjective, credits: Sequence[RolloutCredit], args: OnlineConfig, critic: Any) -> None:
    """Check that objective, rollout credits, critic and settings go together."""
    name, needs = objective.name, objective.needs
    whole = (TAUGHT | {"kl"}) & needs
    what = f"logps_at_temperature: objective {name!r} compares whole distributions, at temperature 1"
    require(not whole or args.logps_temperature == 1, RecipeError, what)
    what = f"objective {name!r} learns from pairs of a chosen and a rejected completion; online training samples groups"
    require(objective.unit != "pairs", RecipeError, f"{what}: use grpo, gspo, dcpo, ppo or reinforce")
    what = f"objective {name!r} trains a reward model, not a policy that is sampled from"
    require(objective.main == "logps", RecipeError, what)
    setters = [c.name for c in credits if c.phase == "advantages"]
    provided = frozenset(column for c in credits for column in getattr(c, "provides", ()))
    takes = ADVANTAGES in needs
    what = f"objective {name!r} takes no advantages, which credit {setters and setters[0]!r} makes"
    require(takes or not setters, RecipeError, what)
    what = f"objective {name!r} needs advantages; give a rollout credit that makes them"
    require(not takes or setters or ADVANTAGES in provided, RecipeError, what)
    for one in credits:
        if (check := getattr(one, "check_limit", None)) is not None:
            check(args.max_new_tokens)
        alone = getattr(one, "needs_group", False) and args.num_generations < 2
        what = f"credit {one.name!r} compares completions of a prompt; num_generations is {args.num_generations}"
        require(not alone, RecipeError, f"{what}, expected at least 2")
    asking = [c.name for c in credits if "values" in c.needs] + ([name] if "values" in needs else [])
    if asking:
        require(critic is not None, RecipeError, f"{asking[0]!r} needs values, which a critic gives; got critic=None")
    if critic is not None:
        what = "a critic learns from returns, which no rollout credit gives; use gae, or leave the critic out"
        require("returns" in provided, RecipeError, what)
        what = "a critic does not train in fp16, which needs its loss scaled; expected bf16, or neither"
        require(not args.fp16, RecipeError, what)
    missing = ", ".join(sorted(set(needs) - {ADVANTAGES} - SCORED - FROZEN - TAUGHT - provided))
    require(not missing, RecipeError, f"objective {name!r} needs {missing}; no rollout credit gives them")


def resolve_rewards(rewards: Any, tokenizer: Any) -> RewardSuite | None:
    """Rewards as they are given to the trainer; None: only token rewards that a rollout credit makes, or none."""
    if rewards is None or (isinstance(rewards, (list, tuple)) and not rewards):
        return None
    if not isinstance(rewards, RewardSuite):
        given = list(rewards) if isinstance(rewards, (list, tuple)) else [rewards]
        rewards = RewardSuite([_reward(one) for one in given], tokenizer=tokenizer)
    if rewards.tokenizer is None:
        rewards.tokenizer = tokenizer
    for function in rewards.functions if rewards.tokenizer is None else ():
        reads_text = {"completions", "prompts"} & function.parameters.keys()
        what = f"reward {function.name!r} reads text, which needs a tokenizer (processing_class)"
        require(not reads_text, RecipeError, what)
    return rewards


def _reward(one: Any) -> Any:
    given = {"name": one} if isinstance(one, str) else one
    if not isinstance(given, dict):
        return one
    require(isinstance(given.get("name"), str), RecipeError, f"a reward needs a name, got {one}")
    return make_reward(given["name"], **{k: v for k, v in given.items() if k != "name"})


def described(credit: Any) -> dict[str, Any]:
    """A rollout credit's name and its plain settings, taken before it has a state."""
    given = getattr(credit, "given", None)
    plain = {k: v for k, v in vars(credit).items() if v is None or isinstance(v, (bool, int, float, str))}
    # As it comes back from JSON, where tuples are lists.
    return {"name": credit.name, **json.loads(json.dumps(plain if given is None else given, default=str))}
