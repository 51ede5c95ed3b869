"""Rewards by name."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from string import Formatter
from typing import Any, Literal

from tokengrain.errors import RecipeError, fingerprint, read_json, shown, write_json
from tokengrain.rewards.reward_model import RewardModel
from tokengrain.rewards.suite import RewardError, RewardFailure, RewardFunction
from tokengrain.rollout.server import JsonClient, ServerError, gather
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

# ----------------------------------------------------------------------------------------------------
# `Worker`: calls that may hang, in a process that can be ended. (Threads cannot, and `re` holds the lock that
# another thread would need to notice.)

SCRIPT = Path(__file__).with_name("worker.py")
# Starting the process and importing what it needs is not the call's fault.
START_SECONDS = 60.0


class Worker:
    """Calls tasks of `worker.py`, one at a time. The process starts with the first call and ends with this."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._buffer = b""
        self._warm: set[str] = set()

    def call(self, task: str, *arguments: Any, timeout: float) -> Any:
        """The task's result.

        Raises:
            TimeoutError: no answer within `timeout` seconds; the process was ended.
            RewardError: the task raised, or the process died.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            assert self._process is not None
            assert self._process.stdin is not None
            allowed = timeout if task in self._warm else timeout + START_SECONDS
            line = b""
            # A broken pipe is a process that died: there is no answer then.
            with suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps([task, arguments]).encode() + b"\n")
                self._process.stdin.flush()
                line = self._line(allowed)
            if not line:
                self._end()
                raise RewardError(f"the process for {task} died")
            self._warm.add(task)
        answer = json.loads(line)
        if "error" in answer:
            raise RewardError(str(answer["error"]))
        return answer["value"]

    def _line(self, seconds: float) -> bytes:
        """The next line of output; b"" if there is none to come any more."""
        assert self._process is not None
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    self._end()
                    raise TimeoutError(f"no answer within {seconds:g} s")
                part = os.read(descriptor, 1 << 16)
                if not part:
                    return b""
                self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _start(self) -> None:
        # -P keeps this folder off the path, where a file might have the name of a library.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._buffer, self._warm = b"", set()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()
        process.wait()

    def __del__(self) -> None:
        with suppress(Exception):  # the interpreter may be going down
            self._end()

    def __deepcopy__(self, memo: Any) -> Worker:
        return Worker()

    def __reduce__(self) -> Any:
        return Worker, ()


# ----------------------------------------------------------------------------------------------------
# Rewards that compare an answer with a column: exact text, numbers, mathematics, a class.

NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d)(?:/\d+)?)")
GSM8K = re.compile(r"####[ \t]*\$?[ \t]*([^\n]*)")


def column_of(columns: dict[str, Any], name: str, reward: str) -> Sequence[Any]:
    """A column that a reward needs. Raises `RewardError` naming those there are."""
    if name not in columns:
        known = sorted(set(columns) - {"prompts", "completions", "completion_ids", "truncated"})
        raise RewardError(f"needs the column {name!r}; the rows have {known} (setting `column` of {reward!r})")
    return columns[name]


def numbers_in(text: str) -> list[Fraction]:
    """The numbers in a text, thousands' commas and fractions a/b understood."""
    found = []
    for match in NUMBER.finditer(text.replace("\u2212", "-")):  # the minus sign of typeset text
        if match.group() in ("", "-"):
            continue
        whole, _, below = match.group().replace(",", "").partition("/")
        try:
            found.append(Fraction(Decimal(whole)) / Fraction(int(below) if below else 1))
        except (InvalidOperation, ZeroDivisionError, ValueError):  # ValueError: more digits than `int` reads
            continue
    return found


def extractor(pattern: str | None, what: str) -> re.Pattern[str] | None:
    """A pattern with exactly one group, or none. Raises `RecipeError`."""
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise RecipeError(f"{what}: {shown(pattern)} is no regular expression: {error}") from None
    if compiled.groups != 1:
        raise RecipeError(f"{what}: {shown(pattern)} has {compiled.groups} groups; expected one, around the answer")
    return compiled


def last_match(pattern: re.Pattern[str] | None, text: str) -> str | None:
    """What the pattern's group holds at its last match; the whole text without a pattern."""
    if pattern is None:
        return text
    found = pattern.findall(text)
    return found[-1] if found else None


