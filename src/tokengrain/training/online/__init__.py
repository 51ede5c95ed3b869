"""Online training: the policy learns from its own completions.

trainer = OnlineTrainer(model, OnlineConfig("out", max_steps=100), objective="grpo", rewards=[my_reward],
                        train_dataset=rows, processing_class=tokenizer)
trainer.train()

Importing this package imports transformers.
"""

from tokengrain.training.online.config import OnlineConfig
from tokengrain.training.online.prompts import PromptDataset
from tokengrain.training.online.registry import ONLINE_CREDIT, check_step, make_step
from tokengrain.training.online.step import CreditStep, CriticLike, RolloutStep, Stateless
from tokengrain.training.online.trainer import OnlineTrainer

__all__ = [
    "ONLINE_CREDIT",
    "CreditStep",
    "CriticLike",
    "OnlineConfig",
    "OnlineTrainer",
    "PromptDataset",
    "RolloutStep",
    "Stateless",
    "check_step",
    "make_step",
]
