"""TimeMaster on TimerBed's TEE and EMG, with a tiny model from scratch: does the way from files to numbers work?

    python -m experiments.timerbed ../shared/data/timerbed

Series are drawn as the world `series` draws its own. A small Qwen2.5-VL is trained on the training series, each with
noise and shifts of its own, to name the class behind two features of the values; then GRPO goes on with TimeMaster's
reward. Prints accuracies on the test series, beside nearest neighbours. Tens of series teach a model from scratch
little: the numbers say so.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.training import train_online
from tokengrain.data.rows import load_rows
from tokengrain.data.series import features, nearest_accuracy
from tokengrain.method import make_objective
from tokengrain.rewards.timemaster import TimeMaster
from tokengrain.worlds.base_models import EOS
from tokengrain.worlds.seeing import Marks, Scene, SeeingOptions, SeeingWorld, Truth, Warmth, marks_of
from tokengrain.worlds.series import HEIGHT, LENGTH, WIDTH, draw_lines

SIZES = ("low", "middle", "high")
NOISE = 0.1


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


def main(folder: Path, seeds: int = 1) -> None:
    torch.set_num_threads(1)
    for task in ("TEE", "EMG"):
        for seed in range(seeds):
            world = FileWorld(folder, task, seed)
            (known, labels), (asked, truth) = world.parts["TRAIN"], world.parts["TEST"]
            found = {k: nearest_accuracy(known, labels, asked, truth, k) for k in ("values", "spectrum")}
            print(f"{task}, seed {seed}, {len(world.labels)} classes: nearest neighbours {found}", flush=True)
            model, _ = world.trained()
            print("  after SFT", _short(world.evaluate(model, n=8)), flush=True)
            reward = TimeMaster(labels=world.labels, extension="none")
            objective = make_objective("grpo", epsilon=0.2, beta=0.0)
            sizes: dict[str, Any] = {"rollouts": 40, "prompts": 32, "minibatches": 1}
            done = train_online(world, objective, [{"name": "group"}], seed, model=model, rewards=reward, **sizes)
            print("  after GRPO", _short(world.evaluate(done.model, n=8)), flush=True)


def _short(found: dict[str, float | None]) -> dict[str, float]:
    names = ("form", "accuracy", "greedy_accuracy")
    return {name: round(float(found[name] or 0), 3) for name in names}


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(argument) for argument in sys.argv[2:3]))
