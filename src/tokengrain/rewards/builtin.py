"""The rewards that come with the library, and rewards by name."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import queue
import re
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from string import Formatter
from typing import Any, ClassVar, Literal, NamedTuple

from tokengrain.errors import RecipeError, TokengrainError, fingerprint, read_json, require, shown, write_json
from tokengrain.rewards import answers
from tokengrain.rewards.reward_model import RewardModel
from tokengrain.rewards.suite import STATE, RewardError, RewardFailure, RewardFunction, column_of, unreadable
from tokengrain.rewards.timemaster import TimeMaster
from tokengrain.rollout.client import JsonClient, ServerError, gather
from tokengrain.settings import (
    Count,
    NonNegative,
    Number,
    Positive,
    Share,
    Whole,
    keyword_types,
    load_callable,
    nearest,
    validate_settings,
)

WORKERS = min(4, os.cpu_count() or 1)


class Workers:
    """Processes of `answers.py` for one task, kept from call to call: what takes too long there is ended."""

    def __init__(self, task: str) -> None:
        self.task = task
        self._free: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()

    def map(self, calls: Sequence[Sequence[Any]], seconds: float) -> list[Any]:
        """The task's results, several at a time, in order.

        A call that takes longer than `seconds` has a `TimeoutError` in place of its result; one that raised a
        `RewardError`.
        """
        with ThreadPoolExecutor(WORKERS) as pool:
            return list(pool.map(lambda call: self._one(call, seconds), calls))

    def _one(self, call: Sequence[Any], seconds: float) -> Any:
        process = None
        with suppress(queue.Empty):
            while process is None or process.poll() is not None:
                process = self._free.get_nowait()
        if process is None or process.poll() is not None:
            # -P keeps this folder off the path, where a file might have the name of a library.
            command, pipe = [sys.executable, "-P", answers.__file__, self.task, str(os.getpid())], subprocess.PIPE
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        assert process.stdin is not None
        assert process.stdout is not None
        line = b""
        with suppress(BrokenPipeError):  # of a process that died: it gives no line
            process.stdin.write(json.dumps([call, seconds]).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        if not line:
            process.kill()
            process.wait()
            return RewardError(f"the process for {self.task} died")
        self._free.put(process)
        answer = json.loads(line)
        if "timeout" in answer:
            return TimeoutError(f"no answer within {seconds:g} s")
        return RewardError(answer["error"]) if "error" in answer else answer["value"]

    def __del__(self) -> None:
        with suppress(Exception):  # the interpreter may be going down
            while True:
                process = self._free.get_nowait()
                for pipe in filter(None, (process.stdin, process.stdout)):
                    pipe.close()  # it ends, and its copy with it

    def __reduce__(self) -> Any:
        return Workers, (self.task,)


# ---- Whether an answer is the column's: exact text, numbers, mathematics, a class ----


def extractor(pattern: str | None, what: str) -> re.Pattern[str] | None:
    """A pattern with exactly one group, or none. Raises `RecipeError`."""
    if pattern is None:
        return None
    compiled = compiled_pattern(pattern, what)
    what = f"{what}: {shown(pattern)} has {compiled.groups} groups; expected one, around the answer"
    require(compiled.groups == 1, RecipeError, what)
    return compiled


def compiled_pattern(pattern: str, what: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise RecipeError(f"{what}: {shown(pattern)} is no regular expression: {error}") from None


def last_match(pattern: re.Pattern[str] | None, text: str) -> str | None:
    """What the pattern's group holds at its last match; the whole text without a pattern."""
    if pattern is None:
        return text
    found = pattern.findall(text)
    return found[-1] if found else None


