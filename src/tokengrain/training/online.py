"""`OnlineTrainer`: `PreferenceTrainer` whose batches are rollouts of the policy itself."""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from tokengrain.data.config import TokenizeConfig
from tokengrain.errors import DataError, RecipeError, RunError
from tokengrain.evaluation.statistics import mean_interval, mean_over_prompts, pass_at_k
from tokengrain.method import (
    FROZEN,
    TAUGHT,
    BoundObjective,
    CreditStep,
    CriticLike,
    RolloutStep,
    make_rollout_credit,
    resolve_rollout_credit,
)
from tokengrain.rewards.builtin import make_reward
from tokengrain.rewards.suite import RewardSuite
from tokengrain.rollout.sampler import PromptItem, Sampler, check_reachable, describe_sampler, make_sampler
from tokengrain.runs import ROLLOUT_FILE
from tokengrain.scoring.reference import ColumnReference, is_peft, resolve_reference
from tokengrain.scoring.score import head_of
from tokengrain.settings import nearest
from tokengrain.training.checkpoint import no_progress_bar
from tokengrain.training.checks import check_arguments, check_vocabulary, model_positions, models_in, vocabulary_size
from tokengrain.training.config import OnlineConfig
from tokengrain.training.evaluate import evaluated, meant
from tokengrain.training.loss import resolve_objective
from tokengrain.training.rollout import LoopParts, PromptDataset, Ranks, RolloutLoop, RolloutScorer
from tokengrain.training.rollout_log import RolloutRecord
from tokengrain.training.step import HostBatch
from tokengrain.training.trainer import PreferenceTrainer

# ----------------------------------------------------------------------------------------------------
# What an online run keeps in its checkpoints, and what makes a checkpoint this run's.

CRITIC, BUFFER = "critic", "rollout"


class OnlineStateMixin(PreferenceTrainer):
    """Saves and restores the rollout loop, the critic and the record of completions."""

    if TYPE_CHECKING:  # what OnlineTrainer adds
        args: OnlineConfig
        rewards: RewardSuite | None
        critic: CriticLike | None
        loop: RolloutLoop
        record: RolloutRecord
        sampler: Sampler
        _described_steps: list[dict[str, Any]]
        _minibatch: HostBatch | None

    def _start_clean(self) -> None:
        if self.loop.index:
            raise RunError("this trainer has trained already; make a new one, or resume from its checkpoint")
        super()._start_clean()
        if self.is_world_process_zero():
            self.record.restart(0)

    def run_identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be this run's."""
        args = self.args
        return {
            **super().run_identity(),
            "credit": self._described_steps,
            "rewards": [[f.name, f.weight] for f in self.rewards.functions] if self.rewards is not None else None,
            "sampler": describe_sampler(self.sampler),
            "sampling": json.loads(json.dumps(asdict(args.sampling()))),  # as a checkpoint has it
            "correct_from": args.correct_from,
            "num_generations": args.num_generations,
            "prompts_per_rollout": args.prompts_per_rollout,
            "rollout_epochs": args.rollout_epochs,
            "critic": self.critic.describe() if self.critic is not None else None,
        }

    def save_extra(self, staged: Path) -> dict[str, Any]:
        """The loop's state, this rank's part of the rollout under way, and the critic."""
        if self._minibatch is not None and self.loop.buffer is not None:
            self.loop.buffer.put_back()  # saved because its loss was not finite: a resumed run meets it again
            self._minibatch = None
        self.loop.save_buffer(staged / BUFFER)
        if self.critic is not None and self.args.should_save:
            self.critic.save(staged / CRITIC)
        return {"loop": self.loop.state_dict(), "record": self.record.pending}

    def restore_extra(self, checkpoint: Path, extra: dict[str, Any]) -> None:
        """Take up what `save_extra` left."""
        self.loop.load_state_dict(extra["loop"])
        self.loop.load_buffer(checkpoint / BUFFER)
        if self.critic is not None:
            self.critic.load(checkpoint / CRITIC)
        if self.is_world_process_zero():
            self.record.restart(extra["loop"]["index"], extra["record"])


