"""The model that a critic starts from."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from tokengrain.errors import ModelError
from tokengrain.scoring import causal_lm
from tokengrain.scoring.classifier import is_token_classifier
from tokengrain.training.reference import disable_dropout, is_peft
from tokengrain.training.reward_models import reset_head, reward_model_from


def scores_tokens(model: nn.Module) -> bool:
    """Whether it is a token classifier, plain or with an adapter."""
    return is_token_classifier(_inner(model))


def critic_model(source: nn.Module, *, fresh_head: bool = False) -> nn.Module:
    """A token classifier of its own, ready to be trained: a copy of `source`, or of its decoder with a fresh head.

    Raises:
        ModelError: neither a token classifier nor a causal language model, an adapter on the latter, or nothing in
            it that can be trained.
    """
    if scores_tokens(source):
        model = copy.deepcopy(source)
        if not is_peft(model):
            model.requires_grad_(True)
        if fresh_head:
            reset_head(_inner(model))
    else:
        causal_lm(source)
        model = reward_model_from(source, share=False).requires_grad_(True)
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError("nothing of the critic can be trained; expected an adapter loaded for training")
    disable_dropout(model)
    return model.train()


def _inner(model: nn.Module) -> nn.Module:
    inner: Any = model
    return inner.get_base_model() if is_peft(inner) else inner
