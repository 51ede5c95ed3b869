"""Docids in a trie of arrays, and beam search that generates nothing else.

`search` gives what transformers' beam search gives with `prefix_allowed_tokens_fn` and `early_stopping=False`: the
same docids and scores. There, every beam asks Python for its tokens at each step; here a beam is a number of a node,
and a step looks up the children of all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokengrain.errors import DataError, require
from tokengrain.scoring.encdec import DecoderSteps, start_id
from tokengrain.scoring.model import evaluating
from tokengrain.settings import check_choice

LengthRule = Literal["sum", "mean"]


class Trie:
    """Sequences of token ids by their beginnings.

    Nodes are numbered level by level from the root, 0, children in order of their tokens: those of node n are
    `first[n] + 1` to `first[n + 1]`. A node whose children are none, or which `ends`, is a whole sequence.

    Args:
        sequences: token ids; equal ones are one.

    Attributes:
        sequences: the different ones, sorted.
        token: long `[nodes]`, the last token of each node's prefix (of the root: -1).
        first: long `[nodes + 1]`, as above.
        ends: long `[nodes]`, which sequence ends there; -1: none.

    Raises:
        DataError: no sequences.
    """

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self.sequences = sorted({tuple(map(int, s)) for s in sequences})
        require(self.sequences, DataError, "a trie of docids needs at least one docid, got none")
        lengths = np.array([len(s) for s in self.sequences])
        at = np.zeros(len(lengths), dtype=np.int64)  # node of each sequence's prefix, level by level
        parents, tokens, count = [np.array([-1])], [np.array([-1])], 1
        for level in range(int(lengths.max())):
            rows = np.flatnonzero(lengths > level)
            token = np.array([self.sequences[row][level] for row in rows])
            new = np.ones(len(rows), dtype=bool)
            new[1:] = (at[rows][1:] != at[rows][:-1]) | (token[1:] != token[:-1])
            parents.append(at[rows][new])
            tokens.append(token[new])
            at[rows] = count + np.cumsum(new) - 1
            count += int(new.sum())
        children = np.bincount(np.concatenate(parents)[1:], minlength=count)
        self.token = torch.from_numpy(np.concatenate(tokens))
        self.first = torch.from_numpy(np.concatenate([[0], np.cumsum(children)]))
        self.ends = torch.full((count,), -1)
        self.ends[torch.from_numpy(at)] = torch.arange(len(at))

    def to(self, device: torch.device | str) -> Trie:
        """The same trie with its arrays on `device`."""
        moved = object.__new__(Trie)
        moved.sequences = self.sequences
        moved.token, moved.first, moved.ends = (x.to(device) for x in (self.token, self.first, self.ends))
        return moved

    def __len__(self) -> int:
        return len(self.sequences)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return iter(self.sequences)

    def children(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """All children of nodes `[n]`: `(which of the nodes [c], child [c])`."""
        count = self.first[nodes + 1] - self.first[nodes]
        which = torch.repeat_interleave(count)
        place = torch.arange(len(which), device=nodes.device) - (count.cumsum(0) - count)[which]
        return which, self.first[nodes][which] + place + 1

    def is_leaf(self, nodes: Tensor) -> Tensor:
        return self.first[nodes + 1] == self.first[nodes]

    def allowed(self, prefix: Sequence[int]) -> list[int]:
        """The tokens that may follow, in order; none for an unknown prefix or after a whole docid."""
        node = 0
        for wanted in prefix:
            start, stop = self.first[node : node + 2].tolist()
            row = self.token[start + 1 : stop + 1]
            place = int(torch.searchsorted(row, int(wanted)))
            if place == len(row) or int(row[place]) != wanted:
                return []
            node = start + 1 + place
        start, stop = self.first[node : node + 2].tolist()
        return list(map(int, self.token[start + 1 : stop + 1].tolist()))

    def allowed_fn(self, pad_id: int, start: int = 1) -> Callable[[int, Tensor], list[int]]:
        """For `generate(prefix_allowed_tokens_fn=...)`: after `start` tokens only docids, padding after a whole one."""
        return lambda _, ids: self.allowed(ids[start:].tolist()) or [pad_id]


# ---- Beam search over a trie ----


class Found(NamedTuple):
    """A docid with its score: the sum (or mean) of the log-probabilities of its tokens, nats."""

    docid: tuple[int, ...]
    score: float


Step = Callable[[Tensor, Tensor], Tensor]
"""`step(parents [n], tokens [n]) -> [n, V]` log-probabilities: beam i continues beam `parents[i]` of the last call
with `tokens[i]`; in the first call, beams are queries and tokens the start token."""


def beam_search(
    step: Step,
    queries: int,
    trie: Trie,
    *,
    start_id: int,
    beams: int,
    length: LengthRule = "sum",
    renormalise: bool = False,
) -> list[list[Found]]:
    """The best docids for each of a number of queries, at most `beams` each, best first.

    Args:
        step: the model; see `Step`.
        length: how log-probabilities become a score: "sum", which is what DDRO trains, or "mean" (per token), by
            which transformers ranks by default. A query then ends as transformers ends it: when `beams` docids
            are whole and the best beam's mean so far is below theirs.
        renormalise: probabilities are divided by those of the tokens that the trie allows, so that those of all
            docids add up to 1.
    """
    check_choice("length", length, LengthRule)
    device = trie.token.device
    query = parents = torch.arange(queries, device=device)
    node, tokens = torch.zeros_like(query), torch.full_like(query, start_id)
    total: Tensor | None = None
    pools = [Pool(beams) for _ in range(queries)]
    steps = 0
    while len(node):
        logps, steps = step(parents, tokens), steps + 1
        which, child = trie.children(node)
        gain = logps[which, trie.token[child]]
        if renormalise:
            gain = gain - _log_sum(gain, which, len(node))[which]
        total, query = gain if total is None else total[which] + gain, query[which]
        order = torch.argsort(total, descending=True, stable=True)
        order = order[torch.argsort(query[order], stable=True)]
        which, child, total, query = which[order], child[order], total[order], query[order]
        divisor = 1 if length == "sum" else steps
        ends = (trie.ends[child] >= 0) & (_place(query) < beams)  # as in transformers: no backups
        for q, docid, score in zip(query[ends].tolist(), trie.ends[child[ends]].tolist(), total[ends].tolist()):
            pools[q].add(docid, score / divisor)
        on = torch.nonzero(~trie.is_leaf(child)).flatten()
        on = on[_place(query[on]) < beams]
        bars = torch.tensor([pool.bar for pool in pools], dtype=total.dtype, device=device)
        best = torch.full_like(bars, -torch.inf).scatter_reduce(0, query[on], total[on], "amax")
        on = on[(best / divisor > bars)[query[on]]]
        parents, node, query, total = which[on], child[on], query[on], total[on]
        tokens = trie.token[node]
    return [[Found(trie.sequences[docid], score) for docid, score in pool.best] for pool in pools]


class Pool:
    """The best whole docids of a query so far; no beam at or below the `bar` can get among them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.best: list[tuple[int, float]] = []

    def add(self, docid: int, score: float) -> None:
        self.best = sorted([*self.best, (docid, score)], key=lambda one: -one[1])[: self.size]

    @property
    def bar(self) -> float:
        return self.best[-1][1] if len(self.best) == self.size else -torch.inf


