"""`RewardSuite`: several reward functions with weights over a batch of completions."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tokengrain.batch import Segments, TokenBatch
from tokengrain.data.tokenize import Tokens
from tokengrain.errors import RecipeError
from tokengrain.rewards.base import RewardError, RewardFailure, RewardFunction, RewardResult
from tokengrain.rewards.running import call_all
from tokengrain.rewards.values import Value, located_tokens, read_value
from tokengrain.rollout.base import Rollouts, decode

logger = logging.getLogger(__name__)
RESERVED = ("prompts", "prompt_ids", "completions", "completion_ids", "truncated")


@dataclass(frozen=True)
class _Completions:
    """What rewards are given of: C completions."""

    ids: list[list[int]]
    counted: list[list[int]]
    rows: Sequence[int | str]
    raws: Sequence[Mapping[str, Any]]
    prompts: list[list[int]]
    truncated: list[bool]


@dataclass(frozen=True)
class _Judged:
    """What became of a function's reward for one completion. `value` is None where it is left out."""

    value: Value | None
    failure: RewardFailure | None = None
    valid: bool = True


class RewardSuite:
    """Scores completions with several functions.

    Args:
        functions: `RewardFunction`s, or plain functions (weight 1, failures are errors).
        tokenizer: turns completions into text where it is not given, and places spans.

    Raises:
        RecipeError: no function, or two of one name.
    """

    def __init__(self, functions: Sequence[RewardFunction | Callable[..., Any]], *, tokenizer: Any = None) -> None:
        self.functions = [f if isinstance(f, RewardFunction) else RewardFunction(f) for f in functions]
        self.tokenizer = tokenizer
        if not self.functions:
            raise RecipeError("a reward suite needs at least one reward function")
        double = [name for name, count in Counter(f.name for f in self.functions).items() if count > 1]
        if double:
            raise RecipeError(f"two rewards have the name {double[0]!r}; give one of them another `name`")

    def score(
        self,
        rollouts: Rollouts | TokenBatch,
        texts: Sequence[str] | None = None,
        rows: Sequence[Mapping[str, Any]] | None = None,
    ) -> RewardResult:
        """The rewards of all completions.

        Args:
            rollouts: what a sampler gave, or a batch.
            texts: C texts of the completions; None: decoded with the tokenizer, without special tokens.
            rows: C data rows, whose columns the functions get; None: those of the prompts.

        Raises:
            RewardError: a failure of a function with `on_error: error`; a column it needs is not there.
        """
        work = _from_rollouts(rollouts) if isinstance(rollouts, Rollouts) else _from_batch(rollouts)
        count = len(work.ids)
        if texts is None:
            if self.tokenizer is None:
                raise RewardError("there are no texts; expected `texts`, or a suite with a tokenizer")
            texts = decode(self.tokenizer, work.ids)
        raws = work.raws if rows is None else rows
        if len(texts) != count or len(raws) != count:
            raise RewardError(f"{len(texts)} texts and {len(raws)} rows for {count} completions")
        columns = self._columns(work, texts, raws)
        answers = call_all(self.functions, columns)
        located: dict[int, Tokens] = {}

        def tokens_of(index: int) -> Tokens:
            if self.tokenizer is None:
                raise RewardError("gave spans, which need a suite with a tokenizer to place them")
            if index not in located:
                located[index] = located_tokens(self.tokenizer, work.ids[index], texts[index])
            return located[index]

        judged = [
            [self._judge(function, answer[i], i, work, texts[i], tokens_of) for i in range(count)]
            for function, answer in zip(self.functions, answers, strict=True)
        ]
        return self._combined(judged, work)

    def _columns(
        self, work: _Completions, texts: Sequence[str], raws: Sequence[Mapping[str, Any]]
    ) -> dict[str, Sequence[Any]]:
        names = sorted({name for raw in raws for name in raw} - {"prompt"})
        taken = [name for name in names if name in RESERVED]
        if taken:
            raise RewardError(f"the rows have a column {taken[0]!r}, a name that rewards use; rename it")
        if all("prompt" in raw for raw in raws):
            prompts = [raw["prompt"] for raw in raws]
        else:
            prompts = decode(self.tokenizer, work.prompts) if self.tokenizer is not None else [None] * len(texts)
        return {
            "prompts": prompts,
            "prompt_ids": work.prompts,
            "completions": list(texts),
            "completion_ids": work.ids,
            "truncated": work.truncated,
            # A column that only some rows have is None in the others.
            **{name: [raw.get(name) for raw in raws] for name in names},
        }

    def _judge(
        self,
        function: RewardFunction,
        given: Any,
        index: int,
        work: _Completions,
        text: str,
        tokens_of: Callable[[int], Tokens],
    ) -> _Judged:
        policy: str = function.on_error
        if given is None:
            policy, failure = function.on_none, RewardFailure("gave None")
            if policy == "ignore":
                return _Judged(None)
        elif isinstance(given, RewardFailure):
            failure = given
        else:
            try:
                return _Judged(read_value(given, work.ids[index], work.counted[index], text, lambda: tokens_of(index)))
            except RewardError as error:
                failure = RewardFailure(str(error))
        failure = replace(failure, name=function.name, row=work.rows[index], completion=index)
        if policy == "error":
            raise RewardError(f"{failure}; completion: {text[:80]!r}")
        logger.warning("%s (%s)", failure, "left out" if policy == "skip" else f"taken as {function.error_value:g}")
        if policy == "skip":
            return _Judged(None, failure, valid=False)
        return _Judged(Value(number=function.error_value), failure)

    def _combined(self, judged: list[list[_Judged]], work: _Completions) -> RewardResult:
        segments = Segments.from_lengths([len(c) for c in work.counted])
        count = len(work.ids)
        outcome = torch.zeros(count, dtype=torch.float64)
        tokens = torch.zeros(segments.total, dtype=torch.float64)
        valid = torch.tensor([all(column[i].valid for column in judged) for i in range(count)], dtype=torch.bool)
        by_name, dense, offsets = {}, False, segments.offsets.tolist()
        for function, column in zip(self.functions, judged, strict=True):
            own = torch.full((count,), math.nan, dtype=torch.float64)
            for index, value in ((i, j.value) for i, j in enumerate(column) if j.value is not None):
                own[index] = value.sum
                if value.tokens is None:
                    outcome[index] += function.weight * value.sum
                else:
                    dense = True
                    part = torch.tensor(value.tokens, dtype=torch.float64)
                    tokens[offsets[index] : offsets[index + 1]] += function.weight * part
            by_name[function.name] = own.float()
        tokens = tokens * segments.broadcast(valid.double())
        outcome = outcome.where(valid, math.nan)
        counts = {
            f"{f.name}/{what}": float(number) for f in self.functions for what, number in _counts(f.function).items()
        }
        return RewardResult(
            total=(outcome + segments.sum(tokens)).float(),
            outcome=outcome.float(),
            token_rewards=tokens.float() if dense else None,
            by_name=by_name,
            valid=valid,
            failures=tuple(j.failure for column in judged for j in column if j.failure is not None),
            counts=counts,
        )


