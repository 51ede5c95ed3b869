"""Independent oracle for images: TRL's DPOTrainer and GRPOTrainer, fed the same rows, take the same steps."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.test_vision import made_by_hand
from tests.tiny_vlms import mark, picture, tiny_vlm
from tests.training.test_trl_grpo_oracle import TRL_EPS, Replay, completions_of, reward
from tokengrain.batch import Completion, TokenBatch
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.dataset import prepare_pairs
from tokengrain.errors import read_log
from tokengrain.method import make_objective
from tokengrain.rollout.sampler import encode_prompts
from tokengrain.training.config import OnlineConfig, PreferenceConfig
from tokengrain.training.online import OnlineTrainer
from tokengrain.training.trainer import PreferenceTrainer

pytest.importorskip("trl")

QWEN = "qwen2_5_vl"
SIZES = [(32, 32), (32, 48), (16, 32), (48, 48)]
SCHEDULE: dict[str, Any] = {
    "optim": "sgd",
    "learning_rate": 0.02,
    "max_steps": 6,
    "max_grad_norm": 0.5,
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
    "report_to": "none",
    "seed": 7,
}


def steps(entries: list[dict[str, Any]]) -> list[tuple[float, float]]:
    return [(e["loss"], e["grad_norm"]) for e in entries if "loss" in e]


def check_same_steps(ours: Any, theirs: Any, folder: Path) -> None:
    found, wanted = steps(read_log(folder / "log.jsonl")), steps(theirs.state.log_history)
    assert len(found) == len(wanted) == SCHEDULE["max_steps"]
    for number, (mine, trls) in enumerate(zip(found, wanted, strict=True), 1):
        assert mine == pytest.approx(trls, rel=1e-5, abs=1e-7), f"step {number}"
    assert abs(found[0][0] - found[-1][0]) > 1e-4
    towers = 0
    for (name, mine), trls in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(mine, trls, rtol=1e-5, atol=1e-7, msg=name)
        towers += "visual" in name
    assert towers > 10


def test_dpo(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    texts = [("a b c", "d e"), ("f", "g a"), ("red blue a", "b"), ("c d", "e f g a")]
    rows = [
        # TRL adds no end to completions beside images.
        {"prompt": f"{mark(QWEN)} what is this ?", "chosen": f" {good} <eos>", "rejected": f" {bad} <eos>"}
        | {"images": [picture(number, size)]}
        for number, (size, (good, bad)) in enumerate(zip(SIZES, texts, strict=True))
    ]
    pairs = prepare_pairs(rows, made_by_hand(QWEN), TokenizeConfig(add_eos=False))
    given = {**SCHEDULE, "per_device_train_batch_size": 2, "train_sampling_strategy": "sequential"}
    theirs = DPOTrainer(
        tiny_vlm(QWEN),
        ref_model=tiny_vlm(QWEN),
        args=DPOConfig(str(tmp_path / "trl"), beta=0.2, bf16=False, gradient_checkpointing=False, **given),
        train_dataset=Dataset.from_list(rows),
        processing_class=made_by_hand(QWEN),
    )
    theirs.train()
    ours = PreferenceTrainer(
        tiny_vlm(QWEN),
        PreferenceConfig(str(tmp_path / "ours"), **given),
        objective=make_objective("dpo", beta=0.2),
        train_dataset=pairs,
        processing_class=made_by_hand(QWEN),
    )
    ours.train()
    check_same_steps(ours, theirs, tmp_path / "ours")


def test_grpo(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    prompts, generations, epochs = 2, 3, 3
    questions = [[{"role": "user", "content": text}] for text in ("what is this ?", "a b")]
    rows = [
        {"prompt": question, "images": [picture(i, size)]} for i, (question, size) in enumerate(zip(questions, SIZES))
    ]
    items = encode_prompts(rows, made_by_hand(QWEN))
    generator = torch.Generator().manual_seed(0)

    def drawn() -> TokenBatch:
        lengths = [int(n) for n in torch.randint(2, 7, (generations,), generator=generator)]
        completions = [Completion(torch.randint(8, 20, (n,), generator=generator).tolist()) for n in lengths]
        return TokenBatch.from_samples([item.sample(completions) for item in items])

    batches = [drawn() for _ in range(SCHEDULE["max_steps"] // epochs)]
    left = iter(batches)

    def rollout(asked: list[Any], trainer: Any) -> dict[str, Any]:
        batch = next(left)
        ids = [batch.prompt(int(g)).tolist() for g in batch.group]
        return {"prompt_ids": ids, "completion_ids": completions_of(batch), "logprobs": None}

    config = GRPOConfig(
        str(tmp_path / "trl"),
        per_device_train_batch_size=prompts * generations,
        num_generations=generations,
        num_iterations=epochs,
        max_completion_length=8,
        loss_type="grpo",
        beta=0.0,
        bf16=False,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        **SCHEDULE,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rollout_func is called experimental
        theirs = GRPOTrainer(
            model=tiny_vlm(QWEN),
            args=config,
            reward_funcs=reward,
            train_dataset=Dataset.from_list(rows),
            processing_class=made_by_hand(QWEN),
            rollout_func=rollout,
        )
        theirs.train()
    ours = OnlineTrainer(
        tiny_vlm(QWEN),
        OnlineConfig(
            str(tmp_path / "ours"),
            prompts_per_rollout=prompts,
            num_generations=generations,
            rollout_epochs=epochs,
            max_new_tokens=8,
            shuffle_prompts=False,
            normaliser="mean",
            **SCHEDULE,
        ),
        objective=make_objective("grpo"),
        rewards=reward,
        credit=[{"name": "group", "eps": TRL_EPS}],
        sampler=Replay(batches),
        train_dataset=rows,
        processing_class=made_by_hand(QWEN),
    )
    ours.train()
    check_same_steps(ours, theirs, tmp_path / "ours")
