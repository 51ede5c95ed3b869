"""Computing the shards of an annotation: batches of even length through the sources, then a parquet file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokengrain.batch import Sample, TokenBatch
from tokengrain.credit import store
from tokengrain.credit.manifest import column_name
from tokengrain.errors import DataError


@dataclass(frozen=True)
class Job:
    """One annotation: what every shard needs to know."""

    samples: Sequence[Sample]
    lengths: Sequence[int]
    roles: tuple[str, ...]
    quantities: Mapping[str, Callable[[TokenBatch], Tensor]]
    name: str
    output: Path
    key: str
    shard_rows: int
    max_tokens: int
    device: torch.device
    holes: bool

    @property
    def folder(self) -> Path:
        return self.output.with_name(f"{self.output.stem}.shards")

    @property
    def n_shards(self) -> int:
        return -(-len(self.samples) // self.shard_rows)

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.parquet"

    def rows(self, shard: int) -> Sequence[Sample]:
        return self.samples[shard * self.shard_rows : (shard + 1) * self.shard_rows]

    def finished(self) -> int:
        return sum(store.shard_matches(self.path(i), self.key) for i in range(self.n_shards))


def compute_shards(job: Job, rank: int, size: int, progress: bool) -> None:
    """Compute this rank's shards; a shard is written while the next one is computed."""
    mine = range(rank, job.n_shards, size)
    tokens = {i: sum(job.lengths[i * job.shard_rows : (i + 1) * job.shard_rows]) for i in mine}
    missing = [i for i in mine if not store.shard_matches(job.path(i), job.key)]
    done = sum(tokens.values()) - sum(tokens[i] for i in missing)
    with _bar(progress and rank == 0 and bool(missing), sum(tokens.values()), done) as advance:
        writer = ThreadPoolExecutor(1, thread_name_prefix="annotate-writer")
        pending: Future[None] | None = None
        try:
            for shard in missing:
                columns = _compute_shard(job, shard, advance)
                if pending is not None:
                    pending.result()
                pending = writer.submit(_write, job, shard, columns)
            if pending is not None:
                pending.result()
        finally:
            writer.shutdown(wait=True)  # also after Ctrl-C: a shard that was computed is kept


def _compute_shard(job: Job, shard: int, advance: Callable[[int], None]) -> dict[str, list[list[np.ndarray]]]:
    """Values of every quantity: `{name: [role][row in shard] -> float32 [n counted tokens]}`."""
    rows = job.rows(shard)
    results = []
    for index in _batches(rows, job.max_tokens):
        batch = TokenBatch.from_samples([rows[i] for i in index])
        on_device = batch.to(job.device)
        values = {}
        with torch.no_grad():
            for name, quantity in job.quantities.items():
                values[name] = _checked(job, name, quantity(on_device), batch).detach().float()
        results.append((index, values, batch))
        advance(batch.n_tokens)
    out: dict[str, list[list[np.ndarray]]] = {
        name: [[np.empty(0, np.float32)] * len(rows) for _ in job.roles] for name in job.quantities
    }
    # Only here: reading a value earlier would stop the GPU after every batch.
    for index, values, batch in results:
        cuts = batch.segments.offsets[1:-1].tolist()
        for name, tensor in values.items():
            parts = np.split(tensor.cpu().numpy(), cuts)
            for position, part in enumerate(parts):
                row, role = index[position // len(job.roles)], position % len(job.roles)
                _check_finite(job, rows[row].row, column_name(job.roles[role], name), part)
                out[name][role][row] = part
    return out


def _batches(rows: Sequence[Sample], max_tokens: int) -> list[list[int]]:
    """Rows of similar length together, so that little of a padded batch is padding; longest first."""
    order = sorted(range(len(rows)), key=lambda i: (-rows[i].n_tokens, i))
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * rows[batches[-1][0]].n_tokens <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _checked(job: Job, name: str, values: Any, batch: TokenBatch) -> Tensor:
    expected = batch.segments.total
    if not isinstance(values, Tensor) or values.shape != (expected,):
        got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise DataError(
            f"the source of {name!r} gave a wrong number of values",
            file=job.name,
            row=batch.rows[0],
            value=got,
            expected=f"a tensor of shape ({expected},) for the batch that starts with this row",
        )
    return values


def _check_finite(job: Job, row: int | str, field: str, values: np.ndarray) -> None:
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise DataError(
            f"token {bad[0]} got a value that is not finite ({bad.size} of {values.size} tokens did)",
            file=job.name,
            row=row,
            field=field,
            value=float(values[bad[0]]),
            expected="finite numbers",
        )


def _write(job: Job, shard: int, columns: Mapping[str, list[list[np.ndarray]]]) -> None:
    rows = job.rows(shard)
    table = store.token_columns(rows, job.roles, job.holes)
    for name, by_role in columns.items():
        for index, role in enumerate(job.roles):
            parts = [_spread(rows[i].completions[index].counted, p) for i, p in enumerate(by_role[index])]
            table[column_name(role, name)] = store.list_column(parts)
    path = job.path(shard)
    with store.explain_full_disk(path, job.finished(), job.n_shards, job.folder):
        store.write_shard(path, table, job.key)


def _spread(counted: list[bool] | None, values: np.ndarray) -> np.ndarray:
    """One value per token: 0 where a token does not count."""
    if counted is None:
        return values
    out = np.zeros(len(counted), values.dtype)
    out[np.asarray(counted)] = values
    return out


@contextmanager
def _bar(show: bool, total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A progress bar with tokens per second."""
    if not show:
        yield lambda tokens: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:,.0f} tokens/s" if speed else "- tokens/s")

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), Speed())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("annotate", total=total, completed=done)
        yield lambda tokens: bar.advance(task, tokens)
