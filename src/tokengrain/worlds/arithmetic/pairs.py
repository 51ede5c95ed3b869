"""Right and wrong completions of the same problem, sampled from the base model or written by the generator."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from tokengrain.errors import TokengrainError
from tokengrain.worlds.arithmetic.problems import Problem, Split, rng_of, seed_of
from tokengrain.worlds.threads import single_thread

if TYPE_CHECKING:
    from tokengrain.worlds.arithmetic.world import ArithmeticWorld

SAMPLES = 8
"""Chains sampled for a prompt to find right and wrong ones; at most `PER_PROMPT` pairs are made of them."""
PER_PROMPT = 4
CHUNK = 64
"""Prompts sampled from at a time."""
ROUNDS = 50

Pair = tuple[Problem, list[int], list[int]]
"""A problem, and the token ids of a right and a wrong completion."""


def sampled_pairs(
    world: ArithmeticWorld, purpose: str, split: Split, n: int, seed: int, *, whole: bool = True
) -> list[Pair]:
    """Pairs of the base model's samples. Completions that never end, or have no text, are left out.

    Args:
        whole: completions to their end, not only up to where the reward looks.

    Raises:
        TokengrainError: the model is hardly ever both right and wrong on a prompt.
    """
    from tokengrain.rollout import HFGenerate

    sampler = HFGenerate(world.reference)
    sampling = world.sampling(seed_of(purpose, split, seed), whole=whole)
    drawn = world.stream(purpose, split, seed)
    found: list[Pair] = []
    for _ in range(ROUNDS + n // 8):
        part = list(islice(drawn, min(CHUNK, n)))
        with single_thread():
            rollouts = sampler.sample(world.items(part), n=SAMPLES, sampling=sampling)
        for problem, group in zip(part, rollouts.groups, strict=True):
            # A pair is text: a completion that is nothing but its end has none.
            whole_texts = (tuple(c.ids) for c in group if not c.truncated and world.decode(c.ids))
            ended = [list(ids) for ids in dict.fromkeys(whole_texts)]
            right = [ids for ids in ended if world.audit(problem.text, ids).correct]
            wrong = [ids for ids in ended if not world.audit(problem.text, ids).correct]
            found += [(problem, a, b) for a, b in zip(right[:PER_PROMPT], wrong)]
        if len(found) >= n:
            return found[:n]
    raise TokengrainError(f"world {world.name}: the base model's samples gave {len(found)} pairs, not {n}")


def written_pairs(world: ArithmeticWorld, purpose: str, split: Split, n: int, seed: int) -> list[Pair]:
    """Pairs of the generator's chains."""
    rng = rng_of(world.name, "written", purpose, split, seed)
    found = []
    for problem in islice(world.stream(purpose, split, seed), n):
        sides: dict[bool, list[int]] = {}
        while len(sides) < 2:
            ids = [*world.encode(world.completion(problem, rng)), world.eos]
            sides.setdefault(world.audit(problem.text, ids).correct, ids)
        found.append((problem, sides[True], sides[False]))
    return found
