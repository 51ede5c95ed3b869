"""What an annotated file says of itself: which columns were computed, and what they were computed with.

It is in the file's own metadata, so a copied file stays checked; `manifest.json` beside it says the same for people.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokengrain.errors import RunError
from tokengrain.files import fingerprint, read_json, write_json

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 1
MANIFEST = "manifest.json"
METADATA = b"tokengrain"
DIGEST = "digest"
_NAMES = {
    "model": "model",
    "reference": "reference model",
    "tokenizer": "tokenizer",
    "chat_template": "chat template",
    "data": "data",
    "source": "credit source",
    "tokenize": "tokenisation settings",
}


def column_name(role: str, name: str) -> str:
    """Column for a per-token quantity: `chosen_token_rewards`, or `token_rewards` for one completion."""
    name = "token_spans" if name == "spans" else name
    return name if role == "completion" else f"{role}_{name}"


def is_annotated(path: str | Path) -> bool:
    """Whether `path` is a parquet file that `annotate` wrote."""
    import pyarrow.parquet as pq

    try:
        return METADATA in (pq.read_schema(path).metadata or {})
    except (OSError, ValueError):  # absent, a folder, or not parquet
        return False


def read_manifest(path: str | Path) -> dict[str, Any]:
    """What an annotated file was made with: from the file, else from `manifest.json` beside it.

    Raises:
        RunError: the file is not there, or `annotate` did not write it.
    """
    import pyarrow.parquet as pq

    path = Path(path)
    if not path.is_file():
        raise RunError(f"{path}: there is no such annotated file; run `tokengrain annotate` first")
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: not a parquet file written by annotate ({error})") from error
    if METADATA in metadata:
        return json.loads(metadata[METADATA])
    beside = path.with_name(MANIFEST)
    files = read_json(beside).get("files", {}) if beside.is_file() else {}
    if path.name not in files:
        raise RunError(
            f"{path}: does not say which model, tokenizer and data its token rewards were made with, so they "
            "cannot be checked. Annotate again, or give the file as ordinary `data` with token reward columns"
        )
    return files[path.name]


def write_manifest(output: Path, manifest: Mapping[str, Any]) -> None:
    """Record `output` in the folder's `manifest.json`, beside other annotated files of the folder."""
    path = output.with_name(MANIFEST)
    files = read_json(path).get("files", {}) if path.is_file() else {}
    write_json(path, {"format": FORMAT, "files": {**files, output.name: dict(manifest)}})


def differences(stored: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """One phrase per fingerprint of `now` that `stored` does not match."""
    found = []
    for name, value in now.items():
        if stored.get(name) != value:
            title = _NAMES.get(name, name.replace("_", " "))
            found.append(f"another {title} (file: {stored.get(name, 'not recorded')}, now: {value})")
    return found


def check_manifest(path: str | Path, expected: Mapping[str, str]) -> dict[str, Any]:
    """Check that an annotated file belongs to this model, tokenizer, template, data and source.

    Args:
        path: the parquet file.
        expected: fingerprints of what is about to be used; only the names given are compared.

    Returns:
        The file's manifest.

    Raises:
        RunError: naming every fingerprint that differs, with both values.
    """
    manifest = read_manifest(path)
    found = differences(manifest.get("fingerprints", {}), expected)
    if manifest.get(DIGEST) != digest(_own_columns(path, manifest)):
        found.append("other data (rows were changed after annotating)")
    if found:
        raise RunError(
            f"{path} was annotated with {'; with '.join(found)}. Its token rewards do not belong to this "
            "run: annotate again, or go back to what it was made with"
        )
    return manifest


def computed_columns(manifest: Mapping[str, Any]) -> set[str]:
    """Columns that annotate adds to the rows (or puts in the place of a row's own, such as token rewards)."""
    roles, names = tuple(manifest["roles"]), tuple(manifest["columns"])
    ids = {"prompt_ids", *(f"{r}_ids" for r in roles), *(f"{r}_counted" for r in roles)}
    return ids | {column_name(r, n) for r in roles for n in names}


def _own_columns(path: str | Path, manifest: Mapping[str, Any]) -> dict[str, pa.Array]:
    """The columns that the rows had before annotating."""
    import pyarrow.parquet as pq

    table = pq.read_table(Path(path), partitioning=None)
    computed = computed_columns(manifest)
    return {n: table.column(n).combine_chunks() for n in table.column_names if n not in computed}


def digest(columns: Mapping[str, pa.Array]) -> str:
    """Identifies the rows' own columns: an edited row does not have the tokens that its numbers belong to."""
    return fingerprint({name: column.to_pylist() for name, column in columns.items()})
