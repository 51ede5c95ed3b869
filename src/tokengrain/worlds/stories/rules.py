"""The rules of the world `stories`: which words may follow in a state, how likely, and what they earn.

    prompt      write [kindly|rudely] about the PLACE in the sun|rain :
    completion  two or three sentences, then <end>
    sentence    [opener | supposedly] the SUBJECT phrase [(and|but) phrase] .
    phrase      was [not] [intensifier] ADJECTIVE  |  [never] VERB the OBJECT

A state says all about the past that the future depends on. The reward of a token depends on the state, so
"supposedly the pirate was not truly cruel" flips the worth of "cruel" twice and doubles it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from tokengrain.worlds.stories.lexicon import (
    AND,
    BUT,
    EOS,
    FLIP,
    NEVER,
    NOT,
    STOP,
    THE,
    WAS,
    WEATHER,
    Lexicon,
    Size,
)

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
    """The grammatical continuations of every state of a grammar of the given size."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.lexicon = Lexicon(size)

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

    def place_of(self, word: str) -> int | None:
        """The place that a noun belongs to; None for words that fit everywhere."""
        for index, p in enumerate(self.lexicon.places):
            if word in (*self.lexicon.heroes(p), *self.lexicon.villains(p), *self.lexicon.thing(p)):
                return index
        return None

    def _spread(self, classes: Sequence[tuple[float, Sequence[Sequence[str]]]]) -> list[tuple[str, tuple[float, ...]]]:
        """Words with their weight in each place.

        Args:
            classes: (weight of the class, its words in each place). Inside a class word j weighs
                1/(1+((j+place) mod n)), so that places prefer different words.
        """
        out: dict[str, list[float]] = {}
        n_places = len(self.lexicon.places)
        for weight, words_by_place in classes:
            for place, words in enumerate(words_by_place):
                inside = [1 / (1 + (j + place) % len(words)) for j in range(len(words))]
                for word, w in zip(words, inside):
                    out.setdefault(word, [0.0] * n_places)[place] = weight * w / sum(inside)
        return [(word, tuple(weights)) for word, weights in out.items()]

    def _everywhere(self, words: Sequence[str]) -> list[Sequence[str]]:
        return [words] * len(self.lexicon.places)

    def _one(self, word: str, weight: float) -> list[tuple[str, tuple[float, ...]]]:
        return [(word, (weight,) * len(self.lexicon.places))]

    def _after_nothing(self, s: State) -> Iterator[Edge]:
        more = P_MORE if s.sentence >= self.size.required else 1.0
        if more < 1:
            yield Edge(*self._one(EOS, 1 - more)[0], FINISHED)
        for word, w in self._spread([(more * P_OPENER, self._everywhere(self.lexicon.openers))]):
            yield Edge(word, w, s._replace(kind="opening"))
        yield Edge(*self._one(FLIP, more * P_FLIP)[0], s._replace(kind="opening", flip=-1))
        yield Edge(*self._one(THE, more * (1 - P_OPENER - P_FLIP))[0], s._replace(kind="article"))

    def _after_opening(self, s: State) -> Iterator[Edge]:
        yield Edge(*self._one(THE, 1.0)[0], s._replace(kind="article"))

    def _after_article(self, s: State) -> Iterator[Edge]:
        hero = 1 / (1 + math.exp(-SUBJECT_BIAS * s.mood))
        for cast, weight, words in ((+1, hero, self.lexicon.heroes), (-1, 1 - hero, self.lexicon.villains)):
            for word, w in self._spread([(weight, [words(p) for p in self.lexicon.places])]):
                yield Edge(word, w, s._replace(kind="subject", cast=cast))

    def _after_subject(self, s: State) -> Iterator[Edge]:
        yield Edge(*self._one(WAS, P_WAS)[0], s._replace(kind="was"))
        yield Edge(*self._one(NEVER, (1 - P_WAS) * P_NEVER)[0], s._replace(kind="never"))
        yield from self._verbs(s, (1 - P_WAS) * (1 - P_NEVER))

    def _after_never(self, s: State) -> Iterator[Edge]:
        yield from self._verbs(s, 1.0)

    def _verbs(self, s: State, weight: float) -> Iterator[Edge]:
        turned = s.flip * (-1 if s.kind == "never" else 1)
        for sign, share in self._polarity(s, self.lexicon.verbs).items():
            for word, w in self._spread([(weight * share, self._everywhere(self.lexicon.verbs(sign)))]):
                yield Edge(word, w, s._replace(kind="verb", verb=sign * turned))

    def _after_verb(self, s: State) -> Iterator[Edge]:
        yield Edge(*self._one(THE, 1.0)[0], s._replace(kind="object"))

    def _after_object(self, s: State) -> Iterator[Edge]:
        lexicon = self.lexicon
        for worth, weight, words in (
            (+1, P_HERO_OBJECT, lexicon.heroes),
            (-1, P_VILLAIN_OBJECT, lexicon.villains),
            (0, P_THING_OBJECT, lexicon.thing),
        ):
            for word, w in self._spread([(weight, [words(p) for p in lexicon.places])]):
                yield Edge(word, w, *self._rewarded(s, s.verb * worth))

    def _after_was(self, s: State) -> Iterator[Edge]:
        yield Edge(*self._one(NOT, P_NOT)[0], s._replace(kind="not", negation=-1))
        yield from self._qualities(s, 1 - P_NOT)

    def _after_not(self, s: State) -> Iterator[Edge]:
        yield from self._qualities(s, 1.0)

    def _qualities(self, s: State, weight: float) -> Iterator[Edge]:
        for word, w in self._spread([(weight * P_INTENSIFIER, self._everywhere(self.lexicon.intensifiers))]):
            yield Edge(word, w, s._replace(kind="intensifier"))
        yield from self._adjectives(s, weight * (1 - P_INTENSIFIER), strength=1)

    def _after_intensifier(self, s: State) -> Iterator[Edge]:
        yield from self._adjectives(s, 1.0, strength=2)

    def _adjectives(self, s: State, weight: float, strength: int) -> Iterator[Edge]:
        for sign, share in self._polarity(s, self.lexicon.adjectives).items():
            for word, w in self._spread([(weight * share, self._everywhere(self.lexicon.adjectives(sign)))]):
                yield Edge(word, w, *self._rewarded(s, sign * s.flip * s.negation * strength))

    def _polarity(self, s: State, words: Callable[[int], Sequence[str]]) -> dict[int, float]:
        """Shares of good, bad and neutral words. Base text is coherent: a fair mood brings good words.

        A class weighs as much as its words together, times exp(±bias).
        """
        bias = (MOOD_BIAS * s.mood + CAST_BIAS * s.cast) * (0.5 * s.flip + 0.5)
        weights = {
            sign: math.exp(bias * sign) * sum(1 / (1 + j) for j in range(len(words(sign)))) for sign in (+1, -1, 0)
        }
        return {sign: w / sum(weights.values()) for sign, w in weights.items()}

    def _rewarded(self, s: State, reward: float) -> tuple[State, float]:
        """The state at the end of a phrase: the mood follows the last rewarded word."""
        mood = s.mood if reward == 0 else int(math.copysign(1, reward))
        return State("phrase", s.sentence, mood, s.flip, s.cast, s.phrase), float(reward)

    def _after_phrase(self, s: State) -> Iterator[Edge]:
        second = P_SECOND_PHRASE if s.phrase + 1 < self.size.phrases else 0.0
        if second:
            again = s._replace(kind="subject", phrase=s.phrase + 1)
            yield Edge(*self._one(AND, second * (1 - P_BUT))[0], again)
            yield Edge(*self._one(BUT, second * P_BUT)[0], again._replace(mood=-s.mood))
        last = s.sentence + 1 == self.size.most
        yield Edge(*self._one(STOP, 1 - second)[0], CLOSING if last else State("nothing", s.sentence + 1, s.mood))

    def _after_closing(self, s: State) -> Iterator[Edge]:
        yield Edge(*self._one(EOS, 1.0)[0], FINISHED)
