"""Tiny language models on made-up tasks: batches from tensors, training with the library's losses, sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tokengrain.batch import TokenBatch
from tokengrain.loss import Counts, LossOutput, make_normaliser
from tokengrain.methods.dpo import sft_loss
from tokengrain.scoring.score import score

WIDTH, LAYERS, HEADS = 48, 2, 4


def tiny_llama_config(vocabulary: int, positions: int, **more: Any) -> Any:
    """Two layers of width 48, with the spread of PyTorch's usual linear layers."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=positions,
        initializer_range=(3 * WIDTH) ** -0.5,
        attention_dropout=0.0,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **more,
    )


def tiny_llama(vocabulary: int, positions: int, seed: int) -> Any:
    """A random `LlamaForCausalLM`; torch's global random state is not changed.

    Embeddings are standard normal numbers, as PyTorch's are: with small ones the tasks are learned later and less
    cleanly, and what preference training then does to them varies more.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(tiny_llama_config(vocabulary, positions))
        embedding: Any = model.get_input_embeddings()
        nn.init.normal_(embedding.weight)
        return model


def copy_of(model: Any) -> Any:
    """A model of the same weights that trains on its own; trainers write into a model's config too."""
    other = type(model)(deepcopy(model.config))
    other.load_state_dict(model.state_dict())
    return other


def token_batch(prompts: Tensor, completions: Tensor, **columns: Tensor) -> TokenBatch:
    """Completions of one length as a batch.

    Args:
        prompts: long `[P, L]`.
        completions: long `[P, C, T]`, C completions of every prompt (a pair: chosen, rejected).
        columns: per-token values `[P, C, T]`.
    """
    n, of_each, length = completions.shape
    return TokenBatch(
        prompt_ids=prompts.flatten(),
        prompt_offsets=torch.arange(n + 1) * prompts.shape[1],
        completion_ids=completions.flatten(),
        completion_offsets=torch.arange(n * of_each + 1) * length,
        counted=torch.ones(completions.numel(), dtype=torch.bool),
        group=torch.arange(n).repeat_interleave(of_each),
        columns={name: values.flatten() for name, values in columns.items()},
        rows=tuple(range(n)),
    )


def mean_loss(output: LossOutput, batch: TokenBatch) -> Tensor:
    """The scalar of a step whose only micro-batch is `batch`."""
    return make_normaliser("mean")(output, Counts.of(batch.segments, pairs=batch.is_pairs))


def train(model: nn.Module, batches: Iterable[TokenBatch], loss: Callable[[TokenBatch], Tensor], rate: float) -> None:
    """Adam without schedule or clipping over the batches."""
    optimiser = torch.optim.Adam(model.parameters(), rate)
    model.train()
    for batch in batches:
        optimiser.zero_grad()
        loss(batch).backward()
        optimiser.step()
    model.eval()


def sft(model: nn.Module, batches: Iterable[TokenBatch], rate: float) -> None:
    """Fine-tune on completions as they are."""

    def loss(batch: TokenBatch) -> Tensor:
        return mean_loss(sft_loss(logps_of(model, batch), batch.segments), batch)

    train(model, batches, loss, rate)


def logps_of(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Log-probabilities of the counted tokens, `[N]`, nats."""
    logps = score(model, batch).logps
    assert logps is not None  # it was wanted
    return logps


@torch.no_grad()
def sample(model: Any, prompts: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Completions `[n, length]` at temperature 1, of prompts `[n, L]`."""
    feed, cache, drawn = prompts, None, []
    for _ in range(length):
        out = model(input_ids=feed, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        feed = torch.multinomial(out.logits[:, -1].softmax(-1), 1, generator=generator)
        drawn.append(feed)
    return torch.cat(drawn, 1)
