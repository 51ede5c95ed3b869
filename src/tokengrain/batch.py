"""`TokenBatch`: prompts, each with any number of completions, and flat per-token vectors.

A preference pair is a prompt with two completions (chosen first, rejected second); one chosen completion may stand
against several rejected ones. A group of samples is a prompt with G. Per-token quantities are *flat* vectors `[N]` over
the completion tokens that count, in order; `Segments` knows which completion each of them belongs to. Only
`tokengrain.scoring` shifts between a token and the position that predicts it. Tool output or a user's turn inside a
completion is context, and not in the flat vectors: `counted` is False there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from tokengrain.errors import DataError, require
from tokengrain.vision import Vision


def offsets_of(lengths: Sequence[int] | Tensor, device: torch.device | None = None) -> Tensor:
    """Where segments of these lengths begin and end in a flat vector, long `[C + 1]`."""
    lengths = torch.as_tensor(lengths, dtype=torch.long, device=device)
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


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
        """The segments of `values[keep]`, `keep` bool `[N]`; one that loses all its tokens stays, empty."""
        return Segments(offsets_of(self.sum(keep.long())))

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
        return values[mask], Segments(offsets_of(mask.sum(1)))

    def _checked(self, values: Tensor) -> Tensor:
        _check_length("flat vector", values, self.total)
        return values


def _widened(values: Tensor) -> Tensor:
    """16-bit numbers in float32: bfloat16 cannot count beyond 256 one by one."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def _check_length(what: str, values: Any, expected: int, unit: str = "tokens", of: str = "") -> None:
    if (got := len(values)) != expected:
        raise ValueError(f"{what} has {got} {unit}, expected {expected}{of}")


# ---- Putting things of known sizes into bins: micro-batches of a batch, prompts of a row.


def first_fit(sizes: Sequence[int], max_tokens: int | None) -> list[list[int]]:
    """Indices of `sizes` in bins of at most `max_tokens` (None: one bin): largest first into the first with room.

    A size beyond the limit gets a bin of its own.
    """
    if max_tokens is None:
        return [list(range(len(sizes)))] if sizes else []
    bins, room = list[list[int]](), list[int]()
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        b = next((b for b, free in enumerate(room) if sizes[index] <= free), len(bins))
        if b == len(bins):
            bins.append([])
            room.append(max_tokens)
        bins[b].append(index)
        room[b] -= sizes[index]
    return [sorted(b) for b in bins]


