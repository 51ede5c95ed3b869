"""What a report shows, read from a run folder: one run, or a demo (several methods on one world)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokengrain import runs
from tokengrain.credit.manifest import MANIFEST
from tokengrain.errors import ModelError, RunError
from tokengrain.report import rollouts
from tokengrain.report import samples as credit
from tokengrain.report.curves import charts, phase_charts
from tokengrain.report.rows import read_token_rows
from tokengrain.report.svg import Mark, Series

# Numbers of the summary, in order, with their names for people; all others are folded away.
KEY = {
    "accuracy": "pair accuracy (95 % interval)",
    "reward": "reward (95 % interval)",
    "correct": "correct, share of completions (95 % interval)",
    "length": "tokens per completion",
    "truncated": "truncated, share of completions",
    "rewards/margins": "reward margin",
    "kl": "KL to the reference, nats per token",
    "entropy": "entropy, nats per token",
    "perplexity": "perplexity",
    "loss": "loss",
}
WORLD = {
    "reward": "true reward (95 % interval)",
    "kl": "KL to the base, nats per completion",
    "best_reward": "best possible reward at that KL",
    "share": "frontier share",
    "win_rate": "win rate against the base",
    "broken": "share of broken samples",
    "length": "tokens per completion",
    "entropy": "entropy, nats per token",
}
BASE_STYLE = 7  # grey
UNMOVED = 0.01  # nats per completion: a policy this near to the base has no share of the frontier


@dataclass
class Contents:
    """Everything the page needs, as plain values."""

    kind: str
    title: str
    subtitle: str
    facts: list[tuple[str, str]]
    methods: list[dict[str, Any]] = field(default_factory=list)
    frontier: list[tuple[float, float]] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    world: list[dict[str, Any]] = field(default_factory=list)
    charts: list[tuple[str, str]] = field(default_factory=list)
    phases: list[tuple[str, str, list[Series]]] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    rollouts: list[tuple[str, list[rollouts.Recorded]]] = field(default_factory=list)
    samples: list[credit.CreditSample] = field(default_factory=list)
    stored_in: str = ""
    settings: str = ""
    versions: dict[str, Any] = field(default_factory=dict)


def read_contents(run_dir: str | Path) -> Contents:
    """Read a finished run or demo.

    Raises:
        RunError: not a run folder, or a run that is not finished (says what is there and how to resume).
        RunError: a damaged file of the run, of `rollouts.jsonl` with the line.
        DataError: a damaged `credit_samples.json`.
    """
    path = Path(run_dir)
    top = path / "metrics.json"
    if top.is_file():
        metrics = runs.read_object(top)
        if metrics.get("kind") == "demo":
            return _demo(path, metrics)
    run = runs.read_run(path)
    if run.status != "done":
        raise RunError(runs.unfinished_message(run))
    return _single(run)


# ------------------------------------------------------------------------------------------------------- demo


def _demo(path: Path, metrics: Mapping[str, Any]) -> Contents:
    methods = [dict(m) for m in metrics.get("methods", [])]
    if not methods:
        raise RunError(f"{path / 'metrics.json'} has no methods: the demo did not finish; run it again")
    styles = _styles([str(m["name"]) for m in methods])
    for m in methods:
        m["style"] = styles[m["name"]]
        if (m.get("kl") or 0.0) < UNMOVED:
            m["frontier_share"] = None
    frontier = metrics.get("frontier") or []
    if isinstance(frontier, Mapping):
        frontier = list(zip(frontier["kl"], frontier["reward"], strict=True))
    marks = [
        Mark(
            m["name"],
            m.get("kl") or 0.0,
            m["true_reward"],
            m.get("kl_se"),
            m.get("true_reward_se"),
            m["style"],
        )
        for m in methods
        if m.get("true_reward") is not None
    ]
    logs: list[tuple[str, int, list[dict[str, Any]]]] = []
    for folder in sorted(p for p in path.iterdir() if p.is_dir() and runs.is_run(p)):
        run = runs.read_run(folder)
        trained = [s for s in run.stages if s.kind == "train" and s.log()]
        name = next((m["name"] for m in methods if _slug(m["name"]) == _slug(folder.name)), folder.name)
        if trained:
            logs.append((name, styles.get(name, len(logs)), trained[-1].log()))
    logs.sort(key=lambda item: item[1])
    facts = [
        ("date", metrics.get("date")),
        ("command", metrics.get("command")),
        ("seed", metrics.get("seed")),
    ]
    facts += [("machine", metrics.get("machine")), ("world", metrics.get("world"))]
    return Contents(
        kind="demo",
        title="Which tokens earned the reward?",
        subtitle="Preference methods on a world whose optimum is known exactly.",
        facts=_texts(facts),
        methods=methods,
        frontier=[(float(x), float(y)) for x, y in frontier],
        marks=marks,
        charts=charts(logs),
        series=[Series(name, [], style) for name, style, _ in logs],
        samples=credit.read_credit_samples(path / credit.FILE),
        versions=dict(metrics.get("versions") or {}),
    )


def _styles(names: Sequence[str]) -> dict[str, int]:
    """Style of each method: grey for the base, then the palette in order."""
    styles: dict[str, int] = {}
    for name in names:
        styles[name] = BASE_STYLE if _slug(name) == "base" else sum(s != BASE_STYLE for s in styles.values()) % 7
    return styles


def _slug(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


# ---------------------------------------------------------------------------------------------------- one run


def _single(run: runs.Run) -> Contents:
    import yaml

    info, top = run.info, run.metrics
    facts = [("method", run.method), ("date", _date(info.get("finished"))), ("command", info.get("command"))]
    facts += [(name, top.get(name)) for name in ("model", "data", "seed")]
    logs = [(s.name, i, s.log()) for i, s in enumerate(s for s in run.stages if s.log())]
    samples = credit.read_credit_samples(run.path / credit.FILE)
    if not samples and run.credit_stages:
        with suppress(ModelError):  # no tokenizer: the page says so
            samples = read_token_rows(run.path, count=8)
    return Contents(
        kind="run",
        title=_method_title(run.method),
        subtitle=f"Run folder {run.path.name}: {len(run.stages)} stage{'s' * (len(run.stages) != 1)}.",
        facts=_texts(facts),
        stages=[_stage(s) for s in run.stages],
        world=_world(run.path / "evaluation.json"),
        charts=charts(logs),
        phases=phase_charts(logs),
        series=[Series(name, [], style) for name, style, _ in logs],
        rollouts=[
            (s.name, rollouts.read_rollouts(s.path / rollouts.ROLLOUT_FILE)) for s in run.stages if s.kind == "online"
        ],
        samples=samples,
        stored_in=", ".join(s.name for s in run.credit_stages),
        settings=yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True) if run.recipe else "",
        versions=dict(info.get("versions") or {}),
    )


def _method_title(name: str) -> str:
    from tokengrain.methods import METHODS

    return METHODS[name].title if name in METHODS else name


def _stage(stage: runs.StageRecord) -> dict[str, Any]:
    """A stage's part of the summary: its name, kind, seconds and held-out numbers before and after."""
    metrics = stage.metrics
    before, after = metrics.get("before") or {}, metrics.get("after") or {}
    if before.get("rewards/margins") == 0:  # the policy still is its reference: no margin, so no accuracy
        before = {k: v for k, v in before.items() if k not in ("accuracy", "rewards/accuracies")}
    return {
        "name": stage.name,
        "kind": stage.kind,
        "seconds": stage.seconds,
        "note": _note(stage),
        **_compared(before, after, KEY),
    }


