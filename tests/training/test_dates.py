"""A chat template that writes the date: a run that is resumed later sees the date of its start."""

from datetime import datetime
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from tests.data.tokenizers import CHATML, gpt2_like
from tokengrain.data.dataset import prepare_pairs
from tokengrain.errors import RunError
from tokengrain.training.config import PreferenceConfig
from tokengrain.training.rollout import PromptDataset
from tokengrain.training.trainer import PreferenceTrainer

# Microseconds, so that no two runs begin alike.
TEMPLATE = "{{ strftime_now('%d %b %Y %H:%M:%S.%f') }}\n" + CHATML


def user(text):
    return [{"role": "user", "content": text}]


def row(number):
    answers = ([{"role": "assistant", "content": text}] for text in ("It is blue.", f"It is {number} black."))
    return dict(zip(("prompt", "chosen", "rejected"), (user(f"the sky {number}?"), *answers)))


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


def trainer(folder: Path, rows, **kwargs):
    tokenizer = gpt2_like(TEMPLATE)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **sizes))
    args = PreferenceConfig(str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=2, use_cpu=True)
    data = prepare_pairs(rows, tokenizer)
    held_out = prepare_pairs(rows[:2], tokenizer)
    return PreferenceTrainer(
        model, args, train_dataset=data, eval_dataset=held_out, processing_class=tokenizer, **kwargs
    )


def test_a_run_resumes_with_the_date_of_its_start(tmp_path):
    rows = [row(i) for i in range(4)]
    first = trainer(tmp_path, rows, callbacks=[Stop()])
    first.train()
    second = trainer(tmp_path, rows)
    assert second.train_dataset.fingerprint != first.train_dataset.fingerprint
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 4
    for part in ("train_dataset", "eval_dataset"):
        assert getattr(second, part).fingerprint == getattr(first, part).fingerprint
    with pytest.raises(RunError, match="belongs to another run: data was"):
        trainer(tmp_path, [row(9), *rows[1:]]).train(resume_from_checkpoint=True)


def test_swapped_pairs_and_prompts_too():
    tokenizer = gpt2_like(TEMPLATE)
    pairs, again = (prepare_pairs([row(0)], tokenizer).swapped() for _ in range(2))
    prompts, later = (PromptDataset.of([{"prompt": user("the sky?")}], tokenizer) for _ in range(2))
    for old, new in ((pairs, again), (prompts, later)):
        assert new.fingerprint != old.fingerprint
        new.set_time(old.clock.now)
        assert new.fingerprint == old.fingerprint
    assert later[0].ids == prompts[0].ids
    assert PromptDataset.of([{"prompt": user("the sky?")}], gpt2_like(CHATML)).clock is None
    assert datetime.now() > prompts.clock.now
