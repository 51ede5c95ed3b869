"""What must fit together before online training starts."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from tokengrain.callables import nearest
from tokengrain.errors import DataError, RecipeError
from tokengrain.objectives import BoundObjective
from tokengrain.rewards import RewardSuite, make_reward
from tokengrain.training.checks import check_arguments, model_positions, vocabulary_size
from tokengrain.training.credit import FROZEN, TAUGHT
from tokengrain.training.online.config import OnlineConfig
from tokengrain.training.online.prompts import PromptDataset
from tokengrain.training.online.step import CreditStep

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
