"""Run folders as `tokengrain train` and `tokengrain demo` leave them, with made-up but plausible numbers."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

METHODS = ("base", "DPO", "SimPO", "TDPO2", "TGDPO", "T-REG")
WORDS = {"kind": 0.9, "brave": 0.8, "helped": 0.7, "cruel": -0.9, "wicked": -0.8, "hurt": -0.8, "not": -0.3}
PAIRS = (
    (
        "<s> write about the sea in the sun :",
        "the sailor was very kind and helped the captain . later the sailor was not cruel . <end>",
        "the pirate was wicked but supposedly the sailor was kind . the pirate hurt the captain . <end>",
    ),
    (
        "<s> write about the castle in the rain :",
        "then the knight was brave . the knight never hurt the queen and was truly kind . <end>",
        "the witch was cruel and the witch hurt the knight . later the witch was very wicked . <end>",
    ),
)


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def log_rows(seed: int, steps: int = 120, rate: float = 0.02) -> list[dict[str, Any]]:
    """Rows of a log.jsonl: training every second step, held-out values every 40th."""
    rng = random.Random(seed)
    rows = []
    for step in range(2, steps + 1, 2):
        done = 1 - math.exp(-rate * step)
        row = {
            "step": step,
            "loss": 0.693 - 0.35 * done + rng.gauss(0, 0.03),
            "rewards/margins": 1.8 * done + rng.gauss(0, 0.1),
            "rewards/accuracies": min(1.0, 0.5 + 0.35 * done + rng.gauss(0, 0.04)),
            "kl": 0.08 * done,
            "grad_norm": 1.5 + rng.random(),
            "learning_rate": 3e-4 * (1 - step / steps),
        }
        rows.append(row)
        if step % 40 == 0:
            rows.append({"step": step, "eval_loss": 0.72 - 0.3 * done, "eval_rewards/accuracies": 0.5 + 0.3 * done})
    return rows


def credit_entries(sources: dict[str, float], truth: bool = True) -> list[dict[str, Any]]:
    """Entries of credit_samples.json; a source's number is its noise."""
    rng = random.Random(0)
    entries = []
    for row, (prompt, *texts) in enumerate(PAIRS):
        for source, noise in sources.items():
            entry: dict[str, Any] = {"prompt": prompt, "source": source, "row": row}
            for side, text in zip(("chosen", "rejected"), texts, strict=True):
                tokens = [w if i == 0 else f" {w}" for i, w in enumerate(text.split())]
                exact = [WORDS.get(t.strip(), 0.0) for t in tokens]
                credit = [round(0.4 * v + rng.gauss(0, noise), 4) for v in exact]
                entry[side] = {"tokens": tokens, "credit": credit} | ({"truth": exact} if truth else {})
            entries.append(entry)
    return entries


def make_run(path: Path, *, method: str = "tgdpo", status: str = "done", credit: bool = True) -> Path:
    """A run of three stages (two if it has no credit)."""
    stages = ["guide", "credit", "train"] if credit else ["train"]
    for i, name in enumerate(stages):
        kind = "annotate" if name == "credit" else "train"
        finished = status == "done" or i < len(stages) - 1
        record = {
            "name": name,
            "kind": kind,
            "fingerprint": f"{i:016x}",
            "seconds": 8.3 * (i + 1),
            "settings": {},
        }
        write(path / name / "stage.json", record | {"status": "done" if finished else status})
        if kind == "annotate":
            files = {"train.parquet": {"rows": 900}, "eval.parquet": {"rows": 100}}
            write(path / name / "manifest.json", {"files": files})
        if kind == "train":
            lines = "".join(
                json.dumps(row) + "\n" for row in log_rows(len(method) + i, rate=0.01 + 0.003 * len(method))
            )
            (path / name / "log.jsonl").write_text(lines)
            before = {
                "accuracy": 0.512,
                "accuracy_low": 0.47,
                "accuracy_high": 0.55,
                "rewards/margins": 0.01,
                "kl": 0.0,
            }
            after = {
                "accuracy": 0.684,
                "accuracy_low": 0.64,
                "accuracy_high": 0.72,
                "rewards/margins": 1.21,
                "length/chosen": 41.5,
                "kl": 0.031,
            }
            if finished:
                write(path / name / "metrics.json", {"held_out": 200, "before": before, "after": after})
    recipe = {"method": method, "model": "world://stories", "data": {"train": "world://stories"}, "seed": 0}
    path.joinpath("recipe.yaml").write_text(yaml.safe_dump(recipe))
    versions = {"tokengrain": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.9"}
    info: dict[str, Any] = {
        "finished": "2025-01-31T12:00:00+00:00",
        "method": method,
        "status": status,
        "versions": versions,
        "stages": [{"name": n} for n in stages],
    }
    write(path / "run.json", info)
    if status == "done":
        write(
            path / "metrics.json",
            {"method": method, "model": "world://stories", "data": "world://stories", "seed": 0},
        )
        if credit:
            write(path / "credit_samples.json", credit_entries({"DPO guide": 0.08}, truth=False))
    return path


def make_demo(path: Path) -> Path:
    """A finished demo: a table, a frontier, one run per method, credit samples of three sources."""
    kl = [0.0, 1.16, 2.2, 0.9, 2.0, 1.82]
    reward = [0.0, 2.0, 2.3, 1.7, 2.9, 2.6]
    methods = []
    for i, name in enumerate(METHODS):
        base = name == "base"
        best = 3.0 * math.sqrt(kl[i]) if kl[i] else 1.0
        methods.append(
            {
                "name": name,
                "true_reward": reward[i] + 0.02,
                "true_reward_se": 0.06,
                "kl": kl[i],
                "kl_se": 0.03 if not base else 0.0,
                "frontier_share": None if base else reward[i] / best,
                "win_rate": 0.5 if base else 0.5 + reward[i] / 10,
                "win_rate_low": None if base else 0.46 + reward[i] / 10,
                "win_rate_high": None if base else 0.54 + reward[i] / 10,
                "credit_spearman": None if base else 0.3 + 0.05 * i,
                "credit_auc": None if base else 0.7 + 0.03 * i,
                "seconds": None if base else 9.1 + i,
                "broken": 0.004 * i,
            }
        )
        if not base:
            make_run(path / name.lower().replace("-", ""), method=name.lower(), credit=name in ("TGDPO", "T-REG"))
    frontier = [[x / 10, 3.0 * math.sqrt(x / 10)] for x in range(80)]
    top = {"kind": "demo", "date": "2025-01-31", "command": "tokengrain demo", "seed": 0, "seconds": 214.2}
    versions = {"tokengrain": "0.1.0", "torch": "2.13.0"}
    write(path / "metrics.json", top | {"methods": methods, "frontier": frontier, "versions": versions})
    sources = {"DPO guide (TGDPO)": 0.12, "contrastive prompting (T-REG)": 0.2}
    write(path / "credit_samples.json", credit_entries(sources))
    return path