@dataclass(kw_only=True, eq=False)
class Match(ABC):
    """A reward that compares an answer with the column's, or with one of a list of acceptable ones."""

    name: ClassVar[str]
    column: str = "answer"
    right: Number = 1.0
    wrong: Number = 0.0

    def __call__(self, completions: Sequence[str], **columns: Any) -> list[Any]:
        read: dict[int, list[Any]] = {}  # a prompt's completions have one value among them
        for value in (values := list(column_of(columns, self.column, self.name))):
            if id(value) not in read:
                read[id(value)] = self.golds(value)
        return self.compare(completions, [read[id(value)] for value in values])

    @abstractmethod
    def compare(self, completions: Sequence[str], golds: Sequence[list[Any]]) -> list[Any]:
        """Rewards of completions, each with its acceptable answers."""

    def golds(self, value: Any) -> list[Any]:
        """The acceptable answers. Raises `RewardError` if there is none, or one cannot be read."""
        value = value.tolist() if hasattr(value, "tolist") else value
        value = value if isinstance(value, (list, tuple)) else self.written(value)
        missing = any(isinstance(one, float) and one != one for one in value)  # what pandas has for null
        require(not missing, RewardError, f"the column {self.column!r} is NaN; expected an answer")
        found = [self.gold(one) for one in value]
        require(found, RewardError, f"the column {self.column!r} is empty")
        return found

    def written(self, value: Any) -> Sequence[Any]:
        """The acceptable answers that a value which is no list stands for."""
        return [value]

    def unreadable(self, values: Sequence[Any]) -> Iterator[tuple[int, str]]:
        """Which of the column's values are no answer, and why: before anything is sampled."""
        return unreadable(self.golds, values)

    @abstractmethod
    def gold(self, value: Any) -> Any:
        """A value of the column, read. Raises `RewardError` if it cannot be."""


class Calculated(Match):
    """Whether the answer has the column's value; JSON text of a list of texts, as CSV holds it, is such a list."""

    def written(self, value: Any) -> Sequence[Any]:
        found = None
        if isinstance(value, str) and value.lstrip().startswith('["'):
            with suppress(ValueError, RecursionError):
                found = json.loads(value)
        return found if isinstance(found, list) and all(isinstance(one, str) for one in found) else [value]


@dataclass(kw_only=True, eq=False)
class ExactMatch(Match):
    """Whether the answer is the same text as the column's, spaces at both ends aside.

    Args:
        column: the right answer, or a list of those that are.
        pattern: regular expression with one group around the answer; the last match counts, no match is wrong.
            None: the whole completion.
    """

    name = "exact"
    pattern: str | None = None
    ignore_case: bool = False

    def __post_init__(self) -> None:
        self._pattern = extractor(self.pattern, f"reward {self.name!r}: pattern")

    def gold(self, value: Any) -> str:
        require(value is not None, RewardError, f"the column {self.column!r} is empty")
        return self._plain(str(value))

    def compare(self, completions: Sequence[str], golds: Sequence[list[Any]]) -> list[Any]:
        found = [last_match(self._pattern, completion) for completion in completions]
        right = [one is not None and self._plain(one) in wanted for one, wanted in zip(found, golds, strict=True)]
        return [self.right if one else self.wrong for one in right]

    def _plain(self, text: str) -> str:
        return text.strip().casefold() if self.ignore_case else text.strip()


@dataclass(kw_only=True, eq=False)
class NumericMatch(Calculated):
    """Whether the answer is the column's number. "72", "72.0", "$72", "1,000", "3e8" and "1/2" are numbers.

    The column's number stands behind its last `####` (GSM8K's `answer`), or is all of it, a unit aside.

    Args:
        column: the right answer: a number, or text as above; or a list of right answers.
        style: where the completion's answer stands: "gsm8k" behind the last `####`; "boxed" in the last
            `\\boxed{}`, which holds no other; "last": the last number, wherever it is; "flexible": behind `####` if
            there is one, else the last number.
        tolerance: largest absolute difference that counts as equal.
    """

    name = "numeric"
    style: Literal["gsm8k", "boxed", "last", "flexible"] = "gsm8k"
    tolerance: NonNegative = 1e-6

    def gold(self, value: Any) -> Fraction:
        found = answers.gold_number(value)
        if found is None:
            raise RewardError(f"the column {self.column!r} has no number; got {shown(value)}")
        return found

    def compare(self, completions: Sequence[str], golds: Sequence[list[Any]]) -> list[Any]:
        right = [self._is_right(*each) for each in zip(completions, golds, strict=True)]
        return [self.right if one else self.wrong for one in right]

    def _is_right(self, completion: str, golds: Sequence[Fraction]) -> bool:
        answer = self._answer(completion)
        return answer is not None and any(abs(answer - gold) <= Fraction(self.tolerance) for gold in golds)

    def _answer(self, completion: str) -> Fraction | None:
        completion = answers.concluded(completion)
        marked = answers.MARKED.findall(completion)
        if self.style == "gsm8k" or (self.style == "flexible" and marked):
            return answers.marked_number(marked[-1]) if marked else None
        if self.style == "boxed":
            return answers.one_number(answers.boxed(completion) or "")
        found = answers.numbers_in(completion)
        return found[-1] if found else None


