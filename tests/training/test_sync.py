"""A reference that follows the policy (`sync_ref_model`): by TRL's rule, and exact after a resume."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.training.online.tiny import make_online
from tests.training.tiny import make_samples, make_trainer, tiny_llama, weights
from tokengrain.errors import RecipeError, RunError
from tokengrain.method import make_objective

SYNC: dict[str, Any] = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 2}


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3


def one(kind: str, folder: Path, **settings: Any) -> Any:
    shared = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "learning_rate": 3e-2, **settings}
    if kind == "offline":
        return make_trainer(folder, make_samples(16), objective="dpo", **shared)
    return make_online(folder, objective=make_objective("grpo", beta=0.2), **shared)


@pytest.mark.parametrize("kind", ["offline", "online"])
def test_the_reference_follows_by_trls_rule_and_resumes(kind: str, tmp_path: Path) -> None:
    callbacks = pytest.importorskip("trl.trainer.callbacks")
    expected = copy.deepcopy(tiny_llama())

    class Follow(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step % 2 == 0:
                callbacks.SyncRefModelCallback.sync_target_model(model, expected, 0.3)

    whole = one(kind, tmp_path / "whole", callbacks=[Follow()], **SYNC)
    whole.train()
    found, fixed = weights(whole.reference.model), one(kind, tmp_path / "fixed")
    for name, value in weights(expected).items():
        assert torch.equal(found[name], value), name
    fixed.train()
    assert not torch.equal(found["lm_head.weight"], weights(fixed.reference.model)["lm_head.weight"])
    assert not torch.equal(*(weights(t.model)["lm_head.weight"] for t in (whole, fixed)))

    one(kind, tmp_path / "parts", callbacks=[Stop()], **SYNC).train()
    parts = one(kind, tmp_path / "parts", **SYNC)
    parts.train(resume_from_checkpoint=True)
    for mine, theirs in ((parts.model, whole.model), (parts.reference.model, whole.reference.model)):
        for name, value in weights(theirs).items():
            assert torch.equal(weights(mine)[name], value), name
    with pytest.raises(RunError, match=r"ref_model_mixup_alpha was 0\.3 there and is 0\.5 now"):
        one(kind, tmp_path / "parts", **{**SYNC, "ref_model_mixup_alpha": 0.5}).train(resume_from_checkpoint=True)


def test_a_given_reference_is_left_alone_and_an_adapter_has_none(tmp_path: Path) -> None:
    from peft import LoraConfig

    other = tiny_llama(4)
    before = weights(other)
    trainer = make_trainer(tmp_path / "a", make_samples(8), reference=other, max_steps=2, **SYNC)
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in weights(other).items())
    assert not torch.equal(weights(trainer.reference.model)["lm_head.weight"], before["lm_head.weight"])
    with pytest.raises(RecipeError, match=r"weights of its own .*; got AdapterOffReference"):
        make_trainer(tmp_path / "b", make_samples(8), peft_config=LoraConfig(r=2, target_modules=["q_proj"]), **SYNC)
    wide = tiny_llama(intermediate_size=64)
    with pytest.raises(RecipeError, match="differ from the policy's in kind"):
        make_trainer(tmp_path / "c", make_samples(8), reference=wide, **SYNC)
    with pytest.raises(RecipeError, match="ref_model_sync_steps must be a positive integer"):
        make_trainer(tmp_path / "d", make_samples(8), **{**SYNC, "ref_model_sync_steps": 0})
