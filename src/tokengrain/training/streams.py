"""Streams as training data: read again from the start when they end, so that a run has one long pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset

from tokengrain.batch import Sample
from tokengrain.errors import DataError, RecipeError
from tokengrain.training.config import PreferenceConfig


class RepeatedStream(IterableDataset[Sample]):
    """Passes over a stream without end.

    transformers does not know how long a pass is. Given a stream that ends, it would carry the gradient of an
    unfinished step into the next one, and on resuming skip as if there had been a single pass.

    Args:
        stream: an iterable data set; `set_epoch(pass)` is called if it has one, so that it may shuffle.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.name = getattr(stream, "name", "train")
        self.fingerprint = getattr(stream, "fingerprint", None)

    def __iter__(self) -> Iterator[Sample]:
        number = 0
        if hasattr(self.stream, "load_state_dict"):
            # It would go on where an earlier run in this process stopped.
            self.stream.load_state_dict({"next_row": 0})
        while True:
            if hasattr(self.stream, "set_epoch"):
                self.stream.set_epoch(number)
            empty = True
            for sample in self.stream:
                empty = False
                yield sample
            if empty:
                raise DataError("the stream has no rows", file=self.name, expected="at least one row")
            number += 1


def endless(dataset: Any, args: PreferenceConfig) -> Any:
    """A stream repeated without end; rows in memory as they are.

    Raises:
        RecipeError: it is a stream, and nothing says how long to train, something should happen at the end of an epoch,
            or several workers would read it, each of them all of it.
    """
    if dataset is None or hasattr(dataset, "__len__"):
        return dataset
    if args.max_steps <= 0:
        raise RecipeError("a stream has no known length; set max_steps")
    refuse_epochs(args, "a stream is one long pass")
    if args.dataloader_num_workers > 1:
        raise RecipeError(
            f"dataloader_num_workers is {args.dataloader_num_workers}; each of them would read the whole stream. "
            "Expected 0 or 1, or rows in memory"
        )
    return RepeatedStream(dataset)


def refuse_epochs(args: PreferenceConfig, reason: str) -> None:
    """Raises `RecipeError` if something should happen at the end of every epoch, where training has but one."""
    for name in ("logging_strategy", "eval_strategy", "save_strategy"):
        value = getattr(args, name)
        if getattr(value, "value", value) == "epoch":
            raise RecipeError(
                f"{name} is 'epoch', but {reason}, and an epoch never ends before the run does; expected 'steps', with "
                f"{name.replace('strategy', 'steps')}"
            )