def _counts(function: Any) -> Mapping[str, float]:
    """What a function has counted in its last call, by its attribute `counts`."""
    counts = getattr(function, "counts", None)
    return counts if isinstance(counts, Mapping) else {}


def _from_rollouts(rollouts: Rollouts) -> _Completions:
    prompts = [rollouts.prompts[g] for g in rollouts.group]
    ids = [c.ids for c in rollouts.completions]
    contexts = [c.context for c in rollouts.completions]
    return _Completions(
        ids=ids,
        counted=[list(range(start, len(i))) for start, i in zip(contexts, ids, strict=True)],
        rows=[p.row for p in prompts],
        raws=rollouts.rows,
        prompts=[p.ids for p in prompts],
        truncated=rollouts.truncated.tolist(),
    )


def _from_batch(batch: TokenBatch) -> _Completions:
    groups = batch.group.tolist()
    prompts = [p.tolist() for p in Segments(batch.prompt_offsets).split(batch.prompt_ids)]
    ids = [i.tolist() for i in Segments(batch.completion_offsets).split(batch.completion_ids)]
    counted = [c.nonzero()[:, 0].tolist() for c in Segments(batch.completion_offsets).split(batch.counted)]
    marks = batch.columns.get("truncated")
    truncated = [False] * len(ids) if marks is None else (batch.segments.max(marks) > 0).tolist()
    return _Completions(
        ids=ids,
        counted=counted,
        rows=[batch.rows[g] if batch.rows else g for g in groups],
        raws=[batch.raw[g] if batch.raw else {} for g in groups],
        prompts=[prompts[g] for g in groups],
        truncated=truncated,
    )
