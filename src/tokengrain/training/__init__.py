"""Training: `PreferenceTrainer`, a thin subclass of `transformers.Trainer`, and its settings.

trainer = PreferenceTrainer(model, PreferenceConfig("out"), objective="dpo", train_dataset=pairs)
trainer.train()

Importing this package imports transformers.
"""

from tokengrain.files import read_log
from tokengrain.training.checkpoints import last_complete_checkpoint
from tokengrain.training.config import PreferenceConfig
from tokengrain.training.trainer import PreferenceTrainer

__all__ = [
    "PreferenceConfig",
    "PreferenceTrainer",
    "last_complete_checkpoint",
    "read_log",
]
