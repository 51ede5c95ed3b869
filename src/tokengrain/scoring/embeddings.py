"""The first and the last layer of a Hugging Face model, which PyTorch's types know nothing of."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def input_embeddings(lm: nn.Module) -> Any:
    """The module that turns token ids into vectors; its `weight` is `[V, H]`."""
    model: Any = lm
    return model.get_input_embeddings()


def output_embeddings(lm: nn.Module) -> Any:
    """The module that turns hidden states `[..., H]` into logits `[..., V]`, with whatever PEFT put around it."""
    model: Any = lm
    return model.get_output_embeddings()


def device_of(lm: nn.Module) -> torch.device:
    """Where token ids go: the device of the input embeddings."""
    return input_embeddings(lm).weight.device
