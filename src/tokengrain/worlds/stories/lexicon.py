"""The words of the world `stories` and how many of them a grammar uses."""

from __future__ import annotations

from dataclasses import dataclass

from tokengrain.worlds.tokenizer import BOS, EOS, PAD

UNK = "<unk>"
SPECIAL = (PAD, BOS, EOS, UNK)
WEATHER = {"sun": +1, "rain": -1}
"""Weather word of the prompt and the mood that a story starts in."""
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
    """How large a grammar is. The smaller ones exist so that all completions can be enumerated.

    Args:
        name: how an address names it (`world://stories?size=NAME`).
        places: how many places there are.
        words: the most words in a class of nouns, adjectives, verbs, intensifiers or openers.
        required: sentences that every completion has.
        most: sentences that a completion can have.
        phrases: the most verb phrases in a sentence.
    """

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


@dataclass(frozen=True)
class Lexicon:
    """The words of a grammar of the given size, by class."""

    size: Size

    @property
    def places(self) -> tuple[str, ...]:
        return tuple(CAST)[: self.size.places]

    def heroes(self, place: str) -> tuple[str, ...]:
        return CAST[place][0][: self.size.words]

    def villains(self, place: str) -> tuple[str, ...]:
        return CAST[place][1][: self.size.words]

    def thing(self, place: str) -> tuple[str, ...]:
        return (CAST[place][2],)

    def adjectives(self, sign: int) -> tuple[str, ...]:
        return ADJECTIVES[sign][: self.size.words]

    def verbs(self, sign: int) -> tuple[str, ...]:
        return VERBS[sign][: self.size.words]

    @property
    def intensifiers(self) -> tuple[str, ...]:
        return INTENSIFIERS[: self.size.words]

    @property
    def openers(self) -> tuple[str, ...]:
        return OPENERS[: self.size.words]

    def vocabulary(self) -> list[str]:
        """All tokens, special ones first; a token's id is its place in this list."""
        nouns = [w for p in self.places for w in (*self.heroes(p), *self.villains(p), *self.thing(p))]
        qualities = [w for sign in (+1, -1, 0) for w in (*self.adjectives(sign), *self.verbs(sign))]
        function_words = [*self.intensifiers, *self.openers, FLIP, WAS, NOT, NEVER, AND, BUT, THE, STOP]
        return [*SPECIAL, *PROMPT_WORDS, *self.places, *nouns, *qualities, *function_words]

    def worth(self) -> dict[str, int]:
        """What a verb or adjective looks worth without its context: +1 or −1; other words are worth 0."""
        worth: dict[str, int] = {}
        for sign in (+1, -1):
            worth |= dict.fromkeys((*self.adjectives(sign), *self.verbs(sign)), sign)
        return worth
