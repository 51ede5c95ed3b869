"""Time series as pictures: plots of rows with a `series` column, and nearest neighbours to compare a model with."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tokengrain.data.rows import Rows, StoredRows
from tokengrain.errors import DataError, RecipeError, fingerprint, require
from tokengrain.specs import SeriesSpec


def draw(series: Sequence[Any], spec: SeriesSpec) -> bytes:
    """A PNG of the channels of a series as lines. The same with every user's own settings of matplotlib."""
    matplotlib = _matplotlib()
    settings = {"font.family": spec.font, "font.size": spec.font_size}
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **settings}):
        figure = matplotlib.figure.Figure(figsize=(spec.width, spec.height), dpi=spec.dpi)
        axes = figure.subplots()
        for number, channel in enumerate(series, start=1):
            axes.plot(channel, linewidth=spec.line_width, label=str(number))
        axes.set(xlabel=spec.xlabel, ylabel=spec.ylabel, title=spec.title)
        if len(series) > 1:
            axes.legend()
        content = io.BytesIO()
        figure.savefig(content, format="png", bbox_inches="tight", pad_inches=0.05, metadata={"Software": None})
    return content.getvalue()


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError:
        raise RecipeError("plots of series need matplotlib: pip install 'tokengrain[series]'") from None
    return matplotlib


def plotted(rows: Rows, spec: SeriesSpec) -> StoredRows:
    """Rows with `prompt` and `images` in place of their `series`, drawn once, now; other columns stay.

    Settings and matplotlib's version are part of the fingerprint, as they decide about pixels.
    """
    made, numbers = [], []
    for number, row in rows:
        where = dict(zip(("file", "row"), rows.place(number), strict=True)) | {"field": "series"}
        channels = row.get("series")
        expected = "a list of numbers, or one for each channel"
        require(isinstance(channels, Sequence) and len(channels), DataError, "there is no series", **where)
        channels = channels if isinstance(channels[0], Sequence) else [channels]
        try:
            values = [np.asarray(channel, dtype=float) for channel in channels]
        except (TypeError, ValueError):
            raise DataError("is no series of numbers", expected=expected, **where) from None
        good = all(len(v) and v.ndim == 1 and np.isfinite(v).all() for v in values)
        require(good, DataError, "is empty, or not finite", expected=expected, **where)
        others = {name: value for name, value in row.items() if name not in ("series", "prompt", "images")}
        others |= _named(others.get("label"), spec.classes, where) if spec.classes else {}
        seen = {"prompt": [{"role": "user", "content": spec.question}], "images": [{"bytes": draw(values, spec)}]}
        made.append({**seen, **others})
        numbers.append(number)
    about = [spec.model_dump(), str(_matplotlib().__version__), "plots 1"]
    return StoredRows(rows.name, made, lambda: fingerprint([rows.fingerprint, about]), Origins(rows, numbers))


def _named(label: Any, classes: Mapping[str, str], where: Mapping[str, Any]) -> dict[str, str]:
    what, expected = "is no label of data.series.classes", ", ".join(classes)
    require(str(label) in classes, DataError, what, value=label, expected=expected, **{**where, "field": "label"})
    return {"label": classes[str(label)]}


@dataclass(frozen=True)
class Origins:
    """Where rows made of others came from."""

    rows: Rows
    numbers: list[int]

    def place(self, number: int) -> tuple[str, str]:
        return self.rows.place(self.numbers[number])


# ---- Nearest neighbours ----


def features(series: np.ndarray, kind: Literal["values", "spectrum"]) -> np.ndarray:
    """Series `[n, length]` at mean 0 and deviation 1, or how strong each of their first 200 frequencies is."""
    scaled = (series - series.mean(1, keepdims=True)) / (series.std(1, keepdims=True) + 1e-9)
    return scaled if kind == "values" else np.abs(np.fft.rfft(scaled))[:, 1:200]


def nearest_accuracy(
    known: np.ndarray,
    labels: Sequence[Any],
    asked: np.ndarray,
    truth: Sequence[Any],
    kind: Literal["values", "spectrum"] = "values",
) -> float:
    """Share of series `[m, length]` whose nearest known one (Euclidean, of features) is of their own class."""
    a, b = features(asked, kind), features(known, kind)
    distance = (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)
    return float(np.mean([labels[i] == own for i, own in zip(distance.argmin(1), truth, strict=True)]))
