"""`RewardSuite`: several reward functions with weights over a batch of completions."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from tokengrain.batch import Segments, TokenBatch
from tokengrain.data.config import RowError
from tokengrain.data.marking import token_column
from tokengrain.data.tokens import Rendered, Tokens
from tokengrain.errors import DataError, RecipeError, TokengrainError, require, shown
from tokengrain.rollout.sampler import Rollouts, decode
from tokengrain.settings import Number, Positive, keyword_types, validate_settings
from tokengrain.vision import Vision

logger = logging.getLogger(__name__)

OnError = Literal["error", "skip", "value"]
OnNone = Literal["error", "skip", "value", "ignore"]
STATE = "trainer_state"
PROMPTS = ("prompts", "prompt_ids", "prompt_ends", "prompt_vision")
RESERVED = (*PROMPTS, "completions", "completion_ids", "truncated", STATE)
# Tokens at the end of a prompt that `prompt_ends` shows: enough for a tag that a chat template opens.
PROMPT_END = 16


class RewardError(TokengrainError):
    """A reward that raised, hung, or gave something that is no reward; names the function and the row."""


def column_of(columns: Mapping[str, Any], name: str, reward: str) -> Sequence[Any]:
    """The column that a reward compares with. Raises `RewardError` if the rows do not have it."""
    known = sorted(set(columns) - set(RESERVED))
    what = f"needs the column {name!r}; the rows have {known} (setting `column` of {reward!r}, or data.columns)"
    require(name in columns, RewardError, what)
    return columns[name]


def unreadable(read: Callable[[Any], Any], values: Sequence[Any]) -> Iterator[tuple[int, str]]:
    """Which of the values `read` refuses, and why."""
    for index, value in enumerate(values):
        try:
            read(value)
        except RewardError as error:
            yield index, str(error)


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
        function: `function(prompts=[...], completions=[...], **columns)`, one entry per completion in each list. It
            takes what its signature names: prompts as they stand in the rows, completions as text, the rows' other
            columns, `prompt_ids` and `completion_ids` (token ids), `prompt_ends` (the prompts' last tokens as text,
            special ones included), `prompt_vision` (of prompts with pictures: what the policy sees of them, a
            `tokengrain.vision.Vision`, or None), `truncated` (bools) and, as one object, `trainer_state`
            (transformers' `TrainerState`; None outside training). It returns a list with an entry per completion: a
            number; one number per token; or spans of characters {"start", "end", "reward"} (every token that shares a
            character with one has its reward). It may be async.
        name: in logs and messages; no two of a suite may be equal.
        weight: factor in the total; 0: the reward is logged, and nothing else.
        timeout: seconds one call may take; None: no limit, and the function runs in the calling thread. A
            function that is not async and hangs is left behind in its thread, as Python cannot end threads.
        on_error: what happens when the function raises, hangs or gives something that is no reward: "error"
            raises; "skip" marks the completion invalid, so that it is left out of training; "value" takes
            `error_value`. Failures that are not raised are counted and logged.
        error_value: the reward of a completion whose reward failed, before the weight (None: 0); for
            "value" alone.
        on_none: the same for a None; "ignore" leaves the function out of this completion's total, for
            rewards that apply to some rows only. None: as `on_error`.
        special_tokens: whether completions keep their special tokens, but the end-of-sequence and padding ones.
        messages: completions are lists with one assistant message, as TRL gives them for chats.
        evaluate_only: it is asked in evaluation alone, and is no part of the total there either.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        weight: Number = 1.0,
        timeout: Positive | None = 300.0,
        on_error: OnError = "error",
        error_value: Number | None = None,
        on_none: OnNone | None = None,
        special_tokens: bool = False,
        messages: bool = False,
        evaluate_only: bool = False,
    ) -> None:
        given = locals()
        named = (name, getattr(function, "name", None), getattr(function, "__name__", None), type(function).__name__)
        self.function, self.name = function, str(next(filter(None, named)))
        own = {k: given[k] for k in keyword_types(RewardFunction)}
        checked = self.settings(self.name, own)
        self.weight, self.timeout, self.error_value = (
            checked["weight"],
            checked["timeout"],
            checked["error_value"] or 0.0,
        )
        self.on_error, self.on_none = checked["on_error"], checked["on_none"] or checked["on_error"]
        self.special_tokens, self.messages, self.evaluate_only = special_tokens, messages, evaluate_only
        if evaluate_only:
            self.weight = 0.0
        self.parameters = inspect.signature(function).parameters
        called = function if inspect.isroutine(function) else type(function).__call__
        # The function itself as well: it may be a partial of an async one.
        self.is_async = inspect.iscoroutinefunction(called) or inspect.iscoroutinefunction(function)

    @classmethod
    def settings(cls, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of any reward, checked, defaults included. Raises `RecipeError`."""
        checked = validate_settings(f"reward {name!r}", cls, given)
        value, read = checked["error_value"], "value" in (checked["on_error"], checked["on_none"])
        what = f"reward {name!r}: error_value is {value!r}, which nothing reads; expected on_error: value"
        require(not value or read, RecipeError, what)
        return checked

    def arguments(self, available: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Of what is available, by name, what the function takes. Raises `RewardError` if it needs something else."""
        named = [p for p in self.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        missing = [p.name for p in named if p.default is p.empty and p.name not in available]
        what = f"reward {self.name!r} needs {', '.join(missing)}; the rows have {', '.join(sorted(available))}"
        require(not missing, RewardError, what)
        if any(p.kind is p.VAR_KEYWORD for p in self.parameters.values()):
            return dict(available)
        return {p.name: available[p.name] for p in named if p.name in available}


@dataclass(frozen=True)
class RewardResult:
    """Rewards of C completions with N counted tokens.

    Attributes:
        total: float `[C]`, `outcome` plus the sum of a completion's `token_rewards`; NaN where not valid.
        outcome: float `[C]`, weighted sum of the rewards given per completion; NaN where not valid.
        token_rewards: float `[N]`, weighted sum of the rewards given per token or span, 0 where not valid; or None.
        by_name: per function, its own value `[C]` without the weight (of token rewards: their sum); NaN where it
            failed and was skipped, or does not apply.
        valid: bool `[C]`: False where a reward failed and `on_error` is "skip", or where no reward with a weight
            applies. Leave these out of group statistics, with advantage 0.
        failures: what failed and was not raised.
        counts: further numbers that functions report, such as time-outs of the math checker.
        evaluate_only: names of rewards that are no part of training.
    """

    total: Tensor
    outcome: Tensor
    token_rewards: Tensor | None
    by_name: dict[str, Tensor]
    valid: Tensor
    failures: tuple[RewardFailure, ...] = ()
    counts: Mapping[str, float] = field(default_factory=dict)
    evaluate_only: frozenset[str] = frozenset()

    def correct(self, name: str | None = None) -> Tensor:
        """Whether each completion is right, float `[C]`: its reward `name` is above 0.5; NaN where that is not known.

        Without a name the first reward that applies to a completion decides, of those that training has too.
        """
        own = [values for reward, values in self.by_name.items() if reward not in self.evaluate_only]
        named = own or list(self.by_name.values()) if name is None else [self.by_name[name]]
        value = named[0]
        for other in named[1:]:
            value = value.where(value.isfinite(), other)
        return (value > 0.5).float().where(value.isfinite(), math.nan)

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


# ---- The suite ----


@dataclass(frozen=True)
class _Completions:
    """What rewards are given of: C completions; `counted`: which of their tokens count, by place."""

    ids: list[list[int]]
    counted: list[list[int]]
    rows: Sequence[int | str]
    raws: Sequence[Mapping[str, Any]]
    prompts: list[list[int]]
    vision: list[Vision | None]
    truncated: list[bool]


Judged = tuple[float | list[float] | None, RewardFailure | None]
"""A function's reward for a completion: a number, one per counted token, or None where it is left out; its failure."""


class RewardSuite:
    """Scores completions with several functions.

    Args:
        functions: `RewardFunction`s, or plain functions (weight 1, failures are errors), no two of one name.
        tokenizer: turns completions into text where it is not given, and places spans.
    """

    def __init__(self, functions: Sequence[RewardFunction | Callable[..., Any]], *, tokenizer: Any = None) -> None:
        self.functions = [f if isinstance(f, RewardFunction) else RewardFunction(f) for f in functions]
        self.tokenizer = tokenizer
        require(self.functions, RecipeError, "a reward suite needs at least one reward function")
        name, count = Counter(f.name for f in self.functions).most_common(1)[0]
        require(count == 1, RecipeError, f"two rewards have the name {name!r}; give one of them another `name`")
        tags = set(tokenizer.all_special_tokens) - _ends(tokenizer, "token") if tokenizer is not None else ()
        for function in self.functions:
            pattern = getattr(function.function, "pattern", None)
            hidden = [t for t in sorted(tags) if t in str(getattr(pattern, "pattern", pattern))]
            if hidden and not function.special_tokens:
                what = "%s are special tokens, which completions are shown without; set special_tokens: true"
                logger.warning(f"reward %r looks for %s: {what}", function.name, hidden, ", ".join(hidden))

    def score(
        self,
        rollouts: Rollouts | TokenBatch,
        texts: Sequence[str] | None = None,
        rows: Sequence[Mapping[str, Any]] | None = None,
        *,
        evaluating: bool = True,
        trainer_state: Any = None,
    ) -> RewardResult:
        """The rewards of all completions.

        Args:
            rollouts: what a sampler gave, or a batch.
            texts: C texts of the completions; None: decoded with the tokenizer, without special tokens.
            rows: C data rows, whose columns the functions get; None: those of the prompts.
            evaluating: also ask the functions that are `evaluate_only`.
            trainer_state: for functions that ask for it.

        Raises:
            RewardError: a failure of a function with `on_error: error`; a column it needs is not there.
        """
        work = _from_rollouts(rollouts) if isinstance(rollouts, Rollouts) else _from_batch(rollouts)
        count, raws = len(work.ids), work.raws if rows is None else rows
        what = "there are no texts; expected `texts`, or a suite with a tokenizer"
        require(texts is not None or self.tokenizer is not None, RewardError, what)
        plain = decode(self.tokenizer, work.ids) if texts is None else texts
        what = f"{len(plain)} texts and {len(raws)} rows for {count} completions"
        require(len(plain) == count and len(raws) == count, RewardError, what)
        columns = {**self._columns(work, raws), "completions": list(plain), STATE: trainer_state}
        functions = [f for f in self.functions if evaluating or not f.evaluate_only]
        shown_texts = [self._special(work.ids) if f.special_tokens else plain for f in functions]
        own = [
            [[{"role": "assistant", "content": text}] for text in texts] if f.messages else list(texts)
            for f, texts in zip(functions, shown_texts)
        ]
        answers = call_all(functions, columns, own)
        judged = [
            [self._judge(function, answer[i], i, work, seen[i]) for i in range(count)]
            for function, answer, seen in zip(functions, answers, shown_texts, strict=True)
        ]
        return _combined(functions, judged, work)

    def check_golds(self, rows: Iterable[tuple[Any, Any, Mapping[str, Any]]]) -> None:
        """Read every row's right answer before anything is sampled; `rows` are (file, row, the row's columns).

        Raises:
            DataError: one that a reward with `on_error: error` cannot read.
        """
        checked = [f for f in self.functions if f.on_error == "error" and hasattr(f.function, "unreadable")]
        listed = list(rows) if checked else []
        names = dict.fromkeys(name for _, _, raw in listed for name in raw)
        for function in checked if listed else ():
            compared: Any = function.function
            try:
                column_of(names, compared.column, function.name)
            except RewardError as error:
                what = f"reward {function.name!r}: {error}"
                raise DataError(what, file=listed[0][0], field=compared.column) from None
            found = sorted(compared.unreadable([raw.get(compared.column) for _, _, raw in listed]))
            if found:
                index, what = found[0]
                file, row, _ = listed[index]
                more = f" ({len(found)} of {len(listed)} rows)" if len(found) > 1 else ""
                what = f"reward {function.name!r}: {what}{more}"
                raise DataError(what, file=file, row=row, field=compared.column)

    def _special(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Texts with special tokens, but those that end or fill up."""
        require(self.tokenizer is not None, RewardError, "special_tokens needs a suite with a tokenizer")
        ends = _ends(self.tokenizer, "token_id")
        return [self.tokenizer.decode([i for i in part if i not in ends], **_AS_IS) for part in ids]

    def _columns(self, work: _Completions, raws: Sequence[Mapping[str, Any]]) -> dict[str, Sequence[Any]]:
        names = sorted({name for raw in raws for name in raw} - {"prompt"})
        taken = next((name for name in names if name in RESERVED), None)
        require(taken is None, RewardError, f"the rows have a column {taken!r}, a name that rewards use; rename it")
        tok = self.tokenizer
        prompts: Sequence[Any] = [None] * len(raws)
        if all("prompt" in raw for raw in raws):
            prompts = [raw["prompt"] for raw in raws]
        elif tok is not None:
            prompts = decode(tok, work.prompts)
        ends = {tuple(p[-PROMPT_END:]) for p in work.prompts} if tok is not None else ()
        end_texts = {ids: tok.decode(list(ids), **_AS_IS) for ids in ends}
        return {
            "prompts": prompts,
            "prompt_ids": work.prompts,
            "prompt_ends": [end_texts.get(tuple(p[-PROMPT_END:]), "") for p in work.prompts],
            "completion_ids": work.ids,
            "truncated": work.truncated,
            **({"prompt_vision": work.vision} if any(work.vision) else {}),
            # A column that only some rows have is None in the others.
            **{name: [raw.get(name) for raw in raws] for name in names},
        }

    def _judge(self, function: RewardFunction, given: Any, index: int, work: _Completions, text: str) -> Judged:
        policy: str = function.on_error
        if given is None and function.on_none == "ignore":
            return None, None
        if given is None:
            policy, failure = function.on_none, RewardFailure("gave None")
        elif isinstance(given, RewardFailure):
            failure = given
        else:
            ids = work.ids[index]

            def tokens() -> Tokens:
                require(self.tokenizer is not None, RewardError, "gave spans, which need a suite with a tokenizer")
                return located_tokens(self.tokenizer, ids, text, special=function.special_tokens)

            try:
                return read_value(given, ids, work.counted[index], text, tokens), None
            except RewardError as error:
                failure = RewardFailure(str(error))
        failure = replace(failure, name=function.name, row=work.rows[index], completion=index)
        require(policy != "error", RewardError, f"{failure}; completion: {text[:80]!r}")
        logger.warning("%s (%s)", failure, "left out" if policy == "skip" else f"taken as {function.error_value:g}")
        return None if policy == "skip" else function.error_value, failure


def _combined(
    functions: Sequence[RewardFunction], judged: Sequence[Sequence[Judged]], work: _Completions
) -> RewardResult:
    """The weighted sums of what the functions gave."""
    segments = Segments.from_lengths([len(c) for c in work.counted])
    count = len(work.ids)
    outcome = torch.zeros(count, dtype=torch.float64)
    tokens = torch.zeros(segments.total, dtype=torch.float64)
    # Where no reward applies there is none: not 0, which would be a reward like another.
    weighted = [column for function, column in zip(functions, judged) if function.weight]
    each = list(zip(*weighted, strict=True))
    skipped = [any(value is None and failure is not None for value, failure in one) for one in each]
    known = [any(value is not None for value, _ in one) for one in each]
    valid = torch.tensor([k and not s for k, s in zip(known, skipped)] if weighted else [True] * count)
    by_name, dense, offsets = {}, False, segments.offsets.tolist()
    for function, column in zip(functions, judged, strict=True):
        own = torch.full((count,), math.nan, dtype=torch.float64)
        for index, value in ((i, v) for i, (v, _) in enumerate(column) if v is not None):
            if isinstance(value, list):
                own[index], dense = math.fsum(value), dense or bool(function.weight)
                part = torch.tensor(value, dtype=torch.float64)
                tokens[offsets[index] : offsets[index + 1]] += function.weight * part
            else:
                own[index] = value
                outcome[index] += function.weight * value
        by_name[function.name] = own.float()
    tokens = tokens * segments.broadcast(valid.double())
    outcome = outcome.where(valid, math.nan)
    counts = {
        f"{f.name}/{what}": float(number)
        for f in functions
        for what, number in getattr(f.function, "counts", {}).items()
    }
    return RewardResult(
        total=(outcome + segments.sum(tokens)).float(),
        outcome=outcome.float(),
        token_rewards=tokens.float() if dense else None,
        by_name=by_name,
        valid=valid,
        failures=tuple(failure for column in judged for _, failure in column if failure is not None),
        counts=counts,
        evaluate_only=frozenset(f.name for f in functions if f.evaluate_only),
    )


_AS_IS = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}


def _ends(tokenizer: Any, what: str) -> set[Any]:
    """End-of-sequence and padding, each a "token" or a "token_id"."""
    return {getattr(tokenizer, f"{kind}_{what}", None) for kind in ("eos", "pad")}


def _from_rollouts(rollouts: Rollouts) -> _Completions:
    prompts = [rollouts.prompts[g] for g in rollouts.group]
    return _Completions(
        ids=[c.ids for c in rollouts.completions],
        counted=[list(range(c.context, len(c.ids))) for c in rollouts.completions],
        rows=[p.row for p in prompts],
        raws=[p.raw for p in prompts],
        prompts=[p.ids for p in prompts],
        vision=[p.vision for p in prompts],
        truncated=rollouts.truncated.tolist(),
    )


def _from_batch(batch: TokenBatch) -> _Completions:
    groups = batch.group.tolist()
    prompts = [p.tolist() for p in Segments(batch.prompt_offsets).split(batch.prompt_ids)]
    ids = [i.tolist() for i in Segments(batch.completion_offsets).split(batch.completion_ids)]
    counted = [c.nonzero()[:, 0].tolist() for c in Segments(batch.completion_offsets).split(batch.counted)]
    marks = batch.columns.get("truncated")
    return _Completions(
        ids=ids,
        counted=counted,
        rows=[batch.row(g) for g in groups],
        raws=[batch.raw[g] if batch.raw else {} for g in groups],
        prompts=[prompts[g] for g in groups],
        vision=[batch.vision[g] if batch.vision else None for g in groups],
        truncated=[False] * len(ids) if marks is None else (batch.segments.max(marks) > 0).tolist(),
    )


# ---- Calling the functions ----


def call_all(
    functions: Sequence[RewardFunction],
    columns: Mapping[str, Sequence[Any]],
    seen: Sequence[Sequence[Any]] | None = None,
) -> list[list[Any]]:
    """Every function's list with an entry per completion; where it failed a `RewardFailure` stands.

    Async functions run at the same time as each other and as the others, which run one after the other. `seen` are
    the completions as each function sees them, if not as the column has them. Raises `RewardError` if it needs a
    column that the rows do not have.
    """
    count = len(columns["completions"])
    each = [columns["completions"]] * len(functions) if seen is None else seen
    arguments = [f.arguments({**columns, "completions": c}) for f, c in zip(functions, each, strict=True)]
    waiting = [i for i, f in enumerate(functions) if f.is_async]
    results: list[list[Any]] = [[] for _ in functions]

    async def together() -> list[list[Any]]:
        return await asyncio.gather(*(_call_async(functions[i], arguments[i], count) for i in waiting))

    background = _in_thread(lambda: asyncio.run(together())) if waiting else None
    for i, function in enumerate(functions):
        if not function.is_async:
            results[i] = _call(function, arguments[i], count)
    if background is not None:
        # Each may be called for all completions and then for single ones.
        limits = [functions[i].timeout for i in waiting]
        if wait([background], None if None in limits else 2 * max(filter(None, limits)) + 1).done:
            found = background.result()
        else:  # it blocks the event loop, so that nobody could cancel it
            found = [[_hung(functions[i])] * count for i in waiting]
        for i, result in zip(waiting, found, strict=True):
            results[i] = result
    return results


def _call(function: RewardFunction, arguments: Mapping[str, Any], count: int) -> list[Any]:
    call: Callable[[], Any] = partial(function.function, **arguments)
    try:
        if function.timeout is not None:
            background = _in_thread(call)
            if wait([background], function.timeout).not_done:
                return [_hung(function)] * count
            call = background.result
        return _listed(call(), count)
    except Exception as error:  # whatever a user's function raises
        parts = [_call(function, _only(arguments, i), 1) for i in range(count)] if count > 1 else []
        return _blamed(error, parts)


async def _call_async(function: RewardFunction, arguments: Mapping[str, Any], count: int) -> list[Any]:
    limit = asyncio.timeout(function.timeout)
    try:
        async with limit:
            value = await function.function(**arguments)
        return _listed(value, count)
    except Exception as error:
        if limit.expired():  # a TimeoutError may also be the function's own
            return [_hung(function)] * count
        alone = [_call_async(function, _only(arguments, i), 1) for i in range(count)] if count > 1 else []
        return _blamed(error, await asyncio.gather(*alone))


def _blamed(error: Exception, parts: Sequence[list[Any]]) -> list[Any]:
    """What a call that raised gives: one completion at a time tells whose fault it is, and saves the others."""
    what = str(error) if isinstance(error, RewardError) else f"raised {type(error).__name__}: {error}"
    if isinstance(error, TypeError) and "string indices" in what:
        what += " (of a function that takes messages, as TRL's do for chats? Set messages: true)"
    if not parts:
        return [RewardFailure(what)]
    if any(isinstance(part[0], RewardFailure) for part in parts):
        return [part[0] for part in parts]
    return [RewardFailure(f"{what}, for all completions together but for none of them alone")] * len(parts)


def _in_thread(call: Callable[[], Any]) -> Future[Any]:
    """A call in a thread that does not keep the process alive."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # raised again where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _listed(value: Any, count: int) -> list[Any]:
    value = value.tolist() if hasattr(value, "tolist") else value
    is_list = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    require(is_list, RewardError, f"gave {shown(value)}; expected a list with an entry per completion")
    require(len(value) == count, RewardError, f"gave {len(value)} entries for {count} completions")
    return list(value)


def _only(arguments: Mapping[str, Any], index: int) -> dict[str, Any]:
    return {k: v if k == STATE else v[index : index + 1] for k, v in arguments.items()}


def _hung(function: RewardFunction) -> RewardFailure:
    return RewardFailure(f"did not return within {function.timeout:g} s")


# ---- One completion's reward as the function gave it -> a number, or a number per counted token ----


def read_value(
    given: Any, ids: Sequence[int], counted: Sequence[int], text: str, tokens: Callable[[], Tokens]
) -> float | list[float]:
    """A completion's reward: a number, or one for each of the `counted` places in `ids`.

    Args:
        given: a number, numbers per counted token, or spans of characters of `text`.
        tokens: gives the completion's tokens with their characters in `text`; called for spans only.

    Raises:
        RewardError: anything else; not finite; a wrong length; spans out of range or overlapping.
    """
    given = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(given, Real):
        try:
            number = float(given)
        except OverflowError:  # a whole number beyond what floats reach
            number = math.inf
        require(math.isfinite(number), RewardError, f"gave {number}; expected a finite number")
        return number
    is_list = isinstance(given, Sequence) and not isinstance(given, (str, bytes))
    what = f"gave {shown(given)}; expected a number, a number per token, or spans of characters"
    require(is_list, RewardError, what)
    if not given:  # no spans
        return [0.0] * len(counted)
    rendered = Rendered(text, 0, None, ((0, len(text)),))
    found = tokens() if isinstance(given[0], Mapping) else Tokens(text, list(ids))
    try:
        return token_column(
            "token_rewards", given, "reward", rendered=rendered, tokens=found, counted=counted, kept=len(counted)
        )
    except RowError as error:
        raise RewardError(f"gave rewards that do not fit: {error}") from None


def located_tokens(tokenizer: Any, ids: Sequence[int], text: str, *, special: bool = False) -> Tokens:
    """The tokens of a sampled completion and the characters of its decoded text that each stands for.

    Sampled ids need not be what the tokenizer makes of the text, so positions come from decoding. A token within a
    character of several tokens stands for the whole character; one that does not show (EOS) for none. `special`: the
    text has the special tokens, but those that end or fill up. Raises `RewardError` where texts do not add up.
    """
    hidden = _ends(tokenizer, "token_id") if special else set(tokenizer.all_special_ids)

    def shown_text(part: Sequence[int]) -> str:
        return str(tokenizer.decode([i for i in part if i not in hidden], **_AS_IS))

    starts, ends, position = [], [], 0
    # A few tokens before the new one give it its context; the new ones are kept until they are whole characters.
    context, first = 0, 0
    for index in range(len(ids)):
        before, now = shown_text(ids[context:first]), shown_text(ids[context : index + 1])
        # The first bytes of a character decode to a mark, or (ByT5) to nothing.
        partial = now.endswith("�") or (now == before and ids[index] not in hidden)
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
    what = "the completion's tokens do not add up to its text, so spans cannot be placed"
    require(not ends or ends[-1] == len(text), RewardError, what)
    return Tokens(text, list(ids), [0, *ends[:-1]], ends)
