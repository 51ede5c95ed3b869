"""A server on loopback that answers wrongly in every way we could think of; the first part of the path says how.

`MODES` maps a name to what is sent. A value is a `Reply` or a function of the request's body that gives one, or gives
the choices of a completions answer. Pieces of a reply that are numbers are seconds to wait.
"""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat
from typing import Any, NamedTuple

IDS, LOGPS = [5, 9, 7, 1], [-1.0, -2.0, -0.5, -0.1]
ESCAPES = "\x1b[31mred\x1b]0;title\x07 [bold]bold[/bold] :boom:"


class Reply(NamedTuple):
    """A status, the pieces of a body, and headers; `Content-Length` is not added."""

    status: int
    body: Iterable[bytes | float] = ()
    headers: tuple[tuple[str, str], ...] = (("Content-Type", "application/json"),)


def whole(value: Any, status: int = 200) -> Reply:
    return Reply(status, [value if isinstance(value, bytes) else json.dumps(value).encode()])


def to(place: str, status: int = 302) -> Reply:
    return Reply(status, (), (("Location", place), ("Content-Length", "0")))


def headed(*headers: tuple[str, str], status: int = 200, body: Iterable[bytes | float] = (b"{}",)) -> Reply:
    return Reply(status, body, (("Content-Type", "application/json"), *headers))


def choice(index: int = 0, ids: Any = IDS, logps: Any = LOGPS, finish: Any = "stop", **other: Any) -> dict[str, Any]:
    """One completion of an answer, right unless something else is given."""
    return {
        "index": index,
        "token_ids": ids,
        "logprobs": {"token_logprobs": logps},
        "finish_reason": finish,
        **other,
    }


def all_choices(**wrong: Any) -> Callable[[Any], list[Any]]:
    return lambda body: [choice(index, **wrong) for index in range(body["n"])]


def logp(value: Any) -> Callable[[Any], list[Any]]:
    return all_choices(logps=[value, *LOGPS[1:]])


def token(value: Any) -> Callable[[Any], list[Any]]:
    return all_choices(ids=[5, value, 7, 1])


def named(name: str) -> Callable[[Any], list[Any]]:
    return all_choices(ids=None, logprobs={"token_logprobs": LOGPS, "tokens": [name] * 4})


def said(content: Any) -> Reply:
    return whole({"choices": [{"message": {"content": content}}]})


def long(tokens: int) -> Callable[[Any], list[Any]]:
    return all_choices(ids=[5] * tokens, logps=[-1.0] * tokens, finish="length")


