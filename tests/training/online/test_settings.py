"""Settings of online training: what is refused, what follows from the prompts, and which checkpoint is the best."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from tests.training.online.tiny import make_online, make_prompts, online_config, share_of_token
from tests.training.tiny import tiny_config, tiny_llama, weights
from tokengrain.errors import DataError, RecipeError
from tokengrain.runs import ROLLOUT_FILE
from tokengrain.training.checkpoint import last_complete_checkpoint
from tokengrain.training.online import OnlineTrainer
from tokengrain.training.rollout import PromptDataset


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"save_strategy": "epoch"}, "save_strategy is 'epoch', but online training is one long pass.*save_steps"),
        ({"eval_strategy": "epoch"}, "eval_strategy is 'epoch', but online training is one long pass"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy is 'sequential'.*set shuffle_prompts"),
        ({"metric_for_best_model": "eval_loss"}, "'eval_loss'; online evaluation samples and has no loss"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha is not supported"),
        ({"eval_generations": 4}, "eval_generations is 4 and eval_temperature 0: a prompt's completions would all be"),
    ],
)
def test_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        online_config(tmp_path, **settings)


def test_settings_of_another_class_and_ignored_arguments_are_named(tmp_path: Path) -> None:
    args: Any = tiny_config(tmp_path)
    with pytest.raises(RecipeError, match="settings are PreferenceConfig; expected OnlineConfig"):
        OnlineTrainer(tiny_llama(), args, rewards=share_of_token, train_dataset=make_prompts(4))
    options: dict[str, Any] = {"compute_metrics": lambda predictions: {}}
    with pytest.raises(RecipeError, match="takes no compute_metrics"):
        OnlineTrainer(tiny_llama(), online_config(tmp_path), train_dataset=make_prompts(4), **options)


def test_settings_can_be_used_again_with_other_prompts(tmp_path: Path) -> None:
    args = online_config(tmp_path, max_steps=-1, num_train_epochs=1)
    made = [
        OnlineTrainer(tiny_llama(), args, rewards=share_of_token, train_dataset=make_prompts(n)).args.max_steps
        for n in (4, 40)
    ]
    assert made == [1, 10]
    assert args.max_steps == -1


def test_the_seed_of_the_data_orders_prompts_and_nothing_else(tmp_path: Path) -> None:
    def drawn(**settings: Any) -> dict[Any, list[int]]:
        trainer = make_online(tmp_path, **settings)
        batch = trainer.next_minibatch().batch
        first = [batch.group.tolist().index(g) for g in range(batch.n_prompts)]
        return {row: batch.completion(c).tolist() for row, c in zip(batch.rows, first, strict=True)}

    plain, same, other = drawn(), drawn(data_seed=3), drawn(data_seed=4)
    assert list(plain.items()) == list(same.items())
    assert list(plain) != list(other)
    both = plain.keys() & other.keys()
    assert both
    assert all(plain[row] == other[row] for row in both)


def test_a_metric_that_is_not_there_is_named(tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "eval_dataset": make_prompts(2)}
    with pytest.raises(RecipeError, match=r"metric_for_best_model is 'rewrd'; evaluation gives length, .*, reward"):
        make_online(tmp_path, metric_for_best_model="rewrd", **settings).train()


def test_the_best_checkpoint_is_that_of_the_largest_reward(tmp_path: Path) -> None:
    trainer = make_online(
        tmp_path,
        max_steps=6,
        minibatches=2,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        eval_dataset=make_prompts(6, seed=4),
    )
    trainer.train()
    rewards = {e["step"]: e["eval_reward"] for e in trainer.state.log_history if "eval_reward" in e}
    best = max(rewards, key=lambda step: rewards[step])
    assert 0 < best < 6
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_reward"] == rewards[best]


class Ask(TrainerCallback):
    """Asks for a checkpoint at once, as SIGTERM does with `enable_jit_checkpoint`, within an optimiser step or after
    one."""

    def __init__(self, step: int, *, within: bool) -> None:
        self.step, self.within = step, within
        self.trainer: Any = None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ask(state.global_step == self.step and self.within)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ask(state.global_step == self.step and not self.within)

    def _ask(self, now: bool) -> None:
        jit = next(c for c in self.trainer.callback_handler.callbacks if isinstance(c, JITCheckpointCallback))
        jit.jit_manager.is_checkpoint_requested |= now


@pytest.mark.parametrize("within", [True, False])
def test_a_checkpoint_on_a_signal_is_gone_on_with_exactly(within: bool, tmp_path: Path) -> None:
    settings = {"minibatches": 2, "rollout_epochs": 2, "max_steps": 6, "rollout_samples_every": 1}
    whole = make_online(tmp_path / "whole", model=tiny_llama(), **settings)
    whole.train()
    ask = Ask(3, within=within)
    ask.trainer = make_online(
        tmp_path / "cut", model=tiny_llama(), callbacks=[ask], enable_jit_checkpoint=True, **settings
    )
    ask.trainer.train()
    assert ask.trainer.state.global_step == 4
    found = last_complete_checkpoint(tmp_path / "cut")
    assert found is not None
    assert found.name == ("checkpoint-4" if within else "checkpoint-3")
    again = make_online(tmp_path / "cut", model=tiny_llama(), **settings)
    again.train(resume_from_checkpoint=True)
    for name, value in weights(whole.model).items():
        assert torch.equal(again.model.state_dict()[name], value), name
    assert (tmp_path / "cut" / ROLLOUT_FILE).read_text() == (tmp_path / "whole" / ROLLOUT_FILE).read_text()


def test_ids_of_prompts_are_kept_in_checkpoints(tmp_path: Path) -> None:
    """numpy's numbers, as rows of a data frame have them, and what no checkpoint could hold."""
    prompts = [replace(p, row=np.int64(i)) for i, p in enumerate(make_prompts(10))]
    settings = {"objective": "dcpo", "credit": ["dcpo"], "minibatches": 2, "save_strategy": "steps", "save_steps": 3}
    make_online(tmp_path, train_dataset=prompts, max_steps=3, **settings).train()
    trainer = make_online(tmp_path, train_dataset=prompts, max_steps=4, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert set(trainer.rollout_credits[0].visits) <= {str(i) for i in range(10)}
    for row in (None, 1.5, ("a", 1)):
        with pytest.raises(DataError, match="field 'id': a prompt's id cannot be kept in a checkpoint"):
            PromptDataset([replace(prompts[0], row=row)])
    with pytest.raises(DataError, match="train: there are no prompts"):
        make_online(tmp_path, train_dataset=None)
