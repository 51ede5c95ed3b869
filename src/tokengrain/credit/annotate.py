"""Run a credit source over a data set once, and store the numbers beside the rows.

The data set is cut into shards of consecutive rows. Rank r of W computes shards r, r + W, ...; each is
written as soon as it is done, so a killed run continues where it stopped. At the end rank 0 puts the shards
together. What is in a shard does not depend on who computed it, so one process, two processes and a resumed
run give the same file.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokengrain.batch import Sample, TokenBatch
from tokengrain.credit import store
from tokengrain.credit.base import scorer_fingerprint
from tokengrain.credit.manifest import DIGEST, FORMAT, check_manifest, differences, read_manifest, write_manifest
from tokengrain.credit.processes import agreement, world
from tokengrain.credit.remembered import Remembered, asking
from tokengrain.credit.shards import Job, compute_shards
from tokengrain.credit.simple import ColumnCredit, FunctionCredit
from tokengrain.errors import DataError, RunError
from tokengrain.files import fingerprint

if TYPE_CHECKING:
    from tokengrain.data import PairDataset, Rows, TokenizeConfig

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

    `tokengrain.credit.store` says what is in the file. Per-token columns that the data set has already, such as
    spans, are in it too.

    Call it again after a kill or a full disk: finished shards are not computed again. Call it in every
    process of a `torch.distributed` world (`accelerate launch`, `torchrun`) to share the work.

    Args:
        rows_source: preference pairs (anything `tokengrain.data.load_rows` takes), or a prepared data set.
        tokenizer: the tokenizer (may be None with a data set that is prepared already).
        tokenize_config: how rows become tokens.
        sources: column name to credit source, for example `{"token_rewards": GuideLogRatio(...)}`; a source
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
    dataset, rows = _dataset(rows_source, rows, tokenizer, tokenize_config)
    place = torch.device(device) if device is not None else _device_of([*sources.values(), reference])
    quantities = _quantities(dataset, sources, reference)
    marks = _completed(fingerprints or {}, sources, reference)
    job = _job(dataset, quantities, Path(output), marks, shard_rows, max_tokens, place)
    manifest = _manifest(job, marks)
    if _already_done(job, manifest, overwrite):
        if rank == 0:  # a run killed right after the merge left these
            write_manifest(job.output, read_manifest(job.output))
            shutil.rmtree(job.folder, ignore_errors=True)
        return job.output
    with agreement(size):
        compute_shards(job, rank, size, progress)
    with agreement(size):
        if rank == 0:
            _finish(job, manifest, _originals(dataset.samples, rows))
    return job.output


def _completed(
    given: Mapping[str, str],
    sources: Mapping[str, Callable[[TokenBatch], Tensor]],
    reference: Callable[..., Any] | None,
) -> dict[str, str]:
    """`given`, and where it does not say: which sources and which reference the numbers come from."""
    own = dict[str, str]()
    if sources and "source" not in given:
        named = {n: s if hasattr(s, "fingerprint") else FunctionCredit(function=s) for n, s in sources.items()}
        own["source"] = fingerprint({name: source.fingerprint() for name, source in named.items()})
    if reference is not None and not {"model", "reference"} & given.keys():
        own["reference"] = scorer_fingerprint(reference)
    return {**own, **given}


def _quantities(
    dataset: PairDataset, sources: Mapping[str, Callable[[TokenBatch], Tensor]], reference: Callable[..., Any] | None
) -> dict[str, Callable[[TokenBatch], Tensor]]:
    """Everything that is stored, by column: what the sources give, the reference, and what the rows brought along."""
    quantities = dict(sources)
    if reference is not None:
        shared = Remembered(reference)
        quantities = {name: asking(source, reference, shared) for name, source in sources.items()}
        quantities["ref_logps"] = lambda batch: shared(batch, {"logps"}).logps
    if not quantities:
        raise RunError("nothing to annotate: give at least one credit source or a reference")
    # The rows' own columns (spans, say) have to be there again when the file is read.
    return quantities | {name: ColumnCredit(column=name) for name in dataset.columns if name not in quantities}


def _job(
    dataset: PairDataset,
    quantities: Mapping[str, Callable[[TokenBatch], Tensor]],
    output: Path,
    fingerprints: Mapping[str, str],
    shard_rows: int,
    max_tokens: int | None,
    device: torch.device,
) -> Job:
    budget = max_tokens or (CPU_TOKENS if device.type == "cpu" else GPU_TOKENS)
    return Job(
        samples=dataset.samples,
        lengths=dataset.lengths,
        roles=store.roles_of(dataset.samples[0]),
        quantities=quantities,
        name=dataset.name,
        output=output,
        key=_key(dataset, list(quantities), fingerprints, shard_rows, budget),
        shard_rows=shard_rows,
        max_tokens=budget,
        device=device,
        holes=any(c.counted is not None for s in dataset.samples for c in s.completions),
    )


def _manifest(job: Job, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "roles": list(job.roles),
        "columns": list(job.quantities),
        "fingerprints": dict(fingerprints),
        "rows": len(job.samples),
        "key": job.key,
    }


def _already_done(job: Job, manifest: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether the output is there and the one wanted; an output made with something else is an error."""
    if not job.output.exists():
        return False
    try:
        stored = read_manifest(job.output)
    except RunError:
        stored = {}
    if {k: v for k, v in stored.items() if k != DIGEST} == manifest:
        return True
    if overwrite:
        return False
    found = differences(stored.get("fingerprints", {}), manifest["fingerprints"])
    why = f"was made with {'; with '.join(found)}" if found else "has other rows, columns or settings"
    raise RunError(
        f"{job.output} is there already and {why}. Nothing was changed: choose another output, or ask to overwrite it"
    )


