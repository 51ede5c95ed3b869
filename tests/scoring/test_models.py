"""shared == separate == each text alone through plain transformers, values and gradients, float64."""

import warnings

import pytest
import torch
import transformers

from tests.scoring.models import SEPARATE, SHARING, batch_of, gradients, plain, small_batch, standard_batch, tiny
from tokengrain.errors import ModelError
from tokengrain.scoring.layouts import MaskForm
from tokengrain.scoring.prepare import prepare
from tokengrain.scoring.score import Scores, distribution_of, score

WANT = ("logps", "entropy", "kl")
# Many models normalise and take softmax in float32 whatever their type: sums in another order differ.
TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 5e-6


def fields(scores: Scores) -> dict[str, torch.Tensor]:
    return {name: getattr(scores, name) for name in WANT}


def expected_of(model, ref, batch) -> tuple[dict, dict]:
    out = plain(model, batch, ref)
    return {k: v.detach() for k, v in out.items()}, gradients(model, out)


def check(model, ref, batch, expected, **kwargs) -> None:
    values, expected_grads = expected
    got = fields(score(model, batch, WANT, reference=distribution_of(ref, batch), **kwargs))
    for name in WANT:
        torch.testing.assert_close(got[name], values[name], rtol=0, atol=TOLERANCE, check_dtype=False)
    grads = gradients(model, got)
    # A parameter that plain text trains and we do not, or the other way round, must have no gradient.
    scale = max(float(g.abs().max()) for g in expected_grads.values())
    for name in expected_grads.keys() | grads.keys():
        zero = torch.zeros_like(dict(model.named_parameters())[name])
        a, b = grads.get(name, zero), expected_grads.get(name, zero)
        assert float((a - b).abs().max()) <= GRADIENT_TOLERANCE * scale, name


def pair(name: str, **changes):
    """A model and a reference of the same kind with other weights, both without random routing."""
    model, ref = tiny(name, **changes).eval(), tiny(name, **changes).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in ref.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.1 * noise)
    return model, ref


@pytest.mark.parametrize("name", SHARING)
def test_layouts_equal_plain_transformers(name):
    model, ref = pair(name)
    batch = standard_batch()
    expected = expected_of(model, ref, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for layout in ("shared", "separate", "auto"):
            check(model, ref, batch, expected, layout=layout)
    assert prepare(model, layout="auto").masks is not None


@pytest.mark.parametrize("name", ["gemma2", "mistral"])
def test_eager_attention(name):
    model, ref = pair(name, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    batch = small_batch()
    check(model, ref, batch, expected_of(model, ref, batch), layout="shared")


@pytest.mark.parametrize("name", SEPARATE)
def test_models_that_cannot_share_run_separately_with_one_message(name):
    model, ref = pair(name)
    batch = small_batch()
    with pytest.warns(UserWarning, match=f"{type(model).__name__} cannot share prompts, so") as caught:
        prepare(model)
    assert len([w for w in caught if "cannot share prompts" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        prepare(model)
        score(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        check(model, ref, batch, expected_of(model, ref, batch), layout="auto")
    with pytest.raises(ModelError, match=f"{type(model).__name__} cannot share prompts"):
        prepare(model, layout="shared")


@pytest.mark.parametrize("name", ["mamba", "recurrent_gemma", "lfm2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_probe_itself_finds_state_that_leaks_between_branches(name, dtype, monkeypatch):
    """Not the config: here every model is said to take one mask."""
    monkeypatch.setattr("tokengrain.scoring.prepare.mask_forms", lambda config: [MaskForm({"": None})])
    model = tiny(name, dtype=dtype)
    with pytest.raises(ModelError, match=f"{type(model).__name__} cannot share prompts: (hidden states|it does not)"):
        prepare(model, layout="shared")


def test_the_probe_finds_a_wrong_window(monkeypatch):
    monkeypatch.setattr("tokengrain.scoring.prepare.mask_forms", lambda config: [MaskForm({"": None})])
    with pytest.raises(ModelError, match="cannot share prompts: hidden states differ"):
        prepare(tiny("mistral"), layout="shared")


LONG = {"sliding_window": 600, "max_position_embeddings": 1024}


@pytest.mark.parametrize(("name", "shares"), [("mistral", True), ("gemma3_text", True), ("llama", False)])
def test_a_window_too_long_for_a_probe(name, shares):
    """Llama has a window in its config and none in its attention, as some converted checkpoints do."""
    model, batch = tiny(name, **LONG).eval(), batch_of((620, (3, 4)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (prepare(model).masks is not None) == shares
    assert model.config.sliding_window == 600
    with torch.no_grad():
        expected = plain(model, batch)["logps"]
        torch.testing.assert_close(score(model, batch).logps, expected, rtol=0, atol=TOLERANCE)
        if shares:
            found = score(model, batch, layout="shared").logps
            torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def test_models_that_look_at_later_tokens_are_refused():
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "initializer_range": 0.3}
    config = transformers.BertConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
    model = transformers.BertLMHeadModel(config)
    with pytest.raises(ModelError, match="what BertLMHeadModel predicts depends on later tokens"):
        score(model, small_batch())
    few = tiny("llama", max_position_embeddings=8)  # so few that the probe's prompt is cut
    assert score(few, batch_of((3, (4, 5))), layout="separate").logps.shape == (9,)
    config.is_decoder = True
    model = transformers.BertLMHeadModel(config).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(
            score(model, small_batch()).logps, plain(model, small_batch())["logps"], rtol=0, atol=1e-5
        )
