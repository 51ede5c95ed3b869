"""What types alone cannot say about an online stage: objective, rewards, credit steps, sampler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tokengrain.callables import validate_settings
from tokengrain.errors import RecipeError
from tokengrain.recipe.schema import CREDIT_MODELS, OnlineStage, ResolvedStage

WORLD_REWARD = "world"
"""Name of the reward that a world brings along."""


def check_online(stage: ResolvedStage, where: str) -> Iterator[str]:
    """Every mistake in an online stage, one line each."""
    own = stage.online
    assert own is not None
    yield from _check_objective(stage, where)
    if stage.teacher is None:  # who learns from a teacher needs no reward
        yield from _check_rewards(stage, own, where)
    yield from _check_credit(stage, own, where)
    yield from _check_sampler(stage, own, f"{where}.sampler")
    if own.critic is not None:
        from tokengrain.training.online.critic import Critic

        settings = {k: v for k, v in own.critic.items() if k != "model"}
        yield from _settings(f"{where}.critic", "critic", Critic, settings)
    if stage.reference == "columns":
        yield f"{where}.reference: sampled completions have no stored columns; use copy, adapter_off or a model"
    if stage.reference == "adapter_off" and stage.lora is None:
        yield f"{where}.reference: adapter_off needs lora; without it the weights change: use copy"


def _check_objective(stage: ResolvedStage, where: str) -> Iterator[str]:
    from tokengrain.objectives import make_objective
    from tokengrain.training.credit import TAUGHT, check_together

    try:
        objective = make_objective(**(stage.objective or {}))
    except (RecipeError, TypeError) as error:
        yield f"{where}.objective: {error}"
        return
    taught = bool(TAUGHT & objective.needs)
    try:
        check_together(objective, None, stage.teacher)
    except RecipeError as error:
        yield f"{where}.teacher: {error}"
    if "advantages" not in objective.needs and not taught:
        yield f"{where}.objective: {objective.name} does not learn from samples' advantages; use a stage of kind train"


def _check_rewards(stage: ResolvedStage, own: OnlineStage, where: str) -> Iterator[str]:
    from tokengrain.rewards import RewardFunction, check_reward
    from tokengrain.rewards.registry import reward_objects

    if not own.rewards and not any(_makes_rewards(step) for step in own.credit):
        yield f"{where}.rewards: missing; expected for example [{{name: math}}], or a step such as token_rewards"
    for index, reward in enumerate(own.rewards):
        name = reward.get("name")
        models = reward_objects(str(name)) & {"model"}
        settings = {k: v for k, v in reward.items() if k != "name" and k not in models}
        for key in (key for key in models if reward.get(key) is None):
            yield f"{where}.rewards[{index}].{key}: missing; expected '@STAGE' (a stage of kind reward) or a path"
        if not isinstance(name, str):
            yield f"{where}.rewards[{index}].name: missing"
        elif name == WORLD_REWARD:
            if not stage.data.train.startswith("world://"):
                yield (
                    f"{where}.rewards[{index}]: the data are no world, so there is no reward of a world; expected "
                    "another one, such as [numeric] (given --model as well, a recipe takes its reward for real prompts)"
                )
            yield from _settings(f"{where}.rewards[{index}]", "reward 'world'", RewardFunction, settings)
        else:
            try:
                check_reward(name, settings)
            except RecipeError as error:
                yield f"{where}.rewards[{index}]: {error}"


def _settings(where: str, what: str, takes: Any, given: dict[str, Any]) -> Iterator[str]:
    try:
        validate_settings(what, takes, given)
    except RecipeError as error:
        yield f"{where}: {error}"


def _makes_rewards(step: dict[str, Any]) -> bool:
    """Whether a credit step may bring rewards of its own, as token_rewards and r3 do; the trainer asks the same."""
    from tokengrain.training.online.registry import step_class

    try:
        return getattr(step_class(str(step.get("name"))), "phase", None) == "rewards"
    except RecipeError:
        return False  # said elsewhere


def _check_credit(stage: ResolvedStage, own: OnlineStage, where: str) -> Iterator[str]:
    from tokengrain.training.online.registry import check_step, step_class, step_objects

    phases: list[tuple[str, Any]] = []
    for index, step in enumerate(own.credit):
        here, name = f"{where}.credit[{index}]", step.get("name")
        settings = {k: v for k, v in step.items() if k not in ("name", "source", *CREDIT_MODELS)}
        try:
            if not isinstance(name, str):
                raise RecipeError("name is missing; expected for example {name: group}")
            check_step(name, settings)
            phases.append((name, getattr(step_class(name), "phase", None)))
            takes = step_objects(name)
        except RecipeError as error:
            yield f"{here}: {error}"
            continue
        for key in ("source", *CREDIT_MODELS):
            if key in step and key not in takes:
                yield f"{here}.{key}: credit {name} takes no {key}; drop it"
        if isinstance(step.get("source"), dict):
            yield from _check_source(step["source"], f"{here}.source")
    setters = [name for name, phase in phases if phase == "advantages"]
    if len(setters) > 1:
        yield f"{where}.credit: {' and '.join(setters)} all set the advantages; expected one of them"


def _check_source(source: dict[str, Any], where: str) -> Iterator[str]:
    from tokengrain.credit import check_credit
    from tokengrain.training.sources import credit_settings

    try:
        name, settings = credit_settings(source)
        check_credit(name, settings)
    except RecipeError as error:
        yield f"{where}: {error}"


def _check_sampler(stage: ResolvedStage, own: OnlineStage, where: str) -> Iterator[str]:
    from tokengrain.rollout.registry import check_sampler

    try:
        found = check_sampler(own.sampler)
    except RecipeError as error:
        yield f"{where}: {error}"
        return
    given: Any = own.sampler
    if "sampler" in found:
        where, found, given = f"{where}.sampler", found["sampler"], given.get("sampler")
    if found["name"] != "server":
        return
    fitting = "adapter" if stage.lora is not None else "checkpoint"
    if "refresh" not in given:
        yield f"{where}.refresh: missing; expected {fitting}, or none for a server that keeps the weights it has"
    elif found["refresh"] not in (fitting, "none"):
        why = "an adapter is trained" if stage.lora is not None else "no adapter is trained (no lora)"
        yield f"{where}.refresh: got {found['refresh']!r}, but {why}; expected {fitting}"