class ExactMatch:
    """Whether the answer is the same text as the column's, spaces at both ends aside.

    Args:
        column: the right answer.
        pattern: regular expression with one group around the answer in the completion; the last match counts;
            without a match the answer is wrong. None: the whole completion.
        ignore_case: whether upper and lower case are alike.
        right, wrong: the rewards.
    """

    name = "exact"

    def __init__(
        self,
        *,
        column: str = "answer",
        pattern: str | None = None,
        ignore_case: bool = False,
        right: Number = 1.0,
        wrong: Number = 0.0,
    ) -> None:
        self.column, self.ignore_case, self.right, self.wrong = column, ignore_case, right, wrong
        self.pattern = extractor(pattern, f"reward {self.name!r}: pattern")

    def __call__(self, completions: Sequence[str], **columns: Any) -> list[float]:
        golds = column_of(columns, self.column, self.name)
        return [self.right if self._same(c, g) else self.wrong for c, g in zip(completions, golds, strict=True)]

    def _same(self, completion: str, gold: Any) -> bool:
        if gold is None:
            raise RewardError(f"the column {self.column!r} is empty")
        answer, wanted = last_match(self.pattern, completion), str(gold).strip()
        if answer is None:
            return False
        return answer.strip().casefold() == wanted.casefold() if self.ignore_case else answer.strip() == wanted


class NumericMatch:
    """Whether the answer is the column's number. "72", "72.0", "$72", "1,000" and "1/2" are numbers.

    The column's number stands behind its last `####` (GSM8K's `answer`), or is its last number.

    Args:
        column: the right answer: a number, or text as above.
        style: where the completion's answer stands: "gsm8k" behind the last `####`; "boxed" in the last
            `\\boxed{}`; "last": the last number, wherever it is; "flexible": behind `####` if there is one, else
            the last number.
        tolerance: largest absolute difference that counts as equal.
        right, wrong: the rewards.
    """

    name = "numeric"

    def __init__(
        self,
        *,
        column: str = "answer",
        style: Literal["gsm8k", "boxed", "last", "flexible"] = "gsm8k",
        tolerance: NonNegative = 1e-6,
        right: Number = 1.0,
        wrong: Number = 0.0,
    ) -> None:
        self.column, self.style, self.tolerance, self.right, self.wrong = column, style, tolerance, right, wrong

    def __call__(self, completions: Sequence[str], **columns: Any) -> list[float]:
        golds = column_of(columns, self.column, self.name)
        return [self._reward(c, g) for c, g in zip(completions, golds, strict=True)]

    def _reward(self, completion: str, gold: Any) -> float:
        wanted = gold_number(gold)
        if wanted is None:
            raise RewardError(f"the column {self.column!r} has no number; got {shown(gold)}")
        answer = self._answer(completion)
        return self.right if answer is not None and abs(answer - wanted) <= Fraction(self.tolerance) else self.wrong

    def _answer(self, completion: str) -> Fraction | None:
        marked = GSM8K.findall(completion)
        if self.style == "gsm8k" or (self.style == "flexible" and marked):
            found = numbers_in(marked[-1]) if marked else []
            return found[0] if found else None
        if self.style == "boxed":
            _, mark, rest = completion.rpartition("\\boxed{")
            found = numbers_in(rest.partition("}")[0]) if mark else []
        else:
            found = numbers_in(completion)
        return found[-1] if found else None


def gold_number(gold: Any) -> Fraction | None:
    """The number that a column's value holds; None if there is none."""
    text = str(gold)
    marked = GSM8K.findall(text)
    found = numbers_in(marked[-1]) if marked else numbers_in(text)
    if not found:
        return None
    return found[0] if marked else found[-1]


