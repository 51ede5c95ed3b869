"""Settings read from a callable's signature, validated; and callables found by an import string.

Objectives and credit sources are plain callables. Their hyper-parameters are the keyword-only arguments of their
signature, with type and range written there once (`beta: Positive = 0.1`). And the YAML that recipes are in.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import core_schema
from torch import Tensor

from tokengrain.errors import RecipeError, RunError, TokengrainError, problem, require, shown


def _not_bool(value: Any) -> Any:
    # To Python a bool is a number; in a recipe `beta: true` is a mistake.
    if isinstance(value, bool):
        raise ValueError("a number is needed, not a bool")
    return value


@dataclass(frozen=True)
class Bounds:
    """Range of a finite or a whole number. pydantic asks it for its schema."""

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        bounds: dict[str, Any] = {"gt": self.gt, "ge": self.ge, "lt": self.lt, "le": self.le}
        if source is int:
            return core_schema.int_schema(**bounds, strict=True)
        number = core_schema.float_schema(**bounds, allow_inf_nan=False)
        return core_schema.no_info_before_validator_function(_not_bool, number)


Number = Annotated[float, Bounds()]
Positive = Annotated[float, Bounds(gt=0)]
NonNegative = Annotated[float, Bounds(ge=0)]
Share = Annotated[float, Bounds(ge=0, le=1)]
Smoothing = Annotated[float, Bounds(ge=0, lt=0.5)]
Whole = Annotated[int, Bounds(ge=0)]
Count = Annotated[int, Bounds(ge=1)]
LARGEST = 1e18  # no number of a recipe or a row means more


def load_named(name: str, known: Mapping[str, str], what: str) -> Callable[..., Any]:
    """A name in `known`, which has import strings, or an import string: "module:name" or "path.py:name"."""
    if name in known:
        return _loaded(known[name])
    require(":" in name, RecipeError, f"unknown {what} {name!r}{nearest(name, known)}")
    return load_callable(name)


def nearest(name: str, names: Collection[str]) -> str:
    """`"; did you mean 'beta'?"`, or the names there are, for an unknown `name`."""
    close = difflib.get_close_matches(str(name), list(names), n=5, cutoff=0.5)
    if not close:
        return f"; known: {', '.join(sorted(names)) or 'none'}"
    letters = sorted(str(name))  # exchanged ones are the likelier slip: `dop` is `dpo` sooner than `dro`
    return f"; did you mean {next((c for c in close if sorted(c) == letters), close[0])!r}?"


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raises ValueError if the argument `name` is none of what the type `choices`, a `Literal`, allows."""
    if value not in typing.get_args(choices):
        *others, last = map(repr, typing.get_args(choices))
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {value!r}")


