"""A trained reward model as a reward: what it says, how it is scaled, and models that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, LlamaConfig
from transformers import LlamaForSequenceClassification as LlamaSequence

from tests.data.tokenizers import CHATML, gpt2_like, llama_like
from tests.methods.test_qrm import plain_scores
from tests.training.tiny import VOCABULARY, tiny_llama
from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.errors import ModelError, RecipeError
from tokengrain.models import load_trained_reward_model, measure_completions, reward_model_from
from tokengrain.rewards.builtin import check_reward, make_reward
from tokengrain.rewards.reward_model import RewardModel, load_completion_model
from tokengrain.rewards.suite import RewardError, RewardSuite
from tokengrain.scoring.token_scores import CompletionStatistics, set_statistics

PROMPTS = [[5, 6, 7], [5, 6, 7], [5, 6, 7], [9, 8], [9, 8]]
COMPLETIONS = [[1, 2, 3, 4], [11], [12, 13, 14, 15, 16, 17, 18, 0], [21, 22], [23, 24, 25, 0]]
TEXTS = ["a", "a", "a", "b", "b"]
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "num_labels": 1,
}


def tokens_model(pooling: Any = "mean", statistics: tuple[float, float] = (0.5, 2.0)) -> torch.nn.Module:
    torch.manual_seed(3)
    model = reward_model_from(tiny_llama()).eval()
    set_statistics(model, CompletionStatistics(*statistics, pooling))
    return model


def sequence_model(kind: Any = LlamaSequence, **changes: Any) -> Any:
    torch.manual_seed(4)
    config = (BertConfig if kind is BertForSequenceClassification else LlamaConfig)(**{**SIZES, **changes})
    return kind(config).eval()


def said(reward: RewardModel) -> list[float]:
    return reward(TEXTS, PROMPTS, COMPLETIONS)


def batch() -> TokenBatch:
    groups = [(PROMPTS[0], COMPLETIONS[:3]), (PROMPTS[3], COMPLETIONS[3:])]
    return TokenBatch.from_samples([Sample(p, [Completion(i) for i in ids]) for p, ids in groups])


@pytest.mark.parametrize("max_tokens", [1, 12, 8192])
def test_token_scores_are_pooled_as_in_the_loss(max_tokens: int) -> None:
    by_hand = plain_scores(tokens_model(), batch())
    model = tokens_model().train()
    found = said(RewardModel(model=model, max_tokens=max_tokens))
    assert found == pytest.approx([float(s.mean()) for s in by_hand], abs=1e-5)
    assert model.training
    last = [float(s[-1]) for s in by_hand]
    assert said(RewardModel(model=tokens_model("last"), max_tokens=max_tokens)) == pytest.approx(last, abs=1e-5)
    assert said(RewardModel(model=tokens_model("mean"), pooling="last")) == pytest.approx(last, abs=1e-5)


def test_rows_with_pictures_are_not_judged_blindly() -> None:
    reward = RewardModel(model=tokens_model())
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}]
    for prompts, columns in ((["a"], {"images": [["a.png"]]}), (["a"], {"video": ["a.mp4"]}), ([parts], {})):
        with pytest.raises(RewardError, match="have images or videos, which the reward model does not see"):
            reward(prompts, [[3, 4]], [[5]], **columns)
    assert reward(["a"], [[3, 4]], [[5]], images=[None]) == reward(["a"], [[3, 4]], [[5]])


def test_scaling_by_the_statistics_in_the_config() -> None:
    model = tokens_model()
    raw = said(RewardModel(model=model))
    assert said(RewardModel(model=model, scaling="zscore")) == pytest.approx([(r - 0.5) / 2 for r in raw], abs=1e-6)
    assert said(RewardModel(model=model, scaling="centre")) == pytest.approx([r - 0.5 for r in raw], abs=1e-6)
    with pytest.raises(RecipeError, match=r"pooling is 'last', and the statistics.*are those of 'mean'"):
        RewardModel(model=model, scaling="zscore", pooling="last")
    bare = reward_model_from(tiny_llama())
    with pytest.raises(ModelError, match="does not say how its loss pooled"):
        RewardModel(model=bare)
    with pytest.raises(ModelError, match=r"completion_score_mean.*scaling: none"):
        RewardModel(model=bare, pooling="mean", scaling="zscore")


def test_statistics_are_those_of_completions(tmp_path: Path) -> None:
    model = tokens_model()
    scores = torch.stack([s.mean() for s in plain_scores(model, batch())])
    samples = [Sample(p, [Completion(i)]) for p, i in zip(PROMPTS, COMPLETIONS, strict=True)]
    found = measure_completions(model, samples, max_tokens=15)
    assert (found.mean, found.std) == pytest.approx((float(scores.mean()), float(scores.std(correction=0))), abs=1e-5)
    model.save_pretrained(tmp_path)
    scaled = said(RewardModel(model=load_trained_reward_model(str(tmp_path)), scaling="zscore"))
    assert sum(scaled) == pytest.approx(0, abs=1e-4)
    assert sum(s**2 for s in scaled) == pytest.approx(5, abs=1e-3)


@pytest.mark.parametrize(
    ("kind", "pad"), [(LlamaSequence, 90), (LlamaSequence, None), (BertForSequenceClassification, 0)]
)
@pytest.mark.parametrize("max_tokens", [1, 20, 8192])
def test_any_sequence_classifier_with_one_label(kind: Any, pad: int | None, max_tokens: int) -> None:
    model = sequence_model(kind, pad_token_id=pad)
    with torch.no_grad():
        alone = [
            float(model(input_ids=torch.tensor([[*p, *c]])).logits) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
        ]
    found = said(RewardModel(model=model, max_tokens=max_tokens))
    assert found == pytest.approx(alone, abs=1e-5)
    assert len(set(found)) == 5
    with pytest.raises(RecipeError, match="a sequence classifier pools itself"):
        RewardModel(model=model, pooling="last")


def test_models_that_are_no_reward_models(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a LlamaForCausalLM; expected a token classifier"):
        RewardModel(model=tiny_llama())
    with pytest.raises(ModelError, match="has 3 labels; expected one"):
        RewardModel(model=sequence_model(num_labels=3))
    with pytest.raises(RecipeError, match="model is str; expected a loaded one"):
        RewardModel(model="some/model")
    tiny_llama().save_pretrained(tmp_path / "lm")
    with pytest.raises(ModelError, match="is LlamaForCausalLM; expected a reward model"):
        load_completion_model(str(tmp_path / "lm"))
    sequence_model(num_labels=3).save_pretrained(tmp_path / "three")
    with pytest.raises(ModelError, match="a classifier of 3 labels"):
        load_completion_model(str(tmp_path / "three"))


def test_loading(tmp_path: Path) -> None:
    sequence_model().save_pretrained(tmp_path / "sequence")
    tokens_model().save_pretrained(tmp_path / "tokens")
    for name, wanted in (("sequence", sequence_model()), ("tokens", tokens_model())):
        model = load_completion_model(str(tmp_path / name))
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
        assert said(RewardModel(model=model)) == pytest.approx(said(RewardModel(model=wanted)), abs=1e-6)
    assert isinstance(
        load_completion_model(str(tmp_path / "sequence")),
        type(AutoModelForSequenceClassification.from_config(sequence_model().config)),
    )


def test_what_does_not_fit_the_model() -> None:
    reward = RewardModel(model=sequence_model())
    with pytest.raises(RewardError, match="token id 97 is outside the reward model's vocabulary of 97"):
        reward(["a"], [[1]], [[VOCABULARY]])
    with pytest.raises(RewardError, match="70 tokens; expected at most 64"):
        reward(["a"], [[1] * 60], [[2] * 10])
    with pytest.raises(RewardError, match="empty"):
        reward(["a"], [[1]], [[]])


def test_in_a_suite_a_completion_that_cannot_be_scored_is_named() -> None:
    reward = make_reward("reward_model", model=sequence_model(), weight=2.0, name="judged", on_error="skip")
    assert reward.timeout is None
    samples = [
        Sample(p, [Completion(i)], row=f"row {n}")
        for n, (p, i) in enumerate(zip(PROMPTS, [*COMPLETIONS[:4], [3] * 63], strict=True))
    ]
    result = RewardSuite([reward]).score(TokenBatch.from_samples(samples), [""] * 5)
    wanted = said(RewardModel(model=sequence_model()))[:4]
    assert result.by_name["judged"][:4].tolist() == pytest.approx(wanted, abs=1e-5)
    assert result.outcome[:4].tolist() == pytest.approx([2 * w for w in wanted], abs=1e-5)
    assert result.valid.tolist() == [True] * 4 + [False]
    assert "row row 4" in str(result.failures[0])
    assert "65 tokens; expected at most 64" in str(result.failures[0])


def test_settings_are_checked_by_name() -> None:
    assert check_reward("reward_model", {})["scaling"] == "none"
    assert check_reward("reward_model", {"timeout": 5.0})["timeout"] == 5.0
    with pytest.raises(RecipeError, match="unknown setting 'scalling'; did you mean 'scaling'"):
        check_reward("reward_model", {"scalling": "none"})
    with pytest.raises(RecipeError, match="scaling = 'std'"):
        check_reward("reward_model", {"scaling": "std"})
    with pytest.raises(RecipeError, match="needs a model"):
        make_reward("reward_model")


@pytest.mark.parametrize("kind", ["tokens", "sequence"])
def test_another_tokenizer_reads_the_text_again(kind: str) -> None:
    policy, own = gpt2_like(), llama_like()
    own.chat_template = CHATML
    size = {"vocab_size": len(own), "max_position_embeddings": 256}
    if kind == "tokens":
        torch.manual_seed(2)
        model: Any = reward_model_from(tiny_llama(**size)).eval()
        set_statistics(model, CompletionStatistics(0, 1, "last"))
    else:
        model = sequence_model(**size)
    prompt, answers = "what colour is the sky?", [" It is blue", " no"]
    ids = policy(prompt)["input_ids"]
    completions = [[*policy(a)["input_ids"], policy.eos_token_id] for a in answers]

    def read(text: str) -> float:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([own(text, add_special_tokens=False)["input_ids"]])).logits
        return float(logits[0, -1, 0] if kind == "tokens" else logits[0, 0])

    chat = RewardModel(model=model, tokenizer=policy, reward_tokenizer=own, chat=True)
    rendered = [
        own.apply_chat_template(
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": a}], tokenize=False
        ).rstrip("\n")
        for a in answers
    ]
    assert chat([prompt] * 2, [ids] * 2, completions) == pytest.approx([read(t) for t in rendered], abs=1e-4)
    messages = [[{"role": "user", "content": prompt}]] * 2
    plain = RewardModel(model=model, tokenizer=policy, reward_tokenizer=own)
    assert plain(messages, [ids] * 2, completions) == chat([prompt] * 2, [ids] * 2, completions)
    with pytest.raises(RecipeError, match="not the policy's tokenizer"):
        RewardModel(model=model, reward_tokenizer=own)
