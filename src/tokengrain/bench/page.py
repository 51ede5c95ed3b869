"""Results of `tokengrain bench credit` for people: tables in the terminal and one self-contained page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from tokengrain.bench.questions import QUESTIONS
from tokengrain.bench.tables import (
    CHANCES,
    COSTS,
    TEXT_COLUMNS,
    TEXT_NOTES,
    TEXT_SHORT,
    WORLD_GROUPS,
    WORLD_SHORT,
    Column,
)
from tokengrain.files import write_text
from tokengrain.report.html import environment, fixed, heat_maps
from tokengrain.report.samples import CreditSample, Side
from tokengrain.report.svg import Series, line_chart

PAGE = "credit.html"
FACTS = (
    "date", "machine", "world", "model", "data", "seeds", "steps", "pairs", "generations", "answers", "tokens", "seed"
)  # fmt: skip


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


def _world(result: Mapping[str, Any]) -> dict[str, Any]:
    tables = []
    for (regime, question), mine in by_part(result["sources"]):
        notes = [_legend(mine), *_left_out(result["left_out"], question)]
        for i, (title, columns, note) in enumerate(WORLD_GROUPS[question]):
            rows = [[e["source"], *_cells(e["measures"], columns)] for e in mine]
            chances = {m: fixed(mine[0]["measures"][m]["mean"]) for m in CHANCES}
            tables.append(
                {
                    "title": f"{title} · {regime}" if regime else title,
                    "columns": ["source", *(c[0] for c in columns)],
                    "rows": rows,
                    "notes": [note.format(**chances), *(notes if i == 0 else [])],
                }
            )
    regime, question = by_part(result["sources"])[0][0]
    truth = {e["source"] for e in result["sources"] if e["kind"] == "truth"}  # it is beside every source anyway
    here = {
        name: [e for e in result[name] if (e["regime"], e["question"]) == (regime, question)]
        for name in ("samples", "runs")
    }
    pairs, scales = heat_maps([_sample(e) for e in here["samples"] if e["source"] not in truth])
    _rename(pairs, QUESTIONS[question].sides)
    first = [r for r in here["runs"] if r["seed"] == 0]
    return {
        "title": "Is the credit right?",
        "subtitle": "Token credit against the truth, on a world where it is known.",
        "tables": tables,
        "charts": [(run["source"], _reliability(run["bins"])) for run in first if len(run["bins"]) > 1],
        "charts_title": "How often a token with this credit lowers the reward",
        "charts_note": "Seed 0, decision tokens, by quantile of credit. Line: observed; dots: as a logistic function "
        "of credit predicts, fitted on the other half of the completions. Steep is good, flat says nothing.",
        "pairs": pairs,
        "scales": scales,
    }


def by_part(entries: Sequence[Mapping[str, Any]]) -> list[tuple[tuple[str, str], list[Mapping[str, Any]]]]:
    """The entries of each (regime, question), in order."""
    parts = dict.fromkeys((e["regime"], e["question"]) for e in entries)
    return [(part, [e for e in entries if (e["regime"], e["question"]) == part]) for part in parts]


def _left_out(entries: Sequence[Mapping[str, str]], question: str) -> list[str]:
    """A note on the sources that this question is not put to, by reason."""
    reasons: dict[str, list[str]] = {}
    for entry in entries:
        if entry["question"] == question:
            reasons.setdefault(entry["reason"], []).append(entry["source"])
    listed = "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items())
    return [f"Left out: {listed}."] if reasons else []


def _rename(pairs: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    for pair in pairs:
        for side, name in zip(pair["sides"], names, strict=True):
            side["name"] = name


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
    _rename(pairs, ("clean", "corrupted"))
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


def terminal_tables(result: Mapping[str, Any]) -> list[Table]:
    """The result as tables for a terminal; the page has all measures."""
    parts: list[tuple[str, Sequence[Mapping[str, Any]], list[Column]]] = []
    if result["kind"] == "bench-credit":
        for (regime, question), entries in by_part(result["sources"]):
            all_ = [c for group in WORLD_GROUPS[question] for c in group[1]]
            title = " · ".join(filter(None, (QUESTIONS[question].title, regime)))
            parts.append((title, entries, [c for c in all_ if c[1] in WORLD_SHORT[question]]))
    else:
        columns = [c for c in TEXT_COLUMNS if c[1] in TEXT_SHORT]
        parts = [(part["how"], part["sources"], columns) for part in result["corruptions"]]
    return [_terminal_table(*part) for part in parts]


def _terminal_table(title: str, entries: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=title or None, title_justify="left")
    for i, heading in enumerate(["source", *(c[0] for c in columns)]):
        table.add_column(heading, justify="right" if i else "left", overflow="fold")
    for entry in entries:
        table.add_row(entry["source"], *(_short(entry["measures"][m], m, decimals) for _, m, decimals in columns))
    return table


def _short(measure: Mapping[str, Any], name: str, decimals: int) -> str:
    """ "0.42 ±.03" or "0.64 (.61–.66)", for a narrow column; of a cost only the mean."""
    around = "" if name in COSTS else spread(measure, decimals)
    around = re.sub(r"(?<!\d)0\.", ".", around).replace("± ", "±").replace(" to ", "–")
    around = f"({around})" if around and not around.startswith("±") else around
    return f"{fixed(measure['mean'], decimals)} {around}".strip()
