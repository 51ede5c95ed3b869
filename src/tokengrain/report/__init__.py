"""Reports: one self-contained HTML file per run, heat maps in the terminal, pictures for documents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokengrain.report.html import write_report
    from tokengrain.report.picture import write_picture
    from tokengrain.report.samples import collect_credit_samples
    from tokengrain.report.terminal import inspect_rows

__all__ = ["collect_credit_samples", "inspect_rows", "write_picture", "write_report"]

_HOMES = {
    "collect_credit_samples": "samples",
    "inspect_rows": "terminal",
    "write_picture": "picture",
    "write_report": "html",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