def _note(stage: runs.StageRecord) -> str:
    """What a stage without held-out numbers made."""
    if stage.kind == "init":
        return "A new model, not trained yet."
    manifest = stage.path / MANIFEST
    if stage.kind != "annotate" or not manifest.is_file():
        return "No held-out numbers were measured in this stage."
    files = runs.read_object(manifest).get("files", {})
    return "Token rewards of " + ", ".join(f"{f['rows']} rows in {name}" for name, f in sorted(files.items()))


def _world(path: Path) -> list[dict[str, Any]]:
    """What `tokengrain evaluate` measured in a world: the base and the trained model."""
    found = runs.read_object(path) if path.is_file() else {}
    return _compared(found.get("world_base") or {}, found.get("world") or {}, WORLD)["rows"]


def _compared(
    before: Mapping[str, Any], after: Mapping[str, Any], titles: Mapping[str, str]
) -> dict[str, list[dict[str, Any]]]:
    """Rows of a table of numbers before and after: `rows` those with a title, `more` the others."""
    names = [n for n in {**after, **before} if is_shown(n, {**before, **after}[n])]
    known = [n for n in titles if n in names]
    others = [n for n in names if n not in titles and not (n == "rewards/accuracies" and "accuracy" in names)]
    made = {
        n: {
            "name": titles.get(n, pretty(n)),
            "before": with_interval(before, n),
            "after": with_interval(after, n),
        }
        for n in names
    }
    return {"rows": [made[n] for n in known], "more": [made[n] for n in others]}


def is_shown(name: str, value: Any) -> bool:
    """Whether a metric is a number of its own (not an end of another's interval, not bookkeeping)."""
    plain = name.removeprefix("eval_")
    if plain.endswith(("_low", "_high", "_se", "_per_second")) or plain in ("epoch", "step", "runtime"):
        return False
    return isinstance(value, int | float) and not isinstance(value, bool)


def with_interval(metrics: Mapping[str, Any], name: str) -> tuple[float, float | None, float | None] | None:
    """(value, low, high) of a metric; low and high are None where no interval was measured."""
    value = metrics.get(name)
    if not isinstance(value, int | float):
        return None
    return float(value), metrics.get(f"{name}_low"), metrics.get(f"{name}_high")


def pretty(name: str) -> str:
    """A metric's name for people: "eval_rewards/accuracies" becomes "rewards: accuracies"."""
    return name.removeprefix("eval_").replace("/", ": ").replace("_", " ")


def _date(time: str | None) -> str | None:
    """ "2025-01-31T12:00:00+00:00" as "2025-01-31 12:00 UTC"."""
    return time and time[:16].replace("T", " ") + (" UTC" if time.endswith("+00:00") else "")


def _texts(facts: Sequence[tuple[str, Any]]) -> list[tuple[str, str]]:
    return [(name, str(value)) for name, value in facts if value is not None]
