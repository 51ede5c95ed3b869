"""FlexAttention end to end on CPU, where it has no backward: packed rows against plain transformers."""

import functools

import pytest
import torch

from tests.scoring.models import plain, standard_batch, tiny
from tests.scoring.test_vision import own, pictures
from tests.tiny_vlms import tiny_vlm
from tokengrain.batch import TokenBatch
from tokengrain.scoring.prepare import prepare
from tokengrain.scoring.score import score


@pytest.fixture
def _uncompiled_flex(monkeypatch):
    """The same operator without `torch.compile`, which would take minutes on CPU."""
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations import flex_attention as integration

    @functools.wraps(flex_attention)
    def plainly(query, key, value, training=False, **kwargs):
        return flex_attention(query, key, value, **kwargs)

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", plainly)


@pytest.mark.usefixtures("_uncompiled_flex")
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(
    "name", ["mistral", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "gemma3_text"))]
)
def test_packed_rows_equal_plain_transformers(name, monkeypatch):
    batch, layers = standard_batch(), 2 if name.startswith("gemma") else 1  # gemma: a layer of each kind
    expected = plain(tiny(name, dtype=torch.float32, num_hidden_layers=layers).eval(), batch)["logps"].detach()
    model = tiny(name, dtype=torch.float32, num_hidden_layers=layers).eval()
    model.set_attn_implementation("flex_attention")
    shapes = []
    decoder = model.base_model
    decoder.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    with torch.no_grad():
        assert prepare(model).masks is not None
        shapes.clear()
        shared = score(model, batch, layout="auto").logps
        assert shapes == [(1, 128)]
        separate = score(model, batch, layout="separate").logps
    torch.testing.assert_close(shared, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(separate, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("_uncompiled_flex")
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_packed_rows_with_images(family):
    """Three positions a token; and images whose tokens see each other, as part of the block mask."""
    batch = TokenBatch.from_samples(pictures(family))
    expected = own(tiny_vlm(family, dtype=torch.float32), pictures(family)).detach()
    model = tiny_vlm(family, dtype=torch.float32)
    model.get_decoder().set_attn_implementation("flex_attention")
    with torch.no_grad():
        assert prepare(model).masks is not None
        found = score(model, batch, layout="shared").logps
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
