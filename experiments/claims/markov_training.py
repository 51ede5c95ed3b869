"""Training Markov policies with the library's losses; one function per kind of data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from experiments.claims.markov import MarkovPolicy, Pairs
from tokengrain.batch import Segments
from tokengrain.loss import Counts, LossOutput, make_normaliser
from tokengrain.methods.dpo import dpo_loss, sft_loss
from tokengrain.scoring.fused import head_quantities


def steps(
    policy: nn.Module,
    count: int,
    rate: float,
    loss: Callable[[int], Tensor],
    after: Callable[[int], None] | None = None,
) -> None:
    """Adam without schedule. `loss(step)` is a scalar; `after(n)` is called with the number of steps done."""
    optimiser = torch.optim.Adam(policy.parameters(), rate)
    for step in range(count):
        optimiser.zero_grad()
        loss(step).backward()
        optimiser.step()
        if after is not None:
            after(step + 1)


def scalar(output: LossOutput, segments: Segments) -> Tensor:
    """The mean over the pairs (or completions) of a step."""
    return make_normaliser("mean")(output, Counts.of(segments, pairs=output.unit == "pairs"))


def logps_of(policy: MarkovPolicy, prompts: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of the tokens of completions `[n, L]`: flat `[n * L]`, nats."""
    states = policy.space.states_of(prompts, tokens)
    return head_quantities(policy.hidden(states), policy.head, tokens.flatten(), ("logps",))["logps"]


def fit(policy: MarkovPolicy, prompts: Tensor, tokens: Tensor, count: int, rate: float, seed: int) -> None:
    """SFT on completions `[n, L]`, batches of 256."""
    generator = torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        index = torch.randint(len(prompts), (256,), generator=generator)
        segments = policy.space.segments(len(index))
        return scalar(sft_loss(logps_of(policy, prompts[index], tokens[index]), segments), segments)

    steps(policy, count, rate, loss)


def train_dpo(
    start: MarkovPolicy, pairs: Pairs, *, beta: float, count: int, rate: float, seed: int, batch: int = 64
) -> MarkovPolicy:
    """A copy of `start` after DPO on the pairs, with `start` as the reference."""
    policy, segments = start.copy(), start.space.segments(2 * batch)
    generator = torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        prompts, tokens = pairs.rows(torch.randint(len(pairs), (batch,), generator=generator))
        with torch.no_grad():
            ref = logps_of(start, prompts, tokens)
        return scalar(dpo_loss(logps_of(policy, prompts, tokens), segments, ref_logps=ref, beta=beta), segments)

    steps(policy, count, rate, loss)
    return policy


@torch.no_grad()
def log_ratio(policy: MarkovPolicy, other: MarkovPolicy, prompts: Tensor, tokens: Tensor) -> Tensor:
    """log π − log π_other of every token, flat `[n * L]`, nats."""
    return logps_of(policy, prompts, tokens) - logps_of(other, prompts, tokens)