def described(step: Any) -> dict[str, Any]:
    """A step's name and its plain settings, taken before it has a state."""
    given = getattr(step, "given", None)
    plain = {k: v for k, v in vars(step).items() if v is None or isinstance(v, (bool, int, float, str))}
    # As it comes back from JSON, where tuples are lists.
    return {"name": step.name, **json.loads(json.dumps(plain if given is None else given, default=str))}


# ----------------------------------------------------------------------------------------------------
# Samplers that are not this process: give them the policy's present weights.

SAMPLER_FOLDER = ".sampler"


def refresh_sampler(trainer: OnlineTrainer) -> None:
    """Save the policy (or its adapter) and have the server load it. All ranks call this.

    Nothing happens for a sampler that uses the model itself, or a server that is not to be refreshed.

    Raises:
        RecipeError: the server expects an adapter and none is trained, or a checkpoint and an adapter is.
        ServerError: the server does not load it; names its address.
    """
    server = _server(trainer)
    if server is None:
        return
    adapter = is_peft(trainer.model)
    if adapter != (server.how == "adapter"):
        trained = "an adapter" if adapter else "no adapter"
        raise RecipeError(f"sampler {server.name!r}: refresh is {server.how!r}, but {trained} is trained")
    folder = trainer.output_path / SAMPLER_FOLDER
    policy: Any = trainer.model

    def load() -> tuple[str | None, int] | None:
        if not trainer.is_world_process_zero():
            return None
        shutil.rmtree(folder, ignore_errors=True)
        with no_progress_bar():
            policy.save_pretrained(folder)
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(folder)
        server.refresh(folder)  # the server may read it again: it stays until the next one
        return server.adapter, server.version

    # Other ranks ask the same server, for the adapter under its new name.
    found = next(f for f in trainer.ranks.exchange(trainer.ranks.together(load)) if f is not None)
    server.adapter, server.version = found


def release_sampler(trainer: OnlineTrainer) -> None:
    """Remove what `refresh_sampler` left, here and on the server, once no more is sampled. All ranks call this."""
    server = _server(trainer)
    if server is None:
        return
    if trainer.is_world_process_zero():
        server.release()
        shutil.rmtree(trainer.output_path / SAMPLER_FOLDER, ignore_errors=True)
    server.adapter = None  # the next refresh names another


def _server(trainer: OnlineTrainer) -> Any:
    """The sampler that has to be given weights, also under one that branches; or None."""
    server: Any = getattr(trainer.sampler, "sampler", trainer.sampler)
    return None if getattr(server, "how", "none") == "none" else server


# ----------------------------------------------------------------------------------------------------
# What must fit together before online training starts.

ADVANTAGES = "advantages"
SCORED = frozenset({"old_logps", "entropy", "values"})
"""Quantities that the trainer computes for an objective, beside those of the reference."""


def own_settings(args: OnlineConfig, given: Collection[str]) -> OnlineConfig:
    """A copy of the settings, checked: a trainer sets in it what follows from its prompts, and another has others.

    Raises:
        RecipeError: as `check_arguments`.
    """
    check_arguments(args, OnlineConfig, given)
    return copy.copy(args)


def check_objective(objective: BoundObjective) -> None:
    """Raises `RecipeError` if it learns from pairs, or trains something else than a policy."""
    if objective.unit == "pairs":
        raise RecipeError(
            f"objective {objective.name!r} learns from pairs of a chosen and a rejected completion; online training "
            "samples groups: use grpo, gspo, dcpo, ppo or reinforce"
        )
    if getattr(objective, "main", "logps") != "logps":
        raise RecipeError(f"objective {objective.name!r} trains a reward model, not a policy that is sampled from")


def provided(steps: Sequence[CreditStep]) -> frozenset[str]:
    """Columns that credit steps add."""
    return frozenset(name for step in steps for name in getattr(step, "provides", ()))


