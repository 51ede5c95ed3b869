"""The contract. A method is at most three functions and a card; this file gives them names and finds them.

    @objective         (logps [N], segments, *, <Tensor quantities>, <settings>) -> LossOutput
    @credit            (batch, *, <objects>, <settings>) -> [N]
    @rollout_credit    (rollout, *, <objects>, <settings>): changes its rewards, token_rewards, advantages or weights

Keyword-only arguments annotated `Tensor` are quantities that the trainer computes; those named in `OBJECTS` are models
and tokenizers that the recipe names; all others are settings, checked against their annotation. A class works in place
of a function: its constructor takes the objects and settings, its `__call__` the rest.

Methods are found by being there: files in `methods/`, modules that installed packages name in the entry-point group
`tokengrain.methods`, and a user's own by an import string, "my.py:loss".
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from typing import Any, Literal, Protocol, TypeVar, cast, get_args, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from tokengrain.batch import Segments, TokenBatch, row_of
from tokengrain.data.tokens import tokenizer_fingerprint
from tokengrain.errors import DataError, RecipeError, RunError, fingerprint, require, shown
from tokengrain.loss import ROLES, LossOutput, Role, Unit
from tokengrain.scoring.head import Head
from tokengrain.scoring.reference import scorer_fingerprint
from tokengrain.settings import (
    Number,
    Positive,
    is_tensor_type,
    keyword_types,
    load_callable,
    nearest,
    source_of,
    validate_settings,
)

OBJECTS = ("model", "reference", "reverse", "tokenizer", "reward_tokenizer", "critic", "source")
"""Arguments that a recipe's runner supplies; every other keyword-only argument is a setting."""

FROZEN = frozenset({"ref_logps", "kl"})  # quantities that the reference gives
TAUGHT = frozenset({"teacher_kl", "teacher_alpha", "teacher_reward", "tvd"})  # quantities that a teacher gives
NEEDS = frozenset({"ref_logps", "entropy", "hidden", "values"})
"""What a rollout credit can ask for, beside `old_logps`, which are always there once a rollout is scored."""

Values = Literal["signed", "order", "marks", "importance", "any"]
Phase = Literal["filter", "rewards", "advantages", "after"]
PHASES: tuple[Phase, ...] = get_args(Phase)

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
Settings = Mapping[str, Any]
Names = Collection[str] | Callable[[Settings], Collection[str]]
"""Names, or a function of the settings that gives them."""


@dataclass(frozen=True)
class Card:
    """What the tables say about a published method. README, docs and `tokengrain methods` are written from it."""

    name: str  # in recipes (`method:`) and on the command line
    title: str  # in tables and reports
    idea: str  # in about five words
    paper_title: str
    arxiv: str
    venue: str
    trains: str = "policy, offline pairs"  # what is trained, and on what
    credit: str = "none (every token alike)"  # what says which tokens earned the reward, in words
    objective: str = ""  # name of its objective; "": its own name
    page: str = ""  # path of its documentation from the project's root, or the page's name alone; "": its own name
    recipe: str = field(init=False)
    paper: str = field(init=False)

    def __post_init__(self) -> None:
        page = self.page or self.name
        object.__setattr__(self, "objective", self.objective or self.name)
        object.__setattr__(self, "recipe", f"recipes/{self.name}.yaml")
        object.__setattr__(self, "page", page if "/" in page else f"docs/methods/{page}.md")
        object.__setattr__(self, "paper", f"arXiv {self.arxiv}, {self.venue}")


# ----------------------------------------------------------------------------------------------------
# The decorators.


def objective(name: str, **about: Any) -> Callable[[F], F]:
    """Register a loss function; `about` are attributes of `Objective`: unit, reads, roles, ..."""
    return OBJECTIVES.register(name, **about)


def credit(name: str, *, values: Values | Callable[[Settings], Values] = "any", **about: Any) -> Callable[[F], F]:
    """Register a credit source; `about` are attributes of `CreditKind`: column, reward_model, check, ..."""
    return CREDIT.register(name, meaning=values, **about)


def rollout_credit(name: str, **about: Any) -> Callable[[F], F]:
    """Register a rollout credit; `about` are attributes of `RolloutCreditKind`: phase, needs, ..."""
    return ROLLOUT_CREDIT.register(name, **about)


# ----------------------------------------------------------------------------------------------------
# The registry: one look-up for every kind of name.


