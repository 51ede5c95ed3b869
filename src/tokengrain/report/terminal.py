"""Token heat maps and marked spans in the terminal: `tokengrain inspect`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokengrain.errors import RunError, foreign
from tokengrain.report.pictures import half_blocks
from tokengrain.report.rows import (
    CREDIT,
    SPANS,
    WEAKEST,
    CreditSample,
    Recorded,
    Side,
    by_prompt,
    colour_scale,
    one_of_equals,
    read_rollouts,
    read_token_rows,
    recorded_columns,
    rollout_file,
    scale_of,
    side_of,
    view_of,
)
from tokengrain.report.svg import number, signed
from tokengrain.runs import LOG_RATIO
from tokengrain.screen import Screen, visible

# Weak credit colours the letters, strong credit the ground, in tones that are readable on light and on dark
# terminals. Orange is also underlined: the sign does not hang on the colour.
_BLUE = ("#3f8fcb", "bold #3f8fcb", "#ffffff on #2f78b0", "bold #ffffff on #174f8a")
_ORANGE = tuple(f"underline {s}" for s in ("#cf7a1d", "bold #cf7a1d", "#ffffff on #b8620e", "bold #ffffff on #8f3f00"))
# Neighbouring spans differ; the number says which belongs to which.
_SPANS = ("#3f8fcb", "#cf7a1d", "#3f9b52", "#b0559e")
TOP = 5


def inspect_rows(
    source: str | Path,
    *,
    rows: Sequence[int] | None = None,
    count: int = 3,
    field: str | None = None,
    tokenizer: Any = None,
    spans: Any = None,
    console: Console | None = None,
) -> None:
    """Print token heat maps of some rows, chosen above rejected, with a legend and summary numbers.

    Without colour (`NO_COLOR`, a pipe) every token is followed by its signed number. With `field` "spans" (or a
    source of `spans`) the spans are marked instead. The arguments and errors are those of
    `tokengrain.report.rows.read_token_rows`.

    Of a run with an online stage, finished or not, and of its `rollouts.jsonl`: the last `count` prompts that were
    recorded (or all of `rows`), each completion with its reward. `field` is then a column of
    `tokengrain.report.rows.COLUMNS`, "advantages" by default.
    """
    console, field = console or Screen(), SPANS if spans is not None else field
    recorded = rollout_file(Path(source)) if field != SPANS else None
    with foreign(f"{source} cannot be shown, its files are not as tokengrain writes them: "):
        if recorded is not None:
            _print_rollouts(console, recorded, rows, count, field or "advantages")
            return
        field = field or CREDIT
        samples = read_token_rows(source, rows=rows, count=count, field=field, tokenizer=tokenizer, spans=spans)
    if field == SPANS:
        _print_spans(console, samples)
        return
    samples = one_of_equals(samples)
    for name in dict.fromkeys(s.source for s in samples):
        shown, coloured = [s for s in samples if s.source == name], _has_colour(console)
        scale = colour_scale([v for s in shown for side in s.sides for v in side.credit])
        what, unit = ("log-ratio", ", in nats") if name.startswith(LOG_RATIO) else ("credit", "")
        console.print(_legend(name, scale, coloured, what + unit))
        _print_rows(console, shown, partial(heat, scale=scale, coloured=coloured))
        console.print(_summary(shown, what), end="\n\n")


def _has_colour(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def _print_rows(console: Console, samples: Sequence[CreditSample], text_of: Callable[[Side], Text]) -> None:
    for sample in samples:
        sides = [(Text(title, "bold"), text_of(side)) for title, side in zip(sample.names, sample.sides, strict=True)]
        heading = f"row {sample.row}" if sample.row is not None else ""
        _print_row(console, heading, sample.prompt, [*_pictures(console, sample), *sides])
    console.print()


def _pictures(console: Console, sample: CreditSample) -> list[tuple[Text, Text]]:
    """A row's pictures in half blocks, where the console has all colours; elsewhere only their sizes."""
    if not sample.pictures:
        return []
    if console.color_system == "truecolor":
        return [(Text("picture", "dim"), half_blocks(picture)) for picture in sample.pictures]
    sizes = ", ".join(f"{picture['size'][0]}x{picture['size'][1]}" for picture in sample.pictures)
    return [(Text("pictures", "dim"), Text(sizes, "dim"))]