@dataclass(kw_only=True, eq=False)
class MathMatch(Calculated):
    """Whether the answer is mathematically equal to the column's, by math-verify (extra "math").

    A column's value is read as what it is: a number, LaTeX with or without `\\boxed{}` or `$`, a choice (B), words, a
    ratio, or what stands behind its last `####`. The completion's answer is in its last box, or behind `####` or
    "answer:", or what math-verify finds. Both are read in processes of their own, several at a time.

    Args:
        column: the right answer, or a list of right answers.
        seconds: time for one completion.
        on_timeout: "wrong": an answer that takes too long is wrong (counted as `timeouts`); "fail": it is a
            failure of the reward.

    """

    name = "math"
    seconds: Positive = 5.0
    on_timeout: Literal["wrong", "fail"] = "wrong"

    def __post_init__(self) -> None:
        what = "reward 'math' needs math-verify: pip install 'tokengrain[math]'"
        require(importlib.util.find_spec("math_verify"), RecipeError, what)
        self.counts = {"timeouts": 0}
        self._equal, self._readable = Workers("math_equal"), Workers("readable")

    def compare(self, completions: Sequence[str], golds: Sequence[list[Any]]) -> list[Any]:
        self.counts = {"timeouts": 0}
        calls = list(zip(golds, completions, strict=True))
        found = self._equal.map(calls, self.seconds)
        return [self._reward(one, wanted) for one, wanted in zip(found, golds, strict=True)]

    def gold(self, value: Any) -> str:
        require(value is not None, RewardError, f"the column {self.column!r} is empty")
        # A float is written out: 1e-05 would be a product.
        return format(Decimal(repr(value)), "f") if isinstance(value, float) and math.isfinite(value) else str(value)

    def unreadable(self, values: Sequence[Any]) -> Iterator[tuple[int, str]]:
        yield from (bad := dict(super().unreadable(values))).items()
        each = [(i, gold) for i, value in enumerate(values) if i not in bad for gold in self.golds(value)]
        calls = [[gold] for _, gold in each]
        for (index, gold), found in zip(each, self._readable.map(calls, 4 * self.seconds)):
            if found is not True:
                yield index, self._lacking(gold)

    def _lacking(self, gold: Any) -> str:
        return f"math-verify understands no answer in the column {self.column!r}: {shown(gold)}"

    def _reward(self, found: Any, golds: list[str]) -> float | RewardFailure:
        if isinstance(found, TimeoutError):
            self.counts["timeouts"] += 1
            return self.wrong if self.on_timeout == "wrong" else RewardFailure(f"math-verify: {found}")
        if isinstance(found, RewardError):
            return RewardFailure(f"math-verify: {found}")
        if found is None:
            return RewardFailure(self._lacking(golds[0] if len(golds) == 1 else golds))
        return self.right if found else self.wrong


