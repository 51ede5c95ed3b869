"""What the stages of one run share: the process, and data and models that were loaded already."""

from __future__ import annotations

import gc
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tokengrain import models
from tokengrain.data.tokens import template_text, tokenizer_fingerprint
from tokengrain.errors import fingerprint
from tokengrain.method import CREDIT, FROZEN, ROLLOUT_CREDIT, TAUGHT, BoundObjective, make_objective
from tokengrain.recipe.check import WORLD_REWARD
from tokengrain.recipe.schema import CREDIT_MODELS, Recipe, ResolvedStage, credit_settings, training_keys
from tokengrain.run import inputs, show
from tokengrain.run.plan import StagePlan
from tokengrain.scoring.reference import is_peft
from tokengrain.specs import ModelSpec
from tokengrain.worlds import load_world


@dataclass
class Workshop:
    """What the stages of one run share: process state, data and models that were loaded already.

    Attributes:
        recipe: the run's recipe.
        console: where progress is shown.
        state: accelerate's `PartialState`: device, rank, number of processes.
    """

    recipe: Recipe
    console: Console
    state: Any
    _tokenizers: dict[str, Any] = field(default_factory=dict)
    _datasets: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    _frozen: dict[str, Any] = field(default_factory=dict)

    @property
    def run_dir(self) -> Path:
        return Path(self.recipe.output_dir)

    def path(self, spec: ModelSpec) -> str:
        return models.locate(spec, self.run_dir)

    def tokenizer(self, spec: ModelSpec, *, own_template: bool = False) -> Any:
        """A model's tokenizer, with the recipe's chat template if it has one.

        Args:
            own_template: leave its own chat template, as a reward model needs that reads text for itself.
        """
        path = self.path(spec)
        key = f"{path} {own_template}"
        if key not in self._tokenizers:
            tokenizer = models.load_tokenizer(spec, path)
            template = template_text(self.recipe.data.tokenize.get("chat_template"))
            if template is not None and not own_template:  # so that it is saved with the trained model
                tokenizer.chat_template = template
            self._tokenizers[key] = tokenizer
        return self._tokenizers[key]

    def datasets(self, stage: ResolvedStage, like: ModelSpec | None = None) -> tuple[Any, Any]:
        """`(training, held-out or None)` of a stage, every row checked; prepared once per kind and settings.

        Args:
            like: use this model's tokenizer and positions, while the stage's own model does not exist yet.
        """
        model = like or stage.model
        tokenizer = self.tokenizer(model)
        positions = models.positions(models.load_config(model, self.path(model)))
        online = stage.online is not None
        kind = stage.online.prompts.model_dump() if stage.online is not None else inputs.wants_pairs(stage)
        marks = [tokenizer_fingerprint(tokenizer), positions, kind]
        key = fingerprint([stage.data.model_dump(), *marks])
        if key not in self._datasets:
            train, held_out = inputs.open_rows(stage.data, self.recipe.seed, prompts=online)
            prepared = inputs.prepare(stage, train, tokenizer, positions)
            held = inputs.prepare(stage, held_out, tokenizer, positions) if held_out is not None else None
            self._datasets[key] = (prepared, held)
            for part, dataset in (("training", prepared), ("held-out", held)):
                show.print_rows(self.console, stage, part, dataset)
        return self._datasets[key]

    def frozen(self, spec: ModelSpec) -> Any:
        """A model that is only asked, never trained; loaded once per stage."""
        key = fingerprint([spec.model_dump(), self.path(spec)])
        if key not in self._frozen:
            model = models.load_model(spec, self.path(spec), merge_adapter=True)
            self._frozen[key] = model.eval().requires_grad_(False).to(self.state.device)
        return self._frozen[key]

    def reward_model(self, spec: ModelSpec) -> Any:
        """A trained token-level reward model, frozen; loaded once per stage."""
        from tokengrain.models import load_trained_reward_model

        key = fingerprint(["reward", spec.model_dump(), self.path(spec)])
        if key not in self._frozen:
            self._frozen[key] = load_trained_reward_model(self.path(spec)).to(self.state.device)
        return self._frozen[key]

    def completion_model(self, spec: ModelSpec) -> Any:
        """A model that judges whole completions, frozen; loaded once per stage."""
        from tokengrain.rewards.reward_model import load_completion_model

        key = fingerprint(["completions", spec.model_dump(), self.path(spec)])
        if key not in self._frozen:
            model = load_completion_model(self.path(spec), trust_remote_code=spec.trust_remote_code)
            self._frozen[key] = model.to(self.state.device)
        return self._frozen[key]

    def frozen_beside(self, policy: Any, spec: ModelSpec, name: str) -> Any:
        """A frozen model as a `Reference`: an adapter loaded into the policy, if both sit on the same base."""
        from tokengrain.scoring.reference import AdapterReference, FrozenReference

        path = self.path(spec)
        if is_peft(policy) and models.is_adapter(path) and self._same_base(policy, path):
            policy.load_adapter(path, adapter_name=name, is_trainable=False)
            return AdapterReference(policy, name)
        return FrozenReference(self.frozen(spec))

    def _same_base(self, policy: Any, adapter: str) -> bool:
        base = policy.peft_config[policy.active_adapter].base_model_name_or_path
        return bool(base) and models.model_fingerprint(base) == models.model_fingerprint(
            models.base_of_adapter(adapter)
        )

    def release(self) -> None:
        """Forget loaded models."""
        self._frozen.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# ----------------------------------------------------------------------------------------------------
