"""Q-RM: the loss, and the token scores of a reward model as credit."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.credit.small import llama, pairs, tokenizer
from tests.data.tokenizers import CHATML, LLAMA2, byt5, gpt2_like, llama_like, merging_bpe, unigram
from tests.methods.examples import F64, example, finite_difference, gradient, mean_loss
from tests.training.tiny import tiny_llama
from tokengrain.batch import Completion, Sample, Segments, TokenBatch
from tokengrain.data.dataset import prepare_pairs
from tokengrain.errors import DataError, ModelError, RecipeError
from tokengrain.loss import Counts, LossOutput, make_normaliser
from tokengrain.method import make_credit
from tokengrain.methods._clipped import value_loss
from tokengrain.methods._other_tokens import Retokenizer, same_tokens
from tokengrain.methods.ppo import ppo_policy_loss, reinforce_loss
from tokengrain.methods.qrm import qrm_loss
from tokengrain.models import reward_model_from
from tokengrain.scoring.token_scores import ScoreStatistics, pooled_scores, set_statistics

LENGTHS = (4, 2, 1, 5, 3, 3)


@pytest.fixture
def segments() -> Segments:
    return Segments.from_lengths(LENGTHS)


@pytest.fixture
def scores(segments: Segments) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return (3 * torch.randn(segments.total, dtype=F64, generator=generator)).requires_grad_()


def test_beta_0_is_softplus_of_gamma_without_gradient(scores: Tensor, segments: Segments) -> None:
    output = qrm_loss(scores, segments, beta=0.0, gamma=1.3)
    torch.testing.assert_close(output.losses, torch.full((3,), math.log1p(math.exp(1.3)), dtype=F64))
    assert bool((torch.autograd.grad(output.losses.sum(), scores)[0] == 0).all())
    almost = qrm_loss(scores, segments, beta=1e-12, gamma=0.0)
    torch.testing.assert_close(almost.losses, torch.full((3,), math.log(2), dtype=F64))


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_constant_on_all_scores_changes_nothing(scores: Tensor, segments: Segments, pooling: str) -> None:
    base = qrm_loss(scores, segments, pooling=pooling).losses
    torch.testing.assert_close(qrm_loss(scores + 7.5, segments, pooling=pooling).losses, base)


def test_doubling_every_token_changes_nothing(scores: Tensor, segments: Segments) -> None:
    doubled = Segments.from_lengths([2 * n for n in LENGTHS])
    torch.testing.assert_close(qrm_loss(scores.repeat_interleave(2), doubled).losses, qrm_loss(scores, segments).losses)


def test_single_tokens_are_bradley_terry_with_a_margin() -> None:
    scores, segments = torch.tensor([1.5, -0.5, 0.2, 0.9], dtype=F64), Segments.from_lengths([1, 1, 1, 1])
    gap = torch.tensor([2.0, -0.7], dtype=F64)
    for pooling in ("mean", "last"):
        losses = qrm_loss(scores, segments, beta=0.4, gamma=0.6, pooling=pooling).losses
        torch.testing.assert_close(losses, torch.log1p(torch.exp(0.6 - 0.4 * gap)))


def test_gradient_is_the_same_on_all_tokens_of_a_completion(scores: Tensor, segments: Segments) -> None:
    beta, gamma = 0.3, 1.1
    found = gradient(lambda z: mean_loss(qrm_loss(z, segments, beta=beta, gamma=gamma), segments), scores)
    gap = qrm_loss(scores, segments).metrics["rewards/margins"]
    total = beta * torch.sigmoid(gamma - beta * gap) / 3
    signed = torch.stack([-total, total], dim=1).flatten()
    torch.testing.assert_close(found, segments.broadcast(signed / segments.lengths), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(segments.sum(found), signed)


def test_last_token_pooling_trains_last_tokens_alone(scores: Tensor, segments: Segments) -> None:
    output = qrm_loss(scores, segments, pooling="last")
    ends = segments.offsets[1:] - 1
    torch.testing.assert_close(output.metrics["rewards/chosen"], scores.detach()[ends][0::2])
    grad = torch.autograd.grad(output.losses.sum(), scores)[0]
    assert grad.nonzero().flatten().tolist() == ends.tolist()


def test_pairs_with_an_empty_side_are_not_valid() -> None:
    segments = Segments.from_lengths([2, 0, 0, 1, 1, 1])
    scores = torch.tensor([3.0, 1.0, -2.0, 1.0, 0.0], dtype=F64, requires_grad=True)
    for pooling in ("mean", "last"):
        output = qrm_loss(scores, segments, pooling=pooling)
        assert output.metrics["valid"].tolist() == [0, 0, 1]
        assert output.losses[:2].tolist() == [0, 0]
        grad = torch.autograd.grad(output.losses.sum(), scores)[0]
        assert grad[:3].tolist() == [0, 0, 0]


def test_half_precision_scores_are_averaged_in_float32() -> None:
    scores, segments = torch.full((4097,), 1.0).to(torch.bfloat16), Segments.from_lengths([4096, 1])
    pooled = pooled_scores(scores, segments)
    assert pooled.dtype == torch.float32
    assert pooled.tolist() == [1, 1]


def test_metrics_and_order(scores: Tensor, segments: Segments) -> None:
    metrics = qrm_loss(scores, segments).metrics
    assert metrics["rewards/accuracies"].tolist() == [float(v > 0) for v in metrics["rewards/margins"]]
    assert all(not v.requires_grad and v.shape == (3,) for v in metrics.values())
    pieces = scores.split(LENGTHS)
    order = [4, 5, 0, 1, 2, 3]
    other = qrm_loss(torch.cat([pieces[c] for c in order]), Segments.from_lengths([LENGTHS[c] for c in order]))
    torch.testing.assert_close(other.losses, qrm_loss(scores, segments).losses[[2, 0, 1]])


class TestPolicyLosses:
    """What trains a policy on token scores."""

    def _mean(self, output: LossOutput, segments: Segments) -> Tensor:
        return make_normaliser("token_mean")(output, Counts.of(segments, pairs=False))

    def test_on_policy_ppo_without_clip_is_reinforce(self) -> None:
        x = example()
        A = x.token_rewards
        for clip in (None, 0.2):
            ppo = gradient(
                lambda p, clip=clip: self._mean(
                    ppo_policy_loss(p, x.segments, old_logps=x.logps, advantages=A, clip_range=clip), x.segments
                ),
                x.logps,
            )
            reinforce = gradient(lambda p: self._mean(reinforce_loss(p, x.segments, advantages=A), x.segments), x.logps)
            torch.testing.assert_close(ppo, reinforce)
            torch.testing.assert_close(ppo, -A / x.segments.total)

    def test_clipping_stops_the_gradient_where_it_should(self) -> None:
        segments = Segments.from_lengths([5])
        old = torch.zeros(5, dtype=F64)
        logps = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.1], dtype=F64).requires_grad_()
        A = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=F64)
        output = ppo_policy_loss(logps, segments, old_logps=old, advantages=A, clip_range=0.2)
        grad = torch.autograd.grad(output.losses.sum(), logps)[0]
        assert grad[[0, 3]].tolist() == [0, 0]  # already moved far enough the way A asks
        torch.testing.assert_close(grad[[1, 2, 4]], (-A * logps.exp())[[1, 2, 4]].detach())
        assert output.metrics["ratio/outside"].item() == pytest.approx(0.8)

    def test_no_gradient_to_advantages_old_log_probabilities_or_returns(self) -> None:
        x = example()
        old, A = (v.clone().requires_grad_() for v in (x.ref_logps, x.token_rewards))
        losses = [
            ppo_policy_loss(x.logps, x.segments, old_logps=old, advantages=A).losses,
            reinforce_loss(x.logps, x.segments, advantages=A).losses,
            value_loss(x.logps, x.segments, returns=A).losses,
        ]
        for loss in losses:
            grads = torch.autograd.grad(loss.sum(), (x.logps, old, A), allow_unused=True, retain_graph=True)
            assert grads[0].abs().max() > 0
            assert grads[1] is None
            assert grads[2] is None

    def test_gradients_by_finite_differences(self) -> None:
        x = example()
        near = (x.logps + 0.3 * x.token_rewards).detach()

        def ppo(p: Tensor) -> Tensor:
            return ppo_policy_loss(p, x.segments, old_logps=near, advantages=x.ref_logps + 1).losses.sum()

        def value(v: Tensor) -> Tensor:
            return value_loss(v, x.segments, returns=near, weight=0.5, reduction="mean").losses.sum()

        for loss in (ppo, value):
            torch.testing.assert_close(gradient(loss, x.logps), finite_difference(loss, x.logps), rtol=1e-6, atol=1e-8)

    def test_length_normalised_losses_are_means(self) -> None:
        x = example((3, 3, 3, 3))
        A = x.token_rewards
        for summed, mean in (
            [reinforce_loss(x.logps, x.segments, advantages=A, reduction=r) for r in ("sum", "mean")],
            [value_loss(x.logps, x.segments, returns=A, reduction=r) for r in ("sum", "mean")],
        ):
            torch.testing.assert_close(summed.losses, 3 * mean.losses)
            assert summed.unit == mean.unit == "completions"

    def test_empty_completions_count_as_zero(self) -> None:
        segments, none = Segments.from_lengths([0, 0]), torch.zeros(0, dtype=F64, requires_grad=True)
        for reduction in ("sum", "mean"):
            for output in (
                ppo_policy_loss(none, segments, old_logps=none, advantages=none, reduction=reduction),
                reinforce_loss(none, segments, advantages=none, reduction=reduction),
                value_loss(none, segments, returns=none, reduction=reduction),
            ):
                assert output.losses.tolist() == [0, 0]
                assert all(torch.isfinite(v).all() for v in output.metrics.values())


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
        make_credit("reward_model", model=reward_model(), scaling="std")
    with pytest.raises(RecipeError, match="'last'"):
        make_credit("reward_model", model=reward_model(), broadcast="first")
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
        other.score.weight.add_(1e-3)
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
    batch = TokenBatch.from_samples([*prepare_pairs(rows, tok)])
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