@dataclass(kw_only=True, eq=False)
class Classification(Match):
    """Whether the class named in the completion is the column's.

    Args:
        column: the right class, or a list of right ones.
        labels: all classes. Given, the answer is the last of them that is mentioned as a word of its own (in what
            `pattern` finds). Not given, what `pattern` finds must be the class itself.
        pattern: regular expression with one group around the answer; the last match counts. None: the whole
            completion.
        missing: the reward where no class is named.
    """

    name = "classification"
    column: str = "label"
    labels: list[str] | None = None
    pattern: str | None = r"<answer>(.*?)</answer>"
    ignore_case: bool = True
    missing: Number = 0.0

    def __post_init__(self) -> None:
        self._pattern = extractor(self.pattern, f"reward {self.name!r}: pattern")
        self._labels = None if self.labels is None else [self._plain(label) for label in self.labels]
        what = f"reward {self.name!r}: labels are {self.labels}; expected different ones, none empty"
        different = self._labels is None or (len(set(self._labels)) == len(self._labels) and all(self._labels))
        require(different, RecipeError, what)
        # The longest first: "very good" is not a mention of "good".
        names = "|".join(re.escape(label) for label in sorted(self._labels or (), key=len, reverse=True))
        self._mentions = re.compile(rf"(?<!\w)(?:{names})(?!\w)") if names else None

    def compare(self, completions: Sequence[str], golds: Sequence[list[Any]]) -> list[Any]:
        return [self._reward(*each) for each in zip(completions, golds, strict=True)]

    def _reward(self, completion: str, golds: list[Any]) -> float:
        answer = last_match(self._pattern, completion)
        if answer is not None and self._mentions is not None:
            mentioned = self._mentions.findall(self._plain(answer))
            answer = mentioned[-1] if mentioned else None
        if answer is None or not answer.strip():
            return self.missing
        return self.right if self._plain(answer) in golds else self.wrong

    def gold(self, value: Any) -> str:
        wanted = self._plain(str(value))
        what = f"the column {self.column!r} is {shown(value)}; expected one of {self._labels or 'text'}"
        require(value is not None and (self._labels is None or wanted in self._labels), RewardError, what)
        return wanted

    def _plain(self, text: str) -> str:
        text = " ".join(text.split())
        return text.casefold() if self.ignore_case else text


# ---- Rewards of form: a pattern, the length ----


OPENED = re.compile(r"(<\w+>)\s*$")


@dataclass(kw_only=True, eq=False)
class FormatPattern:
    """Whether a completion matches a regular expression. `.` stands for new lines too.

    Patterns are matched in processes of their own, which are ended when one takes too long. A tag at the end of the
    prompt, such as a `<think>` that the chat template opens, counts as the completion's beginning.

    Args:
        pattern: by default `<think>…</think>` and `<answer>…</answer>`, once each.
        whole: whether it must match the whole completion (spaces at both ends aside), or be found in it.
        seconds: time for one completion; one that takes longer does not match (counted as `timeouts`).
    """

    name: ClassVar[str] = "format"
    pattern: str = r"<think>(?:(?!</?think>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>"
    whole: bool = True
    seconds: Positive = 5.0
    right: Number = 1.0
    wrong: Number = 0.0

    def __post_init__(self) -> None:
        compiled_pattern(self.pattern, f"reward {self.name!r}")
        self.counts = {"timeouts": 0}
        self._workers = Workers("matches")

    def __call__(
        self, completions: Sequence[str], prompt_ends: Sequence[str] | None = None
    ) -> list[float | RewardFailure]:
        texts = [c.strip() for c in completions]
        first = re.match(r"<\w+>", self.pattern)
        unknown = first[0] if first else ""  # called without the prompts, by hand: they may have opened it
        for index, end in enumerate([unknown] * len(texts) if prompt_ends is None else prompt_ends):
            opened = OPENED.search(end)
            if opened and opened[1] in self.pattern and not texts[index].startswith(opened[1]):
                texts[index] = opened[1] + texts[index]
        calls = [(self.pattern, int(re.DOTALL), self.whole, text) for text in texts]
        found = self._workers.map(calls, self.seconds)
        self.counts = {"timeouts": sum(isinstance(one, TimeoutError) for one in found)}
        return [
            RewardFailure(str(one)) if isinstance(one, RewardError) else self.right if one is True else self.wrong
            for one in found
        ]


@dataclass(kw_only=True, eq=False)
class SoftOverlong:
    """DAPO's penalty near the length limit (Yu et al. 2025, arXiv 2503.14476, eq. 13), n tokens:

        0                                    n <= max_length - buffer
        factor * (max_length - buffer - n) / buffer    up to max_length
        -factor                              beyond

    Args:
        max_length: the longest completion, tokens (`max_new_tokens`).
        buffer: tokens before it in which the penalty grows.
        factor: the largest penalty.
    """

    name: ClassVar[str] = "overlong"
    max_length: Count
    buffer: Count
    factor: NonNegative = 1.0

    def __post_init__(self) -> None:
        what = f"reward {self.name!r}: buffer is {self.buffer}; expected at most max_length = {self.max_length}"
        require(self.buffer <= self.max_length, RecipeError, what)

    def __call__(self, completion_ids: Sequence[Sequence[int]]) -> list[float]:
        start = self.max_length - self.buffer
        return [-self.factor * min(max(len(ids) - start, 0) / self.buffer, 1.0) for ids in completion_ids]


