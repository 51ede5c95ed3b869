"""Objectives by name, with validated hyper-parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

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
from tokengrain.objectives.aligndistil import aligndistil_loss
from tokengrain.objectives.dcpo import dcpo_loss
from tokengrain.objectives.dpo import dpo_loss
from tokengrain.objectives.grpo import grpo_loss
from tokengrain.objectives.gspo import gspo_loss
from tokengrain.objectives.output import LossOutput, Unit
from tokengrain.objectives.ppo import ppo_policy_loss
from tokengrain.objectives.qrm import qrm_loss
from tokengrain.objectives.reinforce import reinforce_loss
from tokengrain.objectives.roles import ROLES
from tokengrain.objectives.rrpo import rrpo_loss, rrpo_reads
from tokengrain.objectives.sepo import sepo_loss, sepo_reads
from tokengrain.objectives.sft import sft_loss
from tokengrain.objectives.simpo import simpo_loss
from tokengrain.objectives.tdpo import tdpo_loss
from tokengrain.objectives.tgdpo import tgdpo_loss
from tokengrain.objectives.treg import treg_loss, treg_simpo_loss

LossFunction = Callable[..., LossOutput]

_OWN_CREDIT = "its credit is the KL divergence that it measures itself"
_ONLINE_CREDIT = "its credit is the advantages of a rollout, made by the credit steps of online training"


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
        main: what stands in the place of logps: the policy's log-probabilities, or a reward model's scores.
        reads: `reads(segments, quantities, hyper) -> bool [N]`: the tokens that the loss looks at; others need
            not be scored. None: all.
        roles: how token credit can enter, names of `tokengrain.objectives.roles`; None: by the quantities that
            the loss takes.
        no_credit: why it takes none, where `roles` is empty.
        unless_zero: quantity -> the hyper-parameter at whose 0 alone the loss can do without it, where the signature
            has it as optional.
    """

    name: str
    loss: LossFunction
    paper: str = ""
    unit: Unit = "pairs"
    fixed: Mapping[str, Any] = field(default_factory=dict)
    main: Literal["logps", "token_scores"] = "logps"
    reads: Callable[[Segments, Mapping[str, Tensor], Mapping[str, Any]], Tensor] | None = None
    roles: tuple[str, ...] | None = None
    no_credit: str = ""
    unless_zero: Mapping[str, str] = field(default_factory=dict)

    @property
    def quantities(self) -> frozenset[str]:
        """Per-token quantities that `loss` accepts, beside logps."""
        return frozenset(k for k, v in keyword_types(self.loss).items() if is_tensor_type(v))

    @property
    def online(self) -> bool:
        """Whether it learns from the advantages of sampled completions."""
        return "advantages" in self.quantities

    @property
    def optional(self) -> frozenset[str]:
        """Quantities that a rollout may bring and `loss` can do without; offline, what is not needed is not read."""
        parameters = inspect.signature(self.loss).parameters
        empty = inspect.Parameter.empty
        return frozenset(q for q in self.quantities if self.online and parameters[q].default is not empty)

    @property
    def accepts(self) -> tuple[str, ...]:
        """The roles in which it takes token credit."""
        if self.roles is not None:
            return self.roles
        own = tuple(name for name, role in ROLES.items() if role.provides in self.quantities)
        return own or (("weight", "selection") if self.unit == "pairs" and self.main == "logps" else ())

    def needs(self, hyper: Mapping[str, Any]) -> frozenset[str]:
        """Quantities that `loss` cannot do without, given its hyper-parameters."""
        parameters = inspect.signature(self.loss).parameters
        required = {q for q in self.quantities if parameters[q].default is inspect.Parameter.empty}
        if "ref_logps" in self.quantities and hyper.get("reference_free") is False:
            required.add("ref_logps")  # optional in the signature only for reference_free=True
        required |= {quantity for quantity, name in self.unless_zero.items() if hyper[name]}
        if self.online and "ref_logps" in self.quantities and hyper.get("beta", 0) > 0:
            required.add("ref_logps")  # its KL term
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
    def main(self) -> str:
        """What the policy (or reward model) is scored for: "logps" or "token_scores"."""
        return self.objective.main

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles in which it takes token credit."""
        return self.objective.accepts

    @property
    def no_credit(self) -> str:
        """Why it takes no token credit, if it takes none."""
        return self.objective.no_credit

    @property
    def needs(self) -> frozenset[str]:
        """Quantities that a call must bring: "ref_logps", "kl", "token_rewards", ... or a user's own names."""
        return self.objective.needs(self.hyper)

    @property
    def online(self) -> bool:
        """Whether it learns from the advantages of sampled completions."""
        return self.objective.online

    @property
    def optional(self) -> frozenset[str]:
        """Quantities that a call may bring beside those that it needs."""
        return self.objective.optional - self.needs

    def reads(self, segments: Segments, quantities: Mapping[str, Tensor]) -> Tensor | None:
        """The tokens that the loss looks at, bool `[N]`, known before anything is scored; None: all."""
        reads = self.objective.reads
        return None if reads is None else reads(segments, quantities, self.hyper)

    def __call__(self, *, segments: Segments, **quantities: Tensor | None) -> LossOutput:
        """Losses of a batch; see the loss function for the quantities, all flat `[N]`. `main` is one of them.

        Raises:
            ValueError: a needed quantity is missing.
            TypeError: a quantity that the loss does not know.
        """
        missing = sorted(q for q in {self.main, *self.needs} if quantities.get(q) is None)
        if missing:
            raise ValueError(f"objective {self.name!r} needs {', '.join(missing)}, got {sorted(quantities)}")
        main = quantities.pop(self.main)
        return self.objective.loss(main, segments, **quantities, **self.hyper)

    def describe(self) -> dict[str, Any]:
        """Name and hyper-parameters, for fingerprints and logs; of a user's own function also its source."""
        built_in = OBJECTIVES.get(self.name) is self.objective
        source = {} if built_in else {"source": fingerprint(source_of(self.objective.loss))}
        return {"name": self.name, **self.hyper, **source}


