"""Samples of the grammar's base policy, and preference pairs labelled by the true reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tokengrain.errors import RecipeError
from tokengrain.files import fingerprint
from tokengrain.worlds.stories.grammar import Grammar, Prompt

Split = Literal["train", "eval"]


def random_stream(purpose: str, split: Split, seed: int) -> torch.Generator:
    """Random numbers of their own for each purpose, split and seed.

    Raises:
        RecipeError: another split.
    """
    if split not in get_args(Split):
        raise RecipeError(f"world stories: split is {split!r}; expected train or eval")
    return torch.Generator().manual_seed(int(fingerprint(["stories", purpose, split, seed]), 16) >> 1)


@dataclass(frozen=True)
class Samples:
    """Completions sampled from the grammar. Shapes: n completions, L their longest (in tokens).

    Attributes:
        prompts: the prompt of each completion.
        ids: long `[n, L]`, token ids with `<end>`, then padding.
        states: long `[n, L]`, the state before each token (`finished` after `<end>`).
        lengths: long `[n]`, tokens with `<end>`.
        rewards: `[n]`, true reward.
    """

    prompts: list[Prompt]
    ids: Tensor
    states: Tensor
    lengths: Tensor
    rewards: Tensor

    def completion_ids(self, index: int) -> list[int]:
        """Token ids of one completion, `<end>` included."""
        return self.ids[index, : int(self.lengths[index])].tolist()


def sample(grammar: Grammar, prompts: Sequence[Prompt], generator: torch.Generator) -> Samples:
    """One completion per prompt from the base distribution."""
    table = torch.tensor([p.table for p in prompts])
    state = torch.tensor([p.start for p in prompts])
    done = torch.zeros(len(prompts), dtype=torch.bool)
    rewards = torch.zeros(len(prompts), dtype=torch.float64)
    cumulative = grammar.edge_logp.exp().cumsum(-1)
    ids, states = [], []
    while not done.all():
        u = torch.rand(len(prompts), 1, generator=generator, dtype=torch.float64)
        here = cumulative[table, state]
        edge = (u * here[:, -1:] >= here).sum(-1).clamp(max=here.shape[1] - 1)
        token = grammar.edge_token[table, state, edge]
        ids.append(token.where(~done, grammar.pad))
        states.append(state)
        rewards += grammar.edge_reward[table, state, edge].where(~done, 0.0)
        state = grammar.edge_next[table, state, edge]
        done = state == grammar.finished
    ids_, states_ = torch.stack(ids, 1), torch.stack(states, 1)
    return Samples(list(prompts), ids_, states_, (states_ != grammar.finished).sum(1), rewards)


def preference_pairs(
    grammar: Grammar, n: int, slope: float, generator: torch.Generator, prefix: str
) -> list[dict[str, Any]]:
    """Pairs of base samples with a Bradley-Terry label on the true reward.

    Args:
        n: how many pairs; the plain prompts take turns.
        slope: P(first is chosen) = σ(slope · (R1 − R2)); larger is cleaner.
        prefix: start of the pairs' `id`.

    Returns:
        Rows with `prompt`, `chosen`, `rejected` (text without `<end>`), `id`, `chosen_reward`,
        `rejected_reward`.
    """
    rows: list[dict[str, Any]] = []
    while len(rows) < n:
        count = n - len(rows)
        prompts = [grammar.plain[(len(rows) + i) % len(grammar.plain)] for i in range(count)]
        both = sample(grammar, [p for p in prompts for _ in range(2)], generator)
        first, second = both.rewards[0::2], both.rewards[1::2]
        u = torch.rand(count, generator=generator, dtype=torch.float64)
        first_wins = (u < (slope * (first - second)).sigmoid()).tolist()
        for i, (prompt, wins) in enumerate(zip(prompts, first_wins)):
            chosen, rejected = (2 * i, 2 * i + 1) if wins else (2 * i + 1, 2 * i)
            texts = [grammar.decode(both.completion_ids(j)) for j in (chosen, rejected)]
            if texts[0] == texts[1]:  # says nothing about a preference
                continue
            rows.append(
                {
                    "prompt": prompt.text,
                    "chosen": texts[0],
                    "rejected": texts[1],
                    "id": f"{prefix}-{len(rows)}",
                    "chosen_reward": float(both.rewards[chosen]),
                    "rejected_reward": float(both.rewards[rejected]),
                }
            )
    return rows
