"""Run a credit source over a data set once, and store the numbers beside the rows.

The rows are cut into shards. Rank r of W computes shards r, r + W, ...; each is written as soon as it is done, so a
killed run continues where it stopped, and rank 0 puts them together. What is in a shard does not depend on who computed
it: one process, two processes and a resumed run give the same file.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from torch import Tensor

from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.data.config import RowError, TokenizeConfig
from tokengrain.data.dataset import PairDataset, prepare_pairs
from tokengrain.data.encode import pictures_of
from tokengrain.data.formats import check_encodable, stored_row
from tokengrain.data.rows import Rows, load_rows
from tokengrain.data.tokens import text_tokenizer
from tokengrain.data.vision import folder_of
from tokengrain.errors import DataError, RunError, atomic_write, fingerprint, foreign, read_json, require, write_json
from tokengrain.method import as_credit, make_credit
from tokengrain.scoring.reference import FrozenReference, LiveReference, scorer_fingerprint
from tokengrain.screen import progress_bar

Source = Callable[[TokenBatch], Tensor]
CPU_TOKENS, GPU_TOKENS = 8_192, 32_768  # default token budget of one forward pass


def annotate(
    rows_source: Any,
    tokenizer: Any,
    tokenize_config: TokenizeConfig | None,
    sources: Mapping[str, Callable[[TokenBatch], Tensor]],
    reference: Callable[..., Any] | None = None,
    output: str | os.PathLike[str] = "annotated.parquet",
    fingerprints: Mapping[str, str] | None = None,
    *,
    shard_rows: int = 512,
    max_tokens: int | None = None,
    device: torch.device | str | None = None,
    rows: Rows | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write the rows of a data set with their token credit to one parquet file.

    Per-token columns that the data set has already, such as spans, are in it too. Called again after a kill or a full
    disk it continues. Call it in every process of `accelerate launch` or `torchrun` to share the work.

    Args:
        rows_source: preference pairs (anything `tokengrain.data.load_rows` takes), or a prepared data set.
        tokenizer: the tokenizer, or the processor of a model that sees (None with a data set that is prepared already).
        tokenize_config: how rows become tokens.
        sources: column name to credit source, for example `{"token_rewards": make_credit("guide", ...)}`; a source
            maps a batch to `[N]` finite numbers. May be empty if there is a reference.
        reference: also store its log-probabilities, as `chosen_ref_logps`, `rejected_ref_logps` (nats).
        output: the parquet file to write.
        fingerprints: what the numbers depend on, as hexadecimal digests by name: `model`, `tokenizer`,
            `chat_template`, `data`, `source`, `tokenize`. `check_manifest` compares them at training time. Where
            `source` is not given, nor `model` or `reference`, the sources and the reference are asked for theirs.
        shard_rows: rows per shard; a killed process loses two shards of work at most.
        max_tokens: token budget of one forward pass (default 8,192 on CPU, 32,768 on GPU).
        device: where batches are put (default: the device of the first model found in sources or reference).
        rows: the rows that a prepared data set was made from; without them only the columns that its
            samples kept are written (prompt, chosen, rejected), not the other columns of the rows.
        overwrite: replace an output that was made with something else, instead of an error.
        progress: show a progress bar (rank 0).

    Returns:
        The path of the file.

    Raises:
        DataError: a source gave a wrong number of values, or one that is not finite; names the row.
        RunError: the output was made with something else; the disk is full (shards are kept); another process
            failed.
    """
    rank, size = world()
    dataset = rows_source
    if not isinstance(dataset, PairDataset):
        rows = load_rows(rows_source)
        expected = "rows that fit in memory"
        require(not rows.streaming, DataError, "a stream cannot be annotated", file=rows.name, expected=expected)
        dataset = prepare_pairs(rows, tokenizer, tokenize_config)
    require(len(dataset), DataError, "there are no rows to annotate", file=dataset.name)
    place = torch.device(device) if device is not None else _device_of([*sources.values(), reference])
    quantities = _quantities(dataset, sources, reference)
    marks = dict(fingerprints or {})
    if sources and "source" not in marks:
        marks["source"] = fingerprint({name: as_credit(source).fingerprint() for name, source in sources.items()})
    if reference is not None and not {"model", "reference"} & set(marks):
        marks["reference"] = scorer_fingerprint(reference)
    budget = max_tokens or (CPU_TOKENS if place.type == "cpu" else GPU_TOKENS)
    content = {"format": FORMAT, "fingerprints": marks, "columns": list(quantities)}
    # What a shard holds depends on the tokens and on what was batched together too.
    parts = {"tokens": dataset.fingerprint, "shard_rows": shard_rows, "max_tokens": budget}
    job = Job(dataset, quantities, Path(output), fingerprint({**content, **parts}), shard_rows, budget, place)
    manifest = {**content, "roles": list(job.roles), "rows": len(dataset), "key": job.key}
    originals = partial(_originals, dataset, rows, tokenize_config)
    if rows is not None:
        check_storable(rows)
    if _already_done(job, manifest, originals, overwrite):
        if rank == 0:  # a run killed right after the merge left these
            write_manifest(job.output, read_manifest(job.output))
            shutil.rmtree(job.folder, ignore_errors=True)
        return job.output
    with agreement(size):
        compute_shards(job, rank, size, progress)
    with agreement(size):
        if rank == 0:
            with keeping_shards(job):
                write_manifest(job.output, merge(job, own_columns(originals(), manifest), manifest))
            shutil.rmtree(job.folder)
    return job.output