def needed(objective: BoundObjective, steps: Sequence[CreditStep]) -> frozenset[str]:
    """Quantities that the objective and the credit steps cannot do without."""
    return frozenset(objective.needs).union(*(step.needs for step in steps))


def check_steps(objective: BoundObjective, steps: Sequence[CreditStep], args: OnlineConfig, *, critic: Any) -> None:
    """Check that steps, objective and group size go together.

    Raises:
        RecipeError: with the reason.
    """
    setters = [step.name for step in steps if step.phase == "advantages"]
    takes = ADVANTAGES in objective.needs
    if setters and not takes:
        raise RecipeError(f"objective {objective.name!r} takes no advantages, which credit {setters[0]!r} makes")
    if takes and not setters and ADVANTAGES not in provided(steps):
        raise RecipeError(f"objective {objective.name!r} needs advantages; give a credit step that makes them")
    for step in steps:
        if (check := getattr(step, "check_limit", None)) is not None:
            check(args.max_new_tokens)
        if getattr(step, "needs_group", False) and args.num_generations < 2:
            raise RecipeError(
                f"credit {step.name!r} compares completions of a prompt; num_generations is {args.num_generations}, "
                "expected at least 2"
            )
    if "values" in needed(objective, steps) and critic is None:
        who = next((s.name for s in steps if "values" in s.needs), objective.name)
        raise RecipeError(f"{who!r} needs values, which a critic gives; got critic=None")
    if critic is not None and "returns" not in provided(steps):
        raise RecipeError("a critic learns from returns, which no credit step gives; use gae, or leave the critic out")
    if critic is not None and args.fp16:
        raise RecipeError("a critic does not train in fp16, which needs its loss scaled; expected bf16, or neither")
    missing = set(objective.needs) - {ADVANTAGES} - SCORED - FROZEN - TAUGHT - provided(steps)
    if missing:
        raise RecipeError(f"objective {objective.name!r} needs {', '.join(sorted(missing))}; no credit step gives them")


def check_shares(args: OnlineConfig) -> None:
    """Raises `RecipeError` unless every rank gets as many prompts in every minibatch."""
    cuts = args.world_size * args.minibatches
    if args.prompts_per_rollout % cuts:
        raise RecipeError(
            f"prompts_per_rollout is {args.prompts_per_rollout}, which {args.world_size} processes x "
            f"{args.minibatches} minibatches do not divide; expected a multiple of {cuts}"
        )


def check_prompts(dataset: PromptDataset, model: nn.Module, max_new_tokens: int) -> None:
    """Check every prompt against the model.

    Raises:
        DataError: a prompt that leaves no room for a completion, or has a token that the model does not have.
    """
    limit, vocabulary = model_positions(model), vocabulary_size(model)
    for item in dataset:
        if limit is not None and len(item.ids) + max_new_tokens > limit:
            raise DataError(
                "prompt and completion are longer than the model's positions",
                file=dataset.name,
                row=item.row,
                value=f"{len(item.ids)} prompt tokens and max_new_tokens {max_new_tokens}",
                expected=f"at most {limit} together; set max_prompt_length or max_new_tokens",
            )
        if vocabulary is not None and max(item.ids) >= vocabulary:
            raise DataError(
                "a token id is outside the model's vocabulary",
                file=dataset.name,
                row=item.row,
                value=max(item.ids),
                expected=f"less than {vocabulary}; is this the model's own tokenizer?",
            )


