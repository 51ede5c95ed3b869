"""tokengrain: token-level alignment for language models.

    method = credit source (which tokens earned it) x objective (how credit becomes a loss) x normaliser

In one line: `tokengrain.train("tgdpo", model="my/model", data="pairs.jsonl")`. The names below are loaded
when they are first used, so that importing tokengrain is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokengrain.annotation import annotate as annotate
    from tokengrain.api import train as train
    from tokengrain.batch import Completion as Completion
    from tokengrain.batch import Sample as Sample
    from tokengrain.batch import Segments as Segments
    from tokengrain.batch import TokenBatch as TokenBatch
    from tokengrain.data.config import TokenizeConfig as TokenizeConfig
    from tokengrain.data.dataset import prepare_pairs as prepare_pairs
    from tokengrain.data.dataset import prepare_sft as prepare_sft
    from tokengrain.data.rows import load_rows as load_rows
    from tokengrain.errors import TokengrainError as TokengrainError
    from tokengrain.method import METHODS as METHODS
    from tokengrain.method import make_credit as make_credit
    from tokengrain.method import make_objective as make_objective
    from tokengrain.report.html import show_credit as show_credit
    from tokengrain.report.html import write_report as write_report
    from tokengrain.rewards.builtin import make_reward as make_reward
    from tokengrain.rewards.suite import RewardSuite as RewardSuite
    from tokengrain.run.load import load_recipe as load_recipe
    from tokengrain.run.runner import run_recipe as run_recipe
    from tokengrain.runs import read_run as read_run
    from tokengrain.scoring.score import score as score
    from tokengrain.training.config import OnlineConfig as OnlineConfig
    from tokengrain.training.config import PreferenceConfig as PreferenceConfig
    from tokengrain.training.online import OnlineTrainer as OnlineTrainer
    from tokengrain.training.trainer import PreferenceTrainer as PreferenceTrainer
    from tokengrain.worlds import load_world as load_world

__version__ = "0.1.0"

_HOME = {
    "train": "tokengrain.api",
    "load_recipe": "tokengrain.run.load",
    "run_recipe": "tokengrain.run.runner",
    "read_run": "tokengrain.runs",
    "PreferenceTrainer": "tokengrain.training.trainer",
    "PreferenceConfig": "tokengrain.training.config",
    "OnlineTrainer": "tokengrain.training.online",
    "OnlineConfig": "tokengrain.training.config",
    "RewardSuite": "tokengrain.rewards.suite",
    "make_reward": "tokengrain.rewards.builtin",
    "TokenizeConfig": "tokengrain.data.config",
    "load_rows": "tokengrain.data.rows",
    "prepare_pairs": "tokengrain.data.dataset",
    "prepare_sft": "tokengrain.data.dataset",
    "Sample": "tokengrain.batch",
    "Completion": "tokengrain.batch",
    "Segments": "tokengrain.batch",
    "TokenBatch": "tokengrain.batch",
    "score": "tokengrain.scoring.score",
    "make_objective": "tokengrain.method",
    "make_credit": "tokengrain.method",
    "annotate": "tokengrain.annotation",
    "load_world": "tokengrain.worlds",
    "METHODS": "tokengrain.method",
    "write_report": "tokengrain.report.html",
    "show_credit": "tokengrain.report.html",
    "TokengrainError": "tokengrain.errors",
}


__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tokengrain' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