def check_storable(rows: Rows) -> None:
    """Raises `DataError` for text that parquet cannot hold: half of a surrogate pair, which JSON may have."""
    for number, row in rows:
        for name, value in row.items():
            try:
                check_encodable(json.dumps(value, ensure_ascii=False, default=str), str(name))
            except RowError as error:
                raise error.located(*rows.place(number)) from None


def _originals(dataset: PairDataset, rows: Rows | None, config: TokenizeConfig | None) -> list[dict[str, Any]]:
    """The rows of the samples as the file keeps them, which lies elsewhere than theirs."""
    by_number: dict[Any, Any] = dict(rows or ())
    found = []
    for row, raw in zip(dataset.samples.rows, dataset.samples.raws, strict=True):
        file = None if rows is None else rows.place(int(row))[0]
        found.append(stored_row(raw if rows is None else by_number[row], folder_of(file, config or TokenizeConfig())))
    return found


def _quantities(
    dataset: PairDataset, sources: Mapping[str, Source], reference: Callable[..., Any] | None
) -> dict[str, Source]:
    """Everything that is stored, by column: what the sources give, the reference, and what the rows have already."""
    quantities = dict(sources)
    if reference is not None:
        if isinstance(reference, LiveReference):
            reference = copy.copy(reference)
            reference.stored = True
        shared = _SharedPass(reference)
        quantities = {name: shared.given_to(source) for name, source in sources.items()}
        quantities["ref_logps"] = lambda batch: shared(batch, {"logps"}).logps
    require(quantities, RunError, "nothing to annotate: give at least one credit source or a reference")
    # The rows' own columns (spans, say) have to be there again when the file is read.
    return quantities | {name: make_credit("column", column=name) for name in dataset.columns if name not in quantities}


def _already_done(
    job: Job, manifest: Mapping[str, Any], originals: Callable[[], Sequence[Mapping[str, Any]]], overwrite: bool
) -> bool:
    """Whether the output is there and the one wanted; an output made with something else is an error."""
    if not job.output.exists():
        return False
    stored: dict[str, Any] = {}
    with suppress(RunError):
        stored = read_manifest(job.output)
    same = {k: v for k, v in stored.items() if k != DIGEST} == manifest
    if same and stored.get(DIGEST) == digest(own_columns(originals(), manifest)):
        return True
    found = differences(stored.get("fingerprints", {}), manifest["fingerprints"])
    why = f"was made with {'; with '.join(found)}" if found else "has other rows, columns or settings"
    advice = "Nothing was changed: choose another output, or ask to overwrite it"
    require(overwrite, RunError, f"{job.output} is there already and {why}. {advice}")
    return False


def load_annotated(
    path: str | os.PathLike[str],
    tokenizer: Any = None,
    expected_fingerprints: Mapping[str, str] | None = None,
    config: TokenizeConfig | None = None,
) -> PairDataset:
    """An annotated file as a data set to train on; the stored token ids are used as they are.

    If a tokenizer is given, prompts must lie in its vocabulary (docids may lie beyond); a processor also reads the
    rows' pictures, as `config` says. `check_manifest` compares the fingerprints.
    """
    path = Path(path)
    check_manifest(path, expected_fingerprints or {})
    sees, tokenizer = pictures_of(tokenizer, config), tokenizer and text_tokenizer(tokenizer)

    def within(samples: Iterable[Sample]) -> Iterator[Sample]:
        for sample in samples:
            highest = max(sample.prompt_ids, default=0)
            if tokenizer is not None and highest >= len(tokenizer):
                raise RunError(f"{path} has token id {highest}, but the tokenizer has only {len(tokenizer)} tokens")
            yield sample if sees is None else sees(sample, path)

    return PairDataset(within(read_samples(path)), name=str(path))


