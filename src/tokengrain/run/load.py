"""From a file to a recipe that was checked in full."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic

from tokengrain.recipe.check import explain
from tokengrain.recipe.reading import find_recipe, parse_override, read_file, resolve
from tokengrain.recipe.schema import Recipe
from tokengrain.run.stages import StageDataError, check_recipe


def load_recipe(
    path: str | Path,
    model: str | None = None,
    data: str | None = None,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
) -> Recipe:
    """Read, merge and validate a recipe.

    Args:
        path: the file, or the name of a recipe that comes with tokengrain.
        model: instead of the recipe's model; loading options of the recipe's model are kept.
        data: instead of the recipe's training rows; a held-out source of the recipe is dropped with it.
        overrides: `"a.b=c"`, the value read as YAML; they win over everything else.
        output: instead of the recipe's run folder.

    Raises:
        RecipeError: naming every mistake with its dotted key.
    """
    path = find_recipe(path)
    parsed = [parse_override(text) for text in overrides]
    if output is not None:
        parsed.append((["output_dir"], str(output)))
    return make_recipe(resolve(read_file(path), model, data, parsed), source=str(path))


def make_recipe(values: dict[str, Any], source: str = "recipe") -> Recipe:
    """A recipe from plain values, validated in full: keys, types, hyper-parameters, combinations."""
    try:
        recipe = Recipe.model_validate(values)
        mistakes = check_recipe(recipe)
    except pydantic.ValidationError as error:
        raise explain(error, source) from None
    except StageDataError as wrong:
        raise explain(wrong.error, source, ("stages", wrong.stage, "data")) from None
    if mistakes.lines:
        raise mistakes.error(source)
    return recipe
