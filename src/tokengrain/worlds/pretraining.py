"""What the training of the worlds' base models shares: a small Llama, and descent with linear decay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from tokengrain.worlds.model_cache import Progress


@dataclass(frozen=True)
class Training:
    """Size of a base model, and settings of its training.

    Args:
        warmup: steps in which the learning rate rises; from the first step on it also falls linearly towards 0.
        seed: of the weights and of what is drawn.
    """

    hidden_size: int
    mlp_size: int
    steps: int
    learning_rate: float
    warmup: int
    layers: int = 3
    heads: int = 4
    batch_size: int = 64
    seed: int = 0


def small_llama(
    settings: Training, *, vocabulary: int, positions: int, tied: bool, bos: int, eos: int, pad: int
) -> LlamaForCausalLM:
    """The untrained model; its weights depend on `settings.seed` and not on torch's global state.

    Args:
        vocabulary: how many tokens there are.
        tied: whether the head's weights are the embeddings'.
        bos, eos, pad: ids of the special tokens.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.mlp_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return LlamaForCausalLM(config).float()


def descend(
    model: LlamaForCausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    losses: Iterable[Tensor],
    settings: Training,
    progress: Progress | None = None,
) -> list[float]:
    """Take one step for each loss, with gradients clipped to norm 1.

    Args:
        losses: `settings.steps` of them, each made from the weights of its step when it is asked for.
        progress: called after every step with (steps done, its loss).

    Returns:
        The losses.
    """
    found = []
    for step, loss in enumerate(losses):
        rate = min((step + 1) / settings.warmup, 1.0) * (settings.steps - step) / settings.steps
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * rate
            optimizer.step()
        found.append(float(loss.detach()))
        if progress is not None:
            progress(step + 1, found[-1])
    return found