def _device_of(holders: Sequence[Any]) -> torch.device:
    """Device of the first model found in the sources (and what they hold), else the CPU."""
    queue = list(holders)
    for holder in queue:  # grows as it is read
        if isinstance(holder, torch.nn.Module):
            if (first := next(holder.parameters(), None)) is not None:
                return first.device
        elif type(holder).__module__.startswith("tokengrain."):
            queue += [held for held in vars(holder).values() if not any(held is known for known in queue)]
    return torch.device("cpu")


# What an annotated file says of itself: which columns were computed, and what they were computed with. It is in the
# file's own metadata, so a copied file stays checked; `manifest.json` beside it says the same for people.

FORMAT = 1
MANIFEST = "manifest.json"
METADATA = b"tokengrain"
DIGEST = "digest"
_NAMES = {"reference": "reference model", "source": "credit source", "tokenize": "tokenisation settings"}


def column_name(role: str, name: str) -> str:
    """Column for a per-token quantity: `chosen_token_rewards`, or `token_rewards` for one completion."""
    name = "token_spans" if name == "spans" else name
    return name if role == "completion" else f"{role}_{name}"


def is_annotated(path: object) -> TypeGuard[str | Path]:
    return isinstance(path, (str, Path)) and METADATA in _metadata(path)


def _metadata(path: str | Path) -> dict[bytes, bytes]:
    """A parquet file's metadata; none where it is absent, a folder, or not parquet."""
    with suppress(OSError, ValueError):  # pyarrow.ArrowInvalid is a ValueError
        return pq.read_schema(path).metadata or {}
    return {}


def read_manifest(path: str | Path) -> dict[str, Any]:
    """What an annotated file was made with: from the file, else from `manifest.json` beside it."""
    path = Path(path)
    require(path.is_file(), RunError, f"{path}: there is no such annotated file; run `tokengrain annotate` first")
    with foreign(f"{path}: not a parquet file written by annotate: "):
        metadata = pq.read_schema(path).metadata or {}
        if METADATA in metadata:
            return dict(json.loads(metadata[METADATA]))
        beside = path.with_name(MANIFEST)
        files = read_json(beside).get("files", {}) if beside.is_file() else {}
    what = "does not say which model, tokenizer and data its token rewards were made with, so they cannot be checked"
    advice = "Annotate again, or give the file as ordinary `data` with token reward columns"
    require(path.name in files, RunError, f"{path}: {what}. {advice}")
    return files[path.name]


def write_manifest(output: Path, manifest: Mapping[str, Any]) -> None:
    """Record `output` in the folder's `manifest.json`, beside other annotated files of the folder."""
    path = output.with_name(MANIFEST)
    files = read_json(path).get("files", {}) if path.is_file() else {}
    write_json(path, {"format": FORMAT, "files": {**files, output.name: dict(manifest)}})


def differences(stored: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """One phrase per fingerprint of `now` that `stored` does not match."""
    return [
        f"another {_NAMES.get(name, name.replace('_', ' '))} (file: {stored.get(name, 'not recorded')}, now: {value})"
        for name, value in now.items()
        if stored.get(name) != value
    ]


def check_manifest(path: str | Path, expected: Mapping[str, str]) -> dict[str, Any]:
    """The manifest of an annotated file; `RunError` names every fingerprint in `expected` that it does not match."""
    manifest = read_manifest(path)
    found = differences(manifest.get("fingerprints", {}), expected)
    table, computed = pq.read_table(Path(path), partitioning=None), computed_columns(manifest)
    if manifest.get(DIGEST) != digest({n: table.column(n) for n in table.column_names if n not in computed}):
        found.append("other data (rows were changed after annotating)")
    advice = "Its token rewards do not belong to this run: annotate again, or go back to what it was made with"
    require(not found, RunError, f"{path} was annotated with {'; with '.join(found)}. {advice}")
    return manifest


def computed_columns(manifest: Mapping[str, Any]) -> set[str]:
    """Columns that annotate adds to the rows (or puts in the place of a row's own, such as token rewards)."""
    roles = manifest["roles"]
    ids = {"prompt_ids", *(f"{r}_ids" for r in roles), *(f"{r}_counted" for r in roles)}
    return ids | {column_name(r, n) for r in roles for n in manifest["columns"]}


def own_columns(rows: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any]) -> dict[str, pa.Array]:
    """The columns that the rows have of their own."""
    computed = computed_columns(manifest)
    names = dict.fromkeys(name for row in rows for name in row if name not in computed)
    return {name: _array([row.get(name) for row in rows]) for name in names}


