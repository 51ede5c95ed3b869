"""Time the parts of one online step: the update on a rollout, the sampling of it, and the whole.

    python -m benchmarks.online_step update --prompt 192-320 --completion 64-192 --peer separate --peer trl
    python -m benchmarks.online_step rollout --prompt 256 --completion 128
    python -m benchmarks.online_step split
    python -m benchmarks.online_step standard --output docs/results

Sides alternate in one process; ratios are taken pair by pair. Same model, rollout, precision and optimiser on
every side; the losses of every optimiser step are compared to show that the work is the same.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.online_page import markdown, phase_rows, side_rows
from benchmarks.online_rollouts import rollout_speed, step_split, thr_share
from benchmarks.online_updates import OnlineSetting, OursUpdate, TrlUpdate, build_rollout, fastest_trl
from benchmarks.preference_step import _bounds
from benchmarks.timing import Timing, machine, ratio, synchronise
from tokengrain.errors import write_json, write_text

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode=None)
console = Console()
BASE = OnlineSetting()


Clock = Callable[[], float]


def time_updates(
    sides: list[Any], device: str, repeats: int, clock: Clock = time.perf_counter
) -> tuple[list[Timing], list[list[float]]]:
    """One update of each in turn, `repeats` times after one that warms up; losses of the second round's steps."""
    timings, losses = [Timing(s.name, [], float("nan")) for s in sides], [[0.0]] * len(sides)
    for round_ in range(1 + repeats):
        for index, side in enumerate(sides):
            gc.collect()
            synchronise(device)
            started = clock()
            found = side.update()
            synchronise(device)
            if round_ == 1:
                losses[index], timings[index].second_loss = found, found[-1]
            if round_:
                timings[index].seconds.append(clock() - started)
    return timings, losses


def compare(
    setting: OnlineSetting,
    peers: list[str],
    repeats: int,
    *,
    tune: bool = False,
    parts: int = 1,
    clock: Clock = time.perf_counter,
) -> dict[str, Any]:
    """Our update against each peer, "separate" or "trl", on the same rollout.

    Args:
        tune: find out how many passes per minibatch are fastest for TRL; else it has `parts`.
    """
    make = {"separate": lambda: OursUpdate(setting, "separate"), "trl": lambda: TrlUpdate(setting, parts)}
    if tune:
        make["trl"] = lambda: fastest_trl(setting)
    sides = [OursUpdate(setting), *(make[peer]() for peer in peers)]
    timings, losses = time_updates(sides, setting.model.device, repeats, clock)
    tokens = build_rollout(setting)[0].completion_ids.numel()
    return {
        "setting": setting.label(),
        "tokens": tokens,
        "sides": [t.summary(tokens) for t in timings],
        "losses": losses,
        "faster_than": {t.name: ratio(t, timings[0]) for t in timings[1:]},
        "loss_difference": {
            side.name: max(abs(a - b) for a, b in zip(found, losses[0], strict=True))
            for side, found in zip(sides[1:], losses[1:], strict=True)
        },
    }


def show(result: dict[str, Any]) -> None:
    table = Table(title=result["setting"], title_justify="left")
    for column in ("", "median s", "min", "max", "completion tokens/s", "ours is × as fast (min–max)", "|loss − ours|"):
        table.add_column(column, justify="left" if not column else "right")
    for cells in side_rows(result):
        table.add_row(*cells)
    console.print(table)


