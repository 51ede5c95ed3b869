"""The one way to the screen: a rich console on which nothing that was read can act as an instruction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

_SIGNS = {
    **{i: chr(0x2400 + i) for i in range(32) if chr(i) not in "\t\n"},
    **{i: f"\\x{i:x}" for i in range(0x7F, 0xA0)},
    **{i: f"\\u{i:x}" for i in (*range(0x2028, 0x202F), *range(0x2066, 0x206A))},
}


def visible(text: str) -> str:
    """Text with signs for control characters, which a terminal would obey and a page would not show, and for those that
    end a line or turn the direction of what follows."""
    return text.translate(_SIGNS)


class Screen(Console):
    """A console for text of others: control characters are shown as signs, `[tags]` and `:names:` stay what they are.

    File names, rows, messages of servers and of libraries reach the terminal through here.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(emoji=False, markup=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(self._shown(segment.text), segment.style)

    def _shown(self, text: str) -> str:
        """The text as this terminal can show it: what its encoding lacks, and halves of surrogate pairs, as escapes."""
        return visible(text).encode(self.encoding, "backslashreplace").decode(self.encoding)


def labelled(label: str, text: str, style: str = "yellow") -> Text:
    """`label: text`, the label in a style."""
    return Text.assemble((f"{label}:", style), f" {text}")


@contextmanager
def progress_bar(
    what: str,
    total: int | None = None,
    *,
    done: int = 0,
    stays: bool = False,
    quiet: bool = False,
    console: Console | None = None,
) -> Iterator[Callable[..., None]]:
    """A bar on standard error, which `stays` at the end or goes; yields rich's update, called `update(advance=1)`.

    Behind it stands what `update(numbers=...)` gives. Without a terminal it is a line per tenth of the way, and per new
    description.
    """
    left = TimeRemainingColumn(elapsed_when_finished=True)
    before, after = (TextColumn(f"{{task.{text}}}", markup=False) for text in ("description", "fields[numbers]"))
    columns = (before, BarColumn(), MofNCompleteColumn(), _Speed(), left, after)
    console = console or Screen(stderr=True)
    if quiet:
        yield lambda **_: None  # a disabled Progress ends in an empty line in rich 14 and older
        return
    if not console.is_terminal:
        yield _Lines(console, what, total, done).update
        return
    with Progress(*columns, console=console, transient=not stays) as bar:
        yield partial(bar.update, bar.add_task(what, total=total, completed=done, numbers=""))


@dataclass
class _Lines:
    """Progress where there is no terminal."""

    console: Console
    description: str
    total: int | None
    done: float
    shown: float = 0.0

    def update(
        self,
        *,
        advance: float = 0,
        completed: float | None = None,
        total: int | None = None,
        description: str | None = None,
        **more: object,
    ) -> None:
        self.done, self.total = self.done + advance if completed is None else completed, total or self.total
        new = description not in (None, self.description)
        self.description = description or self.description
        if new or (self.total and self.done - self.shown >= self.total / 10):
            self.shown = self.done
            of = f" of {self.total:,}" if self.total else ""
            self.console.print(f"{self.description}: {self.done:,.0f}{of}", highlight=False, markup=False)


def counting(update: Callable[..., None]) -> Callable[[int, int], None]:
    """A bar's update as a function of how many are done, and of how many."""
    return lambda done, total: update(completed=done, total=total)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed or 0
        return Text(f"{speed:,.0f}/s" if speed >= 1 else "")
