"""`Seq2SeqGenerate`: an encoder-decoder's answers are those of its own `generate`, however prompts are batched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.data.test_encoder_prompts import around
from tests.scoring.encdec import tiny_seq2seq
from tests.scoring.models import tiny
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.dataset import prepare_pairs
from tokengrain.errors import ModelError, RolloutError
from tokengrain.rollout.local import HFContinuous, HFGenerate, Seq2SeqGenerate, answering
from tokengrain.rollout.sampler import PromptItem, SamplingConfig, encode_prompts
from tokengrain.scoring.score import score

PROMPTS = [PromptItem([3, 4, 5, 6, 7, 8, 9], row=0), PromptItem([10, 11], row=1), PromptItem([12, 13, 14], row=2)]
GREEDY = SamplingConfig(temperature=0, max_new_tokens=12, stop_ids=(2, 9))


def seq2seq(name: str, **changes: Any) -> Any:
    return tiny_seq2seq(name, dtype=torch.float32, **changes).eval()


@pytest.mark.parametrize(
    ("name", "forced"), [("t5", None), ("bart", None), ("mbart", 7), ("switch", None), ("marian", 5)]
)
def test_greedy_answers_are_those_of_transformers(name: str, forced: int | None) -> None:
    model = seq2seq(name)
    model.generation_config.forced_bos_token_id = forced
    if name == "marian":  # the most probable token, were it not banned
        model.final_logits_bias[:, 11] = 50.0
        model.generation_config.bad_words_ids = [[11], [5, 6]]
    sampler = answering(model, None)
    assert type(sampler) is Seq2SeqGenerate
    found = sampler.sample(PROMPTS, n=2, sampling=GREEDY)
    for prompt, group in found:
        ids = torch.tensor([prompt.ids])
        options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "num_beams": 1, "eos_token_id": [2, 9]}
        own = model.generate(ids, **options, pad_token_id=0)[0, 1:].tolist()
        assert [c.ids for c in group] == [own, own]
    assert len({tuple(c.ids) for c in found.completions}) > 1
    assert forced is None or {c.ids[0] for c in found.completions} == {forced}


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_drawn_answers_have_the_log_probabilities_that_scoring_gives(name: str) -> None:
    model, sampling = seq2seq(name), SamplingConfig(temperature=0.7, max_new_tokens=9, stop_ids=(2,), seed=3)
    found = Seq2SeqGenerate(model).sample(PROMPTS, n=4, sampling=sampling)
    assert len({tuple(c.ids) for c in found.completions}) > 8
    batch = found.to_batch()
    scored = score(model, batch, temperature=0.7).logps
    torch.testing.assert_close(batch.columns["sampling_logps"], scored.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch.columns["raw_logps"], score(model, batch).logps.detach(), rtol=1e-4, atol=1e-4)
    one_by_one = Seq2SeqGenerate(model, max_batch_tokens=1).sample(PROMPTS[::-1], n=4, sampling=sampling)
    assert [[c.ids for c in group] for group in one_by_one.groups[::-1]] == [[c.ids for c in g] for g in found.groups]


def test_prompt_and_answer_have_positions_of_their_own() -> None:
    sampler = Seq2SeqGenerate(seq2seq("bart"))  # 64 positions
    long = [PromptItem([3] * 40)]
    sampler.sample(long, n=1, sampling=SamplingConfig(temperature=0, max_new_tokens=40, stop_ids=(2,)))
    with pytest.raises(RolloutError, match=r"row 0: 40 prompt tokens and max_new_tokens 65 .* 64 positions"):
        sampler.sample(long, n=1, sampling=SamplingConfig(temperature=0, max_new_tokens=65, stop_ids=(2,)))


@pytest.mark.parametrize("sampler", [HFGenerate, HFContinuous])
def test_samplers_of_online_training_say_why_not(sampler: Any) -> None:
    with pytest.raises(
        ModelError, match="is an encoder-decoder; expected a causal language model, for sampling, which"
    ):
        sampler(seq2seq("t5"))
    with pytest.raises(ModelError, match="LlamaForCausalLM is no encoder-decoder"):
        Seq2SeqGenerate(tiny("llama"))


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_are_those_of_offline_training(side: Any) -> None:
    """With the special tokens around them, also where they are cut."""
    tokenizer = around("<s> $A </s>")
    row = {"prompt": "the sky is blue and black", "chosen": "a", "rejected": "b"}
    for longest in (None, 4):
        config = TokenizeConfig(prompt_role="encoder", max_prompt_length=longest, truncation_side=side)
        (item,), (sample,) = encode_prompts([row], tokenizer, config), prepare_pairs([row], tokenizer, config).samples
        assert item.ids == sample.prompt_ids
        assert item.ids[-1] == tokenizer.eos_token_id
