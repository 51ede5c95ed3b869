"""How token credit enters an objective: as reward, as weight, as selection or as spans.

A role turns credit `[N]` into the per-token quantity that a loss takes:

    reward      token_rewards: the credit itself (TGDPO, T-REG)
    weight      token_weights: 1 + alpha r on chosen tokens, 1 - alpha r on rejected ones, times each token's
                log-probability (and the reference's), for losses that are sums or means over tokens
    selection   selected: 1 for the tokens worth training on; only these are scored (SePO)
    span        spans: runs of selected tokens, numbered (RRPO)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.callables import NonNegative, Number, Share, nearest, validate_settings
from tokengrain.errors import RecipeError
from tokengrain.objectives.selection import select_tokens, select_where, span_ids
from tokengrain.objectives.token_weighted import token_weights


class Role(Protocol):
    """Credit `[N]` to the quantity `[N]` called `provides`.

    `uses` is what must be meaningful in the credit: "sign" (and size, around 0), "order" (within a
    completion), or "any".
    """

    name: ClassVar[str]
    provides: ClassVar[str]

    @property
    def uses(self) -> str: ...

    def __call__(self, values: Tensor, segments: Segments) -> Tensor: ...

    def describe(self) -> dict[str, Any]: ...


class RewardRole:
    """Credit as it is, for objectives that have a token reward in their formula."""

    name, provides, uses = "reward", "token_rewards", "sign"

    def __init__(self) -> None:
        """It has no settings."""

    def __call__(self, values: Tensor, segments: Segments) -> Tensor:
        return values

    def describe(self) -> dict[str, Any]:
        return {"name": self.name}


class WeightRole:
    """Credit as token weights, as in TGDPO: 1 + alpha r on chosen tokens, 1 - alpha r on rejected ones.

    Args:
        alpha: strength; 0 weighs every token alike.
        clamp_min: floor of the weights (None: none).
        normalise: divide the weights of a completion by their mean.
    """

    name, provides, uses = "weight", "token_weights", "sign"

    def __init__(self, *, alpha: Number = 0.5, clamp_min: Number | None = None, normalise: bool = False) -> None:
        self.alpha, self.clamp_min, self.normalise = alpha, clamp_min, normalise

    def __call__(self, values: Tensor, segments: Segments) -> Tensor:
        return token_weights(values, segments, alpha=self.alpha, clamp_min=self.clamp_min, normalise=self.normalise)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, **vars(self)}


class SelectionRole:
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
        if above is None and not (self.chosen > 0 and self.rejected > 0):
            raise RecipeError(f"{self.name}: shares must be above 0, got {self.chosen} and {self.rejected}")

    @property
    def uses(self) -> str:
        return "order" if self.above is None else "sign"

    def __call__(self, values: Tensor, segments: Segments) -> Tensor:
        return self._select(values, segments).to(values.dtype)

    def _select(self, values: Tensor, segments: Segments) -> Tensor:
        if self.above is not None:
            selected = select_where(values, segments, above=self.above)
            return selected if self.score_first_token else selected & (segments.positions > 0)
        return select_tokens(
            values,
            segments,
            chosen=self.chosen,
            rejected=self.rejected,
            score_first_token=self.score_first_token,
        )

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, **vars(self)}


class SpanRole(SelectionRole):
    """The same tokens as numbered spans: neighbouring ones belong together. Settings: those of `selection`."""

    name, provides = "span", "spans"

    def __call__(self, values: Tensor, segments: Segments) -> Tensor:
        return span_ids(self._select(values, segments), segments).to(values.dtype)


ROLES: dict[str, Any] = {role.name: role for role in (RewardRole, WeightRole, SelectionRole, SpanRole)}


def make_role(name: str, **settings: Any) -> Role:
    """A role by name: `make_role("selection", share=0.3)`.

    Raises:
        RecipeError: an unknown role or setting, a wrong type, a value out of range.
    """
    if name not in ROLES:
        raise RecipeError(f"unknown role of credit {name!r}{nearest(name, ROLES)}")
    return ROLES[name](**validate_settings(f"credit as {name!r}", ROLES[name], settings))


def resolve_role(given: Any, accepted: tuple[str, ...], objective: str, why_none: str = "") -> Role:
    """The role in which credit enters an objective.

    Args:
        given: None for the default, a role's name, a mapping `{name: ..., settings}`, or a `Role`.
        accepted: the roles that the objective takes; the only one is the default.
        why_none: why the objective takes no credit, if it takes none.

    Raises:
        RecipeError: none is accepted, this one is not, or there are several and none was given.
    """
    if not accepted:
        raise RecipeError(f"objective {objective} takes no token credit: {why_none}")
    if given is None:
        if len(accepted) > 1:
            choices = " or ".join(f"`as: {name}`" for name in accepted)
            raise RecipeError(f"objective {objective} takes credit in several ways; say which: {choices}")
        return make_role(accepted[0])
    if isinstance(given, Mapping):
        settings = dict(given)
        name = settings.pop("name", None)
        if not isinstance(name, str):
            raise RecipeError(f"the role of credit has no name; expected one of {list(accepted)}")
        role = make_role(name, **settings)
    else:
        role = make_role(given) if isinstance(given, str) else given
    if role.name not in accepted:
        raise RecipeError(f"objective {objective} takes no credit as {role.name}; expected {' or '.join(accepted)}")
    return role
