"""The world `revision`: a reference answer of many filler words and a few tokens that depend on the reasoning."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tokengrain.batch import TokenBatch
from tokengrain.errors import DataError, RecipeError, require
from tokengrain.rollout.sampler import SamplingConfig
from tokengrain.worlds import chains
from tokengrain.worlds.arithmetic import CHECKED_STEP, SIZES, ArithmeticOptions, ArithmeticWorld, Size, most_steps
from tokengrain.worlds.base_models import EOS, check_option
from tokengrain.worlds.chains import LABELS, MARKER, Ending, Problem, parse_prompt, rng_of

WORDS = (
    (" next", " then"), (" we", " you"), (" now", " here"), (" take", " use"), (" the", " this"), (" given", " stated"),
    (" step", " part"), (" which", " that"), (" simply", " just"), (" leads", " goes"), (" on", " over"),
    (" to", " into"), (" our", " your"), (" new", " fresh"), (" running", " current"), (" total", " sum"),
)  # fmt: skip
"""Pairs of words that mean the same; a sentence takes one of each, in this order."""
START, END = " start", " end"
VOCABULARY = (*chains.SYMBOLS, START, END, *(word for pair in WORDS for word in pair))
Role = Literal["reasoning", "style", "fixed"]
"""What a token of a reference depends on: on the totals of the chain; on the style of its separators; on neither."""


@dataclass(frozen=True)
class Reference:
    """A reference answer: its symbols, `<end>` included, and what each of them depends on."""

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
    """An answer that restates a problem with totals (its own, or a chain's), and `filler` words for each step.

    After the separator `;` they are the first of their pairs with chance 0.5 + style, after `,` with 0.5 − style,
    without separators with 0.5. `last_only` leaves out all totals but the last.
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


@dataclass(frozen=True)
class RevisionOptions(ArithmeticOptions):
    """Options of the address `world://revision?...`; those of `arithmetic`, and:

    Args:
        levels: 1–3 by default (1–2 of the small size).
        filler: words per sentence of a reference, 16 by default, which is the most (4 of the small size).
        style: how much the chain's separators, which mean nothing, sway the choice of those words, below 0.5.
        totals: `all` running totals stand in a reference, or only the `last`: then the words' noise weighs more.
    """

    filler: int | None = None
    style: float = 0.3
    totals: str = "all"

    world: ClassVar[str] = "revision"

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.filler is None or 0 <= self.filler <= len(WORDS)
        require(fits, RecipeError, f"world revision: filler is {self.filler}; expected 0 to {len(WORDS)}")
        message = f"world revision: style is {self.style}; expected 0 or more and less than 0.5"
        require(0 <= self.style < 0.5, RecipeError, message)
        check_option("revision", "totals", self.totals, ("all", "last"))


class RevisionWorld(ArithmeticWorld):
    """For rewards that come from a reference text instead of a checker (DRO).

    A completion is a chain as in `arithmetic`, `>`, and an answer that restates the problem with the chain's totals
    among filler words; the true reward is 1 if the chain's last total is right. Rows have a `reference`, the right
    answer. How likely its totals are depends on the chain, and its words depend on the chain's separators, which mean
    nothing.
    """

    name = "revision"
    ending: Ending = "marker"
    vocabulary = VOCABULARY
    options: RevisionOptions

    def __init__(self, options: RevisionOptions | None = None) -> None:
        super().__init__(options or RevisionOptions())

    @property
    def size(self) -> Size:
        size = SIZES[self.options.size]
        if self.options.size == "small":
            return size
        return replace(size, levels=(1, 2, 3), warm_start=replace(size.warm_start, positions=384))

    @property
    def filler(self) -> int:
        given = self.options.filler
        return given if given is not None else 4 if self.options.size == "small" else len(WORDS)

    def _model_settings(self) -> dict[str, Any]:
        own = {"filler": self.filler, "style": self.options.style, "totals": self.options.totals}
        return super()._model_settings() | own

    def _longest(self, steps: int) -> int:
        """A chain in which every step is checked once, `>` and the answer."""
        return CHECKED_STEP * steps + 1 + self._reference(steps)

    def _reference(self, steps: int) -> int:
        """Tokens of a reference with all totals, `<end>` included."""
        return (self.filler + 8) * steps + 10

    def _positions(self, steps: int) -> int:
        """A chain may take all tokens that a completion may have, and the reference comes behind it."""
        return super()._positions(steps) + self._reference(steps)

    def completion(self, problem: Problem, rng: random.Random) -> str:
        chain = chains.write_chain(problem, rng)
        last, style = self.options.totals == "last", self.options.style
        answer = write_reference(problem, chain.totals, self.filler, rng, chain.separators, style, last_only=last)
        return f"{chain.text}{MARKER}{answer.text}"

    def sampling(self, seed: int, *, whole: bool = False) -> SamplingConfig:
        found = super().sampling(seed, whole=whole)
        if whole:
            return found
        return replace(
            found, max_new_tokens=CHECKED_STEP * most_steps(self.levels) + 1, stop_ids=(self.marker, self.eos)
        )

    @property
    def marker(self) -> int:
        return self._ids[MARKER]

    def write_reference(self, prompt: str) -> Reference:
        """The reference of a prompt, always the same: the right totals, and words by a coin for each."""
        rng = rng_of("reference", prompt)
        problem = parse_prompt(prompt)
        return write_reference(problem, problem.totals, self.filler, rng, last_only=self.options.totals == "last")

    def _row(self, problem: Problem, identity: str) -> dict[str, Any]:
        return super()._row(problem, identity) | {"reference": self.write_reference(problem.text).text}

    def reference_ids(self, reference: str) -> list[int]:
        """Token ids of a reference, `<end>` included."""
        return [*self.encode(reference), self.eos]

    def with_references(self, batch: TokenBatch) -> tuple[TokenBatch, Tensor]:
        """Sampled completions cut after their first `>`, with their prompt's reference behind it, which alone counts.

        Where there is no `>` the reference stands behind the whole, and its numbers mean nothing: the second value,
        bool `[C]`, says where there is one.
        """
        there = len(batch.raw) == batch.n_prompts and all("reference" in row for row in batch.raw)
        message = "the batch's rows have no reference"
        require(there, DataError, message, field="reference", expected="rows of `prompts`")
        completions = [batch.completion(c).tolist() for c in range(batch.n_completions)]
        usable = [self.marker in ids for ids in completions]
        cut = [ids[: ids.index(self.marker) + 1] if ends else ids for ids, ends in zip(completions, usable)]
        references = [self.reference_ids(row["reference"]) for row in batch.raw]
        return batch.with_endings(cut, references), torch.tensor(usable, device=batch.device)

    def reasoning_tokens(self, appended: TokenBatch) -> Tensor:
        """Reference tokens that depend on the reasoning, bool `[N]`, for a batch of `with_references`."""
        roles = [self.write_reference(problem.text).roles for problem in self.prompt_problems(appended)]
        marks = [role == "reasoning" for group in appended.group.tolist() for role in roles[group]]
        return torch.tensor(marks, device=appended.device)
