"""The world `series`: noisy waves drawn as a line, named by their shape (TimeMaster).

A wave is a sine, a square or a saw with 2 to 4 periods and a random phase, under Gaussian noise. A completion says how
many periods there are, what the shape looks like, and the class:

    <think> periods 3 shape round </think> <class> sine </class>

Which class is best is known: all waves can be enumerated, so that the posterior of a class is a sum over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tokengrain.data.series import nearest_accuracy
from tokengrain.evaluation.statistics import classification
from tokengrain.worlds.base_models import EOS, check_least
from tokengrain.worlds.seeing import Marks, Scene, SeeingOptions, SeeingWorld, Truth, marks_of

CLASSES, SHAPES, PERIODS = ("sine", "square", "saw"), ("round", "edges", "ramp"), ("2", "3", "4")
OTHER = "other"  # a word that is no class
LENGTH, PHASES = 48, 48
HEIGHT, WIDTH, REACH = 28, 56, 3.5  # of the picture in pixels; values beyond the reach are cut
LABEL, SHAPE, SPOILT = 0.55, 0.8, 0.3  # of the weak annotator: right labels, right shapes, forms that are not right


@dataclass(frozen=True)
class SeriesOptions(SeeingOptions):
    """Options of the address `world://series?...`; those of all worlds of pictures, and:

    Args:
        noise: the noise's deviation; that of a wave is 1. The base model is trained with it.
    """

    noise: float = 0.6

    world: ClassVar[str] = "series"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("series", self, {"noise": 0})


def waves(classes: np.ndarray, periods: np.ndarray, phases: np.ndarray) -> np.ndarray:
    """Waves without noise `[n, LENGTH]`, of variance 1: class 0–2, number of periods, phase in [0, 1)."""
    x = (periods[:, None] * np.arange(LENGTH) / LENGTH + phases[:, None]) % 1.0
    forms = np.stack([np.sqrt(2) * np.sin(2 * np.pi * x), np.where(x < 0.5, 1.0, -1.0), np.sqrt(3) * (2 * x - 1)])
    return forms[classes, np.arange(len(x))]


def best_classes(values: np.ndarray, noise: float) -> np.ndarray:
    """The most probable class of each series `[n, LENGTH]`, all waves being enumerated."""
    grid = np.stack(np.meshgrid(range(3), range(2, 5), np.arange(PHASES) / PHASES, indexing="ij")).reshape(3, -1)
    known = waves(grid[0].astype(int), grid[1], grid[2])
    logs = (values @ known.T - 0.5 * (known**2).sum(1)) / max(noise, 1e-6) ** 2
    logs = logs.reshape(len(values), 3, -1)
    return np.exp(logs - logs.max((1, 2), keepdims=True)).sum(-1).argmax(1)


def draw_lines(values: np.ndarray) -> np.ndarray:
    """Series `[n, LENGTH]` as pictures, uint8 `[n, HEIGHT, WIDTH]`: each column from its lowest value to its highest.

    Pixels are as dark as the share of them that the line covers, so that no library decides about them.
    """
    y = (HEIGHT - 1) * (1 - (np.clip(values, -REACH, REACH) + REACH) / (2 * REACH))
    at = np.linspace(0, LENGTH - 1, WIDTH + 1)
    low = np.floor(at).astype(int).clip(0, LENGTH - 2)
    ends = y[:, low] * (1 - (at - low)) + y[:, low + 1] * (at - low)
    top, bottom = np.minimum(ends[:, :-1], ends[:, 1:]) - 0.5, np.maximum(ends[:, :-1], ends[:, 1:]) + 0.5
    rows = np.arange(HEIGHT)[None, :, None]
    cover = np.minimum(rows + 0.5, bottom[:, None]) - np.maximum(rows - 0.5, top[:, None])
    return (255 * (1 - np.clip(cover, 0, 1))).round().astype(np.uint8)


class SeriesWorld(SeeingWorld):
    """Rows with an `images` column and the truth in `label`, `periods` and `shape`."""

    name = "series"
    size = (HEIGHT, WIDTH)
    question = "series ?"
    words = (
        *("series", "?", "<think>", "</think>", "<class>", "</class>", "periods", "shape"),
        *(*PERIODS, *SHAPES, *CLASSES, OTHER),
    )
    max_new_tokens = 12
    options: SeriesOptions

    FORM: ClassVar[tuple[Sequence[str], ...]] = (
        *(("<think>",), ("periods",), PERIODS, ("shape",), SHAPES, ("</think>",)),
        *(("<class>",), CLASSES, ("</class>",), (EOS,)),
    )

    def __init__(self, options: SeriesOptions | None = None) -> None:
        super().__init__(options or SeriesOptions())

    def _model_settings(self) -> dict[str, Any]:
        return super()._model_settings() | {"noise": self.options.noise}

    def scenes(self, n: int, random: np.random.RandomState) -> list[Scene]:
        classes, periods, phases = random.randint(3, size=n), random.randint(3, size=n), random.rand(n)
        values = waves(classes, periods + 2, phases) + self.options.noise * random.randn(n, LENGTH)
        pictures = np.repeat(draw_lines(values)[:, None, :, :, None], 3, axis=-1)
        return [
            Scene(picture, {"label": CLASSES[c], "periods": PERIODS[k], "shape": SHAPES[c]}, series)
            for picture, c, k, series in zip(pictures, classes, periods, values)
        ]

    def trace(self, truth: Truth, random: np.random.RandomState, *, weak: bool) -> list[str]:
        label, shape = truth["label"], truth["shape"]
        if weak and random.rand() >= LABEL:
            label = random.choice([c for c in CLASSES if c != label])
        if weak and random.rand() >= SHAPE:
            shape = random.choice(SHAPES)
        think = ["<think>", "periods", truth["periods"], "shape", shape, "</think>"]
        named = ["<class>", label, "</class>"]
        spoilt = random.rand() / SPOILT if weak else 1.0
        if spoilt < 1 / 3:
            think = think[:-1]
        elif spoilt < 2 / 3:
            named = named[:-1]
        elif spoilt < 1:
            named = ["<class>", OTHER, "</class>"]
        return [str(word) for word in (*think, *named, EOS)]

    def marks(self, truth: Truth, words: Sequence[str]) -> Marks:
        true = [None] * len(self.FORM)
        for place, name in ((2, "periods"), (4, "shape"), (7, "label")):
            true[place] = truth[name]
        return marks_of(words, self.FORM, true)

    def is_right(self, truth: Truth, words: Sequence[str]) -> bool:
        return self.marks(truth, words).form and words[7] == truth["label"]

    def told(self, words: Sequence[str]) -> Truth:
        return {"label": words[7], "periods": words[2], "shape": words[4]}

    def own_measures(self, said: Sequence[tuple[Truth, list[str]]]) -> dict[str, float]:
        """Mean F1 of the classes."""
        named = [CLASSES.index(words[7]) if self.marks(truth, words).form else -1 for truth, words in said]
        return {"macro_f1": classification([CLASSES.index(truth["label"]) for truth, _ in said], named).macro_f1}

    def bounds(self, scenes: Sequence[Scene]) -> dict[str, float | None]:
        """The best class of each series, and that of the nearest training series, by values and by spectrum."""
        known = self.drawn("prompts", "train", self.options.prompts)
        (a, own), (b, truth) = (
            (np.stack([s.values for s in part]), [s.truth["label"] for s in part]) for part in (known, scenes)
        )
        return {
            "best_accuracy": self.best_accuracy(scenes),
            "nearest_accuracy": nearest_accuracy(a, own, b, truth),
            "nearest_spectrum": nearest_accuracy(a, own, b, truth, "spectrum"),
        }

    def best_accuracy(self, scenes: Sequence[Scene]) -> float:
        """Accuracy of the most probable class given the series itself, of which a picture can only lose something."""
        best = best_classes(np.stack([scene.values for scene in scenes]), self.options.noise)
        return float(np.mean([CLASSES[c] == scene.truth["label"] for c, scene in zip(best, scenes)]))
