"""Results of `tokengrain bench credit` for people: tables in the terminal and one self-contained page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from tokengrain.files import write_text
from tokengrain.report.html import environment, fixed, heat_maps
from tokengrain.report.samples import CreditSample, Side
from tokengrain.report.svg import Series, line_chart

PAGE = "credit.html"
Column = tuple[str, str, int]
"""Heading, name of the measure, decimals."""

WORLD_TABLES = ("Order: agreement with the exact advantage", "Size: calibration", "Cost")
WORLD_GROUPS: tuple[tuple[Column, ...], ...] = (
    (
        ("ρ", "spearman", 2),
        ("AUC", "auc", 2),
        ("AUC harm", "auc_harm", 2),
        ("top-1", "top1", 2),
        ("alarm", "alarm", 2),
    ),
    (("scale", "scale", 2), ("R²", "r2", 2), ("skill", "skill", 2), ("ECE", "ece", 3)),
    (("s/1k", "seconds", 3), ("passes", "passes", 0), ("reads", "reads", 1), ("training s", "training_seconds", 0)),
)
WORLD_NOTES = (
    "Mean over seeds, ± half of the 95 % t interval. ρ: Spearman rank correlation with the exact soft advantage over "
    "tokens at which something was decided. AUC: chance that a token with advantage above 0.3 has more credit than one "
    "below −0.3. AUC harm: chance that a token below −0.3 has less credit than any other decision token. top-1: in "
    "completions with a token below −0.3, how often the lowest credit is at the lowest advantage. Alarm: chance that "
    "a completion with such a token has a lower lowest credit than one without.",
    "Scale: the factor that brings credit nearest to the advantage; R²: what it then explains, below 0 if less than a "
    "constant. Skill: how much better a logistic function of credit predicts that a token lowers the reward than the "
    "base rate does (1 perfect, 0 nothing); ECE: how far its percentages are from the observed ones.",
    "Cost: s/1k, seconds per 1,000 credited tokens on this machine; forward passes per call with 64 pairs; tokens read "
    "by a model per credited token; seconds of training before there is any credit.",
)
TEXT_COLUMNS: tuple[Column, ...] = (
    ("AUC", "auc", 2),
    ("AUC neighbours", "auc_neighbours", 2),
    ("AUC elsewhere", "auc_elsewhere", 2),
    ("drop", "drop", 2),
    ("drop neighbours", "drop_neighbours", 2),
    ("drop elsewhere", "drop_elsewhere", 2),
    ("top-1", "top1", 2),
    ("top-k", "topk", 2),
)
TEXT_NOTES = (
    "Mean over answers with its 95 % bootstrap interval. AUC: chance that a corrupted token has lower credit than an "
    "untouched one of the same answer; then against its next few neighbours only, and against all others only. Drop: "
    "credit in the clean answer minus credit in the corrupted one at the same place, in standard deviations of the "
    "source; then at the neighbours, and at later untouched tokens. top-1, top-k: share of the lowest token, and of "
    "the k lowest, that are corrupted.",
    "A source that is no better than surprise has found what is unusual, not what is wrong.",
)


def write_page(result: Mapping[str, Any], folder: Path) -> Path:
    """Write the page of a result of `bench_credit` or `bench_corruption` into a folder; returns its path."""
    path = folder / PAGE
    write_text(path, render_page(result))
    return path


def page_values(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows: title, tables with their notes, charts and heat maps."""
    return _world(result) if result["kind"] == "bench-credit" else _texts(result)


def render_page(result: Mapping[str, Any]) -> str:
    """The page as text."""
    values = page_values(result)
    facts = [(name, str(result[name])) for name in FACTS if result.get(name) is not None]
    return environment().get_template("bench.html.j2").render(facts=facts, **values)


FACTS = ("date", "machine", "world", "model", "data", "seeds", "steps", "pairs", "answers", "tokens", "seed")


def _world(result: Mapping[str, Any]) -> dict[str, Any]:
    regimes = list(dict.fromkeys(e["regime"] for e in result["sources"]))
    tables = []
    for regime in regimes:
        mine = [e for e in result["sources"] if e["regime"] == regime]
        chance = fixed(mine[0]["measures"]["top1_chance"]["mean"])
        extra = {0: [f"Random credit reaches a top-1 of {chance}.", _legend(mine)]}
        for i, (title, columns, note) in enumerate(zip(WORLD_TABLES, WORLD_GROUPS, WORLD_NOTES, strict=True)):
            rows = [[e["source"], *_cells(e["measures"], columns)] for e in mine]
            headings = ["source", *(c[0] for c in columns)]
            title = f"{title} · {regime}" if regime else title
            tables.append({"title": title, "columns": headings, "rows": rows, "notes": [note, *extra.get(i, ())]})
    truth = {e["source"] for e in result["sources"] if e["kind"] == "truth"}  # it is beside every source anyway
    shown = [e for e in result["samples"] if e["regime"] == regimes[0] and e["source"] not in truth]
    pairs, scales = heat_maps([_sample(e) for e in shown])
    first = [r for r in result["runs"] if r["regime"] == regimes[0] and r["seed"] == 0]
    return {
        "title": "Is the credit right?",
        "subtitle": "Token credit against the exact soft advantage, on a world where it is known.",
        "tables": tables,
        "charts": [(run["source"], _reliability(run["bins"])) for run in first if len(run["bins"]) > 1],
        "charts_title": "How often a token with this credit lowers the reward",
        "charts_note": "Seed 0, decision tokens, by quantile of credit. Line: observed; dots: as a logistic function "
        "of credit predicts, fitted on the other half of the completions. Steep is good, flat says nothing.",
        "pairs": pairs,
        "scales": scales,
    }


