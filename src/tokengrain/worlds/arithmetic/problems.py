"""Problems of the world `arithmetic`: a start and labelled additions and subtractions, such as `47a+8b-3c+9:`."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import count, cycle
from typing import Any, Literal

from tokengrain.errors import DataError
from tokengrain.files import fingerprint
from tokengrain.worlds.tokenizer import BOS, EOS, PAD

Split = Literal["train", "eval"]
DIGITS, LABELS = "0123456789", "abcdefgh"
SPECIAL = (PAD, BOS, EOS)
SYMBOLS = (*SPECIAL, *DIGITS, *"+-;,?>:", *LABELS)
"""The 28 tokens, by id."""
IDS = {symbol: i for i, symbol in enumerate(SYMBOLS)}
EASY = 2
"""Easy steps of every problem; a problem of level L has L − 1 hard ones besides."""
MAX_LEVEL = len(LABELS) - EASY + 1
HELD_OUT = 5
"""One problem in so many is held out, whatever the seed; the base model has seen none of them either."""
TRIES = 1000
"""Draws after which a problem may come a second time."""
_PROMPT = re.compile(r"(\d\d)((?:[a-h][+-][1-9])+):")


def applied(operator: str, total: int, operand: int) -> int:
    """`total ± operand`, modulo 100, as two digits are written."""
    return (total + operand if operator == "+" else total - operand) % 100


def is_hard(operator: str, unit: int, operand: int) -> bool:
    """Whether a step carries or borrows. `unit` is the unit digit of the total before it."""
    return unit + operand > 9 if operator == "+" else unit < operand


@dataclass(frozen=True)
class Problem:
    """A problem. All its running totals lie within 0–99.

    Attributes:
        start: two digits.
        steps: operator and operand (1–9) of each step; the labels are a, b, c, ... in this order.
    """

    start: int
    steps: tuple[tuple[str, int], ...]

    @cached_property
    def totals(self) -> tuple[int, ...]:
        """The running total after each step."""
        totals = [self.start]
        for operator, operand in self.steps:
            totals.append(applied(operator, totals[-1], operand))
        return tuple(totals[1:])

    @property
    def answer(self) -> str:
        """The last total, as two digits."""
        return f"{self.totals[-1]:02d}"

    @property
    def level(self) -> int:
        """One more than the hard steps."""
        before = (self.start, *self.totals)
        return 1 + sum(is_hard(op, total % 10, d) for (op, d), total in zip(self.steps, before))

    @property
    def text(self) -> str:
        """The prompt."""
        return f"{self.start:02d}{''.join(f'{a}{op}{d}' for a, (op, d) in zip(LABELS, self.steps))}:"

    @property
    def held_out(self) -> bool:
        return int(fingerprint(self.text), 16) % HELD_OUT == 0


def make_problem(level: int, rng: random.Random, largest: int = 9) -> Problem:
    """A random problem of a level: its hard steps and the easy ones shuffled, each uniform among those that fit.

    Args:
        largest: the largest operand.
    """
    while True:
        start = total = rng.randint(10, 99)
        kinds = [True] * (level - 1) + [False] * EASY
        rng.shuffle(kinds)
        steps: list[tuple[str, int]] = []
        for hard in kinds:
            fitting = [
                (op, d)
                for op in "+-"
                for d in range(1, largest + 1)
                if is_hard(op, total % 10, d) == hard and 0 <= (total + d if op == "+" else total - d) <= 99
            ]
            if not fitting:
                break
            steps.append(rng.choice(fitting))
            total = applied(steps[-1][0], total, steps[-1][1])
        if len(steps) == len(kinds):
            return Problem(start, tuple(steps))


def problem_stream(
    levels: Sequence[int], rng: random.Random, largest: int = 9, *, held_out: bool, distinct: bool = True
) -> Iterator[Problem]:
    """Endless problems, the levels taking turns.

    Args:
        largest: the largest operand.
        held_out: only problems that are held out, or only others.
        distinct: no two alike while there are others.
    """
    seen: set[str] = set()
    for level in cycle(levels):
        for attempt in count():
            problem = make_problem(level, rng, largest)
            if problem.held_out == held_out and (problem.text not in seen or attempt > TRIES):
                break
        if distinct:
            seen.add(problem.text)
        yield problem


@lru_cache(maxsize=65536)
def parse_prompt(text: str) -> Problem:
    """The problem that a prompt states.

    Raises:
        DataError: not a prompt of this world.
    """
    match = _PROMPT.fullmatch(text)
    steps = match.group(2) if match else ""
    if not match or steps[::3] != LABELS[: len(steps) // 3]:
        raise DataError("not a prompt of world arithmetic", field="prompt", value=text, expected="47a+8b-3c+9:")
    return Problem(int(match.group(1)), tuple(zip(steps[1::3], map(int, steps[2::3]))))


def rng_of(*purpose: Any) -> random.Random:
    """A random generator of its own for each purpose."""
    return random.Random(seed_of(*purpose))


def seed_of(*purpose: Any) -> int:
    """A non-negative 62-bit seed of its own for each purpose."""
    return int(fingerprint(["arithmetic", *purpose]), 16) >> 2
