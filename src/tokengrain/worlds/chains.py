"""Sums with a chain of thought: problems, chains that go wrong as people do, their audit, rewards and measures.

A prompt such as `47a+8b-3:` states a start and labelled steps; a chain such as `a+855;b-352,>52` answers step by step.
The worlds `arithmetic` and `revision` are made of these.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import count, cycle
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tokengrain.errors import DataError, fingerprint
from tokengrain.evaluation.statistics import by_group, mean_over_prompts, sample_metrics
from tokengrain.rollout.sampler import Rollouts
from tokengrain.worlds.base_models import BOS, EOS, PAD

DIGITS, LABELS, MARKER = "0123456789", "abcdefgh", ">"
SPECIAL = (PAD, BOS, EOS)
SYMBOLS = (*SPECIAL, *DIGITS, *"+-;,?>:", *LABELS)  # the 28 tokens, by id
IDS = {symbol: i for i, symbol in enumerate(SYMBOLS)}
EASY = 2  # easy steps of every problem; a problem of level L has L − 1 hard ones besides
MAX_LEVEL = len(LABELS) - EASY + 1
HELD_OUT = 5  # one problem in so many is held out, whatever the seed; the base model has seen none of them either
TRIES = 1000  # draws after which a problem may come a second time
_PROMPT = re.compile(r"(\d\d)((?:[a-h][+-][1-9])+):")


def rng_of(*purpose: Any) -> random.Random:
    return random.Random(seed_of(*purpose))


def seed_of(*purpose: Any) -> int:
    """A non-negative 62-bit seed of its own for each purpose."""
    return int(fingerprint(["arithmetic", *purpose]), 16) >> 2


def applied(operator: str, total: int, operand: int) -> int:
    return (total + operand if operator == "+" else total - operand) % 100


def is_hard(operator: str, unit: int, operand: int) -> bool:
    """Whether a step carries or borrows. `unit` is the unit digit of the total before it."""
    return unit + operand > 9 if operator == "+" else unit < operand


@dataclass(frozen=True)
class Problem:
    """A problem: a two-digit start, and operator and operand (1–9) of steps a, b, ...; all totals are within 0–99."""

    start: int
    steps: tuple[tuple[str, int], ...]

    @cached_property
    def totals(self) -> tuple[int, ...]:
        totals = [self.start]
        for operator, operand in self.steps:
            totals.append(applied(operator, totals[-1], operand))
        return tuple(totals[1:])

    @property
    def answer(self) -> str:
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
    """A random problem of a level: its hard steps and the easy ones shuffled, each uniform among those that fit."""
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
    """Endless problems, held out or not, the levels taking turns; `distinct`: no two alike while there are others."""
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
    match = _PROMPT.fullmatch(text)
    steps = match.group(2) if match else ""
    if not match or steps[::3] != LABELS[: len(steps) // 3]:
        raise DataError("not a prompt of world arithmetic", field="prompt", value=text, expected="47a+8b-3c+9:")
    return Problem(int(match.group(1)), tuple(zip(steps[1::3], map(int, steps[2::3]))))


# Chains of thought that go wrong as people do: persistent misconceptions about hard facts, slips, checks.

RATES = (0.15, 0.60)  # range of the rate at which a misconception shows
SLIP = 0.02
CHECK = 0.15  # chance that a statement is checked again
CHECK_FACTOR = 0.3  # a check is wrong at this share of the rate at which the statement is
SEPARATORS = ";,"  # a step ends with one or the other, by a coin that means nothing


class Misconception(NamedTuple):
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


class Chain(NamedTuple):
    """A chain of thought: its steps such as `a+855;b-352?54,`, the total at the end of each, and their separators."""

    text: str
    totals: tuple[int, ...]
    separators: str


def write_chain(
    problem: Problem, rng: random.Random, beliefs: dict[tuple[str, int, int], Misconception] | None = None
) -> Chain:
    """A chain for a problem, each step from the total before it, right or wrong; no beliefs (`{}`): only slips."""
    beliefs = misconceptions() if beliefs is None else beliefs
    total, totals, text, separators = problem.start, [], "", ""
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


def shifted(total: int, digit: int, offset: int) -> int:
    """The total with one of its digits (0: tens, 1: units) moved on by `offset`, modulo 10."""
    digits = [total // 10, total % 10]
    digits[digit] = (digits[digit] + offset) % 10
    return 10 * digits[0] + digits[1]


Ending = Literal["answer", "marker"]
"""How a completion ends: `>`, two digits and the end; or (where something else follows) with `>`."""


def symbols(ids: Sequence[int]) -> list[str]:
    """Token ids as symbols; ids beyond this world's are shown as `<other>`."""
    return [SYMBOLS[i] if 0 <= i < len(SYMBOLS) else "<other>" for i in ids]


def upto(tokens: Sequence[str], ending: Ending) -> list[str]:
    """The tokens up to the first `<end>` (or `>`), which is included."""
    last = EOS if ending == "answer" else MARKER
    return list(tokens[: tokens.index(last) + 1]) if last in tokens else list(tokens)


def fits(token: str, kind: str) -> bool:
    """Whether a token is one of a kind: `<end>`, or one of these characters."""
    return token == kind if kind == EOS else len(token) == 1 and token in kind


