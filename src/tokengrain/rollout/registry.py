"""Samplers by name: what a recipe's `sampler:` says, checked and made."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from tokengrain.callables import load_named, validate_settings
from tokengrain.errors import RecipeError, shown
from tokengrain.rollout.base import Sampler

SAMPLERS: dict[str, str] = {
    "hf": "tokengrain.rollout.hf:HFGenerate",
    "continuous": "tokengrain.rollout.continuous:HFContinuous",
    "server": "tokengrain.rollout.server:OpenAIServer",
    "branching": "tokengrain.rollout.branching:Branching",
}
"""Name of a sampler: where its class is."""

DEFAULT = "hf"

# Positional arguments of a constructor that the trainer supplies; all its other arguments are settings.
OBJECTS = ("model", "tokenizer", "sampler")


def sampler_class(name: str) -> Callable[..., Any]:
    """The class of a sampler: a name in `SAMPLERS`, or an import string, "module:Class" or "path.py:Class".

    Raises:
        RecipeError: unknown name (with the nearest right one), or an import string that leads nowhere.
    """
    return load_named(name, SAMPLERS, "sampler")


def check_sampler(given: Any) -> dict[str, Any]:
    """Validate a sampler's settings before a model is loaded or a server is up.

    Args:
        given: a name, or a mapping with `name` and settings; of one that works on top of another (`branching`),
            `sampler` is the other one, the default if it is not given.

    Returns:
        `name`, all settings with the defaults of those not given, and `sampler` where there is one below.

    Raises:
        RecipeError: unknown sampler or setting (with the nearest right name), a wrong type, a value out of range.
    """
    name, own = _named(given)
    build = sampler_class(name)
    takes, also = _positional(build)
    below = check_sampler(own.pop("sampler", DEFAULT)) if "sampler" in takes else None
    if below is not None and "sampler" in below:
        raise RecipeError(f"sampler {name!r} on top of {below['name']!r}; expected one that draws by itself: hf, say")
    settings = validate_settings(f"sampler {name!r}", build, own, also=also)
    if (check := getattr(build, "check", None)) is not None:
        check(**settings)
    return {"name": name, **settings, **({"sampler": below} if below is not None else {})}


def make_sampler(given: Any, model: Any, tokenizer: Any = None) -> Sampler:
    """A sampler as a recipe or a call of the trainer gives it.

    Args:
        given: a sampler, which is returned as it is; else see `check_sampler`. None: the default.
        model, tokenizer: the policy and its tokenizer, for samplers that use them.

    Raises:
        RecipeError: as `check_sampler`. ModelError: a model that the sampler cannot use.
    """
    if given is not None and not isinstance(given, (str, Mapping)):
        if not isinstance(given, Sampler):
            raise RecipeError(
                f"a sampler is an object with sample and refresh, a name or a mapping, got {shown(given)}"
            )
        return given
    settings = check_sampler(DEFAULT if given is None else given)
    build, below = sampler_class(settings.pop("name")), settings.pop("sampler", None)
    objects = {"model": model, "tokenizer": tokenizer}
    if below is not None:
        objects["sampler"] = make_sampler(below, model, tokenizer)
    takes, _ = _positional(build)
    made: Sampler = build(**{name: objects[name] for name in takes}, **settings)
    return made


def check_reachable(given: Any, *, patient: bool = True) -> None:
    """Ask the server that a sampler draws from, or the one below it, whether it is there.

    Args:
        given: a sampler, or its settings, as `make_sampler` takes them. Of a sampler that needs a model, and of one
            without a method `check_reachable`, nothing is asked.
        patient: False: one attempt, and not for long.

    Raises:
        RolloutError: nobody answers. RecipeError: as `check_sampler`; a server that does not have the model.
    """
    sampler = given
    if given is None or isinstance(given, (str, Mapping)):
        settings = check_sampler(DEFAULT if given is None else given)
        settings = settings.get("sampler", settings)
        build = sampler_class(settings.pop("name"))
        if _positional(build)[0] or not hasattr(build, "check_reachable"):
            return
        sampler = build(**settings)
    sampler = getattr(sampler, "sampler", sampler)
    if (check := getattr(sampler, "check_reachable", None)) is not None:
        check(patient=patient)


def deciding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of what `check_sampler` gave, JSON-like, what decides which completions are drawn."""
    found = _without_neutral(sampler_class(settings["name"]), settings)
    return found | ({"sampler": deciding(settings["sampler"])} if "sampler" in settings else {})


def describe_sampler(sampler: Any) -> dict[str, Any]:
    """`deciding` of a sampler that is made already; of one that is none of ours just its name."""
    found = _without_neutral(type(sampler), {"name": sampler.name, **getattr(sampler, "given", {})})
    return found | ({"sampler": describe_sampler(sampler.sampler)} if hasattr(sampler, "sampler") else {})


def _without_neutral(build: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in settings.items() if k not in getattr(build, "neutral", ())}
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=str))  # as it comes back from a file
    return plain


def _named(given: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(given, str):
        return given, {}
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise RecipeError(f"a sampler needs a name, got {shown(given)}; expected for example {{name: hf}}")
    return given["name"], {k: v for k, v in given.items() if k != "name"}


def _positional(build: Callable[..., Any]) -> tuple[list[str], list[str]]:
    """Names of a constructor's positional arguments: those that the trainer supplies, and the others."""
    parameters = inspect.signature(build).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return [n for n in names if n in OBJECTS], [n for n in names if n not in OBJECTS]
