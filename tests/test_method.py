"""The contract: methods are found by being there, names are looked up in one place, a user's own go the same way."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tokengrain.methods
from tests.credit.small import pairs, tokenizer
from tokengrain import method
from tokengrain.batch import Segments, TokenBatch
from tokengrain.errors import RecipeError
from tokengrain.loss import LossOutput
from tokengrain.method import (
    CREDIT,
    METHODS,
    OBJECTIVES,
    ROLLOUT_CREDIT,
    Card,
    Rollout,
    as_credit,
    make_credit,
    make_objective,
    make_rollout_credit,
    resolve_rollout_credit,
)

OWN = """
from tokengrain.loss import LossOutput
from tokengrain.method import Card, credit, objective, rollout_credit

CARD = Card("mine", "Mine", "an idea of my own", "A Paper", "2600.00001", "2026")

@objective("mine", unit="completions")
def loss(logps, segments, *, power: int = 2):
    '''Mine.'''
    return LossOutput(segments.sum(logps) ** power, unit="completions")

@credit("mine", values="order")
def my_credit(batch, *, model, factor: float = 1.0):
    '''Credit of mine.'''
    return factor * model(batch)

@rollout_credit("halve", phase="after", needs=lambda s: {"entropy"} if s["by"] > 2 else ())
def halve(step, *, by: float = 2.0):
    step.advantages = step.advantages / by