def stated_answer(tokens: Sequence[str], ending: Ending = "answer") -> str | None:
    """The two digits that a completion ends with, or (with `marker`) the total before the last separator."""
    last = upto(tokens, ending)[-4:]
    kinds = (MARKER, DIGITS, DIGITS, EOS) if ending == "answer" else (DIGITS, DIGITS, ";,", MARKER)
    if len(last) < 4 or not all(fits(token, kind) for token, kind in zip(last, kinds)):
        return None
    return "".join(last[1:3] if ending == "answer" else last[:2])


def is_correct(problem: Problem, tokens: Sequence[str], ending: Ending = "answer") -> bool:
    """The reward: whether the completion ends with `>`, the right answer and `<end>`.

    With `ending="marker"`: whether it comes to `>`, and the total before the last separator is right.
    """
    return stated_answer(tokens, ending) == problem.answer


class Step(NamedTuple):
    """A step as written: places of the first token, and of the total's two digits that are in force."""

    first: int
    total: int


def read(tokens: Sequence[str], n_steps: int, ending: Ending = "answer") -> tuple[list[Step], int | None]:
    """The steps that state a total, and the place of the first token that cannot stand there, if there is one."""
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


Kind = Literal["sum", "copy", "format", "answer", "truncation"]


@dataclass(frozen=True)
class Audit:
    """Whether a chain's reward is 1; if not, the culprit's place among its tokens (None: it has none) and kind.

    `sum`: a digit of a total; `copy`: a label, operator or operand of a step whose total is wrong; `format`: a token
    that cannot stand there; `answer`: a digit after `>` that is not the last total's; `truncation`: the last of an
    endless one.
    """

    correct: bool
    index: int | None = None
    kind: Kind | None = None


def audit(problem: Problem, tokens: Sequence[str], ending: Ending = "answer") -> Audit:
    """Find the culprit of a completion whose reward is 0: it lies in the first of the steps that stay wrong to the end.

    A wrong total that a check corrects, or that a later step makes up for, is not to blame.
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


Texts = Sequence[str]
Ids = Sequence[Sequence[int]] | None
Cut = Sequence[bool] | None


def completion_symbols(completions: Texts, completion_ids: Ids, truncated: Cut) -> list[list[str]]:
    """Completions as symbols: from their ids, or from their texts (which end unless `truncated`)."""
    if completion_ids is not None:
        return [symbols(ids) for ids in completion_ids]
    ends = [[EOS]] * len(completions) if truncated is None else [[] if short else [EOS] for short in truncated]
    return [[*text.removesuffix(EOS), *end] for text, end in zip(completions, ends, strict=True)]


def correct(
    prompts: Texts, completions: Texts, completion_ids: Ids = None, truncated: Cut = None, *, ending: Ending = "answer"
) -> list[float]:
    """1 for completions that end with `>`, the right two digits and `<end>`, else 0; see `is_correct` for "marker"."""
    tokens = completion_symbols(completions, completion_ids, truncated)
    return [float(is_correct(parse_prompt(p), chain, ending)) for p, chain in zip(prompts, tokens, strict=True)]


def chain_metrics(
    problems: Sequence[Problem], rollouts: Rollouts, ending: Ending, k: int | None
) -> dict[str, float | None]:
    """Measures of a policy's samples, n of each problem; None where there are no samples of that kind.

    Those of `sample_metrics`, also by level as `accuracy_level_L` and `pass@k_level_L`, each with `_low` and `_high`;
    `length`, `length_correct`, `length_wrong` in tokens; shares `truncated`, `well_formed`; `culprit_KIND` of wrong
    ones.
    """
    tokens = [[symbols(c.ids) for c in group] for group in rollouts.groups]
    audits = [[audit(p, t, ending) for t in group] for p, group in zip(problems, tokens, strict=True)]
    correct = torch.tensor([[a.correct for a in group] for group in audits])
    answers = [[stated_answer(t, ending) for t in group] for group in tokens]
    per_prompt = sample_metrics(correct, answers, k)
    k = correct.shape[1] if k is None else k
    found: dict[str, float | None] = {}
    for name, values in per_prompt.items():
        found |= mean_over_prompts(values).named(name)
    levels = [p.level for p in problems]
    for name in ("accuracy", f"pass@{k}"):
        groups = by_group(per_prompt[name], levels)
        for level in sorted(set(levels)):
            found |= groups[level].named(f"{name}_level_{level}")
    lengths = torch.tensor([[float(len(c.ids)) for c in group] for group in rollouts.groups])
    for suffix, kept in (("", torch.ones_like(correct)), ("_correct", correct), ("_wrong", ~correct)):
        found[f"length{suffix}"] = _mean(lengths[kept])
    formed = [[read(t, len(p.steps), ending)[1] is None for t in group] for p, group in zip(problems, tokens)]
    found["truncated"] = _mean(rollouts.truncated.float())
    found["well_formed"] = _mean(torch.tensor(formed).float())
    kinds = [a.kind for group in audits for a in group if not a.correct]
    for kind in get_args(Kind):
        found[f"culprit_{kind}"] = kinds.count(kind) / len(kinds) if kinds else None
    return found


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if values.numel() else None
