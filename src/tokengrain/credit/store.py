"""The file that `annotate` writes: rows with their token credit, keyed to the exact token ids.

A parquet file with every column of the rows and, for pairs, `prompt_ids`, `chosen_ids`, `rejected_ids` and
per-token column `chosen_<name>` and `rejected_<name>` (`<name>` is `token_rewards`, `ref_logps`, ...); rows with
one completion have `completion_ids` and `<name>`. Spans are in `chosen_token_spans` and `rejected_token_spans`,
because the rows' own `chosen_spans` hold characters. A list of numbers is as long as the list of ids
of its completion; tokens that do not count (tool output, user turns) hold 0, and `<role>_counted` says which
those are.

What the numbers were made with (model, tokenizer, template, data, ...) is in the file too: see
`tokengrain.credit.manifest`.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tokengrain.batch import Sample
from tokengrain.credit.manifest import DIGEST, METADATA, column_name, computed_columns, digest, read_manifest
from tokengrain.errors import DataError, RunError
from tokengrain.files import atomic_write

if TYPE_CHECKING:
    import pyarrow as pa


def roles_of(sample: Sample) -> tuple[str, ...]:
    """Names of a sample's completions: ("chosen", "rejected") for pairs, else ("completion",)."""
    if len(sample.completions) > 2:
        raise DataError(
            "only pairs and single completions can be annotated",
            row=sample.row,
            value=f"{len(sample.completions)} completions",
            expected="one or two",
        )
    return ("chosen", "rejected") if len(sample.completions) == 2 else ("completion",)


# ----------------------------------------------------------------------------------------------------- shards


