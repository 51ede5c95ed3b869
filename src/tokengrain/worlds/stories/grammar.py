"""The grammar of the world `stories` as tensors: next states, rewards, base distributions, walks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from hashlib import sha256
from typing import NamedTuple

import torch
from torch import Tensor

from tokengrain.errors import DataError
from tokengrain.files import fingerprint
from tokengrain.worlds.stories.lexicon import BOS, EOS, INSTRUCTIONS, PAD, UNK, WEATHER, Size
from tokengrain.worlds.stories.rules import BROKEN, FINISHED, Edge, Rules, State

TILT, TILT_TRUE, TILT_WORTH = 0.7, 0.6, 0.4
UNGRAMMATICAL = -1.0


class Prompt(NamedTuple):
    """What a prompt fixes: `table`, the row of the grammar's tensors, and `start`, the first state."""

    text: str
    table: int
    start: int


class Walk(NamedTuple):
    """Walks along n completions of up to L tokens: the tables `[n]`, the state before every token `[n, L]`,
    the true reward of every token `[n, L]`, the state after the last one `[n]`."""

    tables: Tensor
    states: Tensor
    rewards: Tensor
    last: Tensor


class Grammar:
    """States, rewards and base distributions as tensors.

    Shapes: T tables (instruction × place; the plain ones first), S states, V words, K the most grammatical
    words in a state. Floats are float64, rewards are true reward, log-probabilities are nats.

    Attributes:
        vocabulary: V words; a word's place in the list is its token id.
        states: S states; `broken` and `finished` are among them.
        next_state: long `[T, S, V]`; an ungrammatical word leads to `broken`, `<end>` to `finished`.
        reward: `[T, S, V]`, the true reward of a token in a state; −1 for the first ungrammatical one.
        edge_token, edge_next: long `[T, S, K]`, the grammatical tokens of a state.
        edge_reward, edge_logp: `[T, S, K]`, their rewards and base log-probabilities; −inf where no edge is.
        levels: the states by their longest way to the end, ascending; edges lead to lower levels.
        legal: bool `[T, S, V]`, the same edges by word.
        worth: `[V]`, what a word looks worth without its context.
        prompts: the plain prompts, and after them those with an instruction.
    """

    def __init__(self, size: Size) -> None:
        self.size = size
        self.rules = Rules(size)
        self.lexicon = self.rules.lexicon
        self.vocabulary = self.lexicon.vocabulary()
        self.token = {word: i for i, word in enumerate(self.vocabulary)}
        self.pad, self.bos, self.eos, self.unk = (self.token[w] for w in (PAD, BOS, EOS, UNK))
        edges = self.rules.explore()
        self.states = list(edges)
        self.index = {state: i for i, state in enumerate(self.states)}
        self.broken, self.finished = self.index[BROKEN], self.index[FINISHED]
        self._fill_transitions(edges)
        self._fill_edges(list(edges.values()))
        self.legal = self.dense(torch.ones_like(self.edge_logp), 0.0) > 0
        self.levels = self._levels()
        self.prompts = self._prompts()
        self.plain = [p for p in self.prompts if p.table < len(self.lexicon.places)]
        self._ids = {tuple(self.encode(p.text)): p for p in self.prompts}

    @property
    def longest(self) -> int:
        """Tokens of the longest grammatical completion, `<end>` included."""
        return len(self.levels) - 1

    @property
    def n_places(self) -> int:
        return len(self.lexicon.places)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the vocabulary, the rules, the rewards and the base distributions."""
        tables = (self.next_state, self.reward, self.edge_token, self.edge_logp.exp())
        # Rounded, so that the last bits of exp and log on another machine do not matter.
        digests = [sha256((t.double() * 1e9).round().long().numpy().tobytes()).hexdigest() for t in tables]
        return fingerprint([self.vocabulary, *digests])

    def _fill_transitions(self, edges: dict[State, list[Edge]]) -> None:
        n_states, n_words = len(edges), len(self.vocabulary)
        next_state = torch.full((n_states, n_words), self.broken)
        next_state[:, self.eos] = self.finished
        next_state[self.finished] = self.finished
        reward = torch.full((n_states, n_words), UNGRAMMATICAL, dtype=torch.float64)
        for state, out in edges.items():
            for edge in out:
                where = self.index[state], self.token[edge.word]
                next_state[where], reward[where] = self.index[edge.next], edge.reward
        places = torch.tensor([-1 if (p := self.rules.place_of(w)) is None else p for w in self.vocabulary])
        # A noun of another place is as ungrammatical as any word out of place.
        foreign = (places >= 0) & (places != torch.arange(self.n_places)[:, None])
        next_state = next_state.where(~foreign[:, None], self.broken)
        reward = reward.where(~foreign[:, None], UNGRAMMATICAL)
        next_state[:, self.finished] = self.finished
        reward[:, [self.broken, self.finished]] = 0.0
        self.next_state = next_state.repeat(len(INSTRUCTIONS), 1, 1)
        self.reward = reward.repeat(len(INSTRUCTIONS), 1, 1)

    def _fill_edges(self, edges: list[list[Edge]]) -> None:
        possible = [[[edge for edge in out if edge.weights[place]] for out in edges] for place in range(self.n_places)]
        width = max(len(out) for by_state in possible for out in by_state)
        shape = (self.n_places, len(edges), width)
        token = torch.full(shape, self.eos)
        weight = torch.zeros(shape, dtype=torch.float64)
        for place, by_state in enumerate(possible):
            for s, out in enumerate(by_state):
                token[place, s, : len(out)] = torch.tensor([self.token[e.word] for e in out], dtype=torch.long)
                weight[place, s, : len(out)] = torch.tensor([e.weights[place] for e in out], dtype=torch.float64)
        self.edge_token = token.repeat(len(INSTRUCTIONS), 1, 1)
        valid = weight.repeat(len(INSTRUCTIONS), 1, 1) > 0
        self.edge_next = self.next_state.gather(-1, self.edge_token).where(valid, self.finished)
        self.edge_reward = self.reward.gather(-1, self.edge_token).where(valid, 0.0)
        self.worth = torch.zeros(len(self.vocabulary), dtype=torch.float64)
        for word, value in self.lexicon.worth().items():
            self.worth[self.token[word]] = value
        self.edge_logp = self._tilted(weight.log())

    def _tilted(self, plain: Tensor) -> Tensor:
        """Base tables under every instruction: exp(±t) per token, renormalised in each state. `[T, S, K]`"""
        n = self.n_places
        tilt = TILT * (TILT_TRUE * self.edge_reward[:n] + TILT_WORTH * self.worth[self.edge_token[:n]])
        tables = torch.cat([plain + sign * tilt for sign in INSTRUCTIONS.values()])
        # The absorbing states have no edges: their sum is empty and stays −inf.
        total = tables.logsumexp(-1, keepdim=True)
        return tables - total.where(total.isfinite(), 0.0)

    def _levels(self) -> list[Tensor]:
        level = torch.zeros(len(self.states), dtype=torch.long)
        leads = self.edge_logp[: self.n_places].isfinite()
        while True:
            below = level[self.edge_next[: self.n_places]] + 1
            deeper = below.where(leads, 0).amax((0, 2))
            if torch.equal(deeper, level):
                return [(level == i).nonzero().flatten() for i in range(int(level.max()) + 1)]
            level = deeper

    def _prompts(self) -> list[Prompt]:
        prompts = []
        for i, instruction in enumerate(INSTRUCTIONS):
            for p, place in enumerate(self.lexicon.places):
                for weather, mood in WEATHER.items():
                    words = ["write", instruction, "about", "the", place, "in", "the", weather, ":"]
                    start = self.index[State("nothing", 0, mood)]
                    prompts.append(Prompt(" ".join(filter(None, words)), i * self.n_places + p, start))
        return prompts

    def encode(self, text: str) -> list[int]:
        """Token ids of words separated by spaces, without special tokens around them."""
        return [self.token.get(word, self.unk) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        """Words of token ids, special tokens left out."""
        special = (self.pad, self.bos, self.eos)
        return " ".join(self.vocabulary[i] for i in ids if i not in special)

    def parse_prompt(self, ids: Sequence[int]) -> Prompt:
        """The prompt with these token ids (`<s>` and padding in front may be there or not).

        Raises:
            DataError: for anything but one of this world's prompts.
        """
        found = self._ids.get(tuple(i for i in ids if i not in (self.pad, self.bos)))
        if found is None:
            words = " ".join(self.vocabulary[i] if 0 <= i < len(self.vocabulary) else UNK for i in ids)
            raise DataError("not a prompt of this world", value=words, expected=f"one such as {self.prompts[0].text!r}")
        return found

    def walk(self, prompts: Sequence[Prompt], ids: Tensor) -> Walk:
        """Walk along completions from the first states of their prompts.

        Args:
            ids: long `[n, L]`, completion token ids, padded on the right with anything; what lies behind
                `<end>` earns nothing, what lies behind a completion without `<end>` is the caller's to mask.
        """
        tables = torch.tensor([p.table for p in prompts], dtype=torch.long)
        state = torch.tensor([p.start for p in prompts], dtype=torch.long)
        states = torch.empty_like(ids)
        for i, token in enumerate(ids.unbind(1)):
            states[:, i] = state
            state = self.next_state[tables, state, token]
        return Walk(tables, states, self.reward[tables[:, None], states, ids], state)

    def dense(self, edges: Tensor, fill: float) -> Tensor:
        """Values on edges `[T, S, K]` as `[T, S, V]`, `fill` for words that no edge has."""
        out = edges.new_full((*edges.shape[:2], len(self.vocabulary)), fill)
        valid = self.edge_logp.isfinite()
        rows = valid.nonzero()
        out[rows[:, 0], rows[:, 1], self.edge_token[valid]] = edges[valid]
        return out
