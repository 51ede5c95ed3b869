"""Rows of tokens for a forward pass, and where in them every counted token is predicted.

A *tree* is a prompt with some of its completions; a row holds one tree (or several, when packed):

    shared    prompt | completion 1 | completion 2 | ...     the prompt is computed once
    separate  prompt | completion 1                          one row per completion, plain causal text

Position ids restart at the prompt's end for every completion, and a completion attends to its prompt and
itself (`tokengrain.scoring.masks`). The token at offset t of a completion is predicted by the token before
it: the prompt's last token for t = 0, whichever completion it is. This module is the only place that knows.
Tokens after the last counted one predict nothing that counts and are left out of the rows. Scores of tokens that
were read are asked for at the token itself ("itself" below), which is then in the rows too.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tokengrain.batch import TokenBatch
from tokengrain.packing import first_fit

Layout = Literal["auto", "shared", "separate"]
PACK_MULTIPLE = 128  # FlexAttention's block


@dataclass(frozen=True)
class RowCosts:
    """What a forward pass costs, in units of one token's matrix products at hidden size 1.

    Attributes:
        hidden_size: of the model.
        overhead_tokens: tokens whose products take as long as starting one more forward pass.
        by_parts: whether attention in shared rows leaves out what the mask hides (`scoring.tree_attention`).
    """

    hidden_size: int
    overhead_tokens: int = 32
    by_parts: bool = False

    def row(self, width: int, *, causal: bool) -> float:
        """One row of `width` tokens through one layer: products grow with its length, attention squared.

        A layer multiplies each token with about 12 H^2 weights; attention takes 2 H per pair of tokens, half
        of them in a causal row, and moves its data about twice as slowly. Attention by parts does not depend on
        the width, so that it is left out.
        """
        attention = self.dense(width) / 2 if causal else 0.0 if self.by_parts else self.dense(width)
        return 12 * self.hidden_size * width + attention

    def dense(self, width: int) -> float:
        """Attention of one row under a mask: all pairs."""
        return 4.0 * width * width

    def parts(self, prompt: int, completions: Sequence[int]) -> float:
        """Attention of one tree by parts. Short texts attend to their future too, and each part has to be started.

        Starting one took as long as 1.5 million pairs of tokens times the hidden size, on one CPU core.
        """
        pairs = prompt**2 + sum(n * (prompt + n) for n in completions)
        return 4 * (pairs + (len(completions) + 2) * 1_500_000 / self.hidden_size)

    def tree(self, prompt: int, completions: Sequence[int]) -> float:
        """One shared row of a prompt with completions of these lengths."""
        width = prompt + sum(completions)
        attention = self.dense(width)
        if self.by_parts:
            attention = min(attention, self.parts(prompt, completions))
        return 12 * self.hidden_size * width + attention

    def chunk(self, rows: int, width: int, *, causal: bool) -> float:
        return rows * self.row(width, causal=causal) + 12 * self.hidden_size * self.overhead_tokens


@dataclass(frozen=True)
class Rows:
    """One rectangle of tokens: B rows of width L, n counted tokens predicted in it.

    Attributes:
        input_ids: long `[B, L]`, padded on the right with each row's first token.
        tree: long `[B, L]`, which prompt of the row a token belongs to; -1 for padding.
        branch: long `[B, L]`, 0 in the prompt, k in its k-th completion.
        position: long `[B, L]`, the logical position, 0 at the prompt's first token.
        source: long `[n]`, flat position in `[B * L]` that predicts a counted token (or is it).
        target: long `[n]`, index of that counted token in the batch's flat vectors.
        causal: whether every row is one plain text, so that no mask is needed.
    """

    input_ids: Tensor
    tree: Tensor
    branch: Tensor
    position: Tensor
    source: Tensor
    target: Tensor
    causal: bool

    def to(self, device: torch.device) -> Rows:
        names = ("input_ids", "tree", "branch", "position", "source", "target")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


@dataclass(frozen=True)
class _Tree:
    prompt: int
    completions: tuple[int, ...]
    length: int

    @property
    def causal(self) -> bool:
        return len(self.completions) <= 1


class _Source:
    """The batch's lengths as Python numbers, and its ids on the CPU."""

    def __init__(self, batch: TokenBatch, itself: bool = False) -> None:
        self.itself = itself
        self.prompt_ids, self.completion_ids = batch.prompt_ids.cpu(), batch.completion_ids.cpu()
        self.counted = batch.counted.cpu()
        self.prompt_bounds = batch.prompt_offsets.tolist()
        self.bounds = batch.completion_offsets.tolist()
        self.flat_bounds = batch.segments.offsets.tolist()
        self.completions: list[list[int]] = [[] for _ in range(batch.n_prompts)]
        for completion, prompt in enumerate(batch.group.tolist()):
            self.completions[prompt].append(completion)
        self.kept = self._kept()
        for prompt in range(batch.n_prompts):
            if self.prompt_length(prompt) == 0 and self.completions[prompt]:
                row = batch.rows[prompt] if batch.rows else prompt
                raise ValueError(f"row {row}: the prompt is empty, so nothing predicts the first token")

    def _kept(self) -> list[int]:
        """Tokens of each completion that predict a counted one (or are one): up to the last counted."""
        offsets = torch.arange(len(self.counted)) + int(self.itself)
        last = torch.where(self.counted, offsets, -1)
        return [max(int(last[a:b].max()) - a, 0) if b > a else 0 for a, b in zip(self.bounds, self.bounds[1:])]

    def prompt_length(self, prompt: int) -> int:
        return self.prompt_bounds[prompt + 1] - self.prompt_bounds[prompt]

    def tree(self, prompt: int, completions: Sequence[int]) -> _Tree:
        length = self.prompt_length(prompt) + sum(self.kept[c] for c in completions)
        return _Tree(prompt, tuple(completions), length)


