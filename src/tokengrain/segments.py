"""`Segments`: cuts a flat per-token vector into its completions; sums, means and maxima per completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def offsets_of(lengths: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Where segments of these lengths begin and end in a flat vector, long `[C + 1]`."""
    ends = torch.tensor([0, *lengths], dtype=torch.long).cumsum(0)
    return ends.to(device) if device is not None else ends


@dataclass(frozen=True)
class Segments:
    """Cuts a flat vector `[N]` into `C` consecutive segments, one per completion.

    Args:
        offsets: long `[C + 1]`, first 0, last N, not decreasing.
    """

    offsets: Tensor

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | None = None) -> Segments:
        return cls(offsets_of(lengths, device))

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens per segment, long `[C]`."""
        return self.offsets.diff()

    @cached_property
    def total(self) -> int:
        """N, the number of tokens in all segments."""
        return int(self.offsets[-1])

    @cached_property
    def ids(self) -> Tensor:
        """Segment of every token, long `[N]`."""
        segments = torch.arange(len(self), device=self.offsets.device)
        return torch.repeat_interleave(segments, self.lengths, output_size=self.total)

    @cached_property
    def positions(self) -> Tensor:
        """Place of every token in its segment, counted from 0, long `[N]`."""
        return torch.arange(self.total, device=self.offsets.device) - self.broadcast(self.offsets[:-1])

    @cached_property
    def is_last(self) -> Tensor:
        """Whether each token is the last of its segment, bool `[N]`."""
        return self.positions == self.broadcast(self.lengths) - 1

    def sum(self, values: Tensor) -> Tensor:
        """Sum per segment: `[N, ...] -> [C, ...]`; an empty segment gives 0. 16-bit values are added up in float32."""
        wide = _widened(self._checked(values))
        out = wide.new_zeros((len(self), *values.shape[1:]))
        return out.index_add(0, self.ids, wide).to(values.dtype)

    def mean(self, values: Tensor) -> Tensor:
        """Mean per segment: `[N] -> [C]`; an empty segment gives 0."""
        wide = _widened(values)
        return (self.sum(wide) / self.lengths.clamp(min=1).to(wide.dtype)).to(values.dtype)

    def max(self, values: Tensor) -> Tensor:
        """Maximum per segment: `[N] -> [C]`; an empty segment gives -inf."""
        out = values.new_full((len(self),), float("-inf"))
        return out.scatter_reduce(0, self.ids, self._checked(values), "amax", include_self=True)

    def broadcast(self, values: Tensor) -> Tensor:
        """Repeat a per-segment value for each of its tokens: `[C, ...] -> [N, ...]`."""
        return values[self.ids]

    def narrow(self, keep: Tensor) -> Segments:
        """The segments of `values[keep]`, `keep` bool `[N]`; a segment that loses all its tokens stays, empty."""
        kept = self.sum(keep.long())
        return Segments(torch.cat([kept.new_zeros(1), kept.cumsum(0)]))

    def split(self, values: Tensor) -> list[Tensor]:
        """The segments as a list of C tensors (views)."""
        return list(self._checked(values).split(self.lengths.tolist()))

    def pairs(self, per_segment: Tensor) -> tuple[Tensor, Tensor]:
        """`[2P] -> ([P] chosen, [P] rejected)`, for batches whose prompts all have two completions."""
        if len(self) % 2:
            raise ValueError(f"preference pairs need an even number of completions, got {len(self)}")
        return per_segment[0::2], per_segment[1::2]

    @cached_property
    def is_chosen(self) -> Tensor:
        """Whether each token belongs to the first completion of its pair, bool `[N]`."""
        return self.ids % 2 == 0

    def to_padded(self, values: Tensor, fill: float = 0.0) -> tuple[Tensor, Tensor]:
        """`[N, ...] -> ([C, T, ...] left-aligned, bool [C, T] mask)`, T the longest segment."""
        width = int(self.lengths.max()) if len(self) else 0
        mask = torch.arange(width, device=self.offsets.device) < self.lengths[:, None]
        out = values.new_full((len(self), width, *values.shape[1:]), fill)
        # Rows of the mask are filled in order, which is the order of the flat vector.
        return out.masked_scatter(mask.view(*mask.shape, *(1,) * (out.dim() - 2)), self._checked(values)), mask

    @staticmethod
    def from_padded(values: Tensor, mask: Tensor) -> tuple[Tensor, Segments]:
        """`([C, T, ...], [C, T] mask of tokens that count, anywhere in the row) -> (flat [N, ...], Segments)`.

        What stands at masked positions is never read, so it may be NaN or infinite.
        """
        mask = mask.bool()
        offsets = torch.cat([mask.new_zeros(1, dtype=torch.long), mask.sum(1).cumsum(0)])
        return values[mask], Segments(offsets)

    def _checked(self, values: Tensor) -> Tensor:
        if values.shape[0] != self.total:
            raise ValueError(f"flat vector has {values.shape[0]} tokens, expected {self.total}")
        return values


def _widened(values: Tensor) -> Tensor:
    """16-bit numbers in float32: bfloat16 cannot count beyond 256 one by one."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
