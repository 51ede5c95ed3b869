"""shared == separate == each text alone through plain transformers, values and gradients, float64."""

import warnings

import pytest
import torch

from tests.scoring.models import SEPARATE, SHARING, gradients, plain, small_batch, standard_batch, tiny
from tokengrain.errors import ModelError
from tokengrain.scoring import Scores, distribution_of, prepare, score
from tokengrain.scoring.masks import MaskForm

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
    monkeypatch.setattr("tokengrain.scoring.probe.mask_forms", lambda config: [MaskForm({"": None})])
    model = tiny(name, dtype=dtype)
    with pytest.raises(ModelError, match=f"{type(model).__name__} cannot share prompts: (hidden states|it does not)"):
        prepare(model, layout="shared")


def test_the_probe_finds_a_wrong_window(monkeypatch):
    monkeypatch.setattr("tokengrain.scoring.probe.mask_forms", lambda config: [MaskForm({"": None})])
    with pytest.raises(ModelError, match="cannot share prompts: hidden states differ"):
        prepare(tiny("mistral"), layout="shared")
