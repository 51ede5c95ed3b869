"""What types alone cannot say about a recipe: hyper-parameters, names of stages, impossible combinations."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

import pydantic

from tokengrain import specs
from tokengrain.errors import RecipeError, shown
from tokengrain.recipe import schema
from tokengrain.recipe.schema import (
    CREDIT_MODELS,
    INIT,
    OnlineStage,
    Recipe,
    ResolvedStage,
    resolve_stages,
    training_keys,
)
from tokengrain.runs import TRAINED
from tokengrain.settings import nearest, validate_settings
from tokengrain.specs import DataSpec

# ----------------------------------------------------------------------------------------------------
# What types alone cannot say about an online stage: objective, rewards, credit steps, sampler.

WORLD_REWARD = "world"
"""Name of the reward that a world brings along."""


def check_online(stage: ResolvedStage, where: str) -> Iterator[str]:
    """Every mistake in an online stage, one line each."""
    own = stage.online
    assert own is not None
    yield from _online_checks_check_objective(stage, where)
    if stage.teacher is None:  # who learns from a teacher needs no reward
        yield from _check_rewards(stage, own, where)
    yield from _online_checks_check_credit(stage, own, where)
    yield from _check_sampler(stage, own, f"{where}.sampler")
    if own.critic is not None:
        from tokengrain.training.critic import Critic

        settings = {k: v for k, v in own.critic.items() if k != "model"}
        yield from _settings(f"{where}.critic", "critic", Critic, settings)
    if stage.reference == "columns":
        yield f"{where}.reference: sampled completions have no stored columns; use copy, adapter_off or a model"
    if stage.reference == "adapter_off" and stage.lora is None:
        yield f"{where}.reference: adapter_off needs lora; without it the weights change: use copy"


def _online_checks_check_objective(stage: ResolvedStage, where: str) -> Iterator[str]:
    from tokengrain.method import TAUGHT, check_together, make_objective

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
    from tokengrain.rewards.builtin import check_reward, reward_objects
    from tokengrain.rewards.suite import RewardFunction

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
    from tokengrain.method import ROLLOUT_CREDIT

    try:
        return ROLLOUT_CREDIT.find(str(step.get("name"))).attributes({})["phase"] == "rewards"
    except RecipeError:
        return False  # said elsewhere


def _online_checks_check_credit(stage: ResolvedStage, own: OnlineStage, where: str) -> Iterator[str]:
    from tokengrain.method import ROLLOUT_CREDIT

    phases: list[tuple[str, Any]] = []
    for index, step in enumerate(own.credit):
        here, name = f"{where}.credit[{index}]", step.get("name")
        settings = {k: v for k, v in step.items() if k not in ("name", "source", *CREDIT_MODELS)}
        try:
            if not isinstance(name, str):
                raise RecipeError("name is missing; expected for example {name: group}")
            kind = ROLLOUT_CREDIT.find(name)
            kind.settings(settings)
            phases.append((name, kind.attributes({})["phase"]))
            takes = kind.objects
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
    from tokengrain.method import CREDIT
    from tokengrain.recipe.schema import credit_settings

    try:
        name, settings = credit_settings(source)
        CREDIT.find(name).settings(settings)
    except RecipeError as error:
        yield f"{where}: {error}"


def _check_sampler(stage: ResolvedStage, own: OnlineStage, where: str) -> Iterator[str]:
    from tokengrain.rollout.sampler import check_sampler

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


# ----------------------------------------------------------------------------------------------------
# Validation errors as one clear message: dotted path, nearest right name, value seen, type expected.

_TAGS: dict[str, type[pydantic.BaseModel]] = {
    "sft": schema.SftStage,
    "train": schema.TrainStage,
    "reward": schema.RewardStage,
    "online": schema.OnlineStage,
    "annotate": schema.AnnotateStage,
}
_BELOW: dict[str, type[pydantic.BaseModel]] = {
    "model": specs.ModelSpec,
    "data": specs.DataSpec,
    "lora": specs.LoraSpec,
    "tokenizer": specs.TokenizerSpec,
    "teacher": specs.TeacherSpec,
    "prompts": specs.PromptSpec,
}
_WORDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "list_type": "a list",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "none_required": "null",
}


def unknown_key(where: str, name: str, legal: Iterable[str], elsewhere: Mapping[str, str] | None = None) -> str:
    """The message for a key that does not exist. `elsewhere`: keys of other places, with their path."""
    path = f"{where}.{name}" if where else str(name)
    legal = sorted(legal)
    if elsewhere and not get_close_matches(name, legal, n=1, cutoff=0.5):
        near = get_close_matches(name, list(elsewhere), n=1, cutoff=0.6)
        if near:
            return f"{path}: unknown key; did you mean {elsewhere[near[0]]!r}?"
    return f"{path}: unknown key{nearest(name, legal)}"


def wrong(path: str, value: Any, expected: str) -> str:
    return f"{path}: got {shown(value)} ({_type_name(value)}); expected {expected}"


def _type_name(value: Any) -> str:
    names = {
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "true/false",
        dict: "a mapping",
        list: "a list",
    }
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def explain(
    error: pydantic.ValidationError, source: str, elsewhere: Mapping[str, str], where: Sequence[str] = ()
) -> RecipeError:
    """All of pydantic's complaints as one `RecipeError`, at most one per key; `where`: keys above those it names."""
    messages: dict[str, str] = {}
    for found in error.errors():
        loc = (*where, *found["loc"])
        item, path = {**found, "loc": loc}, _dotted(loc)
        message = _message(item, path, elsewhere)
        if path in messages and "expected" in messages[path] and item["type"] in _WORDS:
            messages[path] += f" or {_WORDS[item['type']]}"
        else:
            messages.setdefault(path, message)
    lines = list(messages.values())
    if len(lines) == 1:
        return RecipeError(f"{source}: {lines[0]}")
    return RecipeError(f"{source}: {len(lines)} mistakes\n" + "\n".join(f"  - {line}" for line in lines))


