"""Loss and gradient norm of every recipe's first steps, as they were when `freeze_values.json` was written.

Each recipe runs with its settings for real models, shrunk, on a tiny model made from a seed, so that nothing depends on
a pre-trained one. `python -m tests.freeze --write-values` writes the values anew: after a change that is meant to
change numbers, and for a new recipe. What two commits are compared by to the last bit is `tests/freeze.py`.
"""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tokengrain

RECIPES = Path(__file__).parents[1] / "recipes"
VALUES = Path(__file__).with_name("freeze_values.json")
RELATIVE, ABSOLUTE = 1e-4, 2e-6
"""Of what differs between processors; the losses of a first online step are sums that should be 0."""

LETTERS = "abcdefgh"
REWARD = '''
def early(completions, **columns):
    """Share of the alphabet's first four letters; above one half, a completion counts as correct."""
    return [sum(letter in "abcd" for letter in text) / max(1, len(text)) for text in completions]
'''
TRAINING = {
    "max_steps": 3,
    "logging_steps": 1,
    "warmup_steps": 0,
    "learning_rate": 3.0e-3,
    "max_tokens_per_microbatch": 64,
    "save_strategy": "no",
}
OFFLINE = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
ONLINE = {
    "gradient_accumulation_steps": 1,
    "prompts_per_rollout": 6,
    "num_generations": 4,
    "minibatches": 2,
    "max_steps": 4,
    "max_new_tokens": 12,
}
AEPO = {"name": "aepo", "triggers": None, "quantile": 0.6, "window": 2}
DR_GRPO = {"name": "grpo", "max_length": 12}
TEMPLATES = {"credit": {"credit": {"templates": {"better": "a{prompt}", "worse": "h{prompt}"}}}}
RTO = {"credit": [{"name": "rto", "model": "@guide", "beta1": 0.5, "beta2": 0.1}, {"name": "gae", "lam": 0.9}]}
R3 = {"name": "r3", "marker": "#", "column": "reference", "filter_top_k": None, "filter_drop": 0.0}

OWN: dict[str, dict[str, Any]] = {
    "aepo": {"train": {"credit": [AEPO, {"name": "group"}]}},
    "aepo_images": {"train": {"credit": [AEPO, {"name": "group"}]}},
    "dapo": {
        "train": {
            "credit": [
                {"name": "filter_groups", "metric": "correct", "refill": True},
                {"name": "overlong", "buffer": 4},
                {"name": "group"},
            ]
        }
    },
    "drgrpo": {"train": {"objective": DR_GRPO}},
    "dro": {"train": {"credit": [R3, {"name": "group", "eps": 1.0e-4}], "objective": DR_GRPO}},
    "rto": {"train": RTO},
    "treg": TEMPLATES,
    "treg_simpo": TEMPLATES,
}
"""Of recipes whose settings suit only models that speak: what stands in for them, by stage."""

EXTRA: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("dpo", {"train": None, "tuned": {"kind": "sft"}}),
    "dro_propagation": (
        "dro",
        {
            "train": {
                "credit": [{**R3, "baseline": "none", "propagation": True, "power": 2.0}, {"name": "group"}],
                "objective": DR_GRPO,
            }
        },
    ),
    "nthr": ("thr", {"train": {"credit": [{"name": "group"}, {"name": "nthr"}]}}),
    "importance": (
        "grpo",
        {
            "train": {
                "credit": [{"name": "group"}, {"name": "importance"}, {"name": "mask_truncated"}],
                "training": {"temperature": 0.7},
            }
        },
    ),
}
"""Parts that no recipe has, each put into one that comes near: its name, and what changes, by stage."""


def run(name: str, folder: Path) -> dict[str, list[list[float]]]:
    """Loss and gradient norm of every step, by stage, of a recipe or a case of `EXTRA`."""
    torch.set_num_threads(1)
    recipe, changes = EXTRA[name] if name in EXTRA else (name, OWN.get(name, {}))
    write_inputs(folder)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(shrunk(RECIPES / f"{recipe}.yaml", changes, folder)))
    with quick_collection():
        tokengrain.train(path, output=folder / "run", quiet=True)
    return {
        stage.name: [[entry["loss"], entry["grad_norm"]] for entry in stage.log() if "grad_norm" in entry]
        for stage in tokengrain.read_run(folder / "run").stages
        if any("grad_norm" in entry for entry in stage.log())
    }


