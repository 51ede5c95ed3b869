"""Results of `tokengrain bench credit` for people: tables in the terminal, one self-contained page, and Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from tokengrain.bench.questions import QUESTIONS
from tokengrain.errors import write_json, write_text
from tokengrain.report.html import environment, fixed, heat_maps
from tokengrain.report.rows import CreditSample, Side
from tokengrain.report.svg import Series, line_chart

HEADINGS = {
    "spearman": "ρ", "auc": "AUC", "auc_harm": "AUC harm", "auc_inside": "AUC inside", "top1": "top-1", "topk": "top-k",
    "auc_neighbours": "AUC neighbours", "auc_elsewhere": "AUC elsewhere", "place1": "top-1", "place3": "top-3",
    "drop_neighbours": "drop neighbours", "drop_elsewhere": "drop elsewhere", "r2": "R²", "ece": "ECE",
    "seconds": "s/1k", "training_seconds": "training s",
}  # fmt: skip
"""Of measures that are not headed by their own names."""
DECIMALS = {"ece": 3, "seconds": 3, "passes": 0, "reads": 1, "training_seconds": 0}
"""Of measures that are not shown with two."""
COSTS = ("seconds", "passes", "reads", "training_seconds")
Entries = Sequence[Mapping[str, Any]]
Group = tuple[str, tuple[str, ...], str]  # a table: title, measures, and the note under it
SIZE: Group = (
    "Size: calibration",
    ("scale", "r2", "skill", "ece"),
    "Scale: the factor that brings credit nearest to the truth; R²: what it then explains. Skill: how much better than "
    "the base rate credit predicts that a token lowers the reward (1 perfect, 0 nothing); ECE: how far off it is.",
)
COST: Group = (
    "Cost",
    COSTS,
    "s/1k: seconds per 1,000 credited tokens on this machine; passes: through models, per call with 64 prompts; reads: "
    "tokens that models read per credited token; training s: before there is any credit.",
)
SEEDS = "Mean over seeds, ± half of the 95 % t interval. AUC is the chance that"
FIRST: dict[str, Group] = {  # the table of each question that is about what it asks
    "pairs": (
        "Order: agreement with the exact advantage",
        ("spearman", "auc", "auc_harm", "top1", "alarm"),
        f"{SEEDS} a token with advantage above 0.3 has more credit than one below −0.3; AUC harm: that one below −0.3 "
        "has less than any other decision token. ρ: rank correlation. top-1: how often the lowest credit of a "
        "completion with such a token is at its lowest advantage; random credit: {top1_chance}. Alarm: chance that "
        "such a completion has a lower lowest credit than another.",
    ),
    "chain": (
        "Place: is the first wrong token found?",
        ("auc_inside", "place1", "place3", "share", "auc_harm", "spearman"),
        f"{SEEDS} the first wrong token has less credit than another decision token: inside, of its completion (an "
        "outcome spread over it has 0.5); harm, of all completions. top-1, top-3: how often it has the lowest credit "
        "of its completion, or one of the three lowest; random credit: {place1_chance} and {place3_chance}. Share: its "
        "part of the sum of |credit|; uniform credit: {place1_chance}. ρ: rank correlation with −1 there and 0 at "
        "other decision tokens.",
    ),
    "reference": (
        "Reference: are the tokens found that depend on the reasoning?",
        ("auc", "auc_inside", "place1", "place3", "share"),
        f"{SEEDS} such a token of the reference answer has more credit than another; inside: of the same reference. "
        "top-1, top-3: how many of its one or three highest are such tokens; random credit: {place1_chance}. Share: "
        "their part of the sum of |credit|; uniform credit: {place1_chance}.",
    ),
}
TEXT_NOTES = (
    "Mean over answers with its 95 % bootstrap interval. AUC: chance that a corrupted token has lower credit than an "
    "untouched one of the same answer; then than its next few neighbours, and than all others. Gain: AUC of the source "
    "and surprise together (a logistic function, judged on other answers than it is fitted on) minus that of surprise "
    "alone: what the source adds. Drop: credit in the "
    "clean answer minus that in the corrupted one, in standard deviations; then at neighbours, and at later untouched "
    "tokens. top-1, top-k: share of the lowest, and of the k lowest, that are corrupted.",
    "A source whose gain over surprise is not above 0 has found what is unusual, not what is wrong.",
)
CHANCES = ("top1_chance", "place1_chance", "place3_chance")  # what these notes are filled with
SHORT = {
    "pairs": ("spearman", "auc", "top1", "skill", "seconds", "passes"),
    "chain": ("auc_inside", "place1", "place3", "share", "seconds", "passes"),
    "reference": ("auc", "auc_inside", "place3", "share", "seconds", "passes"),
    "text": ("auc", "gain", "drop", "top1"),
}
"""What a terminal shows of it."""
PAGE = "credit.html"
FACTS = (
    "date", "machine", "world", "model", "data", "seeds", "steps", "pairs", "generations", "answers", "tokens", "seed"
)  # fmt: skip


def write_pages(result: Mapping[str, Any], folder: Path) -> None:
    """Write a result of `bench_credit` or `bench_corruption` into a folder, as JSON, Markdown and one HTML page."""
    write_json(folder / "credit.json", result)
    values = _world(result) if result["kind"] == "bench-credit" else _texts(result)
    facts = [(name, str(result[name])) for name in FACTS if result.get(name) is not None]
    write_text(folder / PAGE, environment().get_template("bench.html.j2").render(facts=facts, **values))
    lines = [f"# {values['title']}", "", values["subtitle"], ""]
    lines += [f"`tokengrain bench credit`: {', '.join(f'{name} {value}' for name, value in facts)}.", ""]
    for table in values["tables"]:
        lines += [f"## {table['title']}", "", "| " + " | ".join(table["columns"]) + " |"]
        lines.append("|" + "---|" * len(table["columns"]))
        for name, *cells in table["rows"]:
            lines.append(f"| {' | '.join([name, *(f'{mean} {around}'.strip() for mean, around in cells)])} |")
        for note in table["notes"]:
            lines += ["", note]
        lines.append("")
    write_text(folder / "credit.md", "\n".join(lines))


def _world(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of a world: tables with their notes, charts and heat maps."""
    tables = []
    parts = by_part(result["sources"])
    for (regime, question), mine in parts:
        sources = "; ".join(f"{e['source']}: {e['what']}" for e in mine)
        notes = [f"Sources: {sources}.", *_left_out(result["left_out"], question)]
        chances = {m: fixed(mine[0]["measures"][m]["mean"]) for m in CHANCES}
        for title, names, note in (FIRST[question], *[SIZE] * (question != "reference"), COST):
            title = f"{title} · {regime}" if regime else title
            tables.append(_table(title, names, mine, [note.format(**chances), *notes]))
            notes = []
    part, _ = parts[0]
    samples, runs = ([e for e in result[k] if (e["regime"], e["question"]) == part] for k in ("samples", "runs"))
    truth = {e["source"] for e in result["sources"] if e["kind"] == "truth"}  # it is beside every source anyway
    first = [r for r in runs if r["seed"] == 0]
    return {
        "title": "Is the credit right?",
        "subtitle": "Token credit against the truth, on a world where it is known.",
        "tables": tables,
        "charts": [(run["source"], _reliability(run["bins"])) for run in first if len(run["bins"]) > 1],
        "charts_title": "How often a token with this credit lowers the reward",
        "charts_note": "Seed 0, decision tokens, by quantile of credit. Line: observed; dots: as a logistic function "
        "of credit predicts, fitted on the other half of the completions. Steep is good, flat says nothing.",
        **_maps([e for e in samples if e["source"] not in truth], QUESTIONS[part[1]].sides),
    }


