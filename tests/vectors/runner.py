"""Reads files of test vectors, calls the library through adapters, compares.

An adapter belongs to a (method, function). It turns a case's padded arrays into flat tokens, calls the
public function that users call, and returns the expected keys that it can produce, "loss" among them.
Gradients are taken here: `grad_<input>` is the gradient of the loss with respect to that input;
`wrong_grad_<input>...` is a negative control, which the gradient must differ from. Values may be nested:
a dict of losses gives a dict of gradients, and a dict that holds a "loss" gets its gradients beside it.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tests.vectors

RTOL, ATOL = 1e-6, 1e-9
CONTROL = re.compile(r"wrong_grad_(?P<input>.+?)(_if_.*)?")


@dataclass
class Case:
    """One case of a file; its inputs as tensors (float64, or long where all numbers are whole).

    Rows of unequal length are a list of tensors. Inputs that are not numbers (names of groups, steps with a state)
    stay as they are.
    """

    name: str
    params: dict[str, Any]
    inputs: dict[str, Any]
    expected: Mapping[str, Any]

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Case:
        expected = data["expected"]
        keys = {key for path in flattened(expected) for key in path.split(".")}
        controls = {m["input"] for key in keys if (m := CONTROL.fullmatch(key))}
        wanted = {key.removeprefix("grad_") for key in keys if key.startswith("grad_")} | controls
        inputs = {}
        for name, value in data.get("inputs", {}).items():
            if not _numbers(value) or (isinstance(value, list) and any(map(_ragged, value))):
                inputs[name] = value
                continue
            dtype = torch.long if name.endswith(("labels", "ids")) else torch.float64
            rows = [
                torch.tensor(np.asarray(row, dtype=np.float64), dtype=dtype).requires_grad_(name in wanted)
                for row in (value if _ragged(value) else [value])
            ]
            inputs[name] = rows if _ragged(value) else rows[0]
        return cls(data["name"], dict(data.get("params", {})), inputs, expected)

    def settings(self, *names: str, **renamed: str) -> dict[str, Any]:
        """The case's parameters as keyword arguments; one that is not named here is an error."""
        known = {**{n: n for n in names}, **renamed}
        if unknown := set(self.params) - set(known):
            raise ValueError(f"the adapter does not know the parameters {sorted(unknown)}")
        return {known[name]: value for name, value in self.params.items()}


Adapter = Callable[[Case], dict[str, Any]]
ADAPTERS: dict[tuple[str, str], Adapter] = {}


def adapter(method: str, function: str) -> Callable[[Adapter], Adapter]:
    """Register an adapter. The first one of a method also serves cases that name no function."""

    def register(run: Adapter) -> Adapter:
        ADAPTERS[method, function] = run
        return run

    return register


