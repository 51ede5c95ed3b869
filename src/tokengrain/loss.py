"""What a loss returns, how it is normalised, and how token credit enters it: as reward, weight, selection or spans."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.errors import RecipeError, require
from tokengrain.settings import NonNegative, Number, Share, nearest, validate_settings

Unit = Literal["pairs", "completions"]
TokenUnit = Literal["tokens", "chosen_tokens"]


@dataclass
class LossOutput:
    """Losses before any normalisation: a normaliser turns them into the scalar that is optimised."""

    losses: Tensor  # one per pair [P] or per completion [C], in nats, with gradient
    metrics: dict[str, Tensor] = field(default_factory=dict)  # detached, one value per loss; their mean is logged
    # An extra term, one value per token it is about, already weighted. Whatever the normaliser, it adds its sum divided
    # by the number of `token_unit` in the whole optimiser step.
    token_losses: Tensor | None = None
    unit: Unit = "pairs"  # what `losses` has one of
    token_unit: TokenUnit = "chosen_tokens"  # what `token_losses` has one of: all counted tokens, or the chosen ones
    tokens: dict[str, Tensor] = field(default_factory=dict)  # detached [N], for pictures of single completions


# ---- From losses per pair to the scalar that is optimised, independent of how the batch is cut.
#
# For every micro-batch loss = normaliser(output, counts of the whole step, all micro-batches and ranks). The loss of
# the step, and its gradient, is the SUM over micro-batches and ranks: callers do not divide by the number of
# micro-batches, and multiply by the ranks where gradients are averaged over these (DDP, FSDP). Given losses l_i of U
# units (pairs or completions), of P prompts, with N counted tokens in the whole step:
#
#     mean         sum_i l_i / U           (default; the objective as the papers write it)
#     token_mean   sum_i l_i / N           (a step weighs by its tokens; for losses that are sums over tokens)
#     prompt_mean  sum_i l_i / P           (sums over the completions of a prompt, as DCPO's)
#     constant     sum_i l_i / constant    (a fixed divisor, as Dr. GRPO's)
#     sum          sum_i l_i
#
# `token_losses` always add their sum divided by the step's number of such tokens.

NormaliserName = Literal["mean", "token_mean", "prompt_mean", "constant", "sum"]
NORMALISERS: tuple[NormaliserName, ...] = get_args(NormaliserName)


@dataclass(frozen=True)
class Counts:
    """What a batch holds; added up over micro-batches and ranks."""

    pairs: int = 0  # 0 if the completions do not come in pairs
    completions: int = 0
    tokens: int = 0  # counted ones
    chosen_tokens: int = 0  # those of chosen completions
    prompts: int = 0  # 0 where nobody counted them

    @classmethod
    def of(cls, segments: Segments, *, pairs: bool, prompts: int = 0) -> Counts:
        """Count a batch: `Counts.of(batch.segments, pairs=batch.is_pairs, prompts=batch.n_prompts)`."""
        lengths = segments.lengths
        chosen = int(segments.pairs(lengths)[0].sum()) if pairs else 0
        return cls(len(segments) // 2 if pairs else 0, len(segments), segments.total, chosen, prompts)

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def to_tensor(self) -> Tensor:
        """Long `[5]`, ready for an all-reduce with SUM."""
        return torch.tensor(astuple(self), dtype=torch.long)

    @classmethod
    def from_tensor(cls, counts: Tensor) -> Counts:
        return cls(*counts.tolist())


Normaliser = Callable[[LossOutput, Counts], Tensor]


def make_normaliser(name: NormaliserName = "mean", constant: float | None = None) -> Normaliser:
    """A normaliser by name; `constant` is the divisor of "constant" and of no other. Raises RecipeError."""
    require(name in NORMALISERS, RecipeError, f"normaliser: unknown name {name!r}{nearest(name, NORMALISERS)}")
    what = "needs a positive" if name == "constant" else "takes no"
    fine = constant is not None and constant > 0 if name == "constant" else constant is None
    require(fine, RecipeError, f"normaliser {name!r} {what} normaliser_constant, got {constant!r}")

    def normalise(output: LossOutput, counts: Counts) -> Tensor:
        if name == "prompt_mean" and counts.completions and not counts.prompts:
            raise ValueError("normaliser 'prompt_mean' needs the number of prompts in the counts, got 0")
        unit = {"token_mean": "tokens", "prompt_mean": "prompts"}.get(name, output.unit)
        divisor = constant or (1 if name == "sum" else max(getattr(counts, unit), 1))
        loss = output.losses.sum() / divisor
        if output.token_losses is not None:
            loss = loss + output.token_losses.sum() / max(getattr(counts, output.token_unit), 1)
        return loss

    return normalise


# ---- Which tokens to train on: the best of a chosen completion, the worst of a rejected one (arXiv 2408.13518).
#
# Selection is per completion, never across a batch. Completions are pairs: even ones chosen, odd ones rejected.


def select_tokens(
    values: Tensor, segments: Segments, *, chosen: float = 0.3, rejected: float = 0.3, score_first_token: bool = True
) -> Tensor:
    """The highest share of every chosen and the lowest share of every rejected completion: bool `[N]`.

    Of n tokens max(1, floor(share * n)) are taken; among equal values the earliest. Without `score_first_token` the
    first token of a completion is left out, and does not count in n either, as in the authors' code.
    """
    for name, share in (("chosen", chosen), ("rejected", rejected)):
        require(0 < share <= 1, ValueError, f"select_tokens: {name} must lie in (0, 1], got {share}")
    known = not bool(torch.isnan(values).any())
    require(known, ValueError, "select_tokens: the values contain NaN, so they have no order")
    if not score_first_token:
        rest = segments.positions > 0
        selected = torch.zeros_like(rest)
        selected[rest] = select_tokens(values[rest], segments.narrow(rest), chosen=chosen, rejected=rejected)
        return selected
    lengths = segments.lengths.double()
    even = torch.arange(len(segments), device=lengths.device) % 2 == 0
    # 0.57 * 100 is 56.99999999999999 in binary and means 57.
    wanted = torch.where(even, chosen * lengths, rejected * lengths).add(1e-9).floor().long().clamp(min=1)
    return token_ranks(values, segments) < segments.broadcast(wanted)


def select_where(values: Tensor, segments: Segments, *, above: float) -> Tensor:
    """Chosen tokens with value > `above` and rejected ones with value < -`above`: bool `[N]`, perhaps none."""
    return torch.where(segments.is_chosen, values > above, values < -above)


def token_ranks(values: Tensor, segments: Segments) -> Tensor:
    """Place of every token in its completion, long `[N]`, 0 first: high values first in chosen completions,
    low ones first in rejected completions; earlier tokens first among equals."""
    # `values` may hold +0 and -0 or whole numbers: negation keeps their order and their ties.
    return _places(torch.where(segments.is_chosen, -values, values), segments)


def top_tokens(values: Tensor, segments: Segments, counts: Tensor) -> Tensor:
    """The `counts` (long `[C]`) highest values of every completion, pairs or not, the earliest first: bool `[N]`."""
    return _places(-values, segments) < segments.broadcast(counts)


def span_ids(selected: Tensor, segments: Segments) -> Tensor:
    """Numbers runs of selected tokens `[N]`: 0 where not selected, else 1, 2, ... within a completion; float `[N]`."""
    selected = selected.bool()
    after = torch.zeros_like(selected)
    after[1:] = selected[:-1]
    starts = selected & ~(after & (segments.positions > 0))
    runs = starts.cumsum(0)  # runs begun so far, in all completions
    before = torch.cat([runs.new_zeros(1), runs])[segments.offsets[:-1]]
    return torch.where(selected, runs - segments.broadcast(before), 0).float()


def _places(values: Tensor, segments: Segments) -> Tensor:
    """Place of every token in its completion by value, long `[N]`, the least first, earlier tokens among equals."""
    order = torch.argsort(values, stable=True)
    order = order[torch.argsort(segments.ids[order], stable=True)]  # by completion, then by value, then by place
    ranks = torch.empty_like(order)
    ranks[order] = segments.positions
    return ranks


def token_weights(
    token_rewards: Tensor, segments: Segments, *, alpha: float, clamp_min: float | None = None, normalise: bool = False
) -> Tensor:
    """f = 1 + alpha r on chosen tokens, 1 - alpha r on rejected ones: `[N] -> [N]`, no gradient.

    `clamp_min` is a floor of f; with `normalise` f is then divided by its mean over the completion.
    """
    sign = torch.where(segments.is_chosen, 1.0, -1.0).to(token_rewards.dtype)
    f = 1 + alpha * sign * token_rewards.detach()
    f = f if clamp_min is None else f.clamp(min=clamp_min)
    return f / segments.broadcast(segments.mean(f)) if normalise else f


# ---- How token credit enters an objective. A role turns credit `[N]` into the per-token quantity that a loss takes:
#
#     reward      token_rewards: the credit itself (TGDPO, T-REG)
#     importance  token_rewards: the credit itself, how much a token matters, at least 0 (TI-DPO)
#     weight      token_weights, times each token's log-probability (and the reference's)
#     selection   selected: 1 for the tokens worth training on; only these are scored (SePO)
#     span        spans: runs of selected tokens, numbered (RRPO)


class Role(ABC):
    """Credit `[N]` to the quantity `[N]` called `provides`; its settings are its attributes."""

    name: ClassVar[str]
    provides: ClassVar[str]
    implied: ClassVar[bool] = True  # an objective takes credit so if its loss has the quantity; else it must say so

    @property
    def uses(self) -> str:
        """What must mean something in the credit: "sign" (and size), "order" (within a completion), "importance"."""
        return "sign"

    @abstractmethod
    def __call__(self, values: Tensor, segments: Segments) -> Tensor:
        """The quantity that the role makes of credit."""

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, **vars(self)}


class RewardRole(Role):
    """Credit as it is, for objectives that have a token reward in their formula."""

    name, provides = "reward", "token_rewards"

    def __init__(self) -> None: ...  # no settings

    def __call__(self, values: Tensor, segments: Segments) -> Tensor:
        return values


class ImportanceRole(RewardRole):
    """Credit as it is, for objectives that weigh tokens by how much they matter: at least 0, good or bad."""

    name, implied, uses = "importance", False, "importance"


class WeightRole(Role):
    """Credit as token weights, as in TGDPO: 1 + alpha r on chosen tokens, 1 - alpha r on rejected ones.

    Args:
        alpha: strength; 0 weighs every token alike.
        clamp_min: floor of the weights (None: none).
        normalise: divide the weights of a completion by their mean.
    """

    name, provides = "weight", "token_weights"

    def __init__(self, *, alpha: Number = 0.5, clamp_min: Number | None = None, normalise: bool = False) -> None:
        self.alpha, self.clamp_min, self.normalise = alpha, clamp_min, normalise

    def __call__(self, values: Tensor, segments: Segments) -> Tensor:
        return token_weights(values, segments, **vars(self))


class SelectionRole(Role):
    """The tokens worth training on: the best of each chosen and the worst of each rejected completion.

    Args:
        share: share of the tokens of either side, in (0, 1].
        chosen, rejected: shares by side, instead of `share`.
        above: instead of shares: chosen tokens with credit > above, rejected ones with credit < -above.
        score_first_token: False leaves out the first token of every completion, as SePO's released code does.
    """

    name, provides = "selection", "selected"

    def __init__(
        self,
        *,
        share: Share = 0.3,
        chosen: Share | None = None,
        rejected: Share | None = None,
        above: NonNegative | None = None,
        score_first_token: bool = True,
    ) -> None:
        self.chosen = share if chosen is None else chosen
        self.rejected = share if rejected is None else rejected
        self.above, self.score_first_token = above, score_first_token
        fine = above is not None or (self.chosen > 0 and self.rejected > 0)
        require(fine, RecipeError, f"{self.name}: shares must be above 0, got {self.chosen} and {self.rejected}")

    @property
    def uses(self) -> str:
        return "order" if self.above is None else "sign"

    def __call__(self, values: Tensor, segments: Segments) -> Tensor:
        if self.above is None:
            settings = {name: getattr(self, name) for name in ("chosen", "rejected", "score_first_token")}
            return select_tokens(values, segments, **settings).to(values.dtype)
        selected = select_where(values, segments, above=self.above)
        return (selected & (self.score_first_token | (segments.positions > 0))).to(values.dtype)


class SpanRole(SelectionRole):
    """The same tokens as numbered spans: neighbouring ones belong together. Settings: those of `selection`."""

    name, provides = "span", "spans"

    def __call__(self, values: Tensor, segments: Segments) -> Tensor:
        return span_ids(super().__call__(values, segments), segments).to(values.dtype)


ROLES: dict[str, Any] = {role.name: role for role in (RewardRole, ImportanceRole, WeightRole, SelectionRole, SpanRole)}


def make_role(name: str, **settings: Any) -> Role:
    require(name in ROLES, RecipeError, f"unknown role of credit {name!r}{nearest(name, ROLES)}")
    return ROLES[name](**validate_settings(f"credit as {name!r}", ROLES[name], settings))


def resolve_role(given: Any, accepted: tuple[str, ...], objective: str, why_none: str = "") -> Role:
    """The role in which credit enters an objective that takes the roles `accepted`; the only one is the default.

    `given` is None, a role's name, a mapping `{name: ..., settings}`, or a `Role`.
    """
    require(accepted, RecipeError, f"objective {objective} takes no token credit: {why_none}")
    if given is None:
        choices = " or ".join(f"`as: {name}`" for name in accepted)
        message = f"objective {objective} takes credit in several ways; say which: {choices}"
        require(len(accepted) == 1, RecipeError, message)
        given = accepted[0]
    given = {"name": given} if isinstance(given, str) else given
    named = not isinstance(given, Mapping) or isinstance(given.get("name"), str)
    require(named, RecipeError, f"the role of credit has no name; expected one of {list(accepted)}")
    role = make_role(**given) if isinstance(given, Mapping) else given
    message = f"objective {objective} takes no credit as {role.name}; expected {' or '.join(accepted)}"
    require(role.name in accepted, RecipeError, message)
    return role
