"""Prompts as training data: token ids with stable row ids, and the order in which they are drawn."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from tokengrain.data.config import TokenizeConfig
from tokengrain.data.report import Report
from tokengrain.errors import DataError, RecipeError
from tokengrain.files import fingerprint
from tokengrain.rollout.base import PromptItem, derived_seed
from tokengrain.rollout.prompts import encode_prompts


class PromptDataset(Sequence[PromptItem]):
    """Prompts in memory.

    Args:
        items: the prompts; no two with the same `row`, which persistent state goes by.
        name: in messages.
        report: what became of the rows that they were made of.

    Raises:
        DataError: no prompt, one without tokens, two with the same row, or a row that is no number and no text.
    """

    def __init__(self, items: Iterable[PromptItem], *, name: str = "train", report: Report | None = None) -> None:
        self.report = report
        self.items, self.name = [replace(i, row=_plain(i.row, name)) for i in items], name
        if not self.items:
            raise DataError("there are no prompts", file=name, expected="at least one row")
        for item in self.items:
            if not item.ids:
                raise DataError("the prompt has no tokens", file=name, row=item.row, expected="at least one (BOS, say)")
        row, count = Counter(str(i.row) for i in self.items).most_common(1)[0]
        if count > 1:
            raise DataError("several prompts have the same id", file=name, row=row, field="id", expected="its own")
        self.by_row = {item.row: item for item in self.items}
        self.fingerprint = fingerprint([fingerprint([i.row, i.ids]) for i in self.items])

    @classmethod
    def of(
        cls, data: Any, tokenizer: Any, *, name: str = "train", config: TokenizeConfig | None = None
    ) -> PromptDataset:
        """Prompts of a `PromptDataset`, of `PromptItem`s, or of rows (see `encode_prompts`).

        Raises:
            DataError: a row without a usable prompt; as the class.
            RecipeError: rows without a tokenizer.
        """
        if isinstance(data, PromptDataset):
            return data
        name, rows = getattr(data, "name", name), list(data)
        if not rows or isinstance(rows[0], PromptItem):
            return cls(rows, name=name)
        if tokenizer is None:
            raise RecipeError("rows of text need a tokenizer (processing_class) to become prompts; or pass PromptItems")
        report = Report()
        return cls(encode_prompts(rows, tokenizer, config, file=name, report=report), name=name, report=report)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]


def _plain(row: Any, name: str) -> int | str:
    """A row's id as checkpoints can hold it; numpy's whole numbers become Python's."""
    if isinstance(row, str):
        return str(row)
    try:
        return operator.index(row)
    except TypeError:
        raise DataError(
            "a prompt's id cannot be kept in a checkpoint",
            file=name,
            field="id",
            value=row,
            expected="a whole number or text",
        ) from None


class PromptOrder:
    """An endless sequence of prompts: pass after pass over the data, each in an order of its own.

    Args:
        size: number of prompts.
        seed: another seed gives other orders.
        shuffle: False: the data's own order in every pass.
    """

    def __init__(self, size: int, seed: int, *, shuffle: bool = True) -> None:
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self._pass, self._order = -1, list(range(size))

    def __getitem__(self, position: int) -> int:
        """Index of the prompt at `position`, counted from the start of training."""
        number, place = divmod(position, self.size)
        if self.shuffle and number != self._pass:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, "prompts", number))
            self._pass, self._order = number, torch.randperm(self.size, generator=generator).tolist()
        return self._order[place]
