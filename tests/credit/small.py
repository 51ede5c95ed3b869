"""A word-level tokenizer, a tiny llama and a few pairs."""

from __future__ import annotations

import os

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tokengrain.batch import Completion, Sample, TokenBatch

os.environ.setdefault("HF_HUB_OFFLINE", "1")


WORDS = "write kindly rudely about the sea in sun : was calm cruel and deep not . better worse user revise"
CHAT = "{% for m in messages %}user : {{ m['content'] }}{% endfor %}{% if add_generation_prompt %} . {% endif %}"


def tokenizer(*, bos: bool = True, eos: bool = False, chat: bool = False) -> PreTrainedTokenizerFast:
    vocabulary = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *WORDS.split()])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.chat_template = CHAT if chat else None
    return made


def llama(seed: int = 0, positions: int = 128) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS.split()) + 3,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=positions,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).double().eval()


def pairs(tok: PreTrainedTokenizerFast, *, raw: bool = True, holes: bool = False) -> TokenBatch:
    texts = [
        ("write about the sea in the sun :", "the sea was calm and deep .", "the sun was cruel ."),
        ("write about the sun :", "the sun was not cruel .", "the sea was not calm and not deep ."),
    ]
    samples = []
    for row, (prompt, *sides) in enumerate(texts):
        completions = []
        for side in sides:
            ids = [*tok(side, add_special_tokens=False)["input_ids"], tok.eos_token_id]
            counted = [i != 1 for i in range(len(ids))] if holes else None
            completions.append(Completion(ids, counted))
        samples.append(
            Sample(tok(prompt)["input_ids"], completions, row=f"r{row}", raw={"prompt": prompt} if raw else {})
        )
    return TokenBatch.from_samples(samples)
