"""Data sets of samples: `prepare_pairs`, `prepare_sft`."""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import islice, pairwise
from typing import Any, Protocol, cast, overload

from torch.utils.data import Dataset, IterableDataset, get_worker_info

from tokengrain.batch import Completion, Sample
from tokengrain.data.config import BATCH_ROWS, NO_SPAN, RowError, TokenizeConfig
from tokengrain.data.encode import Encoded, ExampleEncoder
from tokengrain.data.formats import Example, pair_example, single_example
from tokengrain.data.rows import Rows, RowStream, StoredRows, load_rows
from tokengrain.data.tokens import Clock, tokenizer_fingerprint
from tokengrain.data.vision import Room, whole
from tokengrain.errors import DataError, fingerprint
from tokengrain.screen import progress_bar
from tokengrain.vision import Vision, seen


class SampleStore(Sequence[Sample]):
    """A growing sequence of samples, all of one kind; they are made when asked for, so changing one changes nothing.

    All have the same columns, and one completion each or preference pairs (two completions or more).
    """

    def __init__(self) -> None:
        # Flat arrays: 4 bytes per token where a list of ints takes about 36.
        self._ids, self._counted = array("i"), array("b")
        self._columns: dict[str, array[float]] = {}
        # For each sample: where its prompt and each of its completions begin, in tokens and counted tokens.
        self._tokens_at, self._counted_at = array("q", [0]), array("q", [0])
        self._starts = array("q", [0])  # of each sample, in parts: its prompt and its completions
        self._rows: list[int | str] = []
        self._raw: list[Mapping[str, Any]] = []
        self._vision: list[Vision | None] = []
        self._room = Room()
        self._digest = hashlib.sha256()

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self._columns)

    @property
    def fingerprint(self) -> str:
        return self._digest.hexdigest()[:16]

    def append(self, sample: Sample) -> None:
        """Add a sample. Raises `ValueError` if it has other columns, or is a pair among single completions."""
        names, count = sorted(sample.completions[0].columns), len(sample.completions)
        if not self._rows:
            self._columns = {name: array("d") for name in names}
        first = self._starts[1] - 1 if self._rows else count
        if (count > 1) != (first > 1) or names != sorted(self._columns):
            raise ValueError(f"sample {sample.row} differs from the others in its completions or columns")
        before, first = len(self._counted_at) - 1, self._tokens_at[-1]
        pieces = [(sample.prompt_ids, [False] * len(sample.prompt_ids))]
        pieces += [(c.ids, list(c.counted or [True] * len(c.ids))) for c in sample.completions]
        for ids, counted in pieces:
            self._ids.extend(ids)
            self._counted.extend(counted)
            self._tokens_at.append(len(self._ids))
            self._counted_at.append(self._counted_at[-1] + sum(counted))
        for completion in sample.completions:
            for name, values in completion.columns.items():
                self._columns[name].extend(values)
        self._rows.append(sample.row)
        self._raw.append(sample.raw)
        self._vision.append(self._room.hold(sample.vision))
        self._starts.append(self._starts[-1] + len(pieces))
        self._digest.update(self._tokens_at[-len(pieces) :].tobytes())
        self._digest.update(self._ids[first:].tobytes() + self._counted[first:].tobytes())
        for name, stored in sorted(self._columns.items()):
            self._digest.update(name.encode() + stored[self._counted_at[before] :].tobytes())
        self._digest.update("".join(seen(sample.vision)).encode())

    @property
    def rows(self) -> Sequence[int | str]:
        return tuple(self._rows)

    @property
    def raws(self) -> Sequence[Mapping[str, Any]]:
        """What the samples were made from."""
        return tuple(self._raw)

    @property
    def lengths(self) -> list[int]:
        return [self._tokens_at[end] - self._tokens_at[start] for start, end in pairwise(self._starts)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        part, after = self._starts[index : index + 2]
        start, end = self._tokens_at[part : part + 2]
        completions = [self._completion(i) for i in range(part + 1, after)]
        own = self._rows[index], self._raw[index], whole(self._vision[index])
        return Sample(self._ids[start:end].tolist(), completions, *own)

    def _completion(self, part: int) -> Completion:
        start, end = self._tokens_at[part : part + 2]
        first, last = self._counted_at[part : part + 2]
        counted = None if last - first == end - start else [bool(c) for c in self._counted[start:end]]
        columns = {name: values[first:last].tolist() for name, values in self._columns.items()}
        return Completion(self._ids[start:end].tolist(), counted, columns)


@dataclass
class Report:
    """What became of the rows of a source: how many were kept, skipped and cut, and why."""

    kept: int = 0  # samples made
    skipped: Counter[str] = field(default_factory=Counter)  # rows left out, by reason
    first: dict[str, str] = field(default_factory=dict)  # for each reason, the message about the first such row
    prompts_cut: int = 0
    completions_cut: int = 0
    without_spans: int = 0  # pairs that were kept although spans were looked for and none was found
    dropped: Counter[str] = field(default_factory=Counter)  # rows by what the chat template left out of them
    ended: int = 0  # texts that ended in a special token before EOS was added

    @property
    def rows(self) -> int:
        return self.kept + sum(self.skipped.values())

    @property
    def notable(self) -> bool:
        """Whether there is more to say than that all rows were kept as they are."""
        return len(str(self).split("; ")) > 1

    @property
    def reasons(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())

    def add(self, result: Encoded) -> None:
        self.kept += 1
        self.prompts_cut += result.prompt_cut
        self.completions_cut += result.completions_cut
        self.without_spans += result.spanless
        self.ended += result.ended
        self.dropped.update(result.dropped)

    def skip(self, reason: str, message: str) -> None:
        self.skipped[reason] += 1
        self.first.setdefault(reason, message)

    def __str__(self) -> str:
        cut = self.prompts_cut or self.completions_cut
        lost = ", ".join(f"{name} of {count} rows" for name, count in self.dropped.items())
        parts = (
            (True, f"{self.kept} of {self.rows} rows"),
            (self.skipped, f"skipped: {self.reasons}"),
            (cut, f"cut: {self.prompts_cut} prompts, {self.completions_cut} completions"),
            (self.without_spans, f"{self.without_spans} pairs without a span"),
            (self.dropped, f"the chat template drops {lost}"),
            (self.ended, f"{self.ended} texts end in a special token already; EOS was added behind it"),
        )
        return "; ".join(text for happened, text in parts if happened)


PROGRESS_ROWS = 2000  # fewer are tokenised before a progress bar could be read


class PairDataset(Dataset[Sample]):
    """Samples in memory, all with the same columns and number of completions.

    `clock` is the time that the chat template wrote into them (None: it writes none); `remake` gives the same data set
    at another time.
    """

    max_length: int | None = None  # what the texts were cut to by hand

    def __init__(
        self,
        samples: Iterable[Sample],
        report: Report | None = None,
        name: str = "samples",
        *,
        clock: Clock | None = None,
        remake: Callable[[datetime], PairDataset] | None = None,
    ) -> None:
        if not isinstance(samples, SampleStore):
            store = SampleStore()
            for sample in samples:
                store.append(sample)
            samples = store
        self.samples, self.name = samples, name
        self.report = report or Report(kept=len(samples))
        self.clock, self.remake = clock, remake

    def set_time(self, now: datetime) -> None:
        """Let the chat template write this date, as when the run began that is resumed."""
        if self.clock is not None and self.remake is not None and not self.clock.reads(now):
            made = self.remake(now)
            self.samples, self.report = made.samples, made.report
            self.clock.now = now

    def swapped(self) -> PairDataset:
        """The same pairs with chosen and rejected exchanged. Raises `DataError` for several rejected completions."""

        def swap(sample: Sample) -> Sample:
            if len(sample.completions) == 2:
                return replace(sample, completions=sample.completions[::-1])
            what, value = "chosen and rejected cannot be swapped", f"{len(sample.completions) - 1} rejected completions"
            raise DataError(what, file=self.name, row=sample.row, field="rejected", value=value, expected="one")

        samples = map(swap, self.samples)
        remake = self.remake
        again = None if remake is None else lambda now: remake(now).swapped()
        return PairDataset(samples, self.report, f"{self.name} (swapped)", clock=self.clock, remake=again)

    def __getstate__(self) -> dict[str, Any]:  # for the workers of a data loader
        return {**self.__dict__, "remake": None}

    @property
    def fingerprint(self) -> str:
        """16 hex digits that identify all token ids and columns."""
        return self.samples.fingerprint

    @property
    def columns(self) -> tuple[str, ...]:
        return self.samples.columns

    @property
    def lengths(self) -> list[int]:
        """Tokens per sample, its prompt once: for batches of even size."""
        return self.samples.lengths

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


class IterablePairDataset(IterableDataset[Sample]):
    """Samples made as they are asked for, in the order of the rows; for sets larger than memory.

    Rows are dealt out in turn, by their number, to the workers of a data loader, and to ranks after `shard`. An invalid
    row is an error when it is read, or skipped; `report` counts the rows read so far in this process.
    """

    def __init__(self, rows: Rows, encoder: ExampleEncoder, fingerprint: str) -> None:
        self.rows, self.name, self.fingerprint = rows, rows.name, fingerprint
        self.report, self._encoder = Report(), encoder
        self._rank, self._world_size = 0, 1
        self._start = self._next_row = 0
        self.clock = encoder.renderer.clock if encoder.renderer.dated else None

    def set_time(self, now: datetime) -> None:
        if self.clock is not None:
            self.clock.now = now

    def shard(self, rank: int, world_size: int) -> IterablePairDataset:
        """The part of rank `rank` of `world_size`; not for data loaders that deal out batches themselves."""
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, expected 0 to {world_size - 1}")
        part = IterablePairDataset(self.rows, self._encoder, self.fingerprint)
        part._rank, part._world_size = rank, world_size
        return part

    def state_dict(self) -> dict[str, int]:
        """Where the next iteration has to start to continue behind the last sample given out."""
        return {"next_row": self._next_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._start = self._next_row = state["next_row"]

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        workers, worker_id = (worker.num_workers, worker.id) if worker is not None else (1, 0)
        shards, shard = self._world_size * workers, self._rank * workers + worker_id
        start, self._start = self._start, 0
        self.report = Report()
        ours = ((n, row) for n, row in self.rows if n >= start and n % shards == shard)
        for number, sample in _samples(ours, self._encoder, self.rows, self.report):
            self._next_row = number + 1
            if sample is not None:
                yield replace(sample, vision=whole(sample.vision))


class Prepare(Protocol):
    """The type of `prepare_pairs` and `prepare_sft`: a stream of rows gives another data set than stored rows."""

    @overload
    def __call__(
        self, source: RowStream, tokenizer: Any, config: TokenizeConfig | None = None, *, model_positions: Any = None
    ) -> IterablePairDataset: ...
    @overload
    def __call__(
        self, source: Any, tokenizer: Any, config: TokenizeConfig | None = None, *, model_positions: Any = None
    ) -> PairDataset: ...


def _typed(function: Callable[..., Any]) -> Prepare:
    return cast(Prepare, function)


@_typed
def prepare_pairs(
    source: Any, tokenizer: Any, config: TokenizeConfig | None = None, *, model_positions: int | None = None
) -> PairDataset | IterablePairDataset:
    """Preference rows as samples with two completions, chosen and rejected.

    Args:
        source: `Rows` or anything `load_rows` takes.
        tokenizer: a transformers tokenizer, or the processor of a model that sees.
        config: lengths, EOS, chat template, what to do about invalid rows.
        model_positions: longest sequence the model takes, in tokens (`max_position_embeddings`); None: not checked.

    Returns:
        A `PairDataset`, all of its rows checked; for a stream of rows an `IterablePairDataset`.

    Raises:
        DataError: the source is damaged or empty; a row is invalid (the first one is named, and how many more there
            are) and `config.on_invalid` is "error"; or no row is left.
        ModelError: the tokenizer lacks EOS or a chat template that is needed.
    """
    return _prepare(source, tokenizer, config, pair_example, model_positions)


@_typed
def prepare_sft(
    source: Any, tokenizer: Any, config: TokenizeConfig | None = None, *, model_positions: int | None = None
) -> PairDataset | IterablePairDataset:
    """Rows as samples with one completion.

    Rows hold `prompt` + `completion`, `messages`, `text`, or pairs, whose chosen side is taken. Plain `text`
    has no prompt; BOS stands for it, or, if there is none, its first token. A `label` of false, which TRL's unpaired
    preferences have beside a completion, makes a row invalid: it would be imitated. Arguments, result and errors are
    those of `prepare_pairs`.
    """
    return _prepare(source, tokenizer, config, _imitated, model_positions)


def _imitated(row: Any) -> Example:
    """The prompt and the completion of a row that an SFT stage learns from."""
    example = single_example(row)
    if row.get("label") is False and example.fields == ("completion",):
        what, expected = "says that the completion is not wanted, which SFT would imitate", "true, or no such column"
        raise RowError("label is false", what, field="label", value=False, expected=expected)
    return example


def _prepare(
    source: Any,
    tokenizer: Any,
    config: TokenizeConfig | None,
    parse: Callable[[Any], Example],
    model_positions: int | None,
    clock: Clock | None = None,
) -> PairDataset | IterablePairDataset:
    config, rows = config or TokenizeConfig(), load_rows(source)
    encoder = ExampleEncoder(tokenizer, config, parse, model_positions, clock, rows.place)
    if not isinstance(rows, StoredRows):
        parts = [rows.fingerprint, tokenizer_fingerprint(tokenizer, config), parse.__name__]
        return IterablePairDataset(rows, encoder, fingerprint(parts))
    samples, report = SampleStore(), Report()
    quiet = len(rows) < PROGRESS_ROWS or not sys.stderr.isatty()
    with progress_bar(f"tokenising {rows.name}", len(rows), quiet=quiet) as update:
        for _, sample in _samples(rows, encoder, rows, report):
            update(advance=1)
            if sample is not None:
                samples.append(sample)
    encoder.pictures.check_used()

    def remake(now: datetime) -> PairDataset:
        return cast(PairDataset, _prepare(rows, tokenizer, config, parse, model_positions, Clock(now)))

    dated: dict[str, Any] = {"clock": encoder.renderer.clock, "remake": remake} if encoder.renderer.dated else {}
    dataset = PairDataset(samples, report, rows.name, **dated)
    dataset.max_length = config.max_length
    return dataset


def _samples(
    numbered: Iterable[tuple[int, Any]], encoder: ExampleEncoder, rows: Rows, report: Report
) -> Iterator[tuple[int, Sample | None]]:
    """(number, sample; None for an invalid row), tokenised in groups. Only a stream raises before the end."""
    source, columns, config = iter(numbered), None, encoder.config
    first: tuple[int, RowError] | None = None
    for number, result in _encoded(source, encoder):
        if isinstance(result, Encoded):
            columns = tuple(result.sample.completions[0].columns) if columns is None else columns
            result = _same_columns(result, columns)
        if isinstance(result, Encoded):
            report.add(result)
            yield number, result.sample
            continue
        error = result.located(*rows.place(number))
        if rows.streaming and not config.skips(result):
            raise error from result
        report.skip(result.reason, str(error))
        # One that may not be skipped goes before those that may.
        if first is None or (config.skips(first[1]) and not config.skips(result)):
            first = number, result
        yield number, None
    if first is not None and not (config.skips(first[1]) and report.kept):
        # The first invalid row as an error that also counts the others.
        (number, error), invalid = first, report.rows - report.kept
        way_out = "`spans: {on_none: skip}`" if error.reason == NO_SPAN else "`on_invalid: skip`"
        if not report.kept:
            note = f". No row is left: {report.reasons}"
        elif invalid > 1:
            note = f". {invalid} of {report.rows} rows are invalid: {report.reasons} ({way_out} leaves them out)"
        else:
            note = f". It is the only invalid row of {report.rows} ({way_out} leaves it out)"
        raise error.located(*rows.place(number), note) from error


def _encoded(source: Iterator[tuple[int, Any]], encoder: ExampleEncoder) -> Iterator[tuple[int, Encoded | RowError]]:
    size = BATCH_ROWS // 16 if encoder.pictures.sees else BATCH_ROWS  # pictures are larger than texts
    while group := list(islice(source, size)):
        yield from zip((n for n, _ in group), encoder(group))


def _same_columns(result: Encoded, names: Collection[str]) -> Encoded | RowError:
    """`result`, or an error if its per-token columns are not those of the first sample."""
    differing = sorted(result.sample.completions[0].columns.keys() ^ set(names))
    if not differing:
        return result
    lacks = differing[0] in names
    what = "is missing, although earlier rows have it" if lacks else "is there, although earlier rows lack it"
    field, expected = result.prefix + differing[0], "values in all rows or in none"
    return RowError("missing column", what, field=field, expected=expected)