def show_split(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['setting']}; credit: {', '.join(result['credit'])}", title_justify="left")
    for column in ("phase", "s per rollout", "share"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for cells in phase_rows(result):
        table.add_row(*cells)
    console.print(table)


Lengths = Annotated[str, typer.Option(help="tokens, a number or a range such as 64-192")]
Prompts = Annotated[int, typer.Option(help="prompts per rollout")]
Generations = Annotated[int, typer.Option(help="completions per prompt")]
Minibatches = Annotated[int, typer.Option(help="optimiser steps per rollout")]


def _setting(
    prompts: int, generations: int, minibatches: int, prompt: str, completion: str, **model: Any
) -> OnlineSetting:
    lengths = {"prompt": _bounds(prompt), "completion": _bounds(completion)}
    return BASE.with_(prompts=prompts, generations=generations, minibatches=minibatches, **lengths, **model)


@app.command()
def update(
    peer: Annotated[list[str], typer.Option(help="separate, trl; repeat for both")] = ["separate"],  # noqa: B006
    prompts: Prompts = 4,
    generations: Generations = 8,
    minibatches: Minibatches = 2,
    prompt: Lengths = "192-320",
    completion: Lengths = "64-192",
    vocabulary: int = 32_000,
    hidden: int = 384,
    layers: int = 6,
    heads: int = 6,
    intermediate: int = 1024,
    device: str = "cpu",
    repeats: int = 5,
    mixed: Annotated[bool, typer.Option(help="products in bfloat16 (mixed precision), on every side")] = False,
    tune: Annotated[bool, typer.Option(help="look for TRL's fastest number of passes per minibatch")] = False,
) -> None:
    """Time the update phase in one setting."""
    model = {"vocabulary": vocabulary, "hidden": hidden, "layers": layers, "heads": heads, "device": device}
    setting = _setting(
        prompts, generations, minibatches, prompt, completion, intermediate=intermediate, mixed=mixed, **model
    )
    show(compare(setting, peer, repeats, tune=tune))


@app.command()
def rollout(
    prompts: Prompts = 4,
    generations: Generations = 8,
    prompt: Lengths = "192-320",
    completion: Lengths = "128",
    device: str = "cpu",
    repeats: int = 5,
) -> None:
    """Time sampling against a bare `generate` call."""
    setting = _setting(prompts, generations, 1, prompt, completion, device=device)
    console.print_json(data=rollout_speed(setting, repeats))


@app.command()
def split(
    prompts: Prompts = 4,
    generations: Generations = 8,
    minibatches: Minibatches = 2,
    prompt: Lengths = "192-320",
    completion: Lengths = "128",
    device: str = "cpu",
    rollouts: Annotated[int, typer.Option(help="rollouts that are timed, after the first")] = 3,
    credit: Annotated[list[str], typer.Option(help="rollout credits; repeat for several")] = ["group"],  # noqa: B006
) -> None:
    """Where the time of a whole step goes."""
    setting = _setting(prompts, generations, minibatches, prompt, completion, device=device)
    show_split(step_split(setting, rollouts, tuple(credit)))


@app.command()
def standard(
    output: Annotated[Path, typer.Option(help="folder for online_step_<device>.{json,md}")] = Path("docs/results"),
    device: str = "cpu",
    repeats: int = 5,
) -> None:
    """The set that the documentation quotes (about an hour on two cores)."""
    warnings.filterwarnings("ignore")
    run_standard(BASE.with_(device=device), output, repeats)


def run_standard(base: OnlineSetting, output: Path, repeats: int, *, fixed: dict[str, Any] | None = None) -> None:
    """Measure the standard set from `base`; `fixed` is laid over every setting, to try it out."""
    device, over = base.model.device, fixed or {}
    twice, four_times, short = (
        base.with_(**{"prompt": prompt, "completion": (64, 192), **over})
        for prompt in ((192, 320), (448, 576), (16, 32))
    )
    peers = ["separate", *(["trl"] if find_spec("trl") else [])]
    report: dict[str, Any] = {"machine": machine("benchmarks.online_step"), "update": []}
    target = output / f"online_step_{device}"
    lengths = (twice, four_times, short)
    for setting in (*lengths, *(s.with_(mixed=True) for s in lengths)):
        report["update"].append(compare(setting, peers, repeats, tune=True))
        show(report["update"][-1])
        write_json(target.with_suffix(".json"), report)
    report["rollout"] = [rollout_speed(s, repeats) for s in (twice, short)]
    report["split"] = [step_split(s, repeats) for s in (twice, short)]
    for result in report["split"]:
        show_split(result)
    write_json(target.with_suffix(".json"), report)
    report["thr"] = thr_share(twice, 2, max(2, repeats // 2))
    write_json(target.with_suffix(".json"), report)
    write_text(target.with_suffix(".md"), markdown(report))
    console.print(f"written to {target}.md")


if __name__ == "__main__":
    app()
