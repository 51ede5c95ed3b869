"""Reward models: made from causal models, trained by Q-RM with and without LoRA, saved, loaded, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForTokenClassification, BertConfig, BertLMHeadModel, T5Config, T5Model

from tests.credit.small import tokenizer
from tests.data.tokenizers import byt5
from tests.scoring.models import SHARING, small_batch, texts, tiny
from tests.training.tiny import VOCABULARY, make_samples, make_trainer, tiny_llama
from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.data.dataset import prepare_pairs
from tokengrain.errors import DataError, ModelError, read_log
from tokengrain.evaluation.statistics import score_completions
from tokengrain.method import make_credit
from tokengrain.models import (
    load_reward_model,
    load_trained_reward_model,
    measure_both,
    measure_completions,
    measure_scores,
    reward_lora_config,
    reward_model_from,
    save_statistics,
)
from tokengrain.scoring.token_scores import (
    ScoreStatistics,
    completion_statistics_of,
    frozen_token_scores,
    set_statistics,
    statistics_of,
)
from tokengrain.specs import LoraSpec, ModelSpec

FORMS = ("llama", "llama-tied", "qwen3", "mistral", "gemma2", "gpt2", "gpt_neox")


def saved(folder: Path, model: Any = None) -> str:
    (model or tiny_llama()).save_pretrained(folder)
    return str(folder)


def fresh(path: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return load_reward_model(ModelSpec(path=path), path)


def plain_scores(model: Any, batch: TokenBatch) -> torch.Tensor:
    """The head's output at each counted token, one text at a time."""
    with torch.no_grad():
        return torch.cat([model(input_ids=text[None]).logits[0, at, 0] for text, at in texts(batch)])


