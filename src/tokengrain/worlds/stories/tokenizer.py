"""The word-level tokenizer of the world `stories`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokengrain.worlds.stories.grammar import Grammar
from tokengrain.worlds.stories.lexicon import BOS, EOS, PAD, UNK

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def build_tokenizer(grammar: Grammar) -> PreTrainedTokenizerFast:
    """A fast tokenizer whose ids are the grammar's.

    It puts `<s>` in front when asked for special tokens and never appends `<end>`. Words and punctuation are
    cut apart whether or not a space stands between them, so that prompt and completion may be joined either
    way.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(dict(grammar.token), unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, grammar.bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=MODEL_POSITIONS,
    )


MODEL_POSITIONS = 128
"""Positions of the base model; the longest prompt and completion together take 51."""
