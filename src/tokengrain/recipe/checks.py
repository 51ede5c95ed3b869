"""What types alone cannot say about a recipe: hyper-parameters, names of stages, impossible combinations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pydantic

from tokengrain.errors import RecipeError
from tokengrain.recipe.inherit import INIT, resolve_stages, training_keys
from tokengrain.recipe.messages import check_keys, field_types
from tokengrain.recipe.online_checks import check_online
from tokengrain.recipe.schema import Recipe, ResolvedStage
from tokengrain.recipe.specs import DataSpec
from tokengrain.runs import TRAINED

SET_BY_RECIPE = {
    "output_dir": "set output_dir at the top of the recipe",
    "seed": "set seed at the top of the recipe",
    "resume_from_checkpoint": "an interrupted stage is resumed by itself",
    "overwrite_output_dir": "use --overwrite",
    "do_train": "the stages say what is done",
    "do_eval": "held-out rows are evaluated where there are any",
    "do_predict": "the stages say what is done",
    "push_to_hub": "push the finished model folder",
}


MAKES = {
    "init": "a language model",
    "sft": "a language model",
    "train": "a language model",
    "reward": "a reward model, for a reward or credit {name: reward_model}",
    "online": "a language model",
    "annotate": "token rewards, not a model",
}
"""What a stage of each kind makes, for messages."""


def elsewhere() -> dict[str, str]:
    """Keys of `training:` and `data:` with their dotted path, to recognise them where they do not belong."""
    from tokengrain.data import TokenizeConfig
    from tokengrain.training.config import PreferenceConfig

    data = dict.fromkeys(["eval", "eval_fraction", "split", "limit", "streaming", *field_types(TokenizeConfig)])
    return {k: f"training.{k}" for k in field_types(PreferenceConfig)} | {k: f"data.{k}" for k in data}


def check_recipe(recipe: Recipe) -> list[str]:
    """Every mistake that the types did not catch, one line each."""
    wrongs = list(_check_shared(recipe))
    seen: dict[str, ResolvedStage] = {}
    for stage in resolve_stages(recipe):
        wrongs += _check_stage(stage, recipe, seen)
        seen[stage.name] = stage
    # What is legal key by key may still not go together.
    return wrongs or list(_check_together(list(seen.values())))


def _check_shared(recipe: Recipe) -> Iterator[str]:
    if recipe.model.config is not None:
        from tokengrain.training.scratch import check_config

        if (found := check_config(recipe.model.config)) is not None:
            yield f"model.{found}"
    if INIT in recipe.stages:
        yield f"stages.{INIT}: the name is taken by the stage that builds a model from scratch"
    if recipe.model.stage is not None:
        yield f"model: {recipe.model.path!r} is a stage; the recipe's own model must exist before it"
    if recipe.data.stage is not None:
        yield f"data.train: {recipe.data.train!r} is a stage; name it in the data of the stage that uses it"
    for name, stage in recipe.stages.items():
        if stage.model is not None and stage.model.config is not None:
            yield f"stages.{name}.model: only the recipe's own model can be built from scratch"
    yield from _check_training(recipe.training, "training")
    yield from _check_data(recipe.data.tokenize, "data")
    if recipe.data.limit is not None and recipe.data.streaming:
        yield "data.limit: does not go with data.streaming; use training.max_steps"


def _check_stage(stage: ResolvedStage, recipe: Recipe, seen: dict[str, ResolvedStage]) -> Iterator[str]:
    from tokengrain.training.sources import reads_reward_model

    where, names = f"stages.{stage.name}", list(recipe.stages)
    if stage.kind == "init":
        return
    own = recipe.stages[stage.name]
    yield from _check_training(getattr(own, "training", {}), f"{where}.training", online=stage.kind == "online")
    yield from _check_data(own.data if isinstance(own.data, dict) else {}, f"{where}.data")
    try:
        models = {"model": stage.model, **stage.models}
    except pydantic.ValidationError as error:
        yield f"{where}.credit: {error.errors()[0]['msg']}"
        return
    for key, model in models.items():
        if model.stage is not None:
            kinds: tuple[str, ...] = ("init", "sft", "train", "online")
            if key.startswith("rewards[") or (key.startswith("credit.") and reads_reward_model(stage)):
                kinds = ("reward",)
            elif key.startswith(("credit[", "critic")) or (key == "model" and stage.kind == "reward"):
                kinds += ("reward",)
            yield from _check_reference(f"{where}.{key}", model.stage, kinds, seen, names)
    if stage.data.stage is not None:
        yield from _check_reference(f"{where}.data", stage.data.stage, ("annotate",), seen, names)
    if stage.data.streaming:
        yield from _check_streaming(stage, where)
    if stage.credit is not None:
        yield from _check_credit(stage, where)
    if stage.kind in ("train", "reward"):
        yield from _check_objective(stage, where)
    if stage.kind == "online":
        yield from check_online(stage, where)
        yield from _check_teacher(stage, where)


def _check_reference(
    where: str, name: str, kinds: tuple[str, ...], seen: dict[str, ResolvedStage], names: list[str]
) -> Iterator[str]:
    """`@name` must be an earlier stage that makes what is needed."""
    if name in seen:
        if seen[name].kind not in kinds:
            made = "a model, not rows of data" if kinds == ("annotate",) else MAKES[seen[name].kind]
            yield f"{where}: '@{name}' is a stage of kind {seen[name].kind}, which makes {made}"
    elif name in names:
        yield f"{where}: '@{name}' comes later than (or is) the stage that uses it; stages run in order"
    else:
        fitting = [f"@{n}" for n, stage in seen.items() if stage.kind in kinds]
        names_so_far = ", ".join(fitting) or "none so far"
        yield f"{where}: no stage {name!r} comes before it; expected one of {names_so_far}"


def config_class(online: bool) -> type:
    """The class of a stage's `training:`."""
    if online:
        from tokengrain.training.online.config import OnlineConfig

        return OnlineConfig
    from tokengrain.training.config import PreferenceConfig

    return PreferenceConfig