def _finish(job: Job, manifest: Mapping[str, Any], originals: Sequence[Mapping[str, Any]]) -> None:
    """Put the shards together, then record the file and drop the shards."""
    shards = [job.path(i) for i in range(job.n_shards)]
    with store.explain_full_disk(job.output, job.finished(), job.n_shards, job.folder):
        stored = store.merge(shards, originals, job.output, manifest)
        write_manifest(job.output, stored)
    shutil.rmtree(job.folder)


# ------------------------------------------------------------------------------------------------------- data


def load_annotated(
    path: str | os.PathLike[str],
    tokenizer: Any = None,
    expected_fingerprints: Mapping[str, str] | None = None,
) -> PairDataset:
    """An annotated file as a data set to train on; the stored token ids are used as they are.

    Args:
        path: file written by `annotate`.
        tokenizer: if given, the stored ids must lie in its vocabulary.
        expected_fingerprints: checked by `check_manifest`.

    Raises:
        RunError: another model, tokenizer, chat template, data or source; says which.
        DataError: rows whose numbers do not fit their tokens.
    """
    from tokengrain.data import PairDataset

    path = Path(path)
    check_manifest(path, expected_fingerprints or {})
    vocabulary = len(tokenizer) if tokenizer is not None else None
    return PairDataset(_within(store.read_samples(path), vocabulary, path), name=str(path))


def _within(samples: Iterable[Sample], vocabulary: int | None, path: Path) -> Iterator[Sample]:
    """The samples; an error at the first token that the tokenizer does not have."""
    for sample in samples:
        highest = max([*sample.prompt_ids, *(t for c in sample.completions for t in c.ids)], default=0)
        if vocabulary is not None and highest >= vocabulary:
            raise RunError(f"{path} has token id {highest}, but the tokenizer has only {vocabulary} tokens")
        yield sample


def _dataset(
    source: Any, rows: Rows | None, tokenizer: Any, config: TokenizeConfig | None
) -> tuple[PairDataset, Rows | None]:
    """The samples, and the rows they were made from (not known for a data set that is prepared already)."""
    from tokengrain.data import PairDataset, load_rows, prepare_pairs

    if isinstance(source, PairDataset):
        dataset = source
    else:
        rows = load_rows(source)
        if rows.streaming:
            raise DataError("a stream cannot be annotated", file=rows.name, expected="rows that fit in memory")
        dataset = prepare_pairs(rows, tokenizer, config)
    if not len(dataset):
        raise DataError("there are no rows to annotate", file=dataset.name)
    return dataset, rows


def _originals(samples: Iterable[Sample], rows: Rows | None) -> list[Mapping[str, Any]]:
    """All columns of the row that each sample was made from."""
    if rows is None:
        return [s.raw for s in samples]
    by_number: dict[int | str, Any] = dict(rows)
    return [by_number[s.row] for s in samples]


def _key(
    dataset: PairDataset,
    columns: Sequence[str],
    fingerprints: Mapping[str, str],
    shard_rows: int,
    max_tokens: int,
) -> str:
    """Identifies a shard's content: the token ids, what was computed, with what, and how it was batched."""
    return fingerprint(
        {
            "format": FORMAT,
            "fingerprints": dict(fingerprints),
            "columns": list(columns),
            "tokens": dataset.fingerprint,
            "shard_rows": shard_rows,
            "max_tokens": max_tokens,
        }
    )


def _device_of(holders: Sequence[Any]) -> torch.device:
    """Device of the first model found in the sources (and what they hold), else the CPU."""
    seen, queue = set(), list(holders)
    while queue:
        holder = queue.pop(0)
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        if isinstance(holder, torch.nn.Module):
            first = next(holder.parameters(), None)
            if first is not None:
                return first.device
        elif type(holder).__module__.startswith("tokengrain."):
            queue.extend(vars(holder).values())
    return torch.device("cpu")