def keyword_types(function: Callable[..., Any], also: Collection[str] = ()) -> dict[str, Any]:
    """Name and annotation of every keyword-only argument of `function`, and of those named in `also`."""
    # A class carries its annotations in `__init__`, an object in `__call__`.
    own: Any = function if inspect.isroutine(function) else type(function).__call__
    hints = get_type_hints(function.__init__ if inspect.isclass(function) else own, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    return {p.name: hints.get(p.name, Any) for p in parameters if p.kind is p.KEYWORD_ONLY or p.name in also}


def is_tensor_type(annotation: Any) -> bool:
    """Whether the annotation is `Tensor` or `Tensor | None`."""
    return annotation is Tensor or Tensor in typing.get_args(annotation)


def validate_settings(
    what: str,
    function: Callable[..., Any],
    given: Mapping[str, Any],
    *,
    excluded: Collection[str] = (),
    also: Collection[str] = (),
) -> dict[str, Any]:
    """The settings `given` of a function, converted to their annotated types, and the defaults of the others.

    They are its keyword-only arguments and the positional ones in `also`, without those in `excluded`. Raises
    `RecipeError`, which begins with `what` ("objective 'dpo'"), for an unknown name, wrong type or value out of range.
    """
    types = {k: v for k, v in keyword_types(function, also).items() if k not in excluded}
    defaults = inspect.signature(function).parameters
    for name in given:
        require(name in types, RecipeError, f"{what}: unknown setting {name!r}{nearest(name, types)}")
    settings = {}
    for name, annotation in types.items():
        if name not in given:
            settings[name] = defaults[name].default
            missing = settings[name] is inspect.Parameter.empty
            require(not missing, RecipeError, f"{what}: setting {name!r} is missing")
            continue
        try:
            settings[name] = TypeAdapter(annotation, config=None).validate_python(given[name])
        except ValidationError as error:
            reasons = "; ".join(dict.fromkeys(e["msg"] for e in error.errors()))
            raise RecipeError(f"{what}: {name} = {shown(given[name])}: {reasons}") from None
    return settings


_trusted: ContextVar[bool] = ContextVar("trusted", default=False)
_named_by: ContextVar[Path | None] = ContextVar("named_by", default=None)


@contextmanager
def _within(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def trust_run_code(trusted: bool) -> AbstractContextManager[None]:
    """Whether code that run folders name may run within; without this it may not."""
    return _within(_trusted, trusted)


def code_named_by(file: Path) -> AbstractContextManager[None]:
    """What is loaded within is named by `file`, which may be another's: only trusted code runs."""
    return _within(_named_by, file)


def check_trusted(what: str) -> None:
    """Raises `RunError` if `what`, code that is about to run or a server to be asked, is named by an untrusted file."""
    file, advice = _named_by.get(), "read it, then say --trust-run-code (from Python: trust_run_code=True)"
    require(file is None or _trusted.get(), RunError, f"{file} names {what}, which would be used now; {advice}")


def load_callable(reference: str) -> Callable[..., Any]:
    """The callable that `"package.module:function"` or `"path/to/file.py:function"` names; see `check_trusted`."""
    check_trusted(repr(reference))
    return _loaded(reference)


def _loaded(reference: str) -> Callable[..., Any]:
    place, separator, name = reference.rpartition(":")
    what = f"{reference!r} is not of the form 'module:function' or 'path.py:function'"
    require(separator and place and name, RecipeError, what)
    if place.endswith(".py"):
        path = Path(place).expanduser()
        require(path.is_file(), RecipeError, f"{reference!r}: no file {str(path)!r}")
        module = _module_of_file(path)
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not (place == error.name or place.startswith(error.name + ".")):
                raise  # the module exists; something that it imports does not
            raise RecipeError(f"{reference!r}: no module {place!r}") from None
    found = getattr(module, name, None)
    if not callable(found):
        names = [n for n in vars(module) if callable(getattr(module, n)) and not n.startswith("_")]
        raise RecipeError(f"{reference!r}: {place!r} has no callable {name!r}{nearest(name, names)}")
    return typing.cast(Callable[..., Any], found)


def _module_of_file(path: Path) -> types.ModuleType:
    """The module that the file makes, run anew."""
    # Dataclasses and `inspect` look a class up in the module that `sys.modules` has under its name; the path in it
    # keeps a user's `json.py` from taking another module's place.
    name = f"{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # a path that ends in .py always has a loader
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def source_of(function: Callable[..., Any]) -> str:
    """Source text of a function, of a class or of an object's class; "" where there is none."""
    named = inspect.isroutine(function) or inspect.isclass(function)
    try:
        return inspect.getsource(function if named else type(function))
    except (OSError, TypeError):
        return ""


# ---- YAML in which each thing is said once ----

MOST_VALUES = 100_000


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-4` as a number (YAML 1.1 wants `1.0e-4`) and refuses repeated keys and alias bombs."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and _size(node, {}) > MOST_VALUES:
            why = f"its aliases make more than {MOST_VALUES} values, or a value part of itself"
            raise yaml.constructor.ConstructorError(None, None, why, node.start_mark)
        return node


def _size(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values a node has, each as often as it is named."""
    if id(node) not in known:
        known[id(node)] = math.inf  # until it is known: of a node within itself
        parts = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in parts for part in pair]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


_Loader.yaml_implicit_resolvers = copy.deepcopy(yaml.SafeLoader.yaml_implicit_resolvers)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, (str, int, float, bool)) and key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        seen.add(key if isinstance(key, (str, int, float, bool)) else id(key))
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that puts quotes around text that `_Loader` would read as a number, such as `1e3`."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def write_yaml(values: dict[str, Any]) -> str:
    """YAML that `parse_yaml` reads as these values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_yaml(text: str, where: str, kind: type[TokengrainError] = RecipeError) -> Any:
    """Parse YAML; where it is malformed, the error of that kind has the line number."""
    try:
        return yaml.load(text, Loader=_Loader)
    except Exception as error:  # for a wrong date, say, constructors raise what they like
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}, column {mark.column + 1}:" if mark is not None else ""
        raise kind(f"{where}:{line} not valid YAML: {problem(error)}") from error
