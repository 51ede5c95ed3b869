"""A recipe: the YAML file that says what to train, on what, with which method, in which stages.

    method: tgdpo
    model: world://stories      # folder | hub name | world://NAME | {config: {...}, tokenizer: {...}}
    data: world://stories       # file | hub name | world://NAME | {train: ..., eval: ..., max_length: ...}
    output_dir: runs/tgdpo
    training: {...}             # PreferenceConfig: all of transformers' TrainingArguments, and a few more
    stages:                     # in order; `@guide` is what stage `guide` made
      guide:  {kind: train, objective: {name: dpo, beta: 0.3}}
      credit: {kind: annotate, credit: {name: guide, model: "@guide", beta: 0.3}}
      train:  {kind: train, data: "@credit", objective: {name: tgdpo, beta: 0.3, alpha: 0.5}}
    on_world: {...}             # laid over the rest while `model` is a world://
    extends: other.yaml         # optional: start from another file

Relative paths of data and models are relative to the working directory; `extends` to the recipe's own folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic

from tokengrain.errors import RecipeError
from tokengrain.recipe.reading import parse_override, read_file, resolve, write_yaml
from tokengrain.recipe.schema import (
    Recipe,
    StageDataError,
    resolve_stages,
)


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe given as a path or as the name of one that comes with tokengrain ("tgdpo").

    Looks at the path itself, `recipes/NAME.yaml` in the working directory, then the recipes of the package.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.exists() or len(path.parts) > 1:
        return path
    for folder in recipe_folders():
        if (found := folder / f"{name}.yaml").is_file():
            return found
    from tokengrain.settings import nearest

    names = sorted({p.stem for folder in recipe_folders() for p in folder.glob("*.yaml")})
    raise RecipeError(f"{name}: no such recipe file{nearest(str(name), names)}")


def recipe_folders() -> list[Path]:
    """Where recipes are looked for by name: the working directory's, the installed ones, the checkout's."""
    package = Path(__file__).resolve().parent.parent
    folders = [Path("recipes"), package / "recipes", package.parent.parent / "recipes"]
    return [folder for folder in folders if folder.is_dir()]


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
    from tokengrain.recipe.check import check_recipe, elsewhere, explain

    try:
        recipe = Recipe.model_validate(values)
        resolve_stages(recipe)
    except pydantic.ValidationError as error:
        raise explain(error, source, elsewhere()) from None
    except StageDataError as wrong:
        raise explain(wrong.error, source, elsewhere(), ("stages", wrong.stage, "data")) from None
    wrongs = check_recipe(recipe)
    if len(wrongs) == 1:
        raise RecipeError(f"{source}: {wrongs[0]}")
    if wrongs:
        raise RecipeError(f"{source}: {len(wrongs)} mistakes\n" + "\n".join(f"  - {line}" for line in wrongs))
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that loads to the same recipe: merged, with nothing left to other files."""
    values = recipe.model_dump(mode="json", exclude_unset=True)
    values["seed"] = recipe.seed
    return write_yaml(values)
