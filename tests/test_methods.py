"""The list of methods agrees with the objectives, the recipes and the documentation."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokengrain.methods import METHODS
from tokengrain.objectives import OBJECTIVES

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_has_an_objective_a_recipe_and_a_page(name: str) -> None:
    method = METHODS[name]
    assert method.name == name
    assert OBJECTIVES[method.objective].paper == method.arxiv
    assert (ROOT / method.recipe).is_file()
    page = (ROOT / method.page).read_text(encoding="utf-8")
    assert method.arxiv in page
    assert f"recipes/{name}.yaml" in page
    for heading in (
        "Idea",
        "Equation",
        "When it helps",
        "Pitfalls",
        "What differs",
        "How to run",
        "What was measured",
    ):
        assert f"## {heading}" in page, heading


def test_every_preference_objective_belongs_to_a_method() -> None:
    used = {m.objective for m in METHODS.values()}
    assert set(OBJECTIVES) - used == {"sft", "tdpo"}
