"""TI-DPO: weights, loss and gradient by hand, float64; attribution against finite differences of the model's logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from tests.tiny_vlms import prompt, tiny_vlm
from tokengrain import Completion, Sample, Segments, TokenBatch, make_credit, make_objective
from tokengrain.errors import DataError
from tokengrain.methods.dpo import dpo_loss
from tokengrain.methods.ti_dpo import importance_weights, ti_dpo_loss

SEGMENTS = Segments.from_lengths([4, 3])
SCORES = [0.8, 0.1, 0.6, 0.5, 0.2, 0.9, 0.4]
RATIOS = [-0.2, 0.3, 0.5, 0.05, -0.2, -0.5, 0.2]


def double(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def weights_by_hand(scores: list[float], share: float) -> list[float]:
    n = len(scores)
    prior = [math.exp(-(((t - (n - 1) / 2) / (n / 4)) ** 2) / 2) for t in range(n)]
    mixed = [share * s / sum(scores) + (1 - share) * p / sum(prior) for s, p in zip(scores, prior, strict=True)]
    return [n * m / sum(mixed) for m in mixed]


def run(**settings: float) -> tuple[Tensor, Tensor]:
    ratios = double(RATIOS).requires_grad_()
    zeros = torch.zeros(7, dtype=torch.float64)
    losses = ti_dpo_loss(ratios, SEGMENTS, ref_logps=zeros, token_rewards=double(SCORES), **settings).losses
    return losses.detach(), torch.autograd.grad(losses.sum(), ratios)[0]


def test_weights_by_hand() -> None:
    found = importance_weights(double(SCORES), SEGMENTS, 0.7, 0.25)
    expected = weights_by_hand(SCORES[:4], 0.7) + weights_by_hand(SCORES[4:], 0.7)
    torch.testing.assert_close(found, double(expected), atol=1e-15, rtol=0)
    numbers = [1.281364852821997, 0.578635147178003, 1.278635147178003, 0.861364852821997]
    torch.testing.assert_close(found[:4], double(numbers), atol=1e-15, rtol=0)
    numbers = [0.4830491001556465, 1.7539017996887074, 0.7630491001556465]
    torch.testing.assert_close(found[4:], double(numbers), atol=1e-15, rtol=0)
    alone = importance_weights(double(SCORES), SEGMENTS, 0.0, 0.25)[:2]
    torch.testing.assert_close(alone, double([1 - math.tanh(0.5), 1 + math.tanh(0.5)]), atol=1e-15, rtol=0)


def test_loss_and_gradient_by_hand() -> None:
    losses, gradient = run()
    assert losses.item() == pytest.approx(0.6246351706446437, abs=1e-15)
    chosen = [-0.05952494018443773, -0.026880105575338965, -0.05939813354944848, -0.040014123399972026]
    rejected = [0.02243972021675677, 0.08147632540874058, 0.035446931406400574]
    torch.testing.assert_close(gradient, double(chosen + rejected), atol=1e-15, rtol=0)


def test_limits() -> None:
    weights = importance_weights(torch.full((7,), 3.0, dtype=torch.float64), SEGMENTS, 1.0, 0.25)
    torch.testing.assert_close(weights, torch.ones(7, dtype=torch.float64), atol=1e-15, rtol=0)
    one = importance_weights(double([0.0]), Segments.from_lengths([1]), 0.7, 0.25)
    assert one.tolist() == [1.0]
    nothing = importance_weights(torch.zeros(7, dtype=torch.float64), SEGMENTS, 1.0, 0.25)
    assert nothing.tolist() == [1.0] * 7  # nothing to go by: DPO
    scaled = importance_weights(double(SCORES) * 50, SEGMENTS, 0.7, 0.25)
    torch.testing.assert_close(scaled, importance_weights(double(SCORES), SEGMENTS, 0.7, 0.25))


def test_equal_scores_alone_are_dpo() -> None:
    ratios, zeros = double(RATIOS), torch.zeros(7, dtype=torch.float64)
    ones = torch.ones(7, dtype=torch.float64)
    found = ti_dpo_loss(ratios, SEGMENTS, ref_logps=zeros, token_rewards=ones, importance=1.0).losses
    torch.testing.assert_close(found, dpo_loss(ratios, SEGMENTS, ref_logps=zeros, beta=0.1).losses)


def test_negative_importance_is_an_error() -> None:
    objective = make_objective("ti_dpo")
    with pytest.raises(DataError, match=r"below 0; got -1\.0; expected numbers of at least 0"):
        objective(segments=SEGMENTS, logps=double(RATIOS), ref_logps=double(RATIOS), token_rewards=-torch.ones(7))


def model() -> GPT2LMHeadModel:
    """All in float64 (Llama's norm computes in float32), with dropout that only evaluation mode switches off."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=23, n_positions=16, n_embd=12, n_layer=2, n_head=3, initializer_range=0.5)
    ).double()


