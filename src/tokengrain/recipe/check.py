"""Mistakes in a recipe: collected, each with its dotted key, the value seen, and the nearest right name."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import pydantic

from tokengrain import specs
from tokengrain.data.config import TokenizeConfig
from tokengrain.errors import RecipeError, shown
from tokengrain.recipe import schema
from tokengrain.runs import CHECKPOINT, INPUTS
from tokengrain.settings import LARGEST, nearest
from tokengrain.training.config import OnlineConfig, PreferenceConfig

# Names of folders in a run, which no stage may have.
TAKEN = {schema.INIT: "the stage that builds a model from scratch", INPUTS: "what a run was given in memory"}
NOT_GIVEN: Mapping[str, str] = MappingProxyType({})


class Mistakes:
    """Collects what constructors refuse, each with the dotted key of what they were given."""

    def __init__(self, lines: Iterable[str] = ()) -> None:
        self.lines = list(lines)

    def add(self, where: str, what: object) -> None:
        self.lines.append(f"{where}: {what}")

    def about(self, where: str) -> bool:
        """Whether something is wrong there, or below."""
        return any(line.startswith((f"{where}:", f"{where}.", f"{where}[")) for line in self.lines)

    @contextmanager
    def at(self, where: str) -> Iterator[None]:
        """Note what is raised within, and go on."""
        try:
            yield
        except pydantic.ValidationError as error:
            self.add(where, error.errors()[0]["msg"])
        except (RecipeError, ValueError, TypeError, ImportError) as error:
            self.add(where, " ".join(str(error).split()))

    def error(self, source: str, given: Mapping[str, str] = NOT_GIVEN) -> RecipeError:
        """All of them as one error; `given`: keys that came from elsewhere than the `source`, and from where."""
        places = [next((p for key, p in given.items() if _is_about(line, key)), None) for line in self.lines]
        source = places[0] or source if len(set(places)) == 1 else source
        lines = [f"{p}: {x}" if p and p != source else x for x, p in zip(self.lines, places, strict=True)]
        if len(lines) == 1:
            return RecipeError(f"{source}: {lines[0]}")
        listed = "\n".join(f"  - {line}" for line in lines)
        return RecipeError(f"{source}: {len(lines)} mistakes\n{listed}")

    def raise_if_any(self, source: str, given: Mapping[str, str] = NOT_GIVEN) -> None:
        if self.lines:
            raise self.error(source, given)


def _is_about(line: str, key: str) -> bool:
    """Whether a mistake is about a dotted key, or what is below it; or about what is above it, and names the key."""
    place, _, what = line.partition(": ")
    place, key = (re.sub(r"\[(\d+)\]", r".\1", text) + "." for text in (place, key))
    if not key.startswith("stages."):  # what a stage inherits
        place = re.sub(r"^stages\.[^.]+\.", "", place)
    return place.startswith(key) or (
        key.startswith(place) and (key.split(".")[-2] in what.lower() or what.startswith("unknown"))
    )


# ---- What concerns the recipe as a whole; the rest is for the constructors of its stages' parts to say ----

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


def entries(values: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in nested mappings and lists, with its dotted key."""
    inside = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in inside:
        place = f"{where}.{key}" if where else str(key)
        yield place, value
        yield from entries(value, place)


def check_finite(values: Any) -> Iterator[str]:
    """What is wrong with numbers: NaN, infinity and 1e30 are none that a recipe can mean."""
    for where, value in entries(values):
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{where}: got {value}; expected a finite number"
        elif isinstance(value, (int, float)) and abs(value) > LARGEST:
            yield f"{where}: got {shown(value)}; expected a number of at most {LARGEST:g}"


def check_shared(recipe: schema.Recipe, found: Mistakes) -> None:
    """Note what is wrong with what all stages share."""
    folders: dict[str, str] = {}
    for name in recipe.stages:
        same = folders.setdefault(name.lower(), name)  # on some disks one folder
        if same != name:
            found.add(f"stages.{name}", f"the name differs from {same} in capitals alone; choose another")
        if name.lower() in TAKEN:
            found.add(f"stages.{name}", f"the name is taken by {TAKEN[name.lower()]}")
        elif CHECKPOINT.fullmatch(name.lower()):
            found.add(f"stages.{name}", "the name is that of a checkpoint; choose another")
    if recipe.model.stage is not None:
        found.add("model", f"{recipe.model.path!r} is a stage; the recipe's own model must exist before it")
    if recipe.data.stage is not None:
        found.add("data.train", f"{recipe.data.train!r} is a stage; name it in the data of the stage that uses it")
    for name, stage in recipe.stages.items():
        if stage.model is not None and stage.model.config is not None:
            found.add(f"stages.{name}.model", "only the recipe's own model can be built from scratch")
    check_training(recipe.training, PreferenceConfig, "training", found)
    check_data(recipe.data.tokenize, "data", found)


