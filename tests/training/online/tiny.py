"""A small policy, prompts and rewards that the tests of online training share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.training.tiny import VOCABULARY, tiny_llama
from tokengrain.rollout.sampler import PromptItem
from tokengrain.training.config import OnlineConfig
from tokengrain.training.online import OnlineTrainer

END = 0
WANTED = 7


def make_prompts(n: int, seed: int = 0) -> list[PromptItem]:
    generator = torch.Generator().manual_seed(seed)

    def ids() -> list[int]:
        length = int(torch.randint(3, 9, (1,), generator=generator))
        return torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()

    return [PromptItem(ids(), row=f"p{row}", raw={"number": row}) for row in range(n)]


def share_of_token(completion_ids: list[list[int]]) -> list[float]:
    """Share of tokens that are below a third of the vocabulary: varies within every group."""
    return [sum(i < VOCABULARY // 3 for i in ids) / len(ids) for ids in completion_ids]


def online_config(output_dir: Path | str, **overrides: Any) -> OnlineConfig:
    settings = {
        "use_cpu": True,
        "disable_tqdm": True,
        "prompts_per_rollout": 4,
        "num_generations": 3,
        "max_new_tokens": 6,
        "stop_ids": [END],
        "learning_rate": 1e-2,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 3,
        "rollout_samples_every": 1,
        **overrides,
    }
    return OnlineConfig(str(output_dir), **settings)


OWN = (
    "objective",
    "rewards",
    "credit",
    "sampler",
    "reference",
    "critic",
    "teacher",
    "eval_dataset",
    "processing_class",
    "peft_config",
    "callbacks",
    "train_dataset",
)


def make_online(output_dir: Path | str, *, model: Any = None, **options: Any) -> OnlineTrainer:
    """A trainer; options that `OnlineTrainer` does not take go to the config."""
    own = {"rewards": share_of_token, "train_dataset": make_prompts(10)}
    own |= {name: options.pop(name) for name in OWN if name in options}
    return OnlineTrainer(model if model is not None else tiny_llama(), online_config(output_dir, **options), **own)
