"""Reference answers after sampled chains of thought: what DRO scores (arXiv 2506.13351)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.credit.base import scorer_logps
from tokengrain.credit.r3_filter import token_ranks
from tokengrain.errors import DataError, ModelError
from tokengrain.rollout.stops import StopStrings
from tokengrain.scoring import head_of, score
from tokengrain.scoring.forward import evaluating
from tokengrain.training.online.scoring import in_parts

# Logits that are alive at once while tokens are ranked.
CHUNK = 1 << 25


def chains_of(batch: TokenBatch, tokenizer: Any, marker: str) -> list[list[int] | None]:
    """The tokens of each completion up to the one that completes `marker`, C lists; None: it has none."""
    stops = StopStrings(tokenizer, [marker])
    found: list[list[int] | None] = []
    for index in range(batch.n_completions):
        ids = batch.completion(index).tolist()
        length = stops.length(ids)
        found.append(None if length is None else ids[:length])
    return found


def references_of(
    batch: TokenBatch, tokenizer: Any, *, column: str = "reference", separator: str = "", end: bool = True
) -> list[list[int]]:
    """Token ids of each prompt's reference answer, G lists.

    The reference is tokenised by itself: no token spans the end of a chain.

    Args:
        column: of the rows: text, or a list of token ids that is taken as it is.
        separator: text between a chain and its answer.
        end: append the end-of-sequence token, as the policy would.

    Raises:
        DataError: a row without a reference, or with an empty one.
        ModelError: `end`, and the tokenizer has no such token.
    """
    if end and tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no end-of-sequence token to close a reference with; expected one, or end: false"
        )
    references = []
    for number, raw in enumerate(batch.raw):
        given = raw.get(column)
        if isinstance(given, str) and given.strip():
            ids = list(tokenizer(separator + given, add_special_tokens=False)["input_ids"])
            ids += [tokenizer.eos_token_id] if end else []
        elif isinstance(given, Sequence) and given and all(isinstance(i, int) for i in given):
            ids = list(given)
        else:
            raise DataError(
                "no reference answer",
                row=batch.rows[number] if batch.rows else number,
                field=column,
                value=given,
                expected="text, or a list of token ids",
            )
        references.append(ids)
    return references


def reference_batch(
    batch: TokenBatch,
    chains: Sequence[Sequence[int]],
    references: Sequence[Sequence[int]],
    group: Sequence[int] | None = None,
) -> TokenBatch:
    """Each prompt with its chains, each followed by the reference; only the reference's tokens count.

    The prompt is computed once for all its chains. The completions of a group have equally many counted tokens.

    Args:
        batch: for its prompts.
        chains: token ids; references: G lists of token ids.
        group: the prompt of each chain, not decreasing; None: the chains are those of the batch's completions.
    """
    group = batch.group.tolist() if group is None else group
    members: list[list[Completion]] = [[] for _ in references]
    for chain, number in zip(chains, group, strict=True):
        reference = references[number]
        members[number].append(Completion([*chain, *reference], [False] * len(chain) + [True] * len(reference)))
    rows = batch.rows or range(len(references))
    samples = [
        Sample(batch.prompt(number).tolist(), completions, row=row)
        for number, (completions, row) in enumerate(zip(members, rows, strict=True))
    ]
    return TokenBatch.from_samples(samples).to(batch.device)


def reference_logps(scorer: Any, batch: TokenBatch, max_tokens: int | None = None) -> Tensor:
    """Log-probabilities of the reference's tokens `[N]` under a model or a `Reference`, without gradient."""
    return in_parts(batch, max_tokens, lambda part: {"logps": scorer_logps(scorer, part)})["logps"]


def reference_ranks(model: nn.Module, batch: TokenBatch, max_tokens: int | None = None) -> Tensor:
    """Ranks of the reference's tokens among the vocabulary, long `[N]`, 1 first."""
    head = head_of(model)

    def measure(part: TokenBatch) -> dict[str, Tensor]:
        hidden, labels = score(model, part, ("hidden",)).hidden, part.labels
        assert hidden is not None  # it was asked for
        rows = max(1, CHUNK // head.vocab_size)
        found = [
            token_ranks(head.logits(hidden[i : i + rows]), labels[i : i + rows].to(hidden.device))
            for i in range(0, max(len(labels), 1), rows)
        ]
        return {"ranks": torch.cat(found)}

    with evaluating(model):
        return in_parts(batch, max_tokens, measure)["ranks"]