def check_training(values: Mapping[str, Any], kind: type, where: str, found: Mistakes) -> None:
    """Note keys of a `training:` that `kind`, the class of its settings, does not have, and values of other types."""
    for key, instead in SET_BY_RECIPE.items():
        if key in values:
            found.add(f"{where}.{key}", f"cannot be set here; {instead}")
    rest = {k: v for k, v in values.items() if k not in SET_BY_RECIPE}
    found.lines += check_keys(rest, field_types(kind), where)


def check_data(values: Mapping[str, Any], where: str, found: Mistakes) -> None:
    """The same for the keys of a `data:` that say how rows become tokens."""
    rest = {k: v for k, v in values.items() if k not in specs.DataSpec.model_fields}
    legal = field_types(TokenizeConfig) | dict.fromkeys(specs.DataSpec.model_fields, Any)
    del legal["prompt_role"]  # which the model says
    found.lines += check_keys(rest, legal, where)


def check_reference(
    where: str, name: str, kinds: Sequence[str], above: Mapping[str, Any], recipe: schema.Recipe, found: Mistakes
) -> None:
    """`@name` must be an earlier stage (one `above`) of one of the `kinds`."""
    if name in above:
        if above[name].kind not in kinds:
            made = "a model, not rows of data" if "annotate" in kinds else above[name].makes
            found.add(where, f"'@{name}' is a stage of kind {above[name].kind}, which makes {made}")
    elif name in recipe.stages:
        found.add(where, f"'@{name}' comes later than (or is) the stage that uses it; stages run in order")
    else:
        fitting = ", ".join(f"@{n}" for n, stage in above.items() if stage.kind in kinds)
        found.add(where, f"no stage {name!r} comes before it; expected one of {fitting or 'none so far'}")


# ---- pydantic's complaints in our words ----

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    dict: "a mapping",
    list: "a list",
    type(None): "null",
}
_SEEN = _WORDS | {bool: "true/false", type(None): "nothing"}
_EXPECTED = {
    "int_type": _WORDS[int],
    "float_type": _WORDS[float],
    "string_type": _WORDS[str],
    "bool_type": _WORDS[bool],
    "list_type": _WORDS[list],
    "none_required": _WORDS[type(None)],
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), _WORDS[dict]),
}
_BLOCKS: dict[str, type[pydantic.BaseModel]] = {
    "model": specs.ModelSpec,
    "data": specs.DataSpec,
    "lora": specs.LoraSpec,
    "tokenizer": specs.TokenizerSpec,
    "teacher": specs.TeacherSpec,
    "prompts": specs.PromptSpec,
}


def explain(
    error: pydantic.ValidationError, source: str, where: Sequence[str] = (), given: Mapping[str, str] = NOT_GIVEN
) -> RecipeError:
    """All of pydantic's complaints as one error, at most one per key; `where`: keys above those that it names."""
    messages: dict[str, str] = {}
    for found in error.errors():
        item: dict[str, Any] = {**found, "loc": (*where, *found["loc"])}
        path = _dotted(item["loc"])
        if path in messages and "expected" in messages[path] and item["type"] in _EXPECTED:
            messages[path] += f" or {_EXPECTED[item['type']]}"
        else:
            messages.setdefault(path, _message(item, path))
    return Mistakes(messages.values()).error(source, given)


def _dotted(loc: tuple[Any, ...]) -> str:
    """pydantic's location as the user wrote it: without the tags of unions."""
    if len(loc) > 2 and loc[0] == "stages" and loc[2] in schema.KINDS:
        loc = loc[:2] + loc[3:]
    tags = ("TokenizerSpec", "str", "[key]")
    return ".".join(t for t in map(str, loc) if t not in tags and not t.startswith(("list[", "dict[", "const")))


def _class_at(loc: tuple[Any, ...]) -> type[pydantic.BaseModel]:
    """The model whose key the last element of `loc` is."""
    above = [part for part in loc[:-1] if isinstance(part, str)]
    for part in reversed(above):
        if part in _BLOCKS:
            return _BLOCKS[part]
        if len(above) > 2 and part == above[2] and above[0] == "stages" and part in schema.KINDS:
            return schema.KINDS[part]
    return schema.Recipe


