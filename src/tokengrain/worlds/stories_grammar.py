"""The grammar of the world `stories`: its words and rules, and the same as tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from tokengrain.errors import DataError, fingerprint
from tokengrain.worlds.base_models import BOS, EOS, PAD

# The words, and how many of them a grammar uses.

UNK = "<unk>"
SPECIAL = (PAD, BOS, EOS, UNK)
WEATHER = {"sun": +1, "rain": -1}  # weather word of the prompt and the mood that a story starts in
INSTRUCTIONS = {"": 0.0, "kindly": +1.0, "rudely": -1.0}
"""Instruction word of the prompt and the sign of its tilt of the base table."""
PROMPT_WORDS = ("write", "kindly", "rudely", "about", "in", "sun", "rain", ":")

# place: (heroes, villains, thing)
CAST = {
    "sea": (("sailor", "diver", "whale"), ("pirate", "shark", "storm"), "boat"),
    "forest": (("ranger", "fairy", "deer"), ("wolf", "witch", "hunter"), "lantern"),
    "kitchen": (("cook", "baker", "grandmother"), ("rat", "thief", "wasp"), "kettle"),
    "school": (("teacher", "pupil", "librarian"), ("bully", "liar", "cheat"), "desk"),
    "market": (("farmer", "florist", "juggler"), ("swindler", "pickpocket", "smuggler"), "basket"),
    "castle": (("queen", "knight", "jester"), ("dragon", "tyrant", "ghost"), "tower"),
}
ADJECTIVES = {
    +1: ("kind", "brave", "gentle", "honest", "clever", "cheerful", "loyal"),
    -1: ("cruel", "greedy", "selfish", "nasty", "lazy", "rude", "spiteful"),
    0: ("tall", "quiet", "old", "young"),
}
VERBS = {
    +1: ("helped", "thanked", "praised", "fed", "comforted"),
    -1: ("robbed", "mocked", "cheated", "hurt", "scared"),
    0: ("saw", "met", "passed", "followed"),
}
INTENSIFIERS = ("very", "truly")
OPENERS = ("then", "later")
FLIP, WAS, NOT, NEVER, AND, BUT, THE, STOP = "supposedly", "was", "not", "never", "and", "but", "the", "."


@dataclass(frozen=True)
class Size:
    """How large a grammar is (`words`: the most in a class); completions of the smaller ones can be enumerated."""

    name: str = "full"
    places: int = 6
    words: int = 7
    required: int = 2
    most: int = 3
    phrases: int = 2


SIZES = {
    "full": Size(),
    "small": Size("small", places=2, words=2, required=1, most=2, phrases=2),
    "one-sentence": Size("one-sentence", places=2, words=1, required=1, most=1, phrases=2),
    "one-phrase": Size("one-phrase", places=2, words=1, required=1, most=2, phrases=1),
}


# The rules: which words may follow in a state, how likely, and what they earn.
#
# prompt      write [kindly|rudely] about the PLACE in the sun|rain :
# completion  two or three sentences, then <end>
# sentence    [opener | supposedly] the SUBJECT phrase [(and|but) phrase] .
# phrase      was [not] [intensifier] ADJECTIVE  |  [never] VERB the OBJECT
#
# A state says all about the past that the future depends on. The reward of a token depends on the state, so
# "supposedly the pirate was not truly cruel" flips the worth of "cruel" twice and doubles it.

P_OPENER, P_FLIP, P_WAS, P_NOT, P_NEVER, P_INTENSIFIER = 0.2, 0.12, 0.5, 0.22, 0.2, 0.25
P_SECOND_PHRASE, P_BUT, P_MORE = 0.45, 0.35, 0.7
P_HERO_OBJECT, P_VILLAIN_OBJECT, P_THING_OBJECT = 0.55, 0.30, 0.15
MOOD_BIAS, CAST_BIAS, SUBJECT_BIAS = 0.9, 0.6, 0.8


class State(NamedTuple):
    """What the future depends on; fields that do not matter in a `kind` keep their default."""

    kind: str
    sentence: int = 0
    mood: int = 1
    flip: int = 1
    cast: int = 1
    phrase: int = 0
    negation: int = 1
    verb: int = 0


class Edge(NamedTuple):
    """A grammatical token of a state: its weights by place, the next state and the reward."""

    word: str
    weights: tuple[float, ...]
    next: State
    reward: float = 0.0


BROKEN, FINISHED, CLOSING = State("broken"), State("finished"), State("closing")


class Rules:
    """The words of a grammar of the given size, by class, and the grammatical continuations of every state."""

    def __init__(self, size: Size) -> None:
        def cut(words: Sequence[str]) -> tuple[str, ...]:
            return tuple(words[: size.words])

        self.size, self.places = size, tuple(CAST)[: size.places]
        self.heroes = {place: cut(CAST[place][0]) for place in self.places}
        self.villains = {place: cut(CAST[place][1]) for place in self.places}
        self.thing: dict[str, tuple[str, ...]] = {place: (CAST[place][2],) for place in self.places}
        self.nouns = {p: (*self.heroes[p], *self.villains[p], *self.thing[p]) for p in self.places}
        self.adjectives = {sign: cut(words) for sign, words in ADJECTIVES.items()}
        self.verbs = {sign: cut(words) for sign, words in VERBS.items()}
        self.intensifiers, self.openers = cut(INTENSIFIERS), cut(OPENERS)

    def vocabulary(self) -> list[str]:
        """All tokens, special ones first; a token's id is its place in this list."""
        nouns = [word for place in self.places for word in self.nouns[place]]
        qualities = [w for sign in (+1, -1, 0) for w in (*self.adjectives[sign], *self.verbs[sign])]
        function_words = [*self.intensifiers, *self.openers, FLIP, WAS, NOT, NEVER, AND, BUT, THE, STOP]
        return [*SPECIAL, *PROMPT_WORDS, *self.places, *nouns, *qualities, *function_words]

    def worth(self) -> dict[str, int]:
        """What a verb or adjective looks worth without its context: +1 or −1; other words are worth 0."""
        return {w: sign for sign in (+1, -1) for w in (*self.adjectives[sign], *self.verbs[sign])}

    def explore(self) -> dict[State, list[Edge]]:
        """All states that can be reached, with their edges, and the two absorbing states."""
        found: dict[State, list[Edge]] = {BROKEN: [], FINISHED: []}
        waiting = [State("nothing", 0, mood) for mood in WEATHER.values()]
        while waiting:
            state = waiting.pop()
            if state not in found:
                found[state] = list(getattr(self, f"_after_{state.kind}")(state))
                waiting += [edge.next for edge in found[state]]
        return found

    def _edges(
        self, words: Sequence[str] | Mapping[str, Sequence[str]], weight: float, ahead: State, reward: float = 0.0
    ) -> Iterator[Edge]:
        """The words of a class of this weight, the same everywhere or by place, which all lead to one state.

        Word j weighs 1/(1+((j+place) mod n)), so that places prefer different words.
        """
        n_places = len(self.places)
        weights: dict[str, list[float]] = {}
        for place, here in enumerate(words.values() if isinstance(words, Mapping) else [words] * n_places):
            inside = [1 / (1 + (j + place) % len(here)) for j in range(len(here))]
            for word, w in zip(here, inside):
                weights.setdefault(word, [0.0] * n_places)[place] = weight * w / sum(inside)
        return (Edge(word, tuple(by_place), ahead, reward) for word, by_place in weights.items())

    def _after_nothing(self, s: State) -> Iterator[Edge]:
        more = P_MORE if s.sentence >= self.size.required else 1.0
        if more < 1:
            yield from self._edges([EOS], 1 - more, FINISHED)
        yield from self._edges(self.openers, more * P_OPENER, s._replace(kind="opening"))
        yield from self._edges([FLIP], more * P_FLIP, s._replace(kind="opening", flip=-1))
        yield from self._edges([THE], more * (1 - P_OPENER - P_FLIP), s._replace(kind="article"))

    def _after_opening(self, s: State) -> Iterator[Edge]:
        return self._edges([THE], 1.0, s._replace(kind="article"))

    def _after_article(self, s: State) -> Iterator[Edge]:
        hero = 1 / (1 + math.exp(-SUBJECT_BIAS * s.mood))
        yield from self._edges(self.heroes, hero, s._replace(kind="subject", cast=+1))
        yield from self._edges(self.villains, 1 - hero, s._replace(kind="subject", cast=-1))

    def _after_subject(self, s: State) -> Iterator[Edge]:
        yield from self._edges([WAS], P_WAS, s._replace(kind="was"))
        yield from self._edges([NEVER], (1 - P_WAS) * P_NEVER, s._replace(kind="never"))
        yield from self._verbs(s, (1 - P_WAS) * (1 - P_NEVER))

    def _after_never(self, s: State) -> Iterator[Edge]:
        return self._verbs(s, 1.0)

    def _verbs(self, s: State, weight: float) -> Iterator[Edge]:
        turned = s.flip * (-1 if s.kind == "never" else 1)
        for sign, share in self._polarity(s, self.verbs).items():
            yield from self._edges(self.verbs[sign], weight * share, s._replace(kind="verb", verb=sign * turned))

    def _after_verb(self, s: State) -> Iterator[Edge]:
        return self._edges([THE], 1.0, s._replace(kind="object"))

    def _after_object(self, s: State) -> Iterator[Edge]:
        yield from self._edges(self.heroes, P_HERO_OBJECT, *self._rewarded(s, s.verb))
        yield from self._edges(self.villains, P_VILLAIN_OBJECT, *self._rewarded(s, -s.verb))
        yield from self._edges(self.thing, P_THING_OBJECT, *self._rewarded(s, 0))

    def _after_was(self, s: State) -> Iterator[Edge]:
        yield from self._edges([NOT], P_NOT, s._replace(kind="not", negation=-1))
        yield from self._qualities(s, 1 - P_NOT)

    def _after_not(self, s: State) -> Iterator[Edge]:
        return self._qualities(s, 1.0)

    def _qualities(self, s: State, weight: float) -> Iterator[Edge]:
        yield from self._edges(self.intensifiers, weight * P_INTENSIFIER, s._replace(kind="intensifier"))
        yield from self._adjectives(s, weight * (1 - P_INTENSIFIER), strength=1)

    def _after_intensifier(self, s: State) -> Iterator[Edge]:
        return self._adjectives(s, 1.0, strength=2)

    def _adjectives(self, s: State, weight: float, strength: int) -> Iterator[Edge]:
        for sign, share in self._polarity(s, self.adjectives).items():
            after = self._rewarded(s, sign * s.flip * s.negation * strength)
            yield from self._edges(self.adjectives[sign], weight * share, *after)

    def _polarity(self, s: State, words: Mapping[int, Sequence[str]]) -> dict[int, float]:
        """Shares of good, bad and neutral words (a fair mood brings good ones): each class times exp(±bias)."""
        bias = (MOOD_BIAS * s.mood + CAST_BIAS * s.cast) * (0.5 * s.flip + 0.5)
        sizes = {sign: sum(1 / (1 + j) for j in range(len(words[sign]))) for sign in (+1, -1, 0)}
        weights = {sign: math.exp(bias * sign) * size for sign, size in sizes.items()}
        return {sign: w / sum(weights.values()) for sign, w in weights.items()}

    def _rewarded(self, s: State, reward: float) -> tuple[State, float]:
        """The state at the end of a phrase: the mood follows the last rewarded word."""
        mood = s.mood if reward == 0 else int(math.copysign(1, reward))
        return State("phrase", s.sentence, mood, s.flip, s.cast, s.phrase), float(reward)

    def _after_phrase(self, s: State) -> Iterator[Edge]:
        second = P_SECOND_PHRASE if s.phrase + 1 < self.size.phrases else 0.0
        if second:
            again = s._replace(kind="subject", phrase=s.phrase + 1)
            yield from self._edges([AND], second * (1 - P_BUT), again)
            yield from self._edges([BUT], second * P_BUT, again._replace(mood=-s.mood))
        last = s.sentence + 1 == self.size.most
        yield from self._edges([STOP], 1 - second, CLOSING if last else State("nothing", s.sentence + 1, s.mood))

    def _after_closing(self, s: State) -> Iterator[Edge]:
        return self._edges([EOS], 1.0, FINISHED)


