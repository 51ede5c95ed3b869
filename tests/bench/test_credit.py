"""`bench_credit` on a world of one sentence: numbers, log, own sources, page and command line."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from tests.credit.small import llama, pairs, tokenizer
from tokengrain.bench import credit
from tokengrain.bench.cli import bench_app
from tokengrain.bench.credit import append_line, bench_credit, repair_log
from tokengrain.bench.page import _short, _table, _terminal_table
from tokengrain.bench.questions import counted_passes, measure
from tokengrain.bench.sources import Bench, chosen_sources, exchanged, own_source, world_samples
from tokengrain.errors import RecipeError, read_json, read_log
from tokengrain.method import make_credit
from tokengrain.worlds import load_world

WORLD = "world://stories?size=one-sentence&pairs=64"
OWN = str(Path(__file__).parent / "rigged.py") + ":long_words"
QUICK: dict[str, Any] = {"seeds": 2, "steps": 4, "prompts": 30, "console": Console(quiet=True)}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run over two seeds with a few sources, one of them trained and one own."""
    folder = tmp_path_factory.mktemp("bench")
    sources = ["exact", "random", "worth", "surprise", "contrastive_dpo"]
    return folder, bench_credit(WORLD, sources=sources, credit=[OWN], output=folder, **QUICK)


def by_source(result: dict[str, Any], measure: str) -> dict[str, Any]:
    return {e["source"]: e["measures"][measure] for e in result["sources"]}


def test_the_truth_agrees_with_itself_and_comes_first(first: tuple[Path, dict[str, Any]]) -> None:
    _, result = first
    assert result["sources"][0]["source"] == "exact"
    for name in ("spearman", "auc", "auc_harm", "top1", "scale", "r2"):
        exact = by_source(result, name)["exact"]
        assert (exact["mean"], exact["low"], exact["high"]) == pytest.approx((1, 1, 1), abs=1e-4), name
    skill = by_source(result, "skill")
    assert skill["exact"]["mean"] > 0.8 > 0.3 > skill["random"]["mean"]
    rho = by_source(result, "spearman")["random"]
    assert len(rho["by_seed"]) == 2
    assert rho["mean"] == pytest.approx(sum(rho["by_seed"]) / 2)
    assert rho["low"] <= rho["mean"] <= rho["high"]


def test_passes_are_counted(first: tuple[Path, dict[str, Any]]) -> None:
    passes = {name: m["mean"] for name, m in by_source(first[1], "passes").items()}
    assert (passes["exact"], passes["random"], passes["long_words"]) == (0, 0, 0)
    assert passes["surprise"] >= 1
    assert passes["contrastive_dpo"] == 2 * passes["surprise"]
    reads = by_source(first[1], "reads")
    assert reads["contrastive_dpo"]["mean"] == pytest.approx(2 * reads["surprise"]["mean"])
    assert by_source(first[1], "training_seconds")["contrastive_dpo"]["mean"] > 0


def test_counting_sees_models_inside_functions() -> None:
    batch, model = pairs(tokenizer()), llama(1)
    make_credit("guide", model=model, reference=llama(2))(batch)
    with counted_passes() as passes:
        (lambda b: make_credit("guide", model=model, reference=llama(1))(b))(batch)
        model(batch.prompt(0)[None])
    once = passes.calls
    assert once >= 3
    make_credit("surprise", model=model)(batch)
    assert passes.calls == once


def test_a_seed_has_data_of_its_own(first: tuple[Path, dict[str, Any]]) -> None:
    _, result = first
    worth = by_source(result, "spearman")["worth"]["by_seed"]
    assert worth[0] != worth[1]
    world = load_world(WORLD + "&seed=1")
    truth = world.credit_truth(30, seed=1)
    found, _ = measure(world.credit("worth"), truth)
    assert found["spearman"] == pytest.approx(worth[1])


