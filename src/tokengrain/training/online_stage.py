"""An online stage of a recipe as an `OnlineTrainer`: its rewards, credit steps, sampler, critic and reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokengrain.objectives import make_objective
from tokengrain.recipe import ModelSpec, ResolvedStage
from tokengrain.recipe.inherit import training_keys
from tokengrain.recipe.online_checks import WORLD_REWARD
from tokengrain.recipe.schema import CREDIT_MODELS
from tokengrain.training.plan import StagePlan
from tokengrain.training.sources import build_reference, build_teacher, make_source, ready_for_teacher
from tokengrain.training.workshop import Workshop
from tokengrain.worlds import load_world


def build_online_trainer(
    shop: Workshop,
    plan: StagePlan,
    folder: Path,
    model: Any,
    peft_config: Any,
    datasets: tuple[Any, Any],
    *,
    finished: bool = False,
) -> Any:
    """The trainer of an online stage.

    Args:
        folder: where it writes.
        model, peft_config: the policy, and its new adapter if it gets one.
        datasets: training and held-out prompts.
        finished: the policy is only evaluated; it is sampled from in this process, whatever the stage's sampler.
    """
    from tokengrain.training.online import OnlineConfig, OnlineTrainer

    stage, (train, held_out) = plan.stage, datasets
    assert stage.online is not None
    tokenizer = shop.tokenizer(stage.model)
    args = OnlineConfig(output_dir=str(folder), seed=shop.recipe.seed, **training_keys(stage))
    model, peft_config = ready_for_teacher(stage, model, peft_config, args)
    return OnlineTrainer(
        model,
        args,
        objective=make_objective(**(stage.objective or {})),
        rewards=build_rewards(stage, tokenizer, shop),
        credit=build_steps(stage, tokenizer, shop),
        sampler=None if finished else stage.online.sampler,
        critic=build_critic(stage, model, shop),
        reference=build_reference(stage, shop),
        teacher=build_teacher(stage, model, shop),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def build_rewards(stage: ResolvedStage, tokenizer: Any, shop: Workshop) -> Any:
    """The stage's reward functions as a `RewardSuite`; None if all rewards come per token from a credit step."""
    from tokengrain.rewards import RewardSuite, make_reward

    assert stage.online is not None
    functions = []
    for reward in stage.online.rewards:
        settings = {k: v for k, v in reward.items() if k != "name"}
        if reward["name"] == WORLD_REWARD:
            functions.append(world_reward(stage, settings))
        else:
            given = reward_inputs(reward, stage.online.prompts.chat, tokenizer, shop)
            functions.append(make_reward(reward["name"], **{**settings, **given}))
    return RewardSuite(functions, tokenizer=tokenizer) if functions else None


def reward_inputs(reward: dict[str, Any], chat: bool, tokenizer: Any, shop: Workshop) -> dict[str, Any]:
    """The models and tokenizers that a reward takes beside its settings, and whether prompts of text are chats."""
    from tokengrain.rewards.registry import reward_objects

    takes = reward_objects(reward["name"])
    if "model" not in takes:
        return {}
    spec = ModelSpec.model_validate(reward["model"])
    found = {
        "model": lambda: shop.completion_model(spec),
        "tokenizer": lambda: tokenizer,
        "reward_tokenizer": lambda: shop.tokenizer(spec, own_template=True),
    }
    return {"chat": reward.get("chat", chat), **{name: found[name]() for name in takes}}


def world_reward(stage: ResolvedStage, settings: dict[str, Any]) -> Any:
    """The reward that the stage's world brings along."""
    from tokengrain.rewards import RewardFunction

    world: Any = load_world(stage.data.train)
    return RewardFunction(world.reward, **{"name": WORLD_REWARD, **settings})


def build_steps(stage: ResolvedStage, tokenizer: Any, shop: Workshop) -> list[Any]:
    """The stage's credit steps, with the models that they ask."""
    from tokengrain.training.online.registry import make_step, step_objects

    assert stage.online is not None
    steps = []
    for given in stage.online.credit:
        arguments = {k: v for k, v in given.items() if k not in ("name", "source", *CREDIT_MODELS)}
        takes = step_objects(given["name"])
        for key in CREDIT_MODELS:
            if given.get(key) is not None:
                arguments[key] = shop.frozen(ModelSpec.model_validate(given[key]))
        if "tokenizer" in takes:
            arguments["tokenizer"] = tokenizer
        source = given.get("source")
        if source is not None:
            mapping = {"name": source} if isinstance(source, str) else source
            arguments["source"] = make_source(mapping, stage.model, tokenizer, shop)
        steps.append(make_step(given["name"], **arguments))
    return steps


def build_critic(stage: ResolvedStage, policy: Any, shop: Workshop) -> Any:
    """The stage's critic, or None; it starts from the model that `critic:` names, else from the policy."""
    assert stage.online is not None
    if stage.online.critic is None:
        return None
    from tokengrain.training.online.critic import Critic
    from tokengrain.training.reward_models import load_reward_model

    settings = {k: v for k, v in stage.online.critic.items() if k != "model"}
    given = stage.online.critic.get("model")
    if given is None:
        return Critic(policy, **settings)
    spec = ModelSpec.model_validate(given)
    return Critic(load_reward_model(spec, shop.path(spec), merge_adapter=True).to(shop.state.device), **settings)
