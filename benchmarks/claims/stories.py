"""Which findings about token credit hold on the world `stories`, over several seeds, paired by seed.

    python -m benchmarks.claims.stories --output docs/results [--seeds 5] [--jobs 2]

Every run trains with `PreferenceTrainer` on pairs of its own seed and is measured against the exact optimum.
Finished runs are kept in `runs/claims/stories.jsonl`; calling it again continues where it stopped.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from tokengrain.evaluation import paired_difference
from tokengrain.files import write_json, write_text

WORLD = "world://stories?regime={regime}&seed={seed}"
STEPS, PAIRS = 120, 32


@dataclass(frozen=True)
class Arm:
    """One training setting. `credit` names where token rewards come from."""

    name: str
    objective: str
    hyper: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 2e-4
    credit: str | None = None


def arms() -> list[Arm]:
    dpo = [Arm(f"DPO β {b:g}", "dpo", {"beta": b}) for b in (0.1, 0.3, 1.0)]
    tdpo = [Arm(f"TDPO2 β 0.1 α {a:g}", "tdpo2", {"beta": 0.1, "alpha": a}) for a in (0.1, 0.25, 0.5)]
    treg = [Arm(f"T-REG β 0.3 α {a:g}", "treg", {"beta": 0.3, "alpha": a}, credit="contrastive") for a in (0.25, 0.5)]
    half = {"beta": 0.3, "alpha": 0.5}
    treg += [Arm(f"T-REG β 0.3 α 0.5, {c}", "treg", half, credit=c) for c in ("swapped", "random", "exact")]
    tgdpo = [
        Arm("TGDPO β 0.3 α 0.5", "tgdpo", half, 1e-4, "guide"),
        Arm("TGDPO β 1 α 0.5", "tgdpo", {"beta": 1.0, "alpha": 0.5}, 2e-4, "guide"),
        Arm("DPO β 0.3, half step", "dpo", {"beta": 0.3}, 1e-4),
    ]
    tgdpo += [Arm(f"TGDPO β 0.3 α 0.5, {c}", "tgdpo", half, 1e-4, c) for c in ("random", "flipped", "exact")]
    simpo = [Arm("SimPO β 10 γ 3", "simpo", {"beta": 10.0, "gamma": 3.0})]
    return dpo + tdpo + treg + tgdpo + simpo


# (claim, better arm, worse arm, which measure, what the spec expects)
CLAIMS = [
    ("Exact credit beats none (T-REG)", "T-REG β 0.3 α 0.5, exact", "DPO β 0.3", "reward", "more"),
    ("Exact credit beats none (TGDPO)", "TGDPO β 0.3 α 0.5, exact", "DPO β 0.3, half step", "reward", "more"),
    ("Guided TGDPO is above DPO", "TGDPO β 0.3 α 0.5", "DPO β 0.3, half step", "reward", "more"),
    ("Guided TGDPO is above DPO, β 1", "TGDPO β 1 α 0.5", "DPO β 1", "reward", "more"),
    ("T-REG α 0.25 is above DPO", "T-REG β 0.3 α 0.25", "DPO β 0.3", "reward", "more"),
    ("T-REG α 0.5 is above α 0.25", "T-REG β 0.3 α 0.5", "T-REG β 0.3 α 0.25", "reward", "more"),
    ("Random credit changes nothing (T-REG)", "T-REG β 0.3 α 0.5, random", "DPO β 0.3", "reward", "same"),
    (
        "Random credit changes nothing (TGDPO)",
        "TGDPO β 0.3 α 0.5, random",
        "DPO β 0.3, half step",
        "reward",
        "same",
    ),
    ("Swapped templates do harm", "T-REG β 0.3 α 0.5, swapped", "DPO β 0.3", "reward", "less"),
    ("Flipped credit does harm", "TGDPO β 0.3 α 0.5, flipped", "DPO β 0.3, half step", "reward", "less"),
    ("TDPO2: α 0.1 diverges less than DPO", "TDPO2 β 0.1 α 0.1", "DPO β 0.1", "kl", "less"),
    ("TDPO2: α 0.25 diverges less than α 0.1", "TDPO2 β 0.1 α 0.25", "TDPO2 β 0.1 α 0.1", "kl", "less"),
    ("TDPO2: α 0.5 diverges less than α 0.25", "TDPO2 β 0.1 α 0.5", "TDPO2 β 0.1 α 0.25", "kl", "less"),
    ("TDPO2 keeps more entropy than DPO", "TDPO2 β 0.1 α 0.5", "DPO β 0.1", "entropy", "more"),
    ("TGDPO gains frontier share over DPO", "TGDPO β 0.3 α 0.5", "DPO β 0.3", "share", "more"),
    ("T-REG gains frontier share over DPO", "T-REG β 0.3 α 0.25", "DPO β 0.3", "share", "more"),
]


def train(arm: Arm, world: Any, rows: Any, seed: int, guide: Any = None) -> Any:
    """The policy after `STEPS` steps of `PAIRS` pairs."""
    from transformers import AutoModelForCausalLM

    from tokengrain.objectives import make_objective
    from tokengrain.training import PreferenceConfig, PreferenceTrainer

    with tempfile.TemporaryDirectory() as folder:
        args = PreferenceConfig(
            output_dir=folder,
            learning_rate=arm.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=10,
            adam_beta2=0.98,
            max_grad_norm=1.0,
            max_steps=STEPS,
            per_device_train_batch_size=PAIRS,
            seed=seed,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = PreferenceTrainer(
            AutoModelForCausalLM.from_pretrained(world.base_model()),
            args,
            objective=make_objective(arm.objective, **arm.hyper),
            credit=credit_source(arm.credit, world, guide),
            train_dataset=rows,
            processing_class=world.tokenizer,
        )
        trainer.train()
    return trainer.model


def credit_source(name: str | None, world: Any, guide: Any) -> Any:
    from tokengrain.credit import ContrastivePrompting, GuideLogRatio, RandomCredit, Transformed

    if name in ("contrastive", "swapped"):
        source = ContrastivePrompting(
            model=world.reference, tokenizer=world.tokenizer, templates=world.contrastive_templates
        )
        return source if name == "contrastive" else Transformed(source, scale=-1.0)
    if name == "guide":
        return GuideLogRatio(model=guide, reference=world.reference, beta=0.3)
    if name == "random":
        return RandomCredit()
    kinds = {"exact": "advantage", "flipped": "flipped"}
    # Advantages have the size of rewards. A quarter of them is what T-REG's ½·tanh(½·A) is for small A; clipped
    # but not scaled, they made T-REG collapse (KL above 40 nats in 2 of 2 seeds).
    return None if name is None else Transformed(world.credit(kinds[name]), scale=0.25, clip=0.5)


def run_seed(regime: str, seed: int, done: set[str], log: Path) -> int:
    """All arms of one seed; appends one line per arm."""
    import torch
    import transformers

    from tokengrain.data import TokenizeConfig, load_rows, prepare_pairs
    from tokengrain.worlds import load_world

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    world = load_world(WORLD.format(regime=regime, seed=seed))
    rows = prepare_pairs(load_rows(world.pairs()), world.tokenizer, TokenizeConfig())
    guide, made = None, 0
    for arm in arms():
        if f"{regime}/{seed}/{arm.name}" in done:
            continue
        if arm.credit == "guide" and guide is None:
            guide = train(Arm("guide", "dpo", {"beta": 0.3}), world, rows, seed)
        start = time.perf_counter()
        model = train(arm, world, rows, seed, guide)
        seconds = time.perf_counter() - start
        found = world.evaluate(model, n=64, seed=seed)
        line = {"regime": regime, "seed": seed, "arm": arm.name, "seconds": seconds, **found}
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        made += 1
    return made


def table(results: list[dict[str, Any]], regime: str) -> list[str]:
    lines = [
        "| run | true reward (by seed) | KL | frontier share | entropy | broken | credit ρ / AUC | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in arms():
        mine = sorted((r for r in results if r["regime"] == regime and r["arm"] == arm.name), key=lambda r: r["seed"])
        if not mine:
            continue

        def mean(key: str) -> float:
            return statistics.fmean(r[key] for r in mine)  # noqa: B023

        by_seed = " ".join(f"{r['reward']:.2f}" for r in mine)
        lines.append(
            f"| {arm.name} | {mean('reward'):.2f} ({by_seed}) | {mean('kl'):.2f} | {mean('share'):.2f} "
            f"| {mean('entropy'):.2f} | {100 * mean('broken'):.1f} % | {mean('credit_spearman'):.2f} / "
            f"{mean('credit_auc'):.2f} | {mean('seconds'):.0f} |"
        )
    return lines


def verdicts(results: list[dict[str, Any]], regime: str) -> list[dict[str, Any]]:
    """Each claim with its paired difference, 95 % interval and verdict."""
    found = []
    for claim, first, second, measure, expected in CLAIMS:
        values = {
            arm: {r["seed"]: r[measure] for r in results if r["regime"] == regime and r["arm"] == arm}
            for arm in (first, second)
        }
        seeds = sorted(values[first].keys() & values[second].keys())
        if len(seeds) < 2:
            continue
        d = paired_difference([values[first][s] for s in seeds], [values[second][s] for s in seeds])
        seen = {"more": d.low > 0, "less": d.high < 0, "same": d.low <= 0 <= d.high}[expected]
        wins = sum((values[first][s] > values[second][s]) for s in seeds)
        found.append(
            {
                "claim": claim,
                "measure": measure,
                "expected": expected,
                "difference": d.value,
                "low": d.low,
                "high": d.high,
                "higher_in": f"{wins}/{len(seeds)}",
                "verdict": "seen" if seen else "not seen",
            }
        )
    return found


def page(results: list[dict[str, Any]], seeds: int, command: str) -> str:
    lines = [
        "# Findings on the world `stories`",
        "",
        f"`{command}` on {date.today().isoformat()}, 2 CPU cores, one thread per run. {seeds} seeds: each has "
        f"preference pairs, order of rows and evaluation samples of its own. {STEPS} steps of {PAIRS} pairs; 64 "
        "samples for each of 12 prompts. Reward is the true reward per story (base 0), KL in nats per story against "
        "the base model, frontier share is the part of the best reward possible at that KL.",
        "",
        "Differences are paired by seed, with a 95 % t interval. *seen* means that the interval excludes 0 on the "
        "expected side (or contains 0 where no effect was expected, however small the effect may be).",
    ]
    for regime, words in (("noisy", "1,000 pairs, slope 0.3"), ("clean", "4,000 pairs, slope 1")):
        if not any(r["regime"] == regime for r in results):
            continue
        lines += ["", f"## {regime}: {words}", "", *table(results, regime), ""]
        lines += [
            "| claim | measure | difference (95 % interval) | higher in | verdict |",
            "|---|---|---|---|---|",
        ]
        for v in verdicts(results, regime):
            lines.append(
                f"| {v['claim']} | {v['measure']} | {v['difference']:+.2f} ({v['low']:+.2f} to {v['high']:+.2f}) "
                f"| {v['higher_in']} | {v['verdict']} |"
            )
    lines += [
        "",
        "All runs start from one base model, so the intervals say nothing about other base models. One other was tried "
        "by accident, with the demo (seed 0, 2026-11-20): pre-trained by the same code on two threads, which sums in "
        "another order, it moved further at the same learning rate: DPO 1.74 at KL 2.28, TDPO2 1.79 at 0.89, "
        "T-REG 2.35 at 3.55, TGDPO 1.57 at 4.82, that is, TGDPO *below* DPO. Pre-training now runs on one thread.",
    ]
    above = [r for r in results if r["share_low"] > 1]
    lines += [
        "",
        f"No policy may pass the frontier: of {len(results)} runs, {len(above)} lie above it by more than their 95 % "
        f"interval (largest share {max(r['share'] for r in results):.2f}).",
        "",
    ]
    return "\n".join(lines)


def main(
    output: Annotated[Path, typer.Option(help="folder for stories.md and stories.json")] = Path("docs/results"),
    seeds: int = 5,
    jobs: Annotated[int, typer.Option(help="processes, one thread each")] = 2,
    regime: Annotated[list[str], typer.Option(help="noisy, clean; repeat for both")] = ["noisy", "clean"],  # noqa: B006
    log: Annotated[Path, typer.Option(help="finished runs")] = Path("runs/claims/stories.jsonl"),
) -> None:
    """Repeat the findings over seeds and write a page with verdicts."""
    from tokengrain.worlds import load_world

    os.environ["OMP_NUM_THREADS"] = "1"
    log.parent.mkdir(parents=True, exist_ok=True)
    lines = log.read_text().splitlines() if log.exists() else []
    done = {"{regime}/{seed}/{arm}".format(**json.loads(line)) for line in lines}
    load_world("world://stories").base_model()
    with ProcessPoolExecutor(jobs) as pool:
        futures = [pool.submit(run_seed, r, s, done, log) for r in regime for s in range(seeds)]
        for future in track(as_completed(futures), total=len(futures), description="seeds"):
            future.result()
    results = [json.loads(line) for line in log.read_text().splitlines()]
    results = [r for r in results if r["seed"] < seeds and r["regime"] in regime]
    regimes = " ".join(f"--regime {name}" for name in regime)
    command = f"python -m benchmarks.claims.stories --seeds {seeds} {regimes}"
    write_text(output / "stories.md", page(results, seeds, command))
    write_json(
        output / "stories.json",
        {"command": command, "runs": results, "claims": {r: verdicts(results, r) for r in regime}},
    )
    print(page(results, seeds, command))


if __name__ == "__main__":
    typer.run(main)