@dataclass(kw_only=True, eq=False)
class CosineLength:
    """A reward for being right that depends on the length (Yeo et al. 2025, arXiv 2502.03373, eq. 1):

        low + (high - low) / 2 * (1 + cos(pi * n / max_length))

    for n tokens, from `high` at n = 0 to `low` at `max_length` and beyond. Right answers go from `right_short` to
    `right_long`, wrong ones from `wrong_short` to `wrong_long`: the defaults favour short right answers, and long
    wrong ones (think again).

    Args:
        base: name of the reward that tells what is right, above `threshold`; `settings` are its settings.
        max_length: tokens.
        overlong: the reward of a truncated completion; None: as any other.
    """

    name: ClassVar[str] = "cosine"
    base: Literal["exact", "numeric", "math", "classification"] = "numeric"
    settings: dict[str, Any] | None = None
    max_length: Count
    right_short: Number = 1.0
    right_long: Number = 0.5
    wrong_short: Number = -1.0
    wrong_long: Number = -0.5
    overlong: Number | None = None
    threshold: Share = 0.5

    def __post_init__(self) -> None:
        self._base: Any = make_reward(self.base, **(self.settings or {})).function

    @property
    def column(self) -> str:
        return str(self._base.column)

    def unreadable(self, values: Sequence[Any]) -> Iterator[tuple[int, str]]:
        """Of the base: which of the column's values are no answer, and why."""
        yield from self._base.unreadable(values)

    def __call__(
        self, completions: Sequence[str], completion_ids: Sequence[Any], truncated: Sequence[bool], **columns: Any
    ) -> list[float | RewardFailure]:
        values = self._base(completions=completions, **columns)
        return [
            value if isinstance(value, RewardFailure) else self._scaled(value, len(ids), cut)
            for value, ids, cut in zip(values, completion_ids, truncated, strict=True)
        ]

    def _scaled(self, value: float, length: int, truncated: bool) -> float:
        if truncated and self.overlong is not None:
            return self.overlong
        right = value > self.threshold
        short, long = (self.right_short, self.right_long) if right else (self.wrong_short, self.wrong_long)
        progress = min(length / self.max_length, 1.0)
        return long + 0.5 * (short - long) * (1 + math.cos(math.pi * progress))


# ---- A language model as judge, on an OpenAI-compatible server: cached on disk, retried, bounded ----

QUESTION = (
    "Rate how well the answer responds to the prompt, from 1 (useless) to 10 (excellent).\n\n"
    "Prompt:\n{prompt}\n\nAnswer:\n{completion}\n\n"
    "Reply with the rating in double brackets, for example [[7]]."
)


