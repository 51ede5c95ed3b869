"""The picture of a training step in docs/architecture.md: `python docs/step_picture.py` writes docs/images/step.svg."""

from __future__ import annotations

from html import escape
from pathlib import Path

WIDTH, HEIGHT = 980, 330
BOX_W, BOX_H = 150, 62
# (key, column, row, title, file)
BOXES = (
    ("rows", 0, 0, "rows", "data/"),
    ("batch", 1, 0, "TokenBatch", "batch.py"),
    ("scores", 2, 0, "log-probs [N]", "scoring/"),
    ("loss", 3, 0, "objective", "methods/*.py"),
    ("step", 4, 0, "loss, optimiser", "training/"),
    ("credit", 2, 1, "credit [N]", "methods/*.py"),
    ("role", 3, 1, "role of the credit", "loss.py"),
    ("prompts", 0, 2, "prompts", "data/"),
    ("rollout", 1, 2, "completions", "rollout/"),
    ("rewards", 2, 2, "rewards [C]", "rewards/"),
    ("advantages", 3, 2, "rollout credit [N]", "methods/*.py"),
)
ARROWS = (
    ("rows", "batch"),
    ("batch", "scores"),
    ("scores", "loss"),
    ("loss", "step"),
    ("credit", "role"),
    ("role", "loss"),
    ("prompts", "rollout"),
    ("rollout", "rewards"),
    ("rewards", "advantages"),
    ("advantages", "role"),
    ("rollout", "batch"),
    ("batch", "credit"),
)
STYLE = """
  text { font: 14px system-ui, sans-serif; fill: #1c2733 }
  .file { font: 12px ui-monospace, monospace; fill: #5b6b7b }
  .note { font: 12px system-ui, sans-serif; fill: #5b6b7b }
  rect { fill: #f4f7fa; stroke: #8aa0b5 } .own { fill: #fff3e2; stroke: #d99a3d } path { stroke: #8aa0b5; fill: none }
  .back { fill: #ffffff; stroke: none }
"""


def corner(column: int, row: int) -> tuple[float, float]:
    return 25 + column * 195, 24 + row * 98


def arrow(start: tuple[int, int], end: tuple[int, int]) -> str:
    """A line from one box to another: level, straight up or down, or from corner to corner."""
    (x1, y1), (x2, y2) = corner(*start), corner(*end)
    if start[1] == end[1]:
        points = (x1 + BOX_W, y1 + BOX_H / 2, x2 - 4, y2 + BOX_H / 2)
    elif start[0] == end[0]:
        down = end[1] > start[1]
        points = (x1 + BOX_W / 2, y1 + BOX_H if down else y1, x2 + BOX_W / 2, y2 - 4 if down else y2 + BOX_H + 4)
    else:
        points = (x1 + BOX_W, y1 + BOX_H, x2 - 4, y2 + 8)
    return '<path d="M{:g} {:g} L{:g} {:g}" marker-end="url(#tip)"/>'.format(*points)


def picture() -> str:
    """The picture as SVG."""
    places = {key: (column, row) for key, column, row, _, _ in BOXES}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-label="A training step, from rows or prompts to the optimiser">',
        f"<style>{STYLE}</style>",
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="6" refY="4" orient="auto">'
        '<path d="M0 0 L7 4 L0 8" /></marker></defs>',
        f'<rect class="back" width="{WIDTH}" height="{HEIGHT}"/>',
        *(arrow(places[start], places[end]) for start, end in ARROWS),
    ]
    for _, column, row, title, file in BOXES:
        x, y = corner(column, row)
        own = ' class="own"' if file.startswith("methods") else ""
        parts += [
            f'<rect{own} x="{x:g}" y="{y:g}" width="{BOX_W}" height="{BOX_H}" rx="8"/>',
            f'<text x="{x + BOX_W / 2:g}" y="{y + 27:g}" text-anchor="middle">{escape(title)}</text>',
            f'<text class="file" x="{x + BOX_W / 2:g}" y="{y + 47:g}" text-anchor="middle">{escape(file)}</text>',
        ]
    x, y = corner(4, 1)
    parts += [
        f'<text class="note" x="{x:g}" y="{y + 10:g}">orange: a method</text>',
        f'<text class="note" x="{x:g}" y="{y + 28:g}">offline: upper rows;</text>',
        f'<text class="note" x="{x:g}" y="{y + 46:g}">online: all three.</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("images").joinpath("step.svg").write_text(picture(), encoding="utf-8")
