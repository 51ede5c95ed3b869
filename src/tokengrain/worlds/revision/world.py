"""The world `revision`: a reference answer of many filler words and a few tokens that depend on the reasoning."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from tokengrain.batch import TokenBatch
from tokengrain.errors import DataError, RecipeError
from tokengrain.worlds.arithmetic.audit import MARKER, Ending
from tokengrain.worlds.arithmetic.chains import write_chain
from tokengrain.worlds.arithmetic.model import CHECKED_STEP, longest_problem
from tokengrain.worlds.arithmetic.options import SIZES, ArithmeticOptions, Size
from tokengrain.worlds.arithmetic.problems import Problem, parse_prompt, rng_of
from tokengrain.worlds.arithmetic.world import ArithmeticWorld
from tokengrain.worlds.revision.appending import AppendedReferences, append_references
from tokengrain.worlds.revision.references import VOCABULARY, WORDS, Reference, Role, write_reference

if TYPE_CHECKING:
    from tokengrain.rollout import SamplingConfig


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
        if self.filler is not None and not 0 <= self.filler <= len(WORDS):
            raise RecipeError(f"world revision: filler is {self.filler}; expected 0 to {len(WORDS)}")
        if not 0 <= self.style < 0.5:
            raise RecipeError(f"world revision: style is {self.style}; expected 0 or more and less than 0.5")
        if self.totals not in ("all", "last"):
            raise RecipeError(f"world revision: totals is {self.totals!r}; expected all or last")


class RevisionWorld(ArithmeticWorld):
    """For rewards that come from a reference text instead of a checker (DRO).

    A completion is a chain as in `arithmetic`, `>` and an answer that restates the problem with the chain's totals
    among filler words. Rows have a `reference`, the right answer in fixed words. How likely its totals are depends on
    the chain, and how likely its words are on the chain's separators, which mean nothing.

    Made by `load_world("world://revision")`. The true reward is 1 if the chain's last total is right; samples for
    evaluation end with `>`.
    """

    name = "revision"
    ending: Ending = "marker"
    vocabulary = VOCABULARY
    options: RevisionOptions

    def __init__(self, options: RevisionOptions | None = None) -> None:
        super().__init__(options or RevisionOptions())

    def _size(self) -> Size:
        size = SIZES[self.options.size]
        if self.options.size == "small":
            return size
        return replace(size, levels=(1, 2, 3), warm_start=replace(size.warm_start, positions=384))

    @property
    def filler(self) -> int:
        """Words per sentence."""
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
        chain = write_chain(problem, rng)
        answer = write_reference(
            problem,
            chain.totals,
            self.filler,
            rng,
            chain.separators,
            self.options.style,
            last_only=self.options.totals == "last",
        )
        return f"{chain.text}{MARKER}{answer.text}"

    def sampling(self, seed: int, *, whole: bool = False) -> SamplingConfig:
        found = super().sampling(seed, whole=whole)
        if whole:
            return found
        return replace(
            found, max_new_tokens=CHECKED_STEP * longest_problem(self.levels) + 1, stop_ids=(self.marker, self.eos)
        )

    @property
    def marker(self) -> int:
        """Id of `>`, the end of thinking."""
        return self._ids[MARKER]

    # -- references ----------------------------------------------------------------------------------

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

    def reference_roles(self, prompt: str) -> list[Role]:
        """What each token of a prompt's reference (`<end>` included) depends on; see `Role`."""
        return list(self.write_reference(prompt).roles)

    def with_references(self, batch: TokenBatch) -> AppendedReferences:
        """The references behind the chains of a sampled batch; see `append_references`.

        Raises:
            DataError: rows without `reference`.
        """
        if len(batch.raw) != batch.n_prompts or any("reference" not in row for row in batch.raw):
            raise DataError("the batch's rows have no reference", field="reference", expected="rows of `prompts`")
        return append_references(batch, [self.reference_ids(row["reference"]) for row in batch.raw], self.marker)

    def reasoning_tokens(self, appended: TokenBatch) -> Tensor:
        """Reference tokens that depend on the reasoning, bool `[N]`, for a batch of `with_references`."""
        roles = [self.reference_roles(problem.text) for problem in self.prompt_problems(appended)]
        marks = [role == "reasoning" for group in appended.group.tolist() for role in roles[group]]
        return torch.tensor(marks, device=appended.device)
