"""Validation errors as one clear message: dotted path, nearest right name, value seen, type expected."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

import pydantic

from tokengrain.callables import nearest
from tokengrain.errors import RecipeError, shown
from tokengrain.recipe import schema, specs

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
