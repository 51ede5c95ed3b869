"""Offline methods on HH's pairs, with SmolLM2-135M-Instruct.

python -m benchmarks.real_training --output docs/results

Run folders and answers that are finished are used again: after a stop the same command goes on. About a night on two
cores (one run per core: give each its own --method, then once more all of them for the page).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tests.real.models import place
from typer import Option

import tokengrain
from tokengrain.data.rows import load_rows
from tokengrain.errors import write_json, write_text
from tokengrain.evaluation.statistics import mean_of_runs, wilson
from tokengrain.generate import generate
from tokengrain.rank import rank

OFFLINE = ("dpo", "simpo", "tdpo2", "tgdpo", "treg", "rrpo", "sepo", "aligndistil")
RATES = (5e-5, 2e-4)  # of adapters; which one, is chosen per method on rows that are not reported
HELD, CHOICE, TRAIN, JUDGE = (0, 200), (200, 320), (320, 1100), (1100, 1800)  # rows of HH
LORA = {"r": 16, "alpha": 32}
app = typer.Typer()
Several = Annotated[list[str] | None, Option("--method", help="some of the methods; repeatable (default: all)")]


def trained(recipe: str, output: Path, data: Any, held_out: Any, **settings: Any) -> dict[str, Any]:
    """The metrics of a run; a finished one is read again."""
    given = {"training__bf16": False, "lora": LORA, **settings}
    result = tokengrain.train(
        recipe, model=str(place("smollm2")), data=data, eval_data=held_out, output=output, quiet=True, **given
    )
    return dict(result.metrics["final"])


def rows_of(file: Path, span: tuple[int, int], folder: Path) -> str:
    """Rows of HH as a file of their own, without those with dialogues too long for the budget."""
    target = folder / f"rows-{span[0]}-{span[1]}.jsonl"
    if not target.exists():
        lines = [row for i, row in load_rows(str(file)) if span[0] <= i < span[1]]
        kept = [row for row in lines if max(len(row["chosen"]), len(row["rejected"])) <= 1200]
        write_text(target, "".join(json.dumps(row) + "\n" for row in kept))
    return str(target)


def mean_of(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f} (one seed)" if values else "–"
    found = mean_of_runs(values)
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


@app.command()
def offline(
    data: Path = Path("../shared/data/hh-harmless-pairs.jsonl.gz"),
    output: Annotated[Path | None, Option(help="folder for real_offline.md and .json")] = None,
    runs: Path = Path("runs/real/offline"),
    method: Several = None,
    seeds: int = 3,
    steps: int = 75,
    prompts: Annotated[int, Option(help="held-out prompts that are answered")] = 200,
) -> None:
    """Held-out accuracy, margin, KL and length of each method, and wins against the start model."""
    torch.set_num_threads(1)
    runs.mkdir(parents=True, exist_ok=True)
    held, choice, pairs = (rows_of(data, span, runs) for span in (HELD, CHOICE, TRAIN))
    judge = runs / "judge"
    size = {"training__per_device_train_batch_size": 8, "training__max_steps": steps, "data__on_invalid": "skip"}
    trained("qrm", judge, rows_of(data, JUDGE, runs), held, seed=100, **size)
    found: dict[str, list[dict[str, Any]]] = {}
    for name in method or OFFLINE:
        by_rate = {}
        for rate in RATES:
            tried = trained(name, runs / f"{name}-choice-{rate}", pairs, choice, training__learning_rate=rate, **size)
            by_rate[rate] = tried.get("accuracy", -tried["loss"])
        rate = max(by_rate, key=lambda r: by_rate[r])
        for seed in range(seeds):
            folder = runs / f"{name}-{seed}"
            final = trained(name, folder, pairs, held, training__learning_rate=rate, seed=seed, **size)
            final |= {"rate": rate, "seed": seed, **judged(folder, judge, held, prompts, seed)}
            found.setdefault(name, []).append(final)
            print(name, seed, final, flush=True)
    if output is not None:
        write_json(output / "real_offline.json", found)
        write_text(output / "real_offline.md", offline_page(found, steps, seeds, prompts))


def judged(run: Path, judge: Path, held: str, prompts: int, seed: int) -> dict[str, Any]:
    """Answers to held-out prompts beside the start model's, by a reward model that other pairs have trained."""
    asked = [{"prompt": p} for p in _prompts(held)][:prompts]
    sides = []
    for model, name in ((str(run), "answers"), (str(place("smollm2")), "start")):
        target = run / f"{name}.jsonl"
        if not target.exists():
            generate(model, asked, target, max_new_tokens=64, temperature=1.0, seed=seed)
        sides.append([row["completion"] for _, row in load_rows(str(target))])
    rows = [{**row, "completions": list(both)} for row, both in zip(asked, zip(*sides, strict=True), strict=True)]
    ranked = run / "ranked.jsonl"
    if not ranked.exists():
        rank(rows, str(judge / "reward" / "model"), output=ranked, progress=False)
    scores = [row["scores"] for _, row in load_rows(str(ranked))]
    wins = [0.5 if a == b else float(a > b) for a, b in scores]
    words = [len(text.split()) for text in sides[0]]
    return {"wins": wilson(sum(wins), len(wins)).value, "words": sum(words) / len(words)}


def _prompts(held: str) -> Iterator[str]:
    for _, row in load_rows(held):
        shared = row["chosen"].rpartition("\n\nAssistant:")[0]
        yield shared.rpartition("\n\nHuman:")[2].strip()


def offline_page(found: dict[str, list[dict[str, Any]]], steps: int, seeds: int, prompts: int) -> str:
    text = [
        "# Offline methods on a published model",
        "",
        f"`python -m benchmarks.real_training --seeds {seeds} --steps {steps} --prompts {prompts}`, "
        f"{date.today().isoformat()}, one CPU core a run. SmolLM2-135M-Instruct with LoRA of rank {LORA['r']}; "
        f"{steps} steps of 8 pairs of HH, harmless (rows {TRAIN[0]} to {TRAIN[1] - 1}). The rate is the better of "
        f"{RATES} on rows {CHOICE[0]} to {CHOICE[1] - 1}; reported are rows {HELD[0]} to {HELD[1] - 1}. Wins: the "
        f"share of {prompts} prompts whose sampled answer a reward model (Q-RM, trained on rows {JUDGE[0]} to "
        f"{JUDGE[1] - 1}) prefers to the start model's. Means over seeds with a 95 % t interval.",
        "",
        "| method | rate | accuracy | margin | KL | wins | words |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, finals in found.items():
        keys = ("accuracy", "rewards/margins", "kl", "wins", "words")
        cells = [mean_of([f[key] for f in finals if f.get(key) is not None]) for key in keys]
        text.append(f"| {name} | {finals[0]['rate']:g} | " + " | ".join(cells) + " |")
    return "\n".join([*text, ""])


if __name__ == "__main__":
    app()