def resolve_rewards(
    rewards: Any, tokenizer: Any, steps: Collection[CreditStep], objective: BoundObjective
) -> RewardSuite | None:
    """Rewards as they are given to the trainer.

    Args:
        rewards: a suite, one reward or a list; a reward is a `RewardFunction`, a function, a name, or a mapping with
            `name` and settings. None: only token rewards that a credit step makes, or none at all.

    Raises:
        RecipeError: unknown reward or setting; no reward where the objective learns from one; a function that reads
            text where there is no tokenizer.
    """
    if rewards is None or (isinstance(rewards, Sequence) and not isinstance(rewards, str) and not rewards):
        if ADVANTAGES in objective.needs and not any(step.phase == "rewards" for step in steps):
            raise RecipeError(f"objective {objective.name!r} learns from rewards, got none")
        return None
    if not isinstance(rewards, RewardSuite):
        given = list(rewards) if isinstance(rewards, (list, tuple)) else [rewards]
        rewards = RewardSuite([_reward(one) for one in given], tokenizer=tokenizer)
    if rewards.tokenizer is None:
        rewards.tokenizer = tokenizer
    if rewards.tokenizer is None:
        for function in rewards.functions:
            if {"completions", "prompts"} & function.parameters.keys():
                raise RecipeError(f"reward {function.name!r} reads text, which needs a tokenizer (processing_class)")
    return rewards


def check_correct_from(args: OnlineConfig, rewards: RewardSuite | None) -> None:
    """Raises `RecipeError` if the reward that says what is correct is not there."""
    if args.correct_from is None:
        return
    names = [] if rewards is None else [f.name for f in rewards.functions]
    if args.correct_from not in names:
        raise RecipeError(f"correct_from is {args.correct_from!r}{nearest(args.correct_from, names)}")


def _reward(one: Any) -> Any:
    if isinstance(one, str):
        return make_reward(one)
    if isinstance(one, dict):
        if not isinstance(one.get("name"), str):
            raise RecipeError(f"a reward needs a name, got {one}")
        return make_reward(one["name"], **{k: v for k, v in one.items() if k != "name"})
    return one


# ----------------------------------------------------------------------------------------------------
# Evaluation of a policy on prompts: sample, reward, average with intervals.


class EvalPrompts(Sequence[PromptItem]):
    """This rank's share of the prompts to evaluate on; `n_samples` is the size of the whole set."""

    def __init__(self, dataset: PromptDataset, rank: int, world: int) -> None:
        self.own, self.n_samples = dataset.items[rank::world], len(dataset)

    def __len__(self) -> int:
        return len(self.own)

    def __getitem__(self, index: Any) -> Any:
        return self.own[index]


