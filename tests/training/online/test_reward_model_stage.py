"""A reward model as a reward in a recipe: one that a stage trains, a classifier from outside, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from rich.console import Console
from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaForTokenClassification

from tests.data.tokenizers import gpt2_like
from tests.training.tiny import tiny_llama
from tokengrain.errors import ModelError, RecipeError, read_log
from tokengrain.models import load_trained_reward_model
from tokengrain.run.folder import make_plan
from tokengrain.run.load import load_recipe, make_recipe
from tokengrain.run.runner import run_recipe

ROOT = Path(__file__).parents[3]
STAGE: dict[str, Any] = {
    "kind": "online",
    "prompts": {"chat": False},
    "rewards": [{"name": "reward_model", "model": "@reward", "scaling": "zscore"}],
    "objective": {"name": "grpo"},
    "training": {"prompts_per_rollout": 4, "num_generations": 3, "max_new_tokens": 8, "max_steps": 2},
}


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    tokenizer = gpt2_like()
    torch.set_num_threads(1)
    tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=128).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


def recipe_values(folder: Path, **stage: Any) -> dict[str, Any]:
    rows = [{"prompt": f"Say {i}.", "chosen": f" nice {i}", "rejected": f" bad {i} oh"} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = {"kind": "reward", "objective": {"name": "qrm", "pooling": "last"}, "training": {"max_steps": 3}}
    return {
        "method": "rto",
        "model": str(folder / "policy"),
        "data": {"train": str(folder / "rows.jsonl"), "eval_fraction": 0.25},
        "output_dir": str(folder / "run"),
        "training": {"logging_steps": 1, "use_cpu": True, "per_device_train_batch_size": 4},
        "stages": {"reward": reward, "train": {**STAGE, **stage}},
    }


def run(values: dict[str, Any]) -> Any:
    return run_recipe(make_recipe(values), console=Console(quiet=True))


def logged(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for line in read_log(folder / "run" / "train" / "log.jsonl"):
        found |= line
    return found


def test_a_stages_reward_model_with_rto(policy: Path, tmp_path: Path) -> None:
    rto = {"name": "rto", "model": str(policy), "beta1": 0.05}
    values = recipe_values(
        tmp_path, credit=[rto, {"name": "gae"}], critic={"model": "@reward", "lr": 1e-3}, objective={"name": "ppo"}
    )
    run(values)
    model = load_trained_reward_model(str(tmp_path / "run" / "reward" / "model"))
    config: Any = model.config
    assert config.completion_score_pooling == "last"
    scores = json.loads((tmp_path / "run" / "reward" / "metrics.json").read_text())["scores"]
    assert scores["completion_score_mean"] == config.completion_score_mean
    assert config.completion_score_std > 0
    found = logged(tmp_path)
    assert found["reward/reward_model/std"] > 0
    assert found["rto/sentence"] != 0
    after = json.loads((tmp_path / "run" / "train" / "metrics.json").read_text())["after"]
    assert after["reward"] == after["reward_reward_model"] != 0
    # What the reward model is decides what the stage is.
    plans = make_plan(make_recipe(values))
    assert [p.action for p in plans] == ["reuse", "reuse"]
    values["stages"]["reward"]["training"]["max_steps"] = 4
    changed = make_plan(make_recipe(values), overwrite=True)
    assert plans[1].fingerprint != changed[1].fingerprint


def test_a_classifier_with_another_tokenizer(policy: Path, tmp_path: Path) -> None:
    from tests.data.tokenizers import llama_like

    own = llama_like()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(own), num_labels=1, pad_token_id=0, max_position_embeddings=256, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "judge")
    own.save_pretrained(tmp_path / "judge")
    values = recipe_values(tmp_path, rewards=[{"name": "reward_model", "model": str(tmp_path / "judge")}])
    values["stages"].pop("reward")
    run(values)
    assert logged(tmp_path)["reward/reward_model/std"] > 0


def test_token_rewards_of_a_model_with_another_tokenizer(policy: Path, tmp_path: Path) -> None:
    from tests.data.tokenizers import llama_like

    own = llama_like()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(own), num_labels=1, pad_token_id=0, max_position_embeddings=256, **sizes)
    LlamaForTokenClassification(config).save_pretrained(tmp_path / "judge")
    own.save_pretrained(tmp_path / "judge")
    source = {"name": "reward_model", "model": str(tmp_path / "judge"), "scaling": "none"}
    values = recipe_values(tmp_path, rewards=[], credit=[{"name": "token_rewards", "source": source}, "reinforce"])
    values["stages"]["train"]["objective"] = {"name": "reinforce"}
    values["stages"].pop("reward")
    run(values)
    assert logged(tmp_path)["reward/tokens"] != 0
    # A guide must have the policy's vocabulary.
    values["stages"]["train"]["credit"][0]["source"] = {"name": "guide", "model": str(tmp_path / "judge")}
    with pytest.raises(ModelError, match="vocabular"):
        run_recipe(make_recipe(values), overwrite=True, console=Console(quiet=True))


def test_a_model_that_is_none_is_refused_before_anything_is_trained(policy: Path, tmp_path: Path) -> None:
    values = recipe_values(tmp_path, rewards=[{"name": "reward_model", "model": str(policy)}])
    PartialState()
    with pytest.raises(ModelError, match="is LlamaForCausalLM; expected a reward model"):
        run(values)
    assert not (tmp_path / "run" / "reward" / "model").exists()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"name": "reward_model"}, r"train\.rewards\[0\]\.model: missing; expected '@STAGE'"),
    "later stage": ({"name": "reward_model", "model": "@train"}, r"rewards\[0\]\.model: '@train' comes later"),
    "unknown stage": ({"name": "reward_model", "model": "@rewards"}, r"no stage 'rewards'.*expected one of @reward"),
    "a policy": ({"name": "reward_model", "model": "@guide"}, r"'@guide' is a stage of kind train, which makes"),
    "a setting": ({"name": "reward_model", "model": "@reward", "scale": "zscore"}, r"unknown setting 'scale'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    reward, message = REFUSED[case]
    values = recipe_values(tmp_path, rewards=[reward])
    guide = {"kind": "train", "objective": {"name": "dpo"}}
    values["stages"] = {"guide": guide, **values["stages"]}
    with pytest.raises(RecipeError, match=message):
        make_recipe(values)


GAE = "{name: gae, gamma: 1.0, lam: 0.95}"
NO_CRITIC = "{name: gae, lam: 1.0, use_values: false}"  # the rewards still to come: REINFORCE with RTO's reward
VARIANTS = {
    "rto": (GAE, "rto"),
    "semi": (GAE, "semi, delimiters: [a, e, i, o, n, t]"),
    "delayed": (GAE, "delayed"),
    "shaping": (GAE, "shaping"),
    "ppo": (GAE, "ppo"),
    "without a critic": (NO_CRITIC, "rto"),
}


def test_the_recipe_of_rto_and_its_ablation_on_a_model_from_outside(policy: Path, tmp_path: Path) -> None:
    """Guide and reward model are trained once; what follows differs by the settings that the page names."""
    rows = recipe_values(tmp_path)["data"]["train"]
    shared = {
        "output_dir": tmp_path / "run",
        "training": "{learning_rate: 0.01, logging_steps: 1, use_cpu: true, lr_scheduler_type: constant}",
        "stages.guide.training": "{max_steps: 2}",
        "stages.reward.training": "{max_steps: 2}",
        "stages.train.training": "{prompts_per_rollout: 4, num_generations: 2, max_new_tokens: 8, max_steps: 2}",
    }
    found: dict[str, dict[str, Any]] = {}
    for case, (gae, variant) in VARIANTS.items():
        step = f"{{name: rto, model: '@guide', beta1: 0.5, variant: {variant}}}"
        own = {**shared, "stages.train.credit": f"[{step}, {gae}]"}
        own |= {"stages.train.critic": "null"} if gae == NO_CRITIC else {}
        recipe = load_recipe(
            ROOT / "recipes" / "rto.yaml",
            model=str(policy),
            data=rows,
            overrides=[f"{name}={value}" for name, value in own.items()],
        )
        result = run_recipe(recipe, overwrite=True, console=Console(quiet=True))
        assert result.reused == ([] if case == "rto" else ["guide", "reward"])
        found[case] = next(e for e in read_log(tmp_path / "run" / "train" / "log.jsonl") if "rto/sentence" in e)
    # The same first rollout for all, so that only the variant makes the advantages.
    assert len({e["reward/reward_model/mean"] for e in found.values()}) == 1
    assert len({e["gae/advantage_std"] for e in found.values()}) == len(VARIANTS)
    assert "gae/explained_variance" not in found["without a critic"]
    assert all("gae/explained_variance" in e for case, e in found.items() if case != "without a critic")