class Registry(Mapping[str, T]):
    """What is registered under a name, in order of names or of `order`; the first look-up loads the methods.

    `what` the names are of, for messages; `make(name, function, **about)` makes an entry, if they are of functions.
    """

    def __init__(self, what: str, make: Any = None, order: Callable[[T], Any] | None = None) -> None:
        self.what, self._make, self._order = what, make, order
        self._entries: dict[str, T] = {}
        self._homes: dict[str, tuple[str, str]] = {}

    def register(self, name: str, **about: Any) -> Callable[[F], F]:
        """A decorator; a class gets the attributes of its part that it lacks."""

        def decorate(function: F) -> F:
            entry = self._make(name, function, **about)
            for attribute, value in entry.of_class().items() if inspect.isclass(function) else ():
                if not hasattr(function, attribute):
                    setattr(function, attribute, value)
            self.add(name, entry, function)
            return function

        return decorate

    def add(self, name: str, entry: T, home: Any) -> None:
        """Register `entry` of `home`, a function, class or module; one that is run again replaces its own entry."""
        place = (getattr(home, "__module__", home.__name__), getattr(home, "__qualname__", ""))
        if self._homes.setdefault(name, place) != place:
            modules = " and by ".join(dict.fromkeys((self._homes[name][0], place[0])))
            raise RecipeError(f"{self.what} {name!r} is registered twice, by {modules}; rename one of them")
        self._entries[name] = entry

    def find(self, name: Any) -> T:
        """The entry of a name, of a registered function, or of a user's own function or its import string."""
        function = name
        if isinstance(name, str):
            if name in self:
                return self._entries[name]
            if self._make is None or ":" not in name:
                broken = "".join(f"; {module} could not be imported: {why}" for module, why in BROKEN.items())
                raise RecipeError(f"unknown {self.what} {name!r}{self._value_of(name) or nearest(name, self)}{broken}")
            function = load_callable(name)
        for entry in self._entries.values():
            part: Any = entry
            if part.function is function and not getattr(part, "fixed", None):
                return replace(part, name=name) if isinstance(name, str) else entry
        made: T = self._make(name if isinstance(name, str) else _name_of(function), function)
        return made

    def _value_of(self, name: str) -> str | None:
        """Of a name that is a value of an entry's setting, what to write: `ipo` is a `loss_type` of dpo."""
        for known in self:
            function = getattr(self._entries[known], "function", None)
            for setting, kind in keyword_types(function).items() if callable(function) else ():
                if name in get_args(kind):
                    return f"; it is a {setting} of {known}: {{name: {known}, {setting}: {name}}}"
        return None

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            load_methods()
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        load_methods()
        key = self._order
        return iter(sorted(self._entries, key=(lambda n: (key(self._entries[n]), n)) if key is not None else None))

    def __len__(self) -> int:
        load_methods()
        return len(self._entries)


