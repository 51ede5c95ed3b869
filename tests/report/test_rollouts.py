"""Recorded rollouts: reading them back, their part of the report, and what `inspect` prints."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.report.folders import make_run, write
from tests.report.test_html import Page
from tokengrain.errors import RunError
from tokengrain.report.html import MAX_PIECES, rollout_maps, write_report
from tokengrain.report.rows import Side, by_prompt, merged, read_rollouts, scale_of, side_of, spread
from tokengrain.report.terminal import inspect_rows

WORDS = ("so", " 12", " +", " 7", " =", " 19", " .")


def line(rollout: int = 0, completion: int = 0, length: int = 7, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """One recorded completion with every column."""
    g = torch.Generator().manual_seed(1000 * seed + 10 * rollout + completion)
    tokens = [WORDS[i % len(WORDS)] for i in range(length)]
    ratio = torch.exp(0.3 * torch.randn(length, generator=g)).tolist()
    return {
        "rollout": rollout,
        "step": 4 * rollout,
        "row": rollout % 5,
        "completion": completion,
        "prompt_ids": [5, 6],
        "ids": list(range(length)),
        "prompt": "12 + 7 =",
        "text": "".join(tokens),
        "tokens": tokens,
        "truncated": completion == 3,
        "reward": float(completion % 2),
        "rewards": {"exact": float(completion % 2), "format": 0.25},
        "advantages": [1.0 if completion % 2 else -1.0] * length,
        "entropy": [round(v, 5) for v in torch.rand(length, generator=g).tolist()],
        "ratio": [round(v, 5) for v in ratio],
        "clipped": [1.0 if r > 1.5 else -1.0 if r < 0.6 else 0.0 for r in ratio],
        **changes,
    }


def lines_file(path: Path, entries: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(e) + "\n" for e in entries))
    return path


def online_run(path: Path, entries: list[dict[str, Any]] | None, *, status: str = "done") -> Path:
    """A run whose only stage is an online one, with a log as `OnlineTrainer` writes it."""
    run = make_run(path, method="grpo", credit=False, status=status)
    record = json.loads((run / "train" / "stage.json").read_text())
    write(run / "train" / "stage.json", record | {"kind": "online"})
    rows = []
    for step in range(1, 61):
        row = {"step": step, "loss": 0.1, "kl/ref": 0.001 * step, "clip/tokens": 0.02, "seconds/update": 0.4}
        if step % 2:
            row |= {"reward/mean": step / 60, "rollout/utilisation": 0.9, "rollout/entropy": 2 - step / 60}
            row |= {"rollout/length": 30.0 + step, "seconds/rollout": 1.5, "seconds/reward": 0.1}
        rows.append(row)
    rows.append({"step": 60, "eval_reward": 0.8, "eval_correct": 0.7})
    (run / "train" / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    if entries is not None:
        lines_file(run / "train" / "rollouts.jsonl", entries)
    return run


def some(rollouts: int = 3, completions: int = 4, length: int = 7) -> list[dict[str, Any]]:
    return [line(k, c, length) for k in range(rollouts) for c in range(completions)]


def printed(source: Path, colour: bool = False, **options: Any) -> str:
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=colour, color_system="truecolor" if colour else None)
    inspect_rows(source, console=console, **options)
    return out.getvalue()


# ---- Reading ----


def test_reads_what_was_written(tmp_path: Path) -> None:
    found = read_rollouts(lines_file(tmp_path / "rollouts.jsonl", some()))
    assert len(found) == 12
    one, entry = found[5], line(1, 1)
    assert (one.rollout, one.step, one.row, one.completion) == (1, 4, 1, 1)
    assert (one.prompt, one.tokens, one.reward, dict(one.rewards)) == (
        entry["prompt"],
        entry["tokens"],
        1.0,
        entry["rewards"],
    )
    assert {name: one.columns[name] for name in one.columns} == {
        n: entry[n] for n in ("advantages", "entropy", "ratio")
    }
    assert one.clipped == entry["clipped"]
    assert [len(group) for group in by_prompt(found)] == [4, 4, 4]
    assert read_rollouts(tmp_path / "absent.jsonl") == []


def test_optional_parts_may_be_missing(tmp_path: Path) -> None:
    bare = {"rollout": 0, "step": 0, "ids": [5, 9]}
    unknown = line(1, 0, 2, reward=None, rewards={"exact": None}, entropy=[float("nan"), None], clipped=None)
    first, second = read_rollouts(lines_file(tmp_path / "rollouts.jsonl", [bare, unknown]))
    assert first.tokens == [" 5", " 9"]
    assert (first.row, first.reward, first.clipped, dict(first.columns)) == (None, None, None, {})
    assert second.reward is None
    assert second.columns["entropy"] == [None, None]
    assert side_of(first, "ratio").credit == [None, None]


def test_a_last_line_that_a_kill_cut_is_left_out(tmp_path: Path) -> None:
    path = lines_file(tmp_path / "rollouts.jsonl", some(1))
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for end in range(last + 1, len(whole) - 1, 37):
        path.write_bytes(whole[:end])
        assert len(read_rollouts(path)) == 3
    path.write_bytes(whole[:-1])  # only its line end is missing
    assert len(read_rollouts(path)) == 4
    path.write_bytes(whole + json.dumps(line(prompt="日本"), ensure_ascii=False).encode().split("本".encode())[0][:-1])
    assert len(read_rollouts(path)) == 4, "cut within a character"


def test_characters_that_look_like_line_ends(tmp_path: Path) -> None:
    entry = line(0, 0, 2, tokens=["a\u2028", "b\x85\n"])
    path = tmp_path / "rollouts.jsonl"
    path.write_text(json.dumps(entry, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_rollouts(path)[0].tokens == ["a\u2028", "b\x85\n"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": None}, "ids is None; expected a list of token ids"),
        ({"step": "4"}, "step is '4'; expected a whole number"),
        ({"rollout": None}, "rollout is None; expected a whole number"),
        ({"tokens": ["a"]}, "tokens has 1 entries; expected 7, one per token"),
        ({"advantages": [0.5] * 6}, "advantages has 6 entries; expected 7"),
        ({"entropy": ["high"] * 7}, "entropy is .*; expected a list of numbers"),
        ({"clipped": 3}, "clipped is 3; expected a list of numbers"),
        ({"reward": "good"}, "reward is 'good'; expected a number"),
        ({"rewards": [1.0]}, r"rewards is \[1.0\]; expected an object"),
        ({"rewards": {"exact": True}}, "rewards.exact is True; expected a number"),
    ],
)
def test_damaged_lines_name_file_line_and_field(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = lines_file(tmp_path / "rollouts.jsonl", [line(), line(0, 1) | changes, line(0, 2)])
    with pytest.raises(RunError, match=r"rollouts.jsonl: line 2: " + message):
        read_rollouts(path)


def test_a_line_that_is_not_json(tmp_path: Path) -> None:
    path = lines_file(tmp_path / "rollouts.jsonl", some(1))
    good = path.read_bytes()
    path.write_bytes(good.replace(b'"rollout"', b'rollout"', 1))
    with pytest.raises(RunError, match=r"rollouts.jsonl: line 1 is damaged"):
        read_rollouts(path)
    path.write_bytes(good + b"{\n")
    with pytest.raises(RunError, match=r"rollouts.jsonl: line 5 is damaged"):
        read_rollouts(path)
    path.write_bytes(b"7\n")
    with pytest.raises(RunError, match=r"line 1 is no recorded completion, got 7"):
        read_rollouts(path)


def test_the_trainer_writes_what_is_read(tmp_path: Path) -> None:
    from tests.training.online.tiny import make_online

    class Words:
        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(f" w{i}" for i in ids)

    torch.set_num_threads(1)
    trainer = make_online(tmp_path, max_steps=2, minibatches=2, learning_rate=0.05, log_entropy=True)
    trainer.record.tokenizer = Words()
    trainer.train()
    found = read_rollouts(tmp_path / "rollouts.jsonl")
    assert len(found) == 3
    for number, one in enumerate(found):
        assert (one.rollout, one.step, one.completion) == (0, 0, number)
        assert all(re.fullmatch(r" w\d+", token) for token in one.tokens)
        assert set(one.columns) >= {"advantages", "entropy", "ratio"}
        assert one.clipped is not None
        assert one.reward == pytest.approx(one.rewards["share_of_token"])
    text = printed(tmp_path / "rollouts.jsonl", field="entropy")
    assert found[0].tokens[0].strip() + "[+" in text


# ---- Choosing and merging ----


def test_merged_keeps_text_numbers_and_marks() -> None:
    side = Side(["a", " b", " c", " d", " e"], [1.0, 1.0, 1.0, None, None], clipped=[0, 0, 1, 0, 0])
    found = merged(side)
    assert found.tokens == ["a b", " c", " d e"]
    assert found.credit == [1.0, 1.0, None]
    assert found.clipped == [0, 1, 0]


def test_spread_takes_what_fits_and_the_last() -> None:
    assert spread([10] * 5, 50) == [0, 1, 2, 3, 4]
    assert spread([10] * 5, 30) == [0, 2, 4]
    assert spread([10] * 101, 30) == [0, 50, 100]
    assert spread([10, 99], 30) == [1]
    assert spread([], 30) == []
    uneven = [1, 100, 1, 100, 1, 100]
    picked = spread(uneven, 150)
    assert sum(uneven[i] for i in picked) <= 150
    assert picked[-1] == 5


def test_ratio_is_shown_around_one_and_infinity_does_not_set_the_scale(tmp_path: Path) -> None:
    entry = line(0, 0, 3, ratio=[1.0, 0.5, float("inf")])
    side = side_of(read_rollouts(lines_file(tmp_path / "r.jsonl", [entry]))[0], "ratio")
    assert side.credit == [0.0, -0.5, float("inf")]
    assert scale_of([side]) == 0.5
    assert "+∞" in printed(lines_file(tmp_path / "rollouts.jsonl", [entry]), field="ratio")


# ---- The report ----


def test_rollouts_in_the_report(tmp_path: Path) -> None:
    entries = some()
    text = write_report(online_run(tmp_path / "run", entries)).read_text()
    Page(text)
    assert not re.search(r"https?://(?!www\.w3\.org/)", text)
    part = text.split('<section id="rollouts-0">')[1].split("</section>")[0]
    assert re.findall(r"<summary>step (\d+)", part) == ["0", "4", "8"]
    assert part.count('<details class="step" open>') == 1
    for title in ("token credit", "entropy", "ratio − 1"):
        assert part.count(f'data-name="{title}"') == len(entries)
    # Every token of every completion is there, in each of its maps; the numbers are those of the file.
    maps = re.findall(r'data-name="entropy">.*?<p class="tokens">(.*?)</p>', part, re.S)
    for entry, found in zip(entries, maps, strict=True):
        assert re.sub(r"<[^>]+>", "", found) == entry["text"]
        assert len(re.findall(r"data-v=", found)) == len(entry["tokens"])
    first = re.search(r'data-name="token credit">.*?<p class="tokens">(.*?)</p>', part, re.S)
    assert first is not None
    assert re.findall(r'data-v="([^"]*)"', first[1].replace(" high", "").replace(" low", ""))[0] == "−1.0"
    shown = re.findall(r'data-name="ratio − 1">.*?<p class="tokens">(.*?)</p>', part, re.S)
    for entry, found in zip(entries, shown, strict=True):
        assert len(re.findall(r'class="t . high"', found)) == entry["clipped"].count(1.0)
        assert len(re.findall(r'class="t . low"', found)) == entry["clipped"].count(-1.0)
    assert sum(e["clipped"].count(1.0) for e in entries) > 0
    assert part.count("reward 1.00") == sum(e["reward"] == 1 for e in entries)
    assert "(exact 1.00, format 0.250)" in part
    assert part.count(">truncated<") == 3
    assert "This run has no token credit" not in text


def test_curves_of_online_training(tmp_path: Path) -> None:
    text = write_report(online_run(tmp_path / "run", some(1))).read_text()
    curves = text.split('id="curves"')[1].split('id="settings"')[0]
    for title in (
        "reward",
        "utilisation: completions with credit, share",
        "clipped tokens, share",
        "KL to the reference, nats per token",
        "entropy, nats per token",
        "tokens per completion",
        "seconds per rollout, train",
    ):
        assert f"<figcaption>{title}</figcaption>" in curves
    assert 'data-tip="train (held out) · step 60.0: 0.8000"' in curves
    assert 'data-tip="rollout · step 1.00: 1.500"' in curves
    phases = curves.split("<figcaption>seconds per rollout, train")[1]
    shown = [name for name in ("rollout", "reward", "scoring", "credit", "update") if f"</svg>{name}</span>" in phases]
    assert shown == ["rollout", "reward", "update"]


@pytest.mark.parametrize("entries", [None, []])
def test_report_without_recorded_rollouts(tmp_path: Path, entries: list[dict[str, Any]] | None) -> None:
    text = write_report(online_run(tmp_path / "run", entries)).read_text()
    Page(text)
    assert "No rollouts were recorded" in text


def test_report_of_bare_lines_and_of_unscored_completions(tmp_path: Path) -> None:
    bare = {"rollout": 0, "step": 0, "prompt_ids": [3, 4], "ids": [5, 9], "reward": None}
    text = write_report(online_run(tmp_path / "run", [bare])).read_text()
    Page(text)
    part = text.split('<section id="rollouts-0">')[1].split("</section>")[0]
    assert "3 4</p>" in part
    assert "reward –" in part
    assert re.sub(r"<[^>]+>", "", part).count("5 9") == 1


def test_a_number_beyond_floats_is_damage(tmp_path: Path) -> None:
    file = tmp_path / "rollouts.jsonl"
    file.write_text('{"rollout": 0, "step": 0, "ids": [1], "reward": 1' + "0" * 400 + "}\n")
    with pytest.raises(RunError, match=r"rollouts\.jsonl cannot be shown, .*OverflowError"):
        inspect_rows(file)


def test_recorded_text_cannot_become_markup(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    entry = line(0, 0, 1, tokens=[evil], prompt=evil, row=evil, rewards={evil: 1.0, "<b>": 0.0})
    run = online_run(tmp_path / "run", [entry])
    text = write_report(run).read_text()
    Page(text)
    assert text.count("<script>") == 1
    assert "[+" in printed(run, field="entropy")


def test_long_runs_stay_small(tmp_path: Path) -> None:
    run = online_run(tmp_path / "run", some(60, 4, 60))
    assert write_report(run).stat().st_size < 2_000_000
    entries = [line(k, c, 700) for k in range(6) for c in range(10)]
    lines_file(run / "train" / "rollouts.jsonl", entries)
    text = write_report(run).read_text()
    assert len(text.encode()) < 3_000_000
    assert "100 more tokens are not shown." in text
    assert "2 more completions were recorded." in text
    assert re.search(r"1 of the 6 recorded prompts are shown", text)


def test_damaged_file_stops_the_report(tmp_path: Path) -> None:
    run = online_run(tmp_path / "run", [line(entropy=[0.5])])
    with pytest.raises(RunError, match=r"rollouts.jsonl: line 1: entropy has 1 entries; expected 7"):
        write_report(run)


def test_no_more_pieces_than_allowed() -> None:
    assert rollout_maps("rollouts-0", "s", [])["steps"] == []
    assert MAX_PIECES * 70 < 2_000_000


# ---- The terminal ----


def test_inspect_shows_the_last_rollouts(tmp_path: Path) -> None:
    entries = some(6)
    run = online_run(tmp_path / "run", entries)
    text = printed(run)
    assert "\x1b[" not in text
    assert [s for s in range(0, 24, 4) if f"step {s}, rollout {s // 4}, row" in text] == [12, 16, 20]
    words = " ".join(text.split())
    assert "so[−1.0] 12[−1.0]" in re.sub("~", "", words)
    assert "completion 3" in text
    assert "reward 1.00" in text
    assert "format 0.250" in text
    assert "truncated" in text
    clipped = sum(v != 0 for e in entries[12:] for v in e["clipped"])
    assert text.count("~") == 2 * clipped + 2, "two per clipped token, and the legend"
    assert f"clipped: {clipped} of 84 tokens" in text


def test_inspect_other_columns_and_rows(tmp_path: Path) -> None:
    run = online_run(tmp_path / "run", some(6), status="interrupted")
    text = printed(run, field="ratio", rows=[0])
    assert "rollout 0, row 0" in text
    assert "rollout 5, row 0" in text
    assert "rollout 1" not in text
    assert "ratio − 1" in text
    ratio = line(0, 0)["ratio"][0] - 1
    assert re.search(rf"so~?\[[+−]{abs(ratio):.2f}", text)
    assert "\x1b[" in printed(run, colour=True, field="entropy", count=1)
    assert re.search(r"\x1b\[[0-9;]*\b9\b[0-9;]*m", printed(run, colour=True, field="ratio")), "struck"
    with pytest.raises(RunError, match="no 'values' was recorded; there are advantages, entropy, ratio"):
        inspect_rows(run, field="values")
    with pytest.raises(RunError, match=r"row 9 was not recorded; expected one of \['0', '1', '2', '3', '4'\]"):
        inspect_rows(run, rows=[9])


def test_inspect_without_recorded_rollouts(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has no recorded rollouts"):
        inspect_rows(online_run(tmp_path / "none", None))
    with pytest.raises(RunError, match="nothing is recorded yet"):
        inspect_rows(online_run(tmp_path / "empty", []))


def test_control_characters_are_signs(tmp_path: Path) -> None:
    tokens = ["\x1b[31mred", "\x00", "\x9b", "\u202eback", "a\nb", "\tc"]
    numbers = {"advantages": [1.0] * 6, "entropy": [0.5] * 6, "ratio": [1.0] * 6, "clipped": [0.0] * 6}
    run = online_run(tmp_path / "run", [line(0, 0, 6, tokens=tokens, prompt="\x1b]0;title\x07", **numbers)])
    page = write_report(run).read_text(encoding="utf-8")
    out = io.StringIO()
    inspect_rows(run, console=Console(file=out, width=100, color_system=None))
    for text in (page, out.getvalue()):
        assert not {"\x1b", "\x00", "\x9b", "\u202e"} & set(text)
        for sign in ("␛[31mred", "␀", "\\x9b", "\\u202eback", "␛]0;title␇"):
            assert sign in text


def test_a_row_is_a_number_or_text(tmp_path: Path) -> None:
    path = lines_file(tmp_path / "rollouts.jsonl", [line(row=[1])])
    with pytest.raises(RunError, match=r"line 1: row is \[1\]; expected a number or text"):
        read_rollouts(path)
