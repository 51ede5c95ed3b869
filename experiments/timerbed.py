"""TimeMaster on TimerBed's TEE and EMG, with a tiny model from scratch: does the way from files to numbers work?

    python -m experiments.timerbed ../shared/data/timerbed --seeds 5

Series are drawn as the world `series` draws its own. A small Qwen2.5-VL is trained on the training series, each with
noise and shifts of its own, to name the class behind two features of the values; then GRPO goes on with TimeMaster's
reward. Writes accuracies on the test series, beside those of nearest neighbours. Tens of series teach a model from
scratch little: the numbers say so.
"""

from __future__ import annotations

import platform
import time
from datetime import date
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer

from experiments.training import train_online
from tokengrain.data.rows import load_rows
from tokengrain.data.series import features, nearest_accuracy
from tokengrain.errors import read_json, write_json, write_text
from tokengrain.method import make_objective
from tokengrain.rewards.timemaster import TimeMaster
from tokengrain.worlds.base_models import EOS
from tokengrain.worlds.seeing import Marks, Scene, SeeingOptions, SeeingWorld, Truth, Warmth, marks_of
from tokengrain.worlds.series import HEIGHT, LENGTH, WIDTH, draw_lines

SIZES = ("low", "middle", "high")
NOISE = 0.1
KINDS: tuple[Literal["values"], Literal["spectrum"]] = ("values", "spectrum")


class FileWorld(SeeingWorld):
    """The training and test series of a task as scenes; classes are words `c0`, `c1`, ..."""

    name, size, question, max_new_tokens = "timerbed", (HEIGHT, WIDTH), "series ?", 14

    def __init__(self, folder: Path, task: str, seed: int) -> None:
        super().__init__(SeeingOptions(seed=seed))
        read = {}
        for part in ("TRAIN", "TEST"):
            rows = [row for _, row in load_rows(folder / f"{task}_{part}.ts.gz")]
            read[part] = np.array([row["series"][0] for row in rows]), [f"c{row['label']}" for row in rows]
        self.parts = read
        self.labels = sorted({*read["TRAIN"][1], *read["TEST"][1]})
        tags = ("<think>", "</think>", "<class>", "</class>")
        self.words = ("series", "?", *tags, "peak", "moves", *SIZES, *self.labels)
        self.warmth = Warmth(steps=600, weak=0, seed=seed)
        self.held_out = len(read["TEST"][1])
        self._cuts = [np.quantile(self._features(read["TRAIN"][0])[:, i], [1 / 3, 2 / 3]) for i in (0, 1)]

    @staticmethod
    def _features(values: np.ndarray) -> np.ndarray:
        scaled = features(values, "values")
        return np.stack([scaled.max(1), np.abs(np.diff(scaled, axis=1)).mean(1)], 1)

    def _seen(self, values: np.ndarray, label: str, random: np.random.RandomState | None) -> Scene:
        """A series as a picture; in training it is moved and gets noise, so that no picture comes twice."""
        scaled = features(values[None], "values")[0]
        if random is not None:
            scaled = np.roll(scaled, random.randint(-8, 9)) + NOISE * random.randn(len(scaled))
        drawn = np.interp(np.linspace(0, len(scaled) - 1, LENGTH), np.arange(len(scaled)), scaled)
        words = [SIZES[int(np.searchsorted(cut, v))] for cut, v in zip(self._cuts, self._features(values[None])[0])]
        picture = np.repeat(draw_lines(drawn[None])[0][None, :, :, None], 3, axis=-1)
        return Scene(picture, {"label": label, "peak": words[0], "moves": words[1]})

    def scenes(self, n: int, random: np.random.RandomState) -> list[Scene]:
        values, labels = self.parts["TRAIN"]
        return [self._seen(values[i], labels[i], random) for i in random.randint(len(labels), size=n)]

    def drawn(self, purpose: str, split: Any, n: int, seed: int | None = None) -> list[Scene]:
        if split == "train":
            return super().drawn(purpose, split, n, seed)
        return [self._seen(values, label, None) for values, label in zip(*self.parts["TEST"], strict=True)]

    def trace(self, truth: Truth, random: np.random.RandomState, *, weak: bool) -> list[str]:
        think = ["<think>", "peak", truth["peak"], "moves", truth["moves"], "</think>"]
        return [*think, "<class>", truth["label"], "</class>", EOS]

    def marks(self, truth: Truth, words: Any) -> Marks:
        form = (("<think>",), ("peak",), SIZES, ("moves",), SIZES, ("</think>",), ("<class>",), self.labels)
        true = [None, None, truth["peak"], None, truth["moves"], None, None, truth["label"], None, None]
        return marks_of(words, (*form, ("</class>",), (EOS,)), true)

    def is_right(self, truth: Truth, words: Any) -> bool:
        return self.marks(truth, words).form and words[7] == truth["label"]

    def told(self, words: Any) -> Truth:
        return {"peak": words[2], "moves": words[4], "label": words[7]}


