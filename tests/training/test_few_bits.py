"""Memory and adapters in recipes: 4 and 8 bits under LoRA, DoRA, the type on disk; and training that ends early."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import AutoPeftModelForCausalLM
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.test_stages import run, values
from tests.training.tiny import make_samples, make_trainer, tiny_config, tiny_llama
from tokengrain.errors import ModelError, RecipeError, read_json
from tokengrain.models import in_words, load_model, merge, train_tokenizer, trained
from tokengrain.run.load import make_recipe
from tokengrain.run.runner import evaluate_run
from tokengrain.run.show import print_end
from tokengrain.scoring.prepare import prepare
from tokengrain.scoring.reference import AdapterOffReference
from tokengrain.specs import ModelSpec, TokenizerSpec

LORA = {"r": 4, "alpha": 8}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Wide enough for the blocks of 64 that 4-bit weights are scaled in."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer(TokenizerSpec(type="byte"), ())
    size: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "num_key_value_heads": 4}
    size |= {"max_position_embeddings": 128, "initializer_range": 0.05}
    tiny_llama(vocab_size=len(tokenizer), **size).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_lora_on_few_bits(bits: str, base: str, tmp_path: Path) -> None:
    """QLoRA: the run's model learns, and the adapter is one for the base as it was saved."""
    result = run(values(tmp_path, model={"path": base, bits: True}, lora=LORA))
    stage = result.metrics["stages"]["train"]
    assert stage["before"]["comparison"] == "no difference yet"
    assert stage["after"]["rewards/margins"] > 0
    quantised: Any = load_model(ModelSpec(path=base, **{bits: True}), base)
    projection = quantised.model.layers[0].self_attn.q_proj
    assert type(projection).__name__ == {"load_in_4bit": "Linear4bit", "load_in_8bit": "Linear8bitLt"}[bits]
    whole = AutoModelForCausalLM.from_pretrained(base)
    quantised.model.norm.weight.requires_grad_(True)
    assert trained(quantised).endswith(f" of {in_words(whole.num_parameters())} parameters")
    ids = torch.arange(2, 60)[None]
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in (whole, quantised)]
        adapted = AutoPeftModelForCausalLM.from_pretrained(result.model_path)
        moved = adapted(input_ids=ids).logits
    assert 0 < float((logits[1] - logits[0]).norm() / logits[0].norm()) < 0.5
    assert float((moved - logits[0]).abs().max()) > 0


@pytest.mark.parametrize("used", [False, True], ids=["new", "used before"])
def test_gradients_pass_through_4_bits_after_an_evaluation(used: bool, base: str) -> None:
    """bitsandbytes packs weights in evaluation where the CPU computes in bfloat16, for a kernel without a gradient."""
    model: Any = load_model(ModelSpec(path=base, load_in_4bit=True), base)
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(1, 3, 128, generator=torch.Generator().manual_seed(0))
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if used:
        with torch.no_grad():
            model.eval()(input_ids=torch.arange(2, 9)[None])
    prepare(model)
    with torch.no_grad():
        evaluated = layer.eval()(x)
    trained = layer.train()(x.requires_grad_(True))
    torch.testing.assert_close(trained, evaluated)
    trained.sum().backward()
    rounded = {"rtol": 0.0, "atol": 5e-3} if used else {}  # what was packed before stays rounded
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x), **rounded)


def test_what_few_bits_cannot_do(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="weights in 4 or 8 bits are not trained; set lora"):
        make_recipe(values(tmp_path, model={"path": base, "load_in_4bit": True}))
    with pytest.raises(RecipeError, match="expected one of them"):
        make_recipe(values(tmp_path, model={"path": base, "load_in_4bit": True, "load_in_8bit": True}, lora=LORA))
    reward = {"train": {"kind": "reward", "objective": {"name": "qrm"}}}
    with pytest.raises(RecipeError, match="a reward model is not loaded in 4 or 8 bits"):
        make_recipe(values(tmp_path, reward, model={"path": base, "load_in_8bit": True}, lora=LORA))
    monkeypatch.setattr("tokengrain.models.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'tokengrain\[quantise\]'"):
        load_model(ModelSpec(path=base, load_in_8bit=True), base)


