"""The result of `tokengrain bench credit` as Markdown: the tables of the page, without the heat maps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokengrain.bench.page import FACTS, page_values
from tokengrain.files import write_text

MARKDOWN = "credit.md"


def write_markdown(result: Mapping[str, Any], folder: Path) -> Path:
    """Write the tables of a result of `bench_credit` or `bench_corruption` into a folder; returns the path."""
    path = folder / MARKDOWN
    write_text(path, markdown(result))
    return path


def markdown(result: Mapping[str, Any]) -> str:
    """The tables with their notes, and how they were made."""
    values = page_values(result)
    facts = ", ".join(f"{name} {result[name]}" for name in FACTS if result.get(name) is not None)
    lines = [f"# {values['title']}", "", values["subtitle"], "", f"`tokengrain bench credit`: {facts}.", ""]
    for table in values["tables"]:
        lines += [f"## {table['title']}", "", "| " + " | ".join(table["columns"]) + " |"]
        lines.append("|" + "---|" * len(table["columns"]))
        for name, *cells in table["rows"]:
            shown = [f"{mean} {around}".strip() for mean, around in cells]
            lines.append(f"| {' | '.join([name, *shown])} |")
        for note in table["notes"]:
            lines += ["", note]
        lines.append("")
    return "\n".join(lines)