def _print_row(console: Console, heading: str, prompt: str, sides: Sequence[tuple[Text, Text]]) -> None:
    console.rule(Text(heading, "dim"), align="left", style="dim")
    table = Table.grid(padding=(0, 2))
    table.add_row(Text("prompt", "dim"), Text(visible(prompt.strip()), "dim"))
    for title, text in sides:
        table.add_row(title, text)
    console.print(table)


def _print_rollouts(console: Console, file: Path, rows: Sequence[int] | None, count: int, column: str) -> None:
    """The last prompts recorded in `file`, or all records of the prompts `rows`."""
    found = read_rollouts(file)
    columns = recorded_columns(found)
    if column not in columns:
        there = f"there are {', '.join(columns)}" if columns else "there are no numbers of tokens at all"
        raise RunError(f"{file}: no {column!r} was recorded; {there}" if found else f"{file}: nothing is recorded yet")
    groups = by_prompt(found)
    if rows is not None:
        wanted, known = {str(row) for row in rows}, {str(group[0].row) for group in groups}
        if missing := sorted(wanted - known):
            raise RunError(f"{file}: row {missing[0]} was not recorded; expected one of {sorted(known)[:20]}")
        groups = [group for group in groups if str(group[0].row) in wanted]
    else:
        groups = groups[-count:]
    view, coloured = view_of(column), _has_colour(console)
    samples = [
        CreditSample(group[0].prompt, column, tuple(side_of(one, column) for one in group), group[0].row)
        for group in groups
    ]
    sides = [side for sample in samples for side in sample.sides]
    scale = scale_of(sides)
    legend = _legend(f"{view.title}: {view.note}" if view.note else view.title, scale, coloured, view.title, "below 0")
    if any(side.clipped is not None for side in sides):
        legend.append("\nstruck: the ratio was clipped" if coloured else "\n~word~: the ratio was clipped", "dim")
    console.print(legend)
    for group, sample in zip(groups, samples, strict=True):
        row = "" if sample.row is None else f", row {sample.row}"
        texts = [heat(side, scale, coloured) for side in sample.sides]
        heading = f"step {group[0].step}, rollout {group[0].rollout}{row}"
        _print_row(console, heading, sample.prompt, list(zip(map(_rewards, group), texts, strict=True)))
    console.print()
    console.print(_summary(samples, view.title))
    if marks := [mark for side in sides for mark in side.clipped or ()]:
        console.print(Text(f"clipped: {sum(m != 0 for m in marks)} of {len(marks)} tokens", "dim"))
    console.print()


def _rewards(one: Recorded) -> Text:
    """A completion's title: its number, its reward, where there are several each of them, and whether it was cut."""
    out = Text.assemble((f"completion {one.completion}", "bold"), f"\nreward {number(one.reward)}")
    if len(one.rewards) > 1:
        out.append("".join(f"\n  {name} {number(value)}" for name, value in one.rewards.items()), "dim")
    return out.append("\ntruncated", "dim") if one.truncated else out


def _print_spans(console: Console, samples: Sequence[CreditSample]) -> None:
    console.print(Text.assemble((SPANS, "bold"), "\n", ("[k: …] is the k-th span of a completion", "dim")))
    _print_rows(console, samples, marked)
    lines = []
    for index, title in enumerate(("chosen", "rejected")):
        values = [v for s in samples for side in s.sides[index : index + 1] for v in side.credit if v is not None]
        inside = sum(v > 0 for v in values)
        lines.append(f"{title}: {inside} of {len(values)} tokens in spans ({inside / max(len(values), 1):.0%})")
    without = sum(not any(v for side in s.sides for v in side.credit) for s in samples)
    rows = f"{len(samples)} pair{'s' * (len(samples) != 1)}"
    console.print(Text("\n".join([*lines, f"{without} of {rows} without a span"]), "dim"), end="\n\n")


