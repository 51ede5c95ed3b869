"""`values` of token-classification models: a critic's, read at the position that predicts the token."""

import pytest
import torch

from tests.scoring.models import gradients, small_batch, standard_batch, texts, tiny
from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.errors import ModelError
from tokengrain.scoring.prepare import prepare
from tokengrain.scoring.score import score

WANT = ("values",)


def plain(model, batch) -> torch.Tensor:
    """Each text alone: the model's score at the position before every counted token."""
    return torch.cat([model(input_ids=text[None]).logits[0, positions - 1, 0] for text, positions in texts(batch)])


@pytest.mark.parametrize("layout", ["shared", "separate", "auto"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_layouts_equal_plain_transformers(name, layout):
    model, batch = tiny(name, scorer=True).eval(), standard_batch()
    assert prepare(model, layout=layout).head == "fused"
    expected = plain(model, batch)
    grads = gradients(model, {"values": expected})
    got = score(model, batch, WANT).values
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6, check_dtype=False)
    own = gradients(model, {"values": got})
    scale = max(float(g.abs().max()) for g in grads.values())
    assert own.keys() == grads.keys()
    assert all(float((own[n] - grads[n]).abs().max()) < 5e-6 * scale for n in grads)


def test_the_action_is_not_seen():
    """The value of a token does not depend on the token, only on what came before; a token score does."""
    model = tiny("llama", scorer=True).eval()

    def batch(*ids: int) -> TokenBatch:
        return TokenBatch.from_samples([Sample([5, 6], [Completion(list(ids))])])

    first, second = (score(model, batch(7, 8, last), WANT).values for last in (9, 10))
    torch.testing.assert_close(first, second)
    assert float((score(model, batch(11, 8, 9), WANT).values - first)[1:].abs().min().detach()) > 1e-4
    # One place to the left of the token scores.
    torch.testing.assert_close(first[1:], score(model, batch(7, 8, 9), ("token_scores",)).token_scores[:-1])


def test_completions_of_a_prompt_start_at_one_value():
    batch = small_batch()
    values = score(tiny("llama", scorer=True).eval(), batch, WANT).values
    firsts = values[batch.segments.offsets[:-1]]
    torch.testing.assert_close(firsts[0], firsts[1])
    assert float((firsts[0] - firsts[2]).abs().detach()) > 1e-6


def test_through_the_models_own_logits():
    model = tiny("llama", scorer=True).eval()

    class Odd(type(model)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits.tanh() + 1
            return out

    model.__class__ = Odd
    with pytest.warns(UserWarning, match="its scores are not its head's"):
        got = score(model, standard_batch(), WANT).values
    torch.testing.assert_close(got, plain(model, standard_batch()), rtol=0, atol=1e-6)


def test_what_is_refused():
    with pytest.raises(ModelError, match="LlamaForCausalLM predicts tokens and does not score them; 'values' needs"):
        score(tiny("llama"), small_batch(), WANT)
    with pytest.raises(ModelError, match="ask for one at a time"):
        score(tiny("llama", scorer=True), small_batch(), ("token_scores", "values"))