def balanced(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Indices of `sizes` in `count` bins of similar load: largest first into the emptiest."""
    bins: list[list[int]] = [[] for _ in range(count)]
    load = [0] * count
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        b = min(range(count), key=lambda k: (load[k], k))
        bins[b].append(index)
        load[b] += sizes[index]
    return [sorted(b) for b in bins]


PromptRole = Literal["prefix", "encoder"]


@dataclass
class Completion:
    """One completion as token ids.

    Args:
        ids: token ids, EOS or end-of-turn included.
        counted: which of them count (None: all). Tool output and user turns do not.
        columns: per-token values *over the counted tokens*, for example `token_rewards`, `ref_logps`.
    """

    ids: list[int]
    counted: list[bool] | None = None
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def n_counted(self) -> int:
        return len(self.ids) if self.counted is None else sum(self.counted)


@dataclass
class Sample:
    """One row of data as token ids: a prompt with its completions (pairs: the chosen one, then each rejected one).

    Args:
        prompt_ids: token ids of the prompt, BOS included where the tokenizer adds one.
        completions: its completions.
        row: identifies the row in messages and logs (row number or id).
        raw: the row it was made from, for credit sources that need text.
        vision: the prompt's images and videos, whose placeholder tokens are among its ids.
    """

    prompt_ids: list[int]
    completions: list[Completion]
    row: int | str = 0
    raw: Mapping[str, Any] = field(default_factory=dict)
    vision: Vision | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens when the prompt is computed once for all completions, and patches: what memory grows with."""
        patches = 0 if self.vision is None else self.vision.patches
        return len(self.prompt_ids) + patches + sum(len(c.ids) for c in self.completions)

    def again(self, completions: Sequence[Completion], **changes: Any) -> Sample:
        """The same prompt, with all that belongs to it, and other completions (or another `row` or `raw`)."""
        return replace(self, completions=list(completions), **changes)


@dataclass(frozen=True)
class Pairs:
    """The preference pairs of a batch: the first completion of each prompt against each of its others in turn."""

    completions: Tensor  # long [2P], of every pair its chosen and its rejected one
    tokens: Tensor  # long, their counted tokens, as places in the batch's flat vectors; a chosen one's n times
    segments: Segments  # of these tokens, for losses


@dataclass(frozen=True)
class TokenBatch:
    """Prompts with their completions, as flat tensors.

    Shapes: G prompts, C completions, T completion tokens, N counted completion tokens.

    Attributes:
        prompt_ids: long `[sum of prompt lengths]`.
        prompt_offsets: long `[G + 1]`.
        completion_ids: long `[T]`.
        completion_offsets: long `[C + 1]`, into `completion_ids`.
        counted: bool `[T]`, the tokens that per-token vectors are about.
        group: long `[C]`, the prompt of each completion; not decreasing.
        columns: per-token values `[N]` (or `[N, H]`), for example `token_rewards`, `ref_logps`.
        rows: one identifier per prompt.
        raw: the rows the prompts were made from (may be empty mappings).
        vision: per prompt its images and videos, None where it has none; empty: none has.
        prompt_role: "prefix" (decoder-only) or "encoder" (the prompt is the encoder's input).
    """

    prompt_ids: Tensor
    prompt_offsets: Tensor
    completion_ids: Tensor
    completion_offsets: Tensor
    counted: Tensor
    group: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: tuple[int | str, ...] = ()
    raw: tuple[Mapping[str, Any], ...] = ()
    vision: tuple[Vision | None, ...] = ()
    prompt_role: PromptRole = "prefix"

    @classmethod
    def from_samples(cls, samples: Sequence[Sample], prompt_role: PromptRole = "prefix") -> TokenBatch:
        """Collate samples. A column must be present in all completions or in none."""
        if not samples:
            raise ValueError("a TokenBatch needs at least one sample, got none")
        completions = [c for s in samples for c in s.completions]
        names = sorted({name for c in completions for name in c.columns})
        columns = {n: torch.cat([_column(s.row, c, n) for s in samples for c in s.completions]) for n in names}
        counted = [_counted(s.row, c) for s in samples for c in s.completions]
        return cls(
            prompt_ids=torch.tensor([t for s in samples for t in s.prompt_ids], dtype=torch.long),
            prompt_offsets=offsets_of([len(s.prompt_ids) for s in samples]),
            completion_ids=torch.tensor([t for c in completions for t in c.ids], dtype=torch.long),
            completion_offsets=offsets_of([len(c.ids) for c in completions]),
            counted=torch.tensor([k for keep in counted for k in keep], dtype=torch.bool),
            group=torch.tensor([g for g, s in enumerate(samples) for _ in s.completions], dtype=torch.long),
            columns=columns,
            rows=tuple(s.row for s in samples),
            raw=tuple(s.raw for s in samples),
            vision=tuple(s.vision for s in samples) if any(s.vision is not None for s in samples) else (),
            prompt_role=prompt_role,
        )

    @property
    def device(self) -> torch.device:
        return self.completion_ids.device

    @property
    def n_prompts(self) -> int:
        return self.prompt_offsets.numel() - 1

    @property
    def n_completions(self) -> int:
        return self.completion_offsets.numel() - 1

    @cached_property
    def n_tokens(self) -> int:
        """Prompt tokens (once per prompt) plus completion tokens."""
        return self.prompt_ids.numel() + self.completion_ids.numel()

    @cached_property
    def segments(self) -> Segments:
        """Segments of the flat `[N]` vectors, one per completion."""
        return Segments(self.completion_offsets).narrow(self.counted)

    @cached_property
    def labels(self) -> Tensor:
        """Token ids that are scored, long `[N]`."""
        return self.completion_ids[self.counted]

    @cached_property
    def is_pairs(self) -> bool:
        """Whether every prompt has two completions or more, the first of which is preferred to each of the others."""
        return bool((torch.bincount(self.group, minlength=self.n_prompts) >= 2).all())

    @cached_property
    def is_first(self) -> Tensor:
        """Which completions are their prompt's first (of pairs: the chosen ones), bool `[C]`."""
        return self.group.diff(prepend=self.group.new_full((1,), -1)) > 0

    @cached_property
    def is_chosen(self) -> Tensor:
        """Whether each token belongs to its prompt's first completion, bool `[N]`."""
        return self.segments.broadcast(self.is_first)

    @cached_property
    def pairs(self) -> Pairs | None:
        """The preference pairs of a batch that `is_pairs`; None where its completions, as they are, are the pairs."""
        if self.n_completions == 2 * self.n_prompts:
            return None
        rejected = (~self.is_first).nonzero()[:, 0]
        chosen = self.is_first.nonzero()[:, 0][self.group[rejected]]
        completions = torch.stack([chosen, rejected], 1).flatten()
        tokens = _gather_index(self.segments.offsets, completions.tolist())
        return Pairs(completions, tokens, Segments(offsets_of(self.segments.lengths[completions])))

    def prompt(self, index: int) -> Tensor:
        """Token ids of prompt `index`."""
        start, end = self.prompt_offsets[index : index + 2].tolist()
        return self.prompt_ids[start:end]

    def completion(self, index: int) -> Tensor:
        """Token ids of completion `index`, uncounted ones included."""
        start, end = self.completion_offsets[index : index + 2].tolist()
        return self.completion_ids[start:end]

    def sample(self, index: int, completions: Sequence[Completion] = (), **changes: Any) -> Sample:
        """Prompt `index`, with all that belongs to it, and other completions (or another `row` or `raw`)."""
        own: dict[str, Any] = {
            "row": self.row(index),
            "raw": self.raw[index] if self.raw else {},
            "vision": self.vision[index] if self.vision else None,
        }
        return Sample(self.prompt(index).tolist(), list(completions), **(own | changes))

    def row(self, prompt: int) -> int | str:
        """The row of a prompt; without rows its number."""
        return self.rows[prompt] if self.rows else prompt

    @property
    def sees(self) -> bool:
        """Whether any prompt has images or videos."""
        return any(vision is not None for vision in self.vision)

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch with every tensor on `device`."""
        names = ("prompt_ids", "prompt_offsets", "completion_ids", "completion_offsets", "counted", "group")
        moved = {name: getattr(self, name).to(device) for name in names}
        vision = tuple(v and v.to(device) for v in self.vision)
        return replace(self, **moved, columns={k: v.to(device) for k, v in self.columns.items()}, vision=vision)

    def with_columns(self, **columns: Tensor) -> TokenBatch:
        """The same batch with per-token columns added or replaced; each `[N]` or `[N, ...]`."""
        for name, values in columns.items():
            _check_length(f"column {name!r}", values, self.segments.total)
        return replace(self, columns={**self.columns, **columns})

    def narrow(self, keep: Tensor) -> TokenBatch:
        """The same text with fewer counted tokens: those where `keep`, bool `[N]`, is true.

        Tokens left out stay as context; what is computed per counted token is computed for the kept ones only.
        """
        if keep.shape != (self.segments.total,):
            raise ValueError(f"keep has shape {tuple(keep.shape)}, expected ({self.segments.total},)")
        counted = self.counted.clone()
        counted[self.counted] = keep.bool()
        return replace(self, counted=counted, columns={k: v[keep.bool()] for k, v in self.columns.items()})

    def select(self, prompts: Sequence[int], completions: Tensor | None = None) -> TokenBatch:
        """These prompts in the order given, with all completions or those where `completions`, bool `[C]`, is true."""
        prompts = list(prompts)
        by_group: list[list[int]] = [[] for _ in range(self.n_prompts)]
        taken = range(self.n_completions) if completions is None else completions.nonzero()[:, 0].tolist()
        groups = self.group.tolist()
        for index in taken:
            by_group[groups[index]].append(index)
        chosen = [c for g in prompts for c in by_group[g]]
        tokens = _gather_index(self.completion_offsets, chosen)
        flat = _gather_index(self.segments.offsets, chosen)
        return replace(
            self,
            prompt_ids=self.prompt_ids[_gather_index(self.prompt_offsets, prompts)],
            prompt_offsets=offsets_of(self.prompt_offsets.diff()[prompts]),
            completion_ids=self.completion_ids[tokens],
            completion_offsets=offsets_of(self.completion_offsets.diff()[chosen]),
            counted=self.counted[tokens],
            group=torch.tensor([i for i, g in enumerate(prompts) for _ in by_group[g]], device=self.device).long(),
            columns={k: v[flat] for k, v in self.columns.items()},
            rows=tuple(self.rows[g] for g in prompts) if self.rows else (),
            raw=tuple(self.raw[g] for g in prompts) if self.raw else (),
            vision=tuple(self.vision[g] for g in prompts) if self.vision else (),
        )

    def with_endings(
        self, starts: Sequence[Sequence[int]], endings: Sequence[Sequence[int]], group: Sequence[int] | None = None
    ) -> TokenBatch:
        """The same prompts with other completions: each a start, which does not count, and its prompt's ending.

        The prompt is computed once for all its starts. Starts and the G endings are token ids; `group` has the prompt
        of each start, not decreasing; None: those of the batch's completions.
        """
        samples = [self.sample(g) for g in range(len(endings))]
        for start, number in zip(starts, self.group.tolist() if group is None else group, strict=True):
            ids, counted = [*start, *endings[number]], [False] * len(start) + [True] * len(endings[number])
            samples[number].completions.append(Completion(ids, counted))
        return TokenBatch.from_samples(samples, self.prompt_role).to(self.device)

    def split(self, max_tokens: int | None, parts: int = 1) -> list[TokenBatch]:
        """Cut into micro-batches of whole prompts, each of at most `max_tokens` tokens where possible.

        A prompt larger than the budget gets a micro-batch of its own. At least `parts` micro-batches are made (at most
        one per prompt), so that ranks can agree on a number of forward passes.
        """
        if max_tokens is None and parts == 1:
            return [self]
        sizes = self._sizes().tolist()
        count = max(parts, len(first_fit(sizes, max_tokens)) if max_tokens is not None else 1)
        bins = balanced(sizes, min(count, len(sizes)))
        if max_tokens is not None and any(len(b) > 1 and sum(sizes[i] for i in b) > max_tokens for b in bins):
            bins = first_fit(sizes, max_tokens)
            while len(bins) < min(parts, len(sizes)):
                largest = max(bins, key=len)
                bins.remove(largest)
                bins += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
        return [self.select(b) for b in bins]

    def _sizes(self) -> Tensor:
        """Of every prompt, with its completions, what memory grows with: tokens and patches, long `[G]`.

        An encoder-decoder projects a prompt's states for the cross attention of each of its completions: about an
        eighth of what a token takes in the decoder.
        """
        prompts, lengths = self.prompt_offsets.diff(), self.completion_offsets.diff()
        sizes = prompts.index_add(0, self.group, lengths)
        if self.vision:
            sizes = sizes + sizes.new_tensor([0 if v is None else v.patches for v in self.vision])
        if self.prompt_role == "prefix":
            return sizes
        return sizes + prompts * torch.bincount(self.group, minlength=self.n_prompts) // 8

    def to_padded(self, values: Tensor, fill: float = 0.0) -> tuple[Tensor, Tensor]:
        """Flat `[N, ...]` to `([C, T, ...], mask [C, T])`; see `Segments.to_padded`."""
        return self.segments.to_padded(values, fill)


def _counted(row: int | str, completion: Completion) -> list[bool]:
    if completion.counted is None:
        return [True] * len(completion.ids)
    of = " (one per completion token)"
    _check_length(f"row {row}: `counted`", completion.counted, len(completion.ids), "entries", of)
    return completion.counted


def _column(row: int | str, completion: Completion, name: str) -> Tensor:
    if name not in completion.columns:
        raise ValueError(f"row {row}: column {name!r} is missing in one completion and present in others")
    values = torch.as_tensor(completion.columns[name])
    of = " (one per completion token that counts)"
    _check_length(f"row {row}: column {name!r}", values, completion.n_counted, "values", of)
    return values if values.is_floating_point() else values.float()


def _gather_index(offsets: Tensor, segments: Iterable[int]) -> Tensor:
    """Positions of the given segments in the flat vector that `offsets` cuts."""
    bounds = offsets.tolist()
    ranges = [torch.arange(bounds[s], bounds[s + 1]) for s in segments]
    index = torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.long)
    return index.to(offsets.device)


def without_vision(batch: TokenBatch, why: str) -> None:
    """Raises DataError for the first prompt with images or videos, where another text is put in its place."""
    for prompt, vision in enumerate(batch.vision):
        what, row = f"the prompt has images or videos, and {why}", batch.row(prompt)
        require(vision is None, DataError, what, row=row, expected="text alone")


def row_of(batch: TokenBatch, completion: int) -> int | str:
    """The row that a completion belongs to."""
    return batch.row(int(batch.group[completion]))