def marked(side: Side) -> Text:
    """A completion as text, its spans in brackets with their numbers; in colours, if the console has any."""
    out = Text()
    for span, run in groupby(zip(side.tokens, side.credit, strict=True), key=lambda item: item[1]):
        text = visible("".join(token for token, _ in run))
        if not span:
            out.append(text.replace("\n", "↵\n"), "dim" if span is None else "")
            continue
        words = text.lstrip(" ")
        style = f"bold {_SPANS[(int(span) - 1) % len(_SPANS)]}"
        out.append(" " * (len(text) - len(words)))
        out.append(f"[{int(span)}: ", style)
        out.append(words.replace("\n", "↵\n"), f"{style} underline")
        out.append("]", style)
    return out


def heat(side: Side, scale: float, coloured: bool) -> Text:
    """A completion as text: tokens coloured by credit, or followed by numbers; clipped ones struck, or between ~."""
    out = Text()
    marks = side.clipped if side.clipped is not None else [0] * len(side.tokens)
    for token, value, mark in zip(side.tokens, side.credit, marks, strict=True):
        token = visible(token)
        word = token.lstrip(" ")
        out.append(" " * (len(token) - len(word)))
        shown = word.replace("\n", "↵\n")
        if mark and not coloured:
            shown = f"~{shown}~"
        if value is None:
            out.append(shown, "dim")
        elif coloured:
            out.append(shown, style_of(value / scale) + (" strike" if mark else ""))
        else:
            out.append(f"{shown}[{signed(value)}]")
    return out


def style_of(strength: float) -> str:
    """Rich style for a credit as a part of full colour: blue above 0, orange and underlined below."""
    step = int(min(abs(strength) * 4, 3))
    return "" if abs(strength) < WEAKEST else (_BLUE if strength > 0 else _ORANGE)[step]


def _legend(name: str, scale: float, coloured: bool, what: str = "credit", orange: str = "lowers") -> Text:
    out = Text.assemble((name, "bold"), "\n")
    if not coloured:
        return out.append(f"the number behind a token is its {what}")
    for strength in (-1, -0.6, -0.4, -0.1, 0, 0.1, 0.4, 0.6, 1):
        out.append(signed(strength * scale), style_of(strength)).append(" ")
    return out.append(f" orange, underlined: {orange}", "dim")


def _summary(samples: Sequence[CreditSample], what: str = "credit") -> Text:
    """Numbers over the rows shown: share above 0, mean size, tokens with most and least credit."""
    per_token: dict[str, list[float]] = defaultdict(list)
    for s in samples:
        for side in s.sides:
            for token, value in zip(side.tokens, side.credit, strict=True):
                if value is not None:
                    per_token[visible(token.strip()) or repr(token)].append(value)
    values = [v for found in per_token.values() for v in found]
    if not values:
        return Text("no token counts in these rows")
    means = sorted((sum(v) / len(v), token) for token, v in per_token.items())
    highest = ", ".join(f"{t} {signed(m)}" for m, t in reversed(means[-TOP:]) if m > 0)
    lowest = ", ".join(f"{t} {signed(m)}" for m, t in means[:TOP] if m < 0)
    positive = sum(v > 0 for v in values) / len(values)
    size = sum(map(abs, values)) / len(values)
    rows = f"{len(samples)} row{'s' * (len(samples) != 1)}"
    most, least = ("most", "least") if what.endswith("credit") else ("highest", "lowest")
    lines = [
        f"{len(values)} tokens in {rows}: {positive:.0%} above 0, mean size {number(size)}",
        f"{most} {what}:  {highest or 'none above 0'}",
        f"{least} {what}: {lowest or 'none below 0'}",
    ]
    return Text("\n".join(lines), "dim")
