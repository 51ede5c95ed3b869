"""The stages index, negatives and retrieve, on small models and rows of every form."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.scoring.encdec import FAMILIES, alone, tiny_seq2seq
from tests.scoring.models import VOCAB, standard_batch
from tokengrain.errors import DataError, ModelError, RecipeError, TokengrainError
from tokengrain.models import load_model
from tokengrain.retrieval.docids import Docids
from tokengrain.run.load import load_recipe, resolve_stages
from tokengrain.run.retrieval import Index, grow
from tokengrain.run.runner import run_recipe
from tokengrain.scoring.score import score
from tokengrain.specs import ModelSpec

TOPICS = ("fish", "bread", "stars", "trains", "clocks", "rivers")
WORDS = ("<pad>", "</s>", "<unk>", *TOPICS, "about", "the", "site.org", "a", "page", "of", "deep", "old", "new")


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 that knows a few words, with more embeddings than its tokenizer has tokens."""
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(WORDS) + 3, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def documents(folder: Path, **more: Any) -> Path:
    rows = [
        {
            "key": f"k{i}",
            "title": f"the {t}",
            "text": f"about {t} a page of {t} {a}",
            "url": f"site.org/{a}/{t}/x{i}",
            **more,
        }
        for i, (t, a) in enumerate((t, a) for t in TOPICS for a in ("old", "new"))
    ]
    return write(folder / "documents.jsonl", rows)


def keyed(folder: Path, **changes: Any) -> Path:
    rows = [
        {"query": f"about the {t} {a}", "positive": f"k{2 * i + j}"}
        for i, t in enumerate(TOPICS)
        for j, a in enumerate(("old", "new"))
    ]
    rows[3] |= changes
    return write(folder / "triples.jsonl", rows)


STEPS = ("stages.sft.training.max_steps=2", "stages.train.training.max_steps=2", "training.bf16=false")


