"""What an optimiser step is made of: batches on the host, their counts on all ranks, their micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tokengrain.batch import TokenBatch
from tokengrain.objectives.normalise import Counts


@dataclass(frozen=True)
class HostBatch:
    """A `TokenBatch` that stays in host memory when the data loader moves batches to the device.

    Counting and cutting read lengths, which on an accelerator would make the host wait. Its micro-batches
    are moved one by one when they are used; they are token ids, a few kilobytes.

    Attributes:
        real: False: this rank has nothing to learn from in the step and `batch` stands in, without weight, so that
            the rank takes part in what all ranks do together.
    """

    batch: TokenBatch
    real: bool = True

    def to(self, device: torch.device | str, non_blocking: bool = False) -> HostBatch:
        return self


@dataclass(frozen=True)
class StepPlan:
    """Of one optimiser step: counts over its batches on all ranks, and how often each rank runs the model.

    Attributes:
        counts: what the normaliser divides by.
        tokens: prompt and completion tokens, for the log.
        passes: for each of this rank's batches the number of forward passes that all ranks make; None: each
            rank makes as many as it needs.
    """

    counts: Counts
    tokens: int
    passes: tuple[int, ...] | None = None


def all_reduce(values: Tensor, device: torch.device, op: str = "sum") -> Tensor:
    """`values` summed ("sum") or maximised ("max") over ranks, on the host; itself if there is one rank."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    on_device = values.to(device)
    dist.all_reduce(on_device, op=dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
    return on_device.cpu()


def counts_of(batch: TokenBatch) -> Counts:
    return Counts.of(batch.segments, pairs=batch.is_pairs, prompts=batch.n_prompts)


def plan_step(
    batches: Sequence[HostBatch], max_tokens: int | None, device: torch.device, *, same_passes: bool
) -> StepPlan:
    """Count a step.

    Args:
        batches: this rank's batches of the step, one per accumulation step.
        same_passes: whether ranks must run the model equally often (FSDP: every pass is a collective).
    """
    counts = sum((counts_of(b.batch) for b in batches if b.real), Counts())
    tokens = torch.tensor([sum(b.batch.n_tokens for b in batches if b.real)])
    total = all_reduce(torch.cat([counts.to_tensor(), tokens]), device)
    passes = None
    if same_passes:
        own = torch.tensor([len(b.batch.split(max_tokens)) for b in batches])
        passes = tuple(all_reduce(own, device, "max").tolist())
    return StepPlan(Counts.from_tensor(total[:-1]), int(total[-1]), passes)


def micro_batches(batch: TokenBatch, max_tokens: int | None, passes: int | None) -> list[tuple[TokenBatch, bool]]:
    """Cut a batch into micro-batches, exactly `passes` of them if that is given.

    Returns:
        The micro-batches. False marks one that is there only for ranks to run the model equally often: a rank
        with too few prompts runs its smallest one again, and the caller gives it no weight.
    """
    parts = [(part, True) for part in batch.split(max_tokens, parts=passes or 1)]
    if passes is None or len(parts) == passes:
        return parts
    smallest = min((part for part, _ in parts), key=lambda part: part.n_tokens)
    return parts + [(smallest, False)] * (passes - len(parts))
