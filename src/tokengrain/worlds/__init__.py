"""Worlds: small embedded tasks whose true token credit is known exactly."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeGuard, get_args, get_type_hints
from urllib.parse import parse_qsl

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tokengrain.batch import TokenBatch
from tokengrain.errors import RecipeError
from tokengrain.evaluation.credit import CreditTruth
from tokengrain.settings import nearest
from tokengrain.worlds.arithmetic import ArithmeticOptions, ArithmeticWorld
from tokengrain.worlds.clips import ClipsOptions, ClipsWorld
from tokengrain.worlds.library import LibraryOptions, LibraryWorld
from tokengrain.worlds.revision import RevisionOptions, RevisionWorld
from tokengrain.worlds.series import SeriesOptions, SeriesWorld
from tokengrain.worlds.shapes import ShapesOptions, ShapesWorld
from tokengrain.worlds.stories import StoriesOptions, StoriesWorld

PREFIX = "world://"


class World(Protocol):
    """What every world offers."""

    name: str

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast: ...

    @property
    def fingerprint(self) -> str:
        """Identifies the task and its data; equal fingerprints mean equal rows and equal base models."""

    @property
    def reference(self) -> Any:
        """The base model, loaded and frozen."""

    def base_model(self) -> Path:
        """Folder of the base model; one that does not come with the package is trained on first use and cached."""

    def pairs(
        self, split: Any = "train", n: int | None = None, slope: float | None = None, seed: int | None = None
    ) -> list[dict[str, Any]]:
        """Preference rows: `prompt`, `chosen`, `rejected`, `id`, `chosen_reward`, `rejected_reward`."""

    def advantages(self, batch: TokenBatch) -> Tensor:
        """The exact credit of every counted token, `[N]`."""

    def credit_truth(self, prompts: int | None = None, seed: int = 0) -> CreditTruth:
        """Base samples with the exact credit of every token: what `tokengrain bench credit` compares with."""

    def credit_recovery(self, credit: Callable[[TokenBatch], Tensor]) -> dict[str, float]:
        """Agreement of a credit source with the exact credit: `spearman`, `auc`, `tokens`."""

    def evaluate(
        self, model: Any, n: int | None = None, seed: int = 0, *, progress: Callable[[int, int], None] | None = None
    ) -> dict[str, float | None]:
        """What a policy is worth, from n samples per prompt; `progress` is called with (done, of how many)."""


WORLDS: dict[str, tuple[Callable[[Any], World], Any]] = {
    "stories": (StoriesWorld, StoriesOptions),
    "arithmetic": (ArithmeticWorld, ArithmeticOptions),
    "library": (LibraryWorld, LibraryOptions),
    "revision": (RevisionWorld, RevisionOptions),
    "series": (SeriesWorld, SeriesOptions),
    "clips": (ClipsWorld, ClipsOptions),
    "shapes": (ShapesWorld, ShapesOptions),
}
"""Each world with the dataclass of its address's options."""


def is_world(source: object) -> TypeGuard[str]:
    """Whether `source` is a world's address."""
    return isinstance(source, str) and source.startswith(PREFIX)


def load_world(uri: str) -> World:
    """The world at an address such as `world://stories?regime=noisy&seed=1`; one object per address."""
    if not is_world(uri):
        raise RecipeError(f"got {uri!r}; expected the address of a world, such as 'world://stories'")
    name, _, query = uri.removeprefix(PREFIX).partition("?")
    if name not in WORLDS:
        raise RecipeError(f"unknown world {name!r}{nearest(name, WORLDS)}")
    try:
        options = sorted(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError:
        _refuse(name, f"cannot read options {query!r}; expected name=value&name=value")
    keys = [key for key, _ in options]
    if twice := [key for key in keys if keys.count(key) > 1]:
        _refuse(name, f"option {twice[0]!r} is given more than once in {uri!r}")
    return _load(name, tuple(options))


@cache
def _load(name: str, options: tuple[tuple[str, str], ...]) -> World:
    """Convert the options to the types of the world's dataclass and build the world."""
    build, wanted = WORLDS[name]
    known = {key: kind for key, kind in get_type_hints(wanted).items() if key != "world"}
    read: dict[str, Any] = {}
    for key, text in options:
        if key not in known:
            _refuse(name, f"unknown option {key!r}{nearest(key, known)}")
        kind = (get_args(known[key]) or (known[key],))[0]  # `int` of `int | None`
        try:
            read[key] = kind(text)
        except ValueError:
            _refuse(name, f"{key} is {text!r}; expected {kind.__name__}")
    return build(wanted(**read))


def _refuse(world: str, reason: str) -> NoReturn:
    raise RecipeError(f"world {world}: {reason}") from None
