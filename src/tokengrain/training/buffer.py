"""`RolloutBuffer`: one rank's share of a rollout, handed out in minibatches, epoch after epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch

from tokengrain.batch import TokenBatch, offsets_of
from tokengrain.rollout.sampler import derived_seed
from tokengrain.training.step import HostBatch
from tokengrain.vision import Vision

_TENSORS = ("prompt_ids", "prompt_offsets", "completion_ids", "completion_offsets", "counted", "group")
_SETTINGS = ("minibatches", "epochs", "seed")


def concatenate(batches: Sequence[TokenBatch]) -> TokenBatch:
    """The prompts of several batches with the same columns, one after the other."""
    first = batches[0]
    if len(batches) == 1:
        return first
    some = any(b.vision for b in batches)
    groups = accumulate((b.n_prompts for b in batches[:-1]), initial=0)
    return replace(
        first,
        prompt_ids=torch.cat([b.prompt_ids for b in batches]),
        prompt_offsets=offsets_of(torch.cat([b.prompt_offsets.diff() for b in batches])),
        completion_ids=torch.cat([b.completion_ids for b in batches]),
        completion_offsets=offsets_of(torch.cat([b.completion_offsets.diff() for b in batches])),
        counted=torch.cat([b.counted for b in batches]),
        group=torch.cat([b.group + start for b, start in zip(batches, groups, strict=True)]),
        columns={name: torch.cat([b.columns[name] for b in batches]) for name in first.columns},
        rows=tuple(row for b in batches for row in b.rows),
        raw=tuple(raw for b in batches for raw in b.raw),
        vision=tuple(one for b in batches for one in b.vision or [None] * b.n_prompts) if some else (),
    )


class RolloutBuffer:
    """Minibatches of whole groups of `batch`, this rank's prompts (None: it has none to learn from).

    The first epoch takes the prompts in the order in which they were drawn (which is random), later ones in
    permutations of it. All ranks hand out equally many minibatches; one without prompts left gives the `stand_in`.
    """

    def __init__(
        self, batch: TokenBatch | None, stand_in: TokenBatch, *, minibatches: int, epochs: int, seed: int
    ) -> None:
        self.batch = batch.to("cpu") if batch is not None else None
        self.stand_in = stand_in.to("cpu")
        self.minibatches, self.epochs, self.seed, self.position = minibatches, epochs, seed, 0
        self._shared: tuple[int, list[list[int]]] | None = None  # an epoch begun on other ranks, and its schedule

    @property
    def total(self) -> int:
        """Optimiser steps of the rollout."""
        return self.minibatches * self.epochs

    @property
    def done(self) -> bool:
        return self.position >= self.total

    def __next__(self) -> HostBatch:
        if self.done:
            raise StopIteration
        epoch, part = divmod(self.position, self.minibatches)
        self.position += 1
        prompts = self.schedule(epoch)[part]
        if self.batch is None or not prompts:
            return HostBatch(self.stand_in, real=False)
        return HostBatch(self.batch.select(prompts))

    def schedule(self, epoch: int) -> list[list[int]]:
        """The prompts of each minibatch of an epoch; sizes differ by one at most."""
        if self._shared is not None and self._shared[0] == epoch:
            return self._shared[1]
        count = self.batch.n_prompts if self.batch is not None else 0
        order = list(range(count))
        if epoch:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, "epoch", epoch))
            order = torch.randperm(count, generator=generator).tolist()
        bounds = [count * i // self.minibatches for i in range(self.minibatches + 1)]
        return [order[a:b] for a, b in pairwise(bounds)]

    def save(self, path: Path) -> None:
        """Write to a file: tensors and rows. What the rows were made from is not in it."""
        own = None if self.batch is None else _packed(self.batch)
        state = {"position": self.position, "shared": self._shared, **{n: getattr(self, n) for n in _SETTINGS}}
        torch.save({"batch": own, "stand_in": _packed(self.stand_in), **state}, path)

    @classmethod
    def load(cls, paths: Sequence[Path], rank: int, world: int, raw: Mapping[int | str, Any]) -> RolloutBuffer:
        """What `save` wrote to the files of all ranks; `raw`: by row, what the prompts were made from.

        If there are as many ranks as then, each takes its own; otherwise the prompts are shared out anew: the epoch
        under way keeps its minibatches, and the order within later epochs is another one.
        """
        if len(paths) == world:
            return cls._read(paths[rank], raw)
        return cls._shared_out([cls._read(path, raw) for path in paths], rank, world)

    @classmethod
    def _read(cls, path: Path, raw: Mapping[int | str, Any]) -> RolloutBuffer:
        state = torch.load(path, map_location="cpu", weights_only=True)
        batch = _unpacked(state["batch"], raw) if state["batch"] is not None else None
        buffer = cls(batch, _unpacked(state["stand_in"], raw), **{name: state[name] for name in _SETTINGS})
        buffer.position, buffer._shared = state["position"], state["shared"]
        return buffer

    @classmethod
    def _shared_out(cls, olds: Sequence[RolloutBuffer], rank: int, world: int) -> RolloutBuffer:
        """The part of one of `world` ranks of what `olds`, those of all ranks before, hold."""
        first = olds[0]
        parts = [old.batch for old in olds if old.batch is not None]
        counts = [old.batch.n_prompts if old.batch is not None else 0 for old in olds]
        # Rank r of w had prompts r, r + w, ... of the rollout, and so it has them now.
        places = sorted((slot, old) for old, count in enumerate(counts) for slot in range(count))
        own = [sum(counts[:old]) + slot for slot, old in places][rank::world]
        settings = {name: getattr(first, name) for name in _SETTINGS}
        buffer = cls(concatenate(parts).select(own) if own else None, first.stand_in, **settings)
        buffer.position = first.position
        number = {place: i for i, place in enumerate(places)}
        epoch = first.position // first.minibatches
        minibatches = zip(*(old.schedule(epoch) for old in olds), strict=True)
        shares = [[number[slot, old] for old, slots in enumerate(one) for slot in slots] for one in minibatches]
        buffer._shared = epoch, [sorted(i // world for i in share if i % world == rank) for share in shares]
        return buffer


def _packed(batch: TokenBatch) -> dict[str, Any]:
    fields = {name: getattr(batch, name) for name in _TENSORS}
    vision = [one and one.state() for one in batch.vision]
    columns, rows = dict(batch.columns), list(batch.rows)
    return {**fields, "columns": columns, "rows": rows, "vision": vision, "prompt_role": batch.prompt_role}


def _unpacked(state: Mapping[str, Any], raw: Mapping[int | str, Any]) -> TokenBatch:
    rows, vision = tuple(state["rows"]), tuple(one and Vision(**one) for one in state["vision"])
    return TokenBatch(**{**state, "rows": rows, "vision": vision}, raw=tuple(raw.get(row, {}) for row in rows))
