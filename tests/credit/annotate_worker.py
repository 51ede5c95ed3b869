"""A small annotation job that tests run in this process and, as `python -m`, in processes they kill."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from tokengrain.annotation import annotate
from tokengrain.batch import TokenBatch

TEXT = "the a sea sailor pirate was kind cruel helped hurt captain and but not very . then later"
WORDS = TEXT.split()
FINGERPRINTS = {
    "model": "aaaa",
    "tokenizer": "bbbb",
    "chat_template": "cccc",
    "data": "dddd",
    "source": "eeee",
    "tokenize": "ffff",
}


def make_rows(count: int = 40) -> list[dict[str, object]]:
    """Rows of different lengths with extra columns: a number, a list, a text that is not always there."""
    generator = torch.Generator().manual_seed(0)

    def text(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator).tolist())

    rows: list[dict[str, object]] = []
    for i in range(count):
        row = {"id": i, "prompt": text(2, 6), "chosen": f" {text(3, 12)}", "rejected": f" {text(12, 20)}"}
        rows.append(row | {"tags": ["x"] * (i % 3), "score": i / 7} | ({"note": "odd"} if i % 2 else {}))
    return rows


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


class PlainLlama:
    """Log-probabilities of a tiny random llama, one completion at a time."""

    name = "plain"

    def __init__(self, seconds: float = 0.0) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(WORDS) + 3,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
        self.model, self.seconds, self.tokens = LlamaForCausalLM(config).eval(), seconds, 0

    def __call__(self, batch: TokenBatch) -> Tensor:
        time.sleep(self.seconds)
        self.tokens += batch.n_tokens
        parts = []
        for c, group in enumerate(batch.group.tolist()):
            ids = torch.cat([batch.prompt(group), batch.completion(c)])[None]
            logps = self.model(ids).logits.log_softmax(-1)[0, :-1]
            parts.append(logps.gather(-1, ids[0, 1:, None])[-len(batch.completion(c)) :, 0])
        return torch.cat(parts)[batch.counted]


def run(output: str | Path, seconds: float = 0.0, **options: object) -> PlainLlama:
    """Annotate the rows into `output`; returns the source, which counts the tokens it was asked about."""
    torch.set_num_threads(1)
    source = PlainLlama(seconds)
    annotate(
        make_rows(),
        make_tokenizer(),
        None,
        {"token_rewards": source},
        None,
        output,
        options.pop("fingerprints", FINGERPRINTS),
        **{"shard_rows": 4, "max_tokens": 128, "progress": False} | options,
    )
    return source


if __name__ == "__main__":
    run(sys.argv[1], float(sys.argv[2]))
    if torch.distributed.is_initialized():
        # Its threads must not outlive the interpreter: "terminate called without an active exception".
        torch.distributed.destroy_process_group()