def _message(item: Any, path: str) -> str:
    kind, value, cls, key = item["type"], item["input"], _class_at(item["loc"]), str((item["loc"] or ("",))[-1])
    field = cls.model_fields.get(key)
    match kind:
        case "extra_forbidden":
            elsewhere = _elsewhere() if cls is schema.Recipe else {}
            if cls is schema.Recipe and isinstance(value, Mapping) and (found := list(_of_verl(value, key))):
                return "\n  - ".join(found)
            return _unknown_key(path.rpartition(".")[0], key, cls.model_fields, elsewhere)
        case "missing":
            return f"{path}: missing; {field.description if field else ''}"
        case "union_tag_not_found":
            return f"{path}.kind: missing; expected one of {', '.join(schema.KINDS)}"
        case "union_tag_invalid":
            return _wrong(f"{path}.kind", item["ctx"]["tag"], f"one of {', '.join(schema.KINDS)}", schema.KINDS)
        case "value_error":
            return f"{path}: {item['ctx']['error']}" if path else str(item["ctx"]["error"])
        case "string_pattern_mismatch" if path.startswith("stages"):
            return f"{path}: not a name for a stage; expected letters, digits, - and _"
        case "literal_error":
            choices = item["ctx"]["expected"]
            names = [c.strip().strip("'") for c in choices.replace(" or ", ",").split(",")]
            return _wrong(path, value, f"one of {choices}", names)
    if kind in _EXPECTED:
        # What a key is for, where keys were given below one that has none.
        meaning = f" ({field.description})" if isinstance(value, Mapping) and field and field.description else ""
        return _wrong(path, value, _EXPECTED[kind] + meaning) + _number_hint(value, kind in ("int_type", "float_type"))
    return f"{path}: got {shown(value)}; {item['msg'][0].lower()}{item['msg'][1:]}"