def _check_training(values: dict[str, Any], where: str, *, online: bool = False) -> Iterator[str]:
    for key, instead in SET_BY_RECIPE.items():
        if key in values:
            yield f"{where}.{key}: cannot be set here; {instead}"
    rest = {k: v for k, v in values.items() if k not in SET_BY_RECIPE}
    yield from check_keys(rest, field_types(config_class(online)), where)


def _check_data(values: dict[str, Any], where: str) -> Iterator[str]:
    from tokengrain.data import TokenizeConfig

    # A stage's own keys were checked as those of `DataSpec` when the stage was resolved.
    rest = {k: v for k, v in values.items() if k not in DataSpec.model_fields}
    yield from check_keys(rest, field_types(TokenizeConfig) | dict.fromkeys(DataSpec.model_fields, Any), where)


def _check_together(stages: list[ResolvedStage]) -> Iterator[str]:
    """Build the stages' configurations: they know what does not go together."""
    from tokengrain.data import TokenizeConfig

    places: dict[tuple[str, str], list[str]] = {}
    for stage in stages:
        found = [("data", _construct(TokenizeConfig, stage.data.tokenize))]
        if stage.kind in TRAINED:
            arguments = {"output_dir": "unused", **training_keys(stage)}
            found.append(("training", _construct(config_class(stage.kind == "online"), arguments)))
        for block, wrong in found:
            if wrong is not None:
                places.setdefault((block, wrong), []).append(f"stages.{stage.name}.{block}")
    for (block, wrong), where in places.items():
        # What the recipe says once, for all its stages, is complained about once.
        yield f"{where[0] if len(where) == 1 else block}: {wrong}"


def _construct(cls: type, values: dict[str, Any]) -> str | None:
    try:
        cls(**values)
    except (RecipeError, ValueError, TypeError, ImportError) as error:
        return " ".join(str(error).split())
    return None


def _check_streaming(stage: ResolvedStage, where: str) -> Iterator[str]:
    if stage.kind == "annotate":
        yield f"{where}: a streamed data set cannot be annotated; set data.streaming: false"
        return
    if stage.data.eval is None and stage.data.eval_fraction > 0:
        yield f"{where}: rows cannot be held out of a stream; give data.eval, or set data.eval_fraction: 0"
    if stage.training.get("max_steps", -1) <= 0:
        yield f"{where}: a stream has no known length; set training.max_steps"