# Credit sources, references and teachers of a recipe's stage, built from loaded models.

"""Key of a `credit:` that says how the credit enters the objective."""


def build_credit(stage: ResolvedStage, tokenizer: Any, shop: Workshop) -> Any:
    """The stage's credit source, or None."""
    if stage.credit is None:
        return None
    return make_source(stage.credit, stage.model, tokenizer, shop)


def make_source(credit: Mapping[str, Any], start: ModelSpec, tokenizer: Any, shop: Workshop) -> Any:
    """A credit source from a recipe's mapping.

    A model that it does not name is the one that the stage starts from: the reference of a guide, the model of
    contrastive prompting.

    Args:
        start: the model that the stage starts from.
    """

    name, settings = credit_settings(credit)
    given = {k: ModelSpec.model_validate(credit[k]) for k in CREDIT_MODELS if credit.get(k) is not None}
    objects: dict[str, Any] = {}
    kind = CREDIT.find(name)
    for wanted in kind.objects:
        if wanted == "tokenizer":
            objects[wanted] = tokenizer
        elif wanted == "reward_tokenizer":
            objects[wanted] = shop.tokenizer(given["model"], own_template=True)
        elif kind.reward_model:
            objects[wanted] = shop.reward_model(given[wanted])
        else:
            objects[wanted] = shop.frozen(given.get(wanted, start))
    return kind.make(**objects, **settings)


def build_reference(stage: ResolvedStage, shop: Workshop) -> Any:
    """What a train stage gives the trainer as `reference`; None leaves the choice to the trainer."""
    from tokengrain.scoring.reference import ADAPTER_OFF, ColumnReference

    if stage.reference_model is not None:
        return shop.frozen(stage.reference_model)
    if stage.reference == "columns":
        return ColumnReference()
    if stage.reference == "copy":
        return shop.frozen(stage.model)
    return ADAPTER_OFF if stage.reference == ADAPTER_OFF else None


def ready_for_teacher(stage: ResolvedStage, model: Any, peft_config: Any, args: Any) -> tuple[Any, Any]:
    """`(policy, configuration of a new adapter or None)`: with its adapter already, where teachers go beside it."""
    if stage.teacher is None or peft_config is None:
        return model, peft_config
    from tokengrain.training.trainer import with_adapter

    return with_adapter(model, args, peft_config), None


