"""What became of the rows of a source: how many were kept, skipped and cut, and why."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokengrain.data.config import NO_SPAN, RowError
from tokengrain.data.encode import Encoded
from tokengrain.data.rows import Rows
from tokengrain.errors import DataError


@dataclass
class Report:
    """What became of the rows.

    Attributes:
        kept: samples made.
        skipped: rows left out, by reason.
        first: for each reason, the message about the first such row.
        prompts_cut, completions_cut: how many were longer than the configuration allows.
        without_spans: pairs that were kept although spans were looked for and none was found.
    """

    kept: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    prompts_cut: int = 0
    completions_cut: int = 0
    without_spans: int = 0

    @property
    def rows(self) -> int:
        return self.kept + sum(self.skipped.values())

    @property
    def notable(self) -> bool:
        """Whether there is more to say than that all rows were kept as they are."""
        return bool(self.skipped or self.prompts_cut or self.completions_cut or self.without_spans)

    @property
    def reasons(self) -> str:
        """Such as "3 empty completion, 2 different prompts"."""
        return ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())

    def add(self, result: Encoded) -> None:
        self.kept += 1
        self.prompts_cut += result.prompt_cut
        self.completions_cut += result.completions_cut
        self.without_spans += result.spanless

    def skip(self, reason: str, message: str) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        self.first.setdefault(reason, message)

    def __str__(self) -> str:
        parts = [f"{self.kept} of {self.rows} rows"]
        if self.skipped:
            parts.append(f"skipped: {self.reasons}")
        if self.prompts_cut or self.completions_cut:
            parts.append(f"cut: {self.prompts_cut} prompts, {self.completions_cut} completions")
        if self.without_spans:
            parts.append(f"{self.without_spans} pairs without a span")
        return "; ".join(parts)


def all_invalid(rows: Rows, report: Report, number: int, error: RowError) -> DataError:
    """The first invalid row as an error that also counts the others."""
    invalid = report.rows - report.kept
    way_out = "`spans: {on_none: skip}`" if error.reason == NO_SPAN else "`on_invalid: skip`"
    if not report.kept:
        note = f". No row is left: {report.reasons}"
    elif invalid > 1:
        note = f". {invalid} of {report.rows} rows are invalid: {report.reasons} ({way_out} leaves them out)"
    else:
        note = f". It is the only invalid row of {report.rows} ({way_out} leaves it out)"
    return error.located(*rows.place(number), note)