def _wrong(path: str, value: Any, expected: str, names: Iterable[str] = ()) -> str:
    near = get_close_matches(str(value), list(names), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{path}: got {shown(value)} ({_SEEN.get(type(value), type(value).__name__)}); expected {expected}{hint}"


def _number_hint(value: Any, number: bool) -> str:
    """What a number in quotes would be without them, if it is one that a recipe may have."""
    try:
        read = float(value) if number and isinstance(value, str) else math.nan
    except ValueError:
        return ""
    return f"; without quotes it is a number: {read:g}" if math.isfinite(read) else ""


# What TRL, verl, OpenRLHF, axolotl and LLaMA-Factory call settings that have another name or place here.
FOREIGN = {
    **dict.fromkeys(("num_iterations", "ppo_epochs", "num_ppo_epochs"), "training.rollout_epochs"),
    **dict.fromkeys(("steps_per_generation", "num_mini_batches", "ppo_mini_batch_size"), "training.minibatches"),
    **dict.fromkeys(("max_completion_length", "max_response_length", "response_length"), "training.max_new_tokens"),
    **dict.fromkeys(
        ("generation_batch_size", "train_batch_size", "rollout_batch_size"), "training.prompts_per_rollout"
    ),
    **dict.fromkeys(("n_samples_per_prompt", "rollout_n", "group_size"), "training.num_generations"),
    **dict.fromkeys(("staleness_threshold", "max_trajectory_age_steps"), "training.max_staleness"),
    **dict.fromkeys(("stop_strings", "stop_sequences"), "training.stop"),
    **dict.fromkeys(("beta", "kl_loss_coef", "kl_coef", "init_kl_coef"), "objective.beta"),
    **dict.fromkeys(("epsilon", "clip_ratio", "cliprange"), "objective.epsilon"),
    **dict.fromkeys(("epsilon_high", "clip_ratio_high"), "objective.epsilon_high"),
    **dict.fromkeys(("log_completions", "num_completions_to_print"), "training.rollout_samples"),
    **dict.fromkeys(("adv_estimator", "importance_sampling_level"), "method, objective.name and credit"),
    **dict.fromkeys(("total_epochs", "total_training_steps"), "training.num_train_epochs, or max_steps"),
    **dict.fromkeys(("train_files", "dataset_name"), "data.train"),
    "val_files": "data.eval",
    "loss_type": "objective.name, or objective.loss_type of dpo",
    "scale_rewards": "credit: [{name: group, scale: ...}]",
    "mask_truncated_completions": "credit: [..., mask_truncated]",
    "reward_weights": "rewards: [{name: ..., weight: ...}]",
    "reward_funcs": "rewards: [...]",
    "max_prompt_length": "data.max_prompt_length",
    **dict.fromkeys(("sequence_len", "cutoff_len"), "data.max_length"),
    "num_epochs": "training.num_train_epochs",
    "micro_batch_size": "training.per_device_train_batch_size",
    **dict.fromkeys(("base_model", "model_name_or_path"), "model"),
    **dict.fromkeys(("datasets", "dataset"), "data.train"),
    **dict.fromkeys(("val_set_size", "val_size"), "data.eval_fraction"),
    **dict.fromkeys(("lora_r", "lora_rank", "rank"), "lora.r"),
    "lora_alpha": "lora.alpha",
    **dict.fromkeys(("lora_target", "lora_target_modules"), "lora.target_modules"),
    **dict.fromkeys(("adapter", "finetuning_type"), "lora: {r: 16}, or null for all weights"),
    **{name: f"model.{name}" for name in ("load_in_4bit", "load_in_8bit")},
    "pref_beta": "objective.beta",
    "pref_loss": "objective.name, or objective.loss_type of dpo",
    **dict.fromkeys(
        ("use_vllm", "vllm_mode", "vllm_server_host", "vllm_server_base_url"), "sampler: {name: server, url: ...}"
    ),
}


OF_STAGES = ("objective", "credit", "rewards", "reference", "teacher", "sampler", "critic", "prompts")

ONLINE = OnlineConfig.__dataclass_fields__.keys() - PreferenceConfig.__dataclass_fields__.keys()
"""Settings of online stages alone."""

# What would make completions no samples of the policy, while no log-probability would say so.
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram_size", "logit_bias")


def _unknown_key(where: str, name: str, legal: Iterable[str], elsewhere: Mapping[str, str] | None = None) -> str:
    """`elsewhere`: keys of other places, with their path."""
    path, legal = f"{where}.{name}" if where else str(name), sorted(legal)
    if name in PENALTIES:
        return f"{path}: unknown key; there is no such penalty, because samples would not be the policy's own"
    outside = not where.startswith("stages")
    if not where and name in OF_STAGES:
        return f"{path}: unknown key; it is of stages: 'stages.train.{name}'"
    if elsewhere and name in elsewhere:
        return f"{path}: unknown key; did you mean {elsewhere[name]!r}?"
    if name in FOREIGN:
        here = FOREIGN[name]
        of_stage = here.partition(".")[2] in ONLINE or here.startswith(("objective", "credit", "rewards", "sampler"))
        here = f"stages.train.{here}" if outside and of_stage else here
        return f"{path}: unknown key; the {name} of other libraries is here: {here}"
    if name in ONLINE and outside:
        return f"{path}: unknown key; it is of online stages: 'stages.train.training.{name}'"
    near = get_close_matches(name, list(elsewhere or ()), n=1, cutoff=0.6)
    if elsewhere and near and not get_close_matches(name, legal, n=1, cutoff=0.5):
        return f"{path}: unknown key; did you mean {elsewhere[near[0]]!r}?"
    return f"{path}: unknown key{nearest(name, legal)}"


def _of_verl(group: Mapping[str, Any], path: str) -> Iterator[str]:
    """Hints for the settings in one of verl's groups, such as `actor_rollout_ref.actor.kl_loss_coef`."""
    for name, value in group.items():
        where = f"{path}.{name}"
        if isinstance(value, Mapping):
            yield from _of_verl(value, where)
        elif here := FOREIGN.get({"n": "rollout_n"}.get(name, name)) or (
            f"training.{name}" if name in ONLINE else None
        ):
            stage = "" if here.startswith(("data.", "method", "training.num_train")) else "stages.train."
            yield f"{where}: unknown key; the {name} of other libraries is here: {stage}{here}"


def _elsewhere() -> dict[str, str]:
    """Keys of `training:` and `data:` with their dotted path, to recognise them where they do not belong."""
    data = ("eval", "eval_fraction", "split", "limit", "streaming", *field_types(TokenizeConfig))
    return {k: f"training.{k}" for k in field_types(PreferenceConfig)} | {k: f"data.{k}" for k in data}


# ---- Keys that are the arguments of a dataclass ----


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
            wrongs.append(_unknown_key(where, str(key), legal))
        elif isinstance(value, Mapping) and (nested := _dataclass_in(legal[key])) is not None:
            wrongs += check_keys(value, field_types(nested), f"{where}.{key}")
        elif not _fits(value, legal[key]):
            hint = _number_hint(value, bool({int, float} & set(_members(legal[key]))))
            wrongs.append(_wrong(f"{where}.{key}", value, _in_words(legal[key])) + hint)
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


def _in_words(annotation: Any) -> str:
    out: list[str] = []
    for member in _members(annotation):
        origin = typing.get_origin(member) or member
        if origin is typing.Literal:
            out.append("one of " + ", ".join(str(a) for a in typing.get_args(member)))
        elif origin in _WORDS:
            out.append(_WORDS[origin])
        elif origin in (tuple, Sequence):
            out.append("a list")
        elif dataclasses.is_dataclass(origin):
            out.append("a mapping")
        elif hasattr(origin, "__members__") and "text" not in out:  # an enumeration
            out.append("text")
        else:
            out.append(getattr(origin, "__name__", str(origin)))
    return " or ".join(dict.fromkeys(out))
