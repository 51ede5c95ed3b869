"""Weights to a vLLM server without a shared folder: over HTTP and NCCL, by a trainer that does not import vLLM.

*Not run on a GPU.* It was written after the documentation and sources of vLLM 0.32.0 (weight transfer, backend "nccl").
Its tests speak to a stub of the server, with TCP in NCCL's place; NCCL's calls go to a library that writes them down.
"""

# What a server is told. The trainer is rank 0 of an NCCL group, the server's workers are the other ranks.
#
#   /get_world_size                    how many workers there are
#   /shutdown_weight_transfer_engine   leave the group of an earlier trainer
#   /init_weight_transfer_engine       the new group's unique id. Workers join while the trainer does, and then all of
#                                      them add up one number
#   /pause?mode=wait                   requests under way end, those that come wait
#   /start_weight_update
#   /update_weights                    names, types and shapes. The answer comes when all is received: meanwhile the
#                                      trainer broadcasts the tensors in this order, one by one
#   /finish_weight_update              the version's name
#   /reset_prefix_cache, /resume

from __future__ import annotations

import base64
import ctypes
import importlib.util
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tokengrain.errors import RecipeError, RolloutError, require, shown
from tokengrain.rollout.client import JsonClient

NEEDED = (
    "expected vLLM 0.32 or later on GPUs of its own, started with VLLM_SERVER_DEV_MODE=1 and "
    """--weight-transfer-config '{"backend": "nccl"}'"""
)


class Whole(Protocol):
    """A model's weights as its checkpoints have them. `iter` gives whole tensors, one at a time."""

    described: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]

    def __iter__(self) -> Iterator[Tensor]: ...


class Wire(Protocol):
    """The way from the trainer to the workers of a server."""

    def identifier(self) -> bytes:
        """128 bytes by which a worker finds the group."""

    def join(self, identifier: bytes, world: int) -> None:
        """Return when all `world` members are there, which nothing can interrupt."""

    def send(self, tensor: Tensor) -> None:
        """Begin to send."""

    def sent(self) -> bool:
        """Whether it is done. Raises `RolloutError` if it cannot be."""

    def close(self) -> None:
        """End now, whatever is under way."""


# ---- NCCL by its C interface, from the library that torch's CUDA wheels bring ----


class UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_byte * 128),)


_POINTER, _INT, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
CALLS: dict[str, list[Any]] = {
    "ncclGetUniqueId": [ctypes.POINTER(UniqueId)],
    "ncclCommInitRank": [ctypes.POINTER(_POINTER), _INT, UniqueId, _INT],
    "ncclAllReduce": [_POINTER, _POINTER, _SIZE, _INT, _INT, _POINTER, _POINTER],
    "ncclBroadcast": [_POINTER, _POINTER, _SIZE, _INT, _INT, _POINTER, _POINTER],
    "ncclCommGetAsyncError": [_POINTER, ctypes.POINTER(_INT)],
    "ncclCommAbort": [_POINTER],
}
SUM = 0
TYPES = {
    torch.int8: 0,
    torch.uint8: 1,
    torch.int32: 2,
    torch.int64: 4,
    torch.float16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bfloat16: 9,
}


