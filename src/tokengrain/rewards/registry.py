"""Rewards by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tokengrain.callables import keyword_types, load_callable, nearest, validate_settings
from tokengrain.errors import RecipeError
from tokengrain.rewards.answers import Classification, ExactMatch, MathMatch, NumericMatch
from tokengrain.rewards.base import RewardFunction
from tokengrain.rewards.judge import Judge
from tokengrain.rewards.reward_model import RewardModel
from tokengrain.rewards.shape import CosineLength, FormatPattern, SoftOverlong


@dataclass(frozen=True)
class RewardKind:
    """A reward that comes with the library.

    Attributes:
        name: its name in recipes.
        build: its constructor; all arguments are keyword-only.
        what: one line for listings.
        objects: arguments that are not settings: in a recipe `model` is a model, the tokenizers are the runner's.
        defaults: of the settings that every reward has, where they are others.
    """

    name: str
    build: Callable[..., Callable[..., Any]]
    what: str
    objects: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)


REWARDS: dict[str, RewardKind] = {
    k.name: k
    for k in (
        RewardKind("exact", ExactMatch, "the answer is the column's text"),
        RewardKind("numeric", NumericMatch, "the answer is the column's number (GSM8K's format, boxed, last number)"),
        RewardKind("math", MathMatch, "the answer equals the column's mathematically, by math-verify"),
        RewardKind("classification", Classification, "the class named is the column's"),
        RewardKind("format", FormatPattern, "the completion matches a regular expression"),
        RewardKind("overlong", SoftOverlong, "DAPO's penalty near the length limit"),
        RewardKind("cosine", CosineLength, "a reward for being right that depends on the length"),
        RewardKind("judge", Judge, "a language model's score, from an OpenAI-compatible server"),
        RewardKind(
            "reward_model",
            RewardModel,
            "a trained reward model's score of the whole completion",
            frozenset({"model", "tokenizer", "reward_tokenizer"}),
            {"timeout": None},  # a model does not hang, and its size and the rollout's decide how long it takes
        ),
    )
}


def check_reward(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Validate a recipe's settings of a reward before anything is loaded.

    Args:
        name: a name in `REWARDS`, or an import string, "module:function" or "path.py:function".
        settings: the reward's own settings, without its objects (see `RewardKind`), and those of every reward
            (`RewardFunction`: weight, timeout, on_error, error_value, on_none, name). Of a class that an import
            string names, its keyword-only arguments are settings; a function has none.

    Returns:
        All settings, defaults included.

    Raises:
        RecipeError: unknown reward or setting (with the nearest right name), a wrong type or value; of ours also what
            its constructor refuses.
    """
    shared, own, build = _parts(name, settings)
    what = f"reward {name!r}"
    if build is None and own:
        raise RecipeError(f"{what}: unknown setting {next(iter(own))!r}{nearest(next(iter(own)), shared_types())}")
    checked = validate_settings(what, build, own, excluded=reward_objects(name)) if build is not None else {}
    if name in REWARDS and not reward_objects(name):
        # What types cannot say: patterns, addresses, what is installed.
        getattr(REWARDS[name].build, "check", REWARDS[name].build)(**checked)
    return checked | validate_settings(what, RewardFunction, shared)


def reward_objects(name: str) -> frozenset[str]:
    """What a reward takes beside its settings; see `RewardKind`."""
    return REWARDS[name].objects if name in REWARDS else frozenset()


def make_reward(name: str, /, **settings: Any) -> RewardFunction:
    """A reward by name or import string: `make_reward("numeric", weight=2.0)`, `make_reward("my.py:length")`.

    Args:
        settings: its settings, and the objects that it takes: `make_reward("reward_model", model=model)`.

    Raises:
        RecipeError: as `check_reward`; an object that is missing; or the import string leads nowhere.
        ModelError: a model that is not what the reward needs.
    """
    objects = {k: v for k, v in settings.items() if k in reward_objects(name)}
    checked = check_reward(name, {k: v for k, v in settings.items() if k not in objects})
    shared = {k: checked.pop(k) for k in shared_types()}
    if name in REWARDS:
        if "model" in REWARDS[name].objects and objects.get("model") is None:
            raise RecipeError(f"reward {name!r} needs a model")
        function = REWARDS[name].build(**objects, **checked)
    else:
        function = load_callable(name)
        if isinstance(function, type):
            function = function(**checked)
    return RewardFunction(function, **{**shared, "name": shared["name"] or _short(name)})


def shared_types() -> dict[str, Any]:
    """Name and annotation of the settings that every reward has."""
    return keyword_types(RewardFunction)


def _parts(name: str, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], Callable[..., Any] | None]:
    """Settings of every reward, settings of this one, and what takes the latter (None: a plain function)."""
    if name not in REWARDS and ":" not in name:
        known = nearest(name, REWARDS)
        raise RecipeError(f"unknown reward {name!r}{known} (or an import string, 'module:function')")
    shared = {k: v for k, v in settings.items() if k in shared_types()}
    shared = {**(REWARDS[name].defaults if name in REWARDS else {}), **shared}
    own = {k: v for k, v in settings.items() if k not in shared}
    if name in REWARDS:
        return shared, own, REWARDS[name].build
    function = load_callable(name)
    return shared, own, function if isinstance(function, type) else None


def _short(name: str) -> str:
    return name.rpartition(":")[2] or name
