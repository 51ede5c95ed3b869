"""Pointer chasing: the harder a prompt, the more steps it needs; and checks that nobody has to make.

A prompt `f^3(D)` asks for the third successor of D under a permutation of 16 letters that only the weights know. A
completion hops, `>A>K`, may stop to check its last hop, ` wait look now here okAK`, and ends with the answer, `=K`.
Specification: ares.md, section 7.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import cached_property
from string import ascii_uppercase
from typing import Any

from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.worlds.arithmetic import build_tokenizer
from tokengrain.worlds.base_models import BOS, EOS, PAD

SYMBOLS = ascii_uppercase[:16]
HOPS = range(1, 7)
HOP, ANSWER = ">", "="
CHECKS = (" wait", " check")
"""What a check begins with; both are among `TRIGGERS`."""
MUSINGS = (" again", " here", " look", " now", " ok", " once", " see", " well")
MUSED = 4
"""Words of musing in a check. In natural text what follows a trigger word is open, which is why AEPO counts it; were
it the hop that is repeated, the most certain text there is here, nothing would ever count."""
MOST_CHECKS = 4
SLIP = 0.08
"""Chance that the i-th hop of a trace goes anywhere, divided by i."""
RECHECK = 0.02
"""Chance that a check in a trace goes anywhere."""
VOCABULARY = (PAD, BOS, EOS, *"f^()", *map(str, HOPS), HOP, ANSWER, *CHECKS, *MUSINGS, *SYMBOLS)
IDS = {token: place for place, token in enumerate(VOCABULARY)}
PROMPT = 7
"""Tokens of a prompt."""
LONGEST = 64
"""Tokens of a completion at most; the longest trace, of 6 hops and 4 checks, has 43."""


class Chasing:
    """The task of a seed: its permutation, prompts, traces to imitate, and reward."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.successor = dict(zip(SYMBOLS, random.Random(f"permutation {seed}").sample(SYMBOLS, len(SYMBOLS))))

    def chased(self, symbol: str, hops: int) -> str:
        """The answer of a prompt."""
        for _ in range(hops):
            symbol = self.successor[symbol]
        return symbol

    @cached_property
    def tokenizer(self) -> Any:
        return build_tokenizer(VOCABULARY, PROMPT + LONGEST)

    @property
    def max_new_tokens(self) -> int:
        return LONGEST

    def prompts(self) -> list[dict[str, Any]]:
        """All 96 rows: `prompt`, `hops`, `answer`, `id`."""
        return [
            {"prompt": f"f^{n}({s})", "hops": n, "answer": self.chased(s, n), "id": f"{n}{s}"}
            for n in HOPS
            for s in SYMBOLS
        ]

    def reward(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        *,
        answer: Sequence[str],
        **columns: Any,
    ) -> list[float]:
        """1 for a completion that ends with `=`, the right letter and `<end>`, else 0; whatever stands before."""
        return [float(is_right(ids, letter)) for ids, letter in zip(completion_ids, answer, strict=True)]

    def trace(self, symbol: str, hops: int, rng: random.Random) -> list[str]:
        """A completion as a careless but thorough writer has it, right or wrong.

        Hops slip, later ones more often. 0 to 4 checks, as many on easy prompts as on hard ones, do a hop once more,
        mostly rightly; each comes after a hop drawn at random. The writer goes on from wherever this leads.
        """
        checks = [rng.randrange(hops) for _ in range(rng.randint(0, MOST_CHECKS))]
        tokens: list[str] = []
        for hop in range(hops):
            before, symbol = symbol, self._hopped(symbol, SLIP * (hop + 1), rng)
            tokens += [HOP, symbol]
            for _ in range(checks.count(hop)):
                symbol = self._hopped(before, RECHECK, rng)
                tokens += [rng.choice(CHECKS), *rng.choices(MUSINGS, k=MUSED), before, symbol]
        return [*tokens, ANSWER, symbol, EOS]

    def _hopped(self, symbol: str, slip: float, rng: random.Random) -> str:
        return rng.choice(SYMBOLS) if rng.random() < slip else self.successor[symbol]

    def trace_batches(self, steps: int, size: int) -> Iterator[TokenBatch]:
        """Prompts drawn at random, with a trace each."""
        rng = random.Random(f"traces {self.seed}")
        for _ in range(steps):
            drawn = [(rng.choice(SYMBOLS), rng.choice(HOPS)) for _ in range(size)]
            yield TokenBatch.from_samples([self._sample(s, n, rng) for s, n in drawn])

    def _sample(self, symbol: str, hops: int, rng: random.Random) -> Sample:
        prompt = [BOS, *f"f^{hops}({symbol})"]
        return Sample([IDS[t] for t in prompt], [Completion([IDS[t] for t in self.trace(symbol, hops, rng)])])


def is_right(ids: Sequence[int], answer: str) -> bool:
    """Whether a completion ends with this answer."""
    return list(ids[-3:]) == [IDS[ANSWER], IDS[answer], IDS[EOS]]


def checks_of(ids: Sequence[int]) -> int:
    """How many checks a completion begins."""
    return sum(VOCABULARY[i] in CHECKS for i in ids)
