"""A server in a thread that speaks the completions and chat protocols, with faults on demand."""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import math
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from tokengrain.rollout.local import HFGenerate
from tokengrain.rollout.sampler import PromptItem, SamplingConfig

ANSWERS = Path(__file__).with_name("vllm_answers.json")
"""What a real vLLM answered: `TOKENGRAIN_RECORD=1 make test-vllm` writes it."""


def shape(value: Any) -> Any:
    """The keys and kinds of an answer; of a list those of its first entry."""
    if isinstance(value, dict):
        return {name: shape(inner) for name, inner in value.items() if not name.startswith("token_id:")}
    return [shape(value[0])] if isinstance(value, list) and value else type(value).__name__


# transformers replaces `tie_weights` of all models while it loads one: two threads at once would leave it replaced.
LOADING = threading.Lock()


class Stub(ThreadingHTTPServer):
    """`answer(path, body)` gives the JSON (body None: a GET).

    `faults` are taken first: a status code, "hang", "garbage", "drop", "slow", "slow headers", "endless", or
    (status, headers, body).
    """

    daemon_threads = True
    request_queue_size = 64  # a client's connections all come at once

    def __init__(self, answer: Callable[[str, Any], Any]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.faults, self.requests = answer, [], []
        self.headers_seen: list[Any] = []
        self.lock, self.busy, self.most_busy = threading.Lock(), 0, 0
        self.delay = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_GET(self) -> None:
        self._take(None)

    def do_POST(self) -> None:
        self._take(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _take(self, body: Any) -> None:
        stub = self.server
        with stub.lock:
            stub.requests.append((self.path, body))
            stub.headers_seen.append(dict(self.headers))
            fault = stub.faults.pop(0) if stub.faults else None
            stub.busy += 1
            stub.most_busy = max(stub.most_busy, stub.busy)
        time.sleep(stub.delay)
        with stub.lock:
            stub.busy -= 1  # before the reply: the client asks again as soon as it has that
        self._reply(fault, body)

    def _reply(self, fault: Any, body: Any) -> None:
        status, content, headers = 200, b"", {}
        if fault == "hang":
            time.sleep(1.0)
        elif fault == "drop":
            self.close_connection = True
            return
        elif fault == "garbage":
            content = b"<html>proxy</html>"
        elif fault in ("slow", "slow headers", "endless"):
            self._drip(fault)
            return
        elif isinstance(fault, tuple):
            status, headers, content = fault[0], fault[1], "".join(fault[2:]).encode() or b"{}"
        elif isinstance(fault, int):
            status, content = fault, json.dumps({"error": {"message": f"fault {fault}"}}).encode()
        try:
            content = content or json.dumps(self.server.answer(self.path, body)).encode()
        except ValueError as error:
            status, content = 500, json.dumps({"error": {"message": str(error)}}).encode()
        except KeyError as error:  # what an answer says of a path, or of a model, that it does not know
            status, content = 404, json.dumps({"error": {"message": f"no {error}"}}).encode()
        try:
            self.send_response(status)
            headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client gave up

    def _drip(self, kind: str) -> None:
        """An answer that does not end: one byte at a time, or megabytes."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.close_connection = True
        part, pause = (b" " * 10**6, 0.0) if kind == "endless" else (b"x: y\r\n" if "headers" in kind else b" ", 0.1)
        with contextlib.suppress(OSError):
            if "headers" not in kind:
                self.end_headers()
            self.flush_headers()
            for _ in range(100):
                self.wfile.write(part)
                self.wfile.flush()
                time.sleep(pause)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(answer: Callable[[str, Any], Any]) -> Iterator[Stub]:
    stub = Stub(answer)
    thread = threading.Thread(target=stub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        stub.shutdown()
        stub.server_close()
        thread.join()


class Served:
    """What a vLLM server answers, from a model in this process; it knows new weights from disk only.

    Attributes:
        model: the one it samples from where no adapter is named; "checkpoint" replaces it.
        adapters: models with an adapter, by its name.
        loaded: the folders that it has loaded, in order.
        version: the name of its weights; longest: its `max_model_len`.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.adapters, self.loaded, self.lock = model, {}, [], threading.Lock()
        self.version, self.longest, self.first, self.paused = "default", 64, model, False
        self.tokenizer: Any = None
        self.workers, self.joined, self.awaited = 1, [], None

    def start_anew(self) -> None:
        """Be as it was when it was started, as after a crash."""
        self.model, self.version, self.adapters = self.first, "default", {}
        self.leave({})

    def __call__(self, path: str, body: Any) -> Any:
        with self.lock:
            return {
                "/get_world_size": lambda body: {"world_size": self.workers},
                "/shutdown_weight_transfer_engine": self.leave,
                "/init_weight_transfer_engine": self.join,
                "/start_weight_update": self.start,
                "/update_weights": self.update,
                "/finish_weight_update": self.finish,
                "/v1/models": lambda body: {
                    "data": [{"id": name, "max_model_len": self.longest} for name in ("m", *self.adapters)]
                },
                **({"/tokenize": lambda body: {"tokens": self.tokenizer(body["prompt"])}} if self.tokenizer else {}),
                "/pause?mode=wait": lambda body: self.pause(True),
                "/resume": lambda body: self.pause(False),
                "/weight_info": lambda body: {"weight_version": self.version},
                "/update_weight_version": self.rename,
                "/v1/completions": self.completions,
                "/collective_rpc": self.reload,
                "/reset_prefix_cache": lambda body: {"success": True},
                "/v1/load_lora_adapter": self.load,
                "/v1/unload_lora_adapter": lambda body: self.adapters.pop(body["lora_name"]) and {},
            }[path](body)

    def completions(self, body: Any) -> Any:
        assert not self.paused
        model = {"m": self.model, **self.adapters}[body["model"]]
        sampling = SamplingConfig(max_new_tokens=body["max_tokens"], stop_ids=tuple(body["stop_token_ids"]))
        item = PromptItem(body["prompt"], row=body["seed"])
        group = HFGenerate(model).sample([item], n=body["n"], sampling=sampling).groups[0]
        return {
            "choices": [
                {
                    "index": i,
                    "token_ids": c.ids,
                    "logprobs": {"token_logprobs": c.raw_logps},
                    "finish_reason": c.finish_reason,
                }
                for i, c in enumerate(group)
            ]
        }

    def pause(self, on: bool) -> Any:
        self.paused = on
        return {"status": "paused" if on else "resumed"}

    def rename(self, body: Any) -> Any:
        self.version = body["new_version"]
        return {"success": True, "new_version": self.version}

    def reload(self, body: Any) -> Any:
        assert self.paused
        self.loaded.append(body["kwargs"]["weights_path"])
        with LOADING:
            self.model = type(self.model).from_pretrained(self.loaded[-1])
        return {"results": [None]}

    def load(self, body: Any) -> Any:
        from peft import PeftModel

        assert body["lora_name"] not in self.adapters
        self.loaded.append(body["lora_path"])
        base = copy.deepcopy(self.model)
        self.adapters[body["lora_name"]] = PeftModel.from_pretrained(base, self.loaded[-1]).eval()
        return {}

    # ---- The weight transfer of vLLM; over TCP, see `Tcp` ----

    def leave(self, body: Any) -> Any:
        for connection in self.joined:
            connection.close()
        self.joined, self.awaited = [], None
        return {"message": "Weight transfer shut down"}

    def join(self, body: Any) -> Any:
        info = body["init_info"]
        identifier = base64.b64decode(info["nccl_unique_id_b64"], validate=True)
        if len(identifier) != 128 or (info["rank_offset"], info["packed"]) != (1, False):
            raise ValueError(f"init_info is {info}")
        address = ("127.0.0.1", int(identifier.rstrip(b"\0")))
        self.joined = [socket.create_connection(address) for _ in range(info["world_size"] - 1)]
        for connection in self.joined:
            connection.sendall(struct.pack("f", 0.0))  # the number that all add up
        for connection in self.joined:
            received(connection, 4)
        return {"message": "Weight transfer initialized"}

    def start(self, body: Any) -> Any:
        if self.awaited is not None or not self.paused:
            raise ValueError("start_weight_update called while a weight update is already active")
        self.awaited = set(self.model.state_dict(keep_vars=True))
        return {"message": "Weight update started"}

    def update(self, body: Any) -> Any:
        info, model = body["update_info"], copy.deepcopy(self.model)
        if not self.joined:
            self.awaited = None
            raise ValueError("NCCL weight transfer not initialized. Call init_transfer_engine() first.")
        held = model.state_dict()
        for name, dtype, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
            kind = getattr(torch, dtype)
            parts = [received(one, math.prod(shape) * kind.itemsize) for one in self.joined]
            if name not in held or list(held[name].shape) != shape:
                self.awaited = None
                raise ValueError(f"There is no module or parameter named {name!r} of shape {shape}")
            for part in parts:
                held[name].copy_(torch.frombuffer(bytearray(part), dtype=kind).view(shape))
            self.awaited.discard(name)
        self.model = model
        return {"message": "Weights updated"}

    def finish(self, body: Any) -> Any:
        tied = {"lm_head.weight"} if self.model.config.tie_word_embeddings else set()
        if self.awaited is None or self.awaited - tied:
            raise ValueError(f"finish_weight_update without {self.awaited}")
        self.awaited, self.version = None, body["weight_version"]
        return {"message": "Weight update finished"}


class ServedBySglang(Served):
    """What an SGLang server answers; it names adapters behind its model's name."""

    def __call__(self, path: str, body: Any) -> Any:
        own = {"/update_weights_from_disk": self.reload, "/load_lora_adapter": self.load}
        own |= {"/unload_lora_adapter": lambda body: self.adapters.pop(body["lora_name"]) and {}}
        own |= {"/v1/models": lambda body: {"data": [{"id": "m"}]}, "/v1/completions": self.completions}
        with self.lock:
            return own[path](body)

    def completions(self, body: Any) -> Any:
        return super().completions({**body, "model": body["model"].rpartition(":")[2]})

    def reload(self, body: Any) -> Any:
        with LOADING:
            self.model = type(self.model).from_pretrained(body["model_path"])
        return {"success": True}


def received(connection: socket.socket, count: int) -> bytes:
    """So many bytes, or ValueError where the other side has gone."""
    found = b""
    while len(found) < count:
        try:
            part = connection.recv(count - len(found))
        except OSError:
            part = b""
        if not part:
            raise ValueError("NCCL error: remote process exited")
        found += part
    return found


class Tcp:
    """In the place of `Nccl`: the same bytes over sockets, to as many workers as have joined."""

    def __init__(self) -> None:
        self.listening, self.workers, self.under_way = socket.create_server(("127.0.0.1", 0)), [], None

    def identifier(self) -> bytes:
        return str(self.listening.getsockname()[1]).encode().ljust(128, b"\0")

    def join(self, identifier: bytes, world: int) -> None:
        assert identifier == self.identifier()
        self.workers = [self.listening.accept()[0] for _ in range(world - 1)]
        total = sum(struct.unpack("f", received(worker, 4))[0] for worker in self.workers)
        for worker in self.workers:
            worker.sendall(struct.pack("f", total))

    def send(self, tensor: torch.Tensor) -> None:
        assert not hasattr(tensor, "full_tensor")
        content = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()

        def work() -> None:
            with contextlib.suppress(OSError):  # seen in the server's answer
                for worker in self.workers:
                    worker.sendall(content)

        self.under_way = threading.Thread(target=work, daemon=True)
        self.under_way.start()

    def sent(self) -> bool:
        return not self.under_way.is_alive()

    def close(self) -> None:
        for one in (self.listening, *self.workers):
            one.close()
