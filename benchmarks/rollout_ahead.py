"""One rollout ahead against taking turns: what is learned per step, and the wall time with a core each.

    python -m benchmarks.rollout_ahead                      # 5 seeds, 40 rollouts, hf and server: about an hour
    python -m benchmarks.rollout_ahead --sampler hf --seeds 2 --rollouts 4     # only to see that it works

GRPO on the world `arithmetic`, both ways from the same weights with the same seed. Trainer and sampler have one torch
thread each, and on Linux a core each, the same two both ways: the sampler `server` is a process of its own that speaks
vLLM's protocol, `hf` a thread. After some rollouts the weights are set aside; when training is over, each is sampled on
the world's held-out problems. Differences are paired by seed, with Student's t interval of their mean. The wall time is
that of `train()`, which holds no evaluation and no checkpoint. On a machine that others use seconds are worthless,
CPU seconds are not: those of the main thread are what is left of the wall time at best.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from tests.rollout.stub import Served, serving
from transformers import AutoModelForCausalLM, TrainerCallback

from benchmarks.timing import machine
from tokengrain.evaluation.statistics import Estimate, mean_of_runs
from tokengrain.training.config import OnlineConfig
from tokengrain.training.online import OnlineTrainer
from tokengrain.worlds import load_world

MINIBATCHES, LEARNING_RATE = 8, 1e-4
WAYS = ("turns", "ahead")
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)
console = Console()


def pinned(cores: list[int]) -> None:
    """One torch thread; and these cores, where the system can do it, for the calling thread and those it starts."""
    torch.set_num_threads(1)
    if cores:
        os.sched_setaffinity(0, cores)


def serve(model: str, cores: list[int], pipe: Any) -> None:
    """In a process of its own: a server on these cores, until the other side says something."""
    pinned(cores)
    served = Served(AutoModelForCausalLM.from_pretrained(model).eval())
    served.longest = 2**20
    with serving(served) as stub:
        pipe.send(stub.url)
        pipe.recv()


@contextmanager
def sampling(kind: str, model: str) -> Iterator[Any]:
    """The sampler's settings; a server runs meanwhile."""
    if kind == "hf":
        yield "hf"
        return
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(model, CORES[1:2], theirs), daemon=True)
    process.start()
    try:
        yield {"name": "server", "url": ours.recv(), "model": "m", "refresh": "checkpoint"}
    finally:
        ours.send(None)
        process.join(10)


class SetAside(TrainerCallback):
    """Copies of the weights after some optimiser steps."""

    def __init__(self, steps: set[int]) -> None:
        self.steps, self.found = steps, dict[int, dict[str, Any]]()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step in self.steps:
            self.found[state.global_step] = {name: value.clone() for name, value in model.state_dict().items()}


def train(world: Any, kind: str, way: str, seed: int, rollouts: int, at: list[int]) -> dict[str, Any]:
    """One training: seconds, and the held-out accuracy after the rollouts in `at`."""
    pinned(CORES[:1] if kind == "server" else CORES[:2])
    aside = SetAside({number * MINIBATCHES for number in at})
    with tempfile.TemporaryDirectory() as folder, sampling(kind, str(world.base_model())) as sampler:
        trainer = OnlineTrainer(
            AutoModelForCausalLM.from_pretrained(world.base_model()),
            OnlineConfig(
                folder,
                max_staleness=WAYS.index(way),
                max_steps=rollouts * MINIBATCHES,
                minibatches=MINIBATCHES,
                prompts_per_rollout=32,
                num_generations=8,
                max_new_tokens=world.max_new_tokens,
                stop_ids=[world.eos],
                learning_rate=LEARNING_RATE,
                adam_beta2=0.95,
                lr_scheduler_type="linear",
                warmup_steps=min(2, rollouts // 4) * MINIBATCHES,
                logging_steps=MINIBATCHES,
                rollout_samples=0,
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
                seed=seed,
            ),
            objective="grpo",
            rewards=world.reward,
            sampler=sampler,
            train_dataset=world.prompts(),
            processing_class=world.tokenizer,
            callbacks=[aside],
        )
        clocks = time.perf_counter, time.thread_time, time.process_time
        started = [clock() for clock in clocks]
        trainer.train()
        seconds, own, cpu = (clock() - before for clock, before in zip(clocks, started, strict=True))
    log = [e for e in trainer.state.log_history if "loss" in e]
    names = ("seconds/rollout", "seconds/update", "seconds/scoring", "seconds/refresh", "mismatch/k3")
    means = {name: fmean(e[name] for e in log[1:]) for name in names if name in log[-1]}
    model: Any = trainer.model
    accuracy = {}
    for step, state in sorted(aside.found.items()):
        model.load_state_dict(state)
        accuracy[step // MINIBATCHES] = world.evaluate(model, 16, seed)["accuracy"]
    return {"way": way, "seed": seed, "seconds": seconds, "own": own, "cpu": cpu, "accuracy": accuracy, "log": means}


Compared = tuple[float, float, Estimate]


def compared(runs: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> Compared:
    """Means of taking turns and of being ahead, and the difference, paired by seed."""
    turns, ahead = ([value(run) for run in runs if run["way"] == way] for way in WAYS)
    return fmean(turns), fmean(ahead), mean_of_runs([b - a for a, b in zip(turns, ahead, strict=True)])


def rows_of(runs: list[dict[str, Any]]) -> dict[str, Compared]:
    """What is compared, by name; `runs` may come from a file."""
    values: dict[str, Callable[[dict[str, Any]], float]] = {"seconds": lambda run: run["seconds"]}
    values |= {
        f"held-out accuracy after {n} rollouts": lambda run, n=n: run["accuracy"][n] for n in runs[0]["accuracy"]
    }
    values |= {"CPU seconds, main thread": lambda run: run["own"]}
    values |= {"CPU seconds, other threads": lambda run: run["cpu"] - run["own"]}
    values |= {name: lambda run, name=name: run["log"].get(name, 0.0) for name in runs[0]["log"]}
    return {name: compared(runs, value) for name, value in values.items()}


def shown(found: Compared) -> tuple[str, str, str]:
    """The cells of a row."""
    turns, ahead, difference = found
    interval = f"{difference.value:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"
    return f"{turns:.3f}", f"{ahead:.3f}", interval


@app.command()
def main(
    seeds: Annotated[int, typer.Option(min=2)] = 5,
    rollouts: Annotated[int, typer.Option(min=2)] = 40,
    sampler: Annotated[str, typer.Option(help="hf, server or both.")] = "both",
    output: Annotated[Path | None, typer.Option(help="A file for all numbers, as JSON.")] = None,
) -> None:
    world = load_world("world://arithmetic")
    at = sorted({max(1, rollouts // 4), rollouts // 2, rollouts})
    report: dict[str, Any] = {"machine": machine("benchmarks.rollout_ahead"), "load": os.getloadavg(), "runs": {}}
    for kind in ("hf", "server") if sampler == "both" else (sampler,):
        runs = report["runs"][kind] = []
        for seed in range(seeds):
            for way in WAYS if seed % 2 == 0 else WAYS[::-1]:  # a drifting machine favours neither
                runs.append(train(world, kind, way, seed, rollouts, at))
                console.print(json.dumps(runs[-1]), soft_wrap=True, highlight=False)
        table = Table("sampler " + kind, "turns", "ahead", "difference, paired (95 %)")
        for name, found in rows_of(runs).items():
            table.add_row(name, *shown(found))
        console.print(table)
        if output is not None:
            output.write_text(json.dumps(report, indent=2) + "\n")
    console.print(f"load average before and after: {report['load'][0]:.1f}, {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    app()
