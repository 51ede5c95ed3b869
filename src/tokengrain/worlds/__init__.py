"""Worlds: small embedded tasks whose true token credit is known exactly."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import parse_qsl

from tokengrain.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from tokengrain.batch import TokenBatch
    from tokengrain.evaluation.credit import CreditTruth

PREFIX = "world://"


class World(Protocol):
    """What every world offers."""

    name: str

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast: ...

    @property
    def fingerprint(self) -> str:
        """Identifies the task and its data; equal fingerprints mean equal rows and equal base models."""
        ...

    @property
    def reference(self) -> Any:
        """The base model, loaded and frozen."""
        ...

    def base_model(self) -> Path:
        """Folder of the base model, which is trained on first use and cached."""
        ...

    def pairs(
        self, split: Any = "train", n: int | None = None, slope: float | None = None, seed: int | None = None
    ) -> list[dict[str, Any]]:
        """Preference rows: `prompt`, `chosen`, `rejected`, `id`, `chosen_reward`, `rejected_reward`."""
        ...

    def advantages(self, batch: TokenBatch) -> Tensor:
        """The exact credit of every counted token, `[N]`."""
        ...

    def credit_truth(self, prompts: int | None = None, seed: int = 0) -> CreditTruth:
        """Base samples with the exact credit of every token: what `tokengrain bench credit` compares with."""
        ...

    def credit_recovery(self, credit: Callable[[TokenBatch], Tensor]) -> dict[str, float]:
        """Agreement of a credit source with the exact credit: `spearman`, `auc`, `tokens`."""
        ...

    def evaluate(
        self, model: Any, n: int | None = None, seed: int = 0, *, progress: Callable[[int, int], None] | None = None
    ) -> dict[str, float | None]:
        """What a policy is worth, from n of its own samples per prompt; each world has its measures and its n.

        Args:
            progress: called with how many samples are drawn, and how many there will be.
        """
        ...


def _stories(options: dict[str, Any]) -> World:
    from tokengrain.worlds.stories import StoriesOptions, StoriesWorld

    return StoriesWorld(_read("stories", StoriesOptions, options, {"pairs": int, "slope": float, "seed": int}))


def _arithmetic(options: dict[str, Any]) -> World:
    from tokengrain.worlds.arithmetic import ArithmeticOptions, ArithmeticWorld

    return ArithmeticWorld(_read("arithmetic", ArithmeticOptions, options, {"prompts": int, "pairs": int, "seed": int}))


def _revision(options: dict[str, Any]) -> World:
    from tokengrain.worlds.revision import RevisionOptions, RevisionWorld

    numbers = {"prompts": int, "pairs": int, "seed": int, "filler": int, "style": float}
    return RevisionWorld(_read("revision", RevisionOptions, options, numbers))


def _read(world: str, build: Any, options: dict[str, Any], types: dict[str, type]) -> Any:
    """Options of an address as the world's dataclass; those not in `types` are text."""
    known = [f.name for f in fields(build)]
    read: dict[str, Any] = {}
    for key, text in options.items():
        if key not in known:
            raise RecipeError(f"world {world}: unknown option {key!r}{_nearest(key, known)}")
        try:
            read[key] = types.get(key, str)(text)
        except ValueError:
            raise RecipeError(f"world {world}: {key} is {text!r}; expected {types[key].__name__}") from None
    return build(**read)


WORLDS: dict[str, Callable[[dict[str, Any]], World]] = {
    "stories": _stories,
    "arithmetic": _arithmetic,
    "revision": _revision,
}


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; expected one of {', '.join(known)}"


def is_world(source: object) -> bool:
    """Whether `source` is a world's address."""
    return isinstance(source, str) and source.startswith(PREFIX)


def load_world(uri: str) -> World:
    """The world at an address such as `world://stories?regime=noisy&seed=1`; one object per address.

    Raises:
        RecipeError: unknown world or option, with the nearest right name; an option that is given twice.
    """
    if not is_world(uri):
        raise RecipeError(f"got {uri!r}; expected the address of a world, such as 'world://stories'")
    name, _, query = uri.removeprefix(PREFIX).partition("?")
    if name not in WORLDS:
        raise RecipeError(f"unknown world {name!r}{_nearest(name, list(WORLDS))}")
    try:
        options = sorted(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError:
        raise RecipeError(f"world {name}: cannot read options {query!r}; expected name=value&name=value") from None
    keys = [key for key, _ in options]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise RecipeError(f"world {name}: option {twice[0]!r} is given more than once in {uri!r}")
    return _load(name, tuple(options))


@cache
def _load(name: str, options: tuple[tuple[str, str], ...]) -> World:
    return WORLDS[name](dict(options))
