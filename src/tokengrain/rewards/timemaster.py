"""TimeMaster's reward: a form, a right class, and what a judge says of the rest (arXiv 2506.13705).

    r = 0.9 · hard + 0.1 · format + 0.5 · soft · [hard = 1, format = 1, there is an extension]

for completions `<think> … </think> <class> … </class>`, with `<extension> … </extension>` behind them where the task
asks for it. The gate keeps a judge from making a wrong class worth more than a right one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from tokengrain.errors import RecipeError, fingerprint, require, shown
from tokengrain.rewards.suite import RewardError, column_of, unreadable
from tokengrain.settings import NonNegative, Share, load_callable

Parser = Literal["strict", "first_valid_label", "first_block"]
Extension = Literal["none", "optional", "required"]
Judges = Callable[[list[str], list[str], list[str]], Sequence[float | None]]

GENERIC = (
    r"further (?:diagnostic )?tests",
    "clinical history",
    "physical examination",
    "refer to specialist",
    "confirm the diagnosis",
)
INSIDE = r"((?:(?!</?(?:think|class|extension)>).)*)"
FORM = re.compile(
    rf"\s*<think>{INSIDE}</think>\s*<class>{INSIDE}</class>\s*(?:<extension>{INSIDE}</extension>\s*)?", re.DOTALL
)
BLOCK = {tag: re.compile(rf"<{tag}>(.*?)</{tag}>", re.DOTALL) for tag in ("think", "class", "extension")}


class Answer(NamedTuple):
    """A completion, read: whether its form is right, its class (None: none of the labels), its other parts."""

    form: bool
    label: str | None
    reasoning: str = ""
    extension: str = ""


def strict_form(text: str, extension: Extension = "optional") -> re.Match[str] | None:
    """The tagged parts in order, each once and not empty, nothing else; None if the text is not of that form."""
    found = FORM.fullmatch(text)
    if found is None or not all(part is None or part.strip() for part in found.groups()):
        return None
    unwanted = {"none": True, "required": False, "optional": None}[extension]
    return None if (found[3] is not None) is unwanted else found


def _plain(text: str) -> str:
    return text.strip().casefold()


@dataclass(kw_only=True, eq=False)
class TimeMaster:
    """The composite reward of TimeMaster.

    Args:
        labels: all classes, compared without regard to case and spaces around them.
        column: the right class.
        parser: "strict": the completion must be of the form, special tokens aside. As the authors' code has it,
            "first_valid_label": the first class block that holds a label counts, wherever it stands, and makes the
            form right; "first_block": the first class block does, and must hold one.
        extension: whether a strict form has one: "none", "optional" or "required".
        accuracy, format, soft: weights of the parts; soft 0: no judge is asked.
        judge: scores in [0, 1] of answers with a right class: `judge(reasonings, classes, extensions)`, called with
            lists, or an import string of one. It is asked once about equal answers. None, no number, a number out
            of range, an error, and another number of scores than answers are failures, worth 0 and counted.
        generic: regular expressions; an extension in which one is found, in small letters, has at most `cap`.
    """

    name: ClassVar[str] = "timemaster"
    labels: list[str]
    column: str = "label"
    parser: Parser = "strict"
    extension: Extension = "optional"
    accuracy: NonNegative = 0.9
    format: NonNegative = 0.1
    soft: NonNegative = 0.5
    judge: Callable[..., Any] | str | None = None
    generic: list[str] = field(default_factory=lambda: list(GENERIC))
    cap: Share = 0.4

    def __post_init__(self) -> None:
        self._labels = [_plain(label) for label in self.labels]
        different = self._labels and all(self._labels) and len(set(self._labels)) == len(self._labels)
        what = f"reward {self.name!r}: labels are {self.labels}; expected different ones, none empty"
        require(different, RecipeError, what)
        try:
            self._generic = [re.compile(pattern) for pattern in self.generic]
        except re.error as error:
            raise RecipeError(f"reward {self.name!r}: generic: {error}") from None
        labels = "|".join(map(re.escape, self._labels))
        self._valid = re.compile(rf"<class>\s*((?i:{labels}))\s*</class>")
        self._judge: Judges | None = load_callable(self.judge) if isinstance(self.judge, str) else self.judge
        self._scores: dict[str, float] = {}
        self.counts: dict[str, float] = {}

    def __call__(
        self, completions: Sequence[str], prompt_ends: Sequence[str] | None = None, **columns: Any
    ) -> list[float]:
        truths = [self.gold(value) for value in column_of(columns, self.column, self.name)]
        ends = prompt_ends or [""] * len(completions)
        opened = ["<think>" * end.rstrip().endswith("<think>") + text for text, end in zip(completions, ends)]
        answers = [self.read(text) for text in opened]
        hard = [a.form and a.label == truth for a, truth in zip(answers, truths, strict=True)]
        soft = self._judged([a if right and a.extension else None for a, right in zip(answers, hard)])
        parts: dict[str, list[Any]] = {"format": [a.form for a in answers], "hard": hard, "soft": soft}
        self.counts |= {f"{self.name}/{part}": float(sum(values)) for part, values in parts.items()}
        weights = self.format, self.accuracy, self.soft
        return [sum(w * float(v) for w, v in zip(weights, values)) for values in zip(*parts.values(), strict=True)]

    def read(self, completion: str) -> Answer:
        """The parts of a completion, by the parser."""
        if self.parser == "strict":
            found = strict_form(completion, self.extension)
            if found is None:
                return Answer(False, None)
            reasoning, label, extension = (part or "" for part in found.groups())
            return Answer(True, self._known(label), reasoning, extension.strip())
        block = (self._valid if self.parser == "first_valid_label" else BLOCK["class"]).search(completion)
        label = self._known(block[1]) if block else None
        rest = [found[1].strip() if (found := BLOCK[tag].search(completion)) else "" for tag in ("think", "extension")]
        return Answer(label is not None, label, *rest)

    def _known(self, label: str) -> str | None:
        return _plain(label) if _plain(label) in self._labels else None

    def gold(self, value: Any) -> str:
        """The right class, read. Raises `RewardError` if it is none of the labels."""
        known = self._known(str(value))
        what = f"the column {self.column!r} is {shown(value)}; expected one of {self.labels}"
        require(known is not None, RewardError, what)
        return str(known)

    def unreadable(self, values: Sequence[Any]) -> Iterator[tuple[int, str]]:
        """Which of the column's values are no class, and why: before anything is sampled."""
        return unreadable(self.gold, values)

    def _judged(self, answers: Sequence[Answer | None]) -> list[float]:
        """Soft scores; 0 where there is nothing to judge, or the judge failed."""
        asked = {} if self._judge is None or not self.soft else {_key(a): a for a in answers if a is not None}
        new = {key: a for key, a in asked.items() if key not in self._scores}
        failures = self._ask(new) if new else 0
        counts = {"judged": len(new), "cached": len(asked) - len(new), "judge_failures": failures}
        self.counts = {f"{self.name}/{what}": float(count) for what, count in counts.items()}
        return [0.0 if a is None else self._scores.get(_key(a), 0.0) for a in answers]

    def _ask(self, new: dict[str, Answer]) -> int:
        """Ask about answers that have no score yet, all at once; returns how many still have none."""
        assert self._judge is not None
        lists = [list(part) for part in zip(*((a.reasoning, str(a.label), a.extension) for a in new.values()))]
        try:
            scores: list[Any] = list(self._judge(*lists))
        except Exception:  # whatever a judge raises: its answers are worth 0, and counted
            scores = []
        # Of too few or too many scores nobody knows which is whose.
        for (key, answer), score in zip(new.items(), scores) if len(scores) == len(new) else ():
            try:
                value = float(score)
            except (TypeError, ValueError):
                continue
            if 0 <= value <= 1:
                bland = any(pattern.search(answer.extension.lower()) for pattern in self._generic)
                self._scores[key] = min(value, self.cap) if bland else value
        return sum(key not in self._scores for key in new)


def _key(answer: Answer) -> str:
    return fingerprint([answer.reasoning, answer.label, answer.extension])
