"""Benchmarks: whether a credit is right (`tokengrain bench credit`), and which claims hold (`bench claims`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokengrain.bench.corruption import corruption_test
    from tokengrain.bench.credit import bench_credit

__all__ = ["bench_credit", "corruption_test"]

_HOMES = {"bench_credit": "credit", "corruption_test": "corruption"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
