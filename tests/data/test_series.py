"""Time series: files of them, plots, and nearest neighbours."""

from __future__ import annotations

import gzip
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokengrain.data.rows import load_rows
from tokengrain.data.series import nearest_accuracy, plotted
from tokengrain.errors import DataError, RecipeError
from tokengrain.run.build import open_rows
from tokengrain.specs import DataSpec, SeriesSpec

HEAD = "# @classLabel true 0 1\n@problemName x\n@classLabel true t r u e\n@data\n"
ASKED = SeriesSpec(question="Which class?", classes={"0": "calm", "1": "wild"})


def written(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["a.ts", "a.ts.gz"])
def test_a_file_of_series(tmp_path: Path, name: str) -> None:
    rows = load_rows(written(tmp_path / name, HEAD + "\n1,2.5,-3e0:0\n1,2,3:4,5,6:wild one\n"))
    first, second = [row for _, row in rows]
    assert first == {"series": [[1.0, 2.5, -3.0]], "label": "0"}
    assert second == {"series": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], "label": "wild one"}
    assert rows.place(1) == (str(tmp_path / name), "1 (line 7)")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2:0\n@data\n", r"row 0 \(line 1\).*values stand before @data"),
        (HEAD + "1,2:0\n1,2\n", r"row 1 \(line 6\).*has no label"),
        (HEAD + "1,2:\n", "has no label"),
        (HEAD + "1,?:0\n", r"row 0 \(line 5\): field 'series': holds what is no number"),
        (HEAD + "1,nan:0\n", "not finite"),
        (HEAD, "there are no rows"),
    ],
)
def test_files_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(load_rows(written(tmp_path / "a.ts", text)))


def test_a_plot_shows_the_series_and_not_its_class() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    series = [[0.0, 1.0, 0.5, 2.0]]
    rows = load_rows(
        [{"series": s, "label": label, "id": i} for i, (s, label) in enumerate([(series, "0"), (series[0], 1)])]
    )
    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 30}):  # a user's own settings
        own = plotted(rows, ASKED)
    (_, first), (_, second) = own
    assert first["prompt"] == [{"role": "user", "content": "Which class?"}]
    assert (first["label"], second["label"]) == ("calm", "wild")
    assert "series" not in first
    png = first["images"][0]["bytes"]
    assert png == second["images"][0]["bytes"]
    assert png == dict(plotted(rows, ASKED))[0]["images"][0]["bytes"]
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    assert 480 < width < 600
    assert 200 < height < 250
    assert len(set(zlib.decompress(b"".join(chunks(png, b"IDAT"))))) > 10
    assert own.place(1) == rows.place(1)


def chunks(png: bytes, kind: bytes) -> list[bytes]:
    """The contents of a PNG's chunks of a kind."""
    found, at = [], 8
    while at < len(png):
        size = int.from_bytes(png[at : at + 4], "big")
        if png[at + 4 : at + 8] == kind:
            found.append(png[at + 8 : at + 8 + size])
        at += size + 12
    return found


def test_what_decides_about_pixels_is_in_the_fingerprint() -> None:
    pytest.importorskip("matplotlib")
    rows = load_rows([{"series": [1.0, 2.0]}])
    plain = SeriesSpec(question="?")
    marks = {plotted(rows, plain.model_copy(update=change)).fingerprint for change in CHANGES}
    assert len(marks) == len(CHANGES)


CHANGES: tuple[dict[str, Any], ...] = ({}, {"dpi": 50}, {"line_width": 1.0}, {"font_size": 9.0}, {"question": "!"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"series": [1.0], "label": "2"}, "field 'label': is no label of data.series.classes; got '2'; expected 0, 1"),
        ({"label": "0"}, "row 0: field 'series': there is no series"),
        ({"series": ["a"], "label": "0"}, "is no series of numbers|is empty"),
        ({"series": [1.0, float("nan")], "label": "0"}, "is empty, or not finite"),
        ({"series": [[1.0], []], "label": "0"}, "is empty, or not finite"),
    ],
)
def test_rows_that_cannot_be_drawn(row: dict[str, Any], message: str) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(DataError, match=message):
        plotted(load_rows([row]), ASKED)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RecipeError, match=r"pip install 'tokengrain\[series\]'"):
        plotted(load_rows([{"series": [1.0, 2.0], "label": "0"}]), ASKED)


def test_a_recipes_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = written(tmp_path / "a.ts", HEAD + "".join(f"{i},2,3:{i % 2}\n" for i in range(10)))
    train, held_out = open_rows(DataSpec(train=str(path), series=ASKED), seed=0)
    assert held_out is not None
    assert {row["label"] for part in (train, held_out) for _, row in part} == {"calm", "wild"}
    with pytest.raises(RecipeError, match=r"data.series is .* expected none beside world://stories"):
        open_rows(DataSpec(train="world://stories", series=ASKED), seed=0)


def test_nearest_neighbours() -> None:
    """Values tell apart what a shift in time hides from them, and spectra do not mind shifts."""
    time = np.arange(64) / 64
    known = np.stack([np.sin(2 * np.pi * k * time) for k in (2, 5)])
    shifted = np.stack([np.cos(2 * np.pi * k * time) * 3 + 7 for k in (2, 5, 2)])
    assert nearest_accuracy(known, "ab", shifted, "aba", "spectrum") == 1.0
    assert nearest_accuracy(known, "ab", known[::-1] * 2 + 1, "ba") == 1.0
    assert nearest_accuracy(known, "ab", known, "ba") == 0.0
