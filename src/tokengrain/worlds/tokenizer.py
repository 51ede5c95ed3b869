"""What the worlds' tokenizers share: special tokens, and how transformers takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<s>", "<end>"


def fast_tokenizer(core: Any, *, positions: int, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of the library `tokenizers` for transformers; it puts `<s>` in front and never appends `<end>`.

    Args:
        positions: of the model.
        special: other special tokens, as transformers names them (`unk_token`).
    """
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=positions,
        **special,
    )
