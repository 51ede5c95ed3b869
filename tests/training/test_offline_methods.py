"""RRPO, SePO, AlignDistil and Q-RM on real architectures, with LoRA and without: they learn, and resume exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from tests.training.tiny import VOCABULARY, make_samples, make_trainer, tiny_llama, weights
from tokengrain.errors import DataError, RecipeError, read_log
from tokengrain.methods.aligndistil import ContrastiveTeacher
from tokengrain.models import reward_lora_config, reward_model_from
from tokengrain.scoring.reference import AdapterReference, FrozenReference
from tokengrain.specs import LoraSpec
from tokengrain.training.checkpoint import checkpoints, remove_folder
from tokengrain.training.trainer import PreferenceTrainer

METHODS = ("rrpo", "sepo", "aligndistil", "qrm")


def tiny_neox(seed: int = 0) -> GPTNeoXForCausalLM:
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            initializer_range=0.2,
        )
    )
    torch.set_rng_state(state)
    return model


ARCHITECTURES = {"llama": tiny_llama, "gpt_neox": tiny_neox}


def lora(model: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def randomised(model: Any, name: str, seed: int) -> None:
    """Give the adapter `name` weights that change what the model says."""
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in model.named_parameters():
        if f".{name}." in parameter_name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def adapted(method: str, model: Any, with_lora: bool) -> tuple[Any, Any]:
    """The policy and, for AlignDistil, its teacher."""
    if method == "qrm":
        torch.manual_seed(1)
        model = reward_model_from(model)
        return (get_peft_model(model, reward_lora_config(LoraSpec(r=4))) if with_lora else model), None
    if method != "aligndistil":
        return (get_peft_model(model, lora(model)) if with_lora else model), None
    if not with_lora:
        others = [FrozenReference(type(model)(model.config)) for _ in range(2)]
        for seed, other in enumerate(others):
            other.model.load_state_dict(model.state_dict())
            generator = torch.Generator().manual_seed(seed)
            head = other.model.get_output_embeddings().weight
            head.data += 0.1 * torch.randn(head.shape, generator=generator)
        return model, ContrastiveTeacher(target=others[0], contrast=others[1], r=2.0)
    policy = get_peft_model(model, lora(model))
    for seed, name in enumerate(("normal", "reverse")):
        policy.add_adapter(name, lora(model))
        randomised(policy, name, seed)
    policy.set_adapter("default")
    references = [AdapterReference(policy, name) for name in ("normal", "reverse")]
    return policy, ContrastiveTeacher(target=references[0], contrast=references[1], r=2.0)


def build(method: str, architecture: str, with_lora: bool, folder: Path, **settings: Any) -> PreferenceTrainer:
    columns = {"rrpo": ("spans",), "sepo": ("token_rewards",)}.get(method, ())
    samples = make_samples(12, completions=1 if method == "aligndistil" else 2, columns=columns)
    torch.manual_seed(0)  # the new adapter's weights
    model, teacher = adapted(method, ARCHITECTURES[architecture](), with_lora)
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 2, **settings}
    return make_trainer(folder, samples, model=model, objective=method, teacher=teacher, **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
def test_it_learns_and_resumes_exactly(method: str, architecture: str, with_lora: bool, tmp_path: Path) -> None:
    before = build(method, architecture, with_lora, tmp_path / "unused")
    trainer = build(method, architecture, with_lora, tmp_path)
    start = weights(before.model)
    trainer.train()
    final = weights(trainer.model)
    assert trainer.state.global_step == 6
    changed = {name for name, value in final.items() if not torch.equal(value, start[name])}
    assert changed
    frozen = ("normal.", "reverse.", "base_layer")
    assert not [name for name in changed if with_lora and any(part in name for part in frozen)]
    losses = [entry["loss"] for entry in read_log(tmp_path / "log.jsonl") if "loss" in entry]
    assert len(losses) == 6
    assert min(losses[3:]) < max(losses[:3])

    remove_folder(next(path for path in checkpoints(tmp_path) if path.name == "checkpoint-6"))
    resumed = build(method, architecture, with_lora, tmp_path)
    resumed.train(resume_from_checkpoint=True)
    for name, value in weights(resumed.model).items():
        assert torch.equal(value, final[name]), name


def test_only_the_policys_adapter_is_saved(tmp_path: Path) -> None:
    trainer = build("aligndistil", "llama", True, tmp_path, save_strategy="no")
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    assert (tmp_path / "model/adapter_model.safetensors").is_file()
    assert not [path for path in (tmp_path / "model").iterdir() if path.is_dir()]


def test_a_method_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rrpo needs per-token spans[\s\S]*data\.spans"):
        make_trainer(tmp_path, make_samples(4), objective="rrpo")
    with pytest.raises(RecipeError, match="aligndistil needs a teacher"):
        make_trainer(tmp_path, make_samples(4, completions=1), objective="aligndistil")
    with pytest.raises(RecipeError, match="dpo does not distil"):
        make_trainer(tmp_path, make_samples(4), objective="dpo", teacher=lambda batch: None)
    with pytest.raises(DataError, match=r"sepo needs per-token token_rewards[\s\S]*or a credit source"):
        make_trainer(tmp_path, make_samples(4), objective="sepo")
