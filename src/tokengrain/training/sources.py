"""Credit sources and references of a recipe's stage, built from loaded models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tokengrain.errors import RecipeError
from tokengrain.recipe.schema import ModelSpec, ResolvedStage

LoadFrozen = Callable[[ModelSpec], Any]
"""Loads a model once, frozen, on the device; the same spec gives the same object."""


def credit_settings(credit: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """`(name, settings without its model)` of a recipe's `credit:`.

    Raises:
        RecipeError: no name.
    """
    settings = {k: v for k, v in credit.items() if k not in ("name", "model")}
    name = credit.get("name")
    if not isinstance(name, str):
        raise RecipeError("name is missing; expected for example `name: guide`")
    return name, settings


def build_credit(stage: ResolvedStage, tokenizer: Any, load: LoadFrozen) -> Any:
    """The stage's credit source, or None.

    The guide is `credit.model`; its reference, and the model of contrastive prompting unless `credit.model`
    names another, are the model that the stage starts from.
    """
    if stage.credit is None:
        return None
    from tokengrain.credit import CREDIT, make_credit

    name, settings = credit_settings(stage.credit)
    objects: dict[str, Any] = {}
    for wanted in CREDIT[name].objects:
        if wanted == "model":
            objects["model"] = load(stage.credit_model or stage.model)
        elif wanted == "reference":
            objects["reference"] = load(stage.model)
        else:
            objects["tokenizer"] = tokenizer
    return make_credit(name, **objects, **settings)


def build_reference(stage: ResolvedStage, load: LoadFrozen) -> Any:
    """What a train stage gives the trainer as `reference`; None leaves the choice to the trainer."""
    from tokengrain.scoring.reference import ColumnReference

    if stage.reference_model is not None:
        return load(stage.reference_model)
    if stage.reference == "columns":
        return ColumnReference()
    if stage.reference == "copy":
        return load(stage.model)
    return None
