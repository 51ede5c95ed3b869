"""Heat maps in the terminal: what is printed with and without colour, and what bad rows get."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

from tests.credit.annotate_worker import make_rows, make_tokenizer
from tests.report.folders import make_demo, make_run
from tokengrain.annotation import annotate
from tokengrain.data.tokens import token_texts
from tokengrain.errors import DataError, ModelError, RunError
from tokengrain.report.rows import colour_scale
from tokengrain.report.terminal import inspect_rows, style_of


def printed(source: Path, colour: bool = False, **options: Any) -> str:
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=colour, color_system="truecolor" if colour else None)
    inspect_rows(source, console=console, **options)
    return out.getvalue()


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(str(path))
    return path


@pytest.fixture(scope="module")
def annotated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def credit(batch: Any) -> torch.Tensor:
        """ "kind" is worth 1, "cruel" -1."""
        words = make_tokenizer().convert_tokens_to_ids(["kind", "cruel"])
        return (batch.labels == words[0]).float() - (batch.labels == words[1]).float()

    path = tmp_path_factory.mktemp("data") / "train.parquet"
    return annotate(make_rows(6), make_tokenizer(), None, {"token_rewards": credit}, output=path, progress=False)


def rows_file(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_numbers_where_there_is_no_colour(annotated: Path, tokenizer_path: Path) -> None:
    text = printed(annotated, rows=[2], tokenizer=tokenizer_path)
    row = make_rows(6)[2]
    assert "row 2" in text
    assert str(row["prompt"]) in " ".join(text.split())
    words = " ".join(text.split())
    for side in ("chosen", "rejected"):
        for word in str(row[side]).split():
            worth = {"kind": "+1.0", "cruel": "−1.0"}.get(word, "0")
            assert f"{word}[{worth}]" in words
    assert words.index("chosen") < words.index("rejected")
    assert "\x1b[" not in text


def test_colours_where_there_are(annotated: Path, tokenizer_path: Path) -> None:
    text = printed(annotated, colour=True, tokenizer=tokenizer_path)
    assert "\x1b[" in text
    assert "[+1.0]" not in text
    assert "orange, underlined: lowers" in text
    for row in range(3):
        assert f"row {row}" in text


def test_summary_names_the_top_tokens(annotated: Path, tokenizer_path: Path) -> None:
    text = printed(annotated, count=6, tokenizer=tokenizer_path)
    rows = make_rows(6)
    words = [w for r in rows for side in ("chosen", "rejected") for w in [*str(r[side]).split(), "</s>"]]
    share = words.count("kind") / len(words)
    size = (words.count("kind") + words.count("cruel")) / len(words)
    assert f"{len(words)} tokens in 6 rows: {share:.0%} above 0, mean size {size:.3f}" in text
    assert "most credit:  kind +1.0" in text
    assert "least credit: cruel −1.0" in text


def test_an_infinite_ratio_has_full_colour() -> None:
    assert style_of(math.inf) == style_of(1.0)
    assert style_of(-math.inf) == style_of(-1.0)


def test_sign_shows_in_more_than_colour() -> None:
    assert style_of(0.01) == ""
    for strength in (0.1, 0.4, 0.6, 0.9, 1.7):
        assert "underline" not in style_of(strength)
        assert "underline" in style_of(-strength)
    assert len({style_of(s) for s in (0.1, 0.3, 0.6, 0.9)}) == 4


def test_rewards_that_do_not_fit_name_file_row_and_field(tmp_path: Path, tokenizer_path: Path) -> None:
    good = {
        "chosen_ids": [3, 4],
        "chosen_token_rewards": [1, 2],
        "rejected_ids": [5],
        "rejected_token_rewards": [0],
    }
    path = rows_file(tmp_path / "bad.jsonl", good, good | {"rejected_token_rewards": [0.1, 0.2, 0.3]})
    expected = r"bad.jsonl: row 1 .line 2.: field 'rejected_token_rewards': .*got '3 numbers'; expected 1"
    with pytest.raises(DataError, match=expected):
        inspect_rows(path, tokenizer=tokenizer_path)
    assert "row 0" in printed(path, rows=[0], tokenizer=tokenizer_path)
    path = rows_file(tmp_path / "nan.jsonl", good | {"chosen_token_rewards": [1, None]})
    with pytest.raises(DataError, match=r"row 0 .*field 'chosen_token_rewards': token 1 has no finite number"):
        inspect_rows(path, tokenizer=tokenizer_path)


def test_rewards_that_do_not_fit_their_text(tmp_path: Path, tokenizer_path: Path) -> None:
    row = {"prompt": "the sea", "chosen": " was kind", "rejected": " hurt"}
    rewards = {"chosen_token_rewards": [1.0, 2.0, 0.0], "rejected_token_rewards": [0.5, 0.1]}
    path = rows_file(tmp_path / "rows.jsonl", row | rewards, row | rewards | {"chosen_token_rewards": [1.0]})
    assert "kind[+2.0]" in printed(path, rows=[0], tokenizer=tokenizer_path)
    with pytest.raises(DataError, match=r"rows.jsonl: row 1.*chosen_token_rewards"):
        inspect_rows(path, rows=[1], tokenizer=tokenizer_path)


def test_rewards_of_character_spans(tmp_path: Path, tokenizer_path: Path) -> None:
    row = {"prompt": "the sea", "chosen": " was kind", "rejected": " hurt"}
    spans = {"chosen_token_rewards": [{"start": 5, "end": 9, "reward": 0.7}]}
    spans["rejected_token_rewards"] = [{"start": 0, "end": 5, "reward": -0.4}]
    path = rows_file(tmp_path / "rows.jsonl", row | spans)
    text = printed(path, tokenizer=tokenizer_path)
    assert "kind[+0.70]" in text
    assert "was[0]" in text


def test_single_completions(tmp_path: Path, tokenizer_path: Path) -> None:
    path = rows_file(tmp_path / "rows.jsonl", {"prompt": "a", "completion_ids": [3, 4], "token_rewards": [1, -1]})
    text = printed(path, tokenizer=tokenizer_path)
    assert "completion" in text
    assert "rejected" not in text


def test_other_field(tmp_path: Path, tokenizer_path: Path) -> None:
    row = {
        "prompt": "a",
        "chosen_ids": [3],
        "chosen_ref_logps": [-2.5],
        "rejected_ids": [4],
        "rejected_ref_logps": [-1],
    }
    assert "[−2.5]" in printed(rows_file(tmp_path / "r.jsonl", row), field="ref_logps", tokenizer=tokenizer_path)


def test_tokenizer_is_asked_for(annotated: Path, tmp_path: Path, tokenizer_path: Path) -> None:
    with pytest.raises(ModelError, match="give it with --tokenizer"):
        inspect_rows(annotated)
    with pytest.raises(ModelError, match="no tokenizer could be loaded"):
        inspect_rows(annotated, tokenizer=tmp_path / "absent")


def test_files_without_token_rewards_or_rows(tmp_path: Path, annotated: Path, tokenizer_path: Path) -> None:
    path = rows_file(tmp_path / "plain.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"})
    with pytest.raises(DataError, match=r"row 0 .*the row has no token rewards; .*chosen_token_rewards"):
        inspect_rows(path, tokenizer=tokenizer_path)
    with pytest.raises(DataError, match="row 77: there is no such row; expected 0 to 5"):
        inspect_rows(annotated, rows=[77], tokenizer=tokenizer_path)


def test_run_folder(tmp_path: Path, annotated: Path) -> None:
    run = make_run(tmp_path / "run")
    assert "DPO guide" in printed(run)
    (run / "credit_samples.json").unlink()
    (run / "credit" / "train.parquet").write_bytes(annotated.read_bytes())
    make_tokenizer().save_pretrained(str(run / "train" / "model"))
    assert "kind[+1.0]" in printed(run, count=6)
    assert "kind[+1.0]" in printed(run / "credit" / "train.parquet", count=6)


def test_a_log_ratio_is_not_called_credit(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    samples = run / "credit_samples.json"
    samples.write_text(samples.read_text().replace("DPO guide", "log-ratio of guide"))
    text = printed(run)
    assert "the number behind a token is its log-ratio, in nats" in text
    assert "highest log-ratio" in text
    assert "its credit" not in text


def test_another_column_is_not_that_of_the_samples(tmp_path: Path, tokenizer_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = run / "credit" / "train.parquet"
    pairs = ["the king was kind", "the king was cruel"]
    model = AutoTokenizer.from_pretrained(tokenizer_path)
    row = {"prompt": "the king"}
    for name, text in zip(("chosen", "rejected"), pairs):
        ids = model(text, add_special_tokens=False)["input_ids"]
        row |= {name: text, f"{name}_ids": ids, f"{name}_token_rewards": [1.0] * len(ids)}
        row[f"{name}_ref_logps"] = [-0.25] * len(ids)
    pq.write_table(pa.Table.from_pylist([row]), path)
    text = printed(run, field="ref_logps", tokenizer=tokenizer_path)
    assert "kind[−0.25]" in text
    assert "DPO guide" not in text
    with pytest.raises(DataError, match="the row has no 'entropy' of its tokens"):
        inspect_rows(run, field="entropy", tokenizer=tokenizer_path)
    with pytest.raises(DataError, match=r"credit_samples\.json: there are only token rewards; got 'ref_logps'"):
        inspect_rows(run / "credit_samples.json", field="ref_logps")
    plain = make_run(tmp_path / "dpo", method="dpo", credit=False)
    (plain / "credit_samples.json").write_bytes((run / "credit_samples.json").read_bytes())
    with pytest.raises(RunError, match="no 'ref_logps' of its rows' tokens"):
        inspect_rows(plain, field="ref_logps")


def test_run_folders_without_token_rewards(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has no token rewards to show: no annotate stage"):
        inspect_rows(make_run(tmp_path / "dpo", method="dpo", credit=False))
    with pytest.raises(RunError, match=r"no token rewards yet: .*tokengrain train"):
        inspect_rows(make_run(tmp_path / "cut", method="dpo", credit=False, status="interrupted"))
    with pytest.raises(RunError, match="not a run folder"):
        inspect_rows(tmp_path)


def test_demo_folder_shows_every_source(tmp_path: Path) -> None:
    text = printed(make_demo(tmp_path / "demo"), rows=[1])
    assert "DPO guide (TGDPO)" in text
    assert "contrastive prompting (T-REG)" in text
    assert "row 0" not in text


def test_token_texts_join_to_the_whole_text() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    text = "naïve 日本 👍\n  ok"
    ids = tokenizer.encode(text)
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) == len(text.encode())
    assert "".join(texts) == text
    assert "日" in texts  # whole characters, at the last of their bytes
    cut = tokenizer.encode("日")[:2]
    assert len(token_texts(tokenizer, cut)) == 2


def test_one_outlier_does_not_set_the_colour_scale() -> None:
    assert colour_scale([0.1] * 99 + [50.0]) == pytest.approx(0.1)
    assert colour_scale([None, 0.0]) == 1.0
    assert colour_scale([-2.0]) == 2.0


SPANNED = {"prompt": "the sea", "chosen": " was kind and helped .", "rejected": " was very cruel and hurt ."}


def test_spans_by_diff(tmp_path: Path, tokenizer_path: Path) -> None:
    path = rows_file(tmp_path / "rows.jsonl", SPANNED, SPANNED | {"rejected": " was kind and very helped ."})
    for options in ({"spans": "diff"}, {"field": "spans"}):
        text = printed(path, tokenizer=tokenizer_path, **options)
        words = " ".join(text.split())
        assert "chosen was [1: kind] and [2: helped] . </s>" in words
        assert "rejected was [1: very cruel] and [2: hurt] . </s>" in words
        assert "chosen was kind and helped . </s> rejected was kind and very helped ." in words
        assert "chosen: 2 of 12 tokens in spans (17%)" in text
        assert "1 of 2 pairs without a span" in text
        assert "\x1b[" not in text
    one_sided = printed(path, rows=[1], tokenizer=tokenizer_path, spans={"keep_one_sided": True, "on_none": "error"})
    assert "was kind and [1: very] helped" in " ".join(one_sided.split())
    assert "\x1b[1;4;" in printed(path, colour=True, tokenizer=tokenizer_path, spans="diff"), "bold and underlined"


def test_spans_as_the_columns_suggest(tmp_path: Path, tokenizer_path: Path) -> None:
    tagged = SPANNED | {"chosen": " was <MASK>kind and</MASK> helped .", "rejected": " was very cruel and hurt ."}
    columns = SPANNED | {"chosen_spans": [{"start": 5, "end": 13}], "rejected_spans": []}
    path = rows_file(tmp_path / "rows.jsonl", tagged, columns)
    for row in (0, 1):
        words = " ".join(printed(path, rows=[row], field="spans", tokenizer=tokenizer_path).split())
        assert "was [1: kind and] helped . </s> rejected was very cruel and hurt" in words
    with pytest.raises(DataError, match=r"row 0 .*field 'chosen_spans': column is missing"):
        inspect_rows(path, spans="column", tokenizer=tokenizer_path)
    with pytest.raises(ModelError, match="give it with --tokenizer"):
        inspect_rows(path, spans="diff")


def test_spans_of_a_run(tmp_path: Path, tokenizer_path: Path) -> None:
    import yaml

    run = make_run(tmp_path / "run", method="rrpo")
    make_tokenizer().save_pretrained(str(run / "train" / "model"))
    rows = rows_file(tmp_path / "rows.jsonl", SPANNED)
    with pytest.raises(RunError, match="its recipe marks no spans"):
        inspect_rows(run, field="spans")
    data = {"train": str(rows), "spans": "diff", "max_length": 6, "on_invalid": "skip", "eval_fraction": 0}
    (run / "recipe.yaml").write_text(yaml.safe_dump({"method": "rrpo", "data": data}))
    words = " ".join(printed(run, field="spans").split())
    assert "chosen was [1: kind] and [2: helped] rejected" in words, "as long as in training"
    # Annotated ones come first, unless others are asked for.
    from tokengrain.data.config import TokenizeConfig

    def credit(batch: Any) -> torch.Tensor:
        return batch.labels.float()

    config = TokenizeConfig(spans={"min_match_size": 2})
    file = run / "credit" / "train.parquet"
    annotate([SPANNED], make_tokenizer(), config, {"token_rewards": credit}, output=file, progress=False)
    assert "[1: was kind and helped .]" in " ".join(printed(run, field="spans").split())
    assert "[1: was kind and helped .]" in " ".join(printed(file, field="spans").split())
    assert "was [1: kind] and [2: helped]" in " ".join(printed(run, spans="diff").split())
