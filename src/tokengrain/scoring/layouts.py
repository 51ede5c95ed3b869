"""Rows of tokens for a forward pass, and where in them every counted token is predicted.

A *tree* is a prompt with some of its completions; a row holds one tree (or several, when packed):

    shared    prompt | completion 1 | completion 2 | ...     the prompt is computed once
    separate  prompt | completion 1                          one row per completion, plain causal text

Position ids restart at the prompt's end for every completion, which attends to its prompt and itself (`visible`). A
completion's token is predicted by the one before it, the first by the prompt's last: this module is the only place that
knows. Tokens after the last counted one are left out. Scores of tokens that were read are asked for at the token
("itself" below), which is then in the rows too. A prompt's images stand in it as placeholder tokens.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tokengrain.batch import TokenBatch, balanced, first_fit
from tokengrain.vision import padding_token

Layout = Literal["auto", "shared", "separate"]
PACK_MULTIPLE = 128  # FlexAttention's block
PACKED_WIDTH = 2048  # of rows with several trees on a CPU, where a mask of all pairs is made, though hardly read


@dataclass(frozen=True)
class RowCosts:
    """What a forward pass costs, in units of one token's matrix products at hidden size 1."""

    hidden_size: int
    overhead_tokens: int = 32  # tokens whose products take as long as starting one more forward pass
    by_parts: bool = False  # whether attention in shared rows leaves out what the mask hides (`TreeMask`)

    def row(self, width: int, *, causal: bool) -> float:
        """One row of `width` tokens through one layer: products grow with its length, attention squared.

        A layer multiplies each token with about 12 H^2 weights; attention takes 2 H per pair of tokens, half of them
        in a causal row, and moves its data about twice as slowly. Attention by parts does not depend on the width and
        is left out.
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
class Sight:
    """What a model asks of rows with images or videos."""

    placeholders: frozenset[int] = frozenset()  # tokens in whose place features are put, which padding must not be
    rope: bool = False  # three positions per token
    blocks: bool = False  # tokens of one image see each other


@dataclass(frozen=True)
class Rows:
    """One rectangle of tokens: B rows of width L, n counted tokens predicted in it."""

    input_ids: Tensor  # long [B, L], padded on the right with a token of each row's text
    tree: Tensor  # long [B, L], which prompt of the row a token belongs to; -1 for padding
    branch: Tensor  # long [B, L], 0 in the prompt, k in its k-th completion
    position: Tensor  # long [B, L], the logical position, 0 at the prompt's first token
    once: Tensor  # bool [B, L], each token of the batch in one place: no padding, of a repeated prompt the first
    source: Tensor  # long [n], flat position in [B * L] that predicts a counted token (or is it)
    target: Tensor  # long [n], index of that counted token in the batch's flat vectors
    causal: bool  # whether every row is one plain text, so that no mask is needed
    prompts: tuple[int, ...]  # the batch's prompts in the order of the rows: a repeated one is there again
    # Of prompts with images or videos: None where the model does not need it.
    rope: Tensor | None = None  # long [3, B, L], positions of models with several per token
    types: Tensor | None = None  # long [B, L], 0 for text, 1 for an image's token, 2 for a video's
    block: Tensor | None = None  # long [B, L], the prompt's image that a token belongs to, -1 for none

    def to(self, device: torch.device) -> Rows:
        moved: dict[str, Any] = {name: t.to(device) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True)
class _Tree:
    prompt: int
    completions: tuple[int, ...]
    length: int

    @property
    def causal(self) -> bool:
        return len(self.completions) <= 1

    def split(self, source: Source) -> tuple[int, list[int]]:
        """Lengths of prompt and completions; of one plain text, which is all prompt, no completions."""
        if self.causal:
            return self.length, []
        return source.prompt_length(self.prompt), [source.kept[c] for c in self.completions]


class HasLength(Protocol):
    @property
    def length(self) -> int: ...


Row = TypeVar("Row", bound=HasLength)


class Source:
    """A batch's lengths as Python numbers, and its ids on the CPU."""

    def __init__(self, batch: TokenBatch, itself: bool = False, sight: Sight | None = None) -> None:
        self.itself, self.sight = itself, sight
        self.vision = batch.vision or (None,) * batch.n_prompts
        self.prompt_ids, self.completion_ids = batch.prompt_ids.cpu(), batch.completion_ids.cpu()
        self.counted = batch.counted.cpu()
        self.prompt_bounds = batch.prompt_offsets.tolist()
        self.bounds = batch.completion_offsets.tolist()
        self.flat_bounds = batch.segments.offsets.tolist()
        self.completions: list[list[int]] = [[] for _ in range(batch.n_prompts)]
        for completion, prompt in enumerate(batch.group.tolist()):
            self.completions[prompt].append(completion)
        # Tokens of each completion that predict a counted one (or are one): up to the last counted.
        last = torch.where(self.counted, torch.arange(len(self.counted)) + int(itself), -1)
        self.kept = [max(int(last[a:b].max()) - a, 0) if b > a else 0 for a, b in zip(self.bounds, self.bounds[1:])]
        for prompt, completions in enumerate(self.completions):
            if completions and self.prompt_length(prompt) == 0:
                raise ValueError(f"row {batch.row(prompt)}: the prompt is empty, so nothing predicts the first token")

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
    sight: Sight | None = None,
) -> list[Rows]:
    """Lay a batch out in rectangles, one forward pass each, on the CPU. Raises ValueError for an empty prompt.

    Args:
        layout: "shared", "separate", or "auto": per prompt whichever costs less.
        max_row_tokens: bound on B * L of one forward pass (a single longer row still runs).
        one_forward: put everything into one rectangle: ranks that shard a model must run equally many.
        pack: always put several trees into one row (FlexAttention skips what is masked). Where attention goes by
            parts, that is done if it costs less.
        itself: counted tokens are looked up at themselves and not where they are predicted.
        sight: of a batch with images or videos.
    """
    source = Source(batch, itself, sight)
    trees = [t for g in range(batch.n_prompts) for t in _trees(source, g, layout, costs)]
    if pack:
        packed = first_fit([t.length for t in trees], None if one_forward else max_row_tokens)
        return [_build(source, [[trees[i] for i in row]], PACK_MULTIPLE) for row in packed]
    if one_forward:
        return [_build(source, [[t] for t in trees])] if trees else []
    chunks = []
    for causal in (True, False):
        alike = sorted((t for t in trees if t.causal == causal), key=lambda t: -t.length)
        chunks += buckets(alike, costs, causal, max_row_tokens)
    if costs.by_parts and layout != "separate" and sight is None and max_row_tokens is None and len(trees) > 1:
        rows = _filled(trees)
        apart = sum(_chunk_cost(source, [[t] for t in chunk], costs) for chunk in chunks)
        if _chunk_cost(source, rows, costs) < apart:
            return [_build(source, rows)]
    return [_build(source, [[t] for t in chunk]) for chunk in chunks]


