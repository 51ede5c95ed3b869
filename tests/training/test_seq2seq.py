"""Encoder-decoders in training: a textbook's loss, two ranks, resuming, references, every credit in every role."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import TrainerCallback

from tests.data.test_encoder_prompts import around
from tests.data.tokenizers import byt5
from tests.scoring.encdec import alone, tiny_seq2seq
from tests.scoring.models import VOCAB, tiny
from tests.training.ranks import on_ranks
from tests.training.tiny import make_samples, make_trainer, weights
from tokengrain import tables
from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.dataset import prepare_pairs
from tokengrain.errors import ModelError, read_log
from tokengrain.loss import ROLES
from tokengrain.method import CREDIT, FROZEN, make_credit, make_objective
from tokengrain.methods.aligndistil import ContrastiveTeacher
from tokengrain.models import reward_model_from
from tokengrain.scoring.reference import FrozenReference
from tokengrain.training.step import PreferenceLoss, resolve_credit


def rows(n: int, completions: int = 2, columns: tuple[str, ...] = ()) -> list[Sample]:
    """Queries and docids of many lengths, in the tiny vocabulary."""
    made = make_samples(n, completions=completions, columns=columns)
    for sample in made:
        sample.prompt_ids = [3 + i % (VOCAB - 3) for i in sample.prompt_ids]
        for completion in sample.completions:
            completion.ids = [3 + i % (VOCAB - 3) for i in completion.ids]
    return made


def model(seed: int = 0, **changes: Any) -> Any:
    return tiny_seq2seq("t5", dtype=torch.float32, seed=seed, **changes)


def test_the_first_step_is_that_of_a_textbook(tmp_path):
    """DPO against a frozen copy, with a query encoded for each docid and all logits."""
    samples, policy = rows(4, completions=4), model()
    trainer = make_trainer(tmp_path, samples, model=copy.deepcopy(policy), reference=model(1), optim="sgd", max_steps=1)
    trainer.train()
    batch = TokenBatch.from_samples(samples)
    ratios = batch.segments.sum(alone(policy, batch)["logps"] - alone(model(1), batch)["logps"].detach()).view(4, 4)
    loss = -F.logsigmoid(0.1 * (ratios[:, :1] - ratios[:, 1:])).mean()
    assert read_log(tmp_path / "log.jsonl")[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            expected = parameter - 1e-2 * parameter.grad
            torch.testing.assert_close(dict(trainer.model.named_parameters())[name], expected, rtol=1e-3, atol=1e-5)


def run(folder: Path, **settings: Any) -> Any:
    given = {"optim": "sgd", "learning_rate": 0.05, "per_device_train_batch_size": 4, **settings}
    data = {"eval_dataset": rows(5, completions=3)}
    trainer = make_trainer(folder, rows(16, completions=3), model=model(), objective="tdpo2", **data, **given)
    before = trainer.evaluate()
    trainer.train()
    # Numbers, not tensors, go through a pipe.
    made = {name: value.tolist() for name, value in weights(trainer.model).items()}
    return made, {k: v for k, v in before.items() if "loss" in k or "margins" in k}


@pytest.mark.parametrize("unused", [False, True])
def test_two_ranks_train_as_one(unused, tmp_path):
    one = run(tmp_path / "one", per_device_train_batch_size=8)
    two = on_ranks(2, lambda: run(tmp_path / "two", ddp_find_unused_parameters=unused))[0]
    for name, value in one[0].items():
        torch.testing.assert_close(torch.tensor(two[0][name]), torch.tensor(value), rtol=1e-3, atol=2e-5)
    assert two[1] == pytest.approx(one[1], rel=1e-4, abs=1e-6)


class StopAt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 2


@pytest.mark.parametrize("adapter", [False, True])
def test_a_resumed_run_is_the_whole_run(adapter, tmp_path):
    peft = pytest.importorskip("peft")
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "objective": "dpo"}

    def trainer(folder: Path, *callbacks: Any) -> Any:
        config = peft.LoraConfig(r=2, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM") if adapter else None
        given = {"model": model(), "peft_config": config, "callbacks": list(callbacks)}
        return make_trainer(folder, rows(16), **given, **options)

    whole = trainer(tmp_path / "whole")
    whole.train()
    trainer(tmp_path / "parts", StopAt()).train()
    resumed = trainer(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    for name, value in weights(whole.model).items():
        torch.testing.assert_close(weights(resumed.model)[name], value, rtol=0, atol=0)


def test_gradient_checkpointing_changes_no_weight(tmp_path):
    found = []
    for checkpointing in (False, True):
        folder = tmp_path / str(checkpointing)
        trainer = make_trainer(folder, rows(8), model=model(), gradient_checkpointing=checkpointing)
        trainer.train()
        found.append(weights(trainer.model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


def test_sft_and_aligndistil(tmp_path):
    samples, teacher = rows(8), ContrastiveTeacher(target=FrozenReference(model(1)), contrast=FrozenReference(model(2)))
    for name, given in (("sft", {}), ("aligndistil", {"teacher": teacher})):
        single = [Sample(s.prompt_ids, s.completions[:1], s.row) for s in samples]
        options = {"model": model(), "objective": name, "eval_dataset": single, "num_train_epochs": 4, **given}
        trainer = make_trainer(tmp_path / name, single, **options)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < before


def test_stored_reference_columns_are_those_of_the_live_reference(tmp_path):
    samples, reference = rows(8), model(1)
    batch = TokenBatch.from_samples(samples)
    known = batch.segments.split(FrozenReference(reference)(batch, ("logps",)).logps)
    completions = iter(known)
    stored = [
        Sample(
            s.prompt_ids, [Completion(c.ids, columns={"ref_logps": next(completions).tolist()}) for c in s.completions]
        )
        for s in samples
    ]
    found = []
    for name, data, given in (("live", samples, reference), ("stored", stored, None)):
        trainer = make_trainer(tmp_path / name, data, model=model(), reference=given)
        trainer.train()
        found.append(weights(trainer.model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def sources(tokenizer: Any) -> dict[str, Any]:
    """Every credit source, with encoder-decoders as its models; these see no pictures."""
    base, other, reverse = model(1), model(2), model(3)
    given: dict[str, dict[str, Any]] = {
        "guide": {"model": other, "reference": base},
        "contrastive_dpo": {"model": other, "reverse": reverse},
        "tdpo": {"model": other, "reference": base},
        "contrastive": {"model": base, "tokenizer": tokenizer, "templates": "prefix"},
        "function": {"function": lambda batch: torch.linspace(-1, 1, batch.segments.total)},
        "gradient_attribution": {"model": base},
        "entropy": {"model": base},
        "lookahead": {"model": base},
        "surprise": {"model": base},
    }
    return {n: make_credit(n, **given.get(n, {})) for n in sorted({*CREDIT} - {"reward_model", "sight"})}


class Words:
    """A tokenizer of numbers, as T5's: an end token behind every text."""

    chat_template, bos_token_id, eos_token_id = None, None, 1

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [*(3 + ord(c) % (VOCAB - 3) for c in text), 1]}

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(f"w{i}" for i in ids)


