"""A reward model's token scores as credit: scaling, broadcasting, and reward models with another tokenizer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.credit.small import llama, pairs, tokenizer
from tests.data.tokenizers import CHATML, LLAMA2, byt5, gpt2_like, llama_like, merging_bpe, unigram
from tests.training.tiny import tiny_llama
from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.data.dataset import collate, prepare_pairs
from tokengrain.errors import DataError, ModelError, RecipeError
from tokengrain.method import make_credit
from tokengrain.methods._other_tokens import Retokenizer, same_tokens
from tokengrain.models import reward_model_from
from tokengrain.scoring.token_scores import ScoreStatistics, set_statistics

TEXTS = (
    ("what colour is the sky?", " It is blue — naïve 😀.", " The sea"),
    ("Question: two and two?", " four", " 日本語 six."),
)


def plain_scores(model: torch.nn.Module, batch: TokenBatch) -> list[Tensor]:
    """Per completion, the head's output at each counted token itself, one forward pass each."""
    out = []
    with torch.no_grad():
        for c in range(batch.n_completions):
            prompt = batch.prompt(int(batch.group[c]))
            logits = model(input_ids=torch.cat([prompt, batch.completion(c)])[None]).logits[0, len(prompt) :, 0]
            start, end = batch.completion_offsets[c : c + 2].tolist()
            out.append(logits[batch.counted[start:end]])
    return out


def reward_model(statistics: tuple[float, float] | None = (0.3, 2.0)) -> torch.nn.Module:
    torch.manual_seed(1)
    model = reward_model_from(llama())
    if statistics is not None:
        set_statistics(model, ScoreStatistics(*statistics))
    return model


def reading(tok: Any) -> torch.nn.Module:
    """A reward model for a tokenizer."""
    torch.manual_seed(2)
    made = reward_model_from(tiny_llama(vocab_size=len(tok), max_position_embeddings=256).double().eval())
    set_statistics(made, ScoreStatistics(0.0, 1.0))
    return made


def batch_of(tok: Any, *, eos: bool = True, texts: Any = TEXTS) -> TokenBatch:
    samples = []
    for row, (prompt, *sides) in enumerate(texts):
        ids = tok(prompt, add_special_tokens=False)["input_ids"]
        tail = [tok.eos_token_id] if eos else []
        both = [Completion(tok(s, add_special_tokens=False)["input_ids"] + tail) for s in sides]
        samples.append(Sample(ids, both, row=f"r{row}", raw={"prompt": prompt}))
    return TokenBatch.from_samples(samples)


def test_scores_at_the_tokens_themselves_scaled_three_ways() -> None:
    model, batch = reward_model(), pairs(tokenizer(), holes=True)
    model.train()
    wanted = torch.cat(plain_scores(copy.deepcopy(model).eval(), batch))
    raw = make_credit("reward_model", model=model, scaling="none")(batch)
    torch.testing.assert_close(raw, wanted.float(), atol=1e-6, rtol=1e-5)
    assert raw.shape == (batch.segments.total,)
    assert not raw.requires_grad
    assert model.training
    torch.testing.assert_close(make_credit("reward_model", model=model)(batch), (raw - 0.3) / 2.0)
    torch.testing.assert_close(make_credit("reward_model", model=model, scaling="centre")(batch), raw - 0.3)


def test_constant_scores_give_zero_and_missing_statistics_are_an_error() -> None:
    batch = pairs(tokenizer())
    assert not make_credit("reward_model", model=reward_model((0.3, 0.0)))(batch).any()
    bare = reward_model(None)
    with pytest.raises(ModelError, match=r"token_score_mean.*measure_scores"):
        make_credit("reward_model", model=bare)
    assert make_credit("reward_model", model=bare, scaling="none")(batch).any()


def test_settings_are_checked() -> None:
    with pytest.raises(RecipeError, match="'zscore', 'centre' or 'none'"):
        make_credit("reward_model", model=reward_model(), scaling="std")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="'last'"):
        make_credit("reward_model", model=reward_model(), broadcast="first")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="policy's tokenizer"):
        make_credit("reward_model", model=reward_model(), reward_tokenizer=tokenizer())


