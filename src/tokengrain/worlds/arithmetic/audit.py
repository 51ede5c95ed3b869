"""Where a chain goes wrong: the first wrong token of the statement that is in force."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tokengrain.worlds.arithmetic.problems import DIGITS, EOS, LABELS, SYMBOLS, Problem

Ending = Literal["answer", "marker"]
"""How a completion ends: `>`, two digits and the end; or (where something else follows) with `>`."""
Kind = Literal["sum", "copy", "format", "answer", "truncation"]
MARKER = ">"


@dataclass(frozen=True)
class Audit:
    """What became of a chain.

    Attributes:
        correct: whether the reward is 1.
        index: place of the culprit among the completion's tokens; None for a correct chain, or one without tokens.
        kind: `sum`, a digit of a total; `copy`, a label, operator or operand of a step whose total is wrong; `format`,
            a token that cannot stand where it stands; `answer`, a digit after `>` that is not the last total's;
            `truncation`, the last token of a chain that never ends. None for a correct chain.
    """

    correct: bool
    index: int | None = None
    kind: Kind | None = None


@dataclass(frozen=True)
class Step:
    """A step as written: places of the first token, and of the total's two digits that are in force."""

    first: int
    total: int


def symbols(ids: Sequence[int]) -> list[str]:
    """Token ids as symbols; ids beyond this world's are shown as `<other>`."""
    return [SYMBOLS[i] if 0 <= i < len(SYMBOLS) else "<other>" for i in ids]


def upto(tokens: Sequence[str], ending: Ending) -> list[str]:
    """The tokens up to the first `<end>` (or `>`), which is included."""
    last = EOS if ending == "answer" else MARKER
    return list(tokens[: tokens.index(last) + 1]) if last in tokens else list(tokens)


def is_correct(problem: Problem, tokens: Sequence[str], ending: Ending = "answer") -> bool:
    """The reward: whether the completion ends with `>`, the right answer and `<end>`.

    With `ending="marker"`: whether it comes to `>`, and the total before the last separator is right.
    """
    tokens = upto(tokens, ending)
    if ending == "answer":
        return tokens[-4:] == [MARKER, *problem.answer, EOS]
    return len(tokens) > 3 and tokens[-4:-2] == [*problem.answer] and tokens[-2] in ";," and tokens[-1] == MARKER


def read(tokens: Sequence[str], n_steps: int, ending: Ending = "answer") -> tuple[list[Step], int | None]:
    """Read a chain step by step.

    Returns:
        The steps that state a total, and the place of the first token that cannot stand where it stands
        (`len(tokens)` if the chain stops too early; None if there is none).
    """
    tokens = [*upto(tokens, ending), ""]
    steps: list[Step] = []
    at = 0

    def misfit(kinds: Sequence[str]) -> int | None:
        return next((at + i for i, kind in enumerate(kinds) if not fits(tokens[at + i], kind)), None)

    for _ in range(n_steps):
        first = at
        if (wrong := misfit((LABELS, "+-", DIGITS, DIGITS, DIGITS))) is not None:
            return steps, wrong
        at += 5
        steps.append(Step(first, at - 2))
        while tokens[at] == "?":
            if (wrong := misfit(("?", DIGITS, DIGITS))) is not None:
                return steps, wrong
            at += 3
            steps[-1] = Step(first, at - 2)
        if (wrong := misfit((";,",))) is not None:
            return steps, wrong
        at += 1
    tail = (MARKER, DIGITS, DIGITS, EOS) if ending == "answer" else (MARKER,)
    return steps, misfit(tail)


def fits(token: str, kind: str) -> bool:
    """Whether a token is one of a kind: `<end>`, or one of these characters."""
    return token == kind if kind == EOS else len(token) == 1 and token in kind


def audit(problem: Problem, tokens: Sequence[str], ending: Ending = "answer") -> Audit:
    """Find the culprit of a completion whose reward is 0.

    Totals are compared with the true ones. A wrong total that a check corrects, or that a later step makes up for, is
    not to blame: the culprit lies in the first step of those that stay wrong to the end.
    """
    tokens = upto(tokens, ending)
    if is_correct(problem, tokens, ending):
        return Audit(True)
    steps, misfit = read(tokens, len(problem.steps), ending)
    culprit: Audit | None = None
    for i, step in enumerate(steps):
        stated, truth = tokens[step.total : step.total + 2], f"{problem.totals[i]:02d}"
        if stated == [*truth]:
            culprit = None
        elif culprit is None:
            copied = _miscopied(problem, tokens, i, step.first)
            place = step.total + (stated[0] == truth[0])
            culprit = Audit(False, place, "sum") if copied is None else Audit(False, copied, "copy")
    if culprit is not None:
        return culprit
    if ending == "answer" and MARKER in tokens and (misfit is None or misfit > tokens.index(MARKER) + 1):
        answer = tokens.index(MARKER) + 1
        written = tokens[answer : answer + 2 if misfit is None else misfit]
        wrong = next((answer + i for i, (a, b) in enumerate(zip(written, problem.answer)) if a != b), None)
        if wrong is not None:
            return Audit(False, wrong, "answer")
    assert misfit is not None  # every token fits and the last total is right, so the answer is
    if len(steps) < len(problem.steps):
        first = steps[-1].total + 3 if steps else 0
        if first < misfit and (copied := _miscopied(problem, tokens, len(steps), first)) is not None:
            return Audit(False, copied, "copy")
    if misfit >= len(tokens):
        return Audit(False, len(tokens) - 1 if tokens else None, "truncation")
    return Audit(False, misfit, "format")


def _miscopied(problem: Problem, tokens: Sequence[str], index: int, first: int) -> int | None:
    """Place of the first token of a step's label, operator and operand that is not the problem's."""
    operator, operand = problem.steps[index]
    expected = (LABELS[index], operator, str(operand))
    written = tokens[first : first + 3]
    return next((first + i for i, (a, b) in enumerate(zip(written, expected)) if a != b), None)