def run(t5: Path, data: Path, output: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    recipe = load_recipe(
        "recipes/ddro.yaml", str(t5), str(data), (*STEPS, "data.eval_fraction=0.25", *overrides), output
    )
    return run_recipe(recipe, **options).metrics


FORMS: dict[str, list[dict[str, Any]]] = {
    "text": [
        {"prompt": f"about {t}", "chosen": f"{t} page", "rejected": f"{o} page"} for t, o in zip(TOPICS, TOPICS[::-1])
    ],
    "ids": [
        {"query": f"about {t}", "pos_docid": [3 + i, 19], "neg_docid": [[8 - i, 19], [3, 20]]}
        for i, t in enumerate(TOPICS)
    ],
    "keys": [
        {"query": f"about {t}", "positive": t, "negatives": [o, "stars"]}
        for t, o in (("fish", "bread"), ("bread", "fish"), ("trains", "old"), ("old", "clocks"))
    ],
}


@pytest.mark.parametrize("form", ["ids", *(pytest.param(form, marks=pytest.mark.slow) for form in ("text", "keys"))])
def test_rows_alone_are_enough(t5: Path, tmp_path: Path, form: str) -> None:
    metrics = run(t5, write(tmp_path / "rows.jsonl", FORMS[form]), tmp_path / "run")
    stages = metrics["stages"]
    assert stages["negatives"]["source"] == "rows"
    assert 0 <= stages["evaluate"]["after"]["MRR@10"] <= 1
    table = Docids.load(tmp_path / "run/index/docids.parquet")
    if form == "ids":
        assert table.of("4 19") == (4, 19)
    else:  # text with its end token
        assert table.tokens[0][-1] == 1


@pytest.mark.parametrize(
    "scheme", ["pq", *(pytest.param(s, marks=pytest.mark.slow) for s in ("hierarchical", "title_url"))]
)
def test_docids_are_made_of_documents(t5: Path, tmp_path: Path, scheme: str) -> None:
    shape = ("stages.index.levels=2", "stages.index.codes=4", "stages.index.dimensions=8", "stages.index.own_head=true")
    given = (f"stages.index.documents={documents(tmp_path)}", f"stages.index.scheme={scheme}", *shape)
    stages = run(t5, keyed(tmp_path), tmp_path / "run", *given)["stages"]
    assert stages["negatives"]["source"] == "bm25"
    assert {"before", "after", "bm25", "lsa"} <= set(stages["evaluate"])
    assert stages["evaluate"]["bm25"]["MRR@10"] > 0.5
    table, model = (
        Docids.load(tmp_path / "run/index/docids.parquet"),
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run/train/model"),
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/train/model")
    if scheme == "title_url":
        assert table.of("k0") == (2, 3, WORDS.index("old"), WORDS.index("site.org"), 1)
    else:
        assert min(min(d) for d in table.tokens) == len(WORDS) + 3
        assert tokenizer.convert_ids_to_tokens(table.tokens[0][0]).startswith("<0:")
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    lines = [json.loads(line) for line in (tmp_path / "run/evaluate/rankings.jsonl").read_text().splitlines()]
    assert len(lines) == stages["evaluate"]["queries"] == 3
    assert {"MRR@10", "found"} <= set(lines[0]["after"])


def test_padding_of_docids_counts_if_it_is_asked_for(t5: Path, tmp_path: Path) -> None:
    """In the rows of the sft stage alone: pairs and search have docids as they are."""
    data, given = write(tmp_path / "rows.jsonl", FORMS["text"]), ("stages.index.pad_counts=true",)
    data.write_text(data.read_text().replace("fish page", "fish page of old fish"))
    run(t5, data, tmp_path / "run", *given, until="negatives")
    table = Docids.load(tmp_path / "run/index/docids.parquet")
    assert {len(docid) for docid in table.tokens} == {3, 6}
    taught = pq.read_table(tmp_path / "run/index/train.parquet")["chosen"].to_pylist()
    assert {len(docid) for docid in taught} == {6}
    assert any(docid[2:] == [1, 0, 0, 0] for docid in taught)
    chosen = pq.read_table(tmp_path / "run/negatives/train.parquet")["chosen"].to_pylist()
    assert set(map(tuple, chosen)) <= set(table.tokens)


def test_new_tokens_are_as_far_apart_as_the_old(t5: Path) -> None:
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(t5), AutoTokenizer.from_pretrained(t5)
    grow(model, tokenizer, Docids(("a", "b"), ((21, 25), (24, 26)), scheme="pq"), own_head=False)
    embeddings = model.get_input_embeddings().weight.detach()
    old, new = embeddings[:21], embeddings[21:]
    assert len(new) == 6 == len(tokenizer) - len(WORDS) - 3
    assert new.std(0).mean() > 0.5 * old.std(0).mean()
    assert tokenizer.convert_ids_to_tokens([21, 24, 25]) == ["<0:0>", "<0:3>", "<1:0>"]


class Counted:
    """A tokenizer, as far as `grow` is concerned."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def add_tokens(self, tokens: list[str]) -> None:
        self.size += len(tokens)


# Marian's positions are made when it is loaded.
@pytest.mark.parametrize(("name", "own_head"), [("t5", False), *((n, True) for n in FAMILIES if n != "marian")])
def test_a_grown_model_is_the_same_when_it_is_loaded(name: str, own_head: bool, tmp_path: Path) -> None:
    model, batch = tiny_seq2seq(name).eval(), standard_batch()
    model.config.decoder_start_token_id = 1
    rows = [(VOCAB, VOCAB + 4), (VOCAB + 1, VOCAB + 5)]
    grow(model, Counted(VOCAB), Docids(("a", "b"), tuple(rows), scheme="pq"), own_head=own_head)
    expected, loaded = alone(model, batch)["logps"], model
    for folder in (tmp_path / "once", tmp_path / "twice"):
        loaded.save_pretrained(folder)
        loaded = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float64).eval()
    head = loaded.get_output_embeddings().weight
    assert len(head) == VOCAB + 6
    assert own_head is False or head is not loaded.get_input_embeddings().weight
    torch.testing.assert_close(alone(loaded, batch)["logps"], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(score(loaded, batch).logps, expected, rtol=0, atol=1e-8)


def test_a_head_of_its_own_is_loaded_without_advice_that_would_untie_it(tmp_path: Path) -> None:
    model = tiny_seq2seq("bart")
    grow(model, Counted(VOCAB), Docids(("a", "b"), ((VOCAB,), (VOCAB + 1,)), scheme="pq"), own_head=True)
    model.save_pretrained(tmp_path)
    said: list[str] = []
    listener, log = logging.Handler(), logging.getLogger("transformers.modeling_utils")
    listener.emit = lambda record: said.append(record.getMessage())
    level = log.level
    log.addHandler(listener)
    log.setLevel(logging.WARNING)
    try:
        load_model(ModelSpec(path=str(tmp_path)), str(tmp_path))
        assert not any("tie" in text for text in said)
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    finally:
        log.removeHandler(listener)
        log.setLevel(level)
    assert any("will NOT tie them" in text for text in said)


def test_negatives_never_share_a_docid_with_what_is_relevant(t5: Path, tmp_path: Path) -> None:
    given = (
        f"stages.index.documents={documents(tmp_path)}",
        "stages.index.scheme=pq",
        "stages.index.levels=1",
        "stages.index.codes=3",
    )
    metrics = run(
        t5, keyed(tmp_path), tmp_path / "run", *given, "stages.negatives.source=model", "stages.negatives.beams=3"
    )
    assert metrics["stages"]["index"]["sharing"] == 9
    table = pq.read_table(tmp_path / "run/negatives/train.parquet")
    assert all(c not in r for c, r in zip(table["chosen"].to_pylist(), table["rejected"].to_pylist()))


@pytest.mark.slow
def test_a_finished_run_is_reused_and_other_documents_are_noticed(t5: Path, tmp_path: Path) -> None:
    data, given = keyed(tmp_path), f"stages.index.documents={documents(tmp_path, docid='the fish')}"
    with pytest.raises(DataError, match=r"no query .* has a negative"):  # all share one docid
        run(t5, data, tmp_path / "run", given)
    documents(tmp_path)
    given = (given, "stages.index.scheme=title_url")
    run(t5, data, tmp_path / "run", *given, overwrite=True)
    run(t5, data, tmp_path / "run", *given)
    documents(tmp_path, title="other")
    with pytest.raises(TokengrainError, match="'index' differs"):
        run(t5, data, tmp_path / "run", *given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"positive": None},
            "triples.jsonl: row 3.*: field 'positive': the query has no relevant document; expected a document in one",
        ),
        ({"positive": "k99"}, "row 3.*: field 'positive': there is no docid for it; got 'k99'; expected one of the 12"),
        ({"negatives": ["k1", "k3"]}, "row 3.*: field 'negatives': a negative has the docid of .* 'k3'; got 'k3'"),
        ({"query": " "}, "row 3.*: field 'query': the row has no query; got ' '"),
        ({"positive": [[1, "x"]]}, "row 3.*: field 'positive': this names no document; got"),
        ({"positive": [5, 6]}, "row 3.*: field 'positive': no document has this docid; got \\[5, 6\\]"),
    ],
)
def test_rows_that_cannot_be_used(t5: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    given = (f"stages.index.documents={documents(tmp_path)}", "stages.index.scheme=title_url")
    with pytest.raises(DataError, match=message):
        run(t5, keyed(tmp_path, **changes), tmp_path / "run", *given)
    assert not (tmp_path / "run/index/model").exists()


@pytest.mark.parametrize(
    ("docid", "message"),
    [
        (
            [3, 99],
            "documents.jsonl: row 0.*: field 'docid': a docid has a token outside the .*; got 99; expected a token id",
        ),
        (None, "documents.jsonl: row 0.*: field 'docid': the document has no docid; got 'k0'; expected a docid"),
        (5, "documents.jsonl: row 0.*: field 'docid': this is no docid; got 5; expected a docid .token ids, or text"),
        ([3.5, 4], "row 0.*: field 'docid': this is no docid; got"),
        (["3"], "row 0.*: field 'docid': this is no docid; got"),
        (" ", "row 0.*: field 'docid': this is no docid; got ' '"),
    ],
)
def test_docids_that_cannot_be_used(t5: Path, tmp_path: Path, docid: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        run(t5, keyed(tmp_path), tmp_path / "run", f"stages.index.documents={documents(tmp_path, docid=docid)}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pos_docid": [3, 99]}, "rows.jsonl: row 2.*: field 'pos_docid': a docid has a token outside the .*; got 99"),
        ({"neg_docid": [[3, 99]]}, "rows.jsonl: row 2.*: field 'neg_docid': a docid has a token outside the"),
        ({"pos_docid": [3]}, "rows.jsonl: row 2.*: field 'pos_docid': the docid is the beginning of another, .3, 19."),
        ({"neg_docid": [[3]]}, "rows.jsonl: row 2.*: field 'neg_docid': the docid is the beginning of another"),
        ({"neg_docid": [[5, 19]]}, "rows.jsonl: row 2.*: field 'neg_docid': a negative has the docid of the relevant"),
        ({"pos_docid": [True, 4]}, "rows.jsonl: row 2.*: field 'pos_docid': this is no docid; got"),
    ],
)
def test_docids_in_rows_that_cannot_be_used(t5: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    rows = [dict(row) for row in FORMS["ids"]]
    rows[2] |= changes
    with pytest.raises(DataError, match=message):
        run(t5, write(tmp_path / "rows.jsonl", rows), tmp_path / "run")


def test_a_table_is_named_where_its_docids_cannot_be_used(t5: Path, tmp_path: Path) -> None:
    keys = tuple(f"k{i}" for i in range(12))
    Docids(keys, tuple((3 + i // 4, 99 if i == 7 else 8 + i % 4) for i in range(12))).save(tmp_path / "table.parquet")
    given = (f"stages.index.documents={documents(tmp_path)}", f"stages.index.docids={tmp_path / 'table.parquet'}")
    with pytest.raises(DataError, match=r"table\.parquet: row 7: field 'docid': a docid has a token outside"):
        run(t5, keyed(tmp_path), tmp_path / "run", *given)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.index.scheme=pq", "stages.index.documents: scheme pq makes docids of documents; expected a file"),
        ("stages.negatives.data=@sft", "stages.negatives.data: '@sft' is a stage of kind sft, which makes"),
        (
            "stages.negatives.data=rows.jsonl",
            "stages.negatives.data: missing; expected '@STAGE', a stage of kind index",
        ),
        ("stages.negatives.strata=[[5, 1]]", "stages.negatives.strata: got \\[5, 1\\]; expected \\[first rank"),
        (
            "stages.evaluate.metrics=[MMR@10]",
            "stages.evaluate.metrics: there is no metric 'MMR@10'; did you mean 'MRR'",
        ),
    ],
)
def test_recipes_that_cannot_be_run(t5: Path, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("recipes/ddro.yaml", str(t5), str(keyed(tmp_path)), (*STEPS, override), tmp_path / "run")


def index(t5: Path, folder: Path, *overrides: str) -> Index:
    given = (f"stages.index.documents={documents(folder)}", "stages.index.scheme=pq", *STEPS, *overrides)
    recipe = load_recipe("recipes/ddro.yaml", str(t5), str(keyed(folder)), given, folder / "run")
    return cast(Index, next(stage for stage in resolve_stages(recipe) if stage.kind == "index"))


@pytest.mark.parametrize("levels", [5, 24])
def test_any_number_of_levels_goes_with_vectors_of_words(t5: Path, tmp_path: Path, levels: int) -> None:
    """12 documents have vectors of at most 12 numbers, and the default of 64 is no multiple of the paper's 24."""
    stage = index(t5, tmp_path, f"stages.index.levels={levels}", "stages.index.codes=4")
    table = stage.docids(stage.read()[0], AutoTokenizer.from_pretrained(t5), len(WORDS) + 3)
    assert {len(docid) for docid in table.tokens} == {levels}
    assert len(set(table.tokens)) > 6


@pytest.mark.parametrize("wrong", ["short", "flat", "nan", "text", "missing"])
def test_vectors_that_cannot_be_used(t5: Path, tmp_path: Path, wrong: str) -> None:
    made = {"short": np.ones((3, 6)), "flat": np.ones(12), "nan": np.full((12, 6), np.nan), "text": np.array(["a"])}
    if wrong in made:
        np.save(tmp_path / "v.npy", made[wrong])
    stage = index(t5, tmp_path, f"stages.index.vectors={tmp_path / 'v.npy'}")
    with pytest.raises(DataError, match=r"v\.npy"):
        stage.docids(stage.read()[0], AutoTokenizer.from_pretrained(t5), len(WORDS) + 3)


def test_other_vectors_are_another_index(t5: Path, tmp_path: Path) -> None:
    stage, decided = index(t5, tmp_path, f"stages.index.vectors={tmp_path / 'v.npy'}"), []
    for seed in (0, 0, 1):
        np.save(tmp_path / "v.npy", np.random.default_rng(seed).normal(size=(12, 6)))
        decided.append(stage.decides(tmp_path / "run", {}))
    assert decided[0] == decided[1] != decided[2]


def test_a_decoder_alone_cannot_be_indexed(tmp_path: Path) -> None:
    recipe = load_recipe("recipes/ddro.yaml", "world://stories", "world://library", STEPS, tmp_path / "run")
    with pytest.raises(ModelError, match="is no encoder-decoder, and a stage of kind index needs one"):
        run_recipe(recipe)
