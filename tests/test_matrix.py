"""The table of credit sources and objectives: what it says is what the trainer and the recipes do."""

from __future__ import annotations

import pytest

from tokengrain import tables
from tokengrain.errors import RecipeError
from tokengrain.loss import make_role, resolve_role
from tokengrain.method import CREDIT, check_source_for_role, make_objective


class Source:
    """Stands for a credit source: what the check looks at."""

    def __init__(self, name: str) -> None:
        self.name, self.values = name, CREDIT[name].values


@pytest.mark.parametrize("credit", sorted(CREDIT))
@pytest.mark.parametrize("objective", sorted(tables.objectives()))
def test_a_cell_says_what_is_accepted(credit: str, objective: str) -> None:
    bound = make_objective(objective)
    for name in ("reward", "weight", "selection", "span"):
        allowed = name in tables.cell(credit, objective).split(", ")
        if allowed:
            check_source_for_role(Source(credit), resolve_role(name, bound.roles, objective, bound.no_credit))
            continue
        with pytest.raises(RecipeError, match=r".{30,}"):  # a reason, not only a refusal
            check_source_for_role(Source(credit), resolve_role(name, bound.roles, objective, bound.no_credit))


def test_marks_are_taken_by_threshold_only() -> None:
    check_source_for_role(Source("spans"), make_role("selection", above=0.0))
    with pytest.raises(RecipeError, match="above: 0"):
        check_source_for_role(Source("spans"), make_role("selection"))
    assert tables.cell("spans", "sepo") == "selection (above: 0)"
