"""Credit from trained models and from the base model's uncertainty: contrastive DPO, TDPO, surprise, entropy."""

from __future__ import annotations

import pytest
import torch

from tests.credit.small import llama, pairs, tokenizer
from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.method import make_credit
from tokengrain.scoring.reference import FrozenReference
from tokengrain.scoring.score import score


@pytest.fixture
def batch() -> TokenBatch:
    return pairs(tokenizer(), holes=True)


def test_contrastive_dpo_is_the_difference_of_two_guides(batch: TokenBatch) -> None:
    normal, reverse, reference = llama(1), llama(2), llama(3)
    found = make_credit("contrastive_dpo", model=normal, reverse=FrozenReference(reverse), beta=0.3)(batch)
    guides = [make_credit("guide", model=m, reference=reference, beta=0.3)(batch) for m in (normal, reverse)]
    torch.testing.assert_close(found, guides[0] - guides[1])
    assert not found.requires_grad
    assert torch.equal(make_credit("contrastive_dpo", model=normal, reverse=llama(1))(batch), torch.zeros_like(found))


class TestTDPO:
    def test_equals_the_formula_with_all_logits(self, batch: TokenBatch) -> None:
        model, reference = llama(1), llama(2)
        found = make_credit("tdpo", model=model, reference=reference, beta=0.2)(batch)
        assert found.shape == (batch.segments.total,)
        # By hand, for the last token of the first completion.
        ids = torch.cat([batch.prompt(0), batch.completion(0)])[None]
        with torch.no_grad():
            logp, logq = (m(ids).logits[0, -2].log_softmax(-1) for m in (model, reference))
        expected = 0.2 * (logp - logq)[ids[0, -1]] + 0.2 * (logq.exp() * (logq - logp)).sum()
        assert found[int(batch.segments.offsets[1]) - 1].item() == pytest.approx(expected.item(), rel=1e-9)

    def test_mean_over_the_references_tokens_is_zero(self) -> None:
        model, reference = llama(1), llama(2)
        prompt, vocabulary = [1, 5, 6], model.config.vocab_size
        every = TokenBatch.from_samples([Sample(prompt, [Completion([v]) for v in range(vocabulary)])])
        credit = make_credit("tdpo", model=model, reference=reference)(every)
        q = score(reference, every).logps.exp()  # type: ignore[union-attr]
        assert float((q * credit).sum()) == pytest.approx(0, abs=1e-12)
        assert float(credit.abs().max()) > 1e-3

    def test_models_called_like_references_give_the_same(self, batch: TokenBatch) -> None:
        model, reference = llama(1), llama(2)
        plain = make_credit("tdpo", model=model, reference=reference)(batch)
        wrapped = make_credit("tdpo", model=FrozenReference(model), reference=FrozenReference(reference))(batch)
        torch.testing.assert_close(wrapped, plain)

    def test_a_model_that_did_not_move_gives_zero(self, batch: TokenBatch) -> None:
        credit = make_credit("tdpo", model=llama(1), reference=llama(1))(batch)
        torch.testing.assert_close(credit, torch.zeros_like(credit), atol=1e-12, rtol=0)


def test_surprise_and_entropy_read_the_models_distribution(batch: TokenBatch) -> None:
    model = llama(4).train()
    scores = score(llama(4), batch, ("logps", "entropy"))
    for scorer in (model, FrozenReference(llama(4))):
        torch.testing.assert_close(make_credit("surprise", model=scorer)(batch), scores.logps.detach())  # type: ignore[union-attr]
        torch.testing.assert_close(make_credit("entropy", model=scorer)(batch), scores.entropy.detach())  # type: ignore[union-attr]
    assert model.training
    assert not make_credit("entropy", model=model)(batch).requires_grad


def test_fingerprints_tell_settings_and_weights_apart() -> None:
    found = [
        make_credit("contrastive_dpo", model=llama(1), reverse=llama(2)),
        make_credit("contrastive_dpo", model=llama(1), reverse=llama(3)),
        make_credit("contrastive_dpo", model=llama(1), reverse=llama(2), beta=0.2),
        make_credit("tdpo", model=llama(1), reference=llama(2)),
        make_credit("tdpo", model=llama(3), reference=llama(2)),
        make_credit("surprise", model=llama(1)),
        make_credit("surprise", model=llama(2)),
        make_credit("entropy", model=llama(1)),
    ]
    assert len({source.fingerprint() for source in found}) == len(found)
    assert make_credit("surprise", model=llama(1)).fingerprint() == found[5].fingerprint()