def _texts(result: Mapping[str, Any]) -> dict[str, Any]:
    tables = []
    for part in result["corruptions"]:
        rows = [[e["source"], *_cells(e["measures"], TEXT_COLUMNS)] for e in part["sources"]]
        notes = [*TEXT_NOTES, f"Credit that knows nothing reaches a top-1 of {fixed(part['chance_top1'])}."]
        if part["left_out"]:
            notes.append(f"{part['left_out']} answers were too short to corrupt.")
        columns = ["source", *(c[0] for c in TEXT_COLUMNS)]
        tables.append({"title": f"Corruption: {part['how']}", "columns": columns, "rows": rows, "notes": notes})
    pairs, scales = heat_maps([_sample(e) for e in result["samples"]])
    for pair in pairs:
        for side, name in zip(pair["sides"], ("clean", "corrupted"), strict=True):
            side["name"] = name
    return {
        "title": "Does credit fall where an answer is spoilt?",
        "subtitle": "A few tokens of good answers were corrupted.",
        "tables": tables,
        "charts": [],
        "pairs": pairs,
        "scales": scales,
    }


def _cells(measures: Mapping[str, Any], columns: Sequence[Column]) -> list[tuple[str, str]]:
    return [(fixed(measures[m]["mean"], d), spread(measures[m], d)) for _, m, d in columns]


def spread(measure: Mapping[str, Any], decimals: int) -> str:
    """ "± 0.03" for a symmetric interval, "0.61–0.66" for another; "" where there is none."""
    mean, low, high = (measure[k] for k in ("mean", "low", "high"))
    if low is None or high is None:
        return ""
    if abs((high - mean) - (mean - low)) < 1e-9:
        return f"± {fixed((high - low) / 2, decimals)}"
    return f"{fixed(low, decimals)} to {fixed(high, decimals)}"


def _legend(entries: Sequence[Mapping[str, Any]]) -> str:
    return "Sources: " + "; ".join(f"{e['source']}: {e['what']}" for e in entries) + "."


def _reliability(bins: Sequence[Mapping[str, float]]) -> str:
    series = [
        Series(name, [(b["credit"], b[key]) for b in bins], 0, dashed=key == "predicted")
        for name, key in (("observed", "observed"), ("predicted", "predicted"))
    ]
    return line_chart("share of tokens that lower the reward", series, "credit")


def _sample(entry: Mapping[str, Any]) -> CreditSample:
    sides = [entry[name] for name in ("chosen", "rejected") if name in entry]
    parts = tuple(Side(s["tokens"], s["credit"], s.get("truth")) for s in sides)
    return CreditSample(entry["prompt"], entry["source"], parts, entry.get("row"))


# --------------------------------------------------------------------------------------------------------- terminal

WORLD_SHORT = ("spearman", "auc", "top1", "skill", "seconds", "passes")
HARM_SHORT = ("spearman", "auc_harm", "top1", "skill", "seconds", "passes")
"""Where no token raises the reward, as in `arithmetic`."""
TEXT_SHORT = ("auc", "drop", "drop_neighbours", "top1")
COSTS = ("seconds", "passes", "reads", "training_seconds")


def terminal_tables(result: Mapping[str, Any]) -> list[Table]:
    """The result as tables for a terminal; the page has all measures."""
    if result["kind"] == "bench-credit":
        regimes = dict.fromkeys(e["regime"] for e in result["sources"])
        parts = [(r, [e for e in result["sources"] if e["regime"] == r]) for r in regimes]
        both = any(entry["measures"]["auc"]["mean"] is not None for entry in result["sources"])
        columns = [c for group in WORLD_GROUPS for c in group if c[1] in (WORLD_SHORT if both else HARM_SHORT)]
    else:
        parts = [(part["how"], part["sources"]) for part in result["corruptions"]]
        columns = [c for c in TEXT_COLUMNS if c[1] in TEXT_SHORT]
    tables = []
    for title, entries in parts:
        table = Table(
            box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=title or None, title_justify="left"
        )
        for i, heading in enumerate(["source", *(c[0] for c in columns)]):
            table.add_column(heading, justify="right" if i else "left", overflow="fold")
        for entry in entries:
            table.add_row(entry["source"], *(_short(entry["measures"][m], m, decimals) for _, m, decimals in columns))
        tables.append(table)
    return tables


def _short(measure: Mapping[str, Any], name: str, decimals: int) -> str:
    """ "0.42 ±.03" or "0.64 (.61–.66)", for a narrow column; of a cost only the mean."""
    around = "" if name in COSTS else spread(measure, decimals)
    around = re.sub(r"(?<!\d)0\.", ".", around).replace("± ", "±").replace(" to ", "–")
    around = f"({around})" if around and not around.startswith("±") else around
    return f"{fixed(measure['mean'], decimals)} {around}".strip()
