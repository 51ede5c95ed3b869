"""File systems that refuse to be written, or are soon full, where this user may mount them."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

may_mount = pytest.mark.skipif(
    subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode != 0,
    reason="needs the right to mount a file system",
)


def make_read_only(folder: Path) -> None:
    """For this process alone, also if it is root."""
    assert ctypes.CDLL(None).unshare(0x20000) == 0  # CLONE_NEWNS: mounts of this process's own
    for command in ("--make-rprivate /", f"--bind {folder} {folder}", f"-o remount,ro,bind {folder}"):
        subprocess.run(["mount", *command.split()], check=True)


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A new folder that holds so much."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
