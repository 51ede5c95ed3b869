"""A still picture of a demo for documents: a pair's heat maps beside the reward-KL plot, as one SVG file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from tokengrain.errors import RunError, require, write_text
from tokengrain.report.html import Piece, heat_maps, read_contents
from tokengrain.report.rows import CreditSample, by_pair
from tokengrain.report.svg import frontier_chart

SIZE = 14  # of the heat maps' letters; fixed width, so that their places are known without a browser
LETTER = SIZE * 0.602
LINE, WHAT = 25, 22  # height of a line of tokens, and of one that says what they are
MAPS_WIDTH = 560
CHART = (520, 400)
MARGIN = 24
_STYLE = """
svg.picture { background: var(--bg); font-family: system-ui, -apple-system, "Segoe UI", Roboto, Arial,
sans-serif; } .card { fill: var(--bg); stroke: var(--rule); }
.head { font-size: 15px; font-weight: 600; fill: var(--ink); }
.what { font-size: 12.5px; fill: var(--muted); }
.word { font: 14px ui-monospace, "SFMono-Regular", Menlo, Consolas, "DejaVu Sans Mono", monospace; fill:
var(--ink); } .p { fill: rgb(var(--pos)); stroke: rgb(var(--pos)); } .n { fill: rgb(var(--neg)); stroke:
rgb(var(--neg)); } rect.p, rect.n { stroke: none; }
line.p, line.n { stroke-width: 2; } line.n { stroke-dasharray: 2 2; }
"""


def write_picture(
    run_dir: str | Path, output: str | Path, *, pair: int = 0, sources: Sequence[str] | None = None
) -> Path:
    """Write a picture of a finished demo or run: heat maps of one pair, and the reward-KL plot if there is
    one.

    Args:
        run_dir: folder of a demo or run with `credit_samples.json`.
        output: the .svg file to write.
        pair: which of its pairs.
        sources: names of the credit sources to show (None: all); the exact advantage is always shown.

    Raises:
        RunError: not a finished run, or it has no credit samples of these sources.
    """
    contents = read_contents(run_dir)
    samples = [s for s in contents.samples if sources is None or s.source in sources]
    pairs = by_pair(samples)
    message = f"{run_dir} has {len(pairs)} pairs with token credit; there is no pair {pair}"
    require(0 <= pair < len(pairs), RunError, message)
    # The scale is that of all pairs, as in the report.
    maps, height = _maps(samples, pair)
    parts = [maps]
    width = MAPS_WIDTH + 2 * MARGIN
    if contents.marks:
        x, (chart_width, chart_height) = width, CHART
        chart = frontier_chart(contents.frontier, contents.marks, chart_width, chart_height)
        place = f'<svg x="{x}" y="{MARGIN + 26}" width="{chart_width}" height="{chart_height}" '
        title = '<text class="head" x="{}" y="{}">True reward against KL: nobody passes the curve</text>'
        parts.append(title.format(x, MARGIN + 12) + place + chart.removeprefix("<svg "))
        width += chart_width + MARGIN
        height = max(height, chart_height + 26 + 2 * MARGIN)
    write_text(output, svg_of(parts, height, "token credit of a pair of completions", width))
    return Path(output)


def svg_of(parts: Sequence[str], height: int, label: str, width: int = MAPS_WIDTH + 2 * MARGIN) -> str:
    """Parts on a card, with the report's colours, as a file."""
    style = (files("tokengrain.report") / "templates" / "palette.css").read_text(encoding="utf-8") + _STYLE
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="picture" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
        f"<style>{style}</style>"
        f'<rect class="card" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="10"/>'
        f"{''.join(parts)}</svg>\n"
    )


def _maps(samples: Sequence[CreditSample], pair: int) -> tuple[str, int]:
    """Heat maps of one pair, and the height they take."""
    shown = heat_maps(samples)[0][pair]
    y = MARGIN + 12
    parts = [f'<text class="head" x="{MARGIN}" y="{y}">Which tokens earned the reward?</text>']
    y += 22
    parts.append(f'<text class="what" x="{MARGIN}" y="{y}">{escape(shown["prompt"].strip())}</text>')
    for side in shown["sides"]:
        y += 32
        parts.append(f'<text class="head" x="{MARGIN}" y="{y}">{side["name"]}</text>')
        for row in side["maps"]:
            y += WHAT
            parts.append(f'<text class="what" x="{MARGIN}" y="{y}">{escape(row["source"])}</text>')
            drawn, lines = words(row["pieces"], y + WHAT)
            parts.append(drawn)
            y += lines * LINE
    y += 26
    key = "blue, solid line: raises the reward; orange, dotted line: lowers it"
    parts.append(f'<text class="what" x="{MARGIN}" y="{y}">{key}</text>')
    return "".join(parts), y + MARGIN


def words(pieces: Sequence[Piece], y: float) -> tuple[str, int]:
    """Tokens from baseline `y` on, wrapped at the width; the text and the number of lines."""
    parts, x, lines = [], float(MARGIN), 1
    for piece in pieces:
        text = piece.text.strip("\n") or "↵"
        lead, length = LETTER * len(piece.lead), LETTER * len(text)
        if x + lead + length > MAPS_WIDTH + MARGIN and x > MARGIN:
            x, y, lines, lead = float(MARGIN), y + LINE, lines + 1, 0.0
        x += lead
        if piece.sign != "z":
            left, right, under = f"{x - 1:.1f}", f"{x + length + 1:.1f}", y + 5
            parts.append(
                f'<rect class="{piece.sign}" x="{left}" y="{y - 14}" width="{length + 2:.1f}" height="19" '
                f'style="fill-opacity:calc({piece.strength} * var(--strength))"/>'
                f'<line class="{piece.sign}" x1="{left}" x2="{right}" y1="{under}" y2="{under}" '
                f'stroke-opacity="{0.15 + 0.85 * float(piece.strength):.2f}"/>'
            )
        parts.append(
            f'<text class="word" x="{x:.1f}" y="{y}" textLength="{length:.1f}" '
            f'lengthAdjust="spacingAndGlyphs">{escape(text)}</text>'
        )
        x += length
    return "".join(parts), lines
