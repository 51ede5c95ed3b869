"""The report: one HTML file with everything in it, readable without network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokengrain.errors import RunError
from tokengrain.files import write_text
from tokengrain.report import rollouts
from tokengrain.report.contents import Contents, read_contents
from tokengrain.report.samples import CreditSample, Side, by_pair, colour_scale, visible
from tokengrain.report.svg import Series, frontier_chart, marker, number, signed

NAME = "report.html"
MAX_PAIRS = 24
MAX_TOKENS = 600  # per completion; more is cut, and said so
TRUTH = "exact advantage"
MAX_PIECES = 20_000  # tokens in all heat maps of recorded rollouts together: about 1.4 MB
MAX_COMPLETIONS = 8  # of a recorded prompt


@dataclass(frozen=True)
class Piece:
    """A token of a heat map: white space before it, its text, strength 0..1, sign class, numbers, mark if clipped."""

    lead: str
    text: str
    strength: str
    sign: str
    credit: str
    truth: str | None
    mark: str = ""


def write_report(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a finished run or demo.

    Args:
        run_dir: folder of a run (`tokengrain train`) or of a demo.
        output: where to write; default `report.html` in the folder.

    Returns:
        The path of the file.

    Raises:
        RunError: not a run folder, an unfinished run (says what is there and how to resume), jinja2 missing.
        RunError: a damaged file of the run, of `rollouts.jsonl` with the line.
        DataError: a damaged `credit_samples.json`; names the entry.
    """
    path = Path(output) if output is not None else Path(run_dir) / NAME
    write_text(path, render(read_contents(run_dir)))
    return path


def render(contents: Contents) -> str:
    """The page as text."""
    pairs, scales = heat_maps(contents.samples)
    most = MAX_PIECES // max(len(contents.rollouts), 1)
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
            stages=[
                {"id": f"rollouts-{i}", **rollout_maps(name, found, most)}
                for i, (name, found) in enumerate(contents.rollouts)
            ],
            phases=[(title, svg, [(s.name, swatch(s)) for s in lines]) for title, svg, lines in contents.phases],
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
        pairs.append({"prompt": visible(first.prompt.strip()), "row": first.row, "sides": sides})
    return pairs, list(scales.items())


def pieces(side: Side, scale: float) -> list[Piece]:
    """A completion's tokens as the template needs them."""
    out = []
    truths = side.truth if side.truth is not None else [None] * len(side.tokens)
    marks = side.clipped if side.clipped is not None else [0] * len(side.tokens)
    for text, value, truth, mark in list(zip(side.tokens, side.credit, truths, marks, strict=True))[:MAX_TOKENS]:
        strength = 0.0 if value is None else min(1.0, abs(value) / scale)
        sign = "z" if value is None or strength < 0.04 else ("p" if value > 0 else "n")
        text = visible(text)
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
                mark=("", "high", "low")[mark],
            )
        )
    return out


# --------------------------------------------------------------------------------------------------- rollouts


def rollout_maps(name: str, completions: Sequence[rollouts.Recorded], most: int = MAX_PIECES) -> dict[str, Any]:
    """A stage's recorded rollouts for the template: by step, each completion with its rewards and heat maps.

    Args:
        name: of the stage.
        completions: as recorded.
        most: tokens in all heat maps together; of more rollouts than that, some are shown, evenly spread.

    Returns:
        `name`; `columns`: (column, view, value of full colour) of the heat maps that there are; `steps`; `recorded`:
        prompts recorded; `clipped`: whether clipped tokens were recorded; `others`: columns that are not shown.
    """
    there = rollouts.recorded_columns(completions)
    columns = [c for c in rollouts.VIEWS if c in there]
    scales = {c: rollouts.scale_of(rollouts.side_of(one, c) for one in completions) for c in columns}
    groups = rollouts.by_prompt(completions)
    sides = [[_rollout_sides(one, columns) for one in group[:MAX_COMPLETIONS]] for group in groups]
    sizes = [sum(len(side.tokens) for maps in group for side in maps.values()) for group in sides]
    steps = []
    for i in rollouts.spread(sizes, most):
        shown = zip(groups[i], sides[i], strict=False)
        steps.append(_rollout_step(groups[i], [_rollout_completion(one, maps, scales) for one, maps in shown]))
    return {
        "name": name,
        "columns": [(c, rollouts.VIEWS[c], scales[c]) for c in columns],
        "steps": steps,
        "recorded": len(groups),
        "clipped": any(one.clipped is not None for one in completions),
        "others": [c for c in there if c not in columns],
    }


def _rollout_sides(one: rollouts.Recorded, columns: Sequence[str]) -> dict[str, Side]:
    """The heat maps of a completion by column, cut to what is shown; a plain one if it has no numbers."""
    found = {c: rollouts.side_of(one, c) for c in columns if c in one.columns}
    found = found or {"": rollouts.side_of(one, "")}
    return {c: rollouts.merged(rollouts.cut(side, MAX_TOKENS)) for c, side in found.items()}


def _rollout_completion(one: rollouts.Recorded, maps: dict[str, Side], scales: dict[str, float]) -> dict[str, Any]:
    return {
        "number": one.completion,
        "reward": one.reward,
        "rewards": list(one.rewards.items()) if len(one.rewards) > 1 else [],
        "truncated": one.truncated,
        "length": len(one.tokens),
        "cut": max(0, len(one.tokens) - MAX_TOKENS),
        "maps": [
            {"source": rollouts.view_of(c).title, "column": c, "pieces": pieces(side, scales.get(c, 1.0))}
            for c, side in maps.items()
        ],
    }


def _rollout_step(group: Sequence[rollouts.Recorded], completions: list[dict[str, Any]]) -> dict[str, Any]:
    marks = [m for one in group if one.clipped is not None for m in one.clipped]
    return {
        "step": group[0].step,
        "rollout": group[0].rollout,
        "row": group[0].row,
        "prompt": visible(group[0].prompt.strip()),
        "rewards": [one.reward for one in group],
        "clipped": sum(m != 0 for m in marks) / len(marks) if marks else None,
        "completions": completions,
        "left": len(group) - len(completions),
    }
