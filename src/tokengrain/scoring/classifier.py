"""Token-classification models with one label: a score for every token.

A reward model is read at the token itself ("token_scores"); a critic before the action, at the position that
predicts the token ("values").
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokengrain.errors import ModelError
from tokengrain.scoring.head import accumulation_dtype

SUFFIX = "ForTokenClassification"
# What transformers calls the head.
HEADS = ("score", "classifier")
# What they give.
CLASSIFIER_WANTS = ("token_scores", "values")


def is_token_classifier(model: nn.Module) -> bool:
    """Whether it is one of transformers' `*ForTokenClassification` models, or derived from one."""
    return any(cls.__name__.endswith(SUFFIX) for cls in type(model).__mro__)


def checked_classifier(model: nn.Module) -> nn.Module:
    """The model, if it has one label and a head that can be found; else ModelError."""
    config: Any = model.config
    if config.num_labels != 1:
        raise ModelError(
            f"{type(model).__name__} has {config.num_labels} labels; expected one, as "
            "AutoModelForTokenClassification.from_pretrained(..., num_labels=1) gives it"
        )
    score_head(model)
    return model


def score_head(model: nn.Module) -> nn.Module:
    """The module that turns hidden states `[..., H]` into scores `[..., 1]`, with whatever PEFT put around it."""
    for name in HEADS:
        module = getattr(model, name, None)
        if isinstance(module, nn.Module):
            return module
    raise ModelError(f"{type(model).__name__} has no head that is known; expected one of {list(HEADS)}")


def scores_of_hidden(model: nn.Module, hidden: Tensor) -> Tensor:
    """`[n, H] -> [n]`, in float32 (float64 for a float64 model), with the model's dropout if it is training."""
    dropout = getattr(model, "dropout", None)
    if isinstance(dropout, nn.Module):
        hidden = dropout(hidden)
    return scores_of_logits(score_head(model)(hidden))


def scores_of_logits(logits: Tensor) -> Tensor:
    """`[n, 1] -> [n]`."""
    return logits[:, 0].to(accumulation_dtype(logits.dtype))
