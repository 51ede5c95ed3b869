"""Samples in flat arrays: 4 bytes per token where a list of ints takes about 36."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, overload

from tokengrain.batch import Completion, Sample


class SampleStore(Sequence[Sample]):
    """A growing sequence of samples, all with the same number of completions and the same columns.

    Samples are made when they are asked for, so changing one does not change the store.
    """

    def __init__(self) -> None:
        self._ids = array("i")
        self._counted = array("b")
        self._columns: dict[str, array[float]] = {}
        # For each sample: where its prompt and each of its completions begin, in tokens and counted tokens.
        self._tokens_at = array("q", [0])
        self._counted_at = array("q", [0])
        self._parts = 0
        self._rows: list[int | str] = []
        self._raw: list[Mapping[str, Any]] = []
        self._digest = hashlib.sha256()

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the per-token columns that all samples have."""
        return tuple(self._columns)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that identify token ids, which of them count, and columns of all samples."""
        return self._digest.hexdigest()[:16]

    def append(self, sample: Sample) -> None:
        """Add a sample. Raises `ValueError` if it has other columns or another number of completions."""
        names = sorted(sample.completions[0].columns)
        if not self._rows:
            self._parts = 1 + len(sample.completions)
            self._columns = {name: array("d") for name in names}
        if len(sample.completions) != self._parts - 1 or names != sorted(self._columns):
            raise ValueError(f"sample {sample.row} differs from the others in its completions or columns")
        before, first = len(self._counted_at) - 1, self._tokens_at[-1]
        for ids, counted in self._pieces(sample):
            self._ids.extend(ids)
            self._counted.extend(counted)
            self._tokens_at.append(len(self._ids))
            self._counted_at.append(self._counted_at[-1] + sum(counted))
        for completion in sample.completions:
            for name, values in completion.columns.items():
                self._columns[name].extend(values)
        self._rows.append(sample.row)
        self._raw.append(sample.raw)
        self._digest.update(self._tokens_at[-self._parts :].tobytes())
        self._digest.update(self._ids[first:].tobytes() + self._counted[first:].tobytes())
        for name, stored in sorted(self._columns.items()):
            self._digest.update(name.encode() + stored[self._counted_at[before] :].tobytes())

    @staticmethod
    def _pieces(sample: Sample) -> Iterator[tuple[list[int], Sequence[bool]]]:
        yield sample.prompt_ids, [False] * len(sample.prompt_ids)
        for completion in sample.completions:
            yield completion.ids, completion.counted or [True] * len(completion.ids)

    @property
    def lengths(self) -> list[int]:
        """Tokens of every sample, its prompt once (`Sample.n_tokens`)."""
        ends = self._tokens_at[:: self._parts] if self._parts else self._tokens_at
        return [end - start for start, end in pairwise(ends)]

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        part = index * self._parts
        start, end = self._tokens_at[part : part + 2]
        completions = [self._completion(part + 1 + i) for i in range(self._parts - 1)]
        return Sample(self._ids[start:end].tolist(), completions, self._rows[index], self._raw[index])

    def _completion(self, part: int) -> Completion:
        start, end = self._tokens_at[part : part + 2]
        first, last = self._counted_at[part : part + 2]
        counted = None if last - first == end - start else [bool(c) for c in self._counted[start:end]]
        columns = {name: values[first:last].tolist() for name, values in self._columns.items()}
        return Completion(self._ids[start:end].tolist(), counted, columns)
