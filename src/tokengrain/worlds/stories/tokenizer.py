"""The word-level tokenizer of the world `stories`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokengrain.worlds.stories.grammar import Grammar
from tokengrain.worlds.stories.lexicon import UNK
from tokengrain.worlds.tokenizer import fast_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def build_tokenizer(grammar: Grammar) -> PreTrainedTokenizerFast:
    """A fast tokenizer whose ids are the grammar's.

    It puts `<s>` in front when asked for special tokens and never appends `<end>`. Words and punctuation are
    cut apart whether or not a space stands between them, so that prompt and completion may be joined either
    way.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel(dict(grammar.token), unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return fast_tokenizer(core, positions=MODEL_POSITIONS, unk_token=UNK)


MODEL_POSITIONS = 128
"""Positions of the base model; the longest prompt and completion together take 51."""
