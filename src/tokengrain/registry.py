"""Objectives by name, with validated hyper-parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.errors import RecipeError, fingerprint, shown
from tokengrain.loss import ROLES, LossOutput, Role, SelectionRole, Unit, make_role
from tokengrain.method import NEEDS, PHASES, CreditSource, CreditStep
from tokengrain.methods.aligndistil import ContrastiveDPO, aligndistil_loss
from tokengrain.methods.baselines import ColumnCredit, Entropy, FunctionCredit, RandomCredit, Surprise, Transformed
from tokengrain.methods.dcpo import dcpo_loss
from tokengrain.methods.dpo import dpo_loss, sft_loss
from tokengrain.methods.grpo import grpo_loss
from tokengrain.methods.gspo import gspo_loss
from tokengrain.methods.ppo import ppo_policy_loss, reinforce_loss
from tokengrain.methods.qrm import RewardModelCredit, qrm_loss
from tokengrain.methods.rrpo import SpanCredit, rrpo_loss, rrpo_reads
from tokengrain.methods.sepo import sepo_loss, sepo_reads
from tokengrain.methods.simpo import simpo_loss
from tokengrain.methods.tdpo import TDPOAdvantage, tdpo_loss
from tokengrain.methods.tgdpo import GuideLogRatio, tgdpo_loss
from tokengrain.methods.treg import ContrastivePrompting, make_templates, treg_loss, treg_simpo_loss
from tokengrain.settings import (
    is_tensor_type,
    keyword_types,
    load_callable,
    load_named,
    nearest,
    source_of,
    validate_settings,
)

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


# ----------------------------------------------------------------------------------------------------
# The methods: each is a credit source with an objective, published somewhere, with a recipe that runs it.


@dataclass(frozen=True)
class Method:
    """One published method.

    Attributes:
        name: its name in recipes (`method:`) and on the command line.
        title: what it is called in tables and reports.
        paper: where it was published, in short.
        paper_title: the paper's title.
        arxiv: arXiv id.
        venue: conference and year.
        credit: what says which tokens earned the reward, in words.
        objective: name of the objective, a key of `tokengrain.objectives.OBJECTIVES`.
        trains: what is trained, and on what.
        recipe: path of the recipe, from the project's root.
        page: path of the documentation page, from the project's root.
    """

    name: str
    title: str
    paper: str
    paper_title: str
    arxiv: str
    venue: str
    credit: str
    objective: str
    trains: str
    recipe: str
    page: str


def _method(
    name: str,
    title: str,
    paper_title: str,
    arxiv: str,
    venue: str,
    credit: str,
    trains: str,
    page: str,
    objective: str | None = None,
) -> Method:
    return Method(
        name=name,
        title=title,
        paper=f"arXiv {arxiv}, {venue}",
        paper_title=paper_title,
        arxiv=arxiv,
        venue=venue,
        credit=credit,
        objective=name if objective is None else objective,
        trains=trains,
        recipe=f"recipes/{name}.yaml",
        page=f"docs/methods/{page}.md",
    )


_POLICY = "policy, offline pairs"
_TDPO = ("Token-level Direct Preference Optimization", "2404.11999", "ICML 2024")
_TREG = ("T-REG: Preference Optimization with Token-Level Reward Regularization", "2412.02685", "ACL 2025")
_CONTRAST = "contrastive prompting of the model itself"
_ALIGNDISTIL = (
    "AlignDistil: Token-Level Language Model Alignment as Adaptive Policy Distillation",
    "2503.02832",
    "ACL 2025",
)
_CONTRAST_MODELS = "a DPO model against a reverse DPO model, whole vocabulary"
_QRM = ("Discriminative Policy Optimization for Token-Level Reward Models", "2505.23363", "ICML 2025")
_ONLINE = "policy, online"

METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        _method(
            "dpo",
            "DPO",
            "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
            "2305.18290",
            "NeurIPS 2023",
            "none (every token alike)",
            _POLICY,
            "dpo",
        ),
        _method(
            "simpo",
            "SimPO",
            "SimPO: Simple Preference Optimization with a Reference-Free Reward",
            "2405.14734",
            "NeurIPS 2024",
            "none (every token alike)",
            _POLICY,
            "simpo",
        ),
        _method("tdpo1", "TDPO1", *_TDPO, "forward KL per token, whole vocabulary", _POLICY, "tdpo"),
        _method("tdpo2", "TDPO2", *_TDPO, "forward KL per token, whole vocabulary", _POLICY, "tdpo"),
        _method(
            "tgdpo",
            "TGDPO",
            "TGDPO: Harnessing Token-Level Reward Guidance for Enhancing Direct Preference Optimization",
            "2506.14574",
            "ICML 2025",
            "log-ratio of a DPO- or SimPO-trained guide",
            "guide, then policy, offline pairs",
            "tgdpo",
        ),
        _method("treg", "T-REG (DPO)", *_TREG, _CONTRAST, _POLICY, "treg"),
        _method("treg_simpo", "T-REG (SimPO)", *_TREG, _CONTRAST, _POLICY, "treg"),
        _method(
            "rrpo",
            "RRPO",
            "Self-alignment of Large Video Language Models with Refined Regularized Preference Optimization",
            "2504.12083",
            "NeurIPS 2025",
            "spans in which chosen and rejected differ",
            _POLICY,
            "rrpo",
        ),
        _method(
            "sepo",
            "SePO",
            "Selective Preference Optimization via Token-Level Reward Function Estimation",
            "2408.13518",
            "EMNLP 2025",
            "log-ratio of a DPO-trained oracle; its best and worst tokens are selected",
            "oracle, then policy, offline pairs",
            "sepo",
        ),
        _method(
            "aligndistil",
            "AlignDistil",
            *_ALIGNDISTIL,
            _CONTRAST_MODELS,
            "two teachers, then policy, offline pairs",
            "aligndistil",
        ),
        _method(
            "qrm",
            "Q-RM",
            *_QRM,
            "none while training; the reward model then is a credit source",
            "token-level reward model, offline pairs",
            "qrm",
        ),
        _method(
            "ppo",
            "PPO",
            "Proximal Policy Optimization Algorithms",
            "1707.06347",
            "2017",
            "advantage estimation with a critic",
            "policy and critic, online",
            "rto",
        ),
        _method(
            "rto",
            "RTO",
            "DPO Meets PPO: Reinforced Token Optimization for RLHF",
            "2404.18922",
            "ICML 2025",
            "log-ratio of a DPO-trained guide, through a critic",
            "guide on pairs, then policy and critic, online",
            "rto",
            "ppo",
        ),
        _method(
            "qrm_reinforce",
            "Q-RM (REINFORCE)",
            *_QRM,
            "scores of a token-level reward model",
            "reward model on pairs, then policy, online",
            "qrm",
            "reinforce",
        ),
        _method(
            "aligndistil_online",
            "AlignDistil (on-policy)",
            *_ALIGNDISTIL,
            _CONTRAST_MODELS,
            "two teachers on pairs, then policy, online",
            "aligndistil",
            "aligndistil",
        ),
        _method(
            "grpo",
            "GRPO",
            "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
            "2402.03300",
            "2024",
            "the group's mean (every token of a completion alike)",
            _ONLINE,
            "grpo",
        ),
        _method(
            "drgrpo",
            "Dr. GRPO",
            "Understanding R1-Zero-Like Training: A Critical Perspective",
            "2503.20783",
            "COLM 2025",
            "the group's mean (every token of a completion alike)",
            _ONLINE,
            "grpo",
            "grpo",
        ),
        _method(
            "dapo",
            "DAPO",
            "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
            "2503.14476",
            "2025",
            "the group's mean, of groups that differ; length penalty",
            _ONLINE,
            "dapo",
            "grpo",
        ),
        _method(
            "gspo",
            "GSPO",
            "Group Sequence Policy Optimization",
            "2507.18071",
            "2025",
            "the group's mean (every token of a completion alike)",
            _ONLINE,
            "gspo",
        ),
        _method(
            "dcpo",
            "DCPO",
            "DCPO: Dynamic Clipping Policy Optimization",
            "2509.02333",
            "2025",
            "all rewards that the prompt has had so far",
            _ONLINE,
            "dcpo",
        ),
        _method(
            "thr",
            "THR",
            "Token Hidden Reward: Steering Exploration-Exploitation in Group Relative Deep Reinforcement Learning",
            "2510.03669",
            "ICLR 2026",
            "influence of a token on the group's correct completions",
            _ONLINE,
            "thr",
            "grpo",
        ),
        _method(
            "aepo",
            "AEPO (ARES)",
            "ARES: Multimodal Adaptive Reasoning via Difficulty-Aware Token-Level Entropy Shaping",
            "2510.08457",
            "ICLR 2026",
            "uncertain tokens, by the prompt's difficulty",
            _ONLINE,
            "aepo",
            "grpo",
        ),
        _method(
            "dro",
            "DRO",
            "Direct Reasoning Optimization: LLMs Can Reward And Refine Their Own Reasoning for Open-Ended Tasks",
            "2506.13351",
            "2025",
            "likelihood of the reference's tokens that depend on the reasoning",
            _ONLINE,
            "dro",
            "grpo",
        ),
    )
}


# ----------------------------------------------------------------------------------------------------
# Credit sources by name.

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


# ----------------------------------------------------------------------------------------------------
# Which credit source goes with which objective, in which role: computed from the code that refuses the others.

HIDDEN = ("tdpo",)  # what `tdpo1` and `tdpo2` are variants of


def objectives() -> dict[str, Objective]:
    """The offline objectives: those that the table has a column for, or a reason why not."""
    return {name: o for name, o in OBJECTIVES.items() if name not in HIDDEN and not o.online}


def roles_for(credit: str, objective: str) -> dict[str, str]:
    """Role by role: "" if the objective takes this credit so, else the reason why it is refused."""
    return {name: why_not(CREDIT[credit].values, make_role(name).uses) for name in OBJECTIVES[objective].accepts}


def cell(credit: str, objective: str) -> str:
    """The roles in which an objective takes a credit source; "(above: 0)" where only a threshold makes sense."""
    found = []
    for role, reason in roles_for(credit, objective).items():
        if not reason:
            found.append(role)
        elif issubclass(ROLES[role], SelectionRole):
            by_threshold = make_role(role, above=0.0)
            found += [] if why_not(CREDIT[credit].values, by_threshold.uses) else [f"{role} (above: 0)"]
    return ", ".join(found) or "–"


def markdown() -> str:
    """The table and the reasons, as a page of the documentation."""
    columns = [name for name, objective in objectives().items() if objective.accepts]
    lines = [
        "# Any credit with any objective",
        "",
        "<!-- Written by `tokengrain methods --matrix --markdown`; a test compares it with the code. -->",
        "",
        "Rows are credit sources (`credit: {name: ...}`), columns are objectives, and a cell says how the credit can "
        "enter (`as: ...`; where there is one way only it need not be said). `tokengrain methods --matrix` prints the "
        "same table.",
        "",
        "| credit | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for name in CREDIT:
        lines.append(f"| `{name}` | " + " | ".join(cell(name, objective) for objective in columns) + " |")
    lines += [
        "",
        "- **reward**: the objective has a token reward in its formula.",
        "- **weight**: each token's log-ratio is multiplied by 1 + αr (chosen) or 1 − αr (rejected). Settings: "
        "`alpha`, `clamp_min`, `normalise`.",
        "- **selection**: only the best tokens of chosen and the worst of rejected completions are scored and trained. "
        "Settings: `share` (or `chosen`, `rejected`), or `above` for a threshold.",
        "- **span**: the same tokens, as spans. Settings: those of selection.",
        "",
        "## What is refused, and why",
        "",
    ]
    lines += [f"- `{name}` takes no credit: {o.no_credit}." for name, o in objectives().items() if not o.accepts]
    reasons: dict[str, list[str]] = {}
    for credit in CREDIT:
        for objective in columns:
            for role, reason in roles_for(credit, objective).items():
                if reason:
                    reasons.setdefault(reason, []).append(f"`{credit}` as {role}")
    lines += [f"- {', '.join(dict.fromkeys(who))}: {reason}." for reason, who in reasons.items()]
    lines += [
        "",
        "What the sources are:",
        "",
        *(f"- `{name}`: {kind.what}" for name, kind in CREDIT.items()),
        "",
    ]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------
# Credit steps by name.


ONLINE_CREDIT: dict[str, str] = {
    "filter_groups": "tokengrain.methods.grpo:FilterGroups",
    "overlong": "tokengrain.methods.token_rewards:Overlong",
    "token_rewards": "tokengrain.methods.token_rewards:TokenRewards",
    "group": "tokengrain.methods.grpo:GroupAdvantages",
    "broadcast": "tokengrain.methods.grpo:Broadcast",
    "importance": "tokengrain.methods.grpo:StepsGroupImportance",
    "mask_truncated": "tokengrain.methods.grpo:MaskTruncated",
    "gae": "tokengrain.methods.ppo:GAE",
    "reinforce": "tokengrain.methods.ppo:Reinforce",
    "normalize": "tokengrain.methods.ppo:Normalize",
    "kl_penalty": "tokengrain.methods.ppo:KLPenalty",
    "rto": "tokengrain.methods.rto:RTO",
    "dcpo": "tokengrain.methods.dcpo:DCPOAdvantages",
    "thr": "tokengrain.methods.thr:THR",
    "nthr": "tokengrain.methods.thr:NTHR",
    "aepo": "tokengrain.methods.aepo:AEPO",
    "r3": "tokengrain.methods.dro:R3Rewards",
}
"""Name of a step: where its class is."""

# Objects that a recipe's runner supplies; every other keyword-only argument of a constructor is a setting.
REGISTRY_OBJECTS = ("model", "reference", "reverse", "tokenizer", "reward_tokenizer", "critic", "source")


def step_class(name: str) -> Callable[..., Any]:
    """The class of a step: a name in `ONLINE_CREDIT`, or an import string, "module:Class" or "path.py:Class".

    Raises:
        RecipeError: unknown name (with the nearest right one), or an import string that leads nowhere.
    """
    return load_named(name, ONLINE_CREDIT, "online credit")


def step_objects(name: str) -> frozenset[str]:
    """Which of `OBJECTS` a step's constructor takes."""
    return frozenset(REGISTRY_OBJECTS) & frozenset(inspect.signature(step_class(name)).parameters)


