"""The tokenizer of the worlds `arithmetic` and `revision`: a token for each character, or for a word of filler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokengrain.worlds.arithmetic.problems import BOS, EOS, PAD

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKEN = r" [a-z]{2,}|."
"""What a token looks like."""


def build_tokenizer(vocabulary: Sequence[str], positions: int) -> PreTrainedTokenizerFast:
    """A fast tokenizer whose ids are places in `vocabulary`. It puts `<s>` in front and never appends `<end>`.

    A token is a character, or a space with at least two letters. What is unknown becomes `<pad>`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {symbol: i for i, symbol in enumerate(vocabulary)}
    core = Tokenizer(models.WordLevel(ids, unk_token=PAD))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), behavior="isolated")
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=positions,
    )
