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
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.online_rollouts import PHASES, rollout_speed, step_split, thr_share
from benchmarks.online_updates import OnlineSetting, OursUpdate, TrlUpdate, build_rollout, fastest_trl
from benchmarks.preference_step import _bounds
from benchmarks.timing import Timing, machine, ratio, synchronise
from tokengrain.files import write_json, write_text

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode=None)
console = Console()
BASE = OnlineSetting()
NOTHING_ELSE = 0.05
"""Largest share of a step for anything but rollout, reward, scoring and update."""


def time_updates(sides: list[Any], device: str, repeats: int) -> tuple[list[Timing], list[list[float]]]:
    """One update of each in turn, `repeats` times after one that warms up; losses of the second round's steps."""
    timings, losses = [Timing(s.name, [], float("nan")) for s in sides], [[0.0]] * len(sides)
    for round_ in range(1 + repeats):
        for index, side in enumerate(sides):
            gc.collect()
            synchronise(device)
            started = time.perf_counter()
            found = side.update()
            synchronise(device)
            if round_ == 1:
                losses[index], timings[index].second_loss = found, found[-1]
            if round_:
                timings[index].seconds.append(time.perf_counter() - started)
    return timings, losses


def compare(setting: OnlineSetting, peers: list[str], repeats: int, *, tune: bool) -> dict[str, Any]:
    """Our update against each peer, "separate" or "trl", on the same rollout.

    Args:
        tune: find out how many passes per minibatch are fastest for TRL.
    """
    make = {"separate": lambda: OursUpdate(setting, "separate"), "trl": lambda: TrlUpdate(setting)}
    if tune:
        make["trl"] = lambda: fastest_trl(setting)
    sides = [OursUpdate(setting), *(make[peer]() for peer in peers)]
    timings, losses = time_updates(sides, setting.model.device, repeats)
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
    for cells in _rows(result):
        table.add_row(*cells)
    console.print(table)


def _rows(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for side in result["sides"]:
        faster = result["faster_than"].get(side["name"])
        rows.append(
            [
                side["name"],
                *(f"{side[key]:.3f}" for key in ("median_s", "min_s", "max_s")),
                f"{side['tokens_per_s']:,.0f}",
                _ratio(faster) if faster else "–",
                f"{result['loss_difference'][side['name']]:.1e}" if faster else "–",
            ]
        )
    return rows


def _ratio(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} ({found['min']:.2f}–{found['max']:.2f})"


def show_split(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['setting']}; credit: {', '.join(result['credit'])}", title_justify="left")
    for column in ("phase", "s per rollout", "share"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for cells in _phases(result):
        table.add_row(*cells)
    console.print(table)


def _phases(result: dict[str, Any]) -> list[list[str]]:
    """Phases, what is left, and the wall clock: name, seconds, share."""
    wall = result["wall_s"]
    seconds = {**result["seconds"], "everything else": wall - sum(result["seconds"].values()), "whole step": wall}
    return [[name, f"{s:.3f}", f"{s / wall:.1%}"] for name, s in seconds.items()]


def overhead(result: dict[str, Any]) -> float:
    """Share of a step that is neither rollout, reward, scoring nor update."""
    named = sum(result["seconds"][name] for name in PHASES if name != "credit")
    return 1 - float(named) / float(result["wall_s"])


def markdown(report: dict[str, Any]) -> str:
    """The standard set as a page of the docs."""
    m = report["machine"]
    where = m["gpu"] or f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads"
    head = "| setting | side | median s | min | max | completion tokens/s | ours is × as fast | largest loss difference |"
    lines = [
        "# Speed of one online step",
        "",
        f"`{m['command']}` on {m['date']}: {where}; torch {m['torch']}, transformers {m['transformers']}. "
        "Sides alternate in one process; ratios are taken pair by pair (median, smallest–largest).",
        "",
        "## Update phase",
        "",
        "Log-probabilities of the rollout under the policy and under the reference, then the optimiser steps "
        f"(GRPO with a k3 KL term), on the same rollout. Target: {report['targets']}",
        "",
        head,
        "|" + "---|" * 8,
    ]
    for result in report["update"]:
        lines += [f"| {result['setting']} | " + " | ".join(cells) + " |" for cells in _rows(result)]
    lines += [
        "",
        "## Rollouts",
        "",
        "The same prompts and lengths; ours also gives the log-probability of every token.",
        "",
        "| setting | side | median s | tokens/s | ours is × as fast |",
        "|---|---|---|---|---|",
    ]
    for result in report["rollout"]:
        for index, side in enumerate(result["sides"]):
            lines.append(
                f"| {result['setting']} | {side['name']} | {side['median_s']:.3f} | {side['tokens_per_s']:,.0f} | "
                + (_ratio(result["faster_than"]) if index else "–")
                + " |"
            )
    lines += ["", "## A whole step", ""]
    for result in report["split"]:
        lines += [
            f"{result['setting']}; credit: {', '.join(result['credit'])}. Neither rollout, reward, scoring nor "
            f"update: {overhead(result):.1%} (target: at most {NOTHING_ELSE:.0%}).",
            "",
            "| phase | s per rollout | share |",
            "|---|---|---|",
            *("| " + " | ".join(cells) + " |" for cells in _phases(result)),
            "",
        ]
    thr = report["thr"]
    share = thr["share"]
    lines += [
        "## Cost of THR",
        "",
        f"{thr['setting']}: {share['median']:.1%} of the step ({share['min']:.1%}–{share['max']:.1%}; target: at most "
        f"15 %): credit {thr['credit_s']:.3f} s, scoring {thr['scoring_with_s']:.3f} s instead of "
        f"{thr['scoring_without_s']:.3f} s, beside a step of {thr['step_without_s']:.3f} s without it.",
    ]
    return "\n".join(lines) + "\n"


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
    tune: Annotated[bool, typer.Option(help="look for TRL's fastest number of passes per minibatch")] = False,
) -> None:
    """Time the update phase in one setting."""
    model = {"vocabulary": vocabulary, "hidden": hidden, "layers": layers, "heads": heads, "device": device}
    setting = _setting(prompts, generations, minibatches, prompt, completion, intermediate=intermediate, **model)
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
    credit: Annotated[list[str], typer.Option(help="credit steps; repeat for several")] = ["group"],  # noqa: B006
) -> None:
    """Where the time of a whole step goes."""
    setting = _setting(prompts, generations, minibatches, prompt, completion, device=device)
    show_split(step_split(setting, rollouts, tuple(credit)))


TARGETS = (
    "1.5 times as fast as our separate layout with prompts twice as long as completions, 2 times with prompts four "
    "times as long, no slower with short ones; 3 times as fast as TRL."
)


@app.command()
def standard(
    output: Annotated[Path, typer.Option(help="folder for online_step_<device>.{json,md}")] = Path("docs/results"),
    device: str = "cpu",
    repeats: int = 5,
) -> None:
    """The set that the documentation quotes (about half an hour on two cores)."""
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
    report: dict[str, Any] = {"machine": machine("benchmarks.online_step"), "targets": TARGETS, "update": []}
    target = output / f"online_step_{device}"
    for setting in (twice, four_times, short):
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