def _dotted(loc: tuple[Any, ...]) -> str:
    """pydantic's location as the user wrote it: without the tags of unions."""
    parts = []
    for index, part in enumerate(loc):
        tag = index == 2 and loc[0] == "stages" and part in _TAGS
        text = str(part)
        if tag or text in ("TokenizerSpec", "str", "[key]") or text.startswith(("list[", "dict[", "constrained")):
            continue
        parts.append(text)
    return ".".join(parts)


def _class_at(loc: tuple[Any, ...]) -> type[pydantic.BaseModel]:
    """The model whose key the last element of `loc` is."""
    above = [part for part in loc[:-1] if isinstance(part, str)]
    for part in reversed(above):
        if part in _BELOW:
            return _BELOW[part]
        if len(above) > 2 and part == above[2] and above[0] == "stages" and part in _TAGS:
            return _TAGS[part]
    return schema.Recipe


def _message(item: Any, path: str, elsewhere: Mapping[str, str]) -> str:
    kind, loc, value = item["type"], item["loc"], item["input"]
    where = path.rpartition(".")[0]
    if kind == "extra_forbidden":
        legal = _class_at(loc).model_fields
        return unknown_key(where, str(loc[-1]), legal, elsewhere if _class_at(loc) is schema.Recipe else None)
    if kind == "missing":
        return f"{path}: missing; {_class_at(loc).model_fields[str(loc[-1])].description}"
    if kind == "union_tag_not_found":
        return f"{path}.kind: missing; expected one of {', '.join(_TAGS)}"
    if kind == "union_tag_invalid":
        tag = item["ctx"]["tag"]
        return wrong(f"{path}.kind", tag, f"one of {', '.join(_TAGS)}") + _did_you_mean(tag, _TAGS)
    if kind == "value_error":
        return f"{path}: {item['ctx']['error']}" if path else str(item["ctx"]["error"])
    if kind == "string_pattern_mismatch" and path.startswith("stages"):
        return f"{path}: not a name for a stage; expected letters, digits, - and _"
    if kind == "literal_error":
        choices = item["ctx"]["expected"]
        names = [c.strip().strip("'") for c in choices.replace(" or ", ",").split(",")]
        return wrong(path, value, f"one of {choices}") + _did_you_mean(str(value), names)
    if kind in _WORDS:
        return wrong(path, value, _WORDS[kind] + _meaning(item)) + _number_hint(value, kind)
    return f"{path}: got {shown(value)}; {item['msg'][0].lower()}{item['msg'][1:]}"


def _meaning(item: Any) -> str:
    """What a key is for, where keys were given below one that has none."""
    field = _class_at(item["loc"]).model_fields.get(str(item["loc"][-1]))
    return f" ({field.description})" if isinstance(item["input"], Mapping) and field and field.description else ""


