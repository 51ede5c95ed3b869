"""Training curves of a report, from the log of each stage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tokengrain.report.svg import Series, line_chart

# Title of a chart, and the names that its quantity has in logs (first match wins; "eval_" marks held-out
# values).
CURVES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loss", ("loss",)),
    ("reward", ("reward/mean", "reward")),
    ("correct, share of completions", ("reward/correct", "correct")),
    ("pair accuracy", ("rewards/accuracies", "accuracy", "accuracies")),
    ("reward margin", ("rewards/margins", "margin", "margins")),
    ("utilisation: completions with credit, share", ("rollout/utilisation",)),
    ("clipped tokens, share", ("clip/tokens",)),
    ("KL to the reference, nats per token", ("kl", "kl_per_token", "sequence_kl", "kl/ref", "rollout/kl_ref")),
    ("KL to the sampling policy, nats per token", ("kl/old",)),
    ("entropy, nats per token", ("entropy", "rollout/entropy")),
    ("tokens per completion", ("rollout/length", "length")),
    ("gradient norm", ("grad_norm",)),
)
PHASES = ("rollout", "reward", "scoring", "credit", "update")
"""What a step of online training is made of; logged as `seconds/<phase>`."""

Logs = Sequence[tuple[str, int, list[dict[str, Any]]]]
"""(stage, style, rows of its log)."""


def charts(logs: Logs) -> list[tuple[str, str]]:
    """(title, svg) of every quantity that was logged; training values as lines, held-out ones dashed."""
    found = []
    for title, names in CURVES:
        series = []
        for stage, style, rows in logs:
            for prefix in ("", "eval_"):
                points = _points(rows, [prefix + n for n in names])
                if points:
                    held_out = " (held out)" if prefix else ""
                    series.append(Series(stage + held_out, points, style, dashed=bool(prefix)))
        svg = line_chart(title, series, "step")
        if svg:
            found.append((title, svg))
    return found


def phase_charts(logs: Logs) -> list[tuple[str, str, list[Series]]]:
    """(title, svg, lines) for each stage that logged where its time went; the lines are phases, not stages."""
    found = []
    for stage, _, rows in logs:
        points = [(name, i, _points(rows, [f"seconds/{name}"])) for i, name in enumerate(PHASES)]
        series = [Series(name, p, style) for name, style, p in points if p]
        title = f"seconds per rollout, {stage}"
        svg = line_chart(title, series, "step")
        if svg:
            found.append((title, svg, series))
    return found


def _points(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[tuple[float, float]]:
    """(step, value) of the first of `names` that is in the log."""
    for name in names:
        found = [
            (float(r["step"]), float(r[name]))
            for r in rows
            if isinstance(r.get("step"), int | float) and isinstance(r.get(name), int | float)
        ]
        found = [(x, y) for x, y in found if math.isfinite(y)]
        if found:
            return found
    return []
