"""The supervised warm start of the worlds `arithmetic` and `revision`: a small Llama on chains that go wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokengrain.worlds.arithmetic.problems import BOS, EOS, IDS, PAD
from tokengrain.worlds.muon import muon_and_adamw
from tokengrain.worlds.pretraining import Training, descend, small_llama

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from tokengrain.worlds.model_cache import Progress

Example = tuple[list[int], list[int]]
"""Token ids of a prompt (`<s>` in front) and of a completion (`<end>` at its end)."""


@dataclass(frozen=True)
class WarmStart(Training):
    """Settings of the base model and its training; see `warm_start`.

    Args:
        muon: Muon for the matrices; it needs fewer steps, which suits the small size, and AdamW is what the full
            size was measured with.
    """

    hidden_size: int = 96
    mlp_size: int = 256
    steps: int = 600
    learning_rate: float = 3e-3
    warmup: int = 30
    positions: int = 128
    muon: bool = False


def new_model(settings: WarmStart, vocabulary: int) -> LlamaForCausalLM:
    """The untrained model; see `small_llama`."""
    return small_llama(
        settings,
        vocabulary=vocabulary,
        positions=settings.positions,
        tied=False,
        bos=IDS[BOS],
        eos=IDS[EOS],
        pad=IDS[PAD],
    )


def _loss(model: LlamaForCausalLM, examples: Sequence[Example]) -> Tensor:
    """Mean cross-entropy over the tokens of the completions."""
    width = max(len(prompt) + len(completion) for prompt, completion in examples)
    ids = torch.full((len(examples), width), IDS[PAD])
    predicts = torch.zeros(len(examples), width, dtype=torch.bool)
    for i, (prompt, completion) in enumerate(examples):
        end = len(prompt) + len(completion)
        ids[i, :end] = torch.tensor(prompt + completion)
        predicts[i, len(prompt) - 1 : end - 1] = True
    hidden = model.model(ids, use_cache=False).last_hidden_state
    labels = ids.roll(-1, 1)[predicts]
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[predicts]), labels)


def _optimizers(model: LlamaForCausalLM, settings: WarmStart) -> list[torch.optim.Optimizer]:
    if settings.muon:
        return muon_and_adamw(model, settings.learning_rate)
    betas = (0.9, 0.95)
    return [torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=betas, weight_decay=0.0)]


def warm_start(
    settings: WarmStart,
    vocabulary: int,
    draw: Callable[[int], list[Example]],
    progress: Progress | None = None,
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Train a base model on fresh examples in every step, with linear decay after the warm-up.

    Args:
        vocabulary: how many tokens there are.
        draw: gives so many new examples.
        progress: called after every step with (steps done, cross-entropy in nats per token).

    Returns:
        The model in evaluation mode, and a report: cross-entropy over the last steps, seconds, threads.
    """
    start = time.perf_counter()
    model = new_model(settings, vocabulary).train()
    optimizers = _optimizers(model, settings)
    steps = (_loss(model, draw(settings.batch_size)) for _ in range(settings.steps))
    losses = descend(model, optimizers, steps, settings, progress)
    last = losses[-max(1, settings.steps // 20) :]
    return model.eval(), {
        "cross_entropy": sum(last) / len(last),
        "seconds": round(time.perf_counter() - start, 1),
        "threads": torch.get_num_threads(),
    }
