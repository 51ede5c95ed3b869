"""The HTML report: everything in one file, every number of the run in it, clear errors for what is no run."""

from __future__ import annotations

import html
import io
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from benchmarks.picture import write_picture
from rich.console import Console

from tests.report.folders import METHODS, PAIRS, credit_entries, make_demo, make_run, write
from tokengrain.errors import DataError, RecipeError, RunError
from tokengrain.report.html import charts, short, write_report
from tokengrain.report.svg import nice_ticks, number, tick
from tokengrain.report.terminal import inspect_rows

VOID = {"meta", "br", "input", "link", "img", "hr"}


class Page(HTMLParser):
    """Checks that tags are closed, and collects attributes, texts and ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())

    def values(self, name: str) -> list[str | None]:
        return [v for _, n, v in self.attributes if n == name]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def demo_text(demo: Path) -> str:
    path = write_report(demo)
    assert path == demo / "report.html"
    return path.read_text(encoding="utf-8")


def test_one_file_without_network(demo_text: str) -> None:
    page = Page(demo_text)
    assert not page.values("src")
    assert not [v for tag, n, v in page.attributes if (n == "href" and not (v or "").startswith("#")) or tag == "link"]
    assert "@import" not in demo_text
    assert not re.search(r"url\(", demo_text)
    assert not re.search(r"https?://(?!www\.w3\.org/)", demo_text)
    assert len(demo_text.encode()) < 5_000_000


def test_phone_dark_mode_and_language(demo_text: str) -> None:
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in demo_text
    assert "prefers-color-scheme: dark" in demo_text
    assert '<html lang="en">' in demo_text


def test_demo_table_has_every_method_and_number(demo: Path, demo_text: str) -> None:
    page = Page(demo_text)
    metrics = json.loads((demo / "metrics.json").read_text())
    rows = re.findall(r"<tr>(.*?)</tr>", demo_text.split("</thead>")[1].split("</table>")[0], re.S)
    assert len(rows) == len(METHODS)
    for row, m in zip(rows, metrics["methods"], strict=True):
        cells = [html.unescape(re.sub(r"<[^>]+>", "", c)).strip() for c in re.findall(r"<t[hd].*?</t[hd]>", row, re.S)]
        share = m["frontier_share"]
        assert cells[0] == m["name"]
        assert cells[1] == f"{m['true_reward']:.2f} ± {1.96 * m['true_reward_se']:.2f}"
        assert cells[2] == f"{m['kl']:.2f}"
        assert cells[3] == ("–" if share is None else f"{share:.2f}")
        if m["win_rate_low"] is not None:
            assert cells[4] == f"{m['win_rate']:.2f} {m['win_rate_low']:.2f}–{m['win_rate_high']:.2f}"
    assert "2025-01-31" in page.texts


def test_plot_places_methods_under_the_curve_where_their_numbers_are(demo_text: str) -> None:
    plots = re.findall(r'<svg class="chart (?:wide|narrow)".*?</svg>', demo_text, re.S)
    assert len(plots) == 2
    for plot in plots:
        root = ET.fromstring(plot)
        tips = [e.get("data-tip") or "" for e in root.iter("circle") if e.get("class") == "hit"]
        for name, reward in (("DPO", "2.02"), ("TGDPO", "2.92")):
            assert any(t.startswith(f"{name}: reward {reward} ± 0.12") for t in tips)
        places = {
            t.split(":")[0]: e for e in root.iter("circle") if (t := e.get("data-tip") or "").split(":")[0] in METHODS
        }
        by_kl = [float(places[n].get("cx", "nan")) for n in ("base", "TDPO2", "DPO", "T-REG", "TGDPO", "SimPO")]
        assert by_kl == sorted(by_kl)
        by_reward = [float(places[n].get("cy", "nan")) for n in ("TGDPO", "T-REG", "SimPO", "DPO", "TDPO2", "base")]
        assert by_reward == sorted(by_reward)  # y grows downwards


def test_labels_of_the_plot_do_not_overlap(demo_text: str) -> None:
    for plot in re.findall(r'<svg class="chart (?:wide|narrow)".*?</svg>', demo_text, re.S):
        boxes = []
        for e in ET.fromstring(plot).iter("text"):
            if "name" in (e.get("class") or "").split():
                width, x, y = 7.5 * len(e.text or ""), float(e.get("x", 0)), float(e.get("y", 0))
                x -= {"start": 0.0, "middle": width / 2, "end": width}[e.get("text-anchor", "start")]
                boxes.append((x, y - 10, x + width, y))
        for i, a in enumerate(boxes):
            assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[i + 1 :])


def test_heat_maps_show_every_token_with_sign_and_number(demo: Path, demo_text: str) -> None:
    samples = json.loads((demo / "credit_samples.json").read_text())
    page = Page(demo_text)
    shown = [v for v in page.values("data-v") if v is not None]
    truths = sum(len(s[side]["tokens"]) for s in samples[::2] for side in ("chosen", "rejected"))
    assert len(shown) == sum(len(s[side]["tokens"]) for s in samples for side in ("chosen", "rejected")) + truths
    spans = re.findall(r'<span class="t (\w)"[^>]*?data-v="([^"]*)"', demo_text)
    assert {sign for sign, _ in spans} == {"p", "n", "z"}
    for sign, value in spans:
        assert sign == "z" or value.startswith({"p": "+", "n": "−"}[sign])
    # The text of a heat map is the completion's, white space included.
    first = re.search(r'<p class="tokens">(.*?)</p>', demo_text, re.S)
    assert first is not None
    assert html.unescape(re.sub(r"<[^>]+>", "", first[1])) == PAIRS[0][1]


def test_curves_of_all_methods(demo_text: str) -> None:
    curves = demo_text.split('id="curves"')[1].split('id="settings"')[0]
    for title in ("loss", "pair accuracy", "reward margin"):
        assert f"<figcaption>{title}</figcaption>" in curves
    for name in METHODS[1:]:
        assert re.search(rf'data-tip="{re.escape(name)} · step', curves)
    assert "(held out)" in curves


def test_run_with_stages_settings_and_versions(tmp_path: Path) -> None:
    text = write_report(make_run(tmp_path / "run"), tmp_path / "elsewhere" / "r.html").read_text()
    Page(text)
    assert (tmp_path / "elsewhere" / "r.html").is_file()
    assert "0.68 (0.64 to 0.72, n = 200)" in text
    assert "0.51 (0.47 to 0.55, n = 200)" in text
    for words in (
        "Token rewards of 100 rows in eval.parquet, 900 rows in train.parquet",
        "method: tgdpo",
        "2.13.0",
        "DPO guide",
        ">guide ",
        ">train ",
    ):
        assert words in text


def test_evaluation_in_a_world(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    base = {"reward": 0.01, "reward_low": -0.02, "reward_high": 0.04, "kl": 0.0}
    trained = {"reward": 2.5, "reward_low": 2.4, "reward_high": 2.6, "kl": 1.75, "share": 0.61}
    write(run / "evaluation.json", {"world_base": base, "world": trained})
    text = write_report(run).read_text()
    Page(text)
    rows = re.findall(r"<tr>(.*?)</tr>", text.split("In the world")[1].split("</table>")[0], re.S)
    cells = [html.unescape(re.sub(r"<[^>]+>", "|", row)) for row in rows[1:]]
    assert [c.strip("|").replace("||", "|") for c in cells] == [
        "true reward (95 % interval)|0.01 (−0.02 to 0.04)|2.50 (2.40 to 2.60)",
        "KL to the base, nats per completion|0.00|1.75",
        "frontier share|–|0.61",
    ]


def test_contents_lead_to_every_section(demo_text: str, tmp_path: Path) -> None:
    for text in (demo_text, write_report(make_run(tmp_path / "run")).read_text()):
        targets = re.findall(r'<a href="#([^"]+)">', text)
        assert targets == re.findall(r'<section id="([^"]+)">', text)


def test_pairs_but_the_first_are_folded(demo_text: str) -> None:
    assert demo_text.count('<details class="pair" open>') == 1
    assert demo_text.count('<details class="pair">') == len(PAIRS) - 1


def test_equal_maps_are_shown_once(tmp_path: Path) -> None:
    """Colour is relative to a source's own scale, so a multiple of a source has the same map."""
    run = make_run(tmp_path / "run")
    entries = credit_entries({"guide": 0.1, "policy": 0.3}, truth=False)

    def times(entry: dict[str, Any], factor: float) -> dict[str, Any]:
        sides = {k: {**entry[k], "credit": [factor * v for v in entry[k]["credit"]]} for k in ("chosen", "rejected")}
        return {**entry, **sides, "source": f"{factor:g} of {entry['source']}"}

    guides = [e for e in entries if e["source"] == "guide"]
    write(run / "credit_samples.json", [*entries, *(times(e, f) for f in (0.5, -1.0, 1.0) for e in guides)])
    text = html.unescape(write_report(run).read_text())
    shown = dict.fromkeys(re.findall(r'data-name="([^"]+)"', text))
    titles = ["guide = 2.0 × 0.5 of guide = 1 of guide", "policy", "-1 of guide"]
    assert list(shown) == titles
    out = io.StringIO()
    inspect_rows(run, console=Console(file=out, width=100, color_system=None))
    assert [line for line in out.getvalue().splitlines() if "guide" in line or line == "policy"] == titles


