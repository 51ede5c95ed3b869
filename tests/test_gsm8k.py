"""GSM8K, a real prompt set: its rows load, its answers are found and rewarded, and a tiny model trains on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tokengrain.data.rows import load_rows, with_columns
from tokengrain.models import train_tokenizer
from tokengrain.rewards.answers import gold_number
from tokengrain.rewards.builtin import make_reward
from tokengrain.rewards.suite import RewardSuite
from tokengrain.rollout.local import HFGenerate
from tokengrain.rollout.sampler import SamplingConfig, encode_prompts
from tokengrain.run.load import load_recipe
from tokengrain.run.runner import run_recipe
from tokengrain.runs import read_run
from tokengrain.specs import TokenizerSpec
from tokengrain.training.config import OnlineConfig
from tokengrain.training.online import OnlineTrainer

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared/data"
TRAIN, TEST = DATA / "gsm8k-train.jsonl.gz", DATA / "gsm8k-test.jsonl.gz"
RECIPE = ROOT / "examples/gsm8k/grpo.yaml"
pytestmark = pytest.mark.skipif(not TRAIN.is_file(), reason=f"no {TRAIN.name} in ../shared/data")

COLUMNS = {"prompt": "Question: {question}\nAnswer:", "completion": " {answer}"}


def first_rows(path: Path, count: int) -> list[dict[str, Any]]:
    return [row for _, row in with_columns(load_rows(path).subset(range(count)), COLUMNS)]


def byte_model() -> tuple[Any, Any]:
    tokenizer = train_tokenizer(TokenizerSpec(type="byte"), ())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config), tokenizer


@pytest.mark.parametrize(("path", "count"), [(TRAIN, 7473), (TEST, 1319)])
def test_every_answer_has_its_number_and_its_format(path: Path, count: int) -> None:
    rows = [row for _, row in load_rows(path)]
    assert len(rows) == count
    golds = [gold_number(row["answer"]) for row in rows]
    assert all(gold is not None for gold in golds)
    answers = [row["answer"] for row in rows]
    numeric = make_reward("numeric", style="gsm8k").function
    assert numeric(answers, answer=answers) == [1.0] * count
    wrong = [f"It is simple.\n#### {int(gold) + 1}" for gold in golds]
    assert numeric(wrong, answer=answers) == [0.0] * count


def test_the_recipes_format_reward_knows_the_format() -> None:
    recipe = load_recipe(RECIPE)
    settings = dict(recipe.stages["train"].rewards[1])
    reward = make_reward(settings.pop("name"), **settings).function
    answers = [row["answer"] for row in first_rows(TEST, 300)]
    assert reward(answers) == [1.0] * 300
    assert reward(["#### 4", "so it is 4", "so it is\n#### four", "so it is\n#### 4\nor 5"]) == [0.0] * 4


def test_prompts_sample_and_reward_without_a_trainer() -> None:
    model, tokenizer = byte_model()
    prompts = encode_prompts(first_rows(TRAIN, 4), tokenizer)
    assert tokenizer.decode(prompts[0].ids).startswith("Question: Natalia sold clips")
    assert tokenizer.decode(prompts[0].ids).endswith("\nAnswer:")
    suite = RewardSuite(
        [make_reward("numeric"), make_reward("format", pattern="####", whole=False)], tokenizer=tokenizer
    )
    rollouts = HFGenerate(model, tokenizer).sample(prompts, n=3, sampling=SamplingConfig(max_new_tokens=8))
    assert suite.score(rollouts).total.tolist() == [0.0] * 12  # noise answers nothing
    golds = [row["answer"] for row in first_rows(TRAIN, 4) for _ in range(3)]
    assert suite.score(rollouts, golds).total.tolist() == [2.0] * 12


def test_ten_lines_of_python_train_and_evaluate(tmp_path: Path) -> None:
    model, tokenizer = byte_model()
    before = model.state_dict()["model.layers.0.mlp.up_proj.weight"].clone()

    def digits(completions: list[str], answer: list[str]) -> list[float]:
        """Shaping that noise can earn: digits, as an answer has."""
        assert all("####" in text for text in answer)  # the rows' own column
        return [sum(c.isdigit() for c in text) / 8 for text in completions]

    trainer = OnlineTrainer(
        model,
        OnlineConfig(
            str(tmp_path),
            max_steps=2,
            learning_rate=1e-3,
            prompts_per_rollout=4,
            num_generations=4,
            max_new_tokens=24,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        ),
        objective="grpo",
        rewards=["numeric", digits],
        train_dataset=first_rows(TRAIN, 8),
        eval_dataset=first_rows(TEST, 6),
        processing_class=tokenizer,
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert trainer.state.global_step == 2
    assert not torch.equal(before, trainer.model.state_dict()["model.layers.0.mlp.up_proj.weight"])
    assert metrics["eval_correct"] == 0.0
    assert metrics["eval_reward_digits"] >= 0.0
    assert metrics["eval_length"] > 0


def test_the_recipe_runs_without_manual_steps(tmp_path: Path) -> None:
    settings = {
        "output_dir": tmp_path / "run",
        "model.config.hidden_size": 32,
        "model.config.intermediate_size": 48,
        "model.config.num_hidden_layers": 2,
        "model.config.num_attention_heads": 4,
        "model.config.num_key_value_heads": 4,
        "model.tokenizer.vocab_size": 400,
        "data.train": TRAIN,
        "data.eval": "null",
        "data.eval_fraction": 0.25,
        "data.limit": 16,
        "stages.train.data.limit": 16,
        "stages.sft.training.num_train_epochs": 1,
        "stages.sft.training.warmup_steps": 0,
        "stages.train.training.max_steps": 2,
        "stages.train.training.prompts_per_rollout": 4,
        "stages.train.training.num_generations": 2,
        "stages.train.training.max_new_tokens": 12,
    }
    overrides = [f"{name}={value}" for name, value in settings.items()]
    result = run_recipe(load_recipe(RECIPE, overrides=overrides))
    run = read_run(result.path)
    assert run.status == "done"
    assert [stage.name for stage in run.stages] == ["init", "sft", "train"]
    final = run.final_stage
    assert final.metrics["train"]["steps"] == 2
    assert {"reward", "reward_numeric", "reward_format", "correct"} <= final.metrics["after"].keys()
    assert (final.model_path / "model.safetensors").is_file()
    record = json.loads((result.path / "train" / "rollouts.jsonl").read_text().splitlines()[0])
    assert "Question:" in json.dumps(record)
