"""Reference answers of the world `revision`: filler words around running totals."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tokengrain.worlds.arithmetic.problems import EOS, LABELS, SYMBOLS, Problem

WORDS = (
    (" next", " then"), (" we", " you"), (" now", " here"), (" take", " use"), (" the", " this"), (" given", " stated"),
    (" step", " part"), (" which", " that"), (" simply", " just"), (" leads", " goes"), (" on", " over"),
    (" to", " into"), (" our", " your"), (" new", " fresh"), (" running", " current"), (" total", " sum"),
)  # fmt: skip
"""Pairs of words that mean the same; a sentence takes one of each, in this order."""
START, END = " start", " end"
VOCABULARY = (*SYMBOLS, START, END, *(word for pair in WORDS for word in pair))

Role = Literal["reasoning", "style", "fixed"]
"""What a token of a reference depends on: on the totals of the chain; on the style of its separators; on neither."""


@dataclass(frozen=True)
class Reference:
    """A reference answer.

    Attributes:
        tokens: symbols, `<end>` included.
        roles: what each of them depends on.
    """

    tokens: tuple[str, ...]
    roles: tuple[Role, ...]

    @property
    def text(self) -> str:
        """Without `<end>`."""
        return "".join(self.tokens[:-1])


def write_reference(
    problem: Problem,
    totals: Sequence[int],
    filler: int,
    rng: random.Random,
    separators: str | None = None,
    style: float = 0.0,
    *,
    last_only: bool = False,
) -> Reference:
    """An answer that restates a problem with totals, a sentence for each step.

    Args:
        totals: of each step: the problem's own for a reference, a chain's for what the base model says.
        filler: words per sentence.
        separators: the chain's; after `;` a sentence's words are the first of their pairs with chance 0.5 + style,
            after `,` with 0.5 − style. None: always 0.5.
        last_only: leave out all totals but the last.
    """
    tokens: list[str] = []
    roles: list[Role] = []

    def add(words: Sequence[str], role: Role) -> None:
        tokens.extend(words)
        roles.extend([role] * len(words))

    add([START, ":", *f"{problem.start:02d}", ";"], "fixed")
    for i, (operator, operand) in enumerate(problem.steps):
        tilt = 0.0 if separators is None else style if separators[i] == ";" else -style
        add([pair[rng.random() >= 0.5 + tilt] for pair in WORDS[:filler]], "style")
        add([",", LABELS[i], operator, str(operand)], "fixed")
        if not last_only:
            add([":"], "fixed")
            add(f"{totals[i]:02d}", "reasoning")
        add([";"], "fixed")
    add([END, ":"], "fixed")
    add(f"{totals[-1]:02d}", "reasoning")
    add([EOS], "fixed")
    return Reference(tuple(tokens), tuple(roles))