def _place(query: Tensor) -> Tensor:
    """Place of each entry among those of its query, for entries in order of queries."""
    position = torch.arange(len(query), device=query.device)
    return position - torch.searchsorted(query, query)


def _log_sum(values: Tensor, which: Tensor, count: int) -> Tensor:
    top = values.new_full((count,), -torch.inf).scatter_reduce(0, which, values, "amax")
    return top + values.new_zeros(count).index_add(0, which, (values - top[which]).exp()).log()


@torch.no_grad()
def search(
    model: Any,
    prompts: Sequence[Sequence[int]],
    trie: Trie,
    *,
    beams: int = 20,
    length: LengthRule = "sum",
    renormalise: bool = False,
    queries_at_once: int = 16,
) -> list[list[Found]]:
    """The docids that an encoder-decoder ranks highest for each prompt; see `beam_search`.

    With as many beams as docids the ranking is exact, and `exp` of the sums adds up to the probability that the model
    generates a docid at all.

    Args:
        prompts: token ids of the queries.
        queries_at_once: bounds the memory.
    """
    trie = trie.to(model.device)
    first, found = start_id(model), []
    for begin in range(0, len(prompts), queries_at_once):
        part = prompts[begin : begin + queries_at_once]
        settings: dict[str, Any] = {"beams": beams, "length": length, "renormalise": renormalise}
        with evaluating(model):
            found += beam_search(DecoderSteps(model, part), len(part), trie, start_id=first, **settings)
    return found
