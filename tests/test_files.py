"""Atomic writes and fingerprints."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tokengrain.errors import (
    DataError,
    RunError,
    atomic_write,
    file_fingerprint,
    fingerprint,
    read_json,
    write_json,
    write_text,
)


def test_a_write_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.json"
    write_json(path, {"a": 1, "ü": [1, 2]})
    write_json(path, {"b": 2})
    assert read_json(path) == {"b": 2}
    assert os.listdir(path.parent) == ["a.json"]


def _interrupted_write(path: Path, error: BaseException) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text("half")
        raise error


FULL, TOO_LARGE = OSError(28, "No space left on device"), OSError(27, "File too large")


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (FULL, RunError, r"a\.txt could not be written: no space left on the device; free some"),
        (TOO_LARGE, RunError, r"a\.txt could not be written: File too large"),
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
        (DataError("no"), DataError, "no"),
    ],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: BaseException, raised: type[BaseException], message: str
) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(raised, match=message):
        _interrupted_write(path, error)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_writer_that_never_wrote_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="No such file"), atomic_write(tmp_path / "a.txt"):
        pass
    assert os.listdir(tmp_path) == []


def test_the_old_file_is_whole_until_the_new_one_is(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_text(path, "old")
    with atomic_write(path) as temporary:
        assert temporary.suffix == ".parquet"  # writers go by it
        assert temporary.parent == path.parent  # else the rename is not atomic
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_fingerprints_depend_on_content_alone(tmp_path: Path) -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert len(fingerprint(None)) == 16
    (tmp_path / "x").write_text("same")
    (tmp_path / "y").write_text("same")
    assert file_fingerprint(tmp_path / "x") == file_fingerprint(tmp_path / "y")
    (tmp_path / "y").write_text("sam")
    assert file_fingerprint(tmp_path / "x") != file_fingerprint(tmp_path / "y")
    (tmp_path / "z").write_text("e")
    both = file_fingerprint(tmp_path / "y", tmp_path / "z")
    assert both != file_fingerprint(tmp_path / "x")  # the seam between files counts
    write_json(tmp_path / "j", {"ü": "é"})
    assert json.loads((tmp_path / "j").read_text(encoding="utf-8")) == {"ü": "é"}


def test_threads_may_write_one_path_at_a_time(tmp_path: Path) -> None:
    def write(number: int) -> None:
        for _ in range(50):
            write_json(tmp_path / "a.json", {"number": number, "text": "x" * 20_000})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))  # an error in a thread is raised here
    assert len(read_json(tmp_path / "a.json")["text"]) == 20_000
    assert os.listdir(tmp_path) == ["a.json"]
