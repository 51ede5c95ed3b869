"""Tokens and the base model of the worlds `arithmetic` and `revision`."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tokengrain.batch import TokenBatch
from tokengrain.errors import DataError
from tokengrain.files import fingerprint
from tokengrain.worlds.arithmetic.audit import Ending
from tokengrain.worlds.arithmetic.chains import write_chain
from tokengrain.worlds.arithmetic.options import SIZES, ArithmeticOptions, Size, parse_levels
from tokengrain.worlds.arithmetic.pretraining import Example, WarmStart, warm_start
from tokengrain.worlds.arithmetic.problems import (
    BOS,
    EASY,
    EOS,
    SPECIAL,
    SYMBOLS,
    Problem,
    parse_prompt,
    problem_stream,
    rng_of,
)
from tokengrain.worlds.arithmetic.tokenizer import TOKEN, build_tokenizer
from tokengrain.worlds.model_cache import Progress, ensure_model, model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 1
"""Raised when problems, chains or training change in a way that the settings do not show."""


CHECKED_STEP = 9
"""Tokens of a step that is checked once: label, operator, operand, two digits, `?`, two digits, separator."""


def longest_problem(levels: Sequence[int]) -> int:
    """Steps of the longest problem of these levels."""
    return max(levels) + EASY - 1


class ChainModel:
    """What a world of chains is before there are prompts: options, tokens, and the warm-started model."""

    name: str = "arithmetic"
    ending: Ending = "answer"
    vocabulary: tuple[str, ...] = SYMBOLS

    def __init__(self, options: ArithmeticOptions | None = None) -> None:
        self.options = options or ArithmeticOptions()
        self.size = self._size()
        self.levels = parse_levels(self.options.levels) if self.options.levels else self.size.levels
        top = max(*self.size.levels, *self.levels)
        self.trained_levels = tuple(range(1, top + 1))

    def _size(self) -> Size:
        return SIZES[self.options.size]

    # -- identity, model -----------------------------------------------------------------------------

    def _model_settings(self) -> dict[str, Any]:
        """What the base model depends on."""
        return {
            "format": FORMAT,
            "world": self.name,
            "levels": self.trained_levels,
            "largest": self.size.largest,
            **asdict(self.warm_start),
        }

    @cached_property
    def warm_start(self) -> WarmStart:
        """The size's settings, with positions enough for the longest problem that the base model is trained on."""
        settings = self.size.warm_start
        return replace(
            settings, positions=max(settings.positions, self._positions(longest_problem(self.trained_levels)))
        )

    def _positions(self, steps: int) -> int:
        """What a prompt of so many steps and its longest sensible completion take."""
        return 4 + 3 * steps + self._longest(steps)

    def _longest(self, steps: int) -> int:
        """Tokens of a completion in which every step is checked once."""
        return CHECKED_STEP * steps + 4

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the base model and the data's options."""
        return fingerprint([self._model_settings(), self.levels, asdict(self.options)])

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return build_tokenizer(self.vocabulary, self.warm_start.positions)

    @property
    def max_new_tokens(self) -> int:
        """Room for the longest sensible completion: every step checked once."""
        return self._longest(longest_problem(self.levels))

    def base_model(self) -> Path:
        """Folder of the warm-started base model; trained on first use: 80 s of one core, 10 s for the small size."""
        settings = self._model_settings()
        folder = model_folder(f"{self.name}-{self.options.size}", fingerprint(settings))
        warm = self.warm_start
        rng = rng_of(self.name, "warm start", warm.seed)

        def train(progress: Progress) -> tuple[Any, dict[str, Any]]:
            model, report = warm_start(warm, len(self.vocabulary), lambda n: self._examples(n, rng), progress)
            return model, settings | report

        return ensure_model(folder, train, self.tokenizer, f"world://{self.name}", warm.steps)

    @cached_property
    def reference(self) -> Any:
        """The base model, loaded once; frozen."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.base_model(), dtype=torch.float32).requires_grad_(False).eval()

    def _examples(self, n: int, rng: random.Random) -> list[Example]:
        stream = problem_stream(self.trained_levels, rng, self.size.largest, held_out=False, distinct=False)
        return [(self.prompt_ids(p.text), [*self.encode(self.completion(p, rng)), self.eos]) for p in islice(stream, n)]

    def completion(self, problem: Problem, rng: random.Random) -> str:
        """A completion that goes wrong as the base model is to do."""
        chain = write_chain(problem, rng)
        return f"{chain.text}>{chain.totals[-1]:02d}"

    # -- tokens --------------------------------------------------------------------------------------

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {symbol: i for i, symbol in enumerate(self.vocabulary)}

    @property
    def eos(self) -> int:
        """Id of `<end>`."""
        return self._ids[EOS]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens; faster than the tokenizer, which gives the same.

        Raises:
            DataError: the world has no such token.
        """
        try:
            return [self._ids[symbol] for symbol in re.findall(TOKEN, text)]
        except KeyError as error:
            raise DataError(f"not a token of world {self.name}", value=error.args[0], expected="its symbols") from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return "".join(self.vocabulary[i] for i in ids if self.vocabulary[i] not in SPECIAL)

    def prompt_ids(self, text: str) -> list[int]:
        """Token ids of a prompt, `<s>` in front."""
        return [self._ids[BOS], *self.encode(text)]

    def prompt_problems(self, batch: TokenBatch) -> list[Problem]:
        """The problem of every prompt of a batch.

        Raises:
            DataError: a prompt that is not this world's.
        """
        return [parse_prompt(self.decode(batch.prompt(g).tolist())) for g in range(batch.n_prompts)]
