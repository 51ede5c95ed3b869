"""`load_rows`: any source of rows as one type, `Rows`."""

from __future__ import annotations

import difflib
import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, overload

from tokengrain.data.readers import file_kind
from tokengrain.data.rows import FileRows, IteratedRows, Rows, RowStream, StoredRows
from tokengrain.errors import DataError
from tokengrain.files import file_fingerprint, fingerprint

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
KNOWN_SPLITS = ("train", "test", "validation", "valid", "dev", "eval")


@overload
def load_rows(source: Any, *, split: str | None = ..., streaming: Literal[True]) -> RowStream: ...
@overload
def load_rows(source: Any, *, split: str | None = ..., streaming: bool = ...) -> Rows: ...
def load_rows(source: Any, *, split: str | None = None, streaming: bool = False) -> Rows:
    """Rows from a source, whatever it is.

    Args:
        source: a path of a .jsonl, .json (an array, or lines), .csv or .parquet file, each also gzipped; a
            folder of such files, or one written by `datasets.save_to_disk`; a list of mappings; a
            `datasets.Dataset`, `IterableDataset` or dictionary of them; or, where no such path exists, the
            name of a dataset on the hub. A `Rows` is returned as it is.
        split: which split of a folder (files whose names begin with it), dataset dictionary or hub dataset.
            Default: the only one, or "train".
        streaming: read rows as they are asked for; for sets larger than memory.

    Raises:
        DataError: there is no such source, it is empty, or it is damaged (streaming: once read that far).
    """
    if isinstance(source, Rows):
        return source
    if isinstance(source, (str, PathLike)):
        return _from_name(source, split, streaming)
    if type(source).__module__.split(".")[0] == "datasets":
        return _from_datasets(source, "dataset", split, streaming)
    if isinstance(source, Sequence) and not isinstance(source, (bytes, bytearray)):
        if split is not None:
            raise DataError("a list of rows has no splits", file="list of rows", value=split, expected="split: none")
        return StoredRows("list of rows", source, lambda: fingerprint(list(source)))
    raise DataError(
        "this is not a source of rows",
        value=type(source).__name__,
        expected="a path, a list of mappings, a datasets.Dataset or a hub name",
    )


def split_rows(rows: Any, eval_fraction: float, seed: int) -> tuple[StoredRows, StoredRows]:
    """Split rows at random into (training, evaluation); the same for the same number of rows and seed.

    Args:
        rows: `Rows` or a source for `load_rows`, not streaming.
        eval_fraction: share of the rows for evaluation, between 0 and 1; at least one row on either side.
        seed: of the random choice.

    The rows keep their numbers and, on either side, their order.
    """
    rows = load_rows(rows)
    if not isinstance(rows, StoredRows):
        raise DataError(
            "a streamed set cannot be split",
            file=rows.name,
            expected="a separate evaluation set, or streaming off",
        )
    if not 0 < eval_fraction < 1:
        raise DataError("eval_fraction is out of range", value=eval_fraction, expected="a number between 0 and 1")
    if len(rows) < 2:
        raise DataError("too few rows to split", file=rows.name, value=len(rows), expected="at least 2 rows")
    count = min(max(round(eval_fraction * len(rows)), 1), len(rows) - 1)
    held_out = set(random.Random(seed).sample(range(len(rows)), count))
    train = [i for i in range(len(rows)) if i not in held_out]
    return rows.subset(train), rows.subset(sorted(held_out))


def _from_name(source: str | PathLike[str], split: str | None, streaming: bool) -> Rows:
    path = Path(source).expanduser()
    name = str(source)
    if path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            import datasets

            return _from_datasets(datasets.load_from_disk(str(path)), name, split, streaming)
        paths = _files_of(path, split)
    elif path.exists():
        if split not in (None, "train"):
            raise DataError("a single file has no splits", file=name, value=split, expected="split: none")
        paths = [path]
    elif isinstance(source, str) and file_kind(path) is None and HUB_NAME.fullmatch(source):
        return _from_hub(source, split, streaming)
    else:
        raise DataError("there is no such file or folder", file=name, expected=_nearest_file(path))
    rows = FileRows(name, paths, lambda: file_fingerprint(*paths))
    return rows if streaming else rows.stored()


def _nearest_file(path: Path) -> str:
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.7)
    return f"perhaps {str(path.with_name(near[0]))!r}" if near else "the path of a file of rows"


def _files_of(folder: Path, split: str | None) -> list[Path]:
    paths = sorted(p for p in folder.iterdir() if p.is_file() and file_kind(p) and not p.name.startswith("."))
    if not paths:
        raise DataError("the folder holds no file of rows", file=folder, expected=".jsonl, .json, .csv or .parquet")
    by_split: dict[str, list[Path]] = {}
    for path in paths:
        word = re.split(r"[^A-Za-z]", path.name)[0]
        by_split.setdefault(word if word in {*KNOWN_SPLITS, split} else "", []).append(path)
    if split is None and list(by_split) == [""]:
        return paths
    named = [k for k in by_split if k]
    if split is None and "" in by_split and "train" not in named:  # one named split beside other files is no choice
        raise DataError(
            f"which files are meant is not clear: {by_split[''][0].name!r} belongs to no split",
            file=folder,
            value=[p.name for p in paths],
            expected=f"split: {' or '.join(named)}, files named after their splits, or the path of one file",
        )
    return by_split[_choose_split(named, split, str(folder))]


def _choose_split(names: Sequence[str], split: str | None, source: str) -> str:
    wanted = split if split is not None else (names[0] if len(names) == 1 else "train")
    if wanted not in names:
        raise DataError(
            "there is no such split" if split is not None else "which split is meant is not clear",
            file=source,
            value=split,
            expected=f"one of {', '.join(names)}" if names else "split: none",
        )
    return wanted


def _from_hub(name: str, split: str | None, streaming: bool) -> Rows:
    import datasets

    try:
        loaded = datasets.load_dataset(name, split=split, streaming=streaming)
    except Exception as error:  # the hub client raises many kinds, all with a message for the user
        raise DataError(
            f"is neither a local file or folder nor a dataset that the hub gave "
            f"({type(error).__name__}: {str(error).strip() or 'no message'})",
            file=name,
            expected="an existing path, or a hub dataset that is cached or reachable",
        ) from error
    return _from_datasets(loaded, name, None, streaming)


def _from_datasets(source: Any, name: str, split: str | None, streaming: bool) -> Rows:
    """Rows of a `datasets` object; `name` describes it."""
    import datasets

    if isinstance(source, Mapping):
        chosen = _choose_split(list(source), split, name)
        return _from_datasets(source[chosen], name, None, streaming)
    if split is not None and str(getattr(source, "split", None)) != split:
        raise DataError("the dataset has no such split", file=name, value=split, expected="split: none")
    if isinstance(source, datasets.IterableDataset):
        # What it will yield is not known without reading all of it.
        return IteratedRows(name, source, lambda: fingerprint([name, str(source.split), str(source.info.version)]))
    if not isinstance(source, datasets.Dataset):
        raise DataError("this is not a source of rows", value=type(source).__name__, expected="a datasets.Dataset")
    if streaming:
        return IteratedRows(name, source, lambda: _dataset_fingerprint(source))
    return StoredRows(name, source, lambda: _dataset_fingerprint(source))


def _dataset_fingerprint(dataset: Any) -> str:
    """Of the rows themselves: `Dataset._fingerprint` differs between processes for some transforms."""
    digest = hashlib.sha256()
    for fields in dataset:
        digest.update(fingerprint(fields).encode())
    return digest.hexdigest()[:16]
