"""Single runs of `tokengrain bench credit` as one entry per source: means over seeds with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokengrain.bench.questions import QUESTIONS
from tokengrain.bench.setting import BenchSource
from tokengrain.evaluation.intervals import mean_of_runs

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
