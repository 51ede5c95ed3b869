"""The base model's cache: trained once per machine, written atomically, keyed by grammar and settings."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokengrain.files import fingerprint
from tokengrain.worlds.model_cache import Progress, ensure_model, model_folder
from tokengrain.worlds.stories.grammar import Grammar
from tokengrain.worlds.stories.pretraining import Pretraining, pretrain
from tokengrain.worlds.stories.tokenizer import build_tokenizer

FORMAT = 2
"""Raised when training changes in a way that its settings do not show: cached models are trained anew."""
SETTINGS = {
    "full": Pretraining(),
    "small": Pretraining(hidden_size=48, layers=2, mlp_size=96, steps=300, pool=2000),
    "one-sentence": Pretraining(hidden_size=32, layers=2, mlp_size=64, steps=250, pool=1000),
    "one-phrase": Pretraining(hidden_size=32, layers=2, mlp_size=64, steps=250, pool=1000),
}


def base_model_folder(grammar: Grammar, settings: Pretraining) -> Path:
    """Where the base model of these settings is or will be."""
    key = fingerprint([FORMAT, grammar.fingerprint, asdict(settings)])
    return model_folder(f"stories-{grammar.size.name}", key)


def ensure_base_model(grammar: Grammar, settings: Pretraining | None = None) -> Path:
    """Folder with the base model, its tokenizer and `pretraining.json`; trains it if it is not there.

    Several processes may ask at once: one trains, the others wait. A training that is interrupted leaves
    nothing.
    """
    settings = settings or SETTINGS[grammar.size.name]
    folder = base_model_folder(grammar, settings)

    def train(progress: Progress) -> tuple[Any, dict[str, Any]]:
        model, report = pretrain(grammar, settings, progress)
        return model, {**asdict(settings), **report}

    return ensure_model(folder, train, build_tokenizer(grammar), "world://stories", settings.steps)