def test_finished_parts_are_not_run_again(first: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, result = first
    ran: list[tuple[str, ...]] = []
    real = credit.run_unit

    def watched(unit: credit.Unit, *args: Any) -> None:
        ran.append(unit.missing)
        real(unit, *args)

    monkeypatch.setattr(credit, "run_unit", watched)
    sources = ["exact", "random", "worth", "surprise", "contrastive_dpo"]
    again = bench_credit(WORLD, sources=sources, credit=[OWN], output=folder, **QUICK)
    assert ran == []
    assert again["runs"] == result["runs"]
    # A kill in the middle of a line: this run, and the one before it in the log, are done again.
    log = folder / credit.LOG
    lines = log.read_text().splitlines()
    log.write_text("\n".join(lines[:-2]) + "\n" + lines[-2][: len(lines[-2]) // 2])
    repaired = bench_credit(WORLD, sources=sources, credit=[OWN], output=folder, **QUICK)
    assert ran == [("contrastive_dpo", "long_words")]
    assert by_source(repaired, "spearman") == by_source(result, "spearman")
    assert len(read_log(log)) == len(lines)


def test_other_settings_and_other_code_are_other_runs(tmp_path: Path) -> None:
    unit = credit.Unit(WORLD, "", "pairs", 0, 4, 30)
    source = chosen_sources(["worth"], load_world(WORLD))[0]
    file = tmp_path / "mine.py"
    keys = []
    for power in (1, 2):
        file.write_text(f"def mine(batch):\n    return batch.labels.float() ** {power}\n")
        keys.append(credit.key_of(unit, own_source(f"{file}:mine")))
    others = [credit.Unit(WORLD, "", "pairs", 0, 5, 30), credit.Unit(WORLD, "", "pairs", 0, 4, None)]
    keys += [credit.key_of(u, source) for u in (unit, *others)]
    assert len(set(keys)) == 5


@pytest.mark.parametrize("cut", [b'{"a": 2', '{"a": "ε'.encode()[:-1]])
def test_log_survives_a_cut(tmp_path: Path, cut: bytes) -> None:
    log = tmp_path / "log.jsonl"
    append_line(log, {"a": "ε\u2028\x85"})  # what ends a line for Python does not here
    with log.open("ab") as file:
        file.write(cut)
    assert read_log(log) == [{"a": "ε\u2028\x85"}]
    repair_log(log)
    append_line(log, {"a": 3})
    assert read_log(log) == [{"a": "ε\u2028\x85"}, {"a": 3}]


class Words(HTMLParser):
    """Text of a page, and addresses of anything it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.loads = "", []

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.loads += [v for k, v in attrs if k in ("src", "href")]


def test_page_shows_every_source_beside_the_truth_and_loads_nothing(first: tuple[Path, dict[str, Any]]) -> None:
    folder, result = first
    html = (folder / "credit.html").read_text()
    page = Words()
    page.feed(html)
    assert page.loads == []
    for entry in result["sources"][1:]:
        assert html.count(f'data-name="{entry["source"]}"') == 2 * credit.SHOWN
    assert html.count('data-name="exact advantage"') == 2 * credit.SHOWN
    assert result["samples"][0]["chosen"]["tokens"][0].strip() in page.text
    assert "top-1" in page.text
    assert read_json(folder / "credit.json")["samples"] == result["samples"]
    tables = (folder / "credit.md").read_text()
    assert all(f"| {entry['source']} | " in tables for entry in result["sources"])
    assert "NaN" not in (folder / "credit.json").read_text()


def test_command_line_with_an_own_source(tmp_path: Path) -> None:
    arguments = ["credit", "--world", WORLD, "--seeds", "2", "--prompts", "20", "--source", "worth"]
    own = f"{Path(__file__).parent / 'rigged.py'}:of_completions"
    found = CliRunner().invoke(bench_app, [*arguments, "--credit", own, "--output", str(tmp_path)])
    assert found.exit_code == 0, found.output
    for word in ("of_completions", "worth", "credit.html", "AUC"):
        assert word in found.output
    assert (tmp_path / "credit.html").is_file()
    as_json = CliRunner().invoke(bench_app, [*arguments, "--output", str(tmp_path), "--json"])
    assert [e["source"] for e in json.loads(as_json.stdout)["sources"]] == ["worth"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "3"], "--seed: of the corruption test, which needs --data"),
        (["--model", "m", "--how", "swap"], "--model, --how: of the corruption test"),
        (["--data", "rows.jsonl", "--jobs", "2", "--seeds", "5"], "--seeds, --jobs: of no use with --data"),
    ],
)
def test_options_that_would_do_nothing_are_refused(arguments: list[str], message: str) -> None:
    found = CliRunner().invoke(bench_app, ["credit", *arguments])
    assert isinstance(found.exception, RecipeError)
    assert message in str(found.exception)


def test_help_teaches() -> None:
    text = CliRunner().invoke(bench_app, ["credit", "--help"], env={"COLUMNS": "120"}).output
    for word in ("--credit", "my_credit.py:reward", "runs/tgdpo", "--regime", "corruption"):
        assert word in text


@pytest.mark.slow
def test_two_processes_give_the_same_numbers(first: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    sources = ["exact", "worth"]
    found = bench_credit(WORLD, sources=sources, output=tmp_path, jobs=2, regimes=["noisy"], **QUICK)
    expected = by_source(first[1], "auc")
    assert {k: v["by_seed"] for k, v in by_source(found, "auc").items()} == {k: expected[k]["by_seed"] for k in sources}
    assert {e["regime"] for e in found["sources"]} == {"noisy"}


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'guide'"):
        bench_credit(WORLD, sources=["giude"], output=tmp_path, **QUICK)
    with pytest.raises(RecipeError, match="no callable 'nothing'"):
        bench_credit(WORLD, sources=[], credit=[OWN.replace("long_words", "nothing")], output=tmp_path, **QUICK)
    with pytest.raises(RecipeError, match="one name"):
        bench_credit(WORLD, sources=[], credit=[OWN, OWN], output=tmp_path, **QUICK)
    with pytest.raises(RecipeError, match="jobs > 1"):
        bench_credit(WORLD, sources=[], credit=[make_credit("random")], output=tmp_path, jobs=2, **QUICK)


def test_a_world_without_what_a_source_reads_is_not_asked() -> None:
    class Bare:
        name = "bare"

    names = [s.name for s in chosen_sources(None, Bare())]
    assert "guide" in names
    assert not {"worth", "reward", "contrastive"} & set(names)
    with pytest.raises(RecipeError, match="reads the world's 'credit', and 'bare' has none"):
        chosen_sources(["worth"], Bare())


def test_exchanged_pairs_train_the_reverse_model() -> None:
    world = load_world(WORLD)
    rows = world_samples(world)
    turned = exchanged(rows)
    assert [c.ids for c in turned[0].completions] == [c.ids for c in rows[0].completions[::-1]]
    bench = Bench(load_world(WORLD), steps=6)
    batch = load_world(WORLD).credit_truth(30).batch
    reference = bench.world.reference
    forth, back = (make_credit("guide", model=bench.model(n), reference=reference)(batch) for n in ("guide", "reverse"))
    assert float(torch.corrcoef(torch.stack([forth, back]))[0, 1]) < -0.5
    assert not math.isnan(bench.seconds["guide"])


@pytest.mark.parametrize(
    ("low", "mean", "high", "text"),
    [
        (0.4, 0.5, 0.6, "0.50 ±.10"),
        (-0.3, -0.1, 0.2, "−0.10 (−.30–.20)"),
        (10.57, 10.9, 11.25, "10.90 (10.57–11.25)"),
        (None, 0.5, None, "0.50"),
    ],
)
def test_narrow_cells_lose_no_digits(low: float | None, mean: float, high: float | None, text: str) -> None:
    assert _short({"mean": mean, "low": low, "high": high}, "auc") == text
    assert " " not in _short({"mean": mean, "low": low, "high": high}, "seconds"), "of a cost only the mean"


def test_columns_without_a_number_are_left_out() -> None:
    """Where the truth has only losses, as in worlds of pictures, the AUC is that of harm."""

    def entry(**means: float | None) -> dict[str, Any]:
        return {"source": "s", "measures": {name: {"mean": m, "low": None, "high": None} for name, m in means.items()}}

    names, losses = ("spearman", "auc", "auc_harm", "top1"), entry(spearman=0.5, auc=None, auc_harm=0.9, top1=None)
    assert _table("t", names, [losses], [])["columns"] == ["source", "ρ", "AUC harm"]
    shown = _terminal_table("", [losses], ("spearman", "auc", "top1")).columns
    assert [column.header for column in shown] == ["source", "ρ", "AUC harm"]
    both = entry(spearman=0.5, auc=0.7, auc_harm=0.9, top1=None)
    assert _table("t", names, [losses, both], [])["columns"] == ["source", "ρ", "AUC", "AUC harm"]
