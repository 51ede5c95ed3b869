"""Token scores of a reward model, pooled per completion, with the statistics that its config keeps."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from tokengrain.batch import Segments, TokenBatch
from tokengrain.errors import ModelError, require
from tokengrain.scoring.model import evaluating, nested
from tokengrain.scoring.score import score
from tokengrain.settings import check_choice

Pooling = Literal["mean", "last"]
Scaling = Literal["zscore", "centre", "none"]


def pooled_scores(token_scores: Tensor, segments: Segments, pooling: Pooling = "mean") -> Tensor:
    """One score per completion `[C]`, float32 at least, from those of its tokens `[N]`; 0 for an empty one.

    The mean, not the sum, which would prefer long completions.
    """
    check_choice("pooling", pooling, Pooling)
    scores = token_scores if token_scores.dtype == torch.float64 else token_scores.float()
    if pooling == "mean":
        return segments.mean(scores)
    return segments.sum(torch.where(segments.is_last, scores, 0.0))


@dataclass(frozen=True)
class ScoreStatistics:
    """Mean and (population) standard deviation of a reward model's token scores on its training tokens."""

    prefix: ClassVar[str] = "token_score"
    mean: float
    std: float

    def as_dict(self) -> dict[str, Any]:
        """Under the names they have in a model's config."""
        return {f"{self.prefix}_{name}": value for name, value in asdict(self).items()}

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        """Those in the model's config; None if it has none."""
        found = {f.name: getattr(config_of(model), f"{cls.prefix}_{f.name}", None) for f in fields(cls)}
        known = {name: value for name, value in found.items() if value is not None}
        return cls(**known) if {"mean", "std"} <= set(known) else None


@dataclass(frozen=True)
class CompletionStatistics(ScoreStatistics):
    """The same of the scores of whole completions, pooled as in the loss."""

    prefix: ClassVar[str] = "completion_score"
    pooling: Pooling = "mean"


def config_of(model: nn.Module) -> Any:
    """The config of the transformers model in `model`, whatever wraps it."""
    found = next((m.config for m in nested(model) if hasattr(m, "config")), None)
    require(found is not None, ModelError, f"{type(model).__name__} has no config; expected a transformers model")
    return found


statistics_of, completion_statistics_of = ScoreStatistics.of, CompletionStatistics.of
Statistics = TypeVar("Statistics", bound=ScoreStatistics)


def set_statistics(model: nn.Module, statistics: Statistics) -> Statistics:
    """Keep statistics in the model's config, with which they are saved."""
    for name, value in statistics.as_dict().items():
        setattr(config_of(model), name, value)
    return statistics


def frozen_token_scores(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Token scores `[N]` of a reward model in evaluation mode, without gradient; its mode is restored."""
    with evaluating(model):
        scores = score(model, batch, ("token_scores",)).token_scores
    assert scores is not None  # it was asked for
    return scores
