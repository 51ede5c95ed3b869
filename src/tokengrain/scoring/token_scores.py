"""Token scores of a reward model, pooled per completion, with the statistics that its config keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokengrain.batch import Segments, TokenBatch
from tokengrain.errors import ModelError
from tokengrain.scoring.model import evaluating
from tokengrain.scoring.score import score
from tokengrain.settings import check_choice

Pooling = Literal["mean", "last"]
Scaling = Literal["zscore", "centre", "none"]


def pooled_scores(token_scores: Tensor, segments: Segments, pooling: Pooling = "mean") -> Tensor:
    """One score per completion `[C]` from those of its tokens `[N]`; 0 for an empty one. Ranks best-of-n.

    The mean, not the sum: a sum would prefer long completions. In float32 at least.
    """
    check_choice("pooling", pooling, Pooling)
    scores = token_scores if token_scores.dtype == torch.float64 else token_scores.float()
    if pooling == "mean":
        return segments.mean(scores)
    return segments.sum(torch.where(segments.is_last, scores, 0.0))


@dataclass(frozen=True)
class ScoreStatistics:
    """Mean and (population) standard deviation of a reward model's token scores on its training tokens."""

    mean: float
    std: float

    def as_dict(self) -> dict[str, float]:
        """Under the names they have in a model's config."""
        return {f"token_score_{name}": value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ScoreStatistics:
        return cls(float(values["token_score_mean"]), float(values["token_score_std"]))


@dataclass(frozen=True)
class CompletionStatistics:
    """The same of the scores of whole completions.

    Attributes:
        pooling: what a completion's score is, as in the loss: the "mean" of its tokens' scores, or that of the "last".
    """

    mean: float
    std: float
    pooling: Pooling = "mean"

    def as_dict(self) -> dict[str, Any]:
        """Under the names they have in a model's config."""
        return {f"completion_score_{name}": value for name, value in asdict(self).items()}


def config_of(model: nn.Module) -> Any:
    """The config of the transformers model in `model`, whatever wraps it."""
    inner: Any = model
    while not hasattr(inner, "config"):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if inner is None:
            raise ModelError(f"{type(model).__name__} has no config; expected a transformers model")
    return inner.config


def set_statistics(model: nn.Module, statistics: ScoreStatistics | CompletionStatistics) -> None:
    """Keep statistics in the model's config, with which they are saved."""
    for name, value in statistics.as_dict().items():
        setattr(config_of(model), name, value)


def statistics_of(model: nn.Module) -> ScoreStatistics | None:
    """The statistics in the model's config; None if it has none."""
    config = config_of(model)
    values = {name: getattr(config, name, None) for name in ("token_score_mean", "token_score_std")}
    return None if None in values.values() else ScoreStatistics.from_dict(values)


def completion_statistics_of(model: nn.Module) -> CompletionStatistics | None:
    """The same of whole completions."""
    config = config_of(model)
    mean, std, pooling = (getattr(config, f"completion_score_{name}", None) for name in ("mean", "std", "pooling"))
    return None if mean is None or std is None else CompletionStatistics(float(mean), float(std), pooling or "mean")


def frozen_token_scores(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Token scores `[N]` of a reward model in evaluation mode, without gradient; its mode is restored."""
    with evaluating(model):
        scores = score(model, batch, ("token_scores",)).token_scores
    assert scores is not None  # it was asked for
    return scores