def _texts(result: Mapping[str, Any]) -> dict[str, Any]:
    tables = []
    for part in result["corruptions"]:
        notes = [*TEXT_NOTES, f"Credit that knows nothing reaches a top-1 of {fixed(part['chance_top1'])}."]
        if part["left_out"]:
            notes.append(f"{part['left_out']} answers were too short to corrupt.")
        measures = list(part["sources"][0]["measures"])
        tables.append(_table(f"Corruption: {part['how']}", measures, part["sources"], notes))
    return {
        "title": "Does credit fall where an answer is corrupted?",
        "subtitle": "A few tokens of good answers were corrupted.",
        "tables": tables,
        "charts": [],
        **_maps(result["samples"], ("clean", "corrupted")),
    }


def by_part(entries: Entries) -> list[tuple[tuple[str, str], list[Mapping[str, Any]]]]:
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


def _measured(names: Sequence[str], entries: Entries) -> list[str]:
    """The measures that any source has; of the AUC, which a truth without gains does not define, that of harm."""
    known = {n for e in entries for n, measure in e["measures"].items() if measure["mean"] is not None}
    wanted = ("auc_harm" if n == "auc" and n not in known else n for n in names)
    return [n for n in dict.fromkeys(wanted) if n in known]


def _table(title: str, names: Sequence[str], entries: Entries, notes: Sequence[str]) -> dict[str, Any]:
    names = _measured(names, entries)
    rows = [[e["source"], *(_cell(e["measures"][name], name) for name in names)] for e in entries]
    return {"title": title, "columns": ["source", *(HEADINGS.get(n, n) for n in names)], "rows": rows, "notes": notes}