def completion_metrics(entries: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Metrics of an evaluation.

    Args:
        entries: one per prompt, with `lengths` and `truncated` and, where there are rewards, `reward` and `by_name`
            (lists over its completions), and `correct`.

    Returns:
        `reward` with the ends of its 95 % interval (prompts are independent, completions of a prompt are not),
        `reward_<name>`, `length`, `truncated`, and with a reward that says what is correct `correct` with its interval.
    """
    lengths = [n for e in entries for n in e["lengths"]]
    metrics = {
        "length": sum(lengths) / len(lengths),
        "truncated": sum(t for e in entries for t in e["truncated"]) / len(lengths),
    }
    if not any("reward" in e for e in entries):
        return metrics
    metrics |= _with_interval("reward", [_mean(e["reward"]) for e in entries])
    for name in entries[0]["by_name"]:
        metrics |= _with_interval(f"reward_{name}", [_mean(e["by_name"][name]) for e in entries], interval=False)
    found = mean_over_prompts(torch.tensor([_mean(e["correct"]) for e in entries]))
    return metrics | {"correct": found.value, "correct_low": found.low, "correct_high": found.high}


def _mean(values: Sequence[float]) -> float:
    known = [v for v in values if v == v]
    return sum(known) / len(known) if known else math.nan


def _with_interval(name: str, per_prompt: Sequence[float], *, interval: bool = True) -> dict[str, float]:
    known = [v for v in per_prompt if v == v]
    if not known:
        return {}
    if len(known) < 2 or not interval:
        return {name: sum(known) / len(known)}
    found = mean_interval(known)
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


class OnlineEvaluationMixin(Trainer):
    """Overrides of `transformers.Trainer` that evaluate by sampling."""

    if TYPE_CHECKING:  # what OnlineTrainer adds
        args: OnlineConfig
        model: nn.Module
        sampler: Sampler
        rewards: RewardSuite | None
        ranks: Ranks

        def _prompts(self, data: Any, name: str) -> PromptDataset: ...

        def _refresh_sampler(self) -> None: ...

        def _release_sampler(self) -> None: ...

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """This rank's share of the evaluation prompts.

        Raises:
            DataError: there are none, or one does not fit the model.
        """
        prompts = self._prompts(meant(self, eval_dataset), "eval")
        check_prompts(prompts, self.model, self.args.max_new_tokens)
        return EvalPrompts(prompts, self.ranks.rank, self.ranks.world)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Sample completions of all evaluation prompts and average their rewards; see `completion_metrics`."""
        self.callback_handler.eval_dataloader = dataloader
        try:
            self._refresh_sampler()
            own = self.ranks.together(lambda: self._evaluated(list(dataloader)))
            entries = [entry for part in self.ranks.exchange(own) for entry in part]
        finally:
            if not self.is_in_train:  # else the next rollout refreshes
                self._release_sampler()
        metrics = completion_metrics(entries)
        if self.args.eval_generations > 1 and "correct" in entries[0]:
            metrics |= _pass_at_k([e["correct"] for e in entries])
        return evaluated(metrics, metric_key_prefix, dataloader.n_samples)

    def _evaluated(self, prompts: list[PromptItem]) -> list[dict[str, Any]]:
        """What became of each prompt; see `completion_metrics`."""
        if not prompts:
            return []
        n = self.args.eval_generations
        sampler = getattr(self.sampler, "sampler", self.sampler)  # without branches
        with self.accelerator.autocast():
            rollouts = sampler.sample(prompts, n=n, sampling=self.args.eval_sampling())
        entries: list[dict[str, Any]] = [
            {"lengths": [len(c.ids) for c in group], "truncated": [c.truncated for c in group]} for _, group in rollouts
        ]
        if self.rewards is None:
            return entries
        texts = None if self.rewards.tokenizer is not None else [""] * len(rollouts.completions)
        result = self.rewards.score(rollouts, texts)
        judge = result.by_name[self.args.correct_from or next(iter(result.by_name))]
        for index, entry in enumerate(entries):
            part = slice(index * n, (index + 1) * n)
            entry["reward"] = result.total[part].tolist()
            entry["by_name"] = {name: values[part].tolist() for name, values in result.by_name.items()}
            entry["correct"] = (judge[part] > 0.5).tolist()
        return entries


def _pass_at_k(correct: Sequence[Sequence[bool]]) -> dict[str, float]:
    """pass@k of 1, 2, 4, ... completions, as far as there are so many."""
    right = torch.tensor([sum(row) for row in correct])
    n = len(correct[0])
    ks = [2**i for i in range(n.bit_length()) if 2**i <= n]
    return {f"pass@{k}": float(pass_at_k(n, right, k).mean()) for k in ks}


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
        args = own_settings(args, kwargs)
        bound: BoundObjective = resolve_objective(objective)
        check_objective(bound)
        self.steps = resolve_rollout_credit(credit)
        if ADVANTAGES in bound.needs and not any(s.phase == "advantages" for s in self.steps):
            self.steps = resolve_rollout_credit([*self.steps, make_rollout_credit("group")])
        check_steps(bound, self.steps, args, critic=critic)
        self._needs = needed(bound, self.steps)
        self._described_steps = [described(step) for step in self.steps]
        self._tokenizer, self._tokenize, self.critic = processing_class, tokenize, critic
        self._max_new_tokens = args.max_new_tokens
        self.rewards = resolve_rewards(rewards, processing_class, self.steps, bound)
        check_correct_from(args, self.rewards)
        prompts = self._prompts(train_dataset, "train")
        if isinstance(eval_dataset, Mapping):
            eval_dataset = {name: self._prompts(data, name) for name, data in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._prompts(eval_dataset, "eval")
        check_shares(args)
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
        required = {name for name in self._needs if name in SCORED or name == "ref_logps"}
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
                check_prompts(dataset, model, self._max_new_tokens)

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