def shrunk(recipe: Path, changes: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A recipe on top of `recipe`: a tiny new model, a few rows, small batches and few steps."""
    given = tokengrain.load_recipe(recipe, model="a/model", data="rows.jsonl")
    stages: dict[str, Any] = {**changes}
    for name in [*given.stages, *(name for name in changes if name not in given.stages)]:
        changed = changes.get(name, {})
        if changed is None:  # the case has no such stage
            continue
        kind = given.stages[name].kind if name in given.stages else changed["kind"]
        stages[name] = {**changed}
        if kind != "annotate":
            sizes = ONLINE if kind == "online" else OFFLINE
            stages[name]["training"] = {**TRAINING, **sizes, **changed.get("training", {})}
        if kind == "online":
            stages[name]["prompts"] = {"chat": False}
            rewards = given.stages[name].rewards
            if rewards and not any("model" in reward for reward in rewards):  # those that check answers
                stages[name]["rewards"] = [f"{folder}/reward.py:early"]
    model = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    return {
        "extends": str(recipe),
        "settings": "paper",
        "model": {"config": model, "tokenizer": str(folder / "tokenizer")},
        "data": {"train": str(folder / "rows.jsonl"), "eval_fraction": 0.0},
        **({"lora": {"r": 2, "alpha": 4}} if given.lora is not None else {}),
        "training": {"bf16": False, "use_cpu": True},  # also of stages that only compute credit
        "stages": stages,
    }


def write_inputs(folder: Path) -> None:
    """A tokenizer of single letters, rows that serve as pairs and as prompts, and a reward."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(["<unk>", "</s>", *LETTERS, "#", " "])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="</s>")
    tokenizer.save_pretrained(folder / "tokenizer")
    rows = []
    for n in range(16):
        a, b, c, d = (LETTERS[(k * n + k) % 8] for k in (1, 2, 3, 5))
        after = LETTERS[(LETTERS.index(d) + 1) % 8]
        rows.append(
            {
                "prompt": f"{a}{b} {c}",
                "chosen": f" {a}{b} {d}{a} {c}"[: 5 + n % 4],
                "rejected": f" {a}{b} {after} {d}{b}"[: 5 + n % 5],
                "reference": f"{c}{d}{a}"[: 1 + n % 3],
            }
        )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)


def write_values() -> None:
    """Write `freeze_values.json`: of all recipes that there are, and of `EXTRA`."""
    names = [*sorted(path.stem for path in RECIPES.glob("*.yaml")), *EXTRA]
    found = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = run(name, Path(folder))
        print(name, {stage: steps[-1] for stage, steps in found[name].items()}, flush=True)
    lines = [
        f"  {json.dumps(name)}: {{\n"
        + ",\n".join(f"    {json.dumps(stage)}: {json.dumps(steps)}" for stage, steps in stages.items())
        + "\n  }"
        for name, stages in found.items()
    ]
    VALUES.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


@contextmanager
def quick_collection() -> Iterator[None]:
    """Objects of earlier tests and of imports are not looked at when memory is freed, ten times in every run."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


FROZEN = json.loads(VALUES.read_text(encoding="utf-8")) if VALUES.exists() else {}


@pytest.mark.parametrize("name", FROZEN)
def test_loss_and_gradient_norm_are_the_frozen_ones(name: str, tmp_path: Path) -> None:
    found = run(name, tmp_path)
    assert found.keys() == FROZEN[name].keys()
    for stage, steps in FROZEN[name].items():
        assert len(found[stage]) == len(steps)
        for step, (now, then) in enumerate(zip(found[stage], steps, strict=True), start=1):
            assert now == pytest.approx(then, rel=RELATIVE, abs=ABSOLUTE), f"{stage}, step {step}: [loss, grad_norm]"