def digest(columns: Mapping[str, Any]) -> str:
    """Identifies the rows' own columns: an edited row does not have the tokens that its numbers belong to."""
    return fingerprint({name: column.to_pylist() for name, column in columns.items()})


# The file: a parquet file with every column of the rows and, for pairs, `prompt_ids`, `chosen_ids`, `rejected_ids` and
# per-token columns `chosen_<name>` and `rejected_<name>` (`<name>` is `token_rewards`, `ref_logps`, ...); rows with one
# completion have `completion_ids` and `<name>`. Spans are in `chosen_token_spans` and `rejected_token_spans`, because
# the rows' own `chosen_spans` hold characters. Further rejected completions have `rejected_2_ids` and so on. A list of
# numbers is as long as the list of ids of its completion; tokens that do not count (tool output, user turns) hold 0,
# and `<role>_counted` says which those are.


def list_column(parts: Sequence[np.ndarray]) -> pa.Array:
    """A list column with one list per row, of the parts' type."""
    offsets = np.cumsum([0, *map(len, parts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(parts)))


def token_columns(samples: Sequence[Sample], roles: Sequence[str], holes: bool) -> dict[str, pa.Array]:
    """The exact token ids of the samples, and which tokens count if any of the data set does not.

    A row that has fewer rejected completions than others has empty lists.
    """
    none = Completion([])
    columns = {"prompt_ids": list_column([np.asarray(s.prompt_ids, np.int32) for s in samples])}
    for index, role in enumerate(roles):
        completions = [s.completions[index] if index < len(s.completions) else none for s in samples]
        columns[f"{role}_ids"] = list_column([np.asarray(c.ids, np.int32) for c in completions])
        if holes:
            counted = [np.asarray(c.counted or [True] * len(c.ids), bool) for c in completions]
            columns[f"{role}_counted"] = list_column(counted)
    return columns


def write_shard(path: Path, columns: Mapping[str, pa.Array], key: str) -> None:
    """Write a finished shard; it is there whole or not at all."""
    table = pa.table(dict(columns)).replace_schema_metadata({METADATA: key.encode()})
    with atomic_write(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def shard_matches(path: Path, key: str) -> bool:
    """Whether a finished shard with this key is there. A file that cannot be read is not one."""
    return _metadata(path).get(METADATA) == key.encode()


def merge(job: Job, originals: Mapping[str, pa.Array], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Put rows and shards together, one row group per shard; gives the manifest with a digest of the rows' columns."""
    output, shards = job.output, [job.path(i) for i in range(job.n_shards)]
    for left in output.parent.glob(f".{output.stem}.*.tmp{output.suffix}"):
        left.unlink()  # of a run that was killed while merging
    computed = pq.read_schema(shards[0]).remove_metadata()
    fields = [pa.field(name, column.type) for name, column in originals.items()]
    text = json.dumps({**manifest, DIGEST: digest(originals)}, sort_keys=True)
    metadata = {METADATA: text.encode()}
    schema = pa.schema([*fields, *computed], metadata=metadata)
    start = 0
    with atomic_write(output) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for shard in shards:
            table = pq.read_table(shard, partitioning=None)
            arrays = [column.slice(start, table.num_rows) for column in originals.values()]
            writer.write_table(pa.table([*arrays, *table.columns], schema=schema), row_group_size=len(table))
            start += table.num_rows
    return dict(json.loads(text))  # as it is read again: a run that was killed now writes the same


def _array(values: list[Any]) -> pa.Array:
    """A column of Python values; of mixed types (parquet has none) as JSON text."""
    try:
        return pa.array(values, from_pandas=False)
    except pa.ArrowException:  # values that no type of Arrow holds together
        return pa.array([json.dumps(v, ensure_ascii=False, default=str) for v in values], pa.string())


@contextmanager
def keeping_shards(job: Job) -> Iterator[None]:
    """Around writing: an error also says what is kept."""
    try:
        yield
    except RunError as error:
        finished = sum(shard_matches(job.path(i), job.key) for i in range(job.n_shards))
        kept = f"{finished} of {job.n_shards} shards are finished and kept in {job.folder}"
        raise RunError(f"{error}; {kept}, and the same command continues from there") from error


def read_samples(path: str | Path) -> Iterator[Sample]:
    """The samples of an annotated file; `Sample.row` is the row's number in it."""
    manifest = read_manifest(path)
    table = pq.read_table(Path(path), partitioning=None)
    roles, names, computed = manifest["roles"], manifest["columns"], computed_columns(manifest)
    missing = sorted(computed - set(table.column_names) - {f"{r}_counted" for r in roles})
    require(not missing, DataError, "columns that annotate wrote are gone", file=path, value=missing)
    raws = table.select([n for n in table.column_names if n not in computed]).to_pylist()
    prompts = _lists(table, "prompt_ids")
    per_role: list[list[Completion]] = []
    for role in roles:
        ids = _lists(table, f"{role}_ids")
        holes = f"{role}_counted" in table.column_names
        counted = _lists(table, f"{role}_counted") if holes else [None] * len(ids)
        values = {name: _lists(table, column_name(role, name)) for name in names}
        completions = []
        for row, (tokens, keep) in enumerate(zip(ids, counted, strict=True)):
            for name, lists in values.items():
                if len(lists[row]) != len(tokens):
                    where: dict[str, Any] = {"file": path, "row": row, "field": column_name(role, name)}
                    got, expected = f"{len(lists[row])} numbers", f"{len(tokens)}, one per token"
                    raise DataError("the list does not fit the completion", **where, value=got, expected=expected)
            columns = {n: v[row] if keep is None else v[row][keep] for n, v in values.items()}
            completions.append(Completion(tokens.tolist(), None if keep is None else keep.tolist(), columns))
        per_role.append(completions)
    for row, (prompt, raw, *completions) in enumerate(zip(prompts, raws, *per_role, strict=True)):
        yield Sample(prompt.tolist(), [c for c in completions if c.ids], row=row, raw=raw)


def _lists(table: pa.Table, name: str) -> list[np.ndarray]:
    column = table.column(name).combine_chunks()
    values = column.values.to_numpy(zero_copy_only=False)
    return [values[start:end] for start, end in pairwise(column.offsets.to_numpy())]


@dataclass(frozen=True)
class Job:
    dataset: PairDataset
    quantities: Mapping[str, Source]
    output: Path
    key: str
    shard_rows: int
    max_tokens: int
    device: torch.device

    @cached_property
    def roles(self) -> tuple[str, ...]:
        """Names of a row's completions: ("chosen", "rejected", "rejected_2", ...) for pairs, else ("completion",)."""
        most = max(len(s.completions) for s in self.dataset.samples)
        more = (f"rejected_{i}" for i in range(2, most))
        return ("chosen", "rejected", *more) if most > 1 else ("completion",)

    @cached_property
    def holes(self) -> bool:
        return any(c.counted is not None for s in self.dataset.samples for c in s.completions)

    @property
    def folder(self) -> Path:
        return self.output.with_name(f"{self.output.stem}.shards")

    @property
    def n_shards(self) -> int:
        return -(-len(self.dataset) // self.shard_rows)

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.parquet"

    def rows(self, shard: int) -> slice:
        return slice(shard * self.shard_rows, (shard + 1) * self.shard_rows)


def compute_shards(job: Job, rank: int, size: int, progress: bool) -> None:
    """Compute this rank's shards; a shard is written while the next one is computed."""
    mine = range(rank, job.n_shards, size)
    lengths = job.dataset.lengths
    tokens = {i: sum(lengths[job.rows(i)]) for i in mine}
    missing = [i for i in mine if not shard_matches(job.path(i), job.key)]
    total = sum(tokens.values())
    done, quiet = total - sum(tokens[i] for i in missing), not (progress and rank == 0 and missing)
    # The pool waits for its thread also after Ctrl-C: a shard that was computed is kept.
    with (
        progress_bar("annotate, tokens", total, done=done, stays=True, quiet=quiet) as update,
        ThreadPoolExecutor(1, thread_name_prefix="annotate-writer") as writer,
    ):
        pending: list[Future[None]] = []
        for shard in missing:
            columns = _compute_shard(job, shard, update)
            for written in pending:
                written.result()
            pending = [writer.submit(_write, job, shard, columns)]
        for written in pending:
            written.result()


def _compute_shard(job: Job, shard: int, update: Callable[..., None]) -> dict[str, list[np.ndarray]]:
    """Every computed column: per row of the shard one float32 per token, 0 where a token does not count."""
    rows = job.dataset.samples[job.rows(shard)]
    results = []
    for index in _batches(rows, job.max_tokens):
        batch = TokenBatch.from_samples([rows[i] for i in index])
        on_device = batch.to(job.device)
        with torch.no_grad():
            found = {name: _checked(job, name, quantity(on_device), batch) for name, quantity in job.quantities.items()}
        results.append((index, found, batch))
        update(advance=batch.n_tokens)
    names = [column_name(role, name) for name in job.quantities for role in job.roles]
    out = {name: [np.empty(0, np.float32)] * len(rows) for name in names}
    # Only here: reading a value earlier would stop the GPU after every batch.
    for index, values, batch in results:
        cuts = batch.segments.offsets[1:-1].tolist()
        sides = [(place, side) for place, i in enumerate(index) for side in range(len(rows[i].completions))]
        for name, tensor in values.items():
            for (place, side), part in zip(sides, np.split(tensor.cpu().numpy(), cuts), strict=True):
                row, column = rows[index[place]], column_name(job.roles[side], name)
                _check_finite(job, row.row, column, part)
                if (counted := row.completions[side].counted) is not None:
                    part, numbers = np.zeros(len(counted), part.dtype), part
                    part[np.asarray(counted)] = numbers
                out[column][index[place]] = part
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
    if not isinstance(values, Tensor) or values.shape != (batch.segments.total,):
        got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        wanted = f"a tensor of shape ({batch.segments.total},) for the batch that starts with this row"
        what = f"the source of {name!r} gave a wrong number of values"
        raise DataError(what, file=job.dataset.name, row=batch.rows[0], value=got, expected=wanted)
    return values.detach().float()


def _check_finite(job: Job, row: int | str, field: str, values: np.ndarray) -> None:
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        what = f"token {bad[0]} got a value that is not finite ({bad.size} of {values.size} tokens did)"
        value = float(values[bad[0]])
        raise DataError(what, file=job.dataset.name, row=row, field=field, value=value, expected="finite numbers")


def _write(job: Job, shard: int, columns: Mapping[str, list[np.ndarray]]) -> None:
    path, table = job.path(shard), token_columns(job.dataset.samples[job.rows(shard)], job.roles, job.holes)
    table |= {name: list_column(parts) for name, parts in columns.items()}
    with keeping_shards(job):
        write_shard(path, table, job.key)


def world() -> tuple[int, int]:
    """(rank, number of processes); joins the world if a launcher set one up."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        PartialState()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


@contextmanager
def agreement(size: int) -> Iterator[None]:
    """Wait for the other processes at the end; if any failed, all raise instead of waiting for ever."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # Ctrl-C is not caught: the launcher sends it to every process
        error = caught
    if size > 1:
        messages: list[str | None] = [None] * size
        torch.distributed.all_gather_object(messages, None if error is None else str(error) or repr(error))
        failed = [(rank, message) for rank, message in enumerate(messages) if message is not None]
        if error is None and failed:
            raise RunError(f"annotation stopped because process {failed[0][0]} failed: {failed[0][1]}")
    if error is not None:
        raise error


class _SharedPass:
    """A reference that answers a second question about the same batch from its first forward pass."""

    batch: TokenBatch | None = None
    answer: Any = None

    def __init__(self, reference: Callable[..., Any]) -> None:
        self.reference = reference

    def __call__(self, batch: TokenBatch, want: Collection[str]) -> Any:
        if set(want) != {"logps"}:
            return self.reference(batch, want)
        if self.batch is not batch:
            self.batch, self.answer = batch, self.reference(batch, {"logps"})
        return self.answer

    def given_to(self, source: Any) -> Any:
        """`source`; if it asks the same frozen model, a copy that shares the forward pass of the stored logps."""
        asked = getattr(source, "reference", None)
        if asked is None or _frozen_model(asked) is not _frozen_model(self.reference):
            return source
        source = copy.copy(source)
        source.reference = self
        return source


def _frozen_model(reference: Any) -> Any:
    """What answers for a reference: the model of a `FrozenReference`, else the reference itself."""
    return reference.model if isinstance(reference, FrozenReference) else reference
