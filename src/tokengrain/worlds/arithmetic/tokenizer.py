"""The tokenizer of the worlds `arithmetic` and `revision`: a token for each character, or for a word of filler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokengrain.worlds.tokenizer import PAD, fast_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKEN = r" [a-z]{2,}|."
"""What a token looks like."""


def build_tokenizer(vocabulary: Sequence[str], positions: int) -> PreTrainedTokenizerFast:
    """A fast tokenizer whose ids are places in `vocabulary`. It puts `<s>` in front and never appends `<end>`.

    A token is a character, or a space with at least two letters. What is unknown becomes `<pad>`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    ids = {symbol: i for i, symbol in enumerate(vocabulary)}
    core = Tokenizer(models.WordLevel(ids, unk_token=PAD))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), behavior="isolated")
    core.decoder = decoders.Fuse()
    return fast_tokenizer(core, positions=positions)