def test_what_its_numbers_mean() -> None:
    assert make_credit("reward_model", model=reward_model()).values == "signed"
    assert make_credit("reward_model", model=reward_model(), scaling="none").values == "order"


def test_last_score_for_all_tokens() -> None:
    model, batch = reward_model(), pairs(tokenizer())
    own = batch.segments.split(make_credit("reward_model", model=model)(batch))
    got = batch.segments.split(make_credit("reward_model", model=model, broadcast="last")(batch))
    for mine, all_alike in zip(own, got, strict=True):
        assert torch.equal(all_alike, mine[-1:].expand(len(mine)))


def test_fingerprint_follows_weights_statistics_settings_and_tokenizers() -> None:
    base = make_credit("reward_model", model=reward_model()).fingerprint()
    assert base == make_credit("reward_model", model=reward_model()).fingerprint()
    other = reward_model()
    with torch.no_grad():
        other.score.weight.add_(1e-3)  # type: ignore[union-attr]
    made = {
        base,
        make_credit("reward_model", model=other).fingerprint(),
        make_credit("reward_model", model=reward_model((0.3, 2.1))).fingerprint(),
        make_credit("reward_model", model=reward_model(), scaling="centre").fingerprint(),
        make_credit("reward_model", model=reward_model(), broadcast="last").fingerprint(),
        make_credit("reward_model", model=reward_model(), tokenizer=byt5(), reward_tokenizer=tokenizer()).fingerprint(),
    }
    assert len(made) == 6


def test_which_tokenizers_are_the_same() -> None:
    assert same_tokens(gpt2_like(), gpt2_like())
    assert same_tokens(gpt2_like(), gpt2_like(CHATML))  # the policy's template made the ids
    assert not same_tokens(gpt2_like(LLAMA2), gpt2_like(CHATML))
    assert not same_tokens(gpt2_like(), unigram())


@pytest.mark.parametrize("make", [merging_bpe, gpt2_like, unigram, byt5, tokenizer])
def test_reading_again_with_the_same_tokenizer_changes_nothing(make: Any) -> None:
    """The other road, taken on purpose: same ids, same spans, same scores (an identity of the rule)."""
    tok = make()
    known = [("the sea was", " calm and deep", " cruel in the sun")] if make is tokenizer else TEXTS
    known = [("what colour is the sky?", " It is blue.", " The sea")] if make is unigram else known
    rows = [dict(zip(("prompt", "chosen", "rejected"), texts)) for texts in known]
    batch = collate([*prepare_pairs(rows, tok)])
    other, places = Retokenizer(tok, tok)(batch)
    assert other.completion_ids.tolist() == batch.completion_ids.tolist()
    assert other.prompt_ids.tolist() == batch.prompt_ids.tolist()
    credit = make_credit("reward_model", model=reading(tok))
    again = make_credit("reward_model", model=credit.model)
    again.retokenizer = Retokenizer(tok, tok)
    own, mapped = credit(batch), again(batch)
    # Bytes of one character get the mean of its bytes; all other tokens their own score.
    alone = torch.tensor([p.policy.count(s) == 1 or s[0] == s[1] for p in places for s in p.policy])
    assert bool(alone.all()) or make not in (tokenizer, unigram)
    assert int(alone.sum()) > 3
    torch.testing.assert_close(mapped[alone], own[alone], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("policy", "reward"), [(byt5, merging_bpe), (merging_bpe, byt5), (gpt2_like, llama_like)])
