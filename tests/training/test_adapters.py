"""LoRA: no second copy of the weights, the right reference, gradient checkpointing, dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.training.tiny import make_samples, make_trainer, tiny_llama
from tokengrain.batch import TokenBatch
from tokengrain.errors import read_log
from tokengrain.scoring.reference import AdapterOffReference, ColumnReference, FrozenReference, StartingAdapterReference
from tokengrain.scoring.score import score

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.2, "task_type": "CAUSAL_LM"}


def storages() -> set[int]:
    """Addresses of all float storages of more than 1,000 numbers that are alive."""
    import gc

    gc.collect()
    # Plain tensors and parameters: other tests leave fake ones behind, which have no memory to point to.
    kinds = (torch.Tensor, torch.nn.Parameter)
    found = [o for o in gc.get_objects() if type(o) in kinds and o.is_floating_point()]
    return {t.untyped_storage().data_ptr() for t in found if t.numel() > 1000}


def test_adapter_reference_holds_no_second_copy(tmp_path: Path) -> None:
    model = tiny_llama()
    large = {p.untyped_storage().data_ptr() for p in model.parameters() if p.numel() > 1000}
    assert len(large) > 10
    others = storages() - large
    trainer = make_trainer(tmp_path, make_samples(4), model=model, objective="dpo", peft_config=LoraConfig(**LORA))
    assert isinstance(trainer.reference, AdapterOffReference)
    assert storages() - others == large
    full = make_trainer(tmp_path / "full", make_samples(4), objective="dpo")
    assert isinstance(full.reference, FrozenReference)
    assert len(storages() - others) >= 3 * len(large)  # the test can see a copy: policy, its copy, and the first


def test_first_loss_is_log_2_and_only_the_adapter_learns(tmp_path: Path) -> None:
    model = tiny_llama()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = make_trainer(
        tmp_path,
        make_samples(12),
        model=model,
        objective="tdpo2",
        peft_config=LoraConfig(**LORA),
        num_train_epochs=2,
    )
    trainer.train()
    log = [e["loss"] for e in read_log(tmp_path / "log.jsonl") if "loss" in e]
    assert log[0] == pytest.approx(0.693147, abs=1e-6)
    assert min(log) < 0.68
    base = trainer.model.get_base_model()
    for name, value in before.items():
        # PEFT renames a layer it adapts: q_proj.weight becomes q_proj.base_layer.weight.
        stored = dict(base.named_parameters())
        key = name if name in stored else name.replace(".weight", ".base_layer.weight")
        assert torch.equal(stored[key], value), name
    assert any(p.any() for n, p in trainer.model.named_parameters() if "lora_B" in n)


def trained_adapter() -> Any:
    torch.manual_seed(5)
    model = get_peft_model(tiny_llama(), LoraConfig(**LORA))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_continued_adapter_is_compared_with_its_start(tmp_path: Path) -> None:
    samples = make_samples(8)
    batch = TokenBatch.from_samples(samples)
    start = score(trained_adapter().eval(), batch).logps
    trainer = make_trainer(tmp_path, samples, model=trained_adapter(), objective="dpo")
    assert isinstance(trainer.reference, StartingAdapterReference)
    trainer.train()
    assert read_log(tmp_path / "log.jsonl")[0]["loss"] == pytest.approx(0.693147, abs=1e-6)

    trained = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    torch.testing.assert_close(trainer.reference(batch, {"logps"}).logps, start)
    assert (score(trainer.model.eval(), batch).logps - start).abs().max() > 1e-3
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, trained[name])
        assert parameter.requires_grad == ("lora" in name)
    distribution = trainer.reference(batch, {"distribution"}).distribution
    assert distribution.hidden.shape[0] == batch.segments.total
    trainer.save_model(str(tmp_path / "model"))
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "model")
    torch.testing.assert_close(score(again.eval(), batch).logps, score(trainer.model.eval(), batch).logps)


def test_biases_that_are_trained_beside_an_adapter_are_no_part_of_the_reference(tmp_path: Path) -> None:
    """With the adapter switched off they would stay as trained."""
    samples = make_samples(8)
    batch = TokenBatch.from_samples(samples)
    model = tiny_llama(attention_bias=True)
    start = score(model.eval(), batch).logps
    lora = LoraConfig(**{**LORA, "bias": "all"})
    trainer = make_trainer(tmp_path, samples, model=model, objective="dpo", peft_config=lora, num_train_epochs=2)
    assert isinstance(trainer.reference, StartingAdapterReference)
    trainer.train()
    assert any(bool(p.any()) for n, p in trainer.model.named_parameters() if n.endswith("q_proj.base_layer.bias"))
    torch.testing.assert_close(trainer.reference(batch, {"logps"}).logps, start)


def test_given_reference_wins_over_the_default(tmp_path: Path) -> None:
    model = trained_adapter()
    trainer = make_trainer(tmp_path, make_samples(4), model=model, reference=AdapterOffReference(model))
    assert isinstance(trainer.reference, AdapterOffReference)
    stored = make_samples(4, columns=("ref_logps",))
    assert isinstance(make_trainer(tmp_path, stored, objective="dpo").reference, ColumnReference)
    assert isinstance(make_trainer(tmp_path, stored, objective="tdpo2").reference, FrozenReference)
    assert make_trainer(tmp_path, stored, objective="simpo").reference is None


@pytest.mark.parametrize("adapter", [True, False])
def test_gradient_checkpointing_changes_nothing(adapter: bool, tmp_path: Path) -> None:
    losses = []
    for checkpointing in (False, True):
        folder = tmp_path / str(checkpointing)
        trainer = make_trainer(
            folder,
            make_samples(8),
            objective="dpo",
            peft_config=LoraConfig(**LORA) if adapter else None,
            gradient_checkpointing=checkpointing,
        )
        trainer.train()
        losses.append([e["grad_norm"] for e in read_log(folder / "log.jsonl") if "loss" in e])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_dropout_is_off_in_policy_and_reference_unless_asked_for(tmp_path: Path) -> None:
    for disable, same in ((True, True), (False, False)):
        model = tiny_llama(attention_dropout=0.4)
        trainer = make_trainer(tmp_path, make_samples(4), model=model, objective="dpo", disable_dropout=disable)
        batch = TokenBatch.from_samples(make_samples(4))
        trainer.model.train()
        first, second = (score(trainer.model, batch).logps for _ in range(2))
        assert torch.equal(first, second) == same
        first, second = (trainer.reference(batch, {"logps"}).logps for _ in range(2))
        assert torch.equal(first, second)
    assert trainer.model.config.attention_dropout == 0.4
