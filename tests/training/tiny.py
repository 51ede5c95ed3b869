"""Small models, samples and settings that the training tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.training.config import PreferenceConfig
from tokengrain.training.trainer import PreferenceTrainer

VOCABULARY = 97


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> LlamaForCausalLM:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        **overrides,
    }
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(dtype)
    torch.set_rng_state(state)
    return model


def make_samples(n: int, seed: int = 0, *, completions: int = 2, columns: tuple[str, ...] = ()) -> list[Sample]:
    """Random rows of unequal lengths; `columns` are filled with random per-token numbers."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()

    samples = []
    for row in range(n):
        made = []
        for _ in range(completions):
            tokens = ids(2, 11)
            values = {c: (torch.rand(len(tokens), generator=generator) - 0.5).tolist() for c in columns}
            made.append(Completion(tokens, columns=values))
        samples.append(Sample(ids(3, 13), made, row=row))
    return samples


def tiny_config(output_dir: Path | str, **overrides: Any) -> PreferenceConfig:
    settings = {
        "use_cpu": True,
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 3,
        **overrides,
    }
    return PreferenceConfig(str(output_dir), **settings)


def make_trainer(
    output_dir: Path | str, samples: list[Sample], *, model: Any = None, **options: Any
) -> PreferenceTrainer:
    """A trainer; options that `PreferenceTrainer` does not take go to the config."""
    names = (
        "objective",
        "credit",
        "credit_as",
        "teacher",
        "reference",
        "eval_dataset",
        "peft_config",
        "processing_class",
        "callbacks",
    )
    own = {name: options.pop(name) for name in names if name in options}
    return PreferenceTrainer(
        model if model is not None else tiny_llama(),
        tiny_config(output_dir, **options),
        train_dataset=samples,
        **own,
    )


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def plain_logps(model: torch.nn.Module, batch: TokenBatch) -> list[torch.Tensor]:
    """Log-probabilities of every completion, one forward pass each, the way a textbook would."""
    out = []
    for index in range(batch.n_completions):
        prompt, completion = batch.prompt(int(batch.group[index])), batch.completion(index)
        ids = torch.cat([prompt, completion])[None]
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        out.append(logits.log_softmax(-1).gather(1, completion[:, None])[:, 0])
    return out
