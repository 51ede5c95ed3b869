"""The demo on a smaller world: its table, its files, and that running it again changes nothing."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from tokengrain import demo
from tokengrain.errors import RunError, read_json

SMALL = "world://stories?size=one-phrase&pairs=64"


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("TOKENGRAIN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr(demo, "WORLD", SMALL)
    monkeypatch.setattr(demo, "METHODS", {"dpo": "DPO", "tgdpo": "TGDPO"})


@pytest.mark.usefixtures("small_demo")
def test_table_files_and_repeat(tmp_path: Path) -> None:
    shown = io.StringIO()
    screen = Console(file=shown, width=80)
    report = demo.run_demo(tmp_path / "demo", samples=4, console=screen)
    text = shown.getvalue()
    assert "TGDPO" in text
    assert "frontier" in text
    assert report.read_text(encoding="utf-8").lower().startswith("<!doctype html>")
    metrics = read_json(tmp_path / "demo" / "metrics.json")
    assert [row["method"] for row in metrics["methods"]] == ["base", "dpo", "tgdpo"]
    assert metrics["methods"][0]["kl"] == pytest.approx(0, abs=1e-9)
    assert metrics["methods"][1]["kl"] > 0
    assert {"TGDPO: guide", "TGDPO: policy"} <= {s["source"] for s in read_json(report.parent / "credit_samples.json")}
    demo.run_demo(tmp_path / "demo", samples=4, console=Console(quiet=True))
    again = read_json(tmp_path / "demo" / "metrics.json")
    assert again["methods"] == metrics["methods"]


@pytest.mark.usefixtures("small_demo")
def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tokengrain.demo.run_recipe", interrupted)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / ".metrics.17.140.tmp.json").write_text("{")  # a demo was killed while it wrote
    shown = io.StringIO()
    screen = Console(file=shown, width=80)
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(tmp_path / "demo", samples=2, console=screen)
    assert "resumes from there" in " ".join(shown.getvalue().split())


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match=r"thesis\.txt"):
        demo.run_demo(tmp_path)