def plan_rows(
    batch: TokenBatch,
    layout: Layout,
    costs: RowCosts,
    *,
    max_row_tokens: int | None = None,
    one_forward: bool = False,
    pack: bool = False,
    itself: bool = False,
) -> list[Rows]:
    """Lay a batch out in rectangles, one forward pass each, on the CPU.

    Args:
        batch: prompts with completions.
        layout: "shared", "separate", or "auto": per prompt whichever costs less.
        costs: the cost model that decides, and that groups rows of similar length.
        max_row_tokens: bound on B * L of one forward pass (a single longer row still runs).
        one_forward: put everything into one rectangle: ranks that shard a model must run equally many.
        pack: put several trees into one row (FlexAttention skips what is masked).
        itself: counted tokens are looked up at themselves and not where they are predicted.

    Raises:
        ValueError: an empty prompt.
    """
    source = _Source(batch, itself)
    trees = [t for g in range(batch.n_prompts) for t in _trees(source, g, layout, costs)]
    if pack:
        limit = None if one_forward else max_row_tokens
        return [_build(source, [row], PACK_MULTIPLE) for row in _packed(trees, limit)]
    if one_forward:
        return [_build(source, [[t] for t in trees])] if trees else []
    chunks = []
    for causal in (True, False):
        alike = sorted((t for t in trees if t.causal == causal), key=lambda t: -t.length)
        chunks += _buckets(alike, costs, causal, max_row_tokens)
    return [_build(source, [[t] for t in chunk]) for chunk in chunks]


def _trees(source: _Source, prompt: int, layout: Layout, costs: RowCosts) -> list[_Tree]:
    completions = source.completions[prompt]
    separate = [source.tree(prompt, [c]) for c in completions]
    if len(completions) <= 1 or layout == "separate":
        return separate
    shared = source.tree(prompt, completions)
    if layout == "auto":
        cost = sum(costs.row(t.length, causal=True) for t in separate)
        if cost <= costs.tree(source.prompt_length(prompt), [source.kept[c] for c in completions]):
            return separate
    return [shared]