class Nccl:
    """A `Wire` over NCCL, from the GPU that the calling process uses. Raises `RecipeError` where it has none."""

    def __init__(self, library: str = "libnccl.so.2") -> None:
        what = "refresh: nccl sends weights from the trainer's GPU, and torch finds no CUDA here"
        require(torch.cuda.is_available(), RecipeError, f"{what}; expected a GPU, or refresh: checkpoint")
        self.library, self.group = _loaded(library), _POINTER()
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._held: Tensor | None = None  # what is on its way must not be freed
        self._event: Any = None

    def _do(self, call: str, *given: Any) -> None:
        if code := getattr(self.library, call)(*given):
            raise RolloutError(f"{call}: {self.library.ncclGetErrorString(code).decode(errors='replace')}")

    def identifier(self) -> bytes:
        made = UniqueId()
        self._do("ncclGetUniqueId", ctypes.byref(made))
        return bytes(made)

    def join(self, identifier: bytes, world: int) -> None:
        with torch.cuda.device(self.device):  # the thread that calls has none of its own yet
            unique = UniqueId.from_buffer_copy(identifier)
            self._do("ncclCommInitRank", ctypes.byref(self.group), world, unique, 0)
            one = torch.zeros(1, device=self.device)
            stream = torch.cuda.current_stream()
            pointer, float32 = one.data_ptr(), TYPES[torch.float32]
            self._do("ncclAllReduce", pointer, pointer, 1, float32, SUM, self.group, stream.cuda_stream)
            stream.synchronize()

    def send(self, tensor: Tensor) -> None:
        with torch.cuda.device(self.device):
            self._held = tensor.to(self.device).contiguous()
            pointer, count, stream = self._held.data_ptr(), self._held.numel(), torch.cuda.current_stream()
            self._do("ncclBroadcast", pointer, pointer, count, TYPES[tensor.dtype], 0, self.group, stream.cuda_stream)
            self._event = torch.cuda.Event()
            self._event.record(stream)

    def sent(self) -> bool:
        code = _INT()
        self._do("ncclCommGetAsyncError", self.group, ctypes.byref(code))
        what = self.library.ncclGetErrorString(code.value).decode(errors="replace")
        require(code.value == 0, RolloutError, f"NCCL: {what}")
        if done := bool(self._event.query()):
            self._held = None
        return done

    def close(self) -> None:
        if self.group:
            self._do("ncclCommAbort", self.group)
            self.group = _POINTER()


def _loaded(name: str) -> Any:
    """The library by its name, or from the wheel beside torch; with the types of what is called in it."""
    found = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.nccl")
    places = [str(Path(place, "lib", name)) for place in (found and found.submodule_search_locations) or ()]
    for place in (name, *places):
        with suppress(OSError):
            library = ctypes.CDLL(place)
            break
    else:
        what = f"refresh: nccl: there is no {name}; expected torch's CUDA wheels, which bring it, or nvidia-nccl-cu12"
        raise RecipeError(what)
    for call, types in CALLS.items():
        require(
            hasattr(library, call), RecipeError, f"refresh: nccl: {name} has no {call}; expected NCCL 2.14 or later"
        )
        getattr(library, call).argtypes = types
    library.ncclGetErrorString.argtypes, library.ncclGetErrorString.restype = [_INT], ctypes.c_char_p
    return library


# ---- One server ----