class MathMatch:
    """Whether the answer is mathematically equal to the column's, by math-verify (extra "math").

    It understands LaTeX, fractions, sets, intervals, equations; see its documentation. It runs in a process of
    its own, which is ended when an expression takes too long to understand.

    Args:
        column: the right answer, as text with or without `\\boxed{}` or `$`.
        seconds: time for one completion.
        on_timeout: "wrong": an answer that takes too long is wrong (counted as `timeouts`); "fail": it is a
            failure of the reward.
        right, wrong: the rewards.

    Raises:
        RecipeError: math-verify is not installed.
    """

    name = "math"

    def __init__(
        self,
        *,
        column: str = "answer",
        seconds: Positive = 5.0,
        on_timeout: Literal["wrong", "fail"] = "wrong",
        right: Number = 1.0,
        wrong: Number = 0.0,
    ) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise RecipeError("reward 'math' needs math-verify: pip install 'tokengrain[math]'")
        self.column, self.seconds, self.on_timeout = column, seconds, on_timeout
        self.right, self.wrong = right, wrong
        self.counts = {"timeouts": 0}
        self._worker = Worker()

    def __call__(self, completions: Sequence[str], **columns: Any) -> list[float | RewardFailure]:
        golds = column_of(columns, self.column, self.name)
        self.counts = {"timeouts": 0}
        return [self._reward(c, g) for c, g in zip(completions, golds, strict=True)]

    def _reward(self, completion: str, gold: Any) -> float | RewardFailure:
        if gold is None:
            return RewardFailure(f"the column {self.column!r} is empty")
        wanted = str(gold)
        # A bare answer such as \frac{1}{2} is LaTeX only between dollars.
        if "\\" in wanted and "$" not in wanted and "\\boxed" not in wanted:
            wanted = f"${wanted}$"
        try:
            found = self._worker.call("math_equal", wanted, completion, timeout=self.seconds)
        except TimeoutError as error:
            self.counts["timeouts"] += 1
            return self.wrong if self.on_timeout == "wrong" else RewardFailure(f"math-verify: {error}")
        except RewardError as error:
            return RewardFailure(f"math-verify: {error}")
        if not found["gold"]:
            return RewardFailure(f"math-verify understands no answer in the column {self.column!r}: {shown(gold)}")
        return self.right if found["equal"] else self.wrong


class Classification:
    """Whether the class named in the completion is the column's.

    Args:
        column: the right class.
        labels: all classes. Given, the answer is the last of them that is mentioned as a word of its own (in what
            `pattern` finds). Not given, what `pattern` finds must be the class itself.
        pattern: regular expression with one group around the answer; the last match counts. None: the whole
            completion.
        ignore_case: whether upper and lower case are alike.
        right, wrong: the rewards; missing: the reward where no class is named.
    """

    name = "classification"

    def __init__(
        self,
        *,
        column: str = "label",
        labels: list[str] | None = None,
        pattern: str | None = r"<answer>(.*?)</answer>",
        ignore_case: bool = True,
        right: Number = 1.0,
        wrong: Number = 0.0,
        missing: Number = 0.0,
    ) -> None:
        self.column, self.ignore_case = column, ignore_case
        self.right, self.wrong, self.missing = right, wrong, missing
        self.pattern = extractor(pattern, f"reward {self.name!r}: pattern")
        self.labels = None if labels is None else [self._plain(label) for label in labels]
        self._mentions = None
        if self.labels is not None:
            if len(set(self.labels)) < len(self.labels) or not all(self.labels):
                raise RecipeError(f"reward {self.name!r}: labels are {labels}; expected different ones, none empty")
            # The longest first: "very good" is not a mention of "good".
            names = "|".join(re.escape(label) for label in sorted(self.labels, key=len, reverse=True))
            self._mentions = re.compile(rf"(?<!\w)(?:{names})(?!\w)")

    def __call__(self, completions: Sequence[str], **columns: Any) -> list[float]:
        golds = column_of(columns, self.column, self.name)
        return [self._reward(c, g) for c, g in zip(completions, golds, strict=True)]

    def _reward(self, completion: str, gold: Any) -> float:
        wanted = self._plain(str(gold))
        if gold is None or (self.labels is not None and wanted not in self.labels):
            raise RewardError(f"the column {self.column!r} is {shown(gold)}; expected one of {self.labels or 'text'}")
        answer = last_match(self.pattern, completion)
        if answer is not None and self._mentions is not None:
            mentioned = self._mentions.findall(self._plain(answer))
            answer = mentioned[-1] if mentioned else None
        if answer is None or not answer.strip():
            return self.missing
        return self.right if self._plain(answer) == wanted else self.wrong

    def _plain(self, text: str) -> str:
        text = " ".join(text.split())
        return text.casefold() if self.ignore_case else text