def _packed(trees: Sequence[_Tree], limit: int | None) -> list[list[_Tree]]:
    """Trees in as few rows as fit the limit."""
    return [[trees[i] for i in row] for row in first_fit([t.length for t in trees], limit)]


def _buckets(trees: Sequence[_Tree], costs: RowCosts, causal: bool, max_row_tokens: int | None) -> list[list[_Tree]]:
    """Cut trees, longest first, into rectangles of least total cost (dynamic programming over the cuts)."""
    best: list[tuple[float, int]] = [(0.0, 0)]
    # Without a limit it never pays to cut between trees of one length: the later part takes the others in for no more.
    limited = max_row_tokens is not None
    starts = [i for i, t in enumerate(trees) if i == 0 or limited or t.length != trees[i - 1].length]
    for end in range(1, len(trees) + 1):
        options = []
        for start in starts[: bisect_left(starts, end)]:
            rows, width = end - start, trees[start].length
            if rows == 1 or max_row_tokens is None or rows * width <= max_row_tokens:
                options.append((best[start][0] + costs.chunk(rows, width, causal=causal), start))
        best.append(min(options))
    cuts, end = [], len(trees)
    while end:
        start = best[end][1]
        cuts.append(list(trees[start:end]))
        end = start
    return cuts[::-1]


def _build(source: _Source, rows: Sequence[Sequence[_Tree]], multiple: int = 1) -> Rows:
    width = max(sum(t.length for t in row) for row in rows)
    width = -(-width // multiple) * multiple
    shape = (len(rows), width)
    ids, branch, position = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    tree_index = torch.full(shape, -1)
    sources, targets = [], []
    for r, row in enumerate(rows):
        at = 0
        for number, tree in enumerate(row):
            span = slice(at, at + tree.length)
            ids[r, span], branch[r, span], position[r, span] = _tree_tensors(source, tree)
            tree_index[r, span] = number
            for index, flat in _predictors(source, tree):
                sources.append(index + (r * width + at))
                targets.append(flat)
            at += tree.length
        ids[r, at:] = ids[r, 0]
        position[r, at:] = torch.arange(at, width) if len(row) == 1 and row[0].causal else 0
    empty = torch.empty(0, dtype=torch.long)
    causal = all(len(row) == 1 and row[0].causal for row in rows)
    source_index = torch.cat([empty, *sources])
    return Rows(ids, tree_index, branch, position, source_index, torch.cat([empty, *targets]), causal)


def _tree_tensors(source: _Source, tree: _Tree) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, branches and positions `[length]` of a tree."""
    a, b = source.prompt_bounds[tree.prompt : tree.prompt + 2]
    ids, branches, positions = [source.prompt_ids[a:b]], [torch.zeros(b - a)], [torch.arange(b - a)]
    for k, c in enumerate(tree.completions):
        kept = source.kept[c]
        ids.append(source.completion_ids[source.bounds[c] : source.bounds[c] + kept])
        branches.append(torch.full((kept,), k + 1.0))
        positions.append(torch.arange(b - a, b - a + kept))
    return torch.cat(ids), torch.cat(branches).long(), torch.cat(positions)


def _predictors(source: _Source, tree: _Tree) -> list[tuple[Tensor, Tensor]]:
    """For each completion: positions in the tree that predict its counted tokens (or are them), and flat indices."""
    prompt = source.prompt_length(tree.prompt)
    out, base = [], prompt
    for c in tree.completions:
        offsets = source.counted[source.bounds[c] : source.bounds[c + 1]].nonzero().squeeze(1)
        at = base + offsets if source.itself else torch.where(offsets == 0, prompt - 1, base + offsets - 1)
        out.append((at, torch.arange(source.flat_bounds[c], source.flat_bounds[c + 1])))
        base += source.kept[c]
    return out
