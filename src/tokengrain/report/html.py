"""The report: one HTML file with everything in it, readable without network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokengrain.errors import RunError
from tokengrain.files import write_text
from tokengrain.report.contents import Contents, read_contents
from tokengrain.report.samples import CreditSample, Side, by_pair, colour_scale
from tokengrain.report.svg import Series, frontier_chart, marker, number, signed

NAME = "report.html"
MAX_PAIRS = 24
MAX_TOKENS = 600  # per completion; more is cut, and said so
TRUTH = "exact advantage"


@dataclass(frozen=True)
class Piece:
    """A token of a heat map: white space before it, its text, strength 0..1, sign class and numbers."""

    lead: str
    text: str
    strength: str
    sign: str
    credit: str
    truth: str | None


def write_report(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a finished run or demo.

    Args:
        run_dir: folder of a run (`tokengrain train`) or of a demo.
        output: where to write; default `report.html` in the folder.

    Returns:
        The path of the file.

    Raises:
        RunError: not a run folder, an unfinished run (says what is there and how to resume), jinja2 missing.
        DataError: a damaged `credit_samples.json`; names the entry.
    """
    path = Path(output) if output is not None else Path(run_dir) / NAME
    write_text(path, render(read_contents(run_dir)))
    return path


def render(contents: Contents) -> str:
    """The page as text."""
    pairs, scales = heat_maps(contents.samples)
    plots = []
    if contents.marks:
        curve = contents.frontier
        plots = [frontier_chart(curve, contents.marks, 680, 400, "wide")]
        plots.append(frontier_chart(curve, contents.marks, 360, 340, "narrow"))
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            c=contents,
            pairs=pairs,
            scales=scales,
            cut=max(0, len(by_pair(contents.samples)) - MAX_PAIRS),
            plots=plots,
            held_out=any("held-out" in svg for _, svg in contents.charts),
            legend=[(s.name, swatch(s)) for s in contents.series],
            swatches={m["name"]: swatch(Series(m["name"], [], m["style"]), line=False) for m in contents.methods},
            best=_best(contents.methods),
        )
    )


def environment() -> Any:
    """The templates, with the filters they use.

    Raises:
        RunError: jinja2 is missing.
    """
    try:
        import jinja2
    except ImportError as error:
        raise RunError("reports need jinja2: pip install 'tokengrain[report]'") from error
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("tokengrain.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(number=number, fixed=fixed, interval=interval, seconds=seconds)
    return found


def fixed(value: float | None, decimals: int = 2) -> str:
    """`value` with this many decimals, for a column of a table; "–" for nothing."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{decimals}f}".replace("-", "−")


def interval(value: tuple[float, float | None, float | None] | None) -> str:
    """ "0.712 (0.680 to 0.742)", or only the value where no interval was measured."""
    if value is None:
        return "–"
    middle, low, high = value
    return number(middle) + (f" ({number(low)} to {number(high)})" if low is not None and high is not None else "")


def seconds(value: float | None) -> str:
    """Seconds for people: "8.3 s", "2 min 5 s"."""
    if value is None:
        return "–"
    if value < 100:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    return f"{int(value) // 60} min {int(value) % 60} s"


def swatch(series: Series, line: bool = True) -> str:
    """The sign of a series in a legend."""
    css = f"s{series.style} d{series.style}"
    inner = f'<path class="line {css}" d="M1 8H25"/>' if line else marker(8, 8, series.style)
    return f'<svg class="swatch" viewBox="0 0 {26 if line else 16} 16" aria-hidden="true">{inner}</svg>'


def _best(methods: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Column to the method with the highest value in it."""
    best = {}
    for column in ("true_reward", "frontier_share", "win_rate", "credit_spearman", "credit_auc"):
        known = [m for m in methods if isinstance(m.get(column), int | float)]
        if len(known) > 1:
            best[column] = max(known, key=lambda m: m[column])["name"]
    return best


# -------------------------------------------------------------------------------------------------- heat maps


def heat_maps(samples: Sequence[CreditSample]) -> tuple[list[dict[str, Any]], list[tuple[str, float]]]:
    """Pairs for the template, each with all its sources, and the value that gets full colour per source."""
    groups = by_pair(samples)
    sources = list(dict.fromkeys(s.source for s in samples))
    scales = {
        name: colour_scale([v for s in samples if s.source == name for side in s.sides for v in side.credit])
        for name in sources
    }
    truths = [v for s in samples for side in s.sides if side.truth is not None for v in side.truth]
    if truths:
        scales = {TRUTH: colour_scale(truths), **scales}
    pairs = []
    for group in groups[:MAX_PAIRS]:
        first = group[0]
        names = ("chosen", "rejected") if len(first.sides) == 2 else ("completion",)
        sides = []
        for i, name in enumerate(names):
            truth = first.sides[i].truth
            maps = []
            if truth is not None:
                exact = Side(first.sides[i].tokens, truth)
                maps.append({"source": TRUTH, "pieces": pieces(exact, scales[TRUTH])})
            maps += [{"source": s.source, "pieces": pieces(s.sides[i], scales[s.source])} for s in group]
            sides.append({"name": name, "maps": maps, "cut": max(0, len(first.sides[i].tokens) - MAX_TOKENS)})
        pairs.append({"prompt": first.prompt.strip(), "row": first.row, "sides": sides})
    return pairs, list(scales.items())


def pieces(side: Side, scale: float) -> list[Piece]:
    """A completion's tokens as the template needs them."""
    out = []
    truths = side.truth if side.truth is not None else [None] * len(side.tokens)
    for text, value, truth in list(zip(side.tokens, side.credit, truths, strict=True))[:MAX_TOKENS]:
        strength = 0.0 if value is None else min(1.0, abs(value) / scale)
        sign = "z" if value is None or strength < 0.04 else ("p" if value > 0 else "n")
        word = text.lstrip(" ")
        shown = (word or text).replace("\n", "↵\n") or "·"
        out.append(
            Piece(
                lead=" " * (len(text) - len(word)) if word else "",
                text=shown,
                strength=f"{strength:.2f}".rstrip("0").rstrip("."),
                sign=sign,
                credit="not counted" if value is None else signed(value),
                truth=None if truth is None else signed(truth),
            )
        )
    return out
