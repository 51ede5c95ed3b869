"""Objectives by name, with validated hyper-parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.callables import (
    is_tensor_type,
    keyword_types,
    load_callable,
    nearest,
    source_of,
    validate_settings,
)
from tokengrain.errors import RecipeError
from tokengrain.files import fingerprint
from tokengrain.objectives.dpo import dpo_loss
from tokengrain.objectives.output import LossOutput, Unit
from tokengrain.objectives.sft import sft_loss
from tokengrain.objectives.simpo import simpo_loss
from tokengrain.objectives.tdpo import tdpo_loss
from tokengrain.objectives.tgdpo import tgdpo_loss
from tokengrain.objectives.treg import treg_loss, treg_simpo_loss

LossFunction = Callable[..., LossOutput]


@dataclass(frozen=True)
class Objective:
    """A loss function with what a trainer must know about it.

    Attributes:
        name: its name in recipes.
        loss: `loss(logps [N], segments, *, <quantities and hyper-parameters>) -> LossOutput`. Keyword-only
            arguments annotated `Tensor` (or `Tensor | None`) are per-token quantities `[N]`; the others are
            hyper-parameters.
        paper: arXiv id or URL, "" if there is none.
        unit: "pairs" if every prompt must have a chosen and a rejected completion, else "completions".
        fixed: hyper-parameters that the name itself fixes (`tdpo1` is `tdpo` with variant="tdpo1").
    """

    name: str
    loss: LossFunction
    paper: str = ""
    unit: Unit = "pairs"
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def quantities(self) -> frozenset[str]:
        """Per-token quantities that `loss` accepts, beside logps."""
        return frozenset(k for k, v in keyword_types(self.loss).items() if is_tensor_type(v))

    def needs(self, hyper: Mapping[str, Any]) -> frozenset[str]:
        """Quantities that `loss` cannot do without, given its hyper-parameters."""
        parameters = inspect.signature(self.loss).parameters
        required = {q for q in self.quantities if parameters[q].default is inspect.Parameter.empty}
        if "ref_logps" in self.quantities and hyper.get("reference_free") is False:
            required.add("ref_logps")  # optional in the signature only for reference_free=True
        return frozenset(required)

    def bind(self, **hyper: Any) -> BoundObjective:
        """Fix and validate the hyper-parameters.

        Raises:
            RecipeError: unknown name, wrong type, out of range, or a combination that the loss refuses.
        """
        what = f"objective {self.name!r}"
        for name, value in self.fixed.items():
            if hyper.get(name, value) != value:
                raise RecipeError(f"{what}: {name} = {hyper[name]!r}, but the name means {value!r}")
        settings = validate_settings(what, self.loss, {**hyper, **self.fixed}, excluded=self.quantities)
        return BoundObjective(self, settings)


@dataclass(frozen=True)
class BoundObjective:
    """An objective with its hyper-parameters: `bound(segments=..., logps=..., ...) -> LossOutput`."""

    objective: Objective
    hyper: dict[str, Any]

    @property
    def name(self) -> str:
        return self.objective.name

    @property
    def unit(self) -> Unit:
        """What it needs: "pairs" or any "completions"."""
        return self.objective.unit

    @property
    def needs(self) -> frozenset[str]:
        """Subset of {"ref_logps", "kl", "token_rewards"} (or a user's own names) that a call must bring."""
        return self.objective.needs(self.hyper)

    def __call__(self, *, segments: Segments, logps: Tensor, **quantities: Tensor | None) -> LossOutput:
        """Losses of a batch; see the loss function for the quantities. All flat `[N]`.

        Raises:
            ValueError: a needed quantity is missing.
            TypeError: a quantity that the loss does not know.
        """
        missing = sorted(q for q in self.needs if quantities.get(q) is None)
        if missing:
            raise ValueError(f"objective {self.name!r} needs {', '.join(missing)}, got {sorted(quantities)}")
        return self.objective.loss(logps, segments, **quantities, **self.hyper)

    def describe(self) -> dict[str, Any]:
        """Name and hyper-parameters, for fingerprints and logs; of a user's own function also its source."""
        built_in = OBJECTIVES.get(self.name) is self.objective
        source = {} if built_in else {"source": fingerprint(source_of(self.objective.loss))}
        return {"name": self.name, **self.hyper, **source}


OBJECTIVES: dict[str, Objective] = {
    o.name: o
    for o in (
        Objective("dpo", dpo_loss, "2305.18290"),
        Objective("simpo", simpo_loss, "2405.14734"),
        Objective("tdpo", tdpo_loss, "2404.11999"),
        Objective("tdpo1", tdpo_loss, "2404.11999", fixed={"variant": "tdpo1"}),
        Objective("tdpo2", tdpo_loss, "2404.11999", fixed={"variant": "tdpo2"}),
        Objective("tgdpo", tgdpo_loss, "2506.14574"),
        Objective("treg", treg_loss, "2412.02685"),
        Objective("treg_simpo", treg_simpo_loss, "2412.02685"),
        Objective("sft", sft_loss, unit="completions"),
    )
}


def make_objective(name: str | LossFunction, *, unit: Unit = "pairs", **hyper: Any) -> BoundObjective:
    """An objective with validated hyper-parameters.

    Args:
        name: a name in `OBJECTIVES`, a loss function of the same form, or an import string of one
            ("module:function", "path.py:function").
        unit: of a user's own loss function: whether it needs "pairs". Built-in ones know theirs.
        hyper: its hyper-parameters; those not given keep the defaults of the signature.

    Raises:
        RecipeError: unknown objective or hyper-parameter (with the nearest right name), a wrong type, a value
            out of range, or a contradiction.
    """
    if callable(name):
        return Objective(getattr(name, "__name__", type(name).__name__), name, unit=unit).bind(**hyper)
    if name not in OBJECTIVES and ":" in name:
        return Objective(name, load_callable(name), unit=unit).bind(**hyper)
    if name not in OBJECTIVES:
        raise RecipeError(f"unknown objective {name!r}{nearest(name, OBJECTIVES)}")
    bound = OBJECTIVES[name].bind(**hyper)
    _rehearse(bound)
    return bound


def _rehearse(bound: BoundObjective) -> None:
    """Call the loss once on a pair of single tokens: contradictions that it refuses show before training."""
    zeros = torch.zeros(2)
    try:
        bound(segments=Segments.from_lengths([1, 1]), logps=zeros, **dict.fromkeys(bound.needs, zeros))
    except ValueError as error:
        raise RecipeError(f"objective {bound.name!r}: {error}") from None
