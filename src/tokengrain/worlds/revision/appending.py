"""References behind sampled chains, as a batch whose counted tokens are the references' (DRO, arXiv 2506.13351)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokengrain.batch import Completion, Sample, TokenBatch


@dataclass(frozen=True)
class AppendedReferences:
    """What `append_references` makes. Shapes: C completions.

    Attributes:
        batch: the same prompts and completions in the same order; a completion is its chain with the marker, which do
            not count, and the reference, which does. `score(model, batch)` gives log π(y_j | q, c_i, y_<j).
        usable: bool `[C]`, whether the completion had a marker. The reference stands behind the whole of one that had
            none; its numbers mean nothing and are to be left out.
        answer_lengths: long `[C]`, tokens after the marker that the reference took the place of; 0 without a marker.
    """

    batch: TokenBatch
    usable: Tensor
    answer_lengths: Tensor


def append_references(
    batch: TokenBatch, references: Sequence[Sequence[int]], marker: int | Sequence[int]
) -> AppendedReferences:
    """Cut every completion after its first marker and put its prompt's reference there.

    Args:
        batch: sampled completions.
        references: token ids per prompt, as they stand after the marker.
        marker: the token, or the tokens, at the end of thinking.

    Raises:
        ValueError: not one reference per prompt, an empty one, or an empty marker.
    """
    ends = [marker] if isinstance(marker, int) else list(marker)
    if len(references) != batch.n_prompts or not all(len(r) for r in references) or not ends:
        raise ValueError(
            f"expected a marker and a reference that is not empty for each of {batch.n_prompts} prompts, "
            f"got {len(references)}"
        )
    made: list[list[Completion]] = [[] for _ in range(batch.n_prompts)]
    usable, lengths = [], []
    for c, group in enumerate(batch.group.tolist()):
        ids = batch.completion(c).tolist()
        end = next((i + len(ends) for i in range(len(ids)) if ids[i : i + len(ends)] == ends), None)
        chain, reference = ids[:end], list(references[group])
        made[group].append(Completion(chain + reference, [False] * len(chain) + [True] * len(reference)))
        usable.append(end is not None)
        lengths.append(0 if end is None else len(ids) - end)
    rows = batch.rows or tuple(range(batch.n_prompts))
    raw = batch.raw or ({},) * batch.n_prompts
    samples = [Sample(batch.prompt(g).tolist(), made[g], row=rows[g], raw=raw[g]) for g in range(batch.n_prompts)]
    appended = TokenBatch.from_samples(samples, prompt_role=batch.prompt_role).to(batch.device)
    return AppendedReferences(
        appended,
        torch.tensor(usable, device=batch.device),
        torch.tensor(lengths, device=batch.device),
    )
