"""JSON over HTTP with timeouts, retries and bounded concurrency. Only the standard library is needed."""

from __future__ import annotations

import copy
import json
import logging
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from http.client import HTTPException
from typing import Any, TypeVar

from tokengrain.errors import RecipeError, shown
from tokengrain.rollout.base import RolloutError

logger = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")

# Too many requests, server busy or broken: another attempt may succeed. Other codes are final.
AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
# There is a server, but no such path, or not for this.
NO_LIST = frozenset({404, 405, 501})
LONGEST_PAUSE = 60.0


class ServerError(RolloutError):
    """A server that gave no usable answer, after the retries that make sense.

    Attributes:
        status: the code with which it refused; None where it did not answer, or not usably.
    """

    status: int | None = None


class JsonClient:
    """Posts and reads JSON, with retries.

    Connection errors, timeouts, the status codes in `AGAIN` and answers that are not JSON are retried, with
    pauses that double (and the server's `Retry-After`); any other status is an error at once.

    Args:
        url: the server's root, such as "http://localhost:8000" ("/v1" at the end is taken off).
        timeout: seconds without an answer that end an attempt.
        retries: further attempts after the first.
        backoff: seconds of the first pause.
        api_key_env: name of the environment variable that holds the key; None: no key is sent.

    Raises:
        RecipeError: not an http(s) address, or the variable is not set.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 600.0,
        retries: int = 5,
        backoff: float = 0.5,
        api_key_env: str | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise RecipeError(f"server address is {url!r}; expected one that begins with http:// or https://")
        if timeout <= 0 or retries < 0 or backoff < 0:
            raise RecipeError(f"timeout {timeout}, retries {retries}, backoff {backoff}; expected > 0, >= 0, >= 0")
        if api_key_env is not None and api_key_env not in os.environ:
            raise RecipeError(f"the environment variable {api_key_env!r} for the server's key is not set")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout, self.retries, self.backoff, self.api_key_env = timeout, retries, backoff, api_key_env

    def briefer(self, timeout: float, retries: int = 0) -> JsonClient:
        """The same client with at most this time-out, and so many retries."""
        other = copy.copy(self)
        other.timeout, other.retries = min(self.timeout, timeout), retries
        return other

    def post(self, path: str, body: Any, check: Callable[[Any], T], stop: threading.Event | None = None) -> T:
        """Post `body` to `path`; the answer goes through `check`.

        Args:
            check: turns the decoded answer into a result; a ValueError of it counts as a malformed answer and is
                retried.
            stop: no further attempt once this is set.

        Raises:
            ServerError: no usable answer; names the address, what was wrong last, and the attempts.
        """
        return self._asked(path, body, check, stop)

    def get(self, path: str, check: Callable[[Any], T]) -> T:
        """The same without anything to send."""
        return self._asked(path, None, check, None)

    def _asked(self, path: str, body: Any, check: Callable[[Any], T], stop: threading.Event | None) -> T:
        reason = ""
        for attempt in range(self.retries + 1):
            pause = min(self.backoff * 2**attempt * random.uniform(0.5, 1.0), LONGEST_PAUSE)
            try:
                return check(self._once(path, body))
            except urllib.error.HTTPError as error:
                reason = f"status {error.code}: {_message(error)}"
                if error.code not in AGAIN:
                    failure = ServerError(f"{self.url}{path}: {reason}")
                    failure.status = error.code
                    raise failure from None
                pause = max(pause, _retry_after(error))
            except (OSError, HTTPException, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
            if attempt == self.retries or (stop is not None and stop.is_set()):
                break
            logger.warning("%s%s: %s; trying again in %.1f s", self.url, path, reason, pause)
            if stop is not None:
                stop.wait(pause)
            else:
                time.sleep(pause)
        raise ServerError(f"{self.url}{path}: {reason} (attempts: {attempt + 1}, timeout {self.timeout:g} s)")

    def _once(self, path: str, body: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.api_key_env]}"
        content, method = (None, "GET") if body is None else (json.dumps(body).encode(), "POST")
        request = urllib.request.Request(self.url + path, content, headers, method=method)
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            found = answer.read()
        # Some endpoints answer with plain text or with nothing.
        if "json" not in (answer.headers.get("Content-Type") or ""):
            return found.decode(errors="replace")
        return json.loads(found)


def served_models(client: JsonClient) -> list[str]:
    """The names of the models that a server lists; none where it has no such list.

    Raises:
        ServerError: it does not answer, or refuses.
    """
    try:
        return client.get("/v1/models", _model_names)
    except ServerError as error:
        if error.status in NO_LIST:
            return []
        raise


def _model_names(answer: Any) -> list[str]:
    try:
        return [str(model["id"]) for model in answer["data"]]
    except (KeyError, TypeError):
        raise ValueError(f"the answer is no list of models: {shown(answer)}") from None


def gather(function: Callable[[T, threading.Event], R], items: Sequence[T], concurrency: int) -> list[R]:
    """`function(item, stop)` for all items in threads, in order; the first error stops the rest.

    Args:
        concurrency: most calls at a time.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(max(1, min(concurrency, len(items)))) as pool:
        futures = [pool.submit(function, item, stop) for item in items]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            raise
    return [future.result() for future in futures]


def _message(error: urllib.error.HTTPError) -> str:
    """What the server says was wrong, in OpenAI's form or as it stands."""
    try:
        text = error.read().decode(errors="replace")
    except (OSError, HTTPException):
        return str(error.reason)
    try:
        found: Any = json.loads(text)
        found = found.get("error", found) if isinstance(found, dict) else found
        return str(found.get("message", found)) if isinstance(found, dict) else shown(found)
    except ValueError:
        return shown(text)


def _retry_after(error: urllib.error.HTTPError) -> float:
    try:
        return min(float(error.headers.get("Retry-After") or 0), LONGEST_PAUSE)
    except ValueError:  # a date
        return 0.0
