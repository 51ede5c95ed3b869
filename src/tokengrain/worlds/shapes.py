"""The world `shapes`: how many red squares are there? Counted one by one, with checks that nobody has to make (AEPO).

A picture has 4×4 cells, 1 to 6 of them with a red square, and others with red discs and squares of other colours. A
completion names the red squares' cells in the order of reading, with a running number, and the last number again:

    a2 1 c1 2 wait look now here ok c1 2 d4 3 so 3

A check names the last cell once more. The more red squares and look-alikes, the harder a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import numpy as np

from tokengrain.worlds.base_models import EOS
from tokengrain.worlds.seeing import Marks, Scene, SeeingOptions, SeeingWorld, Truth, Warmth, places_of

CELLS = tuple(f"{row}{column}" for row, column in product("abcd", "1234"))
NUMBERS = tuple(str(n) for n in range(1, 13))
CHECKS = ("wait", "check")
"""What a check begins with; both are among AEPO's trigger words."""
MUSINGS, MUSED = ("again", "here", "look", "now", "ok", "once", "see", "well"), 4
"""Words of a check, and how many it has: what follows a trigger word must be open, or AEPO never counts one."""
MOST, OTHERS, MOST_CHECKS = 6, 6, 3
SLIP, RECHECK = 0.06, 0.02  # of the weak annotator: the i-th cell is wrong at i times the first; a check, at the second
CELL, SIDE = 14, 10  # pixels of a cell's and a square's side
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230), "gold": (230, 190, 30)}
PAPER, GRAIN = 235.0, 12.0
LEVELS = ("easy", "medium", "hard")


@dataclass(frozen=True)
class ShapesOptions(SeeingOptions):
    """Options of the address `world://shapes?...`: those of all worlds of pictures."""

    world: ClassVar[str] = "shapes"


class ShapesWorld(SeeingWorld):
    """Rows with an `images` column and the truth in `cells` (of the red squares), `others`, `count` and `level`."""

    name = "shapes"
    size = (4 * CELL, 4 * CELL)
    question = "red squares ?"
    words = ("red", "squares", "?", "so", *CELLS, *NUMBERS, *CHECKS, *MUSINGS)
    max_new_tokens = 2 * (MOST + 2) + (MUSED + 3) * (MOST_CHECKS + 1) + 3
    warmth = Warmth(layers=3, steps=1200, weak=300)
    options: ShapesOptions

    def __init__(self, options: ShapesOptions | None = None) -> None:
        super().__init__(options or ShapesOptions())

    def scenes(self, n: int, random: np.random.RandomState) -> list[Scene]:
        scenes = []
        for _ in range(n):
            count, others = random.randint(1, MOST + 1), random.randint(OTHERS + 1)
            places = random.permutation(len(CELLS))[: count + others]
            frame = PAPER + GRAIN * random.randn(*self.size, 3)
            for i, place in enumerate(places):
                is_disc = i >= count and random.rand() < 0.5
                colour = "red" if is_disc or i < count else ("green", "blue", "gold")[random.randint(3)]
                self._draw(frame, place, colour, is_disc)
            truth = {
                "cells": [CELLS[p] for p in sorted(places[:count])],
                "others": [CELLS[p] for p in sorted(places[count:])],
                "count": int(count),
                "level": LEVELS[min((count + others // 2 - 1) // 3, 2)],
            }
            scenes.append(Scene(frame.clip(0, 255).astype(np.uint8)[None], truth))
        return scenes

    @staticmethod
    def _draw(frame: np.ndarray, place: int, colour: str, is_disc: bool) -> None:
        y, x = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
        inside = (y**2 + x**2 <= (SIDE / 2) ** 2) | (not is_disc)
        top, left = CELL * (place // 4) + (CELL - SIDE) // 2, CELL * (place % 4) + (CELL - SIDE) // 2
        frame[top : top + SIDE, left : left + SIDE][inside] = COLOURS[colour]

    def trace(self, truth: Truth, random: np.random.RandomState, *, weak: bool) -> list[str]:
        """The weak annotator slips, later more often: it passes over a square or takes something else for one.

        A check, of which there are as many on easy pictures as on hard ones, names the cell again, mostly rightly; the
        writer goes on from there.
        """
        checks = list(random.randint(len(truth["cells"]), size=random.randint(MOST_CHECKS + 1)))
        words: list[str] = []
        number, cell = 0, ""
        while following(truth["cells"], cell):
            before, number = cell, number + 1
            cell = self._named(truth, before, SLIP * number if weak else 0.0, random)
            words += [cell, str(number)]
            for _ in range(checks.count(number - 1)):
                cell = self._named(truth, before, RECHECK if weak else 0.0, random)
                words += [CHECKS[random.randint(2)], *random.choice(MUSINGS, MUSED).tolist(), cell, str(number)]
        return [*words, "so", str(number), EOS]

    @staticmethod
    def _named(truth: Truth, before: str, slip: float, random: np.random.RandomState) -> str:
        """The next red square's cell; with a slip, that of something else that comes later."""
        ahead = following(truth["cells"], before)
        wrong = [*ahead[1:], *following(truth["others"], before)]
        return str(random.choice(wrong)) if wrong and random.rand() < slip else ahead[0]

    def marks(self, truth: Truth, words: Sequence[str]) -> Marks:
        """Wrong: a cell that is not the next red square's and that no check mends, a number, a `so` too early."""
        decisions: list[int] = []
        wrong: list[int] = []
        at, number, cell = 0, 0, ""

        def misfit(place: int) -> Marks:
            return Marks(False, decisions, [*wrong, *places_of(words, place)])

        while at < len(words) and words[at] in CELLS:
            before, number, named = cell, number + 1, at
            while True:
                if at + 1 >= len(words) or words[at] not in CELLS or words[at + 1] != str(number):
                    return misfit(at if at >= len(words) or words[at] not in CELLS else at + 1)
                named, cell = at, words[at]
                decisions += [at, at + 1]
                at += 2
                if at >= len(words) or words[at] not in CHECKS:
                    break
                for _ in range(MUSED):
                    at += 1
                    if at >= len(words) or words[at] not in MUSINGS:
                        return misfit(at)
                at += 1
            if [cell] != following(truth["cells"], before)[:1]:
                wrong.append(named)
        if at >= len(words) or words[at] != "so" or not number:
            return misfit(at)
        decisions += [at, at + 1]
        if following(truth["cells"], cell):
            wrong.append(at)
        for word in (str(number), EOS):
            at += 1
            if at >= len(words) or words[at] != word:
                return misfit(at)
        return Marks(len(words) == at + 1, decisions, wrong)

    def told(self, words: Sequence[str]) -> Truth:
        cells = sorted({word for word in words if word in CELLS})
        return {"cells": cells, "count": len(cells)}

    def is_right(self, truth: Truth, words: Sequence[str]) -> bool:
        """Whether a completion ends with `so`, the right number and `<end>`, whatever stands before."""
        return list(words[-3:]) == ["so", str(truth["count"]), EOS]


def following(cells: Sequence[str], cell: str) -> list[str]:
    """Those of `cells` that come after a cell in the order of reading; all, after ""."""
    return [other for other in cells if other > cell]
