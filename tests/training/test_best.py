"""The best checkpoint: named, kept and loaded whole, on every rank and in a folder that has another name by now."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.ranks import on_ranks
from tests.training.tiny import make_samples, make_trainer, tiny_llama, weights
from tokengrain.errors import RunError
from tokengrain.training.trainer import PreferenceTrainer

BEST = 2


def build(folder: Path, model: Any = None, **settings: Any) -> tuple[PreferenceTrainer, dict[int, Any]]:
    """A trainer whose best step is BEST, and the weights that it has when it evaluates."""
    trainer = make_trainer(
        folder,
        make_samples(16),
        model=model,
        objective="simpo",
        eval_dataset=make_samples(4, seed=5),
        **{
            "save_strategy": "steps",
            "save_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "distance",
            "greater_is_better": False,
            "max_steps": 4,
            **settings,
        },
    )
    evaluate, seen = trainer.evaluate, {}

    def evaluated(*args: Any, **kwargs: Any) -> dict[str, float]:
        seen[trainer.state.global_step] = weights(trainer.model)
        return {**evaluate(*args, **kwargs), "eval_distance": float(abs(trainer.state.global_step - BEST))}

    vars(trainer)["evaluate"] = evaluated
    return trainer, seen


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(two[name], value), name


def test_every_rank_loads_it(tmp_path: Path) -> None:
    def work() -> Any:
        trainer, seen = build(tmp_path, per_device_train_batch_size=2)
        trainer.train()
        same = all(bool(torch.equal(p, seen[BEST][n])) for n, p in trainer.model.state_dict().items())
        return trainer.state.best_model_checkpoint, same

    assert on_ranks(2, work) == [(str(tmp_path / f"checkpoint-{BEST}"), True)] * 2


def test_it_is_loaded_whole_where_weights_are_saved_under_other_names(tmp_path: Path) -> None:
    """transformers renames GPT-NeoX's head when it saves."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    trainer, seen = build(tmp_path, GPTNeoXForCausalLM(config))
    trainer.train()
    assert_same(seen[BEST], weights(trainer.model))


def test_it_is_kept_where_the_folder_was_moved(tmp_path: Path) -> None:
    trainer, _ = build(tmp_path / "before", max_steps=3, save_total_limit=2)
    trainer.train()
    shutil.move(tmp_path / "before", tmp_path / "after")
    trainer, seen = build(tmp_path / "after", max_steps=6, save_total_limit=2)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "after" / f"checkpoint-{BEST}")
    assert sorted(p.name for p in (tmp_path / "after").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]
    assert max(seen) == 6
    assert any(not torch.equal(p, seen[6][n]) for n, p in trainer.model.state_dict().items())


@pytest.mark.parametrize("how", ["save_only_model", "optimizer.pt", "scheduler.pt"])
def test_weights_alone_are_not_gone_on_with(how: str, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "objective": "simpo"}
    make_trainer(tmp_path, make_samples(8), **settings, save_only_model=how == "save_only_model").train()
    (tmp_path / "checkpoint-2" / how).unlink(missing_ok=how == "save_only_model")
    trainer = make_trainer(tmp_path, make_samples(8), model=tiny_llama(), **{**settings, "max_steps": 4})
    with pytest.raises(RunError, match=r"checkpoint-2 cannot be resumed: .*\(was it saved with save_only_model"):
        trainer.train(resume_from_checkpoint=True)
