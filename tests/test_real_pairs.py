"""Every method from its own recipe on real preference pairs (HH), two architectures, with LoRA and without."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokengrain.run.load import load_recipe
from tokengrain.run.runner import run_recipe
from tokengrain.runs import read_run

ROOT = Path(__file__).parents[1]
PAIRS = ROOT.parent / "shared/data/hh-harmless-pairs.jsonl.gz"
METHODS = sorted(path.stem for path in (ROOT / "examples/hh").glob("*.yaml") if path.stem != "base")
SMALL = [
    "model.config.hidden_size=32",
    "model.config.intermediate_size=48",
    "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=4",
    "model.config.num_key_value_heads=2",
    "model.tokenizer.vocab_size=400",
    "data.limit=40",
    "data.max_length=96",
    "data.max_prompt_length=48",
    "training.per_device_train_batch_size=8",
    "training.warmup_steps=1",
]


@pytest.mark.slow
@pytest.mark.skipif(not PAIRS.is_file(), reason=f"no {PAIRS.name} in ../shared/data")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("lora", ["null", "{r: 4, alpha: 8}"], ids=["full", "lora"])
def test_a_recipe_trains_on_real_pairs(method: str, architecture: str, lora: str, tmp_path: Path) -> None:
    sets = [*SMALL, f"model.config.model_type={architecture}", f"lora={lora}", f"data.train={PAIRS}"]
    sets.append(f"output_dir={tmp_path / 'run'}")
    result = run_recipe(load_recipe(ROOT / f"examples/hh/{method}.yaml", overrides=sets))
    run = read_run(result.path)
    assert run.status == "done"
    final = run.final_stage
    assert final.metrics["train"]["steps"] >= 4
    assert final.metrics["after"]["loss"] > 0
    saved = "adapter_model.safetensors" if lora != "null" else "model.safetensors"
    assert (final.model_path / saved).is_file()
