"""TimeMaster's composite reward."""

from __future__ import annotations

from typing import Any

import pytest

from tokengrain.errors import RecipeError
from tokengrain.rewards.builtin import check_reward, make_reward
from tokengrain.rewards.suite import RewardError
from tokengrain.rewards.timemaster import TimeMaster

LABELS = ["impulsive", "impulsive pair", "c++ (x)"]


def text(label: str, extension: str | None = None, think: str = "t") -> str:
    tail = "" if extension is None else f"\n<extension>{extension}</extension>"
    return f"<think>{think}</think>\n<class>{label}</class>{tail}"


def reward(texts: list[str], truth: str = "Impulsive", **settings: Any) -> list[float]:
    return TimeMaster(labels=LABELS, **settings)(texts, label=[truth] * len(texts))


def test_strict() -> None:
    given = [
        text(" IMPULSIVE "),
        text("impulsive pair"),
        text("sine"),
        text("impulsive") + " indeed",
        "<class>impulsive</class>",
        "<think>a</think><class>impulsive</class><class>impulsive</class>",
        "<think>a <class>impulsive</class></think><class>impulsive</class>",
        text("impulsive", think="  "),
        "",
    ]
    assert reward(given) == pytest.approx([1, 0.1, 0.1, 0, 0, 0, 0, 0, 0])


def test_an_opened_think_in_the_prompt_counts() -> None:
    assert reward(["t</think><class>impulsive</class>"]) == [0]
    opened = TimeMaster(labels=LABELS)(
        ["t</think><class>impulsive</class>"], prompt_ends=["<think>\n"], label=["impulsive"]
    )
    assert opened == [1.0]


@pytest.mark.parametrize(("extension", "expected"), [("none", [1, 0]), ("optional", [1, 1]), ("required", [0, 1])])
def test_extensions(extension: Any, expected: list[float]) -> None:
    assert reward([text("impulsive"), text("impulsive", "see")], extension=extension) == expected


def test_lenient_parsers() -> None:
    given = ["<class>x</class> <class> Impulsive </class>", "<think><class>impulsive</class></think> no"]
    assert reward(given, parser="first_valid_label") == [1, 1]
    assert reward(given, parser="first_block") == [0, 1]
    assert reward(["<class>c++ (X)</class>"], "C++ (x)", parser="first_valid_label") == [1]
    assert reward(["<class>impulsive"], parser="first_block") == [0]


def test_a_judge_cannot_make_a_wrong_answer_worth_more() -> None:
    judge = TimeMaster(labels=LABELS, judge=lambda r, c, e: [1.0] * len(r))
    given = [
        text("impulsive", "see"),
        text("impulsive pair", "see"),
        text("impulsive"),
        text("impulsive", "Clinical History"),
    ]
    assert judge(given, label=["impulsive"] * 4) == pytest.approx([1.5, 0.1, 1.0, 1.2])
    assert judge.counts["timemaster/judged"] == 2


def test_a_judge_is_asked_once_and_its_failures_are_counted() -> None:
    asked: list[list[str]] = []

    def judge(reasonings: list[str], classes: list[str], extensions: list[str]) -> list[float | None]:
        asked.append(extensions)
        return [{"good": 0.5, "none": None, "high": 1.5, "nan": float("nan")}[e] for e in extensions]

    scored = TimeMaster(labels=LABELS, judge=judge)
    given = [text("impulsive", e) for e in ("good", "none", "high", "nan", "good")]
    assert scored(given, label=["impulsive"] * 5) == [1.25, 1, 1, 1, 1.25]
    assert asked == [["good", "none", "high", "nan"]]
    assert scored.counts["timemaster/judge_failures"] == 3
    assert scored(given[:1], label=["impulsive"]) == [1.25]
    assert len(asked) == 1
    assert scored.counts["timemaster/cached"] == 1


def broken(*lists: list[str]) -> list[float]:
    raise OSError("no network")


@pytest.mark.parametrize("scores", [["good", 0.5], [0.5], [0.5, 0.5, 0.5], [[], 0.5]])
def test_what_is_no_score_is_a_failure(scores: list[Any]) -> None:
    """Of another number of scores than answers nobody knows whose they are: all fail."""
    scored = TimeMaster(labels=LABELS, judge=lambda r, c, e: scores)
    given = [text("impulsive", "one"), text("impulsive", "two")]
    assert scored(given, label=["impulsive"] * 2) == pytest.approx([1, 1.25 if len(scores) == 2 else 1])
    assert scored.counts["timemaster/judge_failures"] == (1 if len(scores) == 2 else 2)


def test_a_judge_that_raises_is_worth_nothing() -> None:
    scored = TimeMaster(labels=LABELS, judge=broken)
    assert scored([text("impulsive", "see")], label=["impulsive"]) == [1.0]
    assert scored.counts["timemaster/judge_failures"] == 1


def test_as_a_named_reward() -> None:
    made = make_reward("timemaster", labels=LABELS, judge="tests.rewards.test_timemaster:broken", weight=2.0)
    assert made.name == "timemaster"
    assert made.function([text("impulsive")], label=["impulsive"]) == [1.0]
    assert check_reward("timemaster", {"labels": LABELS})["soft"] == 0.5
    assert list(made.function.unreadable(["Impulsive", "sine"])) == [
        (1, f"the column 'label' is 'sine'; expected one of {LABELS}")
    ]
    with pytest.raises(RewardError, match="the column 'label' is 'sine'; expected one of"):
        made.function([text("impulsive")], label=["sine"])
    with pytest.raises(RewardError, match="needs the column 'label'; the rows have \\['other'\\]"):
        made.function([text("impulsive")], other=["sine"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": []}, "expected different ones, none empty"),
        ({"labels": ["a", "A "]}, "expected different ones, none empty"),
        ({"labels": ["a"], "parser": "loose"}, "parser = 'loose'"),
        ({"labels": ["a"], "cap": 2}, "cap = 2"),
        ({"labels": ["a"], "generic": ["("]}, "generic: missing"),
        ({}, "'labels' is missing"),
    ],
)
def test_settings_that_do_not_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_reward("timemaster", settings)
