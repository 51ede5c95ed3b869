"""Policies small enough for exact answers: the next token depends on prompt, position and previous token alone.

Expected reward and KL of such a policy are sums over a few hundred states, so no sampling noise is in them.
Shapes: P prompts, L positions, V tokens; previous token V stands for "none yet".
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokengrain.batch import Segments
from tokengrain.scoring.head import Distribution, Head

EMBEDDING = 16


@dataclass(frozen=True)
class Space:
    """How many prompts, positions and tokens there are."""

    prompts: int
    length: int
    vocabulary: int

    @property
    def states(self) -> Tensor:
        """Every (prompt, position, previous token), long `[P * L * (V + 1), 3]`."""
        axes = [torch.arange(n) for n in (self.prompts, self.length, self.vocabulary + 1)]
        return torch.cartesian_prod(*axes)

    def states_of(self, prompts: Tensor, tokens: Tensor) -> Tensor:
        """The state before every token of completions `[n, L]` of prompts `[n]`: long `[n * L, 3]`."""
        n = len(prompts)
        start = torch.full((n, 1), self.vocabulary)
        previous = torch.cat([start, tokens[:, :-1]], 1)
        position = torch.arange(self.length).expand(n, -1)
        return torch.stack([prompts[:, None].expand(n, self.length), position, previous], -1).flatten(0, 1)

    def segments(self, n: int) -> Segments:
        """Segments of n completions, all of length L."""
        return Segments(torch.arange(n + 1) * self.length)


class MarkovPolicy(nn.Module):
    """One hidden layer on embeddings of prompt, position and previous token; then a language-model head.

    Args:
        space: sizes.
        hidden: width of the hidden layer.
        seed: of the starting weights, PyTorch's usual ones.
    """

    def __init__(self, space: Space, hidden: int, seed: int) -> None:
        super().__init__()
        self.space = space
        sizes = (space.prompts, space.length, space.vocabulary + 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embeddings = nn.ModuleList(nn.Embedding(size, EMBEDDING) for size in sizes)
            self.middle = nn.Linear(EMBEDDING * len(sizes), hidden)
            self.out = nn.Linear(hidden, space.vocabulary)

    def hidden(self, states: Tensor) -> Tensor:
        """Last hidden states `[n, H]` in states `[n, 3]`."""
        embedded = [embed(states[:, i]) for i, embed in enumerate(self.embeddings)]
        return torch.tanh(self.middle(torch.cat(embedded, -1)))

    @property
    def head(self) -> Head:
        return Head(self.out.weight, self.out.bias)

    def frozen(self, states: Tensor) -> Distribution:
        """The policy's distribution in these states, without gradient."""
        return Distribution(self.hidden(states).detach(), self.head.detach())

    @torch.no_grad()
    def table(self) -> Tensor:
        """Log-probabilities of every token in every state, float64 `[P, L, V + 1, V]`."""
        space = self.space
        logits = self.head.logits(self.hidden(space.states)).double()
        return logits.log_softmax(-1).view(space.prompts, space.length, space.vocabulary + 1, space.vocabulary)

    def copy(self) -> MarkovPolicy:
        return copy.deepcopy(self)


def occupancy(table: Tensor) -> Tensor:
    """Probability of each previous token at each position, `[P, L, V + 1]`, of a policy's table."""
    prompts, length, rows, vocabulary = table.shape
    at = table.new_zeros(prompts, rows)
    at[:, vocabulary] = 1.0
    out = []
    for position in range(length):
        out.append(at)
        following = (at[:, :, None] * table[:, position].exp()).sum(1)
        at = torch.cat([following, torch.zeros_like(following[:, :1])], 1)
    return torch.stack(out, 1)


def expected(table: Tensor, values: Tensor) -> float:
    """Mean over prompts of the expected sum of `values` (broadcast to `[P, L, V + 1, V]`) over a completion."""
    weights = occupancy(table)[..., None] * table.exp()
    return float((weights * values).sum() / len(table))


def divergence(table: Tensor, reference: Tensor) -> float:
    """KL(policy || reference) in nats per completion, mean over prompts."""
    return expected(table, table - reference)


def sample(table: Tensor, prompts: Tensor, generator: torch.Generator) -> Tensor:
    """Completions `[n, L]` of prompts `[n]`."""
    probabilities = table.exp()
    previous = torch.full_like(prompts, table.shape[-1])
    drawn = []
    for position in range(table.shape[1]):
        row = probabilities[prompts, position, previous]
        previous = torch.multinomial(row, 1, generator=generator)[:, 0]
        drawn.append(previous)
    return torch.stack(drawn, 1)


@dataclass(frozen=True)
class Pairs:
    """Preference pairs: prompts `[n]`; completions `[n, 2, L]`, the chosen one first."""

    prompts: Tensor
    completions: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts `[2n]` and completions `[2n, L]` of some pairs: chosen, rejected, chosen, ..."""
        return self.prompts[index].repeat_interleave(2), self.completions[index].flatten(0, 1)

    def first(self, n: int) -> Pairs:
        return Pairs(self.prompts[:n], self.completions[:n])

    def swapped(self) -> Pairs:
        """Chosen and rejected exchanged."""
        return Pairs(self.prompts, self.completions.flip(1))


def draw_pairs(table: Tensor, step_rewards: Tensor, n: int, generator: torch.Generator) -> Pairs:
    """Pairs of samples with Bradley-Terry labels.

    Args:
        table: of the policy that they are sampled from, `[P, L, V + 1, V]`.
        step_rewards: reward of a token in a state; broadcasts to `[P, L, V + 1, V]`.
    """
    prompts = torch.randint(len(table), (n,), generator=generator)
    both = torch.stack([sample(table, prompts, generator) for _ in range(2)], 1)
    returns = torch.stack([total(step_rewards, table.shape, prompts, both[:, i]) for i in range(2)], 1)
    first_wins = torch.rand(n, generator=generator) < torch.sigmoid(returns[:, 0] - returns[:, 1])
    return Pairs(prompts, torch.where(first_wins[:, None, None], both, both.flip(1)))


def total(step_rewards: Tensor, shape: torch.Size, prompts: Tensor, tokens: Tensor) -> Tensor:
    """Sum of the rewards along completions `[n, L]`: `[n]`."""
    rewards = step_rewards.expand(shape)
    space = Space(shape[0], shape[1], shape[3])
    prompt, position, previous = space.states_of(prompts, tokens).unbind(-1)
    return rewards[prompt, position, previous, tokens.flatten()].view(tokens.shape).sum(1)