TRANSPORT: dict[str, Any] = {
    "redirect to another port": lambda other: to(f"http://localhost:{other}/stolen"),
    "redirect that keeps the body": lambda other: to(f"http://localhost:{other}/stolen", 307),
    "redirect to a name with a user": lambda other: to(f"http://me:secret@localhost:{other}/stolen"),
    "redirect without a scheme": lambda other: to(f"//localhost:{other}/stolen"),
    "redirect to a file": to("file:///etc/passwd"),
    "redirect to ftp": to("ftp://127.0.0.1:1/x"),
    "redirect to https": to("https://127.0.0.1:1/x"),
    "redirect to no address": to("http://[::1"),
    "redirect in a circle": to("/redirect in a circle/v1/again"),
    "redirect without a place": Reply(302, (), (("Content-Length", "0"),)),
    "status 500": whole({"error": {"message": ESCAPES}}, 500),
    "status 400": whole({"error": {"message": ESCAPES}}, 400),
    "status 200 with an error": whole({"error": {"message": ESCAPES}}),
    "status 299": whole({}, 299),
    "status 999": whole({}, 999),
    "error that is huge": whole({"error": {"message": "A" * 5_000_000}}, 400),
    "error that is a list": whole([1, [2]], 400),
    "retry after 30 years": headed(("Retry-After", "1e9"), ("Content-Length", "0"), status=429, body=()),
    "retry after NaN": headed(("Retry-After", "nan"), ("Content-Length", "0"), status=503, body=()),
    "drop by drop": headed(("Content-Length", "100000"), body=[b" ", 0.2] * 10_000),
    "cut off": headed(("Content-Length", "100000"), body=[b'{"choices":[']),
    "chunks that are none": headed(("Transfer-Encoding", "chunked"), body=[b"zz\r\nx\r\n"]),
    "no end": headed(body=repeat(b" " * 1_000_000)),
    "length of a petabyte": headed(("Content-Length", str(10**15))),
    "length that is negative": headed(("Content-Length", "-5")),
    "bomb of gzip": headed(("Content-Encoding", "gzip"), body=[gzip.compress(bytes(200_000_000), 1)]),
    "bomb in a bomb": headed(
        ("Content-Encoding", "gzip, gzip"), body=[gzip.compress(gzip.compress(bytes(200_000_000), 1))]
    ),
    "gzip that is cut off": headed(("Content-Encoding", "gzip"), body=[gzip.compress(b"{}" + bytes(999))[:-9]]),
    "packed in another way": headed(("Content-Encoding", "br"), body=[b"\x0b\x02\x80{}\x03"]),
    "gzip that is none": headed(("Content-Encoding", "gzip"), body=[b"abc"]),
    "headers without end": Reply(200, (), tuple((f"X-{i}", "y" * 1000) for i in range(2000))),
    "bytes that are no text": whole(b"\xff\xfe<html>"),
    "brackets without end": whole(b"[" * 200_000 + b"]" * 200_000),
    "plain text": Reply(200, [b"hello"], (("Content-Type", "text/plain"),)),
    "no body": whole(b""),
    "null": whole(None),
    "a number of 5000 digits": whole(b"9" * 5000),
    "silence": headed(body=[3600.0]),
}
COMPLETIONS: dict[str, Any] = {
    "one too few": lambda body: all_choices()(body)[:-1],
    "twice as many": lambda body: all_choices()(body) * 2,
    "none": lambda body: [],
    "choices that are text": lambda body: "abc",
    "choices that are numbers": lambda body: [1] * body["n"],
    "choices by name": lambda body: {"0": choice()},
    "one index twice": lambda body: [choice(0)] * body["n"],
    "index that is text": lambda body: [choice(i and "x") for i in range(body["n"])],
    "index that is negative": lambda body: [choice(-i) for i in range(body["n"])],
    "index that is true": lambda body: [choice(bool(i)) for i in range(body["n"])],
    "no log-probabilities": all_choices(logps=None),
    "log-probabilities too few": all_choices(logps=LOGPS[:2]),
    "log-probabilities in a list": all_choices(logprobs=[1]),
    "log-probability NaN": logp(float("nan")),
    "log-probability -inf": logp(float("-inf")),
    "log-probability positive": logp(5.0),
    "log-probability null": logp(None),
    "log-probability text": logp("a"),
    "log-probability true": logp(True),
    "log-probability -1e300": logp(-1e300),
    "log-probability of 400 digits": logp(-(10**400)),
    "id beyond any vocabulary": token(99_999_999_999),
    "id just beyond the vocabulary": token(258),
    "id of 70 bits": token(2**70),
    "id negative": token(-1),
    "id with a fraction": token(1.5),
    "id true": token(True),
    "id text": token("6"),
    "id null": token(None),
    "no ids": all_choices(ids=[], logps=[]),
    "one token too many": lambda body: long(body["max_tokens"] + 1)(body),
    "5000 tokens": long(5000),
    "megabytes of tokens": long(300_000),
    "finish null": all_choices(finish=None),
    "finish abort": all_choices(finish="abort"),
    "finish a list": all_choices(finish=["stop"]),
    "names that are none": named("token_id:x"),
    "names of 5000 digits": named("token_id:" + "9" * 5000),
    "names that are negative": named("token_id:-4"),
}
RIGHT: dict[str, Any] = {
    "right": all_choices(),
    "end in the middle": all_choices(ids=[1, 1, 1, 1]),
    "end, and length": all_choices(finish="length"),
    "padding": all_choices(ids=[0, 0, 0, 0]),
}
JUDGE: dict[str, Any] = {
    "score NaN": said("[[nan]]"),
    "score of 400 digits": said(f"[[{'9' * 400}]]"),
    "score behind megabytes": said("x" * 10_000_000 + "[[5]]"),
    "score too high": said("[[11]]"),
    "score below": said("[[-1]]"),
    "brackets for a slow pattern": said("[" * 200_000 + "[[" * 50_000),
    "escapes": said(ESCAPES),
    "content a number": said(5),
    "content null": said(None),
    "no message": whole({"choices": []}),
    "message a list": whole({"choices": [{"message": ["x"]}]}),
}
MODES = TRANSPORT | COMPLETIONS | RIGHT | JUDGE


class Evil(ThreadingHTTPServer):
    """Answers as the first part of a path says; `other` is the port of one that should never be asked."""

    daemon_threads = True

    def __init__(self, other: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.other, self.requests = other, list[tuple[str, Any]]()
        self.leaving = threading.Event()

    def url(self, mode: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{mode.replace(' ', '%20')}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client went away, as it should."""


class _Handler(BaseHTTPRequestHandler):
    server: Evil

    def do_GET(self) -> None:
        self._reply(None)

    def do_POST(self) -> None:
        self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _reply(self, body: Any) -> None:
        self.server.requests.append((self.path, self.headers.get("Authorization")))
        mode = self.path.split("/")[1].replace("%20", " ")
        found = MODES.get(mode, whole({}))
        if callable(found):
            found = found(self.server.other if mode in TRANSPORT else body)
        reply = found if isinstance(found, Reply) else whole({"choices": found})
        self.close_connection = True
        with suppress(OSError):
            self.send_response(reply.status)
            for name, value in reply.headers:
                self.send_header(name, value)
            self.end_headers()
            for piece in reply.body:
                if isinstance(piece, bytes):
                    self.wfile.write(piece)
                    self.wfile.flush()
                elif self.server.leaving.wait(piece):
                    return

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def evil() -> Iterator[Evil]:
    """The server, and another one that it points at, which nobody may have asked at the end."""
    with _running(Evil()) as other, _running(Evil(other.server_port)) as server:
        yield server
        assert not other.requests, "a redirect was followed to another server"


@contextmanager
def _running(server: Evil) -> Iterator[Evil]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.leaving.set()
        server.shutdown()
        server.server_close()
        thread.join()
