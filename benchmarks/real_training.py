"""Trainings of SmolLM2-135M-Instruct: offline methods on HH's pairs, online ones on sums that it solves now and then.

python -m benchmarks.real_training offline --output docs/results
python -m benchmarks.real_training online --output docs/results

Run folders and answers that are finished are used again: after a stop the same command goes on. About a night on two
cores (one run per core: give each its own --method, then once more all of them for the page).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from datetime import date
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tests.real.models import place
from typer import Option

import tokengrain
from tokengrain.data.rows import load_rows
from tokengrain.errors import read_log, write_json, write_text
from tokengrain.evaluation.statistics import mean_interval, mean_of_runs, sample_metrics, wilson
from tokengrain.generate import generate
from tokengrain.rank import rank
from tokengrain.rewards.answers import numbers_in

OFFLINE = ("dpo", "simpo", "tdpo2", "tgdpo", "treg", "rrpo", "sepo", "aligndistil")
ONLINE = ("grpo", "dcpo", "thr", "aepo")
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
        f"`python -m benchmarks.real_training offline --seeds {seeds} --steps {steps} --prompts {prompts}`, "
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


def sums(count: int, seed: int) -> list[dict[str, Any]]:
    """Graded arithmetic: level 1 adds numbers of one digit, each further level is a little harder."""
    rng, rows = random.Random(seed), []
    for i in range(count):
        level = i % 6 + 1
        a, b, c = (rng.randint(2, 5 + 5 * level) for _ in range(3))
        text, answer = {
            1: (f"{a} + {b}", a + b),
            2: (f"{a} + {b} + {c}", a + b + c),
            3: (f"{a + b} - {b} + {c}", a + c),
            4: (f"{a} * {b}", a * b),
            5: (f"{a} * {b} + {c}", a * b + c),
            6: (f"{a} * ({b} + {c})", a * (b + c)),
        }[level]
        prompt = f"What is {text}? End with the number."
        rows.append({"prompt": [{"role": "user", "content": prompt}], "answer": answer, "task": f"level {level}"})
    return rows


def solved(model: str, rows: list[dict[str, Any]], target: Path, tokens: int, seed: int) -> dict[str, Any]:
    """pass@1, pass@8 and maj@8 over prompts, with 95 % intervals, and pass@1 by level."""
    if not target.exists():
        generate(model, rows, target, samples=8, temperature=1.0, max_new_tokens=tokens, seed=seed)
    answers = [[(numbers_in(t) or [None])[-1] for t in row["completions"]] for _, row in load_rows(str(target))]
    correct = torch.tensor([[a == row["answer"] for a in said] for said, row in zip(answers, rows, strict=True)])
    measures = sample_metrics(correct, answers, 8)
    kept = {name: tuple(mean_interval(measures[name])) for name in ("pass@1", "pass@8", "maj@8")}
    levels = sorted({row["task"] for row in rows})
    of = {lv: [i for i, row in enumerate(rows) if row["task"] == lv] for lv in levels}
    return {**kept, "levels": {lv: float(measures["pass@1"][at].mean()) for lv, at in of.items()}}


@app.command()
def online(
    output: Annotated[Path | None, Option(help="folder for real_online.md and .json")] = None,
    runs: Path = Path("runs/real/online"),
    method: Several = None,
    seeds: int = 2,
    updates: int = 100,
    prompts: Annotated[int, Option(help="held-out problems")] = 200,
    tokens: Annotated[int, Option(help="longest completion")] = 64,
) -> None:
    """pass@1, pass@8 and maj@8 before and after training on the levels that the start model solves in 10 to 60 %."""
    torch.set_num_threads(1)
    runs.mkdir(parents=True, exist_ok=True)
    start = str(place("smollm2"))
    probe = solved(start, sums(120, 1), runs / "probe.jsonl", tokens, 0)["levels"]
    fit = [level for level, share in probe.items() if 0.1 <= share <= 0.6] or list(probe)
    held = [row for row in sums(6 * prompts, 2) if row["task"] in fit][:prompts]
    rows = [row for row in sums(6 * 4 * updates, 3) if row["task"] in fit][: 4 * updates]
    found = {"start": [solved(start, held, runs / "start.jsonl", tokens, 0)]}
    for name, seed in product(method or ONLINE, range(seeds)):
        folder = runs / f"{name}-{seed}"
        stage = {"prompts_per_rollout": 4, "num_generations": 8, "minibatches": 1, "max_new_tokens": tokens}
        settings = {f"stages__train__training__{key}": value for key, value in stage.items()}
        settings |= {"training__max_steps": updates, "training__learning_rate": 1e-4, "seed": seed}
        settings["stages__train__rewards"] = [{"name": "numeric", "style": "last"}]
        trained(name, folder, rows, held[:16], **settings)
        log = read_log(folder / "train" / "log.jsonl")
        entry = solved(str(folder), held, runs / f"{name}-{seed}.jsonl", tokens, seed)
        found.setdefault(name, []).append({**entry, "seed": seed, "log": log[-1] if log else {}})
        print(name, seed, entry, flush=True)
    if output is not None:
        write_json(output / "real_online.json", found)
        write_text(output / "real_online.md", online_page(found, probe, updates, tokens))


def online_page(found: dict[str, list[dict[str, Any]]], probe: dict[str, float], updates: int, tokens: int) -> str:
    shares = ", ".join(f"{level} {share:.0%}" for level, share in probe.items())
    text = [
        "# Online methods on a published model",
        "",
        f"`python -m benchmarks.real_training online --updates {updates} --tokens {tokens}`, "
        f"{date.today().isoformat()}. SmolLM2-135M-Instruct with LoRA of rank {LORA['r']} on sums, 4 prompts "
        "of 8 completions an update. The start model solves of the levels: "
        f"{shares}. Trained and reported are those between 10 % and 60 %; intervals are 95 %, over problems.",
        "",
        "| method | seed | pass@1 | pass@8 | maj@8 |",
        "|---|---|---|---|---|",
    ]
    for name, entries in found.items():
        for entry in entries:
            cells = ["{:.3f} ({:.3f} to {:.3f})".format(*entry[key]) for key in ("pass@1", "pass@8", "maj@8")]
            text.append(f"| {name} | {entry.get('seed', '–')} | " + " | ".join(cells) + " |")
    return "\n".join([*text, ""])


if __name__ == "__main__":
    app()
