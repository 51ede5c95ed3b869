"""Attention in shared rows on a CPU, without the pairs of tokens that the mask hides.

A dense mask makes `scaled_dot_product_attention` compute every pair of a row, also those of two different
completions. `TreeMask` is such a mask that knows the rows it was made for. When it reaches PyTorch's attention
unchanged, the same numbers are put together from the parts that count: the prompt with itself, all completions with
the prompt, each completion with itself. Whatever else a model does with the mask (adding a bias, slicing it,
converting it) gives an ordinary dense mask, and ordinary attention.

The parts share one softmax. With the log-sum-exp of each part the outputs are merged exactly; the backward pass of a
part under the *merged* output and log-sum-exp is its share of the whole backward pass (as in ring attention, Liu et
al. 2023). On a GPU FlexAttention does this (`attn_implementation="flex_attention"`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tokengrain.scoring.layouts import RowCosts, Rows

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class TreeSpans:
    """Where a tree lies in its rectangle of rows: its row, its prompt `[start, end)`, and each completion's end."""

    row: int
    start: int
    end: int
    ends: tuple[int, ...]

    @property
    def completions(self) -> list[tuple[int, int]]:
        return list(zip((self.end, *self.ends), self.ends, strict=False))


def tree_spans(rows: Rows) -> list[TreeSpans]:
    """The trees of a rectangle, row by row."""
    found = []
    for row, (trees, branches) in enumerate(zip(rows.tree.cpu(), rows.branch.cpu(), strict=True)):
        # A completion without a token left has no span, and needs none.
        runs, counts = torch.unique_consecutive(torch.stack([trees, branches]), dim=1, return_counts=True)
        bounds = [0, *counts.cumsum(0).tolist()]
        first = 0
        for tree, same in groupby(runs[0].tolist()):
            last = first + sum(1 for _ in same)
            if tree >= 0:
                found.append(TreeSpans(row, bounds[first], bounds[first + 1], tuple(bounds[first + 2 : last + 1])))
            first = last
    return found


def worth_it(rows: Rows, trees: list[TreeSpans], costs: RowCosts) -> bool:
    """Whether attention by parts is faster than attention to all pairs of the rectangle."""
    count, width = rows.input_ids.shape
    by_parts = sum(costs.parts(t.end - t.start, [b - a for a, b in t.completions]) for t in trees)
    return by_parts < count * costs.dense(width)


class TreeMask(Tensor):
    """An additive attention mask `[B, 1, L, L]` with the trees that it was made from."""

    trees: list[TreeSpans]
    version: int | None

    @staticmethod
    def of(mask: Tensor, trees: list[TreeSpans]) -> TreeMask:
        """The same mask, knowing its trees."""
        found = mask.as_subclass(TreeMask)
        found.trees, found.version = trees, _version(found)
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            found = _attend(*args, **(kwargs or {}))
            if found is not None:
                return found
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Attention by parts, or None where it must be done in the ordinary way."""
    if not isinstance(attn_mask, TreeMask) or _version(attn_mask) != attn_mask.version:
        return None
    if dropout_p or is_causal or enable_gqa or query.dim() != 4:
        return None
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (t.to(torch.get_autocast_dtype("cpu")) for t in (query, key, value))
    alike = query.shape == key.shape == value.shape and query.dtype == key.dtype == value.dtype
    fits = query.device.type == "cpu" and (query.shape[0], query.shape[2]) == attn_mask.shape[::2]
    if not (alike and fits):
        return None
    return _TreeAttention.apply(query, key, value, attn_mask.trees, scale)


class _TreeAttention(torch.autograd.Function):
    """Queries, keys and values `[B, heads, L, D]` to outputs of that shape; zeros at padding."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, trees: list[TreeSpans], scale: float) -> Tensor:
        rows, heads, width, size = query.shape
        out = query.new_zeros(rows, width, heads, size).transpose(1, 2)  # models want it transposed next
        total = torch.zeros(rows, heads, width, dtype=_sum_dtype(query))
        for tree in trees:
            q, k, v, o, s = (t[tree.row : tree.row + 1] for t in (query, key, value, out, total))
            for a, b in [(tree.start, tree.end), *tree.completions]:
                if a < b:
                    own = (t[:, :, a:b] for t in (q, k, v))
                    o[:, :, a:b], s[:, :, a:b] = _forward(*own, 0.0, True, scale=scale)
            after, prompt = slice(tree.end, tree.ends[-1] if tree.ends else tree.end), slice(tree.start, tree.end)
            if after.start < after.stop:
                seen, lse = _forward(q[:, :, after], k[:, :, prompt], v[:, :, prompt], 0.0, False, scale=scale)
                joint = torch.logaddexp(lse, s[:, :, after])
                share = torch.exp(s[:, :, after] - joint).unsqueeze(-1)
                o[:, :, after] = torch.lerp(seen.to(share.dtype), o[:, :, after].to(share.dtype), share).to(o.dtype)
                s[:, :, after] = joint
        ctx.save_for_backward(query, key, value, out, total)
        ctx.trees, ctx.scale = trees, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grads = [torch.zeros_like(t) for t in saved[:3]]
        for tree in ctx.trees:
            here = slice(tree.row, tree.row + 1)
            prompt = slice(tree.start, tree.end)
            parts = [(prompt, prompt, True), *((slice(a, b), slice(a, b), True) for a, b in tree.completions)]
            if tree.ends:
                parts.append((slice(tree.end, tree.ends[-1]), prompt, False))
            q, k, v, out, total = (t[here] for t in saved)
            for at, to, causal in parts:
                if at.start == at.stop:
                    continue
                given = grad[here, :, at], q[:, :, at], k[:, :, to], v[:, :, to], out[:, :, at], total[:, :, at]
                d_parts = _backward(*given, 0.0, causal, scale=ctx.scale)
                for into, where, d_part in zip(grads, (at, to, to), d_parts, strict=True):
                    into[here, :, where] += d_part
        return *grads, None, None


def _version(mask: Tensor) -> int | None:
    """How often it was written to; None where nobody counts, in inference mode."""
    return None if mask.is_inference() else mask._version


def _sum_dtype(query: Tensor) -> torch.dtype:
    """The type of PyTorch's log-sum-exp."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32
