"""A policy given by a table over the grammar's states, behind the interface of a causal language model."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from tokengrain.worlds.stories import StoriesWorld, optimal_logp
from tokengrain.worlds.stories_grammar import Grammar


class _Cache(NamedTuple):
    tables: Tensor
    states: Tensor

    def get_seq_length(self) -> int:
        return 1


class TabularModel(nn.Module):
    """Looks up the next-token distribution of the state that the tokens lead to.

    Lets exact policies (the grammar's base, the optimum) be sampled and evaluated like trained ones.

    Args:
        logp: log-probabilities on the grammar's edges, `[T, S, K]`.
    """

    table: Tensor

    def __init__(self, grammar: Grammar, logp: Tensor) -> None:
        super().__init__()
        self.grammar = grammar
        table = grammar.dense(logp, -torch.inf)
        # Behind `<end>` and in `broken` the grammar has no distribution: end at once.
        table[:, [grammar.broken, grammar.finished], grammar.eos] = 0.0
        self.register_buffer("table", table)

    def forward(self, input_ids: Tensor, cache: _Cache | None = None, **_: Any) -> Any:
        """Logits `[B, L, V]`: log-probabilities, 0 over the prompt."""
        grammar, ids = self.grammar, input_ids
        logits = torch.zeros((*ids.shape, len(grammar.vocabulary)), dtype=torch.float64)
        if cache is None:
            colon = (ids == grammar.token[":"]).int().argmax(1).tolist()
            prompts = [grammar.parse_prompt(row[: c + 1].tolist()) for row, c in zip(ids, colon)]
            tables = torch.tensor([p.table for p in prompts])
            states = torch.tensor([p.start for p in prompts])
            first = torch.tensor(colon)
        else:
            (tables, states), first = cache, torch.full((len(ids),), -1)
        for i in range(ids.shape[1]):
            moved = grammar.next_state[tables, states, ids[:, i]]
            states = moved.where(i > first, states)
            logits[:, i] = self.table[tables, states].where((i >= first)[:, None], 0.0)
        return ModelOutput(logits=logits, cache=_Cache(tables, states))


def optimal_model(world: StoriesWorld, beta: float) -> TabularModel:
    """The policy that maximises E[R] − β·KL, exactly; `beta` infinite is the grammar's base."""
    edges = world.grammar.edge_logp if beta == float("inf") else optimal_logp(world.grammar, beta)
    return TabularModel(world.grammar, edges)