def build_teacher(stage: ResolvedStage, policy: Any, shop: Workshop) -> Any:
    """What the stage distils from, or None.

    Teachers that are adapters on the policy's own base are loaded into the policy beside its adapter: one set of
    weights for three models. Others are loaded in full.

    Args:
        policy: the stage's policy, with its adapter if it has one.
    """
    if stage.teacher is None:
        return None
    from tokengrain.methods.aligndistil import ContrastiveTeacher

    spec = stage.teacher
    roles: dict[str, ModelSpec] = {"target": spec.target}
    if spec.contrast is not None:
        roles["contrast"] = spec.contrast
    objective = stage.objective or {}
    return ContrastiveTeacher(
        **{name: shop.frozen_beside(policy, model, name) for name, model in roles.items()},
        form=spec.form,
        r=spec.r,
        epsilon=spec.epsilon,
        beta=spec.beta,
        beta0=objective.get("beta0", 0.1),
        temperature=spec.temperature,
    )


# ----------------------------------------------------------------------------------------------------
# An online stage of a recipe as an `OnlineTrainer`: its rewards, credit steps, sampler, critic and reference.


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
    from tokengrain.training.config import OnlineConfig
    from tokengrain.training.online import OnlineTrainer

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
    from tokengrain.rewards.builtin import make_reward
    from tokengrain.rewards.suite import RewardSuite

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
    from tokengrain.rewards.builtin import reward_objects

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
    from tokengrain.rewards.suite import RewardFunction

    world: Any = load_world(stage.data.train)
    return RewardFunction(world.reward, **{"name": WORLD_REWARD, **settings})


def build_steps(stage: ResolvedStage, tokenizer: Any, shop: Workshop) -> list[Any]:
    """The stage's credit steps, with the models that they ask."""

    assert stage.online is not None
    steps = []
    for given in stage.online.credit:
        arguments = {k: v for k, v in given.items() if k not in ("name", "source", *CREDIT_MODELS)}
        takes = ROLLOUT_CREDIT.find(given["name"]).objects
        for key in CREDIT_MODELS:
            if given.get(key) is not None:
                arguments[key] = shop.frozen(ModelSpec.model_validate(given[key]))
        if "tokenizer" in takes:
            arguments["tokenizer"] = tokenizer
        source = given.get("source")
        if source is not None:
            mapping = {"name": source} if isinstance(source, str) else source
            arguments["source"] = make_source(mapping, stage.model, tokenizer, shop)
        steps.append(ROLLOUT_CREDIT.find(given["name"]).make(**arguments))
    return steps


def build_critic(stage: ResolvedStage, policy: Any, shop: Workshop) -> Any:
    """The stage's critic, or None; it starts from the model that `critic:` names, else from the policy."""
    assert stage.online is not None
    if stage.online.critic is None:
        return None
    from tokengrain.models import load_reward_model
    from tokengrain.training.critic import Critic

    settings = {k: v for k, v in stage.online.critic.items() if k != "model"}
    given = stage.online.critic.get("model")
    if given is None:
        return Critic(policy, **settings)
    spec = ModelSpec.model_validate(given)
    return Critic(load_reward_model(spec, shop.path(spec), merge_adapter=True).to(shop.state.device), **settings)


def columns_needed(objective: BoundObjective, stage: ResolvedStage, present: Collection[str]) -> set[str]:
    """Per-token columns that a stage's data must bring, because nothing else gives them.

    Args:
        present: the columns that they have.
    """
    if stage.credit is not None:
        name, settings = credit_settings(stage.credit)
        return {CREDIT.find(name).column_with(settings)} - {""}
    needed = set(objective.needs) - FROZEN - TAUGHT
    if "selected" in needed - set(present) or ("spans" in needed - set(present) and "token_rewards" in present):
        return needed - {"selected", "spans"} | {"token_rewards"}
    return needed