# ----------------------------------------------------------------------------------------------------
# Rewards of form: a pattern, the length.


class FormatPattern:
    """Whether a completion matches a regular expression. `.` stands for new lines too.

    Patterns are matched in a process of its own, which is ended when one takes too long.

    Args:
        pattern: by default `<think>…</think>` and `<answer>…</answer>`, once each.
        whole: whether it must match the whole completion (spaces at both ends aside), or be found in it.
        seconds: time for one completion; one that takes longer does not match (counted as `timeouts`).
        right, wrong: the rewards.

    Raises:
        RecipeError: no regular expression.
    """

    name = "format"

    def __init__(
        self,
        *,
        pattern: str = r"<think>(?:(?!</?think>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>",
        whole: bool = True,
        seconds: Positive = 5.0,
        right: Number = 1.0,
        wrong: Number = 0.0,
    ) -> None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise RecipeError(f"reward {self.name!r}: {shown(pattern)} is no regular expression: {error}") from None
        self.pattern, self.whole, self.seconds, self.right, self.wrong = pattern, whole, seconds, right, wrong
        self.counts = {"timeouts": 0}
        self._worker = Worker()

    def __call__(self, completions: Sequence[str]) -> list[float]:
        self.counts = {"timeouts": 0}
        return [self.right if self._matches(c) else self.wrong for c in completions]

    def _matches(self, completion: str) -> bool:
        arguments = (self.pattern, int(re.DOTALL), self.whole, completion.strip())
        try:
            return bool(self._worker.call("matches", *arguments, timeout=self.seconds))
        except TimeoutError:
            self.counts["timeouts"] += 1
            return False


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

    name = "overlong"

    def __init__(self, *, max_length: Count, buffer: Count, factor: NonNegative = 1.0) -> None:
        if buffer > max_length:
            raise RecipeError(f"reward {self.name!r}: buffer is {buffer}; expected at most max_length = {max_length}")
        self.max_length, self.buffer, self.factor = max_length, buffer, factor

    def __call__(self, completion_ids: Sequence[Sequence[int]]) -> list[float]:
        start = self.max_length - self.buffer
        return [-self.factor * min(max(len(ids) - start, 0) / self.buffer, 1.0) for ids in completion_ids]


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

    name = "cosine"

    def __init__(
        self,
        *,
        base: Literal["exact", "numeric", "math", "classification"] = "numeric",
        settings: dict[str, Any] | None = None,
        max_length: Count,
        right_short: Number = 1.0,
        right_long: Number = 0.5,
        wrong_short: Number = -1.0,
        wrong_long: Number = -0.5,
        overlong: Number | None = None,
        threshold: Share = 0.5,
    ) -> None:
        check_reward(base, settings or {})
        self.base: Any = make_reward(base, **(settings or {})).function
        self.max_length, self.overlong, self.threshold = max_length, overlong, threshold
        self.right, self.wrong = (right_short, right_long), (wrong_short, wrong_long)

    def __call__(
        self,
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        truncated: Sequence[bool],
        **columns: Any,
    ) -> list[float | RewardFailure]:
        values = self.base(completions=completions, **columns)
        return [
            value if isinstance(value, RewardFailure) else self._scaled(value, len(ids), cut)
            for value, ids, cut in zip(values, completion_ids, truncated, strict=True)
        ]

    def _scaled(self, value: float | None, length: int, truncated: bool) -> float:
        if value is None:
            raise RewardError(f"the reward it builds on ({self.base.name!r}) gave None")
        if truncated and self.overlong is not None:
            return self.overlong
        short, long = self.right if value > self.threshold else self.wrong
        progress = min(length / self.max_length, 1.0)
        return long + 0.5 * (short - long) * (1 + math.cos(math.pi * progress))


# ----------------------------------------------------------------------------------------------------
# A language model as judge, on an OpenAI-compatible server: cached on disk, retried, bounded.

