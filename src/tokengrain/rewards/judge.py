"""A language model as judge, on an OpenAI-compatible server: cached on disk, retried, bounded."""

from __future__ import annotations

import asyncio
import math
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import Formatter
from typing import Any

from tokengrain.callables import Count, NonNegative, Number, Positive, Whole
from tokengrain.errors import RecipeError, shown
from tokengrain.files import fingerprint, read_json, write_json
from tokengrain.rewards.answers import extractor
from tokengrain.rewards.base import RewardError, RewardFailure
from tokengrain.rollout.client import JsonClient, ServerError

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
        different, stop = dict(zip(keys, bodies, strict=True)), threading.Event()
        # Threads of its own: asyncio has as few as the machine has processors, and waits for them before it ends.
        pool, loop = ThreadPoolExecutor(self.concurrency), asyncio.get_running_loop()
        try:
            scores = await asyncio.gather(
                *(loop.run_in_executor(pool, self._score, key, body, stop) for key, body in different.items())
            )
        finally:
            stop.set()  # when this is cancelled, threads at work make no further attempts
            pool.shutdown(wait=False, cancel_futures=True)
        by_key = dict(zip(different, scores, strict=True))
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

    def _score(self, key: str, body: dict[str, Any], stop: threading.Event) -> float | RewardFailure:
        path = None if self.cache is None else self.cache / key[:2] / f"{key}.json"
        reply = _cached(path)
        asked = reply is None
        if reply is None:
            try:
                reply = self.client.post("/v1/chat/completions", body, _reply, stop)
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