def _filled(trees: Sequence[_Tree]) -> list[list[_Tree]]:
    """All trees in rows of similar length: so many rows that padding is least, and none much wider than
    `PACKED_WIDTH`."""
    lengths = [t.length for t in trees]
    width = max(PACKED_WIDTH, *lengths)
    fewest, most = math.ceil(sum(lengths) / (1.5 * width)), math.ceil(sum(lengths) / width)
    made = (balanced(lengths, count) for count in range(fewest, most + 1))
    least = min(made, key=lambda rows: len(rows) * max(sum(lengths[i] for i in row) for row in rows))
    return [[trees[i] for i in row] for row in least]


def _chunk_cost(source: Source, rows: Sequence[Sequence[_Tree]], costs: RowCosts) -> float:
    """One forward pass over a rectangle, with attention by parts where that is faster."""
    width = max(sum(t.length for t in row) for row in rows)
    causal = all(len(row) == 1 and row[0].causal for row in rows)
    cost = costs.chunk(len(rows), width, causal=causal)
    if causal:
        return cost
    parts = sum(costs.parts(*t.split(source)) for row in rows for t in row)
    return cost + min(parts, len(rows) * costs.dense(width))


def _trees(source: Source, prompt: int, layout: Layout, costs: RowCosts) -> list[_Tree]:
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


def buckets(trees: Sequence[Row], costs: RowCosts, causal: bool, max_row_tokens: int | None) -> list[list[Row]]:
    """Cut trees (or other rows), longest first, into rectangles of least total cost (dynamic programming)."""
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


