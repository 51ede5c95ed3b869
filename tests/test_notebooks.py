"""The notebooks of examples/ run as they are, offline."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from tokengrain.worlds.base_models import single_thread

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.ipynb"))


def values_of(notebook: Path) -> list[Any]:
    """Runs the code of all cells in one namespace; the value of each cell's last line, as a notebook shows it."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    space: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, notebook.name, "exec"), space)
        shown.append(eval(compile(ast.Expression(last.value), notebook.name, "eval"), space) if last else None)
    return shown


@pytest.fixture(autouse=True)
def small_and_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENGRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_see_credit() -> None:
    (notebook,) = (path for path in NOTEBOOKS if path.stem == "see_credit")
    with single_thread():
        row, sizes, maps, contrastive, words = values_of(notebook)
    assert {"prompt", "chosen", "rejected"} <= set(row)
    assert sizes[:2] == (40, 80)
    page = maps._repr_html_()
    assert page.startswith("<iframe srcdoc=")
    assert "exact advantage" in page
    assert "contrastive prompting" in page
    assert contrastive["spearman"] > 0.3 > words["spearman"]


def test_your_own_pairs() -> None:
    (notebook,) = (path for path in NOTEBOOKS if path.stem == "your_own_pairs")
    with single_thread():
        first, _, numbers, maps, report = values_of(notebook)
    assert first[0] == 60
    assert numbers[0] == 1.0
    assert numbers[3] > 0.5
    assert "log-ratio" in maps._repr_html_()
    assert report.name == "report.html"


def test_all_notebooks_are_tested_and_stored_without_output() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["see_credit", "your_own_pairs"]
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert all(cell.get("outputs", []) == [] for cell in cells)
