"""Attention masks of a layout, from one description of which token may see which.

Dense masks are *additive* floats `[B, 1, L, L]`: boolean ones are silently wrong in eager attention
(gemma2, gpt_oss). FlexAttention gets a `BlockMask` from the same rule. A sliding window counts logical
positions, so that it is what the text alone would see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokengrain.scoring.layouts import RowCosts, Rows
from tokengrain.scoring.tree_attention import TreeMask, tree_spans, worth_it

SINGLE = ""
# Attributes that some attention code uses as a window of its own making, in physical positions.
OTHER_WINDOWS = (
    "window_size",
    "attention_window",
    "local_attention",
    "attention_window_size",
    "local_window_size",
)
PROBED_WINDOW = 512


class NotShareableError(Exception):
    """A model for which no mask of a shared row can be given; the message says why."""


@dataclass(frozen=True)
class MaskForm:
    """How a model takes masks.

    Attributes:
        windows: sliding window (None: all) per kind of layer; the key "" alone stands for a model that takes
            one mask and not a mapping from kinds of layers.
    """

    windows: Mapping[str, int | None]

    @property
    def window(self) -> int | None:
        """The shortest window, which a probe should be longer than."""
        return min((w for w in self.windows.values() if w is not None), default=None)


def mask_forms(config: Any) -> list[MaskForm]:
    """The forms a model with this text config may take its masks in, likeliest first.

    Raises:
        NotShareableError: layers that carry state, or windows that no mask can express.
    """
    implementation = getattr(config, "_attn_implementation", None) or "eager"
    if implementation.split("|")[-1].startswith("flash") or "flash" in implementation:
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


def _visible(
    rows: Rows, window: int | None, row: Tensor | slice, query: Any, key: Any, q_index: Any, k_index: Any
) -> Any:
    """The rule: an earlier token of the same tree, in the prompt or one's own branch, within the window."""
    same_tree = rows.tree[row, query] == rows.tree[row, key]
    own = (rows.branch[row, key] == 0) | (rows.branch[row, key] == rows.branch[row, query])
    seen = same_tree & own & (k_index <= q_index)
    if window is not None:
        seen = seen & (rows.position[row, key] > rows.position[row, query] - window)
    return seen


def visible(rows: Rows, window: int | None) -> Tensor:
    """Bool `[B, L, L]`: whether query (dim 1) sees key (dim 2). Padding sees padding: no row is empty."""
    width = rows.input_ids.shape[1]
    index = torch.arange(width, device=rows.input_ids.device)
    q_index, k_index = index[:, None], index[None, :]
    everything = slice(None)
    return _visible(rows, window, everything, q_index, k_index, q_index, k_index)


def mask_mod(rows: Rows, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The same rule as a FlexAttention `mask_mod(batch, head, query, key)`."""

    def mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return _visible(rows, window, batch, query, key, query, key)

    return mod


def dense_mask(rows: Rows, window: int | None, dtype: torch.dtype) -> Tensor:
    """Additive mask `[B, 1, L, L]`: 0 where a query sees a key, else the lowest number of the type."""
    seen = visible(rows, window)
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)


def _dense(rows: Rows, window: int | None, dtype: torch.dtype, costs: RowCosts) -> Tensor:
    mask = dense_mask(rows, window, dtype)
    if window is not None or not costs.by_parts or torch.compiler.is_compiling():
        return mask
    trees = tree_spans(rows)
    return TreeMask.of(mask, trees) if worth_it(rows, trees, costs) else mask


def _block(rows: Rows, window: int | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    batch, width = rows.input_ids.shape
    device = rows.input_ids.device
    return create_block_mask(
        mask_mod(rows, window), batch, None, width, width, device=str(device), _compile=device.type == "cuda"
    )


def build_masks(rows: Rows, form: MaskForm, dtype: torch.dtype, costs: RowCosts, *, flex: bool) -> Any:
    """What to pass as `attention_mask`: a mask, or a mapping from kinds of layers to masks."""
    made: dict[int | None, Any] = {}
    for window in form.windows.values():
        if window not in made:
            made[window] = _block(rows, window) if flex else _dense(rows, window, dtype, costs)
    masks = {kind: made[window] for kind, window in form.windows.items()}
    return masks.get(SINGLE, masks)