def _rrpo_reads(segments: Segments, quantities: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> Tensor:
    return rrpo_reads(segments, spans=quantities["spans"], alpha=hyper["alpha"])


def _sepo_reads(segments: Segments, quantities: Mapping[str, Tensor], hyper: Mapping[str, Any]) -> Tensor:
    return sepo_reads(segments, selected=quantities["selected"])


OBJECTIVES: dict[str, Objective] = {
    o.name: o
    for o in (
        Objective("dpo", dpo_loss, "2305.18290"),
        Objective("simpo", simpo_loss, "2405.14734"),
        Objective("tdpo", tdpo_loss, "2404.11999", roles=(), no_credit=_OWN_CREDIT),
        Objective("tdpo1", tdpo_loss, "2404.11999", fixed={"variant": "tdpo1"}, roles=(), no_credit=_OWN_CREDIT),
        Objective("tdpo2", tdpo_loss, "2404.11999", fixed={"variant": "tdpo2"}, roles=(), no_credit=_OWN_CREDIT),
        Objective("tgdpo", tgdpo_loss, "2506.14574"),
        Objective("treg", treg_loss, "2412.02685"),
        Objective("treg_simpo", treg_simpo_loss, "2412.02685"),
        Objective("rrpo", rrpo_loss, "2504.12083", reads=_rrpo_reads, unless_zero={"kl": "alpha"}),
        Objective("sepo", sepo_loss, "2408.13518", reads=_sepo_reads),
        Objective(
            "aligndistil",
            aligndistil_loss,
            "2503.02832",
            unit="completions",
            roles=(),
            no_credit="its credit is the difference of its two teachers",
        ),
        Objective(
            "qrm",
            qrm_loss,
            "2505.23363",
            main="token_scores",
            roles=(),
            no_credit="it trains a reward model, which is a credit source (reward_model) afterwards",
        ),
        Objective("grpo", grpo_loss, "2402.03300", unit="completions", roles=(), no_credit=_ONLINE_CREDIT),
        Objective("gspo", gspo_loss, "2507.18071", unit="completions", roles=(), no_credit=_ONLINE_CREDIT),
        Objective("dcpo", dcpo_loss, "2509.02333", unit="completions", roles=(), no_credit=_ONLINE_CREDIT),
        Objective("ppo", ppo_policy_loss, "1707.06347", unit="completions", roles=(), no_credit=_ONLINE_CREDIT),
        Objective("reinforce", reinforce_loss, unit="completions", roles=(), no_credit=_ONLINE_CREDIT),
        Objective("sft", sft_loss, unit="completions", roles=(), no_credit="it learns from every token of its data"),
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
        bound(segments=Segments.from_lengths([1, 1]), **dict.fromkeys({bound.main, *bound.needs}, zeros))
    except ValueError as error:
        raise RecipeError(f"objective {bound.name!r}: {error}") from None