def measured(folder: Path, task: str, seed: int) -> dict[str, Any]:
    """One run: accuracies of nearest neighbours, and of the model after each stage."""
    world, start = FileWorld(folder, task, seed), time.process_time()
    (known, labels), (asked, truth) = world.parts["TRAIN"], world.parts["TEST"]
    found: dict[str, Any] = {"task": task, "seed": seed, "classes": len(world.labels), "series": len(truth)}
    found |= {f"nearest_{kind}": nearest_accuracy(known, labels, asked, truth, kind) for kind in KINDS}
    model, _ = world.trained()
    found["sft"] = world.evaluate(model, n=8)
    reward = TimeMaster(labels=world.labels, extension="none")
    objective = make_objective("grpo", epsilon=0.2, beta=0.0)
    sizes: dict[str, Any] = {"rollouts": 40, "prompts": 32, "minibatches": 1}
    done = train_online(world, objective, [{"name": "group"}], seed, model=model, rewards=reward, **sizes)
    found["grpo"] = world.evaluate(done.model, n=8)
    return found | {"cpu_seconds": time.process_time() - start}


def page(runs: list[dict[str, Any]], how: str) -> str:
    """The accuracies as a table, means over seeds with their ranges."""
    tasks = {run["task"]: [other for other in runs if other["task"] == run["task"]] for run in runs}
    first = [own[0] for own in tasks.values()]
    lines = [
        "# TimeMaster on TimerBed",
        "",
        f"{how}. Accuracy on the test files; means over seeds, ranges in brackets.",
    ]
    titles = [f"{one['task']}, {one['classes']} classes, {one['series']} series" for one in first]
    lines += ["", f"| | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    rows = {"chance": [f"{1 / one['classes']:.3f}" for one in first]}
    rows |= {f"nearest neighbour, {kind}": [f"{one[f'nearest_{kind}']:.3f}" for one in first] for kind in KINDS}
    for stage, name in (("sft", "SFT"), ("grpo", "SFT and GRPO")):
        for key, title in (("greedy_accuracy", "greedy"), ("accuracy", "sampled"), ("form", "form, sampled")):
            rows[f"{name}, {title}"] = [_spread([run[stage][key] for run in own]) for own in tasks.values()]
    lines += [f"| {title} | {' | '.join(cells)} |" for title, cells in rows.items()]
    return "\n".join([*lines, ""])


def _spread(values: list[float]) -> str:
    return f"{fmean(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def main(
    folder: Annotated[Path, typer.Argument(help="with TEE_TRAIN.ts.gz and the others")],
    seeds: Annotated[int, typer.Option(min=1, help="0, 1, ...: of model, noise and samples")] = 5,
    output: Annotated[Path, typer.Option(help="folder for timerbed.md and timerbed.json")] = Path("docs/results"),
) -> None:
    """Train on both tasks over seeds and write the page; a run in the JSON already is not done again."""
    torch.set_num_threads(1)
    log = output / "timerbed.json"
    runs: list[dict[str, Any]] = read_json(log) if log.exists() else []
    done = {(run["task"], run["seed"]) for run in runs}
    for task, seed in product(("TEE", "EMG"), range(seeds)):
        if (task, seed) not in done:
            runs.append(measured(folder, task, seed) | {"date": date.today().isoformat()})
            write_json(log, runs)
    runs.sort(key=lambda run: (-run["classes"], run["seed"]))
    cost = fmean(run["cpu_seconds"] for run in runs)
    how = f"`python -m experiments.timerbed FOLDER --seeds {seeds}`, {max(run['date'] for run in runs)}, "
    write_text(output / "timerbed.md", page(runs, f"{how}{platform.machine()}, {cost:.0f} CPU seconds a run"))
    print((output / "timerbed.md").read_text())


if __name__ == "__main__":
    typer.run(main)