@dataclass(kw_only=True, eq=False)
class Judge:
    """Asks a judge model for a score of each completion.

    Equal questions are asked once. Answers are kept in `cache`, one file each, under a fingerprint of the question,
    the model and its settings; a file is whole or not there. One without a score is kept at temperature 0 only.

    Args:
        url: the server's root.
        model: the judge's name on the server.
        question: what is asked, with {prompt}, {completion} and the rows' columns by name.
        system: a system message; None: none.
        pattern: regular expression with one group around the score in the reply; the last match counts.
        low, high: the scale's ends. The reward is (score - low) / (high - low); a score beyond them is a failure.
        temperature, max_tokens: of the judge's reply.
        cache: folder of the answers; None: they are not kept.
        concurrency: most requests at a time.
        seconds, retries, backoff, api_key_env: see `JsonClient` (`seconds` is its timeout).
    """

    name: ClassVar[str] = "judge"
    url: str
    model: str
    question: str = QUESTION
    system: str | None = None
    pattern: str = r"\[\[\s*(-?\d+(?:\.\d+)?)\s*\]\]"
    low: Number = 1.0
    high: Number = 10.0
    temperature: NonNegative = 0.0
    max_tokens: Count = 512
    cache: str | None = None
    concurrency: Count = 8
    seconds: Positive = 60.0
    retries: Whole = 3
    backoff: NonNegative = 0.5
    api_key_env: str | None = None

    def __post_init__(self) -> None:
        what = f"reward {self.name!r}:"
        require(
            self.low < self.high, RecipeError, f"{what} low is {self.low} and high {self.high}; expected low < high"
        )
        try:
            self.fields = {name for _, name, _, _ in Formatter().parse(self.question) if name is not None}
        except ValueError as error:
            raise RecipeError(f"{what} question: {error}; double a brace that is no field") from None
        known = "completion" in self.fields
        require(known, RecipeError, f"{what} the question has no {{completion}}; got {shown(self.question)}")
        self.client = JsonClient(
            self.url, timeout=self.seconds, retries=self.retries, backoff=self.backoff, api_key_env=self.api_key_env
        )
        self._pattern: Any = extractor(self.pattern, f"{what} pattern")
        self.counts = {"requests": 0, "cached": 0}

    @classmethod
    def check(cls, **settings: Any) -> None:
        """Raises `RecipeError` for settings that do not work. Neither server nor key need be there yet."""
        cls(**{**settings, "api_key_env": None})

    async def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any
    ) -> list[float | RewardFailure]:
        self.counts = {"requests": 0, "cached": 0}
        bodies = [
            self._body(prompt, completion, {name: values[i] for name, values in columns.items() if name != STATE})
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        keys = [fingerprint(body) for body in bodies]
        different = list(dict(zip(keys, bodies, strict=True)).items())
        scores = await gather(self.client, self._score, different, self.concurrency)
        by_key = {key: score for (key, _), score in zip(different, scores, strict=True)}
        return [by_key[key] for key in keys]

    def _body(self, prompt: Any, completion: str, columns: dict[str, Any]) -> dict[str, Any]:
        known = {**columns, "prompt": _text(prompt), "completion": completion}
        missing = sorted(self.fields - known.keys())
        require(not missing, RewardError, f"the question names {missing}; the rows have {sorted(known)}")
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages.append({"role": "user", "content": self.question.format_map(known)})
        own = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        return {"model": self.model, "messages": messages, **own}

    async def _score(self, http: Any, question: tuple[str, dict[str, Any]]) -> float | RewardFailure:
        key, body = question
        path = None if self.cache is None else Path(self.cache).expanduser() / key[:2] / f"{key}.json"
        kept = reply = _cached(path)
        if reply is None:
            try:
                reply = await self.client.ask(http, "/v1/chat/completions", body, _reply, self.max_tokens)
                reply = self.client.clean(reply)
            except ServerError as error:
                return RewardFailure(f"the judge gave no answer: {error}")
        self.counts["requests" if kept is None else "cached"] += 1
        found = self._pattern.findall(reply)
        try:
            score = float(found[-1]) if found else math.nan
        except ValueError:
            score = math.nan
        usable = self.low <= score <= self.high
        # Another reply may have the score that this one lacks, unless the judge says the same every time.
        if kept is None and path is not None and (usable or self.temperature == 0):
            write_json(path, {"request": body, "reply": reply})
        if not usable:
            return RewardFailure(f"the judge's reply has no score from {self.low:g} to {self.high:g}: {shown(reply)}")
        return (score - self.low) / (self.high - self.low)


def _cached(path: Path | None) -> str | None:
    if path is None or not path.is_file():
        return None
    try:
        return str(read_json(path)["reply"])
    except (TokengrainError, KeyError, TypeError) as error:
        raise RewardError(f"{path} is no answer of a judge ({type(error).__name__}); remove it") from None


def _reply(answer: Any) -> str:
    try:
        content = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"the answer has no message: {shown(answer)}") from None
    if not isinstance(content, str):
        raise ValueError(f"the answer's message is {shown(content)}; expected text")
    return content


def _text(prompt: Any) -> str:
    """A prompt as text; of messages, one paragraph each."""
    if not isinstance(prompt, Sequence) or isinstance(prompt, str):
        return str(prompt)
    return "\n\n".join(f"{m.get('role')}: {m.get('content')}" for m in prompt)


# ---- Rewards by name ----


class RewardKind(NamedTuple):
    """A reward that comes with the library.

    Attributes:
        build: its constructor; all arguments are keyword-only.
        what: one line for listings.
        objects: arguments that are not settings: in a recipe `model` is a model, the tokenizers are the runner's.
        defaults: of the settings that every reward has, where they are others.
        code: settings that are import strings of code, whose source counts in fingerprints.
    """

    build: Any
    what: str
    objects: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = {}
    code: tuple[str, ...] = ()