def _check_credit(stage: ResolvedStage, where: str) -> Iterator[str]:
    from tokengrain.credit import CREDIT, check_credit
    from tokengrain.training.sources import credit_settings

    try:
        name, settings = credit_settings(stage.credit or {})
        check_credit(name, settings)
    except RecipeError as error:
        yield f"{where}.credit: {error}"
        return
    kind, given = CREDIT[name], stage.credit_models
    for wanted in ("model", "reverse"):
        # The starting model judges itself.
        optional = name in ("contrastive", "surprise", "entropy") and wanted == "model"
        if wanted in kind.objects and wanted not in given and not optional:
            yield f"{where}.credit.{wanted}: missing; expected '@STAGE' or a path"
    for extra in sorted(set(given) - kind.objects):
        yield f"{where}.credit.{extra}: credit {name} asks no such model; drop it"


def _check_objective(stage: ResolvedStage, where: str) -> Iterator[str]:
    from tokengrain.objectives import make_objective
    from tokengrain.training.credit import FROZEN, check_together

    hyper = dict(stage.objective or {})
    name = hyper.pop("name", None)
    if not isinstance(name, str):
        yield f"{where}.objective.name: missing; `tokengrain methods` lists the objectives"
        return
    try:
        objective = make_objective(name, **hyper)
    except RecipeError as error:
        yield f"{where}.objective: {error}"
        return
    needs = objective.needs
    if stage.credit is not None:
        yield from _check_role(stage, objective, where)
    if (stage.kind == "reward") != (objective.main == "token_scores"):
        other = "train" if stage.kind == "reward" else "reward"
        yield f"{where}.objective: {name} belongs in a stage of kind {other}, not {stage.kind}"
    elif stage.kind == "train" and stage.credit is None:
        try:
            check_together(objective, None, stage.teacher)
        except RecipeError as error:
            yield f"{where}.teacher: {error}"
    yield from _check_teacher(stage, where)
    frozen = needs & FROZEN
    if stage.reference is not None and not frozen:
        yield f"{where}.reference: objective {name} has no reference; drop it"
    if stage.reference == "columns" and "kl" in needs:
        yield (
            f"{where}.reference: objective {name} needs the reference's whole distribution, which stored "
            "ref_logps do not hold; use copy or adapter_off"
        )
    if stage.reference == "adapter_off" and stage.lora is None:
        yield f"{where}.reference: adapter_off needs lora; without it the weights change: use copy"


def _check_role(stage: ResolvedStage, objective: Any, where: str) -> Iterator[str]:
    """Credit must suit the objective, in its role; and come from one place."""
    from tokengrain.credit import CREDIT
    from tokengrain.credit.registry import why_not
    from tokengrain.objectives.roles import resolve_role
    from tokengrain.training.credit import check_together
    from tokengrain.training.sources import credit_role, credit_settings

    try:
        name, _ = credit_settings(stage.credit or {})
    except RecipeError:
        return  # said elsewhere
    try:
        role = resolve_role(credit_role(stage), objective.roles, objective.name, objective.no_credit)
        check_together(objective, role, stage.teacher)
    except RecipeError as error:
        yield f"{where}.credit: {error}"
        return
    if name not in CREDIT:
        return  # said elsewhere
    if stage.data.stage is not None and name not in ("column", "spans"):
        yield f"{where}.credit: the data '@{stage.data.stage}' bring token rewards already; drop one"
    if reason := why_not(CREDIT[name].values, role.uses):
        yield f"{where}.credit: {name} as {role.name}: {reason}"


def _check_teacher(stage: ResolvedStage, where: str) -> Iterator[str]:
    from tokengrain.objectives.aligndistil import teacher_strength

    if stage.teacher is None:
        return
    spec = stage.teacher
    if spec.contrast is None and spec.form != "distil":
        yield f"{where}.teacher.contrast: missing; form {spec.form} needs a second model"
    if spec.contrast is not None and spec.form == "distil":
        yield f"{where}.teacher.contrast: form distil has no second model; drop it"
    try:
        teacher_strength(
            spec.form, r=spec.r, epsilon=spec.epsilon, beta0=(stage.objective or {}).get("beta0", 0.1), beta=spec.beta
        )
    except (RecipeError, ValueError) as error:
        yield f"{where}.teacher: {error}"