def test_run_without_credit_says_so(tmp_path: Path) -> None:
    text = write_report(make_run(tmp_path / "run", method="dpo", credit=False)).read_text()
    Page(text)
    assert "This run has no token credit to show" in text
    assert 'class="pair"' not in text


def test_stored_credit_without_tokenizer_says_so(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    run = make_run(tmp_path / "run")
    (run / "credit_samples.json").unlink()
    row = {"prompt_ids": [[1]], "chosen_ids": [[2]], "rejected_ids": [[3]]}
    rewards = {"chosen_token_rewards": [[0.5]], "rejected_token_rewards": [[-0.5]]}
    pq.write_table(pa.table(row | rewards), run / "credit" / "train.parquet")
    assert "Token rewards are stored in credit, but the run has no tokenizer" in write_report(run).read_text()


def test_text_from_data_cannot_become_markup(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    evil = "</script><script>alert(1)</script>"
    side = {"tokens": [evil, "<b>"], "credit": [0.5, None]}
    write(run / "credit_samples.json", [{"prompt": evil, "source": evil, "chosen": side, "rejected": side}])
    text = write_report(run).read_text()
    Page(text)
    assert text.count("<script>") == 1
    assert "not counted" in text


def test_sources_that_number_rows_differently_are_one_pair(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    side = {"tokens": ["a", " b"], "credit": [0.5, -0.5]}
    entry = {"prompt": "p", "chosen": side, "rejected": side | {"tokens": ["a", " c"]}}
    other = entry | {"chosen": side | {"credit": [0.5, 0.1]}, "source": "y", "row": 0}
    write(run / "credit_samples.json", [entry | {"source": "x", "row": 7}, other])
    text = write_report(run).read_text()
    assert text.count('<details class="pair"') == 1
    assert "row 7" in text
    assert text.count('<div class="map"') == 4


def test_large_sample_file_stays_small(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    side = {"tokens": [" word"] * 3000, "credit": [0.123456, -0.3, 0.0] * 1000}
    entries = [{"prompt": f"p{i}", "source": "s", "row": i, "chosen": side, "rejected": side} for i in range(40)]
    write(run / "credit_samples.json", entries)
    path = write_report(run)
    assert path.stat().st_size < 5_000_000
    assert "2400 more tokens are not shown" in path.read_text()
    assert "16 more pairs" in path.read_text()


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such run folder"):
        write_report(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(RunError, match=r"not a run folder: it has no run.json .*notes.txt"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_interrupted_run_says_what_is_there_and_how_to_resume(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", status="interrupted")
    with pytest.raises(RunError, match=r"not finished .*finished stages: guide, credit.*tokengrain train"):
        write_report(run)


def test_demo_that_did_not_finish(tmp_path: Path) -> None:
    write(tmp_path / "metrics.json", {"kind": "demo", "methods": []})
    with pytest.raises(RunError, match="the demo did not finish; run it again"):
        write_report(tmp_path)
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(RunError, match="damaged"):
        write_report(tmp_path)


def test_damaged_credit_samples_name_the_entry(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    good = {"tokens": ["a", " b"], "credit": [0.1, 0.2]}
    write(run / "credit_samples.json", [{"prompt": "p", "chosen": good, "rejected": good | {"credit": [0.1]}}])
    with pytest.raises(DataError, match=r"row 0: field 'rejected.credit': .*got '1 numbers'; expected 2"):
        write_report(run)


def test_picture_is_a_standalone_svg(demo: Path, tmp_path: Path) -> None:
    path = write_picture(demo, tmp_path / "images" / "demo.svg")
    root = ET.fromstring(path.read_text(encoding="utf-8"))
    words = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    for word in ("wicked", "supposedly", "TGDPO", "exact advantage"):
        assert word in words
    assert "http" not in path.read_text().replace("http://www.w3.org/2000/svg", "")
    with pytest.raises(RunError, match=r"2 pairs .* there is no pair 5"):
        write_picture(demo, tmp_path / "x.svg", pair=5)


@pytest.mark.parametrize("content", [b'{"a": ', b"", b"[1]", b"null", b"\xff\xfe{}"])
@pytest.mark.parametrize(
    "name",
    ["metrics.json", "run.json", "evaluation.json", "credit/manifest.json", "train/stage.json", "train/metrics.json"],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    run = make_run(tmp_path / "run")
    (run / name).write_bytes(content)
    with pytest.raises(RunError, match=f"{name} is damaged"):
        write_report(run)


def test_a_damaged_recipe_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for content in (b"- a", b"a: [", b"\xff\xfe"):
        (run / "recipe.yaml").write_bytes(content)
        with pytest.raises(RunError, match=r"recipe\.yaml is damaged"):
            write_report(run)


def test_lines_of_a_log_that_are_no_objects_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    log = run / "train" / "log.jsonl"
    whole = write_report(run).read_text(encoding="utf-8")
    log.write_bytes(log.read_bytes() + b'[1]\nnull\n{"step": 121, "note": "\xc3')
    assert write_report(run).read_text(encoding="utf-8") == whole


def test_accuracies_of_ties_are_no_points_of_a_curve() -> None:
    """Where the policy still is its reference, rounding alone decides who is preferred."""
    rows = [{"step": 0, "eval_rewards/margins": 6e-8, "eval_accuracy": 0.285}, {"step": 9, "rewards/margins": 0.0}]
    rows += [{"step": 9, "eval_rewards/margins": 0.2, "eval_accuracy": 0.625}]
    drawn = dict(charts([("train", 0, rows)]))
    assert "0.285" not in drawn["pair accuracy"]
    assert "0.625" in drawn["pair accuracy"]
    assert drawn["reward margin"].count("train (held out) · step") == 2


def test_small_numbers_are_not_shown_as_nothing() -> None:
    assert [number(v) for v in (0.05, 0.0012, 0.00012, -0.0004)] == ["0.050", "0.001", "0.0001", "−0.0004"]
    assert [short(v) for v in (0.004, -0.0011, 0.0002)] == ["0.004", "−0.001", "2.0e−04"]
    assert short(-2e-9) == "0.00"
    assert nice_ticks(0, 4e-13) == [0, 1e-13, 2e-13, 3e-13, 4e-13], "the KL of two equal models is rounding"


def test_numbers_of_an_exploded_loss_are_short() -> None:
    assert [number(v) for v in (1234.0, 2e8, 1e9, -3.21e30)] == ["1,234", "200,000,000", "1.0e+09", "−3.2e+30"]
    assert [tick(v) for v in (1.25e-4, 250.0, 2.5e7, 2.5e30, -1e30)] == [
        "0.000125",
        "250",
        "25,000k",
        "2.5e+30",
        "−1e+30",
    ]


def test_a_report_does_not_replace_a_file_of_rows(demo: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    with pytest.raises(RecipeError, match=r"expected a name that ends in \.html"):
        write_report(demo, rows)
    assert rows.read_text() == "{}\n"