REWARDS = {
    "exact": RewardKind(ExactMatch, "the answer is the column's text"),
    "numeric": RewardKind(NumericMatch, "the answer is the column's number (GSM8K's format, boxed, last number)"),
    "math": RewardKind(MathMatch, "the answer equals the column's mathematically, by math-verify"),
    "classification": RewardKind(Classification, "the class named is the column's"),
    "format": RewardKind(FormatPattern, "the completion matches a regular expression"),
    "overlong": RewardKind(SoftOverlong, "DAPO's penalty near the length limit"),
    "cosine": RewardKind(CosineLength, "a reward for being right that depends on the length"),
    "timemaster": RewardKind(
        TimeMaster, "a form, a right class and a judge's score of the rest (TimeMaster)", code=("judge",)
    ),
    "judge": RewardKind(Judge, "a language model's score, from an OpenAI-compatible server"),
    "reward_model": RewardKind(
        RewardModel,
        "a trained reward model's score of the whole completion",
        frozenset({"model", "tokenizer", "reward_tokenizer"}),
        {"timeout": None},  # a model does not hang, and its size and the rollout's decide how long it takes
    ),
}


def check_reward(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a reward, defaults included, before anything is loaded.

    Args:
        name: a name in `REWARDS`, or an import string, "module:function" or "path.py:function".
        settings: the reward's own settings, without its objects (see `RewardKind`), and those of every reward
            (`RewardFunction`: weight, timeout, on_error, evaluate_only, ...). Of a class that an import
            string names, its keyword-only arguments are settings; a function has none.

    Raises:
        RecipeError: unknown reward or setting (with the nearest right name), a wrong type or value; of ours also what
            its constructor refuses.
    """
    what = f"unknown reward {name!r}{nearest(name, REWARDS)} (or an import string, 'module:function')"
    require(name in REWARDS or ":" in name, RecipeError, what)
    kind = REWARDS.get(name)
    build = load_callable(name) if kind is None else kind.build
    build = build if isinstance(build, type) else None  # a plain function has no settings
    every = keyword_types(RewardFunction)
    shared = {**(kind.defaults if kind else {}), **{k: v for k, v in settings.items() if k in every}}
    own = {k: v for k, v in settings.items() if k not in every}
    what, first = f"reward {name!r}", next(iter(own), None)
    hint = f"{what}: unknown setting {first!r}{nearest(str(first), every)}"
    require(build is not None or first is None, RecipeError, hint)
    checked = validate_settings(what, build, own, excluded=reward_objects(name)) if build is not None else {}
    if kind is not None and not kind.objects:
        # What types cannot say: patterns, addresses, what is installed.
        getattr(kind.build, "check", kind.build)(**checked)
    return checked | RewardFunction.settings(name, shared)


def reward_objects(name: str) -> frozenset[str]:
    """What a reward takes beside its settings; see `RewardKind`."""
    return REWARDS[name].objects if name in REWARDS else frozenset()


def make_reward(name: str, /, **settings: Any) -> RewardFunction:
    """A reward by name or import string: `make_reward("numeric", weight=2.0)`, `make_reward("my.py:length")`.

    Args:
        settings: its settings, and the objects that it takes: `make_reward("reward_model", model=model)`.

    Raises:
        RecipeError: as `check_reward`; an object that is missing; or the import string leads nowhere.
        ModelError: a model that is not what the reward needs.
    """
    objects = {k: v for k, v in settings.items() if k in reward_objects(name)}
    checked = check_reward(name, {k: v for k, v in settings.items() if k not in objects})
    shared = {k: checked.pop(k) for k in keyword_types(RewardFunction)}
    if name in REWARDS:
        lacks = "model" in REWARDS[name].objects and objects.get("model") is None
        require(not lacks, RecipeError, f"reward {name!r} needs a model")
        function = REWARDS[name].build(**objects, **checked)
    else:
        function = load_callable(name)
        if isinstance(function, type):
            function = function(**checked)
    return RewardFunction(function, **{**shared, "name": shared["name"] or name.rpartition(":")[2] or name})
