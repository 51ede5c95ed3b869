"""SmolLM2-135M-Instruct: scores, one step of every method, TRL's trainer, generation, adapters and merges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import tokengrain
from tests.real.models import missing, place
from tokengrain.batch import TokenBatch
from tokengrain.data.dataset import prepare_pairs
from tokengrain.errors import read_log
from tokengrain.generate import generate
from tokengrain.models import load_model, merge
from tokengrain.scoring.score import score
from tokengrain.specs import ModelSpec

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]
MODEL = place("smollm2")
OFFLINE = ("dpo", "simpo", "tdpo1", "tdpo2", "tgdpo", "treg", "rrpo", "sepo", "aligndistil", "qrm", "ti_dpo", "tis_dpo")
ONLINE = ("grpo", "drgrpo", "dapo", "gspo", "dcpo", "thr", "aepo", "ppo")
FEW = {"training__max_steps": 1, "training__per_device_train_batch_size": 2, "training__warmup_steps": 0}
FEW |= {"training__bf16": False, "training__learning_rate": 1e-4, "lora": {"r": 4, "alpha": 8}}


def said(text: str, role: str = "assistant") -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def pairs(count: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": said(f"What is {a} + {2 * a}?", "user"),
            "chosen": said(f"{a} + {2 * a} = {3 * a}."),
            "rejected": said(f"It is {3 * a + 1}, I think; ask somebody else."),
        }
        for a in range(3, 3 + count)
    ]


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def plain_logps(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def test_scores_are_those_of_the_models_own_forward(model: Any, tokenizer: Any) -> None:
    samples = list(prepare_pairs(pairs(3), tokenizer))
    with torch.no_grad():
        ours = score(model, TokenBatch.from_samples(samples), ("logps",)).logps
    theirs = [plain_logps(model, list(s.prompt_ids), list(c.ids)) for s in samples for c in s.completions]
    torch.testing.assert_close(ours, torch.cat(theirs), atol=5e-5, rtol=0)


@pytest.mark.parametrize("recipe", OFFLINE)
def test_one_step_of_every_offline_method(recipe: str, tmp_path: Path) -> None:
    result = tokengrain.train(recipe, model=MODEL, data=pairs(10), output=tmp_path / "run", quiet=True, **FEW)
    run = tokengrain.read_run(result.path)
    for stage in (stage for stage in run.stages if "train" in stage.metrics):
        log = read_log(run.path / stage.name / "log.jsonl")
        assert next(entry["grad_norm"] for entry in log if "grad_norm" in entry) > 0
    if recipe not in ("qrm",):
        adapted = AutoPeftModelForCausalLM.from_pretrained(result.model_path)
        assert any(w.abs().max() > 0 for name, w in adapted.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("recipe", ONLINE)
def test_one_rollout_of_every_online_method(recipe: str, tmp_path: Path) -> None:
    rows = tmp_path / "sums.jsonl"
    lines = [{"prompt": row["prompt"], "answer": 3 * (3 + i)} for i, row in enumerate(pairs(4))]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    small = {"prompts_per_rollout": 2, "num_generations": 4, "minibatches": 1, "max_new_tokens": 24}
    settings = {f"stages__train__training__{name}": value for name, value in small.items()}
    few = {name: value for name, value in FEW.items() if "batch_size" not in name}
    # This model solves nothing of it: what is right is a toss, so that groups differ.
    toss = "def toss(completions, **columns):\n    return [float(len(c) % 2) for c in completions]"
    (tmp_path / "own.py").write_text(toss)
    if recipe == "dapo":  # the packaged penalty begins 4,096 tokens before the limit
        settings["stages__train__credit"] = [{"name": "overlong", "buffer": 8}, "group"]
    settings["stages__train__rewards"] = [{"name": f"{tmp_path}/own.py:toss"}, {"name": "numeric", "weight": 0.5}]
    result = tokengrain.train(
        recipe, model=MODEL, data=str(rows), output=tmp_path / "run", quiet=True, **few, **settings
    )
    log = read_log(result.path / "train" / "log.jsonl")
    assert next(entry["grad_norm"] for entry in log if "grad_norm" in entry) > 0


def test_dpo_takes_trls_steps(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    shared: dict[str, Any] = {"learning_rate": 1e-5, "max_steps": 2, "per_device_train_batch_size": 4, "seed": 7}
    shared |= {"logging_steps": 1, "lr_scheduler_type": "constant", "use_cpu": True, "bf16": False, "max_grad_norm": 1}
    shared |= {"train_sampling_strategy": "sequential", "save_strategy": "no", "report_to": "none", "warmup_steps": 0}
    config = trl.DPOConfig(str(tmp_path / "trl"), gradient_checkpointing=False, max_length=None, **shared)
    theirs = trl.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32),
        ref_model=model,
        args=config,
        train_dataset=Dataset.from_list(pairs(8)),
        processing_class=tokenizer,
    )
    theirs.train()
    ours = tokengrain.PreferenceTrainer(
        AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32),
        args=tokengrain.PreferenceConfig(str(tmp_path / "ours"), **shared),
        train_dataset=prepare_pairs(pairs(8), tokenizer),
        processing_class=tokenizer,
        reference=model,
        objective="dpo",
    )
    ours.train()
    steps = [(e["loss"], e["grad_norm"]) for e in read_log(tmp_path / "ours" / "log.jsonl") if "loss" in e]
    wanted = [(e["loss"], e["grad_norm"]) for e in theirs.state.log_history if "loss" in e]
    assert len(steps) == 2
    for mine, trls in zip(steps, wanted, strict=True):
        assert mine[0] == pytest.approx(trls[0], rel=1e-4)
        assert mine[1] == pytest.approx(trls[1], rel=1e-3)


def test_greedy_answers_are_those_of_generate(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    prompts = [row["prompt"] for row in pairs(3)]
    source, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    generate(str(MODEL), str(source), output, max_new_tokens=20)
    answers = [json.loads(line)["completion"] for line in output.read_text().splitlines()]
    for prompt, answer in zip(prompts, answers, strict=True):
        given = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            made = model.generate(**given, max_new_tokens=20, do_sample=False)
        assert answer == tokenizer.decode(made[0, given["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]], ids=["linear", "tied head"])
def test_a_merged_adapter_is_the_same_model(targets: Any, tokenizer: Any, tmp_path: Path) -> None:
    settings = {**FEW, "lora": {"r": 4, "alpha": 8, "target_modules": targets}, "training__learning_rate": 1e-2}
    result = tokengrain.train("dpo", model=MODEL, data=pairs(6), output=tmp_path / "run", quiet=True, **settings)
    merge(result.model_path, tmp_path / "merged")
    ids = list(prepare_pairs(pairs(1), tokenizer)[0].prompt_ids)
    adapted = AutoPeftModelForCausalLM.from_pretrained(result.model_path, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    before, ours, theirs = (plain_logps(one.eval(), ids[:4], ids[4:]) for one in (base, adapted, merged))
    assert (before - ours).abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    merge(result.model_path, tmp_path / "half", dtype="bfloat16")
    own = str(result.model_path)
    folded = load_model(ModelSpec(path=own, dtype="bfloat16"), own, merge_adapter=True)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    for half in (folded, saved):  # where rounding alone moves single tokens by more than 5 %
        assert (plain_logps(half.eval(), ids[:4], ids[4:]) - ours).abs().median() < 0.2
