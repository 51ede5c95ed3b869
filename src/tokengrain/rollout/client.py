"""`JsonClient`: JSON over HTTP, bounded in time, size and number, with retries; for samplers, judges and transfers.

What a server says is not trusted: neither its size and time, nor where it points, nor what it repeats of the key.
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import os
import random
import re
import zlib
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from tokengrain.errors import RecipeError, RolloutError, require, shown
from tokengrain.settings import check_trusted

T = TypeVar("T")
R = TypeVar("R")
logger = logging.getLogger(__name__)

# Too many requests, server busy or broken: another attempt may succeed. Other codes are final.
AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
LONGEST_PAUSE, LONGEST_CONNECT = 60.0, 30.0
# Bytes of an answer: at most this, and for each token that was asked for.
MOST_BYTES, TOKEN_BYTES = 1 << 22, 512
REDIRECTS = 3


class ServerError(RolloutError):
    """No usable answer after the retries that make sense; `status` is the code of a server that refused."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class _RefusedError(Exception):
    """A status that is no success, a redirect elsewhere, too long an answer; `pause`: seconds to wait, None: final."""

    def __init__(self, reason: str, status: int | None = None, pause: float | None = None) -> None:
        super().__init__(reason)
        self.status, self.pause = status, pause


@dataclass
class JsonClient:
    """Posts and reads JSON, with retries.

    Connection errors, timeouts, the status codes in `AGAIN` and answers that are not JSON are retried, with
    pauses that double (and the server's `Retry-After`); any other status is an error at once. Redirects are
    followed within the server only, so that the key goes nowhere else; no message has the key.

    Args:
        url: the server's root, such as "http://localhost:8000" ("/v1" at the end is taken off).
        timeout: seconds that an attempt may take, to the last byte. backoff: seconds of the first pause.
        api_key_env: name of the environment variable that holds the key; None: no key is sent.
    """

    url: str
    timeout: float = 600.0
    retries: int = 5
    backoff: float = 0.5
    api_key_env: str | None = None

    def __post_init__(self) -> None:
        check_trusted(f"the server {self.url!r}")
        url, timeout, retries, backoff = self.url, self.timeout, self.retries, self.backoff
        what = "the server's address holds a user or a query, which may be secrets; expected the key in api_key_env"
        require("@" not in url and "?" not in url, RecipeError, what)
        try:
            known = httpx.URL(url).scheme in ("http", "https") and bool(httpx.URL(url).host)
        except httpx.InvalidURL:
            known = False
        what = f"server address is {url!r}; expected one that begins with http:// or https://"
        require(known, RecipeError, what)
        what = f"timeout {timeout}, retries {retries}, backoff {backoff}; expected > 0, >= 0, >= 0"
        require(timeout > 0 and retries >= 0 and backoff >= 0, RecipeError, what)
        self.url = url.rstrip("/").removesuffix("/v1")
        self._key()

    def _key(self) -> str | None:
        if self.api_key_env is None:
            return None
        key, what = os.environ.get(self.api_key_env, "").strip(), f"the environment variable {self.api_key_env!r}"
        require(key, RecipeError, f"{what} for the server's key is not set")
        require(key.isascii() and key.isprintable(), RecipeError, f"{what} is no key: it has characters beyond ASCII")
        return key

    def clean(self, text: str) -> str:
        """The text without the key, should the server repeat it: in capitals too, and cut off by a limit of ours."""
        key = self._key()
        if key is None:
            return text
        start, rest = key[:8], key[8:]
        cut = re.escape(start) + "".join(f"(?:{re.escape(c)}" for c in rest) + ")?" * len(rest)
        return re.sub(cut if len(rest) < 100 else re.escape(key), "[key]", text, flags=re.IGNORECASE)

    def briefer(self, timeout: float, retries: int = 0) -> JsonClient:
        """The same client with at most this time-out, and so many retries."""
        other = copy.copy(self)
        other.timeout, other.retries = min(self.timeout, timeout), retries
        return other

    def post(self, path: str, body: Any, check: Callable[[Any], T]) -> T:
        """`ask` once, from code that is not asynchronous."""
        return finished(lambda: gather(self, lambda http, _: self.ask(http, path, body, check), [None], 1))[0]

    async def ask(self, http: httpx.AsyncClient, path: str, body: Any, check: Callable[[Any], T], tokens: int = 0) -> T:
        """The server's answer, turned into a result by `check`, whose ValueError counts as a malformed answer.

        Args:
            http: the connections, see `gather`. body: None: a GET.
            tokens: that the answer may have, which bounds its size.

        Raises:
            ServerError: no usable answer; names the address, what was wrong last, and the attempts.
        """
        limit = MOST_BYTES + TOKEN_BYTES * tokens
        for attempt in range(self.retries + 1):
            pause = min(self.backoff * 2**attempt * random.uniform(0.5, 1.0), LONGEST_PAUSE)
            try:
                async with asyncio.timeout(self.timeout):
                    content = await self._once(http, path, body, limit)
                return check(content)
            except _RefusedError as error:
                reason = self.clean(str(error))
                if error.pause is None:
                    raise ServerError(f"{self.url}{path}: {reason}", error.status) from None
                pause = max(pause, min(error.pause, LONGEST_PAUSE, self.timeout))
            except TimeoutError:
                reason = f"TimeoutError: no whole answer within {self.timeout:g} s"
            except (OSError, httpx.HTTPError, httpx.InvalidURL, ValueError, RecursionError) as error:
                reason = self.clean(plain(_cause(error)))
            if attempt < self.retries:
                logger.warning("%s%s: %s; trying again in %.1f s", self.url, path, reason, pause)
                await asyncio.sleep(pause)
        raise ServerError(f"{self.url}{path}: {reason} (attempts: {attempt + 1}, timeout {self.timeout:g} s)")

    async def _once(self, http: httpx.AsyncClient, path: str, body: Any, limit: int) -> Any:
        key, method = self._key(), "GET" if body is None else "POST"
        headers = {"Accept-Encoding": "gzip"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
        target = httpx.URL(self.url + path)
        for _ in range(REDIRECTS + 1):
            async with http.stream(method, target, json=body, headers=headers) as answer:
                content = await _content(answer, limit)
            if not answer.has_redirect_location:
                break
            new = target.join(answer.headers["Location"])
            if (new.scheme, new.host, new.port) != (target.scheme, target.host, target.port):
                where = plain(f"{new.scheme}://{new.host}:{new.port or ''}".rstrip(":"))
                raise _RefusedError(f"status {answer.status_code}: redirects to another server, {where}; not followed")
            target, method = new, "GET" if answer.status_code == 303 else method
            body = None if method == "GET" else body
        if not answer.is_success:
            reason = f"status {answer.status_code}: {_message(content) or answer.reason_phrase}"
            again = _retry_after(answer) if answer.status_code in AGAIN else None
            raise _RefusedError(reason, answer.status_code, again)
        # Some endpoints answer with plain text or with nothing.
        if "json" not in answer.headers.get("Content-Type", ""):
            return content.decode(errors="replace")
        return json.loads(content)


async def _content(answer: httpx.Response, limit: int) -> bytes:
    """The body, as long as it is no longer than `limit` bytes. It is unpacked no further than that."""
    length, content = answer.headers.get("Content-Length", ""), bytearray()
    packed, status = answer.headers.get("Content-Encoding", "identity").lower(), f"status {answer.status_code}"
    what = f"{status}: the answer is packed as {plain(packed)}; expected gzip"
    require(packed in ("identity", "gzip"), _RefusedError, what)
    too_long = _RefusedError(f"{status}: the answer has more than {limit} bytes")
    if length.isdecimal() and int(length[:20]) > limit:
        raise too_long
    unpack = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        async for part in answer.aiter_raw():
            content += part if packed == "identity" else unpack.decompress(part, limit + 1 - len(content))
            if len(content) > limit:
                raise too_long
    except zlib.error as error:
        raise ValueError(f"the answer is damaged: {error}") from None
    require(packed == "identity" or unpack.eof, ValueError, "the answer is cut off")
    return bytes(content)


def plain(text: str) -> str:
    """Foreign text for a message: short, and without control characters."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text[:300])


def _cause(error: BaseException) -> str:
    """The error in words; of one of httpx the system's own below it, which says more."""
    if isinstance(error, BaseExceptionGroup):
        return _cause(error.exceptions[0])
    below = error.__cause__ or error.__context__ if type(error).__module__.startswith("http") else error.__cause__
    if below is not None and not isinstance(error, ValueError):
        return _cause(below)
    said = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
    return f"{type(error).__name__}: {said}"


def _message(content: bytes) -> str:
    """What the server says was wrong, in OpenAI's form or as it stands."""
    text = content.decode(errors="replace")
    try:
        found: Any = json.loads(text)
        found = found.get("error", found) if isinstance(found, dict) else found
        text = str(found.get("message", found)) if isinstance(found, dict) else shown(found)
    except (ValueError, RecursionError):
        text = shown(text) if text else ""
    return plain(text)


def _retry_after(answer: httpx.Response) -> float:
    try:
        return max(float(answer.headers.get("Retry-After", 0)), 0.0)
    except ValueError:  # a date
        return 0.0


async def gather(
    client: JsonClient,
    function: Callable[[httpx.AsyncClient, T], Coroutine[Any, Any, R]],
    items: Sequence[T],
    concurrency: int,
) -> list[R]:
    """`function(http, item)` for all items, in order, so many at a time; the first error stops the rest."""
    gate, wait = asyncio.Semaphore(concurrency), min(client.timeout, LONGEST_CONNECT)
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    timeout = httpx.Timeout(client.timeout, connect=wait)
    secure = client.url.startswith("https")  # reading certificates takes a while
    async with httpx.AsyncClient(verify=secure, limits=limits, timeout=timeout, follow_redirects=False) as http:

        async def one(item: T) -> R:
            async with gate:
                return await function(http, item)

        tasks = [asyncio.ensure_future(one(item)) for item in items]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()


def finished(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """The result of an asynchronous call, also where a loop is running (a notebook): then from another thread."""
    if asyncio._get_running_loop() is None:
        return asyncio.run(work())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(work())).result()
