"""A task whose reference answers say little about the reasoning: a value is looked up, then stated in 40 tokens.

A prompt `A3F7C1D9?C` has four keys with their values and asks for one. The chain of thought is a value and `>`; the
answer is a template of 40 tokens with the chain's value in two slots. Specification: dro.md, section 7.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor

from experiments.claims.tiny_lm import token_batch
from tokengrain.batch import TokenBatch
from tokengrain.worlds.arithmetic import build_tokenizer
from tokengrain.worlds.base_models import BOS, EOS, PAD

KEYS, VALUES = "ABCDEFGH", "0123456789"
QUERY, MARKER = "?", ">"
PAIRS = 4
LENGTH = 40
"""Tokens of an answer."""
SLOTS = (12, 30)
"""Where the value stands in it."""
P_RIGHT = 0.4
"""How often the chain of a text to imitate has the right value; else one of the other three of the prompt."""
P_FOLLOWS = 0.95
"""How often a slot of such a text has the chain's value, each by itself; else any of the prompt's four.

Were it 1, the second slot could as well be copied from the first, and some models do: then it hardly depends on the
chain.
"""
P_FIRST = 0.7
"""How often the first of the two words of a place stands there, whatever the chain."""
WORDS = [f" {a}{b}" for a, b in product("bcdfghjklmnpqrst", "aeiou")][: 2 * LENGTH]
VOCABULARY = (PAD, BOS, EOS, QUERY, MARKER, *KEYS, *VALUES, *WORDS)
IDS = {token: place for place, token in enumerate(VOCABULARY)}
PROMPT = 1 + 2 * PAIRS + 2
"""Tokens of a prompt, with `<s>`."""
CHAIN = 2
"""Tokens of a chain, with the marker."""


class Slots:
    """The task of a seed: its prompts with references, texts to imitate, and whether a chain is right."""

    max_new_tokens = CHAIN

    def __init__(self, seed: int, n_prompts: int) -> None:
        self.seed, self.n_prompts = seed, n_prompts

    @cached_property
    def tokenizer(self) -> Any:
        return build_tokenizer(VOCABULARY, PROMPT + CHAIN + LENGTH + 1)

    def prompts(self) -> list[dict[str, Any]]:
        """Rows to train on: `prompt`, `reference` (token ids), `value` (the right one's id), `id`."""
        generator = torch.Generator().manual_seed(self.seed)
        prompts, values = draw_prompts(self.n_prompts, generator)
        references = answers(values[:, :1], generator).tolist()
        written = ["".join(VOCABULARY[i] for i in ids[1:]) for ids in prompts.tolist()]
        rows = zip(written, references, values[:, 0].tolist(), strict=True)
        return [{"prompt": p, "reference": r, "value": v, "id": str(n)} for n, (p, r, v) in enumerate(rows)]

    def reward(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        *,
        value: Sequence[int],
        **columns: Any,
    ) -> list[float]:
        """1 for a chain that is the right value and the marker, else 0."""
        return [float(list(ids[:CHAIN]) == [v, IDS[MARKER]]) for ids, v in zip(completion_ids, value, strict=True)]


def draw_prompts(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Prompts `[n, 11]` and the values in them `[n, 4]`, the one that is asked for first; token ids."""
    keys = IDS[KEYS[0]] + torch.rand(n, len(KEYS), generator=generator).argsort(1)[:, :PAIRS]
    values = IDS[VALUES[0]] + torch.rand(n, len(VALUES), generator=generator).argsort(1)[:, :PAIRS]
    order = torch.rand(n, PAIRS, generator=generator).argsort(1)[..., None]
    pairs = torch.stack([keys, values], 2).gather(1, order.expand(-1, -1, 2)).flatten(1)
    start, query = (torch.full((n, 1), IDS[token]) for token in (BOS, QUERY))
    return torch.cat([start, pairs, query, keys[:, :1]], 1), values


def answers(values: Tensor, generator: torch.Generator) -> Tensor:
    """The template `[n, 40]`: values `[n, 2]`, or `[n, 1]` twice, in its slots, one of two words at other places."""
    second = (torch.rand(len(values), LENGTH, generator=generator) >= P_FIRST).long()
    found = IDS[WORDS[0]] + 2 * torch.arange(LENGTH) + second
    found[:, list(SLOTS)] = values
    return found


def lookups(steps: int, size: int, generator: torch.Generator) -> Iterator[TokenBatch]:
    """Prompts with the right value alone."""
    for _ in range(steps):
        prompts, values = draw_prompts(size, generator)
        yield token_batch(prompts, values[:, None, :1])


def texts(steps: int, size: int, generator: torch.Generator) -> Iterator[TokenBatch]:
    """Prompts with a chain, right or wrong, an answer that mostly follows it, and an end."""
    for _ in range(steps):
        prompts, values = draw_prompts(size, generator)
        wrong = torch.rand(size, generator=generator) >= P_RIGHT
        which = wrong * torch.randint(1, PAIRS, (size,), generator=generator)
        said = values.gather(1, which[:, None])
        follows = torch.rand(size, len(SLOTS), generator=generator) < P_FOLLOWS
        stated = torch.where(follows, said, values.gather(1, torch.randint(PAIRS, follows.shape, generator=generator)))
        marker, end = (torch.full_like(said, IDS[token]) for token in (MARKER, EOS))
        yield token_batch(prompts, torch.cat([said, marker, answers(stated, generator), end], 1)[:, None])
