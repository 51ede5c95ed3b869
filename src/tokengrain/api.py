"""Training from Python in one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokengrain.errors import RecipeError
from tokengrain.recipe.reading import find_recipe, read_file, resolve
from tokengrain.recipe.schema import Recipe
from tokengrain.run.load import make_recipe
from tokengrain.run.runner import RunResult, run_recipe
from tokengrain.screen import Screen


def train(
    recipe: str | Path | Recipe,
    *,
    model: str | None = None,
    data: str | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    **overrides: Any,
) -> RunResult:
    """Run a recipe: what `tokengrain train` does.

        result = tokengrain.train("recipes/dpo.yaml", model="my/model", data="pairs.jsonl", seed=1,
                                  training__learning_rate=1e-6)
        result.metrics["final"]["accuracy"], result.model_path

    Args:
        recipe: a file, the name of a recipe that comes with tokengrain ("dpo"), or a loaded recipe (which
            then takes no model, data or overrides).
        model: instead of the recipe's model.
        data: instead of the recipe's training rows.
        output: the run folder, instead of the recipe's.
        overwrite: replace results of other settings in the run folder.
        quiet: show nothing.
        overrides: any key of the recipe; two underscores stand for the dot
            (`stages__train__objective__beta=0.3`).

    Raises:
        RecipeError, DataError, ModelError, RunError: see `run_recipe`.
    """
    if output is not None:
        overrides["output_dir"] = str(output)
    if isinstance(recipe, Recipe):
        if model is not None or data is not None or overrides:
            raise RecipeError("a loaded recipe takes no overrides; give them to load_recipe")
    else:
        parsed = [(name.split("__"), value) for name, value in overrides.items()]
        path = find_recipe(recipe)
        recipe = make_recipe(resolve(read_file(path), model, data, parsed), source=str(path))
    return run_recipe(recipe, overwrite=overwrite, console=Screen(quiet=quiet))