def _build(source: Source, rows: Sequence[Sequence[_Tree]], multiple: int = 1) -> Rows:
    width = max(sum(t.length for t in row) for row in rows)
    width = -(-width // multiple) * multiple
    shape = (len(rows), width)
    tree_index, once = torch.full(shape, -1), torch.zeros(shape, dtype=torch.bool)
    made = {name: torch.zeros(shape, dtype=torch.long) for name in ("input_ids", "branch", "position")}
    sight = source.sight
    if sight is not None:
        made["types"] = torch.zeros(shape, dtype=torch.long)
        made |= {"rope": torch.zeros((3, *shape), dtype=torch.long)} if sight.rope else {}
        made |= {"block": torch.full(shape, -1)} if sight.blocks else {}
    sources, targets = [], []
    for r, row in enumerate(rows):
        at = 0
        for number, tree in enumerate(row):
            span = slice(at, at + tree.length)
            for name, values in _tree_tensors(source, tree).items():
                if name in made:
                    made[name][..., r, span] = values
            tree_index[r, span] = number
            repeated = tree.completions[:1] != tuple(source.completions[tree.prompt][:1])
            once[r, at + (source.prompt_length(tree.prompt) if repeated else 0) : at + tree.length] = True
            for index, flat in _predictors(source, tree):
                sources.append(index + (r * width + at))
                targets.append(flat)
            at += tree.length
        asking = sight.placeholders if sight is not None else ()
        made["input_ids"][r, at:] = padding_token(made["input_ids"][r, :1].tolist(), asking)
        made["position"][r, at:] = torch.arange(at, width) if len(row) == 1 and row[0].causal else 0
    empty = torch.empty(0, dtype=torch.long)
    return Rows(
        tree=tree_index,
        once=once,
        source=torch.cat([empty, *sources]),
        target=torch.cat([empty, *targets]),
        causal=all(len(row) == 1 and row[0].causal for row in rows),
        prompts=tuple(tree.prompt for row in rows for tree in row),
        **made,
    )


def _tree_tensors(source: Source, tree: _Tree) -> dict[str, Tensor]:
    """The fields `[length]` of `Rows` that a tree fills; `rope` `[3, length]`."""
    (a, b), vision = source.prompt_bounds[tree.prompt : tree.prompt + 2], source.vision[tree.prompt]
    length, text = tree.length, torch.zeros(tree.length - (b - a), dtype=torch.long)
    ids, branches, positions = [source.prompt_ids[a:b]], [torch.zeros(b - a)], [torch.arange(b - a)]
    for k, c in enumerate(tree.completions):
        kept = source.kept[c]
        ids.append(source.completion_ids[source.bounds[c] : source.bounds[c] + kept])
        branches.append(torch.full((kept,), k + 1.0))
        positions.append(torch.arange(b - a, b - a + kept))
    position = torch.cat(positions)
    made = {"input_ids": torch.cat(ids), "branch": torch.cat(branches).long(), "position": position}
    if vision is None:
        return {**made, "rope": position.expand(3, -1)}
    if vision.positions is not None:
        # A completion goes on where the prompt's largest position ends: an image takes fewer than it has tokens.
        after = (position[b - a :] - (b - a) + vision.next).expand(3, -1)
        made["rope"] = torch.cat([vision.positions, after], 1)
    for name, given, fill in (("types", vision.types, 0), ("block", vision.blocks, -1)):
        made[name] = torch.full((length,), fill) if given is None else torch.cat([given, text + fill])
    return made


def _predictors(source: Source, tree: _Tree) -> list[tuple[Tensor, Tensor]]:
    """For each completion: positions in the tree that predict its counted tokens (or are them), and flat indices."""
    out, base = [], (prompt := source.prompt_length(tree.prompt))
    for c in tree.completions:
        offsets = source.counted[source.bounds[c] : source.bounds[c + 1]].nonzero().squeeze(1)
        at = base + offsets if source.itself else torch.where(offsets == 0, prompt - 1, base + offsets - 1)
        out.append((at, torch.arange(source.flat_bounds[c], source.flat_bounds[c + 1])))
        base += source.kept[c]
    return out


# ---- Attention masks of a layout, from one description of which token may see which.
#
# Dense masks are *additive* floats `[B, 1, L, L]`: boolean ones are silently wrong in eager attention (gemma2,
# gpt_oss). A sliding window counts logical positions, so that it is what the text alone would see.

SINGLE = ""
# Attributes that some attention code uses as a window of its own making, in physical positions.
OTHER_WINDOWS = ("window_size", "attention_window", "local_attention", "attention_window_size", "local_window_size")
PROBED_WINDOW = 512


class NotShareableError(Exception):
    """No mask of a shared row can be given for the model; the message says why."""


@dataclass(frozen=True)
class MaskForm:
    """How a model takes masks."""

    # Sliding window (None: all) per kind of layer; the key "" alone: the model takes one mask, not one per kind.
    windows: Mapping[str, int | None]
    blocks: bool = False  # whether the tokens of one image see each other

    @property
    def window(self) -> int | None:
        """The shortest window, which a probe should be longer than."""
        return min((w for w in self.windows.values() if w is not None), default=None)


def mask_forms(config: Any) -> list[MaskForm]:
    """The forms a model with this text config may take its masks in, likeliest first.

    Raises NotShareableError for layers that carry state, or windows that no mask can express.
    """
    implementation = getattr(config, "_attn_implementation", None) or "eager"
    if "flash" in implementation:
        raise NotShareableError(f"attention implementation {implementation!r} takes no mask of its own")
    for name in OTHER_WINDOWS:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > PROBED_WINDOW:
            raise NotShareableError(f"it has a window ({name}={value}) too long to test")
    window = getattr(config, "sliding_window", None)
    if not isinstance(window, int) or not getattr(config, "use_sliding_window", True):
        window = None
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        return [MaskForm({SINGLE: window})]
    unknown = kinds - {"full_attention", "sliding_attention"}
    if unknown:
        raise NotShareableError(f"it has layers of type {', '.join(sorted(unknown))}")
    by_kind = {"full_attention": None, **({"sliding_attention": window} if window is not None else {})}
    if len(kinds) > 1:
        return [MaskForm(by_kind)]
    return [MaskForm(by_kind), MaskForm({SINGLE: window if "sliding_attention" in kinds else None})]


def _visible(rows: Rows, window: int | None, row: Tensor | slice, query: Any, key: Any) -> Any:
    """The rule: an earlier token of the same tree, in the prompt or one's own branch, within the window.

    With blocks a later one of the same image too; the window still cuts the earlier ones.
    """
    same_tree = rows.tree[row, query] == rows.tree[row, key]
    own = (rows.branch[row, key] == 0) | (rows.branch[row, key] == rows.branch[row, query])
    before = key <= query
    if rows.block is not None:
        before = before | ((rows.block[row, key] == rows.block[row, query]) & (rows.block[row, key] >= 0))
    seen = same_tree & own & before
    if window is not None:
        seen = seen & (rows.position[row, key] > rows.position[row, query] - window)
    return seen


def visible(rows: Rows, window: int | None) -> Tensor:
    """Bool `[B, L, L]`: whether query (dim 1) sees key (dim 2). Padding sees padding: no row is empty."""
    index = torch.arange(rows.input_ids.shape[1], device=rows.input_ids.device)
    return _visible(rows, window, slice(None), index[:, None], index[None, :])


def mask_mod(rows: Rows, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The same rule as a FlexAttention `mask_mod(batch, head, query, key)`."""

    def mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return _visible(rows, window, batch, query, key)

    return mod


def dense_mask(rows: Rows, window: int | None, dtype: torch.dtype) -> Tensor:
    """Additive mask `[B, 1, L, L]`: 0 where a query sees a key, else the lowest number of the type."""
    seen = visible(rows, window)
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)


def _block(rows: Rows, window: int | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    (batch, width), device = rows.input_ids.shape, rows.input_ids.device
    how: dict[str, Any] = {"device": str(device), "_compile": device.type == "cuda"}
    return create_block_mask(mask_mod(rows, window), batch, None, width, width, **how)


def build_masks(rows: Rows, form: MaskForm, dtype: torch.dtype, costs: RowCosts, *, flex: bool) -> Any:
    """What to pass as `attention_mask`: a mask, or a mapping from kinds of layers to masks."""
    windows = set(form.windows.values())
    made: dict[int | None, Any] = {w: _block(rows, w) if flex else dense_mask(rows, w, dtype) for w in windows}
    if None in made and not flex and costs.by_parts and rows.block is None and not torch.compiler.is_compiling():
        trees = tree_spans(rows)
        if worth_it(rows, trees, costs):
            made[None] = TreeMask.of(made[None], trees)
    masks = {kind: made[window] for kind, window in form.windows.items()}
    return masks.get(SINGLE, masks)


# ---- Attention in shared rows on a CPU, without the pairs of tokens that the mask hides.
#
# `TreeMask` is a dense mask that knows the rows it was made for. When it reaches PyTorch's attention unchanged, the
# same numbers are put together from the parts that count: the prompt with itself, all completions with the prompt, each
# completion with itself. Whatever else a model does with the mask gives an ordinary one, and ordinary attention.
#
# The parts share one softmax. With the log-sum-exp of each part the outputs are merged exactly; the backward pass of a
# part under the *merged* output and log-sum-exp is its share of the whole backward pass (as in ring attention, Liu et
# al. 2023). On a GPU FlexAttention does this (`attn_implementation="flex_attention"`).

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
                # A prompt with one completion is one plain text.
                own = first + 1 if last - first > 2 else last
                found.append(TreeSpans(row, bounds[first], bounds[own], tuple(bounds[own + 1 : last + 1])))
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
        found.trees, found.version = trees, version_of(found)
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
    if not isinstance(attn_mask, TreeMask) or version_of(attn_mask) != attn_mask.version:
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


def version_of(mask: Tensor) -> int | None:
    """How often it was written to; None where nobody counts, in inference mode."""
    return None if mask.is_inference() else mask._version


def _sum_dtype(query: Tensor) -> torch.dtype:
    """The type of PyTorch's log-sum-exp."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32
