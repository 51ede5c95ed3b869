"""The base model of the world `stories`: a small Llama trained on the grammar's exact next-token
distribution.

Soft targets converge several times faster than sampled tokens, because a sequence teaches the whole
distribution of every state it passes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokengrain.worlds.muon import muon_and_adamw
from tokengrain.worlds.pretraining import Training, descend, small_llama
from tokengrain.worlds.stories.data import sample
from tokengrain.worlds.stories.grammar import Grammar, Prompt
from tokengrain.worlds.stories.tokenizer import MODEL_POSITIONS

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from tokengrain.worlds.model_cache import Progress

MIX = (0.6, 0.2, 0.2)
"""Shares of plain, kind and rude sequences in the pool."""


@dataclass(frozen=True)
class Pretraining(Training):
    """Settings of the base model and its training; see `pretrain`.

    Args:
        pool: how many sequences there are to train on.
    """

    hidden_size: int = 64
    mlp_size: int = 128
    steps: int = 700
    learning_rate: float = 6e-3
    warmup: int = 40
    pool: int = 6000


@dataclass(frozen=True)
class Pool:
    """Training sequences. Shapes: n sequences, L tokens of the longest.

    Attributes:
        ids: long `[n, L]`, prompt and completion, padded on the right.
        predicts: bool `[n, L]`, positions whose next token belongs to the completion.
        tables, states: long `[n, L]`, row of the base table that holds the next token's distribution there.
        lengths: long `[n]`.
    """

    ids: Tensor
    predicts: Tensor
    tables: Tensor
    states: Tensor
    lengths: Tensor


def make_pool(grammar: Grammar, prompts: list[Prompt], generator: torch.Generator) -> Pool:
    """One sampled sequence per prompt."""
    drawn = sample(grammar, prompts, generator)
    heads = [[grammar.bos, *grammar.encode(p.text)] for p in prompts]
    lengths = torch.tensor([len(h) for h in heads]) + drawn.lengths
    shape = (len(prompts), int(lengths.max()))
    ids = torch.full(shape, grammar.pad)
    states = torch.full(shape, grammar.finished)
    for i, head in enumerate(heads):
        n = int(drawn.lengths[i])
        ids[i, : len(head) + n] = torch.tensor(head + drawn.ids[i, :n].tolist())
        states[i, len(head) - 1 : len(head) - 1 + n] = drawn.states[i, :n]
    tables = torch.tensor([p.table for p in prompts])[:, None].expand(shape)
    return Pool(ids, states != grammar.finished, tables, states, lengths)


def mixed_prompts(grammar: Grammar, n: int) -> list[Prompt]:
    """Prompts in the shares of `MIX`, every prompt of an instruction equally often."""
    out: list[Prompt] = []
    per_instruction = len(grammar.plain)
    for i, share in enumerate(MIX):
        own = grammar.prompts[i * per_instruction : (i + 1) * per_instruction]
        out += [own[j % per_instruction] for j in range(round(share * n))]
    return out


def new_model(grammar: Grammar, settings: Pretraining) -> LlamaForCausalLM:
    """The untrained model; see `small_llama`."""
    return small_llama(
        settings,
        vocabulary=len(grammar.vocabulary),
        positions=MODEL_POSITIONS,
        tied=True,
        bos=grammar.bos,
        eos=grammar.eos,
        pad=grammar.pad,
    )


def _batches(pool: Pool, settings: Pretraining, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of each step. Batches are of similar lengths (little padding) and come in random order."""
    size = settings.batch_size
    made = 0
    while made < settings.steps:
        order = torch.randperm(len(pool.ids), generator=generator)
        groups = []
        for part in order.split(size * 16):
            groups += list(part[pool.lengths[part].argsort(stable=True)].split(size))
        for i in torch.randperm(len(groups), generator=generator).tolist():
            if made < settings.steps and len(groups[i]) == size:
                made += 1
                yield groups[i]


def _soft_cross_entropy(model: LlamaForCausalLM, pool: Pool, index: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy to the exact distributions of the positions of a batch, and those distributions."""
    width = int(pool.lengths[index].max())
    predicts = pool.predicts[index, :width]
    hidden = model.model(pool.ids[index, :width], use_cache=False).last_hidden_state
    target = table[pool.tables[index, :width][predicts], pool.states[index, :width][predicts]]
    logp = model.lm_head(hidden[predicts]).log_softmax(-1)
    return -(target * logp).sum(-1), target


def pretrain(
    grammar: Grammar, settings: Pretraining, progress: Progress | None = None
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Train a base model.

    Args:
        progress: called after every step with (steps done, cross-entropy in nats per token).

    Returns:
        The model in eval mode, and a report: KL to the grammar in nats per token and per completion, seconds.
    """
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(settings.seed)
    pool = make_pool(grammar, mixed_prompts(grammar, settings.pool), generator)
    table = grammar.dense(grammar.edge_logp.exp(), 0.0).float()
    model = new_model(grammar, settings).train()
    # AdamW alone needs twice the steps (1,400) and ends at 0.004 nats per token, not 0.0015.
    optimizers = muon_and_adamw(model, settings.learning_rate)
    batches = _batches(pool, settings, generator)
    losses = (_soft_cross_entropy(model, pool, index, table)[0].mean() for index in batches)
    descend(model, optimizers, losses, settings, progress)
    seconds = time.perf_counter() - start
    report = {
        **divergence(grammar, model.eval()),
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
    }
    return model, report


@torch.no_grad()
def divergence(grammar: Grammar, model: LlamaForCausalLM, n: int = 1200, seed: int = 1) -> dict[str, float]:
    """KL(grammar || model) on fresh plain samples, in nats per token and per completion."""
    prompts = [grammar.plain[i % len(grammar.plain)] for i in range(n)]
    pool = make_pool(grammar, prompts, torch.Generator().manual_seed(seed))
    table = grammar.dense(grammar.edge_logp.exp(), 0.0).float()
    cross, target = _soft_cross_entropy(model, pool, torch.arange(n), table)
    kl = cross - torch.special.entr(target).sum(-1)
    return {"kl_per_token": float(kl.mean()), "kl_per_completion": float(kl.sum()) / n}