def _did_you_mean(name: str, legal: Iterable[str]) -> str:
    near = get_close_matches(name, list(legal), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _number_hint(value: Any, kind: str) -> str:
    if kind in ("int_type", "float_type") and isinstance(value, str):
        try:
            return f"; without quotes it is a number: {float(value):g}"
        except ValueError:
            return ""
    return ""


@lru_cache(maxsize=8)
def field_types(cls: type) -> dict[str, Any]:
    """Fields of a dataclass that its constructor takes, with their types."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def check_keys(values: Mapping[str, Any], legal: Mapping[str, Any], where: str) -> list[str]:
    """What is wrong with `values`: keys that are not in `legal`, values that are not of its types."""
    wrongs = []
    for key, value in values.items():
        if key not in legal:
            wrongs.append(unknown_key(where, str(key), legal))
        elif isinstance(value, Mapping) and (nested := _dataclass_in(legal[key])) is not None:
            wrongs += check_keys(value, field_types(nested), f"{where}.{key}")
        elif not _fits(value, legal[key]):
            message = wrong(f"{where}.{key}", value, _words(legal[key]))
            wrongs.append(message + _number_hint(value, "float_type" if _takes_number(legal[key]) else ""))
    return wrongs


def _fits(value: Any, annotation: Any) -> bool:
    try:
        config = pydantic.ConfigDict(strict=True, arbitrary_types_allowed=True)
        adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(annotation, config=config)
        adapter.validate_python(value)
    except pydantic.ValidationError:
        return False
    except (pydantic.errors.PydanticUserError, NameError):
        return True  # a type that pydantic has no rule for: the constructor judges it
    return True


def _members(annotation: Any) -> tuple[Any, ...]:
    origin = typing.get_origin(annotation)
    return typing.get_args(annotation) if origin in (typing.Union, types.UnionType) else (annotation,)


def _dataclass_in(annotation: Any) -> type | None:
    """Our dataclass among a type's alternatives; a recipe writes it as a mapping of its fields."""
    ours = (m for m in _members(annotation) if isinstance(m, type) and m.__module__.startswith("tokengrain."))
    return next((m for m in ours if dataclasses.is_dataclass(m)), None)


def _takes_number(annotation: Any) -> bool:
    return any(member in (int, float) for member in _members(annotation))


def _words(annotation: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    out = []
    for member in _members(annotation):
        origin = typing.get_origin(member) or member
        if origin is typing.Literal:
            out.append("one of " + ", ".join(str(a) for a in typing.get_args(member)))
        elif member in words:
            out.append(words[member])
        elif origin in (dict, list, tuple, Sequence):
            out.append("a mapping" if origin is dict else "a list")
        elif dataclasses.is_dataclass(origin):
            out.append("a mapping")
        else:
            out.append(
                "text"
                if "text" not in out and hasattr(origin, "__members__")
                else getattr(origin, "__name__", str(origin))
            )
    return " or ".join(dict.fromkeys(out))


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
    from tokengrain.data.config import TokenizeConfig
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
        from tokengrain.models import check_config

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
    from tokengrain.recipe.schema import reads_reward_model

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
        from tokengrain.training.config import OnlineConfig

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
    from tokengrain.data.config import TokenizeConfig

    # A stage's own keys were checked as those of `DataSpec` when the stage was resolved.
    rest = {k: v for k, v in values.items() if k not in DataSpec.model_fields}
    yield from check_keys(rest, field_types(TokenizeConfig) | dict.fromkeys(DataSpec.model_fields, Any), where)


def _check_together(stages: list[ResolvedStage]) -> Iterator[str]:
    """Build the stages' configurations: they know what does not go together."""
    from tokengrain.data.config import TokenizeConfig

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
    from tokengrain.method import CREDIT
    from tokengrain.recipe.schema import credit_settings

    try:
        name, settings = credit_settings(stage.credit or {})
        kind, given = CREDIT.find(name), stage.credit_models
        kind.settings(settings)
    except RecipeError as error:
        yield f"{where}.credit: {error}"
        return
    for wanted in ("model", "reverse"):
        # The starting model judges itself.
        optional = kind.judges_itself and wanted == "model"
        if wanted in kind.objects and wanted not in given and not optional:
            yield f"{where}.credit.{wanted}: missing; expected '@STAGE' or a path"
    for extra in sorted(set(given) - kind.objects):
        yield f"{where}.credit.{extra}: credit {name} asks no such model; drop it"


def _check_objective(stage: ResolvedStage, where: str) -> Iterator[str]:
    from tokengrain.method import FROZEN, check_together, make_objective

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
    from tokengrain.loss import resolve_role
    from tokengrain.method import CREDIT, check_together, why_not
    from tokengrain.recipe.schema import credit_role, credit_settings

    try:
        name, settings = credit_settings(stage.credit or {})
        kind = CREDIT.find(name)
        kind.settings(settings)
    except RecipeError:
        return  # said elsewhere
    try:
        role = resolve_role(credit_role(stage), objective.roles, objective.name, objective.no_credit)
        check_together(objective, role, stage.teacher)
    except RecipeError as error:
        yield f"{where}.credit: {error}"
        return
    if stage.data.stage is not None and not kind.column_with(settings):
        yield f"{where}.credit: the data '@{stage.data.stage}' bring token rewards already; drop one"
    if reason := why_not(kind.values_with(settings), role.uses):
        yield f"{where}.credit: {name} as {role.name}: {reason}"


def _check_teacher(stage: ResolvedStage, where: str) -> Iterator[str]:
    from tokengrain.methods.aligndistil import teacher_strength

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