"""


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is gone after it."""
    method.load_methods()
    for registry in (OBJECTIVES, CREDIT, ROLLOUT_CREDIT, METHODS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
        monkeypatch.setattr(registry, "_homes", dict(registry._homes))
    monkeypatch.setattr(method, "BROKEN", {})
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def again(registries: None, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Methods are looked for anew."""
    monkeypatch.setitem(method._state, "loaded", False)
    return monkeypatch


def batch() -> TokenBatch:
    return pairs(tokenizer())


def rollout() -> Rollout:
    found = batch()
    return Rollout(found, torch.zeros(len(found.segments)), {}, (0, 1), 0, advantages=torch.ones(found.labels.shape))


class TestFinding:
    def test_a_file_in_methods_is_found_by_being_there(self, again: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "fresh.py").write_text(OWN)
        again.setattr(tokengrain.methods, "__path__", [*tokengrain.methods.__path__, str(tmp_path)])
        assert make_objective("mine", power=3).unit == "completions"
        assert METHODS["mine"].paper == "arXiv 2600.00001, 2026"
        assert list(METHODS)[-1] != "mine"  # offline methods first, then by date
        assert CREDIT["mine"].summary == "Credit of mine"

    def test_a_broken_file_is_named_and_takes_no_other_down(self, again: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "broken.py").write_text("import no_such_package\n")
        (tmp_path / "works.py").write_text(OWN)
        again.setattr(tokengrain.methods, "__path__", [*tokengrain.methods.__path__, str(tmp_path)])
        with pytest.warns(UserWarning, match="tokengrain.methods.broken are left out: .*No module named 'no_such"):
            assert "mine" in OBJECTIVES
        assert {"dpo", "grpo"} <= set(METHODS)
        with pytest.raises(RecipeError, match=r"unknown objective 'brokn'.*tokengrain.methods.broken could not be imp"):
            make_objective("brokn")

    def test_an_installed_package_brings_methods(self, again: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "their_package.py").write_text(OWN)
        again.syspath_prepend(str(tmp_path))
        entries = [
            EntryPoint("theirs", "their_package", "tokengrain.methods"),
            EntryPoint("gone", "no_such_module", "x"),
        ]
        again.setattr(method, "entry_points", lambda group: entries if group == "tokengrain.methods" else [])
        with pytest.warns(UserWarning, match="no_such_module are left out"):
            assert METHODS["mine"].title == "Mine"
        described = make_objective("mine").describe()
        assert described["source"] != make_objective("dpo").describe().get("source")  # their code counts, ours does not

    def test_a_name_has_one_home(self, registries: None) -> None:
        with pytest.raises(RecipeError, match=r"objective 'dpo' is registered twice, by tokengrain.methods.dpo and"):

            @method.objective("dpo")
            def other(logps: Tensor, segments: Segments) -> LossOutput:
                raise AssertionError

    @pytest.mark.parametrize(
        ("look_up", "message"),
        [
            (lambda: make_objective("tgpdo"), "unknown objective 'tgpdo'; did you mean 'tgdpo'"),
            (lambda: make_credit("gide"), "unknown credit 'gide'; did you mean 'guide'"),
            (lambda: make_rollout_credit("grop"), "unknown online credit 'grop'; did you mean 'group'"),
            (lambda: METHODS.find("drgpo"), "unknown method 'drgpo'; did you mean 'drgrpo'"),
            (lambda: make_credit("guide", bet=1), "credit 'guide': unknown setting 'bet'; did you mean 'beta'"),
            (lambda: make_rollout_credit("thr", q=1), "credit 'thr': unknown setting 'q'"),
        ],
    )
    def test_the_nearest_name_is_suggested(self, look_up: Any, message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            look_up()


class TestOnesOwn:
    def test_a_file_gives_all_three(self, registries: None, tmp_path: Path) -> None:
        file = tmp_path / "my.py"
        file.write_text(OWN)
        bound = make_objective(f"{file}:loss", power=3)
        assert (bound.unit, bound.hyper) == ("completions", {"power": 3})  # as its decorator says
        source = make_credit(f"{file}:my_credit", model=lambda b: torch.ones(b.labels.shape), factor=2, scale=0.5)
        assert torch.equal(source(batch()), torch.ones(batch().labels.shape))
        assert source.values == "order"
        step = rollout()
        make_rollout_credit(f"{file}:halve", by=4)(step)
        assert step.advantages is not None
        assert bool((step.advantages == 0.25).all())
        assert make_rollout_credit(f"{file}:halve", by=4).needs == {"entropy"}

    def test_a_file_that_changed_is_read_anew(self, registries: None, tmp_path: Path) -> None:
        file = tmp_path / "my.py"
        file.write_text(OWN)
        before = make_objective(f"{file}:loss").describe()
        file.write_text(OWN.replace("** power", "* power"))
        assert make_objective(f"{file}:loss").describe()["source"] != before["source"]

    def test_a_plain_function_is_a_credit_source(self) -> None:
        source = as_credit(lambda b: [[1.0] * int(n) for n in b.segments.lengths])
        assert torch.equal(source(batch()), torch.ones(batch().labels.shape))
        assert as_credit(source) is source
        with pytest.raises(RecipeError, match="credit must be a CreditSource, a name or a function"):
            as_credit(3)

    def test_a_rollout_credit_needs_a_phase(self, tmp_path: Path) -> None:
        file = tmp_path / "plain.py"
        file.write_text("def steer(step): ...\n")
        with pytest.raises(RecipeError, match="phase is None; expected one of filter, rewards, advantages, after"):
            resolve_rollout_credit([f"{file}:steer"])


@pytest.mark.parametrize("registry", [OBJECTIVES, CREDIT, ROLLOUT_CREDIT], ids=lambda r: r.what)
def test_every_part_says_what_it_is(registry: Any) -> None:
    assert [name for name, part in registry.items() if not part.summary] == []


def test_a_function_without_a_module_is_a_credit() -> None:
    """As one has that `exec` made in a bare namespace."""
    space: dict[str, Any] = {}
    exec("constant = lambda batch: batch.labels.float()", space)
    assert space["constant"].__module__ is None
    assert make_credit(space["constant"]).kind.own


def test_a_card_fills_in_what_follows_from_its_name() -> None:
    card = Card("new", "New", "an idea", "A Paper", "2600.00001", "2026", page="old")
    assert (card.objective, card.recipe, card.page) == ("new", "recipes/new.yaml", "docs/methods/old.md")