def by_differences(lm: GPT2LMHeadModel, prompt: list[int], completion: list[int], step: float = 1e-5) -> Tensor:
    """The same from the model's own logits, one component of one embedding at a time."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        base = lm.get_input_embeddings()(ids)
        winner = lm(inputs_embeds=base).logits[0, -1].argmax()
        found = []
        for place in range(len(prompt), ids.shape[1]):
            total = 0.0
            for component in range(base.shape[-1]):
                values = []
                for sign in (1, -1):
                    moved = base.clone()
                    moved[0, place, component] += sign * step
                    values.append(lm(inputs_embeds=moved).logits[0, -1, winner])
                total += float((values[0] - values[1]).abs() / (2 * step))
            found.append(total)
    return torch.tensor(found, dtype=torch.float64)


def test_attribution_is_that_of_finite_differences() -> None:
    lm = model().train()
    rows = [([4, 1, 7], [[2, 5, 9, 3], [1, 8]]), ([6], [[3, 3, 11]])]
    samples = [Sample(prompt, [Completion(ids) for ids in completions]) for prompt, completions in rows]
    found = make_credit("gradient_attribution", model=lm)(TokenBatch.from_samples(samples))
    expected = torch.cat(
        [by_differences(model().eval(), prompt, ids) for prompt, completions in rows for ids in completions]
    )
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)
    assert lm.training
    assert all(p.grad is None for p in lm.parameters())


def test_tokens_that_do_not_count_have_no_number() -> None:
    lm = model()
    whole = TokenBatch.from_samples([Sample([4, 1], [Completion([2, 5, 9])])])
    part = TokenBatch.from_samples([Sample([4, 1], [Completion([2, 5, 9], counted=[True, False, True])])])
    source = make_credit("gradient_attribution", model=lm)
    assert source(part).tolist() == source(whole)[[0, 2]].tolist()


def test_attribution_behind_a_picture() -> None:
    """By the gradient of embeddings in which the features were put by hand."""
    lm, (ids, vision) = tiny_vlm("llava"), prompt("llava", [(32, 32)], "what is this ?")
    answer = [13, 17, 19]
    sample = Sample(ids, [Completion(answer)], vision=vision)
    found = make_credit("gradient_attribution", model=lm)(TokenBatch.from_samples([sample]))
    text = torch.tensor([ids + answer])
    leaf = lm.get_input_embeddings()(text).detach().requires_grad_()
    features = torch.cat(list(lm.model.get_image_features(vision.inputs["pixel_values"].double()).pooler_output))
    whole = leaf.masked_scatter((text == lm.config.image_token_id)[..., None], features)
    (gradient,) = torch.autograd.grad(lm(inputs_embeds=whole).logits[0, -1].max(), leaf)
    torch.testing.assert_close(found.double(), gradient[0, len(ids) :].abs().sum(-1), atol=1e-6, rtol=1e-6)
    blind = Sample(ids, [Completion(answer)], vision=prompt("llava", [(32, 32)], "what is this ?", seed=5)[1])
    other = make_credit("gradient_attribution", model=lm)(TokenBatch.from_samples([blind]))
    assert not torch.allclose(found, other, rtol=1e-3)