def test_another_tokenizer(policy: Any, reward: Any) -> None:
    """Every character's score, averaged over a policy token, by hand."""
    tok, other = policy(), reward()
    model, batch = reading(other), batch_of(tok)
    credit = make_credit("reward_model", model=model, tokenizer=tok, reward_tokenizer=other)
    reread, places = Retokenizer(tok, other)(batch)
    scores = plain_scores(model, reread)
    got = batch.segments.split(credit(batch))
    for c, place in enumerate(places):
        text = "".join(TEXTS[c // 2][i] for i in (0, 1 + c % 2))
        assert len(place.reward) == len(scores[c])
        assert len(place.policy) == len(got[c])
        by_character: dict[int, list[float]] = {}
        for (low, high), value in zip(place.reward, scores[c].tolist(), strict=True):
            for position in range(low, high):
                by_character.setdefault(position, []).append(value)
        assert max(by_character) == len(text) - 1
        for (low, high), value in zip(place.policy[:-1], got[c][:-1].tolist(), strict=True):
            pool = [v for position in range(low, high) for v in by_character[position]]
            assert value == pytest.approx(sum(pool) / len(pool), abs=1e-5)
        assert place.policy[-1] == (len(text), len(text))
        assert float(got[c][-1]) == pytest.approx(float(scores[c][-1]), abs=1e-5)  # EOS for EOS
        assert reread.completion(c)[-1] == other.eos_token_id


def test_a_completion_cut_short_gets_no_eos() -> None:
    tok, other = byt5(), merging_bpe()
    reread, _ = Retokenizer(tok, other)(batch_of(tok, eos=False))
    assert other.eos_token_id not in reread.completion_ids.tolist()


def test_half_a_character_is_judged_by_eos() -> None:
    tok, other = byt5(), merging_bpe()
    ids = tok("日", add_special_tokens=False)["input_ids"][:1]
    sample = Sample(tok("the sky", add_special_tokens=False)["input_ids"], [Completion(ids), Completion([*ids, 75])])
    batch = TokenBatch.from_samples([sample])
    model = reading(other)
    reread, _ = Retokenizer(tok, other)(batch)
    assert reread.completion(0).tolist() == [other.eos_token_id]
    got = make_credit("reward_model", model=model, tokenizer=tok, reward_tokenizer=other)(batch)
    assert float(got[0]) == pytest.approx(float(plain_scores(model, reread)[0]), abs=1e-5)


def test_credit_does_not_depend_on_the_batch() -> None:
    tok, other = byt5(), merging_bpe()
    credit = make_credit("reward_model", model=reading(other), tokenizer=tok, reward_tokenizer=other)
    batch = batch_of(tok)
    alone = torch.cat([credit(batch.select([g])) for g in range(batch.n_prompts)])
    torch.testing.assert_close(credit(batch), alone, atol=1e-6, rtol=1e-5)


def chat_batch(tok: Any, *, eos: bool = True) -> TokenBatch:
    messages = [{"role": "user", "content": "what colour is the sky?"}]
    prompt = tok.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    tail = [tok.eos_token_id] if eos else []
    both = [Completion(tok(s, add_special_tokens=False)["input_ids"] + tail) for s in (" It is blue. ", " Green.")]
    return TokenBatch.from_samples([Sample(list(prompt), both, row=7, raw={"prompt": messages})])


@pytest.mark.parametrize("eos", [True, False])
def test_messages_go_through_the_reward_models_template(eos: bool) -> None:
    tok, other = gpt2_like(LLAMA2), merging_bpe(template=CHATML)
    reread, places = Retokenizer(tok, other)(chat_batch(tok, eos=eos))
    prompt = "<|im_start|>user\nwhat colour is the sky?<|im_end|>\n<|im_start|>assistant\n"
    assert other.decode(reread.prompt(0).tolist()) == prompt
    end = "<|im_end|>" if eos else ""
    # What the tokens of the policy say, its leading and trailing spaces included.
    assert other.decode(reread.completion(1).tolist()).strip() == f"Green.{end}"
    text = prompt + other.decode(reread.completion(1).tolist())
    low, high = places[1].policy[0][0], places[1].policy[-2 if eos else -1][1]
    assert text[low:high].strip() == "Green."


def test_several_turns_need_the_policys_tokenizer() -> None:
    batch = pairs(tokenizer(), holes=True)
    with pytest.raises(DataError, match=r"row r0.*several turns"):
        Retokenizer(tokenizer(), byt5())(batch)


def test_messages_without_a_template_are_refused() -> None:
    tok = gpt2_like(LLAMA2)
    with pytest.raises(ModelError, match="chat template"):
        Retokenizer(tok, merging_bpe())(chat_batch(tok))
