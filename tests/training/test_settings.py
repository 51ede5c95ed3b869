"""Settings and arguments that transformers knows and that would be without effect here, or with a wrong one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from tests.training.tiny import make_samples, make_trainer, tiny_config, tiny_llama
from tokengrain.batch import Sample
from tokengrain.errors import DataError, RecipeError
from tokengrain.training.config import LAUNCHER, OnlineConfig, check_processes
from tokengrain.training.trainer import PreferenceTrainer

REFUSED: dict[str, Any] = {
    "deepspeed": {"zero_optimization": {"stage": 1}},
    "auto_find_batch_size": True,
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5.0,
    "torch_empty_cache_steps": 1,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "batch_eval_metrics": True,
    "include_for_metrics": ["loss"],
    "optim": "lomo",
    "max_tokens_per_microbatch": True,
    "learning_rate": -1e-6,
    "adam_beta1": 1.5,
    "adam_beta2": -0.1,
    "adam_epsilon": -1.0,
    "weight_decay": -0.1,
    "num_train_epochs": -1,
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_without_a_right_effect_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"^{name} (is|must be) .*{re.escape(repr(REFUSED[name])[:4])}"):
        tiny_config(tmp_path, **{name: REFUSED[name]})


def test_a_misspelt_optimiser_gets_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^optim is 'adamw_8bits'; did you mean 'adamw_8bit'\?$"):
        tiny_config(tmp_path, optim="adamw_8bits")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"min_lr": 1e-7}}, "'cosine', .*'min_lr': 1e-07}: "),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "'cosine_with_min_lr', .* not set: One of min_lr or min_lr_rate"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "'warmup_stable_decay', .*num_decay_steps"),
    ],
)
def test_a_schedule_that_its_settings_do_not_make(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"^lr_scheduler_type is {message}"):
        tiny_config(tmp_path, **settings)


@pytest.mark.parametrize("kind", [one.value for one in SchedulerType])
def test_every_schedule_may_be_chosen(kind: str, tmp_path: Path) -> None:
    needed = {"cosine_with_min_lr": {"min_lr": 1e-7}, "cosine_warmup_with_min_lr": {"min_lr": 1e-7}}
    needed |= {"warmup_stable_decay": {"num_decay_steps": 3}, "polynomial": {"lr_end": 1e-5}}
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    more = best if kind in ("reduce_lr_on_plateau", "greedy") else {}
    tiny_config(tmp_path, lr_scheduler_type=kind, lr_scheduler_kwargs=needed.get(kind), learning_rate=1e-4, **more)


def test_evaluation_without_rows(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^training: eval_strategy is 'steps', and there are no held-out rows"):
        make_trainer(tmp_path, make_samples(4), objective="simpo", eval_strategy="steps", eval_steps=1)


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_strategies_that_need_lengths_are_refused(strategy: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="train_sampling_strategy is not supported, except 'random' and 'sequential'"):
        tiny_config(tmp_path, train_sampling_strategy=strategy)


@pytest.mark.parametrize("name", ["compute_metrics", "compute_loss_func", "data_collator", "model_init"])
def test_arguments_that_would_be_ignored_are_refused(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {name: lambda *args, **kwargs: {}}
    with pytest.raises(RecipeError, match=f"takes no {name}; expected its own arguments, or callbacks, optimizers"):
        PreferenceTrainer(tiny_llama(), tiny_config(tmp_path), train_dataset=make_samples(4), **options)


def test_settings_of_another_class_are_named(tmp_path: Path) -> None:
    args: Any = TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(RecipeError, match="settings are TrainingArguments; expected PreferenceConfig"):
        PreferenceTrainer(tiny_llama(), args, train_dataset=make_samples(4))


def test_rows_of_text_are_named(tmp_path: Path) -> None:
    rows: Any = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    with pytest.raises(RecipeError, match="rows of text need a tokenizer"):
        make_trainer(tmp_path, rows, objective="dpo")
    with pytest.raises(RecipeError, match="rows of text need a tokenizer"):
        make_trainer(tmp_path, make_samples(4), objective="simpo").evaluate(rows)
    with pytest.raises(DataError, match="the rows are a generator, which can be read once; expected rows as a list"):
        make_trainer(tmp_path, (row for row in rows), objective="simpo")


def test_an_adapter_that_is_no_configuration_of_peft(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"peft_config is a dict; expected a configuration of peft, such as LoraConfig"
    ):
        make_trainer(tmp_path, make_samples(4), objective="simpo", peft_config={"r": 4})


def test_a_setting_of_an_older_transformers_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no setting 'group_by_length'.*nothing to set: batches are cut by length"):
        tiny_config(tmp_path, group_by_length=True)


def test_batches_of_rows_are_no_setting_of_rollouts(tmp_path: Path) -> None:
    OnlineConfig(str(tmp_path), use_cpu=True, prompts_per_rollout=8, minibatches=2, per_device_train_batch_size=4)
    with pytest.raises(RecipeError, match="per_device_train_batch_size is 16, which nothing reads in online training"):
        OnlineConfig(str(tmp_path), use_cpu=True, per_device_train_batch_size=16)


def test_predictions_are_not_kept(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no predict: evaluate\(rows\) gives"):
        make_trainer(tmp_path, make_samples(4), objective="simpo").predict(make_samples(2))


def test_an_evaluation_set_may_be_called_train(tmp_path: Path) -> None:
    good, bad = make_samples(4), make_samples(4)
    bad[2].completions.pop()
    with pytest.raises(DataError, match=r"^train: row 2: a preference pair has two completions"):
        make_trainer(tmp_path, bad, objective="simpo", eval_dataset={"train": good})
    metrics = make_trainer(tmp_path, good, objective="simpo", eval_dataset={"train": good}).evaluate()
    assert "eval_train_loss" in metrics


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[Sample]:
        yield from make_samples(8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataloader_num_workers": 2}, "dataloader_num_workers is 2; each of them would read the whole stream"),
        ({"save_strategy": "epoch"}, "save_strategy is 'epoch', but a stream is one long pass.*with save_steps"),
        ({"logging_strategy": "epoch"}, "logging_strategy is 'epoch', but a stream is one long pass"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        make_trainer(tmp_path, Stream(), objective="simpo", max_steps=2, **settings)


def test_a_worker_of_its_own_may_read_a_stream(tmp_path: Path) -> None:
    losses = []
    for workers in (0, 1):
        options = {"objective": "simpo", "max_steps": 2, "dataloader_num_workers": workers}
        trainer = make_trainer(tmp_path, Stream(), **options)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("ACCELERATE_USE_FSDP", "accelerate was started with FSDP, but accelerate does not shard on this device"),
        ("ACCELERATE_USE_DEEPSPEED", "accelerate was started with DeepSpeed, which is not supported"),
        ("ACCELERATE_USE_MEGATRON_LM", "accelerate was started with Megatron-LM, which is not supported"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "accelerate was started with tensor, context or sequence parallelism"),
    ],
)
def test_what_the_launcher_was_asked_for_is_what_runs_or_an_error(
    variable: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LAUNCHER, variable, "true")
    with pytest.raises(RecipeError, match=message):
        make_trainer(tmp_path, make_samples(4), objective="dpo")


def test_processes_that_would_each_train_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job script that sets RANK and WORLD_SIZE, and no LOCAL_RANK: on GPUs accelerate then joins nothing."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_processes(4)
    with pytest.raises(RecipeError, match=r"WORLD_SIZE is 4, but this process trains alone .* LOCAL_RANK"):
        check_processes(1)


def test_fsdp_of_one_trainer_says_nothing_about_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers and accelerate write it into the environment, where a launcher would."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    with pytest.raises(RecipeError, match="fsdp is set, which needs several processes"):
        make_trainer(tmp_path, make_samples(4), objective="dpo", fsdp=True, fsdp_config={"version": 2})
    make_trainer(tmp_path, make_samples(4), objective="dpo")
