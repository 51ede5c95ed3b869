"""A recurrent policy for made-up tasks: a prompt is one token, a completion a fixed number of them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from tokengrain.batch import Segments
from tokengrain.scoring.fused import head_quantities
from tokengrain.scoring.head import Head


class GRUPolicy(nn.Module):
    """One GRU layer on token embeddings, then a language-model head.

    Args:
        prompts: how many prompts there are.
        vocabulary: how many tokens.
        hidden: width of embeddings and layer.
        seed: of the starting weights, PyTorch's usual ones.
    """

    def __init__(self, prompts: int, vocabulary: int, hidden: int, seed: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(vocabulary + prompts, hidden)
            self.gru = nn.GRU(hidden, hidden, batch_first=True)
            self.out = nn.Linear(hidden, vocabulary)

    def hidden(self, prompts: Tensor, tokens: Tensor) -> Tensor:
        """The head's inputs before each token of completions `[n, T]` of prompts `[n]`: `[n * T, H]`."""
        inputs = torch.cat([self.vocabulary + prompts[:, None], tokens[:, :-1]], 1)
        return self.gru(self.embed(inputs))[0].flatten(0, 1)

    @property
    def head(self) -> Head:
        return Head(self.out.weight, self.out.bias)

    def logps(self, prompts: Tensor, tokens: Tensor) -> Tensor:
        """Log-probabilities of the tokens of completions `[n, T]`: flat `[n * T]`, nats."""
        return head_quantities(self.hidden(prompts, tokens), self.head, tokens.flatten(), ("logps",))["logps"]

    @torch.no_grad()
    def sample(self, prompts: Tensor, length: int, generator: torch.Generator) -> Tensor:
        """Completions `[n, length]` of prompts `[n]` at temperature 1."""
        feed, state, drawn = self.vocabulary + prompts[:, None], None, []
        for _ in range(length):
            hidden, state = self.gru(self.embed(feed), state)
            feed = torch.multinomial(self.out(hidden[:, -1]).softmax(-1), 1, generator=generator)
            drawn.append(feed)
        return torch.cat(drawn, 1)

    def copy(self) -> GRUPolicy:
        return copy.deepcopy(self)


def equal_segments(n: int, length: int) -> Segments:
    """Segments of n completions of one length."""
    return Segments(torch.arange(n + 1) * length)