QUESTION = (
    "Rate how well the answer responds to the prompt, from 1 (useless) to 10 (excellent).\n\n"
    "Prompt:\n{prompt}\n\nAnswer:\n{completion}\n\n"
    "Reply with the rating in double brackets, for example [[7]]."
)


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

    Raises:
        RecipeError: a bad address, pattern, question or scale.
    """

    name = "judge"

    def __init__(
        self,
        *,
        url: str,
        model: str,
        question: str = QUESTION,
        system: str | None = None,
        pattern: str = r"\[\[\s*(-?\d+(?:\.\d+)?)\s*\]\]",
        low: Number = 1.0,
        high: Number = 10.0,
        temperature: NonNegative = 0.0,
        max_tokens: Count = 512,
        cache: str | None = None,
        concurrency: Count = 8,
        seconds: Positive = 60.0,
        retries: Whole = 3,
        backoff: NonNegative = 0.5,
        api_key_env: str | None = None,
    ) -> None:
        if not low < high:
            raise RecipeError(f"reward {self.name!r}: low is {low} and high {high}; expected low < high")
        try:
            self.fields = {name for _, name, _, _ in Formatter().parse(question) if name is not None}
        except ValueError as error:
            raise RecipeError(f"reward {self.name!r}: question: {error}; double a brace that is no field") from None
        if "completion" not in self.fields:
            raise RecipeError(f"reward {self.name!r}: the question has no {{completion}}; got {shown(question)}")
        self.client = JsonClient(url, timeout=seconds, retries=retries, backoff=backoff, api_key_env=api_key_env)
        self.model, self.question, self.system = model, question, system
        found = extractor(pattern, f"reward {self.name!r}: pattern")
        assert found is not None  # there is a pattern
        self.pattern: re.Pattern[str] = found
        self.low, self.high, self.temperature, self.max_tokens = low, high, temperature, max_tokens
        self.cache = None if cache is None else Path(cache).expanduser()
        self.concurrency = concurrency
        self.counts = {"requests": 0, "cached": 0}

    @classmethod
    def check(cls, **settings: Any) -> None:
        """Raises `RecipeError` for settings that do not work. Neither server nor key need be there yet."""
        cls(**{**settings, "api_key_env": None})

    async def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any
    ) -> list[float | RewardFailure]:
        self.counts = {"requests": 0, "cached": 0}
        bodies = [self._body(i, prompts, completions, columns) for i in range(len(completions))]
        keys = [fingerprint(body) for body in bodies]
        different = list(dict(zip(keys, bodies, strict=True)).items())
        scores = await gather(self.client, self._score, different, self.concurrency)
        by_key = {key: score for (key, _), score in zip(different, scores, strict=True)}
        return [by_key[key] for key in keys]

    def _body(
        self, index: int, prompts: Sequence[Any], completions: Sequence[str], columns: dict[str, Any]
    ) -> dict[str, Any]:
        known = {name: values[index] for name, values in columns.items()}
        known |= {"prompt": _text(prompts[index]), "completion": completions[index]}
        if missing := sorted(self.fields - known.keys()):
            raise RewardError(f"the question names {missing}; the rows have {sorted(known)}")
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages.append({"role": "user", "content": self.question.format_map(known)})
        return {
            "model": self.model,
            "messages": messages,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }

    async def _score(self, http: Any, question: tuple[str, dict[str, Any]]) -> float | RewardFailure:
        key, body = question
        path = None if self.cache is None else self.cache / key[:2] / f"{key}.json"
        reply = _cached(path)
        asked = reply is None
        if reply is None:
            try:
                reply = await self.client.ask(http, "/v1/chat/completions", body, _reply, self.max_tokens)
                reply = self.client.clean(reply)
            except ServerError as error:
                return RewardFailure(f"the judge gave no answer: {error}")
            self.counts["requests"] += 1
        else:
            self.counts["cached"] += 1
        found = self.pattern.findall(reply)
        try:
            score = float(found[-1]) if found else math.nan
        except ValueError:
            score = math.nan
        usable = self.low <= score <= self.high
        # Another reply may have the score that this one lacks, unless the judge says the same every time.
        if asked and path is not None and (usable or self.temperature == 0):
            write_json(path, {"request": body, "reply": reply})
        if not usable:
            return RewardFailure(f"the judge's reply has no score from {self.low:g} to {self.high:g}: {shown(reply)}")
        return (score - self.low) / (self.high - self.low)


def _cached(path: Path | None) -> str | None:
    if path is None or not path.is_file():
        return None
    try:
        return str(read_json(path)["reply"])
    except (ValueError, KeyError, TypeError, OSError) as error:
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


@dataclass(frozen=True)
class RewardKind:
    """A reward that comes with the library.

    Attributes:
        name: its name in recipes.
        build: its constructor; all arguments are keyword-only.
        what: one line for listings.
        objects: arguments that are not settings: in a recipe `model` is a model, the tokenizers are the runner's.
        defaults: of the settings that every reward has, where they are others.
    """

    name: str
    build: Callable[..., Callable[..., Any]]
    what: str
    objects: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)


REWARDS: dict[str, RewardKind] = {
    k.name: k
    for k in (
        RewardKind("exact", ExactMatch, "the answer is the column's text"),
        RewardKind("numeric", NumericMatch, "the answer is the column's number (GSM8K's format, boxed, last number)"),
        RewardKind("math", MathMatch, "the answer equals the column's mathematically, by math-verify"),
        RewardKind("classification", Classification, "the class named is the column's"),
        RewardKind("format", FormatPattern, "the completion matches a regular expression"),
        RewardKind("overlong", SoftOverlong, "DAPO's penalty near the length limit"),
        RewardKind("cosine", CosineLength, "a reward for being right that depends on the length"),
        RewardKind("judge", Judge, "a language model's score, from an OpenAI-compatible server"),
        RewardKind(
            "reward_model",
            RewardModel,
            "a trained reward model's score of the whole completion",
            frozenset({"model", "tokenizer", "reward_tokenizer"}),
            {"timeout": None},  # a model does not hang, and its size and the rollout's decide how long it takes
        ),
    )
}


def check_reward(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Validate a recipe's settings of a reward before anything is loaded.

    Args:
        name: a name in `REWARDS`, or an import string, "module:function" or "path.py:function".
        settings: the reward's own settings, without its objects (see `RewardKind`), and those of every reward
            (`RewardFunction`: weight, timeout, on_error, error_value, on_none, name). Of a class that an import
            string names, its keyword-only arguments are settings; a function has none.

    Returns:
        All settings, defaults included.

    Raises:
        RecipeError: unknown reward or setting (with the nearest right name), a wrong type or value; of ours also what
            its constructor refuses.
    """
    shared, own, build = _parts(name, settings)
    what = f"reward {name!r}"
    if build is None and own:
        raise RecipeError(f"{what}: unknown setting {next(iter(own))!r}{nearest(next(iter(own)), shared_types())}")
    checked = validate_settings(what, build, own, excluded=reward_objects(name)) if build is not None else {}
    if name in REWARDS and not reward_objects(name):
        # What types cannot say: patterns, addresses, what is installed.
        getattr(REWARDS[name].build, "check", REWARDS[name].build)(**checked)
    return checked | validate_settings(what, RewardFunction, shared)


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
    shared = {k: checked.pop(k) for k in shared_types()}
    if name in REWARDS:
        if "model" in REWARDS[name].objects and objects.get("model") is None:
            raise RecipeError(f"reward {name!r} needs a model")
        function = REWARDS[name].build(**objects, **checked)
    else:
        function = load_callable(name)
        if isinstance(function, type):
            function = function(**checked)
    return RewardFunction(function, **{**shared, "name": shared["name"] or _short(name)})


def shared_types() -> dict[str, Any]:
    """Name and annotation of the settings that every reward has."""
    return keyword_types(RewardFunction)


def _parts(name: str, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], Callable[..., Any] | None]:
    """Settings of every reward, settings of this one, and what takes the latter (None: a plain function)."""
    if name not in REWARDS and ":" not in name:
        known = nearest(name, REWARDS)
        raise RecipeError(f"unknown reward {name!r}{known} (or an import string, 'module:function')")
    shared = {k: v for k, v in settings.items() if k in shared_types()}
    shared = {**(REWARDS[name].defaults if name in REWARDS else {}), **shared}
    own = {k: v for k, v in settings.items() if k not in shared}
    if name in REWARDS:
        return shared, own, REWARDS[name].build
    function = load_callable(name)
    return shared, own, function if isinstance(function, type) else None


def _short(name: str) -> str:
    return name.rpartition(":")[2] or name
