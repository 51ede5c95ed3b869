"""Data sets of samples: `prepare_pairs`, `prepare_sft`, and `collate` for data loaders."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol, cast, overload

from torch.utils.data import Dataset, IterableDataset, get_worker_info

from tokengrain.batch import Sample, TokenBatch
from tokengrain.data.config import BATCH_ROWS, RowError, TokenizeConfig
from tokengrain.data.encode import Encoded, ExampleEncoder
from tokengrain.data.formats import Example, pair_example, single_example
from tokengrain.data.loading import load_rows
from tokengrain.data.report import Report, all_invalid
from tokengrain.data.rows import Rows, RowStream, StoredRows
from tokengrain.data.store import SampleStore
from tokengrain.data.tokenize import tokenizer_fingerprint
from tokengrain.files import fingerprint

# Fewer rows than this are tokenised before a progress bar could be read.
PROGRESS_ROWS = 2000


class PairDataset(Dataset[Sample]):
    """Samples in memory.

    Args:
        samples: the samples, all with the same columns and number of completions.
        report: what became of the rows; default: all were kept.
        name: where the rows came from.

    Attributes:
        samples: a sequence of the samples, made when asked for.
    """

    def __init__(self, samples: Iterable[Sample], report: Report | None = None, name: str = "samples") -> None:
        if not isinstance(samples, SampleStore):
            store = SampleStore()
            for sample in samples:
                store.append(sample)
            samples = store
        self.samples, self.name = samples, name
        self.report = report or Report(kept=len(samples))

    @property
    def fingerprint(self) -> str:
        """16 hex digits that identify all token ids and columns."""
        return self.samples.fingerprint

    @property
    def columns(self) -> tuple[str, ...]:
        """Per-token columns that the samples have: "token_rewards", "ref_logps", "spans"."""
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

    Rows are dealt out in turn to the workers of a data loader, and to ranks after `shard`: each row goes to
    exactly one of them, by its number, so the same shards always see the same rows. It continues where it was
    after `load_state_dict`. Rows are checked as they are read; an invalid one is an error there and then, or
    skipped.

    Attributes:
        report: what became of the rows read so far, in this process.
        name, fingerprint: of the rows, the tokenizer and the settings.
    """

    def __init__(self, rows: Rows, encoder: ExampleEncoder, fingerprint: str) -> None:
        self.rows, self.name, self.fingerprint = rows, rows.name, fingerprint
        self.report = Report()
        self._encoder = encoder
        self._rank, self._world_size = 0, 1
        self._start = self._next_row = 0

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
        """Let the next iteration start there."""
        self._start = self._next_row = state["next_row"]

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        workers, worker_id = (worker.num_workers, worker.id) if worker is not None else (1, 0)
        shards, shard = self._world_size * workers, self._rank * workers + worker_id
        start, self._start = self._start, 0
        self.report, columns = Report(), None
        first_invalid: tuple[int, RowError] | None = None
        ours = ((n, row) for n, row in self.rows if n >= start and n % shards == shard)
        for number, result in _encoded(ours, self._encoder):
            self._next_row = number + 1
            if isinstance(result, Encoded):
                columns = _column_names(result.sample) if columns is None else columns
                result = _same_columns(result, columns)
            if isinstance(result, RowError):
                error = result.located(*self.rows.place(number))
                if not self._encoder.config.skips(result):
                    raise error from result
                self.report.skip(result.reason, str(error))
                first_invalid = first_invalid or (number, result)
                continue
            self.report.add(result)
            yield result.sample
        if first_invalid is not None and not self.report.kept:
            raise all_invalid(self.rows, self.report, *first_invalid) from first_invalid[1]