def _cell(measure: Mapping[str, Any], name: str) -> tuple[str, str]:
    """A mean, and its interval: "± 0.03" if symmetric, "0.61 to 0.66" if not, "" where there is none."""
    decimals = DECIMALS.get(name, 2)
    mean, low, high = (measure[k] for k in ("mean", "low", "high"))
    if low is None or high is None:
        around = ""
    elif abs((high - mean) - (mean - low)) < 1e-9:
        around = f"± {fixed((high - low) / 2, decimals)}"
    else:
        around = f"{fixed(low, decimals)} to {fixed(high, decimals)}"
    return fixed(mean, decimals), around


def _maps(entries: Entries, names: Sequence[str]) -> dict[str, Any]:
    samples = []
    for entry in entries:
        sides = [entry[name] for name in ("chosen", "rejected") if name in entry]
        parts = tuple(Side(s["tokens"], s["credit"], s.get("truth")) for s in sides)
        samples.append(CreditSample(entry["prompt"], entry["source"], parts, entry.get("row")))
    pairs, scales = heat_maps(samples)
    for pair in pairs:
        for side, name in zip(pair["sides"], names, strict=True):
            side["name"] = name
    return {"pairs": pairs, "scales": scales}


def _reliability(bins: Sequence[Mapping[str, float]]) -> str:
    points = {name: [(b["credit"], b[name]) for b in bins] for name in ("observed", "predicted")}
    series = [Series(name, of, dashed=name == "predicted") for name, of in points.items()]
    return line_chart("share of tokens that lower the reward", series, "credit")


def terminal_tables(result: Mapping[str, Any]) -> list[Table]:
    """The result as tables for a terminal; the page has all measures."""
    if result["kind"] == "bench-corruption":
        return [_terminal_table(part["how"], part["sources"], SHORT["text"]) for part in result["corruptions"]]
    return [
        _terminal_table(" · ".join(filter(None, ("" if q == "pairs" else q, regime))), entries, SHORT[q])
        for (regime, q), entries in by_part(result["sources"])
    ]


def _terminal_table(title: str, entries: Entries, names: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=title or None, title_justify="left")
    table.add_column("source", overflow="fold")
    names = _measured(names, entries)
    for name in names:
        table.add_column(HEADINGS.get(name, name), justify="right", overflow="fold")
    for entry in entries:
        table.add_row(entry["source"], *(_short(entry["measures"][n], n) for n in names))
    return table


def _short(measure: Mapping[str, Any], name: str) -> str:
    """ "0.42 ±.03" or "0.64 (.61–.66)", for a narrow column; of a cost only the mean."""
    mean, around = _cell(measure, name)
    around = re.sub(r"(?<!\d)0\.", ".", around).replace("± ", "±").replace(" to ", "–")
    around = f"({around})" if around and not around.startswith("±") else around
    return mean if name in COSTS else f"{mean} {around}".strip()