def test_dora_and_modules_to_save(base: str, tmp_path: Path) -> None:
    lora = {**LORA, "use_dora": True, "modules_to_save": ["embed_tokens"]}
    result = run(values(tmp_path, model={"path": base}, lora=lora))
    config = read_json(result.model_path / "adapter_config.json")
    assert config["use_dora"] is True
    names = load_file(result.model_path / "adapter_model.safetensors").keys()
    assert any("lora_magnitude_vector" in name for name in names)
    assert any("embed_tokens" in name for name in names)


@pytest.mark.parametrize("start", ["pissa"])
def test_an_adapter_that_starts_as_a_part_of_the_base(start: str, base: str, tmp_path: Path) -> None:
    lora = {**LORA, "init_lora_weights": start}
    result = run(values(tmp_path, model={"path": base}, lora=lora))
    stage = result.metrics["stages"]["train"]
    assert stage["before"]["comparison"] == "no difference yet"
    assert stage["after"]["rewards/margins"] > 0
    found = evaluate_run(result.path)["held_out"]
    assert found["rewards/margins"] == pytest.approx(stage["after"]["rewards/margins"], rel=1e-3)
    adapted, ids = load_model(ModelSpec(path=str(result.model_path)), str(result.model_path)), torch.arange(2, 60)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(merge(str(result.model_path), tmp_path / "merged"))
        assert torch.allclose(adapted(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-4)
    with pytest.raises(ModelError, match=f"init_lora_weights '{start}' takes a part of the base's weights"):
        AdapterOffReference(adapted)


@pytest.mark.parametrize("over", [{}, {"lora": LORA}], ids=["full", "adapter"])
def test_the_type_on_disk(over: dict[str, Any], base: str, tmp_path: Path) -> None:
    result = run(values(tmp_path, model={"path": base, "save_dtype": "bfloat16"}, **over))
    (file,) = result.model_path.glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    loaded = (AutoPeftModelForCausalLM if over else AutoModelForCausalLM).from_pretrained(result.model_path)
    assert over or loaded.dtype == torch.bfloat16


def test_training_ends_early(tmp_path: Path) -> None:
    """At a rate at which the loss only rises: after two evaluations without a better one."""
    how: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    how |= {"load_best_model_at_end": True, "early_stopping_patience": 2, "learning_rate": 3.0, "max_steps": 30}
    trainer = make_trainer(tmp_path / "out", make_samples(16), eval_dataset=make_samples(8, 1), **how)
    trainer.train()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    best = losses.index(min(losses))
    assert trainer.state.global_step == best + 3 < 30
    print_end(Console(file=(screen := StringIO()), width=120), trainer)
    print_end(Console(file=(screen := StringIO()), width=120), trainer)
    said = f"  ended early, at step {best + 3} of 30; the model is that of step {best + 1}, the best"
    assert screen.getvalue().startswith(said)
    again = make_trainer(tmp_path / "out", make_samples(16), eval_dataset=make_samples(8, 1), **how)
    again.train(resume_from_checkpoint=True)  # as after a kill behind the last step
    assert again.state.global_step == best + 3
    assert all(torch.equal(w, again.model.state_dict()[name]) for name, w in trainer.model.state_dict().items())
    how["early_stopping_patience"] = 4
    patient = make_trainer(tmp_path / "out", make_samples(16), eval_dataset=make_samples(8, 1), **how)
    patient.train(resume_from_checkpoint=True)
    assert patient.state.global_step == best + 5, "the checkpoint's patience was 2"
    with pytest.raises(RecipeError, match=r"^early_stopping_patience is 2, .* load_best_model_at_end: true$"):
        tiny_config(tmp_path, early_stopping_patience=2)
