"""From Python: models, rows and data sets in memory, names as TRL's trainers take them, and hints for TRL's names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tokengrain
from tests.test_stages import DPO, write_rows
from tests.training.tiny import tiny_llama
from tokengrain.errors import DataError, ModelError, RecipeError
from tokengrain.models import train_tokenizer
from tokengrain.specs import TokenizerSpec

ROWS = [{"prompt": f"Say {i}.", "chosen": f" nice {i}", "rejected": f" bad {i} oh"} for i in range(12)]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(TokenizerSpec(type="byte"), ())
    tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    values = {
        "method": "mine",
        "model": "nowhere/to-be-found",
        "data": {"train": "nowhere.jsonl"},
        "output_dir": str(tmp_path / "run"),
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True},
        "stages": {"train": DPO},
    }
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(values))
    return path


def test_a_model_and_rows_in_memory(recipe: Path, model_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """They are kept in the run folder, so that the same call resumes or reuses; the model itself stays as it was."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given: dict[str, Any] = {"data": ROWS, "eval_data": datasets.Dataset.from_list(ROWS[:4]), "quiet": True}
    capfd.readouterr()
    result = tokengrain.train(recipe, model=model, tokenizer=tokenizer, **given)
    shown = capfd.readouterr().err  # bars of transformers and datasets, one a model or data set
    assert not [bar for bar in ("Loading weights", "Writing model", "Creating parquet") if bar in shown]
    assert result.metrics["stages"]["train"]["held_out"] == 4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    card = (result.model_path / "README.md").read_text()
    assert "A language model, trained with " in card
    assert "- data: `rows in memory`, " in card
    kinds = sorted(path.name.partition("-")[0] + path.suffix for path in (result.path / "inputs").iterdir())
    assert kinds == ["model", "rows.jsonl", "rows.parquet"]
    assert tokengrain.train(recipe, model=model, **given).reused == ["train"]  # the tokenizer found where it came from
    assert len(list((result.path / "inputs").iterdir())) == 3
    trained = AutoModelForCausalLM.from_pretrained(result.model_path)
    assert not torch.equal(trained.lm_head.weight, before["lm_head.weight"])


def test_what_cannot_be_kept_says_so(recipe: Path, model_dir: Path) -> None:
    name = str(model_dir)
    with pytest.raises(DataError, match=r"row 1: a row cannot be written as JSON"):
        tokengrain.train(recipe, model=name, data=[ROWS[0], {"prompt": object()}])
    with pytest.raises(DataError, match="row 0: a row is not a mapping"):
        tokengrain.train(recipe, model=name, data=[("a", "b")])
    with pytest.raises(DataError, match="of several splits one"):
        tokengrain.train(recipe, model=name, data=datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)))
    with pytest.raises(DataError, match=r"got 'IterableDataset'; expected .* of a stream its rows"):
        tokengrain.train(recipe, model=name, data=datasets.Dataset.from_list(ROWS).to_iterable_dataset())
    with pytest.raises(RecipeError, match="a model at a path has its own"):
        tokengrain.train(recipe, model=name, data=ROWS, tokenizer=AutoTokenizer.from_pretrained(model_dir))
    with pytest.raises(ModelError, match="expected a name or a model"):
        tokengrain.train(recipe, model=3, data=ROWS)
    with pytest.raises(ModelError, match="give tokenizer="):
        tokengrain.train(recipe, model=tiny_llama(), data=ROWS)


@pytest.mark.parametrize("name", ["args", "ref_model", "train_dataset", "processing_class", "learning_rate"])
def test_trls_names_have_a_hint(recipe: Path, name: str) -> None:
    with pytest.raises(RecipeError, match=f"the {name} of TRL's trainers is here"):
        tokengrain.train(recipe, **{name: object()})


def test_what_is_given_twice_is_an_error(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="output_dir is given twice"):
        tokengrain.train(recipe, output=tmp_path / "run", output_dir="other")
    with pytest.raises(RecipeError, match=r"lr and training\.learning_rate set the same: 1e-05 and 0\.1"):
        tokengrain.train(recipe, lr=1e-5, training__learning_rate=0.1)


@pytest.mark.parametrize("kind", ["list", "dataset", "file"])
def test_a_trainer_takes_names_and_rows(kind: str, model_dir: Path, tmp_path: Path) -> None:
    rows = {
        "list": lambda: ROWS,
        "dataset": lambda: datasets.Dataset.from_list(ROWS),
        "file": lambda: str(write_rows(tmp_path / "rows.jsonl")),
    }[kind]()
    args = tokengrain.PreferenceConfig(str(tmp_path / "out"), max_steps=1, use_cpu=True, disable_tqdm=True)
    trainer = tokengrain.PreferenceTrainer(str(model_dir), args, train_dataset=rows, eval_dataset={"own": rows})
    trainer.train()
    assert trainer.evaluate()["eval_own_accuracy"] >= 0
    trainer.save_model(str(tmp_path / "model"))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model")) == 258


def test_the_online_trainer_too(model_dir: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in ROWS))
    args = tokengrain.OnlineConfig(
        str(tmp_path / "out"), max_steps=1, num_generations=2, prompts_per_rollout=2, max_new_tokens=4, use_cpu=True
    )
    for given in (str(prompts), datasets.Dataset.from_json(str(prompts))):
        trainer = tokengrain.OnlineTrainer(
            str(model_dir), args, rewards=lambda completions, **_: list(map(len, completions)), train_dataset=given
        )
        assert len(trainer.source.prompts) == len(ROWS)


def test_the_trainers_hint_at_trls_names(model_dir: Path, tmp_path: Path) -> None:
    args = tokengrain.PreferenceConfig(str(tmp_path / "out"), use_cpu=True)
    with pytest.raises(RecipeError, match="what TRL calls ref_model is here: reference"):
        tokengrain.PreferenceTrainer(str(model_dir), args, train_dataset=ROWS, ref_model=None)
    with pytest.raises(RecipeError, match="need a tokenizer"):
        tokengrain.PreferenceTrainer(tiny_llama(), args, train_dataset=ROWS)
    with pytest.raises(RecipeError, match="a second model as reference="):
        tokengrain.PreferenceTrainer(tiny_llama(), tiny_llama(), train_dataset=ROWS)
    for given in ({"train": ROWS}, datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))):
        with pytest.raises(DataError, match=r"of 'train'; expected a list of rows or one data set"):
            tokengrain.PreferenceTrainer(str(model_dir), args, train_dataset=given)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("beta", r"make_objective\(NAME, beta="), ("max_length", "TokenizeConfig"), ("learning_rat", "'learning_rate'")],
)
def test_the_configs_hint_at_trls_settings(name: str, hint: str, tmp_path: Path) -> None:
    for config in (tokengrain.PreferenceConfig, tokengrain.OnlineConfig):
        with pytest.raises(RecipeError, match=f"{config.__name__} has no setting '{name}'; .*{hint}"):
            config(str(tmp_path), **{name: 1})