def _name_of(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


BROKEN: dict[str, str] = {}  # modules of methods that could not be imported, and why
_state = {"loaded": False}


def load_methods() -> None:
    """Import `methods/` and the modules of installed packages, once; one that fails is left out, with a warning."""
    if _state["loaded"]:
        return
    _state["loaded"] = True
    files = pkgutil.iter_modules(importlib.import_module("tokengrain.methods").__path__, "tokengrain.methods.")
    names = [file.name for file in files if not file.name.rpartition(".")[2].startswith("_")]
    for module in [*names, *(entry.module for entry in entry_points(group="tokengrain.methods"))]:
        try:
            found = importlib.import_module(module)
            for card in vars(found).values():
                if isinstance(card, Card):
                    METHODS.add(card.name, card, found)
        except Exception as error:
            BROKEN[module] = f"{type(error).__name__}: {error}"
            warnings.warn(f"methods of {module} are left out: {BROKEN[module]}", stacklevel=3)


@dataclass(frozen=True)
class Part:
    """A function of a method, or a class whose constructor takes the settings, under its name in recipes."""

    name: str
    function: Callable[..., Any]

    @property
    def own(self) -> bool:
        """Whether it is a user's or another package's, so that its source counts in fingerprints."""
        return not (getattr(self.function, "__module__", None) or "").startswith("tokengrain.")  # None of exec's

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").partition("\n")[0].rstrip(".")

    def of_class(self) -> dict[str, Any]:
        """What a class that is registered gets as attributes, unless it has its own."""
        return {}

    def source(self) -> dict[str, str]:
        """What fingerprints must know beside the settings."""
        return {"source": fingerprint(source_of(self.function))} if self.own else {}


# ----------------------------------------------------------------------------------------------------
# Objectives.


@dataclass(frozen=True)
class Objective(Part):
    """A loss function with what a trainer must know about it."""

    unit: Unit = "pairs"  # if every prompt must have a chosen and a rejected completion, else "completions"
    main: Literal["logps", "token_scores"] = "logps"  # its first argument: of the policy, or a reward model's scores
    # `reads(segments, quantities, hyper) -> bool [N]`: the tokens that the loss looks at; only these must be scored.
    reads: Callable[[Segments, Mapping[str, Tensor], Settings], Tensor] | None = None  # None: all
    roles: tuple[str, ...] | None = None  # how token credit can enter, of `ROLES`; None: by the loss's quantities
    no_credit: str = ""  # why it takes none, where `roles` is empty
    unless_zero: Mapping[str, str] = field(default_factory=dict)  # quantity -> hyper-parameter that needs it unless 0
    fixed: Settings = field(default_factory=dict)  # that the name itself fixes: `tdpo1` is `tdpo` with variant="tdpo1"
    teacher: Callable[..., Any] | None = None  # makes what it distils from: `teacher(*, target, contrast, <settings>)`

    @property
    def quantities(self) -> frozenset[str]:
        """Per-token quantities that the loss accepts, beside logps."""
        return frozenset(k for k, v in keyword_types(self.function).items() if is_tensor_type(v))

    @property
    def online(self) -> bool:
        """Whether it learns from the advantages of sampled completions."""
        return "advantages" in self.quantities

    @property
    def takes_no_credit(self) -> str:
        if self.no_credit or not self.online:
            return self.no_credit
        return "its credit is the advantages of a rollout, made by rollout credits"

    @property
    def accepts(self) -> tuple[str, ...]:
        """The roles in which it takes token credit."""
        if self.roles is not None or self.online:
            return self.roles or ()
        own = tuple(name for name, role in ROLES.items() if role.implied and role.provides in self.quantities)
        return own or (("weight", "selection") if self.unit == "pairs" and self.main == "logps" else ())

    def needs(self, hyper: Mapping[str, Any]) -> frozenset[str]:
        """Quantities that the loss cannot do without, given its hyper-parameters."""
        required = self.quantities & required_arguments(self.function)
        required |= {quantity for quantity, name in self.unless_zero.items() if hyper[name]}
        # In the signature it may be optional, for reference_free=True or a KL term of weight 0.
        refers = hyper.get("reference_free") is False or (self.online and hyper.get("beta", 0) > 0)
        return required | (self.quantities & {"ref_logps"} if refers else frozenset())

    def bind(self, **hyper: Any) -> BoundObjective:
        what = f"objective {self.name!r}"
        for name, value in self.fixed.items():
            if hyper.get(name, value) != value:
                raise RecipeError(f"{what}: {name} = {hyper[name]!r}, but the name means {value!r}")
        settings = validate_settings(what, self.function, {**hyper, **self.fixed}, excluded=self.quantities)
        return BoundObjective(self, settings)


@dataclass(frozen=True)
class BoundObjective:
    """An objective with its hyper-parameters: `bound(segments=..., logps=..., ...) -> LossOutput`."""

    objective: Objective
    hyper: dict[str, Any]

    name = property(lambda self: self.objective.name)
    unit = property(lambda self: self.objective.unit)
    main = property(lambda self: self.objective.main)
    online = property(lambda self: self.objective.online)
    roles = property(lambda self: self.objective.accepts)
    no_credit = property(lambda self: self.objective.takes_no_credit)

    @property
    def needs(self) -> frozenset[str]:
        """Quantities that a call must bring: "ref_logps", "kl", "token_rewards", ... or a user's own names."""
        return self.objective.needs(self.hyper)

    @property
    def optional(self) -> frozenset[str]:
        """Quantities that a rollout may bring beside those; offline, what is not needed is not read."""
        return self.objective.quantities - self.needs if self.online else frozenset()

    def reads(self, segments: Segments, quantities: Mapping[str, Tensor]) -> Tensor | None:
        """The tokens that the loss looks at, bool `[N]`, known before anything is scored; None: all."""
        reads = self.objective.reads
        return None if reads is None else reads(segments, quantities, self.hyper)

    def __call__(self, *, segments: Segments, **quantities: Tensor | None) -> LossOutput:
        """Losses of a batch, from flat quantities `[N]`, `main` one of them; ValueError if one is missing."""
        missing = sorted(q for q in {self.main, *self.needs} if quantities.get(q) is None)
        if missing:
            raise ValueError(f"objective {self.name!r} needs {', '.join(missing)}, got {sorted(quantities)}")
        main = quantities.pop(self.main)
        output: LossOutput = self.objective.function(main, segments, **quantities, **self.hyper)
        return output

    def describe(self) -> dict[str, Any]:
        """Name and hyper-parameters, for fingerprints and logs; of a user's own function also its source."""
        return {"name": self.name, **self.hyper, **self.objective.source()}


def make_objective(name: str | Callable[..., LossOutput], *, unit: Unit = "pairs", **hyper: Any) -> BoundObjective:
    """An objective with validated hyper-parameters.

    Args:
        name: a name in `OBJECTIVES`, a loss function of the same form, or an import string of one
            ("module:function", "path.py:function").
        unit: of a user's loss function without the decorator: whether it needs "pairs".
        hyper: its hyper-parameters; those not given keep the defaults of the signature.

    Raises:
        RecipeError: an unknown name (with the nearest right one), a wrong type, a value out of range, a contradiction.
    """
    found = OBJECTIVES.find(name)
    registered = any(part.function is found.function for part in OBJECTIVES.values())
    bound = (found if registered else replace(found, unit=unit)).bind(**hyper)
    if not found.own:  # called once on a pair of single tokens: contradictions show before training
        quantities: Any = dict.fromkeys({bound.main, *bound.needs}, torch.zeros(2))
        try:
            bound(segments=Segments.from_lengths([1, 1]), **quantities)
        except ValueError as error:
            raise RecipeError(f"objective {bound.name!r}: {error}") from None
    return bound


def required_arguments(function: Callable[..., Any]) -> frozenset[str]:
    """The arguments of a function, or of a class, that have no default."""
    parameters = inspect.signature(function).parameters
    return frozenset(name for name, p in parameters.items() if p.default is inspect.Parameter.empty)


# ----------------------------------------------------------------------------------------------------
# Credit: one number per counted token of a batch.


@runtime_checkable
class CreditSource(Protocol):
    """Turns a batch into one number per counted completion token.

    An attribute `values` may say what they mean: "signed" (sign and size, around 0), "order" (only their order within
    a completion), "marks" (0 but at marked tokens), "importance" (how much a token matters, at least 0, good or bad) or
    "any" (up to the user; the default).
    """

    name: str

    def __call__(self, batch: TokenBatch) -> Tensor: ...  # [N], float, without gradient

    def fingerprint(self) -> str: ...  # of its settings and the weights of the models it asks


@dataclass(frozen=True)
class _Settable(Part):
    """A part that takes objects and settings; `check` gets all settings and raises what types alone cannot say."""

    check: Callable[[Settings], Any] | None = None

    @property
    def objects(self) -> frozenset[str]:
        return frozenset(OBJECTS) & frozenset(inspect.signature(self.function).parameters)

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All settings, checked, defaults included, before anything is loaded."""
        checked = validate_settings(f"credit {self.name!r}", self.function, given, excluded=OBJECTS)
        if self.check is not None:
            self.check(checked)
        return checked

    def arguments(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(objects, settings) of what was given together, checked."""
        objects = {k: v for k, v in given.items() if k in OBJECTS}
        settings = self.settings({k: v for k, v in given.items() if k not in OBJECTS})
        extra = sorted(set(objects) - self.objects)
        require(not extra, RecipeError, f"credit {self.name!r} takes no {', '.join(extra)}")
        missing = sorted(o for o in self.objects & required_arguments(self.function) if objects.get(o) is None)
        require(not missing, RecipeError, f"credit {self.name!r} needs {', '.join(missing)}")
        return objects, settings

    def _of(self, given: Any, settings: Mapping[str, Any]) -> Any:
        """What a registration says, if need be as a function of the settings and defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        return given({**defaults, **settings}) if callable(given) else given


@dataclass(frozen=True)
class CreditKind(_Settable):
    """A kind of credit source: `credit(batch, *, <objects>, <settings>) -> [N]`."""

    meaning: Values | Callable[[Settings], Values] = "any"  # of its numbers, see `CreditSource`
    column: str | Callable[[Settings], str] = ""  # that of the data that it reads
    reward_model: bool = False  # its model is a token-level reward model, not a language model
    judges_itself: bool = False  # its model is the one that training starts from, unless another is named
    code: tuple[str, ...] = ()  # settings that are import strings of code, whose source counts in fingerprints
    patches: Literal["gradient", "without"] | None = None  # it rates pictures too: how (`report.pictures.patch_credit`)

    values = property(lambda self: self.values_with({}))

    def of_class(self) -> dict[str, Any]:
        return {"name": self.name, "values": self.values}

    def values_with(self, settings: Mapping[str, Any]) -> str:
        return str(self._of(self.meaning, settings))

    def column_with(self, settings: Mapping[str, Any]) -> str:
        return str(self._of(self.column, settings))

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """As for every part; `scale` and `clip` are settings of every source."""
        shared = {k: v for k, v in given.items() if k in keyword_types(Transformed)}
        checked = super().settings({k: v for k, v in given.items() if k not in shared})
        return checked | validate_settings(f"credit {self.name!r}", Transformed, shared)

    def describe(self, given: Mapping[str, Any]) -> dict[str, Any]:
        code = {f"{key}_source": fingerprint(source_of(load_callable(given[key]))) for key in self.code if key in given}
        return {"name": self.name, **self.settings(given), **self.source(), **code}

    def make(self, **given: Any) -> CreditSource:
        objects, settings = self.arguments(given)
        shared = {k: settings.pop(k) for k in keyword_types(Transformed)}
        own = inspect.isclass(self.function)
        source: Any = self.function(**objects, **settings) if own else BoundCredit(self, objects, settings)
        return cast(CreditSource, source) if shared == {"scale": 1.0, "clip": None} else Transformed(source, **shared)


class BoundCredit:
    """A credit function with its settings, and its models as attributes."""

    def __init__(self, kind: CreditKind, objects: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        self.kind, self.settings, self._objects = kind, dict(settings), tuple(objects)
        vars(self).update(objects)
        self.name = f"function {_name_of(kind.function)}" if kind.own else kind.name
        self.values = kind.values_with(settings)
        self.column, self.own_vocabulary = kind.column_with(settings) or None, kind.reward_model
        self._source = kind.source()  # as it is now: the file may change

    def __call__(self, batch: TokenBatch) -> Tensor:
        objects = {name: getattr(self, name) for name in self._objects}
        return checked_credit(self.kind.function(batch, **objects, **self.settings), batch, self.name)

    def fingerprint(self) -> str:
        def of(thing: Any) -> str:
            return tokenizer_fingerprint(thing) if hasattr(thing, "get_vocab") else scorer_fingerprint(thing)

        objects = {name: of(getattr(self, name)) for name in self._objects}
        return fingerprint([self.name, self.settings, objects, self._source])


class Transformed:
    """Another source's credit, times `scale`, then clipped to +-`clip`; `scale=-1` is the control that must do harm."""

    def __init__(self, source: CreditSource, *, scale: Number = 1.0, clip: Positive | None = None) -> None:
        self.source, self.scale, self.clip = source, scale, clip
        self.name = source.name
        self.values = getattr(source, "values", "any")

    def __call__(self, batch: TokenBatch) -> Tensor:
        values = self.scale * self.source(batch)
        return values if self.clip is None else values.clamp(-self.clip, self.clip)

    def fingerprint(self) -> str:
        return fingerprint([self.source.fingerprint(), self.scale, self.clip])


def make_credit(name: str | Callable[..., Any], **arguments: Any) -> CreditSource:
    """A credit source by name: `make_credit("guide", model=guide, reference=reference, beta=0.3)`.

    Args:
        name: a name in `CREDIT`, a function `(batch) -> [N]`, or an import string of one.
        arguments: its objects (model, reference, tokenizer) and settings; `scale` and `clip` transform any source's.

    Raises:
        RecipeError: an unknown name (with the nearest right one), a wrong type, a value out of range; or an object
            that is missing or not taken.
    """
    return CREDIT.find(name).make(**arguments)


def as_credit(given: Any) -> CreditSource:
    """A credit source as it is; or from a function, a name, an import string, or a mapping with `name`."""
    if callable(given) and hasattr(given, "fingerprint"):
        return cast(CreditSource, given)
    if isinstance(given, Mapping) and isinstance(given.get("name"), str):
        return make_credit(**given)
    expected = "credit must be a CreditSource, a name or a function of a TokenBatch"
    require(isinstance(given, str) or callable(given), RecipeError, f"{expected}, got {type(given).__name__}")
    return make_credit(given)


def checked_credit(values: Tensor | Sequence[Any], batch: TokenBatch, name: str) -> Tensor:
    """Credit of a source as a detached float `[N]` on the batch's device, from that or a sequence per completion.

    Raises `DataError`, which names the row, for a wrong type or length or a value that is not finite.
    """
    who = f"credit source {name!r} gave"
    flat, shape = _flat(values), (batch.segments.total,)
    flat = flat if isinstance(flat, Tensor) else _joined(flat, batch, who)
    if flat.shape != shape:
        expected = f"{shape}: one per completion token that counts"
        raise DataError(f"{who} a wrong number of values", value=tuple(flat.shape), expected=expected)
    flat = flat.detach().to(batch.device)
    flat = flat if flat.is_floating_point() else flat.float()
    bad = (~torch.isfinite(flat)).nonzero()
    if len(bad):
        token = int(bad[0])
        completion, place = int(batch.segments.ids[token]), int(batch.segments.positions[token])
        what = f"{who} a value that is not finite for token {place} of completion {_place(batch, completion)}"
        raise DataError(what, row=row_of(batch, completion), value=float(flat[token]), expected="finite numbers")
    return flat


def _flat(values: Any) -> Any:
    """Plain numbers, one per token of the batch, as a tensor; what has a part per completion as it is."""
    numpy = isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "fiub"
    numbers = isinstance(values, Sequence) and len(values) and all(isinstance(v, (int, float)) for v in values)
    return torch.as_tensor(values) if numpy or numbers else values


def _joined(values: Sequence[Any], batch: TokenBatch, who: str) -> Tensor:
    lengths = batch.segments.lengths.tolist()
    try:
        parts = [torch.as_tensor(v, dtype=torch.float32).reshape(-1) for v in values]
    except (TypeError, ValueError, RuntimeError) as error:
        expected = "a tensor [N], or one list of numbers per completion"
        raise DataError(f"{who} something that is not numbers ({error})", expected=expected) from None
    if len(parts) != len(lengths):
        expected = f"{len(lengths)}, or a tensor of {batch.segments.total} values"
        raise DataError(f"{who} values for a wrong number of completions", value=len(parts), expected=expected)
    for completion, (part, length) in enumerate(zip(parts, lengths, strict=True)):
        if part.numel() != length:
            what = f"{who} a wrong number of values for completion {_place(batch, completion)}"
            expected = f"{length}, one per completion token that counts"
            raise DataError(what, row=row_of(batch, completion), value=part.numel(), expected=expected)
    return torch.cat(parts) if parts else torch.zeros(0)


def _place(batch: TokenBatch, completion: int) -> int:
    """Index of a completion within its prompt."""
    return completion - int((batch.group < batch.group[completion]).sum())


# ----------------------------------------------------------------------------------------------------
# Rollout credit: what online training makes of a rollout's rewards.


@dataclass
class Rollout:
    """One rank's share of one rollout.

    Shapes: G prompts, C completions, N tokens of all completions; all tensors on the training device, without gradient.
    """

    # Prompts with their completions. Columns: `sampling_logps` and `raw_logps` (at the temperature of `old_logps`), if
    # the sampler knows them, `truncated`, `old_logps`, and the quantities that were asked for.
    batch: TokenBatch
    rewards: Tensor  # [C], outcomes; NaN where a completion could not be scored
    by_name: dict[str, Tensor]  # [C], of each reward function without its weight; NaN where it has none
    prompt_ids: tuple[int | str, ...]  # per prompt its row's id: stable over epochs, shuffles and ranks
    index: int  # number of the rollout, from 0
    token_rewards: Tensor | None = None  # [N]
    # [C], 1 where the reward `correct_from` (or the first that applies) is above 0.5, else 0; NaN where none applies.
    correct: Tensor | None = None
    max_new_tokens: int = 0  # of the longest completion that could be sampled
    max_tokens: int | None = None  # of one micro-batch, for credits that run models; None: no bound
    advantages: Tensor | None = None  # [N], set by the one credit of phase "advantages"
    weights: Tensor | None = None  # [N], factors of the policy's token losses
    # Bool [G], prompts to train on; None: all. A credit of phase "filter" with `refill` has the others replaced.
    keep: Tensor | None = None
    masked: Tensor | None = None  # bool [C], completions that the updates leave out, as if they had not been sampled
    metrics: dict[str, float] = field(default_factory=dict)  # for the log, of this rank; ranks are averaged
    model: Any = None  # the policy, without wrappers
    head_of: Callable[[], Head] | None = None
    exchange: Callable[[Any], list[Any]] = lambda values: [values]  # gives the values of all ranks, in their order
    passes: Callable[[int], int] | None = None  # of a sharded policy, for `in_parts`

    @property
    def quantities(self) -> dict[str, Tensor]:
        """The columns of `batch`, by name: `[N]`, or `[N, H]` for "hidden". What is put in here is a column."""
        return self.batch.columns

    @property
    def segments(self) -> Segments:
        return self.batch.segments

    @property
    def group(self) -> Tensor:
        return self.batch.group

    @property
    def truncated(self) -> Tensor:
        """Completions that reached `max_new_tokens` without an end, bool `[C]`."""
        return self.segments.max(self.quantities["truncated"]) > 0

    @property
    def total(self) -> Tensor:
        """Outcome plus the sum of a completion's token rewards `[C]`; NaN where it could not be scored."""
        if self.token_rewards is None:
            return self.rewards
        return self.rewards + self.segments.sum(self.token_rewards).to(self.rewards.dtype)

    def quantity(self, name: str) -> Tensor:
        """A column. Raises `RunError` if it is not there."""
        there = name in self.quantities
        require(there, RunError, f"rollout {self.index} has no {name!r}; it has {sorted(self.quantities)}")
        return self.quantities[name]

    def gather(self, values: Any) -> Any:
        """The values of all ranks, tensors joined, others as a list with an entry per rank. Every rank must call it."""
        if not isinstance(values, Tensor):
            return self.exchange(values)
        return torch.cat(self.exchange(values.detach().cpu())).to(values.device)

    def head(self) -> Head:
        if self.head_of is None:
            raise RunError("this rollout has no model to take a head from")
        return self.head_of()

    def broadcast(self, per_completion: Tensor) -> Tensor:
        return self.segments.broadcast(per_completion)

    def drop(self, keep: Tensor) -> None:
        """Leave out the prompts where `keep` (bool `[G]`) is False, beside those left out already."""
        self.keep = keep if self.keep is None else self.keep & keep


@runtime_checkable
class RolloutCredit(Protocol):
    """Changes a `Rollout`. Settings are the keyword-only arguments of the constructor.

    It may also have `provides` (columns it adds; "weights" if it sets them), `needs_group` (True: a prompt must have
    two completions), `refill` (of a filter: replace what it drops), `unscored` (True: it asks for no `old_logps`, so
    that a rollout's only update may score it), and a method `check_limit`, called with `max_new_tokens` before anything
    is sampled, which may raise `RecipeError`.
    """

    name: str
    # "filter": right after the rewards; "rewards": shapes them; "advantages": sets these; "after": changes advantages
    # or weights. Within a phase in the order given.
    phase: Phase
    needs: frozenset[str]  # what must be scored, of `NEEDS`

    def __call__(self, rollout: Rollout) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...  # what must survive a resume, JSON-able, equal on all ranks

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Stateless:
    """The parts of a `RolloutCredit` that one without state need not write."""

    needs: frozenset[str] = frozenset()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        unknown = f"rollout credit {type(self).__name__} has no state, the checkpoint has {sorted(state)}"
        require(not state, RunError, unknown)


@dataclass(frozen=True)
class RolloutCreditKind(_Settable):
    """A kind of rollout credit: `credit(rollout, *, <objects>, <settings>)`; see `RolloutCredit`."""

    phase: Phase | None = None
    needs: Names = ()
    provides: Names = ()  # columns it adds; "weights" if it sets them, "rewards" if it makes rewards
    group: bool = False  # its `needs_group`
    refill: bool | Callable[[Settings], bool] = False
    unscored: bool = False
    limit: Callable[[float, Settings], Any] | None = None  # of (max_new_tokens, settings), before sampling; may raise

    def of_class(self) -> dict[str, Any]:
        fixed = {k: v for k, v in self.attributes({}).items() if not callable(getattr(self, k, None))}
        return {**fixed, "state_dict": Stateless.state_dict, "load_state_dict": Stateless.load_state_dict}

    def attributes(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What the trainer asks of a credit with these settings."""
        return {
            "name": self.name,
            "phase": self.phase or getattr(self.function, "phase", None),
            "needs": frozenset(self._of(self.needs, settings)),
            "provides": frozenset(self._of(self.provides, settings)),
            "needs_group": self.group,
            "refill": bool(self._of(self.refill, settings)),
            "unscored": self.unscored,
        }

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """As for every part; a class of ours that takes no objects is also built, and may refuse its settings."""
        checked = super().settings(given)
        if inspect.isclass(self.function) and not self.own and not self.objects:
            self.function(**checked)
        return checked

    def make(self, **given: Any) -> RolloutCredit:
        objects, settings = self.arguments(given)
        if not inspect.isclass(self.function):
            return BoundRolloutCredit(self, objects, settings)
        made: Any = self.function(**objects, **settings)
        with suppress(AttributeError):  # what a checkpoint must agree on; a class need not keep its settings as given
            made.given = settings
        return cast(RolloutCredit, made)


class BoundRolloutCredit(Stateless):
    """A rollout credit's function with its objects and settings."""

    name: str
    phase: Phase

    def __init__(self, kind: RolloutCreditKind, objects: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        self.kind, self.objects, self.given = kind, dict(objects), dict(settings)
        vars(self).update(kind.attributes(settings))

    def __call__(self, rollout: Rollout) -> None:
        self.kind.function(rollout, **self.objects, **self.given)

    def check_limit(self, max_new_tokens: float) -> None:
        if self.kind.limit is not None:
            self.kind.limit(max_new_tokens, self.given)


def make_rollout_credit(name: str | Callable[..., Any], /, **arguments: Any) -> RolloutCredit:
    """A rollout credit by name: `make_rollout_credit("group", scale="none")`; see `make_credit`."""
    return ROLLOUT_CREDIT.find(name).make(**arguments)


def resolve_rollout_credit(credit: Any, tokenizer: Any = None) -> list[RolloutCredit]:
    """Rollout credits, from None, one or a list of objects, names, or mappings with `name`; in order of phases.

    `tokenizer`: the policy's, for those that need one and are not made yet.
    """
    if credit is None:
        return []
    several = isinstance(credit, Sequence) and not isinstance(credit, str)
    credits = [_as_rollout_credit(one, tokenizer) for one in (credit if several else [credit])]
    for one in credits:
        who, unknown = f"credit {one.name!r}", sorted(set(one.needs) - NEEDS)
        expected = f"expected one of {', '.join(PHASES)}"
        require(one.phase in PHASES, RecipeError, f"{who}: phase is {one.phase!r}; {expected}")
        require(not unknown, RecipeError, f"{who} needs {', '.join(unknown)}; expected some of {sorted(NEEDS)}")
    setters = [repr(one.name) for one in credits if one.phase == "advantages"]
    both = f"credit {' and '.join(setters[:2])} both set the advantages; expected one of them"
    require(len(setters) < 2, RecipeError, both)
    return sorted(credits, key=lambda one: PHASES.index(one.phase))


def _as_rollout_credit(one: Any, tokenizer: Any) -> RolloutCredit:
    if callable(one) and hasattr(one, "phase") and hasattr(one, "needs") and not inspect.isclass(one):
        return cast(RolloutCredit, one)
    if isinstance(one, Mapping):
        require(isinstance(one.get("name"), str), RecipeError, f"a rollout credit needs a name, got {shown(dict(one))}")
    what = f"a rollout credit is an object with a phase, a name or a mapping, got {type(one).__name__}"
    require(isinstance(one, (str, Mapping)) or callable(one), RecipeError, what)
    given = dict(one) if isinstance(one, Mapping) else {}
    name = given.pop("name", one)
    if tokenizer is not None and "tokenizer" in ROLLOUT_CREDIT.find(name).objects:
        given.setdefault("tokenizer", tokenizer)
    return make_rollout_credit(name, **given)


# ----------------------------------------------------------------------------------------------------
# What goes together.


def why_not(values: str, uses: str) -> str:
    """Why numbers that mean `values` (see `CreditSource`) do not suit a role that uses `uses`; "" if they do."""
    if values == "importance" and uses != "importance":
        return "it says how much a token matters, not whether it is good or bad; use it with objective ti_dpo"
    if uses == "importance" and values not in ("importance", "any"):
        lacks = "only the order of its numbers means something" if values == "order" else "its numbers can be below 0"
        return f"{lacks}, and the objective takes how much a token matters; use gradient_attribution, or your own"
    if uses == "sign" and values == "order":
        meaning = "only the order of its numbers within a completion means something, not their sign"
        return f"{meaning}; use it as selection or as span, by share"
    marks = uses == "order" and values == "marks"
    return "it marks tokens and does not rank them; set `above: 0` to take what it marks" if marks else ""


def check_source_for_role(source: Any, role: Role) -> None:
    """Raises `RecipeError`, with what to do instead, if a source's values do not mean what the role uses."""
    reason = why_not(getattr(source, "values", "any"), role.uses)
    require(not reason, RecipeError, f"credit {source.name!r} as {role.name}: {reason}")


def check_together(objective: BoundObjective, role: Role | None, teacher: Any) -> None:
    """Raises `RecipeError` if an objective, the role of credit in it and a teacher (or its description) do not fit."""
    who, taught = f"objective {objective.name}", bool(TAUGHT & set(objective.needs))
    require(not taught or teacher is not None, RecipeError, f"{who} needs a teacher, got none")
    require(taught or teacher is None, RecipeError, f"{who} does not distil; teacher must be None")
    few = role is not None and role.name == "selection" and objective.hyper.get("sft_weight")
    about = "sft_weight is about all chosen tokens, and only selected ones are scored; set sft_weight: 0"
    require(not few, RecipeError, f"{who}: {about}")


OBJECTIVES: Registry[Objective] = Registry("objective", Objective)
CREDIT: Registry[CreditKind] = Registry("credit", CreditKind)
ROLLOUT_CREDIT: Registry[RolloutCreditKind] = Registry("online credit", RolloutCreditKind)
METHODS: Registry[Card] = Registry("method", order=lambda card: (OBJECTIVES[card.objective].online, card.arxiv))