def check_step(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Validate a recipe's settings of a step before anything is loaded.

    Returns:
        All settings, defaults included, without the objects.

    Raises:
        RecipeError: unknown step or setting (with the nearest right name), a wrong type, a value out of range; of ours
            that take no objects also what the constructor refuses.
    """
    build = step_class(name)
    checked = validate_settings(f"credit {name!r}", build, settings, excluded=REGISTRY_OBJECTS)
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
    objects = {k: v for k, v in arguments.items() if k in REGISTRY_OBJECTS}
    settings = check_step(name, {k: v for k, v in arguments.items() if k not in REGISTRY_OBJECTS})
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


FROZEN = frozenset({"ref_logps", "kl"})
TAUGHT = frozenset({"teacher_kl", "teacher_alpha", "teacher_reward", "tvd"})


def check_source_for_role(source: Any, role: Role) -> None:
    """Refuse a source whose values do not mean what the role uses.

    Raises:
        RecipeError: with the reason and what to do instead.
    """
    reason = why_not(getattr(source, "values", "any"), role.uses)
    if reason:
        raise RecipeError(f"credit {source.name!r} as {role.name}: {reason}")


def check_together(objective: BoundObjective, role: Role | None, teacher: Any) -> None:
    """Refuse what cannot be combined.

    Args:
        role: how credit enters the objective, if it does.
        teacher: what it distils from, or its description in a recipe.

    Raises:
        RecipeError: with the reason.
    """
    taught = bool(TAUGHT & set(objective.needs))
    if taught and teacher is None:
        raise RecipeError(f"objective {objective.name} needs a teacher, got none")
    if teacher is not None and not taught:
        raise RecipeError(f"objective {objective.name} does not distil; teacher must be None")
    if role is not None and role.name == "selection" and objective.hyper.get("sft_weight"):
        raise RecipeError(
            f"objective {objective.name}: sft_weight is about all chosen tokens, and only selected ones are scored; "
            "set sft_weight: 0"
        )
