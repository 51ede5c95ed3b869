"""Fill the tables of docs/speed.md, engines.md, vision.md and results/demo.md, and the README's picture.

python -m benchmarks.doc_tables --demo runs/demo
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.picture import write_picture
from benchmarks.real_step import real_table
from benchmarks.rollout_ahead import rows_of, shown
from tokengrain.errors import read_json, write_text

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("speed.md", "results/demo.md", "engines.md", "vision.md")
SPEED, DEMO, ENGINES, VISION = (ROOT / "docs" / name for name in PAGES)
PICTURE_SOURCES = ["DPO: policy", "T-REG: contrastive prompting", "T-REG: policy"]


def demo_table(metrics: dict[str, Any]) -> str:
    """The demo's methods as a Markdown table, with command, machine and date."""
    lines = [
        "| | true reward | KL, nats | frontier share | wins vs base (95 % CI) | credit ρ / AUC |",
        "|---|---|---|---|---|---|",
    ]
    for r in metrics["methods"]:
        credit = "–" if r["credit_spearman"] is None else f"{r['credit_spearman']:.2f} / {r['credit_auc']:.2f}"
        share = f"{100 * r['frontier_share']:.0f} %" if r["kl"] > 0.01 else "–"
        wins, low, high = (100 * r[key] for key in ("win_rate", "win_rate_low", "win_rate_high"))
        lines.append(
            f"| {r['name']} | {r['true_reward']:.2f} ± {1.96 * r['true_reward_se']:.2f} | {r['kl']:.2f} | {share} "
            f"| {wins:.0f} % ({low:.0f}–{high:.0f}) | {credit} |"
        )
    made = "Written by `python -m benchmarks.doc_tables --demo runs/demo` from the numbers of "
    made += f"`make demo`, {metrics['date']}, {metrics['machine']}, torch {metrics['versions']['torch']}."
    return "\n".join([*lines, "", f"{made} One seed; over five seeds: [the world `stories`](stories.md)."])


def speed_table(report: dict[str, Any]) -> str:
    """The benchmark's ratios as a Markdown table, with command, machine and date."""
    lines = ["| setting | against | ours is × as fast (smallest–largest) |", "|---|---|---|"]
    for result in report["speed"]:
        for peer, ratio in result["faster_than"].items():
            lines.append(
                f"| {result['setting']} | {peer} | {ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f}) |"
            )
    for row in report["memory"]:
        lines.append(f"| memory: {row['setting']} | plain transformers | {row['share']:.2f} of its peak |")
    return "\n".join([*lines, "", f"{when(report['machine'])} [All numbers](results/preference_step_cpu.md)."])


def when(m: dict[str, Any]) -> str:
    """Command, date and machine of a benchmark."""
    return f"`{m['command']}`, {m['date']}, {m['gpu'] or m['cpu']}, {m['cores']} cores, torch {m['torch']}."


def online_table(report: dict[str, Any]) -> str:
    """The ratios of the online benchmark as a Markdown table, with command, machine and date."""
    lines = ["| phase | setting | against | ours is × as fast (smallest–largest) |", "|---|---|---|---|"]
    for phase in ("update", "rollout"):
        for result in report[phase]:
            found = result["faster_than"]
            for peer, ratio in found.items() if phase == "update" else [(result["sides"][1]["name"], found)]:
                spread = f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})"
                lines.append(f"| {phase} | {result['setting']} | {peer} | {spread} |")
    return "\n".join([*lines, "", f"{when(report['machine'])} [All numbers](results/online_step_cpu.md)."])


def ahead_table(report: dict[str, Any]) -> str:
    """One rollout ahead of a server against taking turns, with command, machine and date."""
    rows = [f"| {name} | {' | '.join(shown(found))} |" for name, found in rows_of(report["runs"]["server"]).items()]
    end = f"{when(report['machine'])} Nothing else ran. [All numbers](results/rollout_ahead_cpu.json)."
    return "\n".join(["| | turns | ahead | difference (95 %) |", "|---|---|---|---|", *rows, "", end])


def vision_table(trained: dict[str, Any], frozen: dict[str, Any]) -> str:
    """A step with images against the plain one, with commands, machine and date."""
    head = "| vision tower | ours, CPU s | plain, CPU s | ours is × as fast in CPU s | in seconds (smallest–largest) |"
    lines = [head, "|---|---|---|---|---|"]
    for tower, report in (("trained", trained), ("frozen in both", frozen)):
        ours, plain = report["cpu_seconds"].values()
        ratios = (f"{r['median']:.2f} ({r['min']:.2f}–{r['max']:.2f})" for r in reversed(report["faster"].values()))
        lines.append(f"| {tower} | {ours:.2f} | {plain:.2f} | {' | '.join(ratios)} |")
    return "\n".join([*lines, "", f"{when(trained)} The same with `--freeze`: {frozen['date']}."])


def fill(page: Path, name: str, table: str) -> None:
    """Replace what stands between the markers `<!-- name -->` and `<!-- /name -->` of a page."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    text = page.read_text(encoding="utf-8")
    filled, found = re.subn(pattern, lambda m: f"{m[1]}{table}\n{m[2]}", text, flags=re.DOTALL)
    if not found:
        raise SystemExit(f"{page} has no markers for {name}")
    write_text(page, filled)


def benchmark_tables() -> list[tuple[Path, str, str]]:
    """Page, marker and table of every committed benchmark."""
    results = ROOT / "docs/results"
    return [
        (SPEED, "speed-table", speed_table(read_json(results / "preference_step_cpu.json"))),
        (SPEED, "online-table", online_table(read_json(results / "online_step_cpu.json"))),
        (
            VISION,
            "speed-table",
            vision_table(*(read_json(results / f"vision_step{of}_cpu.json") for of in ("", "_frozen"))),
        ),
        (SPEED, "real-table", real_table(read_json(results / "real_step_cpu.json"))),
        (ENGINES, "ahead-table", ahead_table(read_json(results / "rollout_ahead_cpu.json"))),
    ]


def main(demo: Annotated[Path, typer.Option(help="folder of a finished demo")] = Path("runs/demo")) -> None:
    """Fill the tables from the benchmarks in docs/results and from a demo, and write the picture."""
    for page, name, table in benchmark_tables():
        fill(page, name, table)
    fill(DEMO, "demo-table", demo_table(read_json(demo / "metrics.json")))
    write_picture(demo, "docs/images/demo.svg", sources=PICTURE_SOURCES)


if __name__ == "__main__":
    typer.run(main)
