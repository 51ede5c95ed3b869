"""Which files of a folder are meant, by split: as `datasets` reads folders, but what is ambiguous is an error.

A folder's README may say which files a split has (`configs:` in the header, as on the hub). Else a file's name says
it: its words before the number of its part (`train_prefs-00000-of-00001.parquet` is of the split `train_prefs`), or
the folder it lies in (`test/0.jsonl`). Files lie in the folder itself, or else in `data/`, in folders named after
splits, or in an only subfolder.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from tokengrain.errors import DataError, require

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# Words that name a split, and the ones that `datasets` takes for the same.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
WORDS = tuple(word for words in SPLITS.values() for word in words)
PART = re.compile(r"[-_.]?(part|shard)?[-_.]?\d+([-_.]?of[-_.]?\d+)?$", re.IGNORECASE)
# Files beside the rows that tools write about them.
NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")


def files_of(folder: Path, split: str | None) -> list[Path]:
    """The files of one split of a folder, sorted; without `split` the only one, or "train"."""
    declared = _declared(folder)
    if declared:
        found = _once(declared[choose_split(list(declared), split, str(folder))])
        what = "the files that README.md names for the split are not there"
        require(found, DataError, what, file=folder, value=split)
        return found
    paths = _rows_in(folder)
    if not paths:
        folders = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".") and _rows_in(p))
        named = [p for p in folders if p.name == "data" or _words(p.name) & set(WORDS)]
        paths = [path for inner in named or folders for path in _rows_in(inner)]
        which = {"file": folder, "value": [p.name for p in folders], "expected": "the path of one of them"}
        require(named or len(folders) < 2, DataError, "which of the subfolders is meant is not clear", **which)
    what = "the folder holds no file of rows"
    require(paths, DataError, what, file=folder, expected=".jsonl, .json, .csv or .parquet")
    return _once(_of_split(paths, split, folder))


def files_of_pattern(pattern: Path, split: str | None) -> list[Path]:
    """The files that a pattern such as `data/train-*.parquet` matches, sorted."""
    paths = sorted(p for p in map(Path, glob.glob(str(pattern), recursive=True)) if p.is_file())
    what = "no file matches the pattern"
    require(paths, DataError, what, file=pattern, expected="a pattern that matches files of rows")
    return _once(paths if split is None else _of_split(paths, split, pattern))


def choose_split(names: Collection[str], split: str | None, source: str) -> str:
    """The split that is meant: the given one, else the only one, else "train"."""
    wanted = split if split is not None else next(iter(names)) if len(names) == 1 else "train"
    what = "there is no such split" if split is not None else "which split is meant is not clear"
    expected = f"one of {', '.join(names)}" if names else "split: none"
    require(wanted in names, DataError, what, file=source, value=split, expected=expected)
    return wanted


def file_kind(path: Path) -> str | None:
    """The format by suffix ("jsonl", "json", "csv", "parquet"), `.gz` aside; None if it is another."""
    return KINDS.get(Path(path.name.lower().removesuffix(".gz")).suffix)


def _rows_in(folder: Path) -> list[Path]:
    files = (p for p in folder.iterdir() if p.is_file() and file_kind(p) and p.name not in NOT_ROWS)
    return sorted(p for p in files if not p.name.startswith("."))


def _label(path: Path) -> str:
    """The name of the split that a file is of, if it is of one: its name without the number of its part."""
    label, folder = PART.sub("", _stem(path)), path.parent.name
    return folder if folder in WORDS and not _words(label) & set(WORDS) else label


def _stem(path: Path) -> str:
    """The name without its suffix and `.gz`."""
    return path.name[: path.name.lower().removesuffix(".gz").rindex(".")]


def _words(label: str) -> set[str]:
    return set(re.split(r"[^a-z]+", label.lower()))


def _of_split(paths: Sequence[Path], split: str | None, source: Path) -> list[Path]:
    by_label: dict[str, list[Path]] = {}
    for path in paths:
        by_label.setdefault(_label(path), []).append(path)
    named = sorted(label for label in by_label if _words(label) & set(WORDS))
    if split is None and not named:
        return list(paths)
    if split is None and not _matching(by_label, "train"):
        # One named split beside other files is no choice.
        other = next((label for label in by_label if label not in named), None)
        if other is not None:
            what = f"which files are meant is not clear: {by_label[other][0].name!r} belongs to no split"
            expected = f"split: {' or '.join(named)}, files named after their splits, or the path of one file"
            raise DataError(what, file=source, value=[p.name for p in paths], expected=expected)
        return by_label[choose_split(named, None, str(source))]
    found = _matching(by_label, split or "train")
    if len(found) != 1:
        what = "which split is meant is not clear" if found or split is None else "there is no such split"
        expected = f"one of {', '.join(found or named)}" if found or named else "split: none"
        raise DataError(what, file=source, value=split, expected=expected)
    return by_label[found[0]]


def _matching(labels: Iterable[str], split: str) -> list[str]:
    """The labels that `split` may mean: itself, else those that begin with it, else those that have it as a word."""
    labels = sorted(labels)
    begin = [label for label in labels if re.match(rf"{re.escape(split)}[^a-zA-Z]", label)]
    synonyms = set(SPLITS.get(split, (split,)))
    return [label for label in labels if label == split] or begin or [x for x in labels if _words(x) & synonyms]


def _once(paths: Sequence[Path]) -> list[Path]:
    """The same files; one that is there in two formats (`x.jsonl` beside `x.jsonl.gz`) is an error."""
    seen: dict[Path, Path] = {}
    for path in paths:
        first = seen.setdefault(path.with_name(_stem(path)), path)
        both = {"file": path.parent, "value": [first.name, path.name], "expected": "one of them, or the path of one"}
        require(first is path, DataError, "the same rows may be there twice", **both)
    return list(paths)


def _declared(folder: Path) -> dict[str, list[Path]]:
    """Split -> files, as the header of a hub data set's README says; {} where it does not."""
    readme = folder / "README.md"
    header = re.match(r"---\n(.*?)\n---", readme.read_text(encoding="utf-8"), re.DOTALL) if readme.is_file() else None
    try:
        configs: Any = (yaml.safe_load(header.group(1)) or {}).get("configs") if header is not None else None
        if not configs:
            return {}
        chosen = configs[0] if len(configs) == 1 else next(c for c in configs if c.get("config_name") == "default")
        files = chosen["data_files"]
        entries = files if isinstance(files, list) else [{"split": "train", "path": files}]
        found = {}
        for entry in entries:
            patterns = [entry["path"]] if isinstance(entry["path"], str) else entry["path"]
            matches = [p for pattern in patterns for p in folder.glob(pattern) if p.is_file() and file_kind(p)]
            found[str(entry["split"])] = sorted(set(matches))
        return found
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError, StopIteration):
        return {}  # a header that says something else