def good_and_bad(n: int, seed: int = 0) -> list[Sample]:
    """Pairs whose chosen side has more tokens of the upper half of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)

    def ids(share: float) -> list[int]:
        length = int(torch.randint(4, 9, (1,), generator=generator))
        up = torch.rand(length, generator=generator) < share
        low = torch.randint(1, VOCABULARY // 2, (length,), generator=generator)
        return (low + up * (VOCABULARY // 2)).tolist()

    return [Sample(ids(0.5), [Completion(ids(0.8)), Completion(ids(0.2))], row=row) for row in range(n)]


# ------------------------------------------------------------------------------------------------------ making


@pytest.mark.parametrize("name", FORMS)
def test_every_architecture_keeps_its_decoder_and_comes_back(name: str, tmp_path: Path) -> None:
    causal = tiny(name, dtype=torch.float32)
    model = fresh(saved(tmp_path / "causal", causal))
    ours, theirs = model.base_model.state_dict(), causal.base_model.state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    batch = small_batch()
    scores = frozen_token_scores(model, batch)
    torch.testing.assert_close(scores, plain_scores(model.eval(), batch), atol=1e-5, rtol=1e-4)
    set_statistics(model, ScoreStatistics(0.5, 1.5))
    model.save_pretrained(tmp_path / "reward")
    again, info = AutoModelForTokenClassification.from_pretrained(tmp_path / "reward", output_loading_info=True)
    assert not any(info.values())
    assert again.config.num_labels == 1
    assert torch.equal(frozen_token_scores(again, batch), scores)
    assert statistics_of(again) == ScoreStatistics(0.5, 1.5)
    gone_on_with = fresh(str(tmp_path / "reward"), seed=9)
    assert torch.equal(frozen_token_scores(gone_on_with, batch), scores)


def test_fresh_head_is_small_seeded_and_free_of_bias(tmp_path: Path) -> None:
    path = saved(tmp_path / "causal", tiny_llama(hidden_size=256))
    model = fresh(path)
    weight = model.score.weight
    assert weight.shape == (1, 256)
    assert float(weight.detach().std()) == pytest.approx(257**-0.5, rel=0.15)
    assert torch.equal(weight, fresh(path).score.weight)
    assert not torch.equal(weight, fresh(path, seed=1).score.weight)
    assert not model.score.bias.any()
    assert "score.bias" not in dict(model.named_parameters())
    assert "score.bias" in model.state_dict()
    assert model.dropout.p == 0
    assert model.config.classifier_dropout == 0


def test_dtype_of_the_spec(tmp_path: Path) -> None:
    path = saved(tmp_path / "causal")
    model = load_reward_model(ModelSpec(path=path, dtype="bfloat16"), path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    batch = TokenBatch.from_samples(make_samples(2))
    assert score_completions(model, batch).dtype == torch.float32


def test_from_a_model_in_memory_shared_or_copied() -> None:
    causal = tiny_llama()
    shared: Any = reward_model_from(causal)
    own: Any = reward_model_from(causal, share=False)
    assert shared.base_model is causal.base_model
    assert own.base_model is not causal.base_model
    assert not any(p.is_meta for m in (shared, own) for p in m.parameters())
    with torch.no_grad():
        causal.base_model.layers[0].mlp.up_proj.weight.zero_()
    assert not shared.base_model.layers[0].mlp.up_proj.weight.any()
    assert own.base_model.layers[0].mlp.up_proj.weight.any()
    assert causal.config.num_labels != 1  # the causal model's config is its own


def test_architectures_without_the_form_are_named(tmp_path: Path) -> None:
    assert "opt" in SHARING
    path = saved(tmp_path / "opt", tiny("opt", dtype=torch.float32))
    with pytest.raises(ModelError, match="'opt'"):
        fresh(path)
    t5 = T5Model(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(ModelError, match="'t5' is not a causal"):
        fresh(saved(tmp_path / "t5", t5))


def test_a_decoder_that_sees_later_tokens_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=VOCABULARY, initializer_range=0.5, **sizes)
    model = fresh(saved(tmp_path / "bert", BertLMHeadModel(config)))
    with pytest.raises(ModelError, match="later tokens"):
        frozen_token_scores(model, TokenBatch.from_samples(make_samples(1)))


def test_other_classifiers_and_language_models_are_refused(tmp_path: Path) -> None:
    config = tiny_llama().config
    config.num_labels = 3
    model = AutoModelForTokenClassification.from_config(config)
    with pytest.raises(ModelError, match="3 labels"):
        fresh(saved(tmp_path / "three", model))
    with pytest.raises(ModelError, match="not a reward model"):
        load_trained_reward_model(saved(tmp_path / "causal"))
    with pytest.raises(ModelError, match="no model at"):
        fresh(str(tmp_path / "nothing"))


# ---------------------------------------------------------------------------------------------------- training


def trained(folder: Path, objective: str = "qrm", lora: LoraSpec | None = None, **settings: Any) -> Any:
    model = fresh(saved(folder / "base"))
    options: dict[str, Any] = {"peft_config": reward_lora_config(lora)} if lora is not None else {}
    trainer = make_trainer(
        folder / "run",
        good_and_bad(160),
        model=model,
        objective=objective,
        eval_dataset=good_and_bad(64, seed=1),
        num_train_epochs=3,
        per_device_train_batch_size=8,
        **{"learning_rate": 3e-3, **settings},
        **options,
    )
    return trainer


def pair_accuracy(model: Any, samples: list[Sample]) -> float:
    scores = score_completions(model, TokenBatch.from_samples(samples))
    return float((scores[0::2] > scores[1::2]).float().mean())


@pytest.mark.parametrize("lora", [None, LoraSpec(r=8, alpha=16, target_modules="all-linear")])
def test_training_saving_and_loading(tmp_path: Path, lora: LoraSpec | None) -> None:
    trainer = trained(tmp_path, lora=lora, learning_rate=1e-2)
    held_out = good_and_bad(64, seed=1)
    before = pair_accuracy(trainer.model, held_out)
    assert trainer.reference is None
    trainer.train()
    after = pair_accuracy(trainer.model, held_out)
    assert after >= (0.9 if lora is None else 0.75)  # the base of an adapter is random here
    assert after > before + 0.15
    log = [e for e in read_log(tmp_path / "run" / "log.jsonl") if "loss" in e]
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    statistics = measure_scores(trainer.model, held_out)
    whole = measure_completions(trainer.model, held_out, pooling="last")
    path = str(tmp_path / "run" / "model")
    trainer.save_model(path)
    save_statistics(path, statistics, whole)

    batch = TokenBatch.from_samples(held_out[:8])
    scores = frozen_token_scores(trainer.model, batch)
    loaded = load_trained_reward_model(path)
    assert not isinstance(loaded, PeftModel)
    assert not loaded.training
    torch.testing.assert_close(frozen_token_scores(loaded, batch), scores, atol=2e-5, rtol=1e-4)
    assert statistics_of(loaded) == statistics
    assert completion_statistics_of(loaded) == whole
    assert whole.std > 0
    torch.testing.assert_close(
        make_credit("reward_model", model=loaded)(batch),
        (scores - statistics.mean) / statistics.std,
        atol=1e-5,
        rtol=1e-4,
    )
    plain: Any = AutoModelForTokenClassification.from_pretrained(path, num_labels=1).eval()
    torch.testing.assert_close(plain_scores(plain, batch), scores, atol=2e-5, rtol=1e-4)
    if lora is None:
        assert not plain.score.bias.any()
    else:
        wrapped = load_trained_reward_model(path, merge=False)
        assert isinstance(wrapped, PeftModel)
        torch.testing.assert_close(frozen_token_scores(wrapped, batch), scores, atol=2e-5, rtol=1e-4)


def test_lora_trains_the_head_in_full_and_no_bias(tmp_path: Path) -> None:
    trainer = trained(tmp_path, lora=LoraSpec(r=2, target_modules="all-linear"))
    learning = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    others = {n for n in learning if "lora_" not in n}
    assert len(others) == 1
    assert others.pop().endswith("score.modules_to_save.default.weight")
    assert not any("score" in n and "lora_" in n for n in learning)


def test_an_adapter_is_gone_on_with(tmp_path: Path) -> None:
    lora = LoraSpec(r=4, target_modules="all-linear")
    trainer = trained(tmp_path, lora=lora, max_steps=3)
    trainer.train()
    path = str(tmp_path / "run" / "model")
    trainer.save_model(path)
    batch = TokenBatch.from_samples(good_and_bad(4))
    model: Any = load_reward_model(ModelSpec(path=path), path, train_adapter=True)
    torch.testing.assert_close(
        frozen_token_scores(model, batch), frozen_token_scores(trainer.model, batch), atol=1e-5, rtol=1e-4
    )
    assert any("lora_" in n for n, p in model.named_parameters() if p.requires_grad)


def test_a_policys_adapter_gives_its_merged_decoder(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(tmp_path / "adapter")
    made = fresh(str(tmp_path / "adapter"))
    merged = adapted.merge_and_unload().model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(made.model.layers[0].self_attn.q_proj.weight, merged)
    with pytest.raises(ModelError, match="not a reward model"):
        load_trained_reward_model(str(tmp_path / "adapter"))


# -------------------------------------------------------------------------------------------------- statistics


def test_statistics_are_those_of_all_tokens() -> None:
    model, samples = reward_model_from(tiny_llama()), make_samples(9)
    every = frozen_token_scores(model, TokenBatch.from_samples(samples)).double()
    got = measure_scores(model, samples, max_tokens=40)
    assert got.mean == pytest.approx(float(every.mean()), abs=1e-6)
    assert got.std == pytest.approx(float(every.std(correction=0)), abs=1e-6)
    assert statistics_of(model) == got
    spread = measure_scores(model, samples, max_rows=3)  # rows 0, 3, 6
    some = frozen_token_scores(model, TokenBatch.from_samples(samples[::3])).double()
    assert spread.mean == pytest.approx(float(some.mean()), abs=1e-6)
    assert measure_scores(model, iter(samples), max_rows=4) == measure_scores(model, samples[:4])
    whole = measure_completions(model, samples, pooling="last")
    assert measure_both(model, samples, "last") == (measure_scores(model, samples), whole)
    with pytest.raises(DataError, match="empty"):
        measure_scores(model, [])


# ----------------------------------------------------------------------------------------------- use as credit


def test_credit_of_a_reward_model_with_another_tokenizer_trains_a_policy(tmp_path: Path) -> None:
    ours, theirs = tokenizer(), byt5()
    reward = reward_model_from(tiny_llama(vocab_size=len(theirs), max_position_embeddings=128))
    rows = [
        {"prompt": "write about the sea", "chosen": " the sea was calm", "rejected": " the sun was cruel ."},
        {"prompt": "write kindly", "chosen": " calm and deep", "rejected": " not calm"},
    ]
    samples = [*prepare_pairs(rows, ours)]
    other = [*prepare_pairs(rows, theirs)]
    assert max(i for s in other for i in s.prompt_ids) >= VOCABULARY  # ids that the policy does not have
    measure_scores(reward, other)
    credit = make_credit("reward_model", model=reward, tokenizer=ours, reward_tokenizer=theirs)
    trainer = make_trainer(tmp_path, samples, objective="tgdpo", credit=credit, max_steps=2)
    trainer.train()
    losses = [e["loss"] for e in read_log(tmp_path / "log.jsonl") if "loss" in e]
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)
    assert losses[1] < losses[0]
