"""From a file to a recipe that was checked in full, and to its stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic

from tokengrain.recipe import schema
from tokengrain.recipe.check import NOT_GIVEN, Mistakes, check_finite, check_shared, entries, explain
from tokengrain.recipe.reading import SHORT_NAMES, find_recipe, parse_override, read_file, resolve
from tokengrain.recipe.schema import INIT, Recipe
from tokengrain.run.retrieval import Index, Negatives, Retrieve
from tokengrain.run.stages import Annotate, Init, Stage
from tokengrain.run.trained import Online, Reward, Sft, Train
from tokengrain.runs import TRAINED
from tokengrain.settings import check_trusted

_KINDS = (Init, Sft, Train, Reward, Online, Annotate, Index, Negatives, Retrieve)
KINDS: dict[str, type[Stage]] = {kind.kind: kind for kind in _KINDS}


class StageDataError(Exception):
    """A stage's `data:` that does not fit: `(stage, error)`, which names keys below `stages.<stage>.data`."""


def resolve_stages(recipe: Recipe) -> list[Stage]:
    """The stages in order, each with everything it inherits; `init` first if the model is built from scratch.

    A stage starts from its own `model`, else from the last index or sft stage before it, else from the recipe's model.
    `data` and `training` of a stage are laid over the recipe's, key by key.
    """
    above: dict[str, Stage] = {}
    model = recipe.model
    if model.config is not None:
        above[INIT] = Init(INIT, recipe, None, model, recipe.data)
        model = model.at("@" + INIT)
    for name, own in recipe.stages.items():
        try:
            data = schema.stage_data(recipe.data, own.data)
        except pydantic.ValidationError as error:
            raise StageDataError(name, error) from None
        above[name] = KINDS[own.kind](name, recipe, own, own.model or model, data, dict(above))
        if own.kind in ("index", "sft"):
            model = model.at("@" + name)
    return list(above.values())


def check_recipe(recipe: Recipe) -> Mistakes:
    """Every mistake that the types did not catch: a dry build of all stages."""
    found, stages = Mistakes(), resolve_stages(recipe)
    check_shared(recipe, found)
    for stage in stages:
        stage.check(found)
    _check_freezing(recipe, stages, found)
    _check_unread(recipe, stages, found)
    if found.lines:
        return found
    # What is legal key by key may still not go together. What all stages inherit is complained about once.
    places: dict[tuple[str, str], list[str]] = {}
    for stage in stages:
        for block, build in stage.blocks().items():
            refused = Mistakes()
            with refused.at(block):
                build()
            for line in refused.lines:
                places.setdefault((block, line), []).append(stage.name)
    for (_, line), names in places.items():
        found.lines.append(f"stages.{names[0]}.{line}" if len(names) == 1 else line)
    for stage in stages if not found.lines else ():
        stage.check_together(found)
    return found


def _check_freezing(recipe: Recipe, stages: Sequence[Stage], found: Mistakes) -> None:
    """Note where `freeze` is asked of a model whose weights nobody trains."""
    what = "no stage trains all weights of this model (with lora only adapters are trained), so it freezes nothing"
    inherits = [stage for stage in stages if stage.own is None or stage.own.model is None]
    if recipe.model.freeze and not any(stage.trains_weights for stage in inherits):
        found.add("model.freeze", what)
    for stage in stages:
        own = stage.own and stage.own.model
        if own is not None and own.freeze and not stage.trains_weights:
            found.add(f"stages.{stage.name}.model.freeze", what)
        for key, asked in stage.asks.items() if not found.lines else ():
            if asked.spec.freeze and asked.spec != stage.model:
                found.add(f"stages.{stage.name}.{key}.freeze", what)


def _check_unread(recipe: Recipe, stages: Sequence[Stage], found: Mistakes) -> None:
    """Note settings that a stage has for itself, or the recipe for all, and that are without effect there."""
    unread = [(stage, stage.unread) for stage in stages if stage.own is not None and not found.lines]
    for stage, without in unread:
        own = stage.own.data if isinstance(stage.own.data, dict) else {}
        for key in sorted(_given(getattr(stage.own, "training", {}), own) & set(without)):
            found.add(f"stages.{stage.name}.{key}", without[key])
    for key in sorted(_given(recipe.training, recipe.data.model_dump(exclude_unset=True))):
        asked = [without for s, without in unread if s.kind in TRAINED or key.startswith("data.")]
        if asked and all(key in without for without in asked):
            found.add(key, asked[0][key])


def _given(training: Mapping[str, Any], data: Mapping[str, Any]) -> set[str]:
    """Dotted keys of what is set, to something else than nothing."""
    blocks = {"training": training, "data": data}
    given = {f"{name}.{key}": value for name, block in blocks.items() for key, value in block.items()}
    return {key for key, value in given.items() if value is not None and (key, value) != ("data.completions", "chosen")}


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
    given = {".".join(keys): "command line" for keys, _ in parsed}
    recipe = make_recipe(resolve(read_file(path), model, data, parsed), str(path), given)
    for place, value in entries(recipe.model_dump(), "recipe"):
        if place.endswith(".trust_remote_code") and value:  # a model's own Python code may run
            check_trusted(f"trust_remote_code ({place.rpartition('.')[0]})")
    return recipe


def make_recipe(values: dict[str, Any], source: str = "recipe", given: Mapping[str, str] = NOT_GIVEN) -> Recipe:
    """A recipe from plain values, validated in full: keys, types, hyper-parameters, combinations.

    Mistakes are those of the `source`, but for keys that were `given` elsewhere: key -> where.
    """
    given = {f"training.{SHORT_NAMES[k][0]}" if k in SHORT_NAMES else k: place for k, place in given.items()}
    Mistakes(check_finite(values)).raise_if_any(source, given)
    try:
        recipe = Recipe.model_validate(values)
        mistakes = check_recipe(recipe)
    except pydantic.ValidationError as error:
        raise explain(error, source, given=given) from None
    except StageDataError as wrong:
        stage, refused = wrong.args
        raise explain(refused, source, ("stages", stage, "data"), given) from None
    mistakes.raise_if_any(source, given)
    return recipe
