"""Findings as a table in the terminal, as JSON and as a page in Markdown."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from experiments.claims.framework import Finding, Group
from experiments.claims.runner import find_groups, judge_all, run_claims
from tokengrain.errors import write_json, write_text

Results = Sequence[Mapping[str, Any]]

INTRODUCTION = """\
Every claim compares arms that share their seed: data, starting models and random numbers. The value is the mean over
seeds of the difference (or ratio) within a seed, with a 95 % t interval. *Seen* means that what the column "expected"
says holds for the interval, for every seed or for the mean, as it says there; "same" means only that the interval
contains no effect, however small one may be. *Robust* claims are asserted in the tests marked slow; the others are
reported and never asserted. The experiments are tiny: *not seen* is a statement about this scale and nothing else."""


def number(value: float | None) -> str:
    """Three digits that matter, without an exponent for everyday sizes."""
    if value is None:
        return "–"
    if 0 < abs(value) < 0.01:
        return f"{value:.2g}"  # shares of clipped tokens are this small
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _interval(finding: Finding) -> str:
    if finding.value is None:
        return "–"
    sign = "+" if finding.claim.form == "difference" and finding.claim.second is not None else ""
    value, low, high = (f"{x:{sign}.1f}" if abs(finding.value.value) >= 10 else f"{x:{sign}.3f}" for x in finding.value)
    ratio = "× " if finding.claim.form == "ratio" else ""
    return f"{ratio}{value} ({low} to {high})"


def _arms(finding: Finding) -> str:
    if finding.claim.second is None:
        return f"{finding.claim.first}: {number(finding.first)}"
    return f"{finding.claim.first}: {number(finding.first)}; {finding.claim.second}: {number(finding.second)}"


def findings_table(findings: Sequence[Finding]) -> Table:
    """All findings as one table for the terminal, a section per group."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("claim", "measured", "95 % interval", "higher", "verdict"):
        table.add_column(column, overflow="fold", no_wrap=column == "higher")
    styles = {"seen": "green", "not seen": "yellow", "too few seeds": "dim"}
    group = None
    for f in findings:
        if f.group != group:
            table.add_section()
            table.add_row(f"[bold]{f.group}[/]")
            group = f.group
        verdict = f"[{styles[f.verdict]}]{f.verdict}[/]"
        means = number(f.first) if f.second is None else f"{number(f.first)}, {number(f.second)}"
        table.add_row(f.claim.says, f"{f.claim.measure} {means}", _interval(f), f"{f.higher}/{f.seeds}", verdict)
    return table


def claims_markdown(findings: Sequence[Finding]) -> list[str]:
    """The findings of a group as lines of a Markdown table."""
    lines = [
        "| claim | source says | measured | value (95 % interval) | higher in | expected | robust | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for f in findings:
        source = "; ".join(part for part in (f.claim.reported, f.claim.source) if part)
        lines.append(
            f"| {f.claim.says} | {source} | {f.claim.measure}: {_arms(f)} | {_interval(f)} | {f.higher}/{f.seeds} "
            f"| {f.claim.wording} | {'yes' if f.claim.robust else 'no'} | {f.verdict} |"
        )
    return lines


def runs_markdown(group: Group, results: Results) -> list[str]:
    """Seed means of all measures of every arm, with their standard deviation; the first measure also by seed."""
    lines = [
        "| run | " + " | ".join(group.columns.values()) + " | seconds |",
        "|" + "---|" * (len(group.columns) + 2),
    ]
    for arm in group.arms:
        mine = sorted((r for r in results if r["arm"] == arm.name), key=lambda r: r["seed"])
        if not mine:
            continue
        by_measure = [[r["measures"].get(key) for r in mine] for key in group.columns]
        cells = [_spread(values) for values in by_measure]
        if any(v is not None for v in by_measure[0]):
            cells[0] += f" ({' '.join(number(v) for v in by_measure[0])})"
        seconds = fmean(r["seconds"] for r in mine)
        lines.append(f"| {arm.name} | {' | '.join(cells)} | {seconds:.0f} |")
    return lines


def _spread(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    return number(fmean(known)) + (f" ± {number(stdev(known))}" if len(known) > 1 else "")


def page(groups: Sequence[Group], results: Results, findings: Sequence[Finding], how: Mapping[str, Any]) -> str:
    """The page of results.

    Args:
        how: `command`, `date`, `machine`, `seeds`, `quick`.
    """
    lines = ["# Claims", "", f"`{how['command']}` on {how['date']}, {how['machine']}, one thread per run."]
    if how["quick"]:
        lines += ["", "**Quick sizes: this page says that the machinery works and nothing about the methods.**"]
    seen = sum(f.verdict == "seen" for f in findings)
    lines += ["", INTRODUCTION, "", f"{seen} of {len(findings)} claims were seen over {how['seeds']} seeds."]
    for group in groups:
        own = [f for f in findings if f.group == group.name]
        mine = [r for r in results if r["group"] == group.name]
        if not mine:
            continue
        lines += ["", f"## {group.title}", "", group.setting, "", *claims_markdown(own)]
        lines += ["", "Mean ± standard deviation over seeds; the first measure also by seed:", ""]
        lines += runs_markdown(group, mine)
        for remark in group.remarks(mine):
            lines += ["", remark]
    return "\n".join([*lines, ""])


def claims_command(
    methods: Sequence[str] | None,
    names: Sequence[str] | None,
    seeds: int,
    jobs: int,
    folder: Path,
    *,
    quick: bool = False,
    as_json: bool = False,
) -> dict[str, Any]:
    """Run, judge, print and write `claims.md` and `claims.json` into `folder`; what is in the JSON is returned.

    Args:
        methods, names: of methods and groups (None: all).
        seeds: how many.
    """
    groups = find_groups(names, methods)
    progress = Console(stderr=True, quiet=as_json)
    results = run_claims(groups, range(seeds), folder, methods=methods, jobs=jobs, quick=quick, console=progress)
    findings = judge_all(groups, results, methods)
    how: dict[str, Any] = {
        "command": " ".join(["python -m experiments.claims", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seeds": seeds,
        "quick": quick,
    }
    document = {**how, "claims": [finding.as_dict() for finding in findings], "runs": results}
    write_text(folder / "claims.md", page(groups, results, findings, how))
    write_json(folder / "claims.json", document)
    if as_json:
        print(json.dumps(document, indent=2, ensure_ascii=False))
        return document
    console = Console()
    console.print(findings_table(findings), highlight=False)
    seen = sum(finding.verdict == "seen" for finding in findings)
    where = f"{seen} of {len(findings)} claims seen. Page: {folder / 'claims.md'}"
    console.print(where, soft_wrap=True, highlight=False)
    if quick:
        console.print("Quick sizes: the verdicts say nothing about the methods.")
    return document
