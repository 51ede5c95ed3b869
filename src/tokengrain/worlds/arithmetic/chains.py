"""Chains of thought that go wrong as people do: persistent misconceptions about hard facts, slips, re-checks."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

from tokengrain.worlds.arithmetic.problems import LABELS, Problem, applied, is_hard, rng_of

RATES = (0.15, 0.60)
"""Range of the rate at which a misconception shows."""
SLIP = 0.02
CHECK = 0.15
"""Chance that a statement is checked again."""
CHECK_FACTOR = 0.3
"""A check is wrong at this share of the rate at which the statement is."""
SEPARATORS = ";,"
"""A step ends with one or the other, by a coin that means nothing."""


def shifted(total: int, digit: int, offset: int) -> int:
    """The total with one of its digits (0: tens, 1: units) moved on by `offset`, modulo 10."""
    digits = [total // 10, total % 10]
    digits[digit] = (digits[digit] + offset) % 10
    return 10 * digits[0] + digits[1]


@dataclass(frozen=True)
class Misconception:
    """What somebody believes about a fact: at this `rate` this `digit` comes out wrong, always by `offset`."""

    rate: float
    digit: int
    offset: int


@lru_cache(maxsize=8)
def misconceptions(seed: int = 0) -> dict[tuple[str, int, int], Misconception]:
    """One for each hard fact, by (operator, unit digit, operand): 90 of them."""
    rng = rng_of("misconceptions", seed)
    facts = [(op, unit, d) for op in "+-" for unit in range(10) for d in range(1, 10) if is_hard(op, unit, d)]
    return {fact: Misconception(rng.uniform(*RATES), rng.randrange(2), rng.randint(1, 9)) for fact in facts}


@dataclass(frozen=True)
class Chain:
    """A chain of thought.

    Attributes:
        text: its steps, such as `a+855;b-352?54,`.
        totals: the totals that stand at the end, one for each step.
        separators: the style of each step.
    """

    text: str
    totals: tuple[int, ...]
    separators: str


def write_chain(
    problem: Problem, rng: random.Random, beliefs: dict[tuple[str, int, int], Misconception] | None = None
) -> Chain:
    """A chain for a problem; it goes on from its own totals, right or wrong.

    Args:
        beliefs: misconceptions by fact (None: those of the base model; empty: only slips).
    """
    beliefs = misconceptions() if beliefs is None else beliefs
    total, text = problem.start, ""
    totals, separators = [], ""
    for label, (operator, operand) in zip(LABELS, problem.steps):
        truth = applied(operator, total, operand)
        belief = beliefs.get((operator, total % 10, operand))
        rate = belief.rate if belief else 0.0
        total = _stated(truth, belief, rate, SLIP, rng)
        text += f"{label}{operator}{operand}{total:02d}"
        if rng.random() < CHECK:
            total = _stated(truth, belief, CHECK_FACTOR * rate, CHECK_FACTOR * SLIP, rng)
            text += f"?{total:02d}"
        separators += rng.choice(SEPARATORS)
        text += separators[-1]
        totals.append(total)
    return Chain(text, tuple(totals), separators)


def _stated(truth: int, belief: Misconception | None, rate: float, slip: float, rng: random.Random) -> int:
    total = shifted(truth, belief.digit, belief.offset) if belief and rng.random() < rate else truth
    return shifted(total, rng.randrange(2), rng.randint(1, 9)) if rng.random() < slip else total
