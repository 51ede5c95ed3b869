"""Token credit as the trainer uses it: a source, and the role in which it enters the objective."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokengrain.batch import TokenBatch
from tokengrain.errors import RecipeError
from tokengrain.objectives import BoundObjective
from tokengrain.objectives.roles import Role, resolve_role
from tokengrain.recipe.schema import ResolvedStage
from tokengrain.training.sources import credit_settings

FROZEN = frozenset({"ref_logps", "kl"})
"""Quantities that the reference gives."""
TAUGHT = frozenset({"teacher_kl", "teacher_alpha", "teacher_reward", "tvd"})
"""Quantities that a teacher gives."""


@dataclass(frozen=True)
class CreditUse:
    """Credit `[N]` of a batch, in its role.

    Attributes:
        source: maps a batch to one number per counted token.
        role: what the objective gets made of it.
    """

    source: Any
    role: Role

    @property
    def name(self) -> str:
        return f"{self.source.name} as {self.role.name}"

    def __call__(self, batch: TokenBatch) -> Tensor:
        values = self.source(batch).detach().to(batch.device)
        return self.role(values, batch.segments)

    def describe(self) -> dict[str, Any]:
        """What a checkpoint must agree on."""
        return {"source": self.source.name, "as": self.role.describe()}


def resolve_credit(
    credit: Any, credit_as: Any, objective: BoundObjective, columns: tuple[str, ...]
) -> CreditUse | None:
    """How credit enters an objective; None if it takes none, or takes the data's own column as it is.

    Args:
        credit: a credit source, a function of a `TokenBatch`, or None: the column `token_rewards`.
        credit_as: a role, its name, `{name: ..., settings}`, or None for the objective's only one.
        objective: what is trained.
        columns: per-token columns of the data, as far as they are known.

    Raises:
        RecipeError: the objective takes no credit, or not in this role, or this source does not suit the role.
    """
    from tokengrain.credit import ColumnCredit, FunctionCredit

    if credit is None and credit_as is None:
        needed = {"selected", "spans"} & set(objective.needs) - set(columns)
        # Scores in the data and a loss that wants a selection of them.
        if not needed or (needed == {"spans"} and "token_rewards" not in columns):
            return None
    role = resolve_role(credit_as, objective.roles, objective.name, objective.no_credit)
    if credit is None:
        credit = ColumnCredit()
    elif not hasattr(credit, "fingerprint"):
        if not callable(credit):
            raise RecipeError(
                f"credit must be a CreditSource or a function of a TokenBatch, got {type(credit).__name__}"
            )
        credit = FunctionCredit(function=credit)
    check_source_for_role(credit, role)
    return CreditUse(credit, role)


def check_source_for_role(source: Any, role: Role) -> None:
    """Refuse a source whose values do not mean what the role uses.

    Raises:
        RecipeError: with the reason and what to do instead.
    """
    from tokengrain.credit.registry import why_not

    reason = why_not(getattr(source, "values", "any"), role.uses)
    if reason:
        raise RecipeError(f"credit {source.name!r} as {role.name}: {reason}")


def columns_needed(objective: BoundObjective, stage: ResolvedStage, present: Collection[str]) -> set[str]:
    """Per-token columns that a stage's data must bring, because nothing else gives them.

    Args:
        present: the columns that they have.
    """
    if stage.credit is not None:
        name, settings = credit_settings(stage.credit)
        from_data = {"column": settings.get("column", "token_rewards"), "spans": "spans"}
        return {from_data[name]} if name in from_data else set()
    needed = set(objective.needs) - FROZEN - TAUGHT
    if "selected" in needed - set(present) or ("spans" in needed - set(present) and "token_rewards" in present):
        return needed - {"selected", "spans"} | {"token_rewards"}
    return needed


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
