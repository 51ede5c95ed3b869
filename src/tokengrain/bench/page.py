"""Results of `tokengrain bench credit` for people: tables in the terminal and one self-contained page."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from tokengrain.bench.questions import QUESTIONS
from tokengrain.bench.sources import BenchSource
from tokengrain.errors import read_log, write_text
from tokengrain.evaluation.statistics import mean_of_runs
from tokengrain.report.html import environment, fixed, heat_maps
from tokengrain.report.rows import CreditSample, Side
from tokengrain.report.svg import Series, line_chart

# ----------------------------------------------------------------------------------------------------
# Which numbers of `tokengrain bench credit` stand in which table, and what is said about them.

Column = tuple[str, str, int]
"""Heading, name of the measure, decimals."""

Group = tuple[str, tuple[Column, ...], str]
"""A table: title, columns, and the note under it."""

SIZE: Group = (
    "Size: calibration",
    (("scale", "scale", 2), ("R²", "r2", 2), ("skill", "skill", 2), ("ECE", "ece", 3)),
    "Scale: the factor that brings credit nearest to the truth; R²: what it then explains, below 0 if less than a "
    "constant. Skill: how much better a logistic function of credit predicts that a token lowers the reward than the "
    "base rate does (1 perfect, 0 nothing); ECE: how far its percentages are from the observed ones.",
)
COST: Group = (
    "Cost",
    (("s/1k", "seconds", 3), ("passes", "passes", 0), ("reads", "reads", 1), ("training s", "training_seconds", 0)),
    "Cost: s/1k, seconds per 1,000 credited tokens on this machine; forward passes per call with 64 prompts; tokens "
    "read by a model per credited token; seconds of training before there is any credit.",
)
WORLD_GROUPS: dict[str, tuple[Group, ...]] = {
    "pairs": (
        (
            "Order: agreement with the exact advantage",
            (
                ("ρ", "spearman", 2),
                ("AUC", "auc", 2),
                ("AUC harm", "auc_harm", 2),
                ("top-1", "top1", 2),
                ("alarm", "alarm", 2),
            ),
            "Mean over seeds, ± half of the 95 % t interval. ρ: Spearman rank correlation with the exact soft "
            "advantage over tokens at which something was decided. AUC: chance that a token with advantage above 0.3 "
            "has more credit than one below −0.3. AUC harm: chance that a token below −0.3 has less credit than any "
            "other decision token. top-1: in completions with a token below −0.3, how often the lowest credit is at "
            "the lowest advantage. Alarm: chance that a completion with such a token has a lower lowest credit than "
            "one without. Random credit reaches a top-1 of {top1_chance}.",
        ),
        SIZE,
        COST,
    ),
    "chain": (
        (
            "Place: is the first wrong token found?",
            (
                ("AUC inside", "auc_inside", 2),
                ("top-1", "place1", 2),
                ("top-3", "place3", 2),
                ("share", "share", 2),
                ("AUC harm", "auc_harm", 2),
                ("ρ", "spearman", 2),
            ),
            "Mean over seeds, ± half of the 95 % t interval, on groups of samples with right and wrong ones. AUC "
            "inside: chance that the first wrong token has less credit than another decision token of the same "
            "completion; an outcome that is spread over a completion has 0.5. top-1, top-3: how often it has the "
            "lowest credit of all tokens of its completion, or is among the three lowest; random credit: "
            "{place1_chance} and {place3_chance}. Share: its part of the completion's sum of |credit|; uniform "
            "credit: {place1_chance}. AUC harm: as AUC inside, against the decision tokens of all completions, right "
            "ones too. ρ: rank correlation with −1 at the first wrong token and 0 at other decision tokens.",
        ),
        SIZE,
        COST,
    ),
    "reference": (
        (
            "Reference: are the tokens found that depend on the reasoning?",
            (
                ("AUC", "auc", 2),
                ("AUC inside", "auc_inside", 2),
                ("top-1", "place1", 2),
                ("top-3", "place3", 2),
                ("share", "share", 2),
            ),
            "Mean over seeds, ± half of the 95 % t interval. The tokens are those of the reference answer behind each "
            "sampled chain. AUC: chance that a token which depends on the reasoning has more credit than one that "
            "does not; inside: in the same reference. top-1: how often such a token has the highest credit of its "
            "reference; top-3: how many of the three highest are such tokens; random credit: {place1_chance}. Share: "
            "of the sum of |credit|, what lies on them; uniform credit: {place1_chance}.",
        ),
        COST,
    ),
}
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
CHANCES = ("top1_chance", "place1_chance", "place3_chance")
"""What notes are filled with."""

# In a terminal.
WORLD_SHORT = {
    "pairs": ("spearman", "auc", "top1", "skill", "seconds", "passes"),
    "chain": ("auc_inside", "place1", "place3", "share", "seconds", "passes"),
    "reference": ("auc", "auc_inside", "place3", "share", "seconds", "passes"),
}
TEXT_SHORT = ("auc", "drop", "drop_neighbours", "top1")
COSTS = ("seconds", "passes", "reads", "training_seconds")

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


# ----------------------------------------------------------------------------------------------------
# Single runs of `tokengrain bench credit` as one entry per source: means over seeds with their intervals.

MEASURES = (
    "spearman", "auc", "auc_harm", "top1", "top1_chance", "alarm", "scale", "r2", "ece", "skill",
    "auc_inside", "place1", "place3", "share", "place1_chance", "place3_chance",
    "seconds", "passes", "reads", "training_seconds",
)  # fmt: skip


def summarise(runs: Sequence[dict[str, Any]], sources: Sequence[BenchSource]) -> list[dict[str, Any]]:
    """One entry per regime, question and source, the best first."""
    entries = []
    parts = list(dict.fromkeys((run["regime"], run["question"]) for run in runs))
    for regime, question in parts:
        for source in sources:
            mine = [r for r in runs if (r["regime"], r["question"], r["source"]) == (regime, question, source.name)]
            if not mine:
                continue
            mine.sort(key=lambda r: r["seed"])
            measures = {m: _over_seeds([r[m] for r in mine]) for m in MEASURES}
            about = {"regime": regime, "question": question, "source": source.name, "kind": source.kind}
            about |= {"what": source.what, "trains": list(source.trains), "seeds": len(mine)}
            entries.append({**about, "measures": measures})
    order = {part: i for i, part in enumerate(parts)}

    def place(entry: dict[str, Any]) -> tuple[int, float]:
        best = entry["measures"][QUESTIONS[entry["question"]].ranked_by]
        return order[entry["regime"], entry["question"]], -_sortable(best)

    return sorted(entries, key=place)


def _sortable(measure: dict[str, Any]) -> float:
    return -2.0 if measure["mean"] is None else measure["mean"]


def _over_seeds(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, 95 % t interval and the values; a measure that is not defined in some seed has neither."""
    known = [float(v) for v in values if v is not None]
    if len(known) < len(values) or not known:
        return {"mean": None, "low": None, "high": None, "by_seed": list(values)}
    found = mean_of_runs(known) if len(known) > 1 else None
    mean = found.value if found else known[0]
    return {"mean": mean, "low": found and found.low, "high": found and found.high, "by_seed": known}


