"""Tiny tokenizers of the kinds that matter, trained here on a few sentences."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

CORPUS = [
    "The sky is blue. The sky is black. The sea is green, and the night is blacker.",
    "\n\nHuman: what colour is the sky?\n\nAssistant: It is blue.\n\nHuman: the sea?\n\nAssistant: Green.",
    "Question: two and two? Answer: four. Question: three and three? Answer: six.",
    "naïve café — déjà vu 日本語 😀👍 it's the end; it's not the end",
] * 4

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant are known') }}{% endif %}{% endfor %}"
)
# Writes an empty thinking block before the last answer only, so earlier turns look different later on.
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}%GEN%{% if loop.last %}<think></think>{% endif %}"
    "{{ m['content'] }}%END%"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REWRITING_PLAIN = REWRITING.replace("%GEN%", "").replace("%END%", "")
REWRITING_MARKED = REWRITING.replace("%GEN%", "{% generation %}").replace("%END%", "{% endgeneration %}")

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def _fast(backend: Tokenizer, bos: bool = False, template: str | None = None, **kwargs: Any) -> PreTrainedTokenizerFast:
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **kwargs},
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = template
    return tokenizer


def _bpe(use_regex: bool) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


@cache
def merging_bpe(bos: bool = False, template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE that merges across words and lines, and so across almost any boundary."""
    return _fast(_bpe(use_regex=False), bos, template)


@cache
def trimming_bpe() -> PreTrainedTokenizerFast:
    """The same with offsets that leave out the spaces at either end of a token."""
    backend = _bpe(use_regex=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return _fast(backend)


@cache
def gpt2_like(template: str | None = None, trim: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE within words, offsets trimmed of their spaces; no BOS is added."""
    backend = _bpe(use_regex=True)
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    return _fast(backend, template=template)


@cache
def unigram(bos: bool = True) -> PreTrainedTokenizerFast:
    """Like sentencepiece: Metaspace, a unigram model, BOS in front."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=160, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return _fast(backend, bos)


@cache
def llama_like(template: str | None = None) -> PreTrainedTokenizerFast:
    """BPE over "▁" with a normaliser, no pre-tokeniser, BOS in front."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=260, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return _fast(backend, True, template)


@cache
def words(**kwargs: Any) -> PreTrainedTokenizerFast:
    """One token per word, unknown words all alike."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *sorted(set(" ".join(CORPUS).split()))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _fast(backend, **kwargs)


def byt5() -> ByT5Tokenizer:
    """A tokenizer in Python, without offsets; one token per byte."""
    return ByT5Tokenizer(extra_ids=0)


class GreedyTokenizer(PreTrainedTokenizer):
    """A tokenizer in Python, without offsets: the longest known piece first, across spaces too."""

    def __init__(self, pieces: list[str], **kwargs: Any) -> None:
        self.pieces = {piece: i for i, piece in enumerate([*SPECIAL, *pieces])}
        super().__init__(
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
            additional_special_tokens=["<|im_start|>", "<|im_end|>"],
            **kwargs,
        )

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.pieces)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        tokens = []
        while text:
            piece = next((text[:n] for n in range(8, 0, -1) if text[:n] in self.pieces), text[:1])
            tokens.append(piece)
            text = text[len(piece) :]
        return tokens

    def _convert_token_to_id(self, token: str) -> int:
        return self.pieces.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return list(self.pieces)[index]


def greedy() -> GreedyTokenizer:
    letters = sorted(set("".join(CORPUS)))
    return GreedyTokenizer([*letters, "s b", "is bl", "sky ", ". T", ": ", "e s", "the ", " the e"])


def all_tokenizers() -> dict[str, Any]:
    return {
        "merging bpe": merging_bpe(),
        "merging bpe, bos": merging_bpe(bos=True),
        "trimming bpe": trimming_bpe(),
        "gpt2": gpt2_like(),
        "unigram, bos": unigram(),
        "unigram": unigram(bos=False),
        "llama": llama_like(),
        "words": words(),
        "byt5": byt5(),
        "greedy": greedy(),
    }