def test_every_credit_goes_with_every_objective_that_takes_it():
    """On pairs and on queries with several negatives; the numbers are finite and reach the policy."""
    batch = TokenBatch.from_samples(rows(3, completions=3, columns=("token_rewards", "spans")), "encoder")
    spans = {"spans": (batch.columns["spans"] > 0).float()}
    batch, policy, reference = batch.with_columns(**spans), model(), FrozenReference(model(1))
    tried = 0
    for credit, source in sources(Words()).items():
        for name in tables.objectives():
            bound = make_objective(name)
            signed = name == "ti_dpo" and credit in ("column", "function")  # whose numbers here are of both signs
            if bound.unit != "pairs" or bound.main != "logps" or signed:
                continue
            for role in (r.strip() for r in tables.cell(credit, name).split(",")):
                if role.split(" ")[0] not in ROLES:
                    continue
                given: Any = {"name": role.split(" ")[0]} | ({"above": 0.0} if "above" in role else {})
                use = resolve_credit(source, given, bound, ())
                judged = PreferenceLoss(bound, reference if bound.needs & FROZEN else None, use)(policy, batch)
                policy.zero_grad()
                judged.output.losses.sum().backward()
                norm = torch.stack([p.grad.norm() for p in policy.parameters() if p.grad is not None]).norm()
                assert torch.isfinite(judged.output.losses).all(), (credit, name, role)
                assert torch.isfinite(norm), (credit, name, role)
                assert norm > 0, (credit, name, role)
                tried += 1
    assert tried > 60


def test_a_reward_model_with_the_same_tokens_says_that_it_has_no_encoder():
    source = make_credit("reward_model", model=reward_model_from(tiny("llama", dtype=torch.float32)), scaling="none")
    batch = TokenBatch.from_samples(rows(2), "encoder")
    with pytest.raises(ModelError, match='prompt_role="encoder", and LlamaForTokenClassification has no encoder'):
        source(batch)


def test_a_reward_model_with_a_tokenizer_of_its_own_reads_prompt_and_completion_as_one_text():
    tokenizer, own = around("$A </s>"), byt5()
    reward = reward_model_from(tiny("llama", dtype=torch.float32, vocab_size=len(own), max_position_embeddings=256))
    source = make_credit("reward_model", model=reward, tokenizer=tokenizer, reward_tokenizer=own, scaling="none")
    row = {"prompt": "the sky is", "chosen": "blue and black", "rejected": "green"}
    found = []
    for role in ("encoder", "prefix"):
        config = TokenizeConfig(prompt_role=role)
        (sample,) = prepare_pairs([row], tokenizer, config).samples
        found.append(source(TokenBatch.from_samples([sample], role)))
    assert found[0].shape == found[1].shape
    assert torch.isfinite(found[0]).all()