class Transfer:
    """Gives one server new weights; `begin`, a `send` for each tensor, and `end`. All raise `RolloutError`.

    Attributes:
        version: the name of the weights that it was last given; None: it is in no group with this trainer.
    """

    def __init__(self, client: JsonClient) -> None:
        self.client = client
        self.once = client.briefer(client.timeout)  # what is said twice would be done twice
        self.version: str | None = None
        self.wire: Wire | None = None
        self._update: Future[None] = Future()

    def check(self) -> None:
        """Ask what can be asked before there are weights to send."""
        Nccl()
        self.workers()

    def workers(self) -> int:
        """How many processes of the server hold weights."""
        try:
            return self.client.post("/get_world_size", None, _world_size)
        except RolloutError as error:
            raise RolloutError(f"refresh: nccl: {error}; {NEEDED}") from None

    def join(self) -> None:
        """Make a group of this process and the server's workers."""
        self.close()
        world, wire = 1 + self.workers(), Nccl()
        identifier = wire.identifier()
        text = base64.b64encode(identifier).decode()
        info = {"nccl_unique_id_b64": text, "rank_offset": 1, "world_size": world, "packed": False}
        self.client.post("/shutdown_weight_transfer_engine", {}, _any)
        told = _aside(lambda: self.once.post("/init_weight_transfer_engine", {"init_info": info}, _any))
        joined = _aside(lambda: wire.join(identifier, world))
        try:
            waiting = wait([told, joined], self.client.timeout, FIRST_EXCEPTION)
            for one in waiting.done:
                one.result()
            what = f"{self.client.url}: no group within {self.client.timeout:g} s"
            require(not waiting.not_done, RolloutError, what)
        except RolloutError as error:
            absent = "" if joined.done() else f"; the workers, {world - 1} as it says, have not all joined the trainer"
            raise RolloutError(f"refresh: nccl: {error}{absent}; {NEEDED}") from None
        self.wire = wire

    def begin(self, weights: Whole) -> None:
        """Have the server wait for these weights; one that has others than it was given was started anew."""
        if self.version is None or self.client.post("/weight_info", None, _version) != self.version:
            self.join()
        self.client.post("/pause?mode=wait", {}, _any)
        self.once.post("/start_weight_update", {}, _any)
        names, types, shapes = zip(*weights.described, strict=True)
        told = {"names": names, "dtype_names": [str(t).removeprefix("torch.") for t in types], "shapes": shapes}
        self._update = _aside(lambda: self.once.post("/update_weights", {"update_info": told}, _any))

    def send(self, tensor: Tensor) -> None:
        """Send one tensor, and wait until it is there or the server has said that it does not want it."""
        assert self.wire is not None
        until = time.monotonic() + self.client.timeout
        self._check()
        self.wire.send(tensor)
        while not self.wire.sent():
            self._check()
            what = f"{self.client.url} did not take a tensor within {self.client.timeout:g} s"
            require(time.monotonic() < until, RolloutError, what)
            time.sleep(2e-4)

    def _check(self) -> None:
        if self._update.done():
            self._update.result()

    def end(self, version: str) -> None:
        """Let the server sample from the new weights, under this name."""
        wait([self._update], self.client.timeout)
        what = f"{self.client.url} has not loaded the weights within {self.client.timeout:g} s"
        require(self._update.done(), RolloutError, what)
        self._update.result()
        self.once.post("/finish_weight_update", {"weight_version": version}, _any)
        self.client.post("/reset_prefix_cache", {}, _any)
        self.client.post("/resume", {}, _any)
        self.version = version

    def close(self) -> None:
        """Leave the group. A server that does not know it is told when it is asked to join another."""
        wire, self.wire, self.version = self.wire, None, None
        if wire is not None:
            with suppress(RolloutError):
                wire.close()


def _aside(work: Callable[[], None]) -> Future[None]:
    """The end of `work`, in a thread that nobody has to wait for."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _any(answer: Any) -> Any:
    return answer


def _version(answer: Any) -> Any:
    return answer.get("weight_version") if isinstance(answer, dict) else None


def _world_size(answer: Any) -> int:
    size = answer.get("world_size") if isinstance(answer, dict) else None
    if type(size) is not int or not 0 < size < 2**16:
        raise ValueError(f"the answer has no world_size: {shown(answer)}")
    return size


def send(transfers: Sequence[Transfer], weights: Whole, version: str) -> dict[int, RolloutError]:
    """Give the servers these weights; the errors of those that have not taken them, by their place.

    `weights` is gone through to its end, whoever fails: other ranks gather with this one.
    """
    failed: dict[int, RolloutError] = {}

    def each(step: Callable[..., None], given: Any) -> None:
        for at, transfer in enumerate(transfers):
            if at not in failed:
                try:
                    step(transfer, given)
                except RolloutError as error:
                    failed[at] = error.with_traceback(None)  # which would keep the tensor
                    transfer.close()
                    with suppress(RolloutError):
                        transfer.client.briefer(10.0).post("/resume", {}, _any)

    each(Transfer.begin, weights)
    for tensor in weights:
        each(Transfer.send, tensor)
    each(Transfer.end, version)
    return failed