class Prepare(Protocol):
    """The type of `prepare_pairs` and `prepare_sft`: a stream of rows gives another data set than stored rows."""

    @overload
    def __call__(
        self,
        source: RowStream,
        tokenizer: Any,
        config: TokenizeConfig | None = None,
        *,
        model_positions: int | None = None,
    ) -> IterablePairDataset: ...
    @overload
    def __call__(
        self,
        source: Any,
        tokenizer: Any,
        config: TokenizeConfig | None = None,
        *,
        model_positions: int | None = None,
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
        tokenizer: a transformers tokenizer.
        config: lengths, EOS, chat template, what to do about invalid rows.
        model_positions: longest sequence the model takes, in tokens (`max_position_embeddings`); None: not
            checked.

    Returns:
        A `PairDataset`, all of its rows checked; for a stream of rows an `IterablePairDataset`.

    Raises:
        DataError: the source is damaged or empty; a row is invalid (the first one is named, and how many more
            there are) and `config.on_invalid` is "error"; or no row is left.
        ModelError: the tokenizer lacks EOS or a chat template that is needed.
    """
    return _prepare(source, tokenizer, config, pair_example, model_positions)


@_typed
def prepare_sft(
    source: Any, tokenizer: Any, config: TokenizeConfig | None = None, *, model_positions: int | None = None
) -> PairDataset | IterablePairDataset:
    """Rows as samples with one completion.

    Rows hold `prompt` + `completion`, `messages`, `text`, or pairs, whose chosen side is taken. Plain `text`
    has no prompt; BOS stands for it, or, if there is none, its first token. Arguments, result and errors are
    those of `prepare_pairs`.
    """
    return _prepare(source, tokenizer, config, single_example, model_positions)


def collate(samples: list[Sample]) -> TokenBatch:
    """Samples -> `TokenBatch`; for `DataLoader(collate_fn=...)`."""
    return TokenBatch.from_samples(samples)


def _prepare(
    source: Any,
    tokenizer: Any,
    config: TokenizeConfig | None,
    parse: Callable[[Any], Example],
    model_positions: int | None,
) -> PairDataset | IterablePairDataset:
    config = config or TokenizeConfig()
    rows = load_rows(source)
    encoder = ExampleEncoder(tokenizer, config, parse, model_positions)
    if not isinstance(rows, StoredRows):
        parts = [rows.fingerprint, tokenizer_fingerprint(tokenizer, config), parse.__name__]
        return IterablePairDataset(rows, encoder, fingerprint(parts))
    samples, report = SampleStore(), Report()
    first_invalid: tuple[int, RowError] | None = None
    with _progress(f"tokenising {rows.name}", len(rows)) as advance:
        for number, result in _encoded(rows, encoder):
            advance()
            if isinstance(result, Encoded) and len(samples):
                result = _same_columns(result, samples.columns)
            if isinstance(result, RowError):
                report.skip(result.reason, str(result.located(*rows.place(number))))
                # One that may not be skipped goes before those that may.
                if first_invalid is None or (config.skips(first_invalid[1]) and not config.skips(result)):
                    first_invalid = number, result
                continue
            samples.append(result.sample)
            report.add(result)
    if first_invalid is not None and not (config.skips(first_invalid[1]) and report.kept):
        raise all_invalid(rows, report, *first_invalid) from first_invalid[1]
    return PairDataset(samples, report, rows.name)


def _encoded(rows: Iterable[tuple[int, Any]], encoder: ExampleEncoder) -> Iterator[tuple[int, Encoded | RowError]]:
    """The result for each row, in order, tokenised in groups."""
    source = iter(rows)
    while group := list(islice(source, BATCH_ROWS)):
        yield from zip((n for n, _ in group), encoder(group))


def _column_names(sample: Sample) -> tuple[str, ...]:
    return tuple(sample.completions[0].columns)


def _same_columns(result: Encoded, names: tuple[str, ...]) -> Encoded | RowError:
    """`result`, or an error if its per-token columns are not those of the first sample."""
    differing = sorted(set(_column_names(result.sample)) ^ set(names))
    if not differing:
        return result
    lacks = differing[0] in names
    return RowError(
        "missing column",
        "is missing, although earlier rows have it" if lacks else "is there, although earlier rows lack it",
        field=result.prefix + differing[0],
        expected="values in all rows or in none",
    )


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on a terminal, for many rows; yields what to call after each."""
    if total < PROGRESS_ROWS or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)
