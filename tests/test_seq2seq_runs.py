"""Runs on encoder-decoders: recipes from the command line, resuming, LoRA, annotated docids, what refuses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, T5Config
from typer.testing import CliRunner

import tokengrain
from tests.data.test_encoder_prompts import around
from tokengrain import models
from tokengrain.annotation import load_annotated
from tokengrain.cli import app
from tokengrain.errors import ModelError
from tokengrain.report.rows import read_token_rows
from tokengrain.rollout.local import HFGenerate
from tokengrain.specs import ModelSpec

WORDS = ("blue", "green", "black", "night", "sea")
QUICK: dict[str, Any] = {
    "training__per_device_train_batch_size": 4,
    "training__num_train_epochs": 1,
    "training__learning_rate": 1e-3,
    "training__gradient_accumulation_steps": 1,
    "quiet": True,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny T5 with a tokenizer, and ten ids behind those of the tokenizer for docids."""
    folder, tokenizer = tmp_path_factory.mktemp("t5"), around("$A </s>")
    tokenizer.pad_token = "<unk>"
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    ids = dict.fromkeys(("pad_token_id", "decoder_start_token_id"), tokenizer.pad_token_id)
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(tokenizer) + 10, eos_token_id=tokenizer.eos_token_id, **sizes, **ids)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    rows = [{"prompt": f"what is {a}?", "chosen": f"the {a} sky", "rejected": f"no {b}"} for a in WORDS for b in WORDS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def docids(tmp_path_factory) -> Path:
    """Docids as token ids beyond the tokenizer, two or three negatives a query."""
    file, first = tmp_path_factory.mktemp("rows") / "docids.jsonl", len(around("$A </s>"))
    rows = [
        {
            "prompt": f"find {a} {b}",
            "chosen": [first + i, first + 5],
            "rejected": [[first + j] for j in range(6, 8 + i % 2)],
        }
        for i, a in enumerate(WORDS)
        for b in WORDS
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_dpo_from_the_command_line(model, pairs, tmp_path):
    told = ["train", "dpo", "--model", str(model), "--data", str(pairs), "--output", str(tmp_path / "run")]
    told += ["--set", "training.warmup_steps=0", "--set", "training.learning_rate=0.01"]
    result = CliRunner().invoke(app, told)
    assert result.exit_code == 0, result.output
    trained = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "train" / "model")
    start = AutoModelForSeq2SeqLM.from_pretrained(model)
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), start.parameters(), strict=True))
    said = json.loads((tmp_path / "run" / "train" / "answers.json").read_text())
    assert {len(said[when]) for when in ("prompts", "start", "trained")} == {2}  # as many as are held out
    card = (tmp_path / "run" / "train" / "model" / "README.md").read_text()
    assert "pipeline_tag: text2text-generation" in card
    assert "model = AutoModelForSeq2SeqLM.from_pretrained(" in card
    assert "Causal" not in card


def test_generate_answers_as_transformers_does(model, tmp_path):
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts = ["what is blue?", "black", "the night sea is black and the sky"]
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    told = ["generate", str(model), str(file), "-o", str(out), "--max-new-tokens", "8"]
    result = CliRunner().invoke(app, told)
    assert result.exit_code == 0, result.output
    lm, tokenizer, expected = AutoModelForSeq2SeqLM.from_pretrained(model).eval(), around("$A </s>"), []
    for prompt in prompts:
        ids = lm.generate(tokenizer(prompt, return_tensors="pt").input_ids, max_new_tokens=8, do_sample=False)[0]
        expected.append(tokenizer.decode(ids[1:], skip_special_tokens=True, clean_up_tokenization_spaces=False))
    assert [json.loads(line)["completion"] for line in out.read_text().splitlines()] == expected


def test_tgdpo_on_docids_with_several_negatives(model, docids, tmp_path):
    result = tokengrain.train("tgdpo", model=str(model), data=str(docids), output=tmp_path, **QUICK)
    assert result.model_path is not None
    dataset = load_annotated(tmp_path / "credit" / "train.parquet")
    assert {len(sample.completions) for sample in dataset.samples} == {3, 4}
    assert all(len(c.columns["token_rewards"]) == len(c.ids) for s in dataset.samples for c in s.completions)
    shown = read_token_rows(tmp_path, count=1, tokenizer=around("$A </s>"))[0]
    assert "".join(shown.sides[0].tokens).startswith(" <")


def test_lora_after_sft(model, pairs, tmp_path):
    pytest.importorskip("peft")
    lora = {"lora__r": 2, "lora__alpha": 4}
    result = tokengrain.train("dpo", model=str(model), data=str(pairs), output=tmp_path, **lora, **QUICK)
    assert "AutoPeftModelForSeq2SeqLM.from_pretrained(" in (Path(result.model_path) / "README.md").read_text()
    saved = json.loads((Path(result.model_path) / "adapter_config.json").read_text())
    assert saved["task_type"] == "SEQ_2_SEQ_LM"
    merged = models.load_model(ModelSpec(path=str(result.model_path)), str(result.model_path), merge_adapter=True)
    assert type(merged).__name__ == "T5ForConditionalGeneration"


def test_a_model_built_from_scratch(pairs, tmp_path):
    config = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    recipe = {
        "model": {"config": config, "tokenizer": {"type": "byte"}},
        "method": "scratch",
        "data": str(pairs),
        "stages": {"sft": {"kind": "sft"}, "train": {"kind": "train", "objective": {"name": "dpo"}}},
    }
    file = tmp_path / "scratch.yaml"
    file.write_text(json.dumps(recipe))
    result = tokengrain.train(file, output=tmp_path / "run", **QUICK)
    made = AutoModelForSeq2SeqLM.from_pretrained(result.model_path).config
    assert made.decoder_start_token_id == made.pad_token_id


def test_the_start_token_can_be_given(model, tmp_path):
    lm = AutoModelForSeq2SeqLM.from_pretrained(model)
    lm.config.decoder_start_token_id = lm.generation_config.decoder_start_token_id = None
    lm.save_pretrained(tmp_path)
    loaded = models.load_model(ModelSpec(path=str(tmp_path), decoder_start_id=3), str(tmp_path))
    assert loaded.config.decoder_start_token_id == loaded.generation_config.decoder_start_token_id == 3


def test_what_needs_a_causal_model_refuses_with_the_reason(model, pairs, tmp_path):
    lm = AutoModelForSeq2SeqLM.from_pretrained(model)
    with pytest.raises(ModelError, match="is an encoder-decoder; expected a causal language model, for sampling"):
        HFGenerate(lm, around("$A </s>"))
    with pytest.raises(
        ModelError, match="a stage of kind reward needs a causal language model, whose decoder has read"
    ):
        tokengrain.train("qrm", model=str(model), data=str(pairs), output=tmp_path, **QUICK)
