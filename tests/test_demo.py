"""The demo: on a smaller world its table and files, and that it repeats; on its own world the table of the docs."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from benchmarks.doc_tables import demo_table
from rich.console import Console

from tokengrain import demo
from tokengrain.errors import RunError, read_json

PAGE = Path(__file__).resolve().parents[1] / "docs/results/demo.md"
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


# ---- The table of docs/results/demo.md ----

METHODS = dict(demo.METHODS)
WITHIN = {"reward": 0.05, "±": 0.02, "KL": 0.05, "frontier": 3, "wins": 3, "low": 3, "high": 3, "ρ": 0.02, "AUC": 0.02}
"""What a processor's rounding may change; docs/results/demo.md says so."""


def numbers(table: str) -> dict[str, list[float]]:
    """The numbers of every method's row."""
    rows = re.findall(r"^\| ([\w-]+) \|(.*)\|$", table, re.MULTILINE)
    return {name: [float(number) for number in re.findall(r"(?<!\d)-?\d[\d.]*", row)] for name, row in rows}


@pytest.mark.parametrize("methods", [["dpo"], pytest.param([*METHODS], marks=pytest.mark.slow)], ids=["dpo", "all"])
def test_the_table_of_the_docs_is_what_this_machine_makes(
    methods: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "METHODS", {name: METHODS[name] for name in methods})
    demo.run_demo(tmp_path / "demo", console=Console(quiet=True))
    made = demo_table(read_json(tmp_path / "demo" / "metrics.json"))
    here, told = numbers(made), numbers(PAGE.read_text(encoding="utf-8"))
    assert [*told] == ["base", *METHODS.values()]
    assert [*here] == ["base", *demo.METHODS.values()]
    far = {
        f"{name}, {column}": (told[name][place], number)
        for name, row in here.items()
        for place, (number, (column, most)) in enumerate(zip(row, WITHIN.items(), strict=False))
        if abs(number - told[name][place]) > most + 1e-9
    }
    assert not far, f"{PAGE.name} differs from what this machine makes in {far}; here the table is\n{made}"
