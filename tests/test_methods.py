"""The list of methods agrees with the objectives, the rollout credits, the recipes and the documentation."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tokengrain import tables
from tokengrain.method import METHODS, OBJECTIVES, ROLLOUT_CREDIT, Card
from tokengrain.run.load import load_recipe, resolve_stages

ROOT = Path(__file__).parents[1]


def papers(method: Card) -> str:
    """What the code says about the papers behind a method: of its objective, and of its recipe's credits."""
    objective = OBJECTIVES[method.objective]
    found = [str(objective.function.__doc__), str(sys.modules[objective.function.__module__].__doc__)]
    last = resolve_stages(load_recipe(ROOT / method.recipe))[-1]
    if last.kind == "online":
        classes = [ROLLOUT_CREDIT[step["name"]].function for step in last.own.credit]
        for thing in (*classes,):
            found += [str(thing.__doc__), str(sys.modules[thing.__module__].__doc__)]
    return "\n".join(found)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_has_an_objective_a_recipe_and_a_page(name: str) -> None:
    method = METHODS[name]
    assert method.name == name
    assert method.arxiv in papers(method)
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


@pytest.mark.parametrize("page", [*tables.BLOCKS, "docs/credit-matrix.md"])
def test_generated_tables_are_up_to_date(page: str) -> None:
    """If this fails, run `make docs-tables`."""
    assert (ROOT / page).read_text(encoding="utf-8") == tables.pages(ROOT)[ROOT / page]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_an_idea_is_short(name: str) -> None:
    assert 3 <= len(METHODS[name].idea.split()) <= 6


def test_every_objective_belongs_to_a_method() -> None:
    used = {m.objective for m in METHODS.values()}
    assert set(OBJECTIVES) - used == {"sft", "tdpo"}


@pytest.mark.parametrize("name", sorted(n for n, m in METHODS.items() if OBJECTIVES[m.objective].online))
def test_limits_that_a_recipe_says_twice_agree(name: str) -> None:
    """The divisor of Dr. GRPO's normaliser is the longest completion, on the world and on real models."""
    path = ROOT / METHODS[name].recipe
    for recipe in (load_recipe(path), load_recipe(path, model="some/model", data="rows.jsonl")):
        stage = resolve_stages(recipe)[-1]
        assert stage.objective is not None
        if stage.objective.get("reduction") == "constant":
            assert stage.objective["max_length"] == stage.training["max_new_tokens"]
        pooled = stage.objective.get("reduction") == "sum"
        assert (stage.training.get("normaliser") == "token_mean") is pooled