def list_column(parts: Sequence[np.ndarray]) -> pa.Array:
    """A parquet list column with one list per row; float32 or int32 or bool by the parts' type."""
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum([len(p) for p in parts])]).astype(np.int32)
    values = np.concatenate(parts) if parts else np.empty(0, np.float32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def token_columns(samples: Sequence[Sample], roles: Sequence[str], holes: bool) -> dict[str, pa.Array]:
    """The exact token ids of the samples, and which tokens count if any of the data set does not."""
    columns = {"prompt_ids": list_column([np.asarray(s.prompt_ids, np.int32) for s in samples])}
    for index, role in enumerate(roles):
        completions = [s.completions[index] for s in samples]
        columns[f"{role}_ids"] = list_column([np.asarray(c.ids, np.int32) for c in completions])
        if holes:
            counted = [c.counted if c.counted is not None else [True] * len(c.ids) for c in completions]
            columns[f"{role}_counted"] = list_column([np.asarray(c, bool) for c in counted])
    return columns


def write_shard(path: Path, columns: Mapping[str, pa.Array], key: str) -> None:
    """Write a finished shard; it is there whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(dict(columns)).replace_schema_metadata({METADATA: key.encode()})
    with atomic_write(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def shard_matches(path: Path, key: str) -> bool:
    """Whether a finished shard with this key is there. A file that cannot be read is not one."""
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, ValueError):  # absent, or not parquet (pyarrow.ArrowInvalid is a ValueError)
        return False
    return metadata.get(METADATA) == key.encode()


def merge(
    shards: Sequence[Path], rows: Sequence[Mapping[str, Any]], output: Path, manifest: Mapping[str, Any]
) -> dict[str, Any]:
    """Put the rows and their shards together into `output`, one row group per shard, rows in input order.

    Returns:
        The manifest that is stored in the file: the given one with a digest of the rows' own columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    for left in output.parent.glob(f".{output.stem}.*.tmp{output.suffix}"):
        left.unlink()  # of a run that was killed while merging
    computed = pq.read_schema(shards[0]).remove_metadata()
    originals = _original_columns(rows, set(computed.names))
    fields = [pa.field(name, column.type) for name, column in originals.items()]
    manifest = {**manifest, DIGEST: digest(originals)}
    metadata = {METADATA: json.dumps(manifest, sort_keys=True).encode()}
    schema = pa.schema([*fields, *computed], metadata=metadata)
    start = 0
    with (
        atomic_write(output) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd") as writer,
    ):
        for shard in shards:
            table = pq.read_table(shard, partitioning=None)
            arrays = [column.slice(start, table.num_rows) for column in originals.values()]
            writer.write_table(pa.table([*arrays, *table.columns], schema=schema), row_group_size=len(table))
            start += table.num_rows
    return manifest


def _original_columns(rows: Sequence[Mapping[str, Any]], replaced: set[str]) -> dict[str, pa.Array]:
    names = dict.fromkeys(name for row in rows for name in row if name not in replaced)
    return {name: _array([row.get(name) for row in rows]) for name in names}


def _array(values: list[Any]) -> pa.Array:
    """A column of Python values; of mixed types (parquet has none) as JSON text."""
    import pyarrow as pa

    try:
        return pa.array(values, from_pandas=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        return pa.array([json.dumps(v, ensure_ascii=False, default=str) for v in values], pa.string())


@contextmanager
def explain_full_disk(path: Path, done: int, total: int, shards: Path) -> Iterator[None]:
    """Turn "no space left" into an error that says what to do and what is kept."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT) or "no space left" in str(error).lower()
        if not full:
            raise
        free = shutil.disk_usage(path.parent).free / 2**20
        raise RunError(
            f"the disk is full ({free:.0f} MiB free) while writing {path}; {done} of {total} shards are "
            f"finished and kept in {shards}. Free some space and run the same command "
            "again: it continues from there"
        ) from error


# ---------------------------------------------------------------------------------------------------- reading


def read_samples(path: str | Path) -> Iterator[Sample]:
    """Yield the samples of an annotated file with the stored token ids; computed columns are in
    `Completion.columns`.

    A column is kept only if it is there for every completion. `Sample.row` is the row number in the file.
    """
    import pyarrow.parquet as pq

    from tokengrain.batch import Completion

    manifest = read_manifest(path)
    table = pq.read_table(Path(path), partitioning=None)
    roles, names = tuple(manifest["roles"]), tuple(manifest["columns"])
    computed = computed_columns(manifest)
    missing = computed - set(table.column_names) - {f"{r}_counted" for r in roles}
    if missing:
        raise DataError("columns that annotate wrote are gone", file=path, value=sorted(missing))
    raws = table.select([n for n in table.column_names if n not in computed]).to_pylist()
    prompts = _lists(table, "prompt_ids")
    per_role: list[list[Completion]] = []
    for role in roles:
        ids = _lists(table, f"{role}_ids")
        holes = f"{role}_counted" in table.column_names
        counted = _lists(table, f"{role}_counted") if holes else [None] * len(ids)
        values = {name: _lists(table, column_name(role, name)) for name in names}
        for name, lists in values.items():
            _check_lengths(path, column_name(role, name), lists, ids)
        completions = []
        for row, (tokens, keep) in enumerate(zip(ids, counted, strict=True)):
            columns = {n: v[row] if keep is None else v[row][keep] for n, v in values.items()}
            completions.append(Completion(tokens.tolist(), None if keep is None else keep.tolist(), columns))
        per_role.append(completions)
    for row, (prompt, raw, *completions) in enumerate(zip(prompts, raws, *per_role, strict=True)):
        yield Sample(prompt.tolist(), list(completions), row=row, raw=raw)


def _check_lengths(path: str | Path, field: str, lists: Iterable[np.ndarray], ids: Iterable[np.ndarray]) -> None:
    for row, (values, tokens) in enumerate(zip(lists, ids, strict=True)):
        if len(values) != len(tokens):
            raise DataError(
                "the list does not fit the completion",
                file=path,
                row=row,
                field=field,
                value=f"{len(values)} numbers",
                expected=f"{len(tokens)}, one per token",
            )


def _lists(table: pa.Table, name: str) -> list[np.ndarray]:
    """A list column as one numpy array per row."""
    column = table.column(name).combine_chunks()
    values = column.values.to_numpy(zero_copy_only=False)
    return [values[start:end] for start, end in pairwise(column.offsets.to_numpy())]
