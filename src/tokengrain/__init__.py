"""tokengrain: token-level alignment for language models.

    method = credit source (which tokens earned it) x objective (how credit becomes a loss) x normaliser

In one line: `tokengrain.train("tgdpo", model="my/model", data="pairs.jsonl")`. The names below are loaded
when they are first used, so that importing tokengrain is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "train": "tokengrain.api",
    "load_recipe": "tokengrain.recipe",
    "run_recipe": "tokengrain.training.stages",
    "read_run": "tokengrain.runs",
    "PreferenceTrainer": "tokengrain.training",
    "PreferenceConfig": "tokengrain.training",
    "OnlineTrainer": "tokengrain.training.online",
    "OnlineConfig": "tokengrain.training.online",
    "RewardSuite": "tokengrain.rewards",
    "make_reward": "tokengrain.rewards",
    "TokenizeConfig": "tokengrain.data",
    "load_rows": "tokengrain.data",
    "prepare_pairs": "tokengrain.data",
    "prepare_sft": "tokengrain.data",
    "Sample": "tokengrain.batch",
    "Completion": "tokengrain.batch",
    "Segments": "tokengrain.batch",
    "TokenBatch": "tokengrain.batch",
    "score": "tokengrain.scoring",
    "make_objective": "tokengrain.objectives",
    "make_credit": "tokengrain.credit",
    "annotate": "tokengrain.credit.annotate",
    "load_world": "tokengrain.worlds",
    "METHODS": "tokengrain.methods",
    "write_report": "tokengrain.report",
    "TokengrainError": "tokengrain.errors",
}

if TYPE_CHECKING:
    from tokengrain.api import train as train
    from tokengrain.batch import Completion as Completion
    from tokengrain.batch import Sample as Sample
    from tokengrain.batch import Segments as Segments
    from tokengrain.batch import TokenBatch as TokenBatch
    from tokengrain.credit import make_credit as make_credit
    from tokengrain.credit.annotate import annotate as annotate
    from tokengrain.data import TokenizeConfig as TokenizeConfig
    from tokengrain.data import load_rows as load_rows
    from tokengrain.data import prepare_pairs as prepare_pairs
    from tokengrain.data import prepare_sft as prepare_sft
    from tokengrain.errors import TokengrainError as TokengrainError
    from tokengrain.methods import METHODS as METHODS
    from tokengrain.objectives import make_objective as make_objective
    from tokengrain.recipe import load_recipe as load_recipe
    from tokengrain.report import write_report as write_report
    from tokengrain.rewards import RewardSuite as RewardSuite
    from tokengrain.rewards import make_reward as make_reward
    from tokengrain.runs import read_run as read_run
    from tokengrain.scoring import score as score
    from tokengrain.training import PreferenceConfig as PreferenceConfig
    from tokengrain.training import PreferenceTrainer as PreferenceTrainer
    from tokengrain.training.online import OnlineConfig as OnlineConfig
    from tokengrain.training.online import OnlineTrainer as OnlineTrainer
    from tokengrain.training.stages import run_recipe as run_recipe
    from tokengrain.worlds import load_world as load_world

__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tokengrain' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
