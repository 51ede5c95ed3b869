"""Calling reward functions: time limits, async functions, and which completion a failure belongs to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from tokengrain.errors import shown
from tokengrain.rewards.base import RewardError, RewardFailure, RewardFunction


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
