"""What is measured: a model built from a config, and random preference pairs of given lengths."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tokengrain.batch import Completion, Sample
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.dataset import prepare_pairs
from tokengrain.data.rows import load_rows


@dataclass(frozen=True)
class Setting:
    """One benchmark setting. Lengths are in tokens; ranges are inclusive and sampled uniformly."""

    method: str = "dpo"
    pairs: int = 8
    prompt: tuple[int, int] = (128, 384)
    completion: tuple[int, int] = (32, 128)
    vocabulary: int = 32_000
    hidden: int = 384
    layers: int = 6
    heads: int = 6
    intermediate: int = 1024
    device: str = "cpu"
    precision: str = "float32"
    attention: str = "sdpa"  # of our step; the peers always use sdpa
    seed: int = 0
    share: float = 1.0  # of the tokens: selected ones (sepo), ones in spans (rrpo)
    weights: str = ""  # folder of a model instead of new weights; its vocabulary must be given, or data
    data: str = ""  # file of pairs of text for the tokenizer of `weights`, instead of random tokens
    lora: int = 0  # rank of the adapters that are trained; 0: all weights

    @property
    def dtype(self) -> torch.dtype:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.precision]

    def label(self) -> str:
        shape = f"vocabulary {self.vocabulary:,}, hidden {self.hidden}, {self.layers} layers"
        lengths = f"prompts {_range(self.prompt)}, completions {_range(self.completion)}"
        return (
            f"{self.method}, {self.pairs} pairs{' of ' + Path(self.data).name.partition('.')[0] if self.data else ''}, "
            f"{'' if self.data else lengths + ', '}{Path(self.weights).name if self.weights else shape}, "
            f"{f'LoRA of rank {self.lora}, ' if self.lora else ''}{self.precision}, {self.device}"
            + ("" if self.attention == "sdpa" else f", ours with {self.attention}")
            + ("" if self.share == 1.0 else f", {self.share:.0%} of the tokens")
        )

    def with_(self, **changes: object) -> Setting:
        return replace(self, **changes)


def _range(bounds: tuple[int, int]) -> str:
    return str(bounds[0]) if bounds[0] == bounds[1] else f"{bounds[0]}–{bounds[1]}"


def build_model(setting: Setting, attention: str = "sdpa") -> torch.nn.Module:
    """The model of `weights`, or a llama with tied embeddings and random weights, the same for the same seed."""
    if setting.weights:
        how = {"dtype": setting.dtype, "attn_implementation": attention}
        return AutoModelForCausalLM.from_pretrained(setting.weights, **how).to(setting.device)
    config = LlamaConfig(
        vocab_size=setting.vocabulary,
        hidden_size=setting.hidden,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        intermediate_size=setting.intermediate,
        max_position_embeddings=max(2048, setting.prompt[1] + setting.completion[1]),
        tie_word_embeddings=True,
        attn_implementation=attention,
    )
    torch.manual_seed(setting.seed)
    return LlamaForCausalLM(config).to(setting.device, setting.dtype)


def build_policy(setting: Setting, attention: str = "sdpa") -> torch.nn.Module:
    """The model that is trained, with adapters on all of its linear layers if the setting has some."""
    model = build_model(setting, attention)
    if not setting.lora:
        return model
    torch.manual_seed(setting.seed)
    return get_peft_model(model, lora_config(setting))


def lora_config(setting: Setting) -> LoraConfig:
    return LoraConfig(r=setting.lora, lora_alpha=2 * setting.lora, target_modules="all-linear", task_type="CAUSAL_LM")


LONGEST = 1200  # characters of a dialogue


def build_samples(setting: Setting) -> list[Sample]:
    """Random pairs; the same for the same seed. Of a file, its dialogues of up to 1,200 characters, as chats."""
    rng = random.Random(setting.seed)
    if setting.data:
        rows = [row for _, row in load_rows(setting.data) if max(map(len, (row["chosen"], row["rejected"]))) <= LONGEST]
        tokenizer = AutoTokenizer.from_pretrained(setting.weights)
        drawn, how = rng.sample(rows, 2 * setting.pairs), TokenizeConfig(chat=True, on_invalid="skip")
        return list(prepare_pairs(drawn, tokenizer, how))[: setting.pairs]

    def tokens(bounds: tuple[int, int]) -> list[int]:
        return [rng.randrange(3, setting.vocabulary) for _ in range(rng.randint(*bounds))]

    def completion() -> Completion:
        ids = tokens(setting.completion)
        taken = set(random.Random(len(ids)).sample(range(len(ids)), max(1, int(setting.share * len(ids)))))
        marks = [float(i in taken) for i in range(len(ids))]
        return Completion(ids, columns={"selected": marks, "spans": marks})

    return [Sample(tokens(setting.prompt), [completion() for _ in range(2)], row=row) for row in range(setting.pairs)]


def word_tokenizer(vocabulary: int) -> object:
    """A tokenizer that TRL's constructor accepts; the rows are token ids already."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
