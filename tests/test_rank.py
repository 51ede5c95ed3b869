"""`rank`: a file's rows with the scores of their completions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.data.tokenizers import CHATML, gpt2_like
from tests.training.tiny import tiny_llama
from tokengrain.batch import TokenBatch
from tokengrain.data.config import TokenizeConfig
from tokengrain.errors import DataError, ModelError, RecipeError, RunError
from tokengrain.method import make_credit
from tokengrain.models import reward_model_from
from tokengrain.rank import rank

ROWS: list[dict[str, Any]] = [
    {"prompt": "what colour is the sky?", "completions": [" It is blue.", " Green.", " It is blue."], "id": "a"},
    {"prompt": "the sea?", "completions": [" Green."], "id": "b"},
    {"prompt": "Question: two and two?", "completions": [" four", " six. The night is blacker."], "id": "c"},
]
PAIRS = [{"prompt": f"Question {n}?", "chosen": " four" * (1 + n), "rejected": " six the sea."} for n in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    tokenizer = gpt2_like(CHATML)
    torch.manual_seed(0)
    model = reward_model_from(tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=128))
    path = tmp_path_factory.mktemp("reward")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def by_hand(folder: str, prompt: str, completion: str) -> float:
    from transformers import AutoModelForTokenClassification

    tokenizer = gpt2_like()
    model = AutoModelForTokenClassification.from_pretrained(folder).eval()
    before = tokenizer(prompt)["input_ids"]
    ids = [*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]
    assert ids[: len(before)] == before
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids])).logits[0, len(before) :, 0].mean())


def test_rows_get_scores_and_the_best(folder: str, tmp_path: Path) -> None:
    done = rank(written(tmp_path / "in.jsonl", ROWS), folder, output=tmp_path / "out.jsonl")
    assert (done.rows, done.pairs, done.accuracy, done.skipped) == (3, 0, None, 0)
    rows = read(done.output)
    for row, was in zip(rows, ROWS, strict=True):
        assert {k: row[k] for k in was} == was
        wanted = [by_hand(folder, was["prompt"], c) for c in was["completions"]]
        assert row["scores"] == pytest.approx(wanted, abs=1e-5)
        assert row["best"] == row["scores"].index(max(row["scores"]))
    assert rows[0]["scores"][0] == pytest.approx(rows[0]["scores"][2])


def test_scores_do_not_depend_on_the_budget(folder: str, tmp_path: Path) -> None:
    file = written(tmp_path / "in.jsonl", ROWS)
    scores = []
    for name, budget in (("all", 10_000), ("one", 1)):
        rows = read(rank(file, folder, output=tmp_path / f"{name}.jsonl", max_tokens=budget).output)
        scores.append([s for row in rows for s in row["scores"]])
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_pairs_and_parquet_and_their_accuracy(folder: str, tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(PAIRS), tmp_path / "pairs.parquet")
    done = rank(tmp_path / "pairs.parquet", folder, output=tmp_path / "out.jsonl")
    rows = read(done.output)
    right = sum(r["scores"][0] > r["scores"][1] for r in rows)
    assert done.pairs == 6
    assert done.accuracy is not None
    assert done.accuracy.value == pytest.approx(right / 6)
    assert sum(b.pairs for b in done.by_length) == 6
    assert [r["best"] for r in rows] == [0 if r["scores"][0] >= r["scores"][1] else 1 for r in rows]


def test_several_rejected_completions_are_as_many_pairs(folder: str, tmp_path: Path) -> None:
    several = [{**row, "rejected": [row["rejected"], " blue.", " night"]} for row in PAIRS]
    apart = [{**row, "rejected": other} for row in several for other in row["rejected"]]
    found = [
        rank(written(tmp_path / f"{name}.jsonl", rows), folder, output=tmp_path / f"{name}.ranked.jsonl")
        for name, rows in (("several", several), ("apart", apart))
    ]
    assert found[0].pairs == found[1].pairs == 18
    assert found[0].accuracy == found[1].accuracy
    assert len(read(found[0].output)[0]["scores"]) == 4


def test_messages(folder: str, tmp_path: Path) -> None:
    row = {
        "prompt": [{"role": "user", "content": "the sky?"}],
        "completions": [[{"role": "assistant", "content": c}] for c in ("blue", "black")],
    }
    (got,) = read(rank([row], folder, output=tmp_path / "out.jsonl").output)
    assert len(set(got["scores"])) == 2


def test_any_credit_source_ranks(tmp_path: Path) -> None:
    """The reward that a DPO-trained model implies, as a mean over tokens."""
    tokenizer = gpt2_like()
    models = [tiny_llama(seed, vocab_size=len(tokenizer)) for seed in (0, 1)]
    credit = make_credit("guide", model=models[0], reference=models[1], beta=0.1)
    seen: list[TokenBatch] = []

    def looked_at(batch: TokenBatch) -> torch.Tensor:
        seen.append(batch)
        return credit(batch)

    rows = read(rank(ROWS, looked_at, tokenizer=tokenizer, output=tmp_path / "out.jsonl").output)
    assert [s for r in rows for s in r["scores"]] == pytest.approx(
        seen[0].segments.mean(credit(seen[0])).tolist(), abs=1e-6
    )
    assert seen[0].n_prompts == 3  # completions share their prompt


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "a?"}, r"row 1 \(line 2\): field 'completions'.*no completions"),
    ({"prompt": "a?", "completions": " b"}, r"row 1 \(line 2\): field 'completions'.*not a list"),
    ({"prompt": "a?", "completions": []}, r"row 1 \(line 2\): field 'completions'.*not a list"),
    ({"prompt": "a?", "completions": [" b", 3]}, r"row 1 \(line 2\): field 'completions\[1\]'.*type int"),
    ({"prompt": "", "completions": [" b"]}, r"row 1 \(line 2\): field 'prompt'.*empty"),
    ({"completions": [" b"]}, r"row 1 \(line 2\): field 'prompt'.*missing"),
    ({"prompt": "a?", "completions": [[{"role": "assistant", "content": "b"}]]}, r"'completions\[0\]'.*prompt's kind"),
    ({"prompt": "a?", "completions": [" b", " sky" * 200]}, r"'completions\[1\]'.*positions"),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_bad_rows_are_named_and_can_be_skipped(bad: Any, message: str, folder: str, tmp_path: Path) -> None:
    file, out = written(tmp_path / "in.jsonl", [ROWS[0], bad, ROWS[1]]), tmp_path / "out.jsonl"
    with pytest.raises(DataError, match=message):
        rank(file, folder, output=out)
    assert list(tmp_path.iterdir()) == [file]  # nothing half-written
    done = rank(file, folder, output=out, tokenize=TokenizeConfig(on_invalid="skip"))
    assert (done.rows, done.skipped) == (2, 1)
    assert [r["id"] for r in read(out)] == ["a", "b"]


def test_an_empty_completion_is_scored_by_its_eos(folder: str, tmp_path: Path) -> None:
    (row,) = read(rank([{"prompt": "a?", "completions": ["", " b"]}], folder, output=tmp_path / "o.jsonl").output)
    assert len(row["scores"]) == 2


def test_a_score_that_is_not_finite(tmp_path: Path) -> None:
    nan = lambda batch: torch.full((batch.segments.total,), float("nan"))  # noqa: E731
    with pytest.raises(DataError, match=r"row 0: a score is not finite"):
        rank(ROWS, nan, tokenizer=gpt2_like(), output=tmp_path / "out.jsonl")


def test_what_cannot_be_written_or_read(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path / "in.jsonl", ROWS)
    assert rank(file, folder).output == Path("in.ranked.jsonl")
    with pytest.raises(RunError, match="exists"):
        rank(file, folder)
    assert rank(file, folder, overwrite=True).rows == 3
    with pytest.raises(RecipeError, match="is the input"):
        rank(file, folder, output=file, overwrite=True)
    with pytest.raises(RecipeError, match=r"ends in \.jsonl"):
        rank(file, folder, output="out.parquet")
    with pytest.raises(RecipeError, match="pooling is 'lst'; expected one of mean, last"):
        rank(file, folder, pooling="lst", overwrite=True)  # a slip of the pen
    for part in ("train", "eval"):
        found = rank(written(tmp_path / f"in.{part}.jsonl", ROWS), folder).output
        assert found == Path(f"in.{part}.ranked.jsonl")
    with pytest.raises(RecipeError, match="output is missing"):
        rank(ROWS, folder)
    with pytest.raises(RecipeError, match="tokenizer is missing"):
        rank(file, lambda batch: batch.labels, output="other.jsonl")
    with pytest.raises(ModelError, match="no model at"):
        rank(file, str(tmp_path / "nowhere"), output="other.jsonl")
    with pytest.raises(DataError, match="no row could be used"):
        rank([{"prompt": "a?"}], folder, output="other.jsonl", tokenize=TokenizeConfig(on_invalid="skip"))


def test_columns_of_the_rows_that_are_replaced_are_said_and_half_pairs_kept(
    folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{**row, "scores": [5, 6], "meta": "\ud800x"} for row in ROWS]
    found = read(rank(written(tmp_path / "in.jsonl", rows), folder, output=tmp_path / "out.jsonl").output)
    assert [row["meta"] for row in found] == ["\ud800x"] * len(rows)
    assert [record.message.count("column scores") for record in caplog.records] == [1]
