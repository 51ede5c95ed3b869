"""The `init` stage: a model built from a config, with a tokenizer trained on the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from tokengrain.errors import ModelError, RecipeError
from tokengrain.recipe.specs import ModelSpec, TokenizerSpec

PAD, EOS = "<pad>", "<eos>"
TEXT_COLUMNS = ("prompt", "chosen", "rejected", "completion", "text", "messages")


def check_config(values: dict[str, Any]) -> str | None:
    """What is wrong with the `config:` of a model built from scratch, or None."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from tokengrain.callables import nearest

    model_type = values["model_type"]
    if model_type not in CONFIG_MAPPING:
        near = nearest(str(model_type), list(CONFIG_MAPPING))
        return f"config.model_type: no architecture {model_type!r} in transformers{near}"
    cls = CONFIG_MAPPING[model_type]
    legal = {**cls().to_dict(), **dict.fromkeys(cls.attribute_map)}
    for key in values:
        if key not in legal:
            return f"config.{key}: unknown key of a {model_type} config{nearest(key, legal)}"
    try:
        cls(**{k: v for k, v in values.items() if k != "model_type"})
    except Exception as error:  # configs validate themselves with exceptions of many kinds
        return f"config: {' '.join(str(error).split())}"
    return None


def build(spec: ModelSpec, rows: Iterable[tuple[int, Any]], seed: int, folder: Path) -> None:
    """Write a new model and its tokenizer to `folder`.

    Args:
        spec: with `config`, and `tokenizer` (default: a BPE of 4,096 tokens).
        rows: what the tokenizer is trained on.
        seed: of the weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if isinstance(spec.tokenizer, str):
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(spec.tokenizer)
        except (OSError, ValueError) as error:
            raise ModelError(f"no tokenizer could be loaded from {spec.tokenizer}: {error}") from error
    else:
        tokenizer = train_tokenizer(spec.tokenizer or TokenizerSpec(), texts(rows))
    values = dict(spec.config or {})
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    model_type = values.pop("model_type")
    # Some architectures (qwen2) load any tokenizer as their own class, which adds tokens: count as it will be loaded.
    tokenizer.save_pretrained(folder)
    AutoConfig.for_model(model_type).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = AutoConfig.for_model(model_type, **{"vocab_size": len(tokenizer), "bos_token_id": None, **ids, **values})
    if config.vocab_size < len(tokenizer):
        raise RecipeError(
            f"model.config.vocab_size is {config.vocab_size}; expected at least {len(tokenizer)}, the "
            "tokens of the tokenizer (leave it out to get just that)"
        )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    if spec.dtype != "auto":
        model = model.to(getattr(torch, spec.dtype))
    model.save_pretrained(folder)


def train_tokenizer(spec: TokenizerSpec, corpus: Iterable[str]) -> Any:
    """A byte-level BPE trained on `corpus`, or one without merges (every byte a token)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocab_size if spec.type == "bpe" else len(alphabet) + 2,
        special_tokens=[PAD, EOS],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus if spec.type == "bpe" else (), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def texts(rows: Iterable[tuple[int, Any]]) -> Iterator[str]:
    """The texts of the rows, whatever their format."""
    for _, fields in rows:
        for name in TEXT_COLUMNS:
            value = fields.get(name) if isinstance(fields, dict) else None
            if isinstance(value, str):
                yield value
            elif isinstance(value, list):
                yield from (m["content"] for m in value if isinstance(m, dict) and isinstance(m.get("content"), str))
