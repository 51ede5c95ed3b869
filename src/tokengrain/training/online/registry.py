"""Credit steps by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from tokengrain.callables import load_named, validate_settings
from tokengrain.errors import RecipeError, shown
from tokengrain.training.online.step import NEEDS, PHASES, CreditStep

_HERE = "tokengrain.training.online"

ONLINE_CREDIT: dict[str, str] = {
    "filter_groups": f"{_HERE}.steps_filter:FilterGroups",
    "overlong": f"{_HERE}.steps_rewards:Overlong",
    "token_rewards": f"{_HERE}.steps_rewards:TokenRewards",
    "group": f"{_HERE}.steps_group:GroupAdvantages",
    "broadcast": f"{_HERE}.steps_group:Broadcast",
    "importance": f"{_HERE}.steps_group:Importance",
    "mask_truncated": f"{_HERE}.steps_group:MaskTruncated",
    "gae": f"{_HERE}.steps_ppo:GAE",
    "reinforce": f"{_HERE}.steps_ppo:Reinforce",
    "normalize": f"{_HERE}.steps_ppo:Normalize",
    "kl_penalty": f"{_HERE}.steps_ppo:KLPenalty",
    "rto": f"{_HERE}.steps_rto:RTO",
    "dcpo": f"{_HERE}.steps_dcpo:DCPOAdvantages",
    "thr": f"{_HERE}.steps_thr:THR",
    "nthr": f"{_HERE}.steps_thr:NTHR",
    "aepo": f"{_HERE}.steps_aepo:AEPO",
    "r3": f"{_HERE}.steps_r3:R3Rewards",
}
"""Name of a step: where its class is."""

# Objects that a recipe's runner supplies; every other keyword-only argument of a constructor is a setting.
OBJECTS = ("model", "reference", "reverse", "tokenizer", "reward_tokenizer", "critic", "source")


def step_class(name: str) -> Callable[..., Any]:
    """The class of a step: a name in `ONLINE_CREDIT`, or an import string, "module:Class" or "path.py:Class".

    Raises:
        RecipeError: unknown name (with the nearest right one), or an import string that leads nowhere.
    """
    return load_named(name, ONLINE_CREDIT, "online credit")


def step_objects(name: str) -> frozenset[str]:
    """Which of `OBJECTS` a step's constructor takes."""
    return frozenset(OBJECTS) & frozenset(inspect.signature(step_class(name)).parameters)


def check_step(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Validate a recipe's settings of a step before anything is loaded.

    Returns:
        All settings, defaults included, without the objects.

    Raises:
        RecipeError: unknown step or setting (with the nearest right name), a wrong type, a value out of range; of ours
            that take no objects also what the constructor refuses.
    """
    build = step_class(name)
    checked = validate_settings(f"credit {name!r}", build, settings, excluded=OBJECTS)
    if name in ONLINE_CREDIT and not step_objects(name):
        build(**checked)
    return checked


def make_step(name: str, /, **arguments: Any) -> CreditStep:
    """A step by name: `make_step("group", scale="none")`.

    Args:
        arguments: its settings, and the objects that it takes (see `OBJECTS`).

    Raises:
        RecipeError: as `check_step`; or an object that is missing or not taken.
    """
    build, takes = step_class(name), step_objects(name)
    objects = {k: v for k, v in arguments.items() if k in OBJECTS}
    settings = check_step(name, {k: v for k, v in arguments.items() if k not in OBJECTS})
    if extra := sorted(set(objects) - takes):
        raise RecipeError(f"credit {name!r} takes no {', '.join(extra)}")
    parameters = inspect.signature(build).parameters
    required = {o for o in takes if parameters[o].default is inspect.Parameter.empty}
    if missing := sorted(o for o in required if objects.get(o) is None):
        raise RecipeError(f"credit {name!r} needs {', '.join(missing)}")
    step = build(**objects, **settings)
    with suppress(AttributeError):  # what a checkpoint must agree on; a step need not keep its settings as given
        step.given = settings
    return step


def resolve_steps(credit: Any) -> list[CreditStep]:
    """Credit steps as they are given to the trainer, in the order of their phases.

    Args:
        credit: None, one step or a list of steps; a step is an object, a name, or a mapping with `name`.

    Raises:
        RecipeError: something else, an unknown phase or need, or two steps that set advantages.
    """
    if credit is None:
        return []
    given = [credit] if isinstance(credit, (str, Mapping)) or not isinstance(credit, Sequence) else list(credit)
    steps = [_step(one) for one in given]
    for step in steps:
        if step.phase not in PHASES:
            raise RecipeError(f"credit {step.name!r}: phase is {step.phase!r}; expected one of {', '.join(PHASES)}")
        if unknown := sorted(set(step.needs) - NEEDS):
            raise RecipeError(f"credit {step.name!r} needs {', '.join(unknown)}; expected some of {sorted(NEEDS)}")
    setters = [step.name for step in steps if step.phase == "advantages"]
    if len(setters) > 1:
        raise RecipeError(f"credit {setters[0]!r} and {setters[1]!r} both set the advantages; expected one of them")
    return sorted(steps, key=lambda step: PHASES.index(step.phase))


def _step(one: Any) -> CreditStep:
    if isinstance(one, str):
        return make_step(one)
    if isinstance(one, Mapping):
        if not isinstance(one.get("name"), str):
            raise RecipeError(f"a credit step needs a name, got {shown(dict(one))}")
        return make_step(one["name"], **{k: v for k, v in one.items() if k != "name"})
    if callable(one) and hasattr(one, "phase") and hasattr(one, "needs"):
        return one
    raise RecipeError(f"a credit step is an object with a phase, a name or a mapping, got {type(one).__name__}")