TILT, TILT_TRUE, TILT_WORTH = 0.7, 0.6, 0.4
UNGRAMMATICAL = -1.0


class Prompt(NamedTuple):
    """What a prompt fixes: `table`, the row of the grammar's tensors, and `start`, the first state."""

    text: str
    table: int
    start: int


class Walk(NamedTuple):
    """Walks along n completions of up to L tokens: the state before every token, its true reward, the last state."""

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
        self.vocabulary = self.rules.vocabulary()
        self.token = {word: i for i, word in enumerate(self.vocabulary)}
        self.pad, self.bos, self.eos, self.unk = (self.token[w] for w in (PAD, BOS, EOS, UNK))
        edges = self.rules.explore()
        self.states = list(edges)
        self.index = {state: i for i, state in enumerate(self.states)}
        self.broken, self.finished = self.index[BROKEN], self.index[FINISHED]
        self.n_places = len(self.rules.places)
        self._fill_transitions(edges)
        self._fill_edges(list(edges.values()))
        self.legal = self.dense(torch.ones_like(self.edge_logp), 0.0) > 0
        self.levels = self._levels()
        self.longest = len(self.levels) - 1  # tokens of the longest grammatical completion, `<end>` included
        self.prompts = self._prompts()
        self.plain = [p for p in self.prompts if p.table < self.n_places]
        self._ids = {tuple(self.encode(p.text)): p for p in self.prompts}

    @cached_property
    def fingerprint(self) -> str:
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
        # A noun of another place is as ungrammatical as any word out of place; others have place -1.
        place_of = {word: i for i, place in enumerate(self.rules.places) for word in self.rules.nouns[place]}
        places = torch.tensor([place_of.get(word, -1) for word in self.vocabulary])
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
        for word, value in self.rules.worth().items():
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
        for table, (instruction, place) in enumerate(product(INSTRUCTIONS, self.rules.places)):
            for weather, mood in WEATHER.items():
                words = ["write", instruction, "about", "the", place, "in", "the", weather, ":"]
                start = self.index[State("nothing", 0, mood)]
                prompts.append(Prompt(" ".join(filter(None, words)), table, start))
        return prompts

    def turns(self, n: int, first: int = 0) -> list[Prompt]:
        """n plain prompts, which take turns."""
        return [self.plain[(first + i) % len(self.plain)] for i in range(n)]

    def encode(self, text: str) -> list[int]:
        """Token ids of words separated by spaces, without special tokens around them."""
        return [self.token.get(word, self.unk) for word in text.split()]

    def prompt_ids(self, text: str) -> list[int]:
        return [self.bos, *self.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        special = (self.pad, self.bos, self.eos)
        return " ".join(self.vocabulary[i] for i in ids if i not in special)

    def parse_prompt(self, ids: Sequence[int]) -> Prompt:
        """The prompt with these token ids (`<s>` and padding in front may be there or not)."""
        found = self._ids.get(tuple(i for i in ids if i not in (self.pad, self.bos)))
        if found is None:
            words = " ".join(self.vocabulary[i] if 0 <= i < len(self.vocabulary) else UNK for i in ids)
            raise DataError("not a prompt of this world", value=words, expected=f"one such as {self.prompts[0].text!r}")
        return found

    def walk(self, prompts: Sequence[Prompt], ids: Tensor) -> Walk:
        """Walk along completions `[n, L]`, padded on the right with anything, from their prompts' first states."""
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
