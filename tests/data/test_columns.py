"""Columns made from a row's own, by name or template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.tokenizers import words
from tokengrain.data.config import RowError, TokenizeConfig
from tokengrain.data.dataset import prepare_sft
from tokengrain.data.rows import load_rows, split_rows, with_columns
from tokengrain.errors import DataError, RecipeError
from tokengrain.rollout.sampler import encode_prompts

ROWS = [{"question": f"q{i}", "answer": f"a{i}", "turns": [{"role": "user", "content": str(i)}]} for i in range(4)]


def test_names_and_templates_beside_what_is_there() -> None:
    made = with_columns(load_rows(ROWS), {"prompt": "Q: {question}\nA:", "completion": "answer", "messages": "turns"})
    rows = dict(made)
    assert rows[2] == {**ROWS[2], "prompt": "Q: q2\nA:", "completion": "a2", "messages": ROWS[2]["turns"]}
    assert "prompt" not in ROWS[2]


def test_subsets_keep_numbers_and_columns() -> None:
    train, held_out = split_rows(with_columns(load_rows(ROWS), {"prompt": "question"}), 0.25, seed=0)
    assert (len(train), len(held_out)) == (3, 1)
    found = {**dict(train), **dict(held_out)}
    assert {n: row["prompt"] for n, row in found.items()} == {i: f"q{i}" for i in range(4)}


def test_streams_and_fingerprints(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    stream = with_columns(load_rows(path, streaming=True), {"b": "a", "c": "{a}!"})
    assert stream.streaming
    assert [row for _, row in stream] == [row for _, row in stream] == [{"a": a, "b": a, "c": f"{a}!"} for a in (1, 2)]
    plain = load_rows(path)
    marks = {plain.fingerprint, *(with_columns(plain, {"b": t}).fingerprint for t in ("a", "{a}"))}
    assert len(marks) == 3


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("bad", ['{"b": "x"}', '{"a": null}'], ids=["missing", "null"])
def test_a_row_without_the_column_is_named_or_skipped(streaming: bool, bad: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"a": "the sky"}}\n{bad}\n{{"a": "the sea"}}\n')
    for template in ("a", "{a}"):
        rows = with_columns(load_rows(path, streaming=streaming), {"prompt": template, "completion": "is {a}"})
        with pytest.raises(DataError, match=r"rows\.jsonl: row 1 \(line 2\): field '(prompt|completion)': cannot make"):
            list(prepare_sft(rows, words()))
        skipped = prepare_sft(rows, words(), TokenizeConfig(on_invalid="skip"))
        assert [s.raw["completion"] for s in skipped] == ["is the sky", "is the sea"]
        assert skipped.report.skipped == {"missing column": 1}
        with pytest.raises(DataError, match=r"rows\.jsonl: row 1 \(line 2\)"):
            encode_prompts(rows, words())
        assert len(encode_prompts(rows, words(), TokenizeConfig(on_invalid="skip"))) == 2


@pytest.mark.parametrize("template", ["{question", "{}", "{0}"])
def test_a_template_that_is_none(template: str) -> None:
    with pytest.raises(RecipeError, match=r"columns\.prompt"):
        with_columns(load_rows(ROWS), {"prompt": template})


@pytest.mark.parametrize("meta", [None, "text", {}, []])
def test_a_template_that_reads_within_a_column(meta: Any) -> None:
    rows = dict(with_columns(load_rows([{"meta": {"q": "why?"}}, {"meta": meta}]), {"prompt": "Q: {meta[q]}"}))
    assert rows[0]["prompt"] == "Q: why?"
    with pytest.raises(RowError, match="cannot make the column"):
        raise rows[1]