@cache
def _load_adapters() -> None:
    for module in pkgutil.iter_modules(tests.vectors.__path__, "tests.vectors."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def adapter_for(method: str, function: str | None) -> Adapter | None:
    _load_adapters()
    if function is None:
        return next((run for (owner, _), run in ADAPTERS.items() if owner == method), None)
    return ADAPTERS.get((method, function))


@dataclass
class Result:
    """Outcome of one case: `differences` by key, or the adapter's `error`; neither means passed."""

    method: str
    function: str | None
    name: str
    differences: dict[str, str] = field(default_factory=dict)
    skipped_keys: list[str] = field(default_factory=list)
    error: str | None = None
    skipped: bool = False

    @property
    def failed(self) -> bool:
        return bool(self.differences or self.error)


def run_case(method: str, data: Mapping[str, Any]) -> Result:
    """Run one case of a file of `method`."""
    function = data.get("function")
    result = Result(method, function, data["name"])
    run = adapter_for(method, function)
    if run is None:
        result.skipped = True
        return result
    try:
        case = Case.read(data)
        produced = with_gradients(case, run(case))
    except Exception as error:
        result.error = f"{type(error).__name__}: {error}"
        return result
    produced = flattened(produced)
    for key, expected in flattened(case.expected).items():
        control = CONTROL.fullmatch(key)
        if control:
            difference = compare(produced[f"grad_{control['input']}"], expected)
            if difference is None:
                result.differences[key] = "equal to the negative control"
        elif key in produced:
            difference = compare(produced[key], expected)
            if difference is not None:
                result.differences[key] = difference
        else:
            result.skipped_keys.append(key)
    return result


def flattened(value: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested dicts, and of lists of dicts, by their path: `{"loss.token_mean": ...}`."""
    if isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        return {path: value}
    prefix = f"{path}." if path else ""
    return {k: v for name, part in value.items() for k, v in flattened(part, f"{prefix}{name}").items()}


def compare(produced: Any, expected: Any) -> str | None:
    """None if equal within the tolerances, else what differs. NaN and infinities must match exactly."""
    if not _numbers(expected):
        return None if produced == expected else f"{produced!r}, expected {expected!r}"
    if _ragged(expected):
        if len(produced) != len(expected):
            return f"{len(produced)} rows, expected {len(expected)}"
        # What is produced may be padded to the longest row.
        rows = (compare(p[: len(e)], e) for p, e in zip(produced, expected, strict=True))
        return next((f"row {i}: {difference}" for i, difference in enumerate(rows) if difference), None)
    expected = np.asarray(expected, dtype=np.float64)
    if isinstance(produced, Tensor):
        produced = produced.detach().numpy()
    produced = np.asarray(produced, dtype=np.float64)
    if produced.shape != expected.shape:
        return f"shape {produced.shape}, expected {expected.shape}"
    if np.allclose(produced, expected, rtol=RTOL, atol=ATOL, equal_nan=True):
        return None
    finite = np.isfinite(produced) & np.isfinite(expected)
    odd = int((~finite & ~((produced == expected) | (np.isnan(produced) & np.isnan(expected)))).sum())
    largest = float(np.abs(produced - expected)[finite].max()) if finite.any() else 0.0
    return f"largest error {largest:.3g}" + (f", {odd} NaN or infinite values differ" if odd else "")


def run_paths(paths: Iterable[str | Path], write: Callable[[str], None] = print) -> int:
    """Run files, and all `*.json` below folders; write what differs or was skipped; return an exit status."""
    files = [file for path in paths for file in _files(Path(path))]
    results = []
    for file in files:
        data = json.loads(file.read_text(encoding="utf-8"))
        results += [(file, run_case(data["method"], case)) for case in data["cases"]]
    for file, result in results:
        for line in _lines(result):
            write(f"{file.name}: {line}")
    missing = {(r.method, r.function) for _, r in results if r.skipped}
    for method, function in sorted(missing, key=str):
        write(f"no adapter: {method} {function or '(its only function)'}")
    failed = sum(r.failed for _, r in results)
    skipped = sum(r.skipped for _, r in results)
    write(f"{len(results) - failed - skipped} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


def with_gradients(case: Case, produced: dict[str, Any]) -> dict[str, Any]:
    wanted = {n: x for n, x in case.inputs.items() if _has_gradient(x)}
    for part in produced.values():
        if isinstance(part, dict) and "loss" in part:
            with_gradients(case, part)
    if not wanted or "loss" not in produced:
        return produced
    loss = produced["loss"]
    for name, tensor in wanted.items():
        if isinstance(loss, dict):
            produced[f"grad_{name}"] = {kind: _gradient(value, tensor) for kind, value in loss.items()}
        else:
            produced[f"grad_{name}"] = _gradient(loss, tensor)
    return produced


def _has_gradient(value: Any) -> bool:
    rows = value if isinstance(value, list) and value else [value]
    return all(isinstance(row, Tensor) and row.requires_grad for row in rows)


def _gradient(loss: Tensor, tensor: Any) -> Any:
    if isinstance(tensor, list):
        return [_gradient(loss, row) for row in tensor]
    (grad,) = torch.autograd.grad(loss, tensor, allow_unused=True, retain_graph=True)
    return torch.zeros_like(tensor) if grad is None else grad


def _numbers(value: Any) -> bool:
    """Whether it is a number, or a nested list of numbers and nothing else. Some files write "-inf", and null in a
    list where there is no number, which is NaN."""
    if isinstance(value, list):
        return all(v is None or _numbers(v) for v in value)
    return isinstance(value, (int, float)) or value in ("-inf", "inf", "nan")


def _ragged(value: Any) -> bool:
    """Whether nested lists of numbers are of unequal lengths, so that they are no array."""
    try:
        np.asarray(value, dtype=np.float64)
    except ValueError:
        return True
    return False


def _lines(result: Result) -> list[str]:
    where = f"{result.name} ({result.method} {result.function or ''})".replace(" )", ")")
    lines = [f"FAILED {where}: {key}: {what}" for key, what in result.differences.items()]
    if result.error:
        lines.append(f"FAILED {where}: {result.error}")
    if result.skipped_keys:
        lines.append(f"keys skipped in {where}: {', '.join(result.skipped_keys)}")
    return lines


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.rglob("*.json"))
    if not path.is_file():
        raise FileNotFoundError(f"no file or folder {str(path)!r}")
    return [path]
