"""`RewardSuite`: several reward functions with weights over a batch of completions."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from tokengrain.batch import Segments, TokenBatch
from tokengrain.data.config import RowError
from tokengrain.data.marking import token_column
from tokengrain.data.tokens import Rendered, Tokens
from tokengrain.errors import RecipeError, TokengrainError, shown
from tokengrain.rollout.sampler import Rollouts, decode
from tokengrain.settings import Number, Positive, validate_settings

# ----------------------------------------------------------------------------------------------------
# One reward function with its weight and what to do when it fails; what scoring gives.

OnError = Literal["error", "skip", "value"]
OnNone = Literal["error", "skip", "value", "ignore"]


class RewardError(TokengrainError):
    """A reward that raised, hung, or gave something that is no reward; names the function and the row."""


@dataclass(frozen=True)
class RewardFailure:
    """One failure that was not raised. A reward function may also put one in place of a completion's reward.

    Attributes:
        what: what went wrong.
        name: the reward function; row: the data row; completion: index `[C]`. Filled in by the suite.
    """

    what: str
    name: str = ""
    row: int | str | None = None
    completion: int | None = None

    def __str__(self) -> str:
        return f"reward {self.name!r}: row {self.row} (completion {self.completion}): {self.what}"


class RewardFunction:
    """A reward function with its settings.

    Args:
        function: `function(prompts=[...], completions=[...], **columns)`, one entry per completion in each list;
            prompts as they stand in the rows, completions as text, the rows' other columns, and where it asks
            for them by name `prompt_ids`, `completion_ids` (lists of token ids) and `truncated` (bools). It takes
            what its signature names. It returns a list with an entry per completion: a number; or one number per
            token; or spans of characters {"start", "end", "reward"} (every token that shares a character with one
            has its reward). It may be async.
        name: in logs and messages; no two of a suite may be equal.
        weight: factor in the total.
        timeout: seconds one call may take; None: no limit, and the function runs in the calling thread. A
            function that is not async and hangs is left behind in its thread, as Python cannot end threads.
        on_error: what happens when the function raises, hangs or gives something that is no reward: "error"
            raises; "skip" marks the completion invalid, so that it is left out of training; "value" takes
            `error_value`. Failures that are not raised are counted and logged.
        error_value: the reward of a completion whose reward failed, before the weight.
        on_none: the same for a None; "ignore" leaves the function out of this completion's total, for
            rewards that apply to some rows only. None: as `on_error`.

    Raises:
        RecipeError: a wrong type, a value out of range.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        weight: Number = 1.0,
        timeout: Positive | None = 300.0,
        on_error: OnError = "error",
        error_value: Number = 0.0,
        on_none: OnNone | None = None,
    ) -> None:
        self.function = function
        self.name: str = (
            name or getattr(function, "name", None) or getattr(function, "__name__", None) or type(function).__name__
        )
        given = {
            "name": name,
            "weight": weight,
            "timeout": timeout,
            "on_error": on_error,
            "error_value": error_value,
            "on_none": on_none,
        }
        checked = validate_settings(f"reward {self.name!r}", RewardFunction, given)
        self.weight, self.timeout, self.error_value = (checked[k] for k in ("weight", "timeout", "error_value"))
        self.on_error, self.on_none = checked["on_error"], checked["on_none"] or checked["on_error"]
        self.parameters = inspect.signature(function).parameters
        called = function if inspect.isroutine(function) else type(function).__call__
        # The function itself as well: it may be a partial of an async one.
        self.is_async = inspect.iscoroutinefunction(called) or inspect.iscoroutinefunction(function)

    def arguments(self, available: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Of the available columns those that the function takes.

        Raises:
            RewardError: it needs one that there is not.
        """
        named = [p for p in self.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        missing = [p.name for p in named if p.default is p.empty and p.name not in available]
        if missing:
            raise RewardError(
                f"reward {self.name!r} needs {', '.join(missing)}; the rows have {', '.join(sorted(available))}"
            )
        if any(p.kind is p.VAR_KEYWORD for p in self.parameters.values()):
            return dict(available)
        return {p.name: available[p.name] for p in named if p.name in available}


@dataclass(frozen=True)
class RewardResult:
    """Rewards of C completions with N counted tokens.

    Attributes:
        total: float `[C]`, `outcome` plus the sum of a completion's `token_rewards`; NaN where not valid.
        outcome: float `[C]`, weighted sum of the rewards given per completion; NaN where not valid.
        token_rewards: float `[N]`, weighted sum of the rewards given per token or span; 0 for completions that
            are not valid; None if no function gave any.
        by_name: per function, its own value `[C]` without the weight (of token rewards: their sum); NaN where it
            failed and was skipped, or does not apply.
        valid: bool `[C]`: False where a reward failed and `on_error` is "skip". Leave these out of group
            statistics, with advantage 0.
        failures: what failed and was not raised.
        counts: further numbers that functions report, such as time-outs of the math checker.
    """

    total: Tensor
    outcome: Tensor
    token_rewards: Tensor | None
    by_name: dict[str, Tensor]
    valid: Tensor
    failures: tuple[RewardFailure, ...] = ()
    counts: Mapping[str, float] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Means and standard deviations over the completions that have the reward; failures."""
        found = {"reward": self.total[self.valid]}
        found |= {f"reward/{name}": values[values.isfinite()] for name, values in self.by_name.items()}
        metrics: dict[str, float] = {}
        for name, values in found.items():
            if values.numel():
                metrics |= {f"{name}/mean": float(values.mean()), f"{name}/std": float(values.std(correction=0))}
        metrics["reward/failures"] = float(len(self.failures))
        metrics["reward/invalid"] = float((~self.valid).float().mean())
        return metrics | {f"reward/{name}": value for name, value in self.counts.items()}


# ----------------------------------------------------------------------------------------------------
# Calling reward functions: time limits, async functions, and which completion a failure belongs to.


def call_all(functions: Sequence[RewardFunction], columns: Mapping[str, Sequence[Any]]) -> list[list[Any]]:
    """Every function's list with an entry per completion; where it failed a `RewardFailure` stands.

    Async functions run at the same time as each other and as the others, which run one after the other.

    Raises:
        RewardError: a function needs a column that the rows do not have.
    """
    arguments = [f.arguments(columns) for f in functions]
    count = len(columns["completions"])
    waiting = [i for i, f in enumerate(functions) if f.is_async]
    results: list[list[Any]] = [[] for _ in functions]

    async def together() -> list[list[Any]]:
        return await asyncio.gather(*(_call_async(functions[i], arguments[i], count) for i in waiting))

    background = _Thread(lambda: asyncio.run(together())) if waiting else None
    for i, function in enumerate(functions):
        if not function.is_async:
            results[i] = _call(function, arguments[i], count)
    if background is not None:
        try:
            found = background.result(_patience([functions[i] for i in waiting]))
        except _StillRunningError:  # it blocks the event loop, so that nobody could cancel it
            found = [[RewardFailure(_hung(functions[i]))] * count for i in waiting]
        for i, result in zip(waiting, found, strict=True):
            results[i] = result
    return results


def _patience(functions: Sequence[RewardFunction]) -> float | None:
    """Seconds to wait for async functions: each may be called for all completions and then for single ones."""
    limits = [f.timeout for f in functions]
    return None if None in limits else 2 * max(t for t in limits if t is not None) + 1


def _call(function: RewardFunction, arguments: Mapping[str, Any], count: int) -> list[Any]:
    try:
        return _listed(_limited(function, arguments), count)
    except _StillRunningError:
        return [RewardFailure(_hung(function))] * count
    except Exception as error:
        if count == 1:
            return [RewardFailure(_raised(error))]
        # One at a time tells whose fault it is, and saves the others.
        parts = [_call(function, _only(arguments, i), 1) for i in range(count)]
        if any(isinstance(part[0], RewardFailure) for part in parts):
            return [part[0] for part in parts]
        return [RewardFailure(f"{_raised(error)}, for all completions together but for none of them alone")] * count


async def _call_async(function: RewardFunction, arguments: Mapping[str, Any], count: int) -> list[Any]:
    limit = asyncio.timeout(function.timeout)
    try:
        async with limit:
            value = await function.function(**arguments)
        return _listed(value, count)
    except Exception as error:
        if limit.expired():  # a TimeoutError may also be the function's own
            return [RewardFailure(_hung(function))] * count
        if count == 1:
            return [RewardFailure(_raised(error))]
        parts = await asyncio.gather(*(_call_async(function, _only(arguments, i), 1) for i in range(count)))
        if any(isinstance(part[0], RewardFailure) for part in parts):
            return [part[0] for part in parts]
        return [RewardFailure(f"{_raised(error)}, for all completions together but for none of them alone")] * count


def _limited(function: RewardFunction, arguments: Mapping[str, Any]) -> Any:
    if function.timeout is None:
        return function.function(**arguments)
    return _Thread(lambda: function.function(**arguments)).result(function.timeout)


class _StillRunningError(Exception):
    pass


class _Thread:
    """A call in a thread that does not keep the process alive."""

    def __init__(self, call: Any) -> None:
        self._call, self._value = call, None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:  # raised again where the result is asked for
            self._error = error

    def result(self, timeout: float | None) -> Any:
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise _StillRunningError
        if self._error is not None:
            raise self._error
        return self._value


def _listed(value: Any, count: int) -> list[Any]:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise RewardError(f"gave {shown(value)}; expected a list with an entry per completion")
    if len(value) != count:
        raise RewardError(f"gave {len(value)} entries for {count} completions")
    return list(value)


def _only(arguments: Mapping[str, Any], index: int) -> dict[str, Any]:
    return {name: values[index : index + 1] for name, values in arguments.items()}


def _raised(error: Exception) -> str:
    return str(error) if isinstance(error, RewardError) else f"raised {type(error).__name__}: {error}"


def _hung(function: RewardFunction) -> str:
    return f"did not return within {function.timeout:g} s"


# ----------------------------------------------------------------------------------------------------
# One completion's reward as the function gave it -> a number, or a number per counted token.


@dataclass(frozen=True)
class Value:
    """A reward that is in order: a number for the completion, or one per counted token."""

    number: float | None = None
    tokens: list[float] | None = None

    @property
    def sum(self) -> float:
        return self.number if self.number is not None else math.fsum(self.tokens or ())


def read_value(
    given: Any, ids: Sequence[int], counted: Sequence[int], text: str, tokens: Callable[[], Tokens]
) -> Value:
    """What a reward function gave for one completion.

    Args:
        given: a number, numbers per counted token, or spans of characters of `text`.
        ids: the completion's token ids; counted: index into `ids` of those that count.
        tokens: gives the completion's tokens with their characters in `text`; called for spans only.

    Raises:
        RewardError: anything else; not finite; a wrong length; spans out of range or overlapping.
    """
    if hasattr(given, "tolist"):
        given = given.tolist()
    if isinstance(given, Real):
        try:
            number = float(given)
        except OverflowError:  # a whole number beyond what floats reach
            number = math.inf
        if not math.isfinite(number):
            raise RewardError(f"gave {number}; expected a finite number")
        return Value(number=number)
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        raise RewardError(f"gave {shown(given)}; expected a number, a number per token, or spans of characters")
    if not given:  # no spans
        return Value(tokens=[0.0] * len(counted))
    rendered = Rendered(text, 0, None, ((0, len(text)),))
    # Positions are needed for spans only; numbers are checked for type, finiteness and length.
    found = tokens() if isinstance(given[0], Mapping) else Tokens(text, list(ids))
    try:
        values = token_column(
            "token_rewards", given, "reward", rendered=rendered, tokens=found, counted=counted, kept=len(counted)
        )
    except RowError as error:
        raise RewardError(f"gave rewards that do not fit: {error}") from None
    return Value(tokens=values)


def located_tokens(tokenizer: Any, ids: Sequence[int], text: str) -> Tokens:
    """The tokens of a sampled completion and the characters of its decoded text that each stands for.

    Sampled ids need not be what the tokenizer makes of the text, so positions come from decoding. A token within a
    character of several tokens stands for the whole character; one that does not show (EOS) for none.

    Raises:
        RewardError: the tokens' texts do not add up to the text.
    """
    specials = set(tokenizer.all_special_ids)

    def shown_text(part: Sequence[int]) -> str:
        return str(tokenizer.decode([i for i in part if i not in specials], clean_up_tokenization_spaces=False))

    starts, ends, position = [], [], 0
    # A few tokens before the new one give it its context; the new ones are kept until they are whole characters.
    context, first = 0, 0
    for index in range(len(ids)):
        before, now = shown_text(ids[context:first]), shown_text(ids[context : index + 1])
        # The first bytes of a character decode to a mark, or (ByT5) to nothing.
        partial = now.endswith("�") or (now == before and ids[index] not in specials)
        if partial and index + 1 < len(ids):
            continue
        width = len(now) - len(before)
        starts += [position] * (index + 1 - first)
        position += width
        ends += [position] * (index + 1 - first)
        context, first = first, index + 1
    if position != len(text):
        return _located_by_prefixes(shown_text, ids, text)
    return Tokens(text, list(ids), starts, ends)


def _located_by_prefixes(shown_text: Callable[[Sequence[int]], str], ids: Sequence[int], text: str) -> Tokens:
    """The same by decoding every beginning: slow, and right for any tokenizer whose beginnings decode alike."""
    ends: list[int] = []
    for index in range(len(ids)):
        now = shown_text(ids[: index + 1])
        common = next((i for i, (a, b) in enumerate(zip(now, text)) if a != b), min(len(now), len(text)))
        ends.append(max(common, ends[-1] if ends else 0))
    if ends and ends[-1] != len(text):
        raise RewardError("the completion's tokens do not add up to its text, so spans cannot be placed")
    return Tokens(text, list(ids), [0, *ends[:-1]], ends)


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
