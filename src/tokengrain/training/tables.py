"""The tables that `tokengrain train` prints: the plan, each stage's outcome, the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tokengrain.recipe import Recipe, ResolvedStage
from tokengrain.training.plan import StagePlan

_ACTIONS = {"run": "run", "resume": "resume", "reuse": "reuse (done, same settings)"}


def describe(stage: ResolvedStage) -> str:
    """One line: what a stage does, to what, with what."""
    if stage.kind == "init":
        tokenizer = stage.model.tokenizer
        kind = getattr(tokenizer, "type", tokenizer) or "bpe"
        return f"{stage.model.describe()}, {kind} tokenizer, from {stage.data.train}"
    settings = {k: v for k, v in (stage.credit or {}).items() if k not in ("name", "templates")}
    if stage.kind == "annotate":
        return f"credit {_named((stage.credit or {}).get('name'), settings)} of {stage.data.train}"
    objective = dict(stage.objective or {})
    name = objective.pop("name", "?")
    if stage.online is not None:
        credit = " ".join(step.get("name", "?") for step in stage.online.credit)
        rewards = " ".join(reward.get("name", "?") for reward in stage.online.rewards)
        lora = ", LoRA" if stage.lora else ""
        named = f", credit {credit}" if credit else ""
        what = f"{_named(name, objective)} from {stage.model.describe()}{lora}, rewards {rewards}{named}"
        return f"{what}, sampler {stage.online.sampler['name']}"
    lora = ", LoRA" if stage.lora else ""
    return f"{_named(name, objective)} from {stage.model.describe()}{lora} on {stage.data.train}"


def _named(name: Any, settings: dict[str, Any]) -> str:
    inside = ", ".join(f"{k} {v}" for k, v in settings.items())
    return f"{name} ({inside})" if inside else str(name)


def print_plan(console: Console, recipe: Recipe, plans: list[StagePlan]) -> None:
    table = Table(title=f"{recipe.method}: {recipe.output_dir}", title_justify="left", box=None, pad_edge=False)
    for column in ("stage", "kind", "what", "plan"):
        table.add_column(column, overflow="fold")
    for plan in plans:
        style = "dim" if plan.action == "reuse" else ""
        table.add_row(plan.stage.name, plan.stage.kind, describe(plan.stage), _ACTIONS[plan.action], style=style)
    console.print(table)


def print_rows(console: Console, stage: ResolvedStage, part: str, dataset: Any) -> None:
    """How many rows were skipped, cut or without a span, if any were."""
    report = getattr(dataset, "report", None)
    if report is not None and report.notable:
        console.print(f"{stage.data.train}, {part} rows for {stage.kind}: {report}", highlight=False)


def print_stage(console: Console, plan: StagePlan, metrics: dict[str, Any]) -> None:
    """What came out of a stage, in one line."""
    parts = [f"{plan.record.seconds:.0f} s"] if plan.record is not None else []
    after = metrics.get("after", {})
    if "accuracy" in after:
        parts.append(f"held-out accuracy {with_interval(after)}")
    elif "reward" in after:
        parts.append(f"held-out reward {with_interval(after, 'reward')}")
    elif "perplexity" in after:
        parts.append(f"held-out perplexity {after['perplexity']:.2f}")
    if "rows" in metrics:
        parts.append(", ".join(f"{count} rows in {name}.parquet" for name, count in metrics["rows"].items()))
    if "vocabulary" in metrics:
        parts.append(f"{metrics['vocabulary']} tokens")
    console.print(f"  done: {'; '.join(parts)}", highlight=False)


def with_interval(metrics: dict[str, Any], name: str = "accuracy") -> str:
    """`0.612 (95 % CI 0.551 to 0.670)`."""
    value = metrics[name]
    if f"{name}_low" not in metrics:
        return f"{value:.3f}"
    return f"{value:.3f} (95 % CI {metrics[f'{name}_low']:.3f} to {metrics[f'{name}_high']:.3f})"


_ROWS = {
    "accuracy": "held-out accuracy",
    "reward": "held-out reward",
    "correct": "held-out share correct",
    "length": "length (tokens)",
    "rewards/margins": "reward margin",
    "perplexity": "perplexity",
    "kl/teacher": "KL to the teacher (nats/token)",
    "kl": "KL to the reference (nats/token)",
    "entropy": "entropy (nats/token)",
    "loss": "loss",
}


def print_result(console: Console, metrics: dict[str, Any], path: Path) -> None:
    """The held-out numbers of every trained stage, before and after, and where the run is."""
    table = Table(
        title=f"{metrics['method']} in {metrics['seconds']:.0f} s",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for column in ("stage", "held-out rows", "before", "after"):
        table.add_column(column)
    for name, stage in metrics["stages"].items():
        before, after = stage.get("before", {}), stage.get("after", {})
        shown = name
        for key, title in _ROWS.items():
            if key in after:
                old = with_interval(before, key) if key in before else ""
                if key == "accuracy" and abs(before.get("rewards/margins", 1.0)) < 1e-4:
                    old = "no margin yet"  # the policy still is its reference
                table.add_row(shown, title, old, with_interval(after, key))
                shown = ""
    if table.row_count:
        console.print(table, highlight=False)
    else:
        console.print("no held-out rows, so nothing was evaluated (data.eval or data.eval_fraction)")
    console.print(f"run folder: {path}", soft_wrap=True, highlight=False)
