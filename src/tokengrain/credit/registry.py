"""Credit sources by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokengrain.callables import keyword_types, nearest, validate_settings
from tokengrain.credit.base import CreditSource
from tokengrain.credit.contrastive import ContrastivePrompting
from tokengrain.credit.contrastive_dpo import ContrastiveDPO
from tokengrain.credit.guide import GuideLogRatio
from tokengrain.credit.reward_model import RewardModelCredit
from tokengrain.credit.simple import ColumnCredit, FunctionCredit, RandomCredit, Transformed
from tokengrain.credit.spans import SpanCredit
from tokengrain.credit.surprise import Entropy, Surprise
from tokengrain.credit.tdpo import TDPOAdvantage
from tokengrain.credit.templates import make_templates
from tokengrain.errors import RecipeError

# Objects that a recipe's runner supplies; everything else in a constructor is a setting.
OBJECTS = ("model", "reference", "reverse", "tokenizer", "reward_tokenizer")


@dataclass(frozen=True)
class CreditKind:
    """A kind of credit source.

    Attributes:
        name: its name in recipes.
        build: its constructor; all arguments are keyword-only.
        what: one line for listings.
        reward_model: its model is a token-level reward model, not a language model.
    """

    name: str
    build: Callable[..., CreditSource]
    what: str
    reward_model: bool = False

    @property
    def values(self) -> str:
        """What its numbers mean; see `CreditSource.values`."""
        return getattr(self.build, "values", "any")

    @property
    def objects(self) -> frozenset[str]:
        """Which of `OBJECTS` the constructor takes."""
        return frozenset(OBJECTS) & frozenset(inspect.signature(self.build).parameters)

    @property
    def needed(self) -> frozenset[str]:
        """Those of them that it cannot do without."""
        parameters = inspect.signature(self.build).parameters
        return frozenset(o for o in self.objects if parameters[o].default is inspect.Parameter.empty)


CREDIT: dict[str, CreditKind] = {
    k.name: k
    for k in (
        CreditKind("guide", GuideLogRatio, "log-ratio of a preference-trained guide to the reference (TGDPO)"),
        CreditKind("contrastive", ContrastivePrompting, "the model itself under two opposite instructions (T-REG)"),
        CreditKind("contrastive_dpo", ContrastiveDPO, "log-ratio of a DPO model to a reverse DPO model (AlignDistil)"),
        CreditKind("tdpo", TDPOAdvantage, "advantage of each token under a trained model, with its full KL (TDPO)"),
        CreditKind("reward_model", RewardModelCredit, "scores of a token-level reward model (Q-RM)", reward_model=True),
        CreditKind("spans", SpanCredit, "+1 on the spans of chosen, -1 on those of rejected completions (RRPO)"),
        CreditKind("surprise", Surprise, "log-probability of the token: improbable is bad, as a baseline"),
        CreditKind("entropy", Entropy, "entropy of the distribution the token was drawn from, as a baseline"),
        CreditKind("column", ColumnCredit, "per-token rewards that came with the data"),
        CreditKind("function", FunctionCredit, "a Python function of yours"),
        CreditKind("random", RandomCredit, "uniform random numbers, as a control"),
    )
}


def why_not(values: str, uses: str) -> str:
    """Why numbers that mean `values` (see `CreditSource`) do not suit a role that uses `uses`; "" if they do."""
    if uses == "sign" and values == "order":
        return (
            "only the order of its numbers within a completion means something, not their sign; use it as "
            "selection or as span, by share"
        )
    if uses == "order" and values == "marks":
        return "it marks tokens and does not rank them; set `above: 0` to take what it marks"
    return ""


def check_credit(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Validate a recipe's settings of a credit source before anything is loaded.

    Args:
        name: a name in `CREDIT`.
        settings: the source's settings, without its objects; `scale` and `clip` are allowed for every source.

    Returns:
        All settings, defaults included.

    Raises:
        RecipeError: unknown source or setting (with the nearest right name), a wrong type, a value out of
            range, or bad templates.
    """
    if name not in CREDIT:
        raise RecipeError(f"unknown credit {name!r}{nearest(name, CREDIT)}")
    what, kind = f"credit {name!r}", CREDIT[name]
    shared = {k: v for k, v in settings.items() if k in keyword_types(Transformed)}
    own = {k: v for k, v in settings.items() if k not in shared}
    checked = validate_settings(what, kind.build, own, excluded=kind.objects)
    if "templates" in checked:
        make_templates(checked["templates"])
    return checked | validate_settings(what, Transformed, shared)


def make_credit(name: str, **arguments: Any) -> CreditSource:
    """A credit source by name: `make_credit("guide", model=guide, reference=reference, beta=0.3)`.

    Args:
        name: a name in `CREDIT`.
        arguments: its objects (model, reference, tokenizer) and settings; `scale` and `clip` transform any
            source's credit.

    Raises:
        RecipeError: as `check_credit`; or a needed object is missing, or one that it does not take is given.
    """
    objects = {k: v for k, v in arguments.items() if k in OBJECTS}
    settings = check_credit(name, {k: v for k, v in arguments.items() if k not in OBJECTS})
    kind = CREDIT[name]
    if missing := sorted(o for o in kind.needed if objects.get(o) is None):
        raise RecipeError(f"credit {name!r} needs {', '.join(missing)}")
    if extra := sorted(set(objects) - kind.objects):
        raise RecipeError(f"credit {name!r} takes no {', '.join(extra)}")
    shared = {k: settings.pop(k) for k in keyword_types(Transformed)}
    source = kind.build(**objects, **settings)
    return source if shared == {"scale": 1.0, "clip": None} else Transformed(source, **shared)
