"""The world `clips`: four frames with a coloured block each, and their colours in the order of time (RRPO).

    then a red , next the gold ; next the blue ; then a pink ,

Which of the two styles a sentence has means nothing, but in pairs the chosen side prefers one: who ranks whole
completions learns it. Rejected completions have the words of two frames exchanged, or are the base model's own answers
to the same frames in another order, which is how RRPO makes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tokengrain.errors import TokengrainError
from tokengrain.worlds.base_models import EOS, check_option
from tokengrain.worlds.seeing import (
    Marks,
    Scene,
    SeeingOptions,
    SeeingWorld,
    Split,
    Truth,
    Warmth,
    marks_of,
    random_of,
)

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "gold": (230, 190, 30),
    "pink": (240, 120, 200),
    "black": (20, 20, 20),
}
NAMES = tuple(COLOURS)
STYLES = (("then", "a", ","), ("next", "the", ";"))
FRAMES, SIDE, BLOCK = 4, 28, 14  # frames; pixels of a frame's side, and of a block's
PAPER, GRAIN = 235.0, 12.0  # of the background, and the deviation of its and the blocks' noise
RIGHT = 0.55  # of the weak annotator: right colours
ROUNDS = 8  # how many scenes are tried for each pair
LIKED = 0.7  # share of the first style in chosen completions; in rejected ones it is that of the second


@dataclass(frozen=True)
class ClipsOptions(SeeingOptions):
    """Options of the address `world://clips?...`; those of all worlds of pictures, and:

    Args:
        rejected: `swap`: the words of two frames are exchanged; `shuffled`: the base model's own wrong answers to the
            frames in another order.
    """

    rejected: str = "swap"

    world: ClassVar[str] = "clips"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_option("clips", "rejected", self.rejected, ("swap", "shuffled"))


class ClipsWorld(SeeingWorld):
    """Rows with a `videos` column and the truth in `order`, a list of four colours."""

    name = "clips"
    video = True
    frames = FRAMES
    size = (SIDE, SIDE)
    question = "order ?"
    words = ("order", "?", *(word for style in STYLES for word in style), *NAMES)
    max_new_tokens = 4 * FRAMES + 1
    warmth = Warmth(vision_layers=1)
    options: ClipsOptions

    FORM: ClassVar[tuple[Sequence[str], ...]] = (
        *((STYLES[0][0], STYLES[1][0]), (STYLES[0][1], STYLES[1][1]), NAMES, (STYLES[0][2], STYLES[1][2])) * FRAMES,
        (EOS,),
    )

    def __init__(self, options: ClipsOptions | None = None) -> None:
        super().__init__(options or ClipsOptions())
        self._own_pairs: dict[Any, list[dict[str, Any]]] = {}

    def scenes(self, n: int, random: np.random.RandomState) -> list[Scene]:
        scenes = []
        for _ in range(n):
            order = random.permutation(len(NAMES))[:FRAMES]
            frames = PAPER + GRAIN * random.randn(FRAMES, SIDE, SIDE, 3)
            for frame, colour in zip(frames, order):
                y, x = random.randint(0, SIDE - BLOCK, size=2)
                frame[y : y + BLOCK, x : x + BLOCK] = COLOURS[NAMES[colour]] + GRAIN * random.randn(BLOCK, BLOCK, 3)
            truth = {"order": [NAMES[colour] for colour in order]}
            scenes.append(Scene(frames.clip(0, 255).astype(np.uint8), truth))
        return scenes

    def trace(self, truth: Truth, random: np.random.RandomState, *, weak: bool) -> list[str]:
        named = [c if not weak or random.rand() < RIGHT else NAMES[random.randint(len(NAMES))] for c in truth["order"]]
        return self.sentence(named, random.randint(2, size=FRAMES))

    @staticmethod
    def sentence(colours: Sequence[str], styles: np.ndarray) -> list[str]:
        """Colours in words, each in a style (0 or 1), and `<end>`."""
        parts = ((*STYLES[style][:2], colour, STYLES[style][2]) for colour, style in zip(colours, styles, strict=True))
        return [*(word for part in parts for word in part), EOS]

    def sides(self, scene: Scene, random: np.random.RandomState) -> tuple[list[str], list[str]]:
        order = list(scene.truth["order"])
        a, b = random.permutation(FRAMES)[:2]
        order[a], order[b] = order[b], order[a]
        liked, disliked = random.rand(FRAMES) >= LIKED, random.rand(FRAMES) < LIKED
        return self.sentence(scene.truth["order"], liked.astype(int)), self.sentence(order, disliked.astype(int))

    def marks(self, truth: Truth, words: Sequence[str]) -> Marks:
        true: list[str | None] = [None] * len(self.FORM)
        true[2 : 4 * FRAMES : 4] = truth["order"]
        return marks_of(words, self.FORM, true)

    def is_right(self, truth: Truth, words: Sequence[str]) -> bool:
        return self.marks(truth, words).form and list(words[2 : 4 * FRAMES : 4]) == list(truth["order"])

    def told(self, words: Sequence[str]) -> Truth:
        return {"order": list(words[2 : 4 * FRAMES : 4])}

    def own_measures(self, said: Sequence[tuple[Truth, list[str]]]) -> dict[str, float]:
        """Share of frames with the right colour, and of sentences in the first style."""
        named = [(c, word) for truth, words in said for c, word in zip(truth["order"], words[2 : 4 * FRAMES : 4])]
        slots = [float(word == colour) for colour, word in named]
        styles = [float(word == STYLES[0][0]) for _, words in said for word in words[0 : 4 * FRAMES : 4]]
        return {"frames": float(np.mean(slots or [0.0])), "first_style": float(np.mean(styles or [0.0]))}

    def paired(self, split: Split, n: int, seed: int | None) -> list[dict[str, Any]]:
        if self.options.rejected == "swap":
            return super().paired(split, n, seed)
        key = (split, n, seed)
        if key not in self._own_pairs:
            self._own_pairs[key] = self._from_shuffled(split, n, seed)
        return [dict(row) for row in self._own_pairs[key]]

    def _from_shuffled(self, split: Split, n: int, seed: int | None) -> list[dict[str, Any]]:
        """Pairs with what the base model says of the frames in another order, where that is of the form and wrong."""
        own = self.options.seed if seed is None else seed
        random = random_of(self.name, "shuffled", split, own)
        scenes = self.drawn("pairs", split, ROUNDS * n, seed)
        pairs: list[dict[str, Any]] = []
        for start in range(0, len(scenes), n):
            part = scenes[start : start + n]
            orders = [random.permutation(FRAMES) for _ in part]
            rows = [self.row(Scene(s.frames[order], s.truth), "") for s, order in zip(part, orders)]
            answers = self.said(self.reference, rows, 1, self.sampling(own))
            for scene, (words,) in zip(part, answers, strict=True):
                marks = self.marks(scene.truth, words)
                if marks.form and marks.wrong and len(pairs) < n:
                    liked = (random.rand(FRAMES) >= LIKED).astype(int)
                    sides = self.sentence(scene.truth["order"], liked), words
                    pairs.append(self.pair(scene, f"{split}-{len(pairs)}", *sides))
            if len(pairs) == n:
                return pairs
        raise TokengrainError(f"world {self.name}: the base model's answers gave {len(pairs)} pairs, not {n}")