# ----------------------------------------------------------------------------------------------------
# The result of `tokengrain bench credit` as Markdown: the tables of the page, without the heat maps.

MARKDOWN = "credit.md"


def write_markdown(result: Mapping[str, Any], folder: Path) -> Path:
    """Write the tables of a result of `bench_credit` or `bench_corruption` into a folder; returns the path."""
    path = folder / MARKDOWN
    write_text(path, markdown(result))
    return path


def markdown(result: Mapping[str, Any]) -> str:
    """The tables with their notes, and how they were made."""
    values = page_values(result)
    facts = ", ".join(f"{name} {result[name]}" for name in FACTS if result.get(name) is not None)
    lines = [f"# {values['title']}", "", values["subtitle"], "", f"`tokengrain bench credit`: {facts}.", ""]
    for table in values["tables"]:
        lines += [f"## {table['title']}", "", "| " + " | ".join(table["columns"]) + " |"]
        lines.append("|" + "---|" * len(table["columns"]))
        for name, *cells in table["rows"]:
            shown = [f"{mean} {around}".strip() for mean, around in cells]
            lines.append(f"| {' | '.join([name, *shown])} |")
        for note in table["notes"]:
            lines += ["", note]
        lines.append("")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------
# A log of finished runs, one JSON object per line, that several processes write and a kill does not spoil.


def append_line(log: Path, line: dict[str, Any]) -> None:
    """Append one line in one write, so that lines of several processes do not mix."""
    with log.open("ab", buffering=0) as file:
        file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())


def repair_log(log: Path) -> None:
    """Take out a line that was cut off, so that the next one does not stick to it."""
    if log.exists() and not log.read_bytes().endswith(b"\n"):
        write_text(log, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in read_log(log)))
