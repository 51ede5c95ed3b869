"""Credit sources, references and teachers of a recipe's stage, built from loaded models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tokengrain.errors import RecipeError
from tokengrain.recipe.schema import CREDIT_MODELS, ResolvedStage
from tokengrain.recipe.specs import ModelSpec

if TYPE_CHECKING:
    from tokengrain.training.workshop import Workshop

ROLE = "as"
"""Key of a `credit:` that says how the credit enters the objective."""


def credit_settings(credit: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """`(name, settings without its models and its role)` of a recipe's `credit:`.

    Credit of which only the role is given is the data's own column.

    Raises:
        RecipeError: no name.
    """
    settings = {k: v for k, v in credit.items() if k not in ("name", ROLE, *CREDIT_MODELS)}
    name = credit.get("name", "column" if ROLE in credit else None)
    if not isinstance(name, str):
        raise RecipeError("name is missing; expected for example `name: guide`")
    return name, settings


def credit_role(stage: ResolvedStage) -> Any:
    """How the stage's credit enters its objective, as the recipe says it; None: it does not say."""
    return (stage.credit or {}).get(ROLE)


def reads_reward_model(stage: ResolvedStage) -> bool:
    """Whether the stage's credit comes from a token-level reward model."""
    from tokengrain.credit import CREDIT

    kind = CREDIT.get((stage.credit or {}).get("name", ""))
    return kind is not None and kind.reward_model


def is_reward_model(stage: ResolvedStage, role: str) -> bool:
    """Whether the model in this place of the stage judges completions, and so may have a tokenizer of its own.

    Args:
        role: key of `stage.models`, such as "credit.model", "rewards[0].model" or "credit[1].source.model".
    """
    from tokengrain.credit import CREDIT

    if role.startswith("credit."):
        return reads_reward_model(stage)
    step, _, rest = role.removeprefix("credit[").partition("].")
    if stage.online is not None and role.startswith("credit[") and rest.startswith("source."):
        return CREDIT[stage.online.credit[int(step)]["source"]["name"]].reward_model
    return role.startswith("rewards[")


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
    from tokengrain.credit import CREDIT, make_credit

    name, settings = credit_settings(credit)
    given = {k: ModelSpec.model_validate(credit[k]) for k in CREDIT_MODELS if credit.get(k) is not None}
    objects: dict[str, Any] = {}
    for wanted in CREDIT[name].objects:
        if wanted == "tokenizer":
            objects[wanted] = tokenizer
        elif wanted == "reward_tokenizer":
            objects[wanted] = shop.tokenizer(given["model"], own_template=True)
        elif CREDIT[name].reward_model:
            objects[wanted] = shop.reward_model(given[wanted])
        else:
            objects[wanted] = shop.frozen(given.get(wanted, start))
    return make_credit(name, **objects, **settings)


def build_reference(stage: ResolvedStage, shop: Workshop) -> Any:
    """What a train stage gives the trainer as `reference`; None leaves the choice to the trainer."""
    from tokengrain.scoring.reference import ColumnReference
    from tokengrain.training.reference import ADAPTER_OFF

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
    from tokengrain.training.adapters import with_adapter

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
    from tokengrain.training.teacher import ContrastiveTeacher

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
