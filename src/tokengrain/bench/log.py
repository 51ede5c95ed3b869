"""A log of finished runs, one JSON object per line, that several processes write and a kill does not spoil."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokengrain.files import read_log, write_text


def append_line(log: Path, line: dict[str, Any]) -> None:
    """Append one line in one write, so that lines of several processes do not mix."""
    with log.open("ab", buffering=0) as file:
        file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())


def repair_log(log: Path) -> None:
    """Take out a line that was cut off, so that the next one does not stick to it."""
    if log.exists() and not log.read_bytes().endswith(b"\n"):
        write_text(log, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in read_log(log)))
