"""A chat template that writes the date: a run that is resumed later sees the date of its start."""

import json
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from tests.data.tokenizers import CHATML, gpt2_like
from tests.test_stages import LLAMA
from tokengrain.data import tokens
from tokengrain.data.dataset import prepare_pairs
from tokengrain.data.rows import load_rows
from tokengrain.errors import RunError
from tokengrain.run import folder
from tokengrain.run.build import RunModels
from tokengrain.run.load import make_recipe
from tokengrain.run.runner import evaluate_run, run_recipe
from tokengrain.run.trained import Train
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


def trainer(folder: Path, rows, kind=PreferenceTrainer, rows_held_out=2, **kwargs):
    tokenizer = gpt2_like(TEMPLATE)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **sizes))
    args = PreferenceConfig(str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=2, use_cpu=True)
    data = prepare_pairs(rows, tokenizer)
    held_out = None if rows_held_out is None else prepare_pairs(rows[:rows_held_out], tokenizer)
    return kind(model, args, train_dataset=data, eval_dataset=held_out, processing_class=tokenizer, **kwargs)


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


def test_credit_by_contrastive_prompting_too(tmp_path):
    torch.manual_seed(0)
    tokenizer = gpt2_like(TEMPLATE)
    sizes = {name: size for name, size in LLAMA.items() if name != "model_type"}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    stages = {"train": {"kind": "train", "objective": {"name": "dpo"}}}
    values = {"method": "own", "model": str(tmp_path), "data": "x.jsonl", "output_dir": "x", "stages": stages}
    recipe, state, seen = make_recipe(values), SimpleNamespace(device=torch.device("cpu")), []
    for time in ("2001-02-03T04:05:06.789012", "2001-02-03T04:05:06.789012", "2002-02-03T04:05:06.789012", None):
        run = RunModels(recipe, Console(quiet=True), state, time)
        made = run.credit({"name": "contrastive"}, recipe.model)
        seen.append((made.fingerprint(), made.preview("the sky?", "It is blue.")))
    assert seen[0] == seen[1]
    assert all(text.startswith("03 Feb 2001 04:05:06.789012\n<|im_start|>user") for text in seen[0][1])
    assert len({fingerprint for fingerprint, _ in seen}) == 3
    assert seen[3][1] != seen[2][1] != seen[1][1]


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


def test_a_stream_resumes_with_the_date_of_its_start(tmp_path):
    """Its rows are read again, by the clock of the first start."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(8)))
    seen: list[str] = []

    class Look(PreferenceTrainer):
        def _collate(self, samples):
            seen.extend(self.processing_class.decode(s.prompt_ids).partition("\n")[0] for s in samples)
            return super()._collate(samples)

    def streamed(**kwargs):
        return trainer(tmp_path / "run", load_rows(path, streaming=True), kind=Look, rows_held_out=None, **kwargs)

    streamed(callbacks=[Stop()]).train()
    streamed().train(resume_from_checkpoint=True)
    assert len(seen) > 8
    assert len(set(seen)) == 1


def test_a_run_and_its_evaluation_see_one_date(tmp_path, monkeypatch):
    """Stages that begin on another day, and `evaluate` later still, render what the first stage saw."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(8)))
    template = TEMPLATE.replace("%d %b %Y %H:%M:%S.%f", "%d %b %Y")
    stages = {name: {"kind": "train", "objective": {"name": "dpo"}} for name in ("one", "two")}
    values = {
        "method": "test",
        "model": {"config": LLAMA, "tokenizer": {"type": "byte"}},
        "data": {"train": str(path), "eval_fraction": 0.25, "chat_template": template},
        "output_dir": str(tmp_path / "run"),
        "training": {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True},
        "stages": stages,
    }
    dates: list[str] = []
    for day, work in (
        (1, lambda: run_recipe(make_recipe(values), until="one", console=Console(quiet=True))),
        (2, lambda: run_recipe(make_recipe(values), console=Console(quiet=True))),
        (3, lambda: evaluate_run(tmp_path / "run")),
    ):

        class Day(datetime):
            @classmethod
            def now(cls, tz=None, day=day):
                return cls(2030, 1, day, tzinfo=tz)

        class Look(PreferenceTrainer):
            def get_eval_dataloader(self, eval_dataset=None):
                texts = [self.processing_class.decode(s.prompt_ids) for s in self.eval_dataset]
                dates.extend(text.partition("\n")[0] for text in texts)
                return super().get_eval_dataloader(eval_dataset)

        for module in (folder, tokens):
            monkeypatch.setattr(module, "datetime", Day)
        monkeypatch.setattr(Train, "trainer", Look)
        work()
    assert len(dates) == 2 * 5  # before and after two stages, and evaluated
    assert set(dates) == {"01 Jan 2030"}
