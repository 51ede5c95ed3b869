"""Sizes and options of the world `arithmetic`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from tokengrain.errors import RecipeError
from tokengrain.worlds.arithmetic.pretraining import WarmStart
from tokengrain.worlds.arithmetic.problems import MAX_LEVEL


@dataclass(frozen=True)
class Size:
    """How large a world is.

    Attributes:
        levels: those of the prompts and of the base model's training.
        largest: the largest operand.
        prompts, held_out: training and held-out prompts per level.
        pairs: of `pairs("train")`; credit: of `credit_truth`.
    """

    levels: tuple[int, ...]
    largest: int
    prompts: int
    held_out: int
    pairs: int
    credit: int
    warm_start: WarmStart


SMALL = WarmStart(
    hidden_size=48, layers=2, mlp_size=192, steps=250, batch_size=32, learning_rate=2e-2, warmup=30, muon=True
)
SIZES = {
    "full": Size((1, 2, 3, 4, 5, 6), 9, 40, 30, 1000, 400, WarmStart()),
    "small": Size((1, 2), 3, 40, 15, 200, 60, SMALL),
}


def parse_levels(text: str) -> tuple[int, ...]:
    """Levels as an address gives them: `1-6`, `3` or `1,4-6`.

    Raises:
        RecipeError: something else, or levels that there are not.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if not match:
            raise RecipeError(f"levels is {text!r}; expected levels such as 1-6 or 1,3")
        first, last = int(match.group(1)), int(match.group(2) or match.group(1))
        if not 1 <= first <= last <= MAX_LEVEL:
            raise RecipeError(f"levels is {text!r}; expected levels from 1 to {MAX_LEVEL}")
        found |= set(range(first, last + 1))
    return tuple(sorted(found))


@dataclass(frozen=True)
class ArithmeticOptions:
    """Options of the address `world://arithmetic?...`.

    Args:
        levels: of the prompts, such as `1-6` or `1,3`; the size's by default. The base model is trained on the
            size's levels, and on those above them up to the highest one asked for.
        seed: of the training prompts and pairs; held-out prompts and the base model are the same for all.
        size: `full`, or `small` (levels 1–2, operands 1–3, a smaller model) for tests and quick runs.
        prompts: how many training prompts (default 40 per level).
        pairs: how many training pairs.
    """

    levels: str = ""
    seed: int = 0
    size: str = "full"
    prompts: int | None = None
    pairs: int | None = None

    world: ClassVar[str] = "arithmetic"

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise RecipeError(f"world {self.world}: size is {self.size!r}; expected one of {', '.join(SIZES)}")
        for name, least in (("seed", 0), ("prompts", 1), ("pairs", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise RecipeError(f"world {self.world}: {name} is {value}; expected at least {least}")
        try:
            parse_levels(self.levels or "1")
        except RecipeError as error:
            raise RecipeError(f"world {self.world}: {error}") from None
