"""References: a frozen copy, an adapter switched off, stored columns; and PEFT models in general."""

import copy

import pytest
import torch

from tests.scoring.models import gradients, plain, small_batch, standard_batch, texts, tiny
from tokengrain.errors import ModelError
from tokengrain.scoring.prepare import prepare
from tokengrain.scoring.reference import AdapterOffReference, ColumnReference, FrozenReference
from tokengrain.scoring.score import distribution_of, head_of, score

peft = pytest.importorskip("peft")
BOTH = ("logps", "distribution")


def lora(model=None, *, seed: int = 5, **settings):
    """A LoRA model whose adapter is not the identity."""
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings}
    model = peft.get_peft_model(model or tiny("llama"), peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.double()


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_lora_equals_plain_transformers(layout):
    model, batch = lora(), standard_batch()
    expected = plain(model, batch)
    expected_grads = gradients(model, {"logps": expected["logps"]})
    got = score(model, batch, layout=layout).logps
    torch.testing.assert_close(got, expected["logps"], rtol=0, atol=1e-6)
    grads = gradients(model, {"logps": got})
    assert grads.keys() == expected_grads.keys()
    assert all("lora_" in name for name in grads)
    scale = max(float(g.abs().max()) for g in expected_grads.values())
    for name in grads:
        assert float((grads[name] - expected_grads[name]).abs().max()) < 5e-6 * scale


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}],
    ids=["lora on the head", "head trained whole"],
)
def test_adapters_on_the_head(settings):
    model, batch = lora(**settings), standard_batch()
    ref = tiny("llama").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    expected = plain(model, batch, ref)
    want = ("logps", "entropy", "kl")
    got = score(model, batch, want, reference=distribution_of(ref, batch), chunk_tokens=4)
    for name in want:
        torch.testing.assert_close(getattr(got, name), expected[name], rtol=0, atol=1e-6)
    expected_grads = gradients(model, {n: expected[n] for n in want})
    grads = gradients(model, {n: getattr(got, n) for n in want})
    assert grads.keys() == expected_grads.keys()
    scale = max(float(g.abs().max()) for g in expected_grads.values())
    for name in grads:
        assert float((grads[name] - expected_grads[name]).abs().max()) < 5e-6 * scale
    # The distribution's head has the adapter folded in.
    distribution = distribution_of(model, batch)
    logp = distribution.head.logits(distribution.hidden).log_softmax(-1)
    torch.testing.assert_close(logp.gather(1, batch.labels[:, None])[:, 0], got.logps.detach())
    # And without the adapter it is the base model's.
    off = AdapterOffReference(model)(batch, BOTH)
    torch.testing.assert_close(off.logps, plain(ref, batch)["logps"].detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(off.distribution.head.weight, head_of(ref).weight.detach())


def test_adapter_off_is_the_base_model():
    base, batch = tiny("llama").eval(), standard_batch()
    model = lora(copy.deepcopy(base)).train()
    with torch.no_grad():
        expected = score(base, batch).logps
        adapted = score(model, batch).logps
    reference = AdapterOffReference(model)
    off = reference(batch, BOTH)
    torch.testing.assert_close(off.logps, expected)
    assert not torch.allclose(adapted, expected)
    assert not off.logps.requires_grad
    kl = score(model, batch, ("kl",), reference=off.distribution).kl
    torch.testing.assert_close(kl, plain(model, batch, base)["kl"], rtol=0, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(score(model, batch).logps, adapted)
    assert reference(batch, ("logps",)).distribution is None
    assert reference(batch, ("distribution",)).logps is None


def test_adapter_off_restores_everything_even_on_error(monkeypatch):
    model = lora().train()
    for name, parameter in model.named_parameters():
        if "layers.0" in name:
            parameter.requires_grad_(False)
    state = [(n, p.requires_grad) for n, p in model.named_parameters()]
    with torch.no_grad():
        before = score(model, small_batch()).logps

    def broken(*args, **kwargs):
        raise RuntimeError("broken")

    reference = AdapterOffReference(model)
    with monkeypatch.context() as patch:
        patch.setattr("tokengrain.scoring.reference.score", broken)
        with pytest.raises(RuntimeError, match="broken"):
            reference(small_batch(), ("logps",))
    reference(small_batch(), ("logps",))
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == state
    assert all(m.training for m in model.modules())
    with torch.no_grad():
        assert torch.equal(score(model, small_batch()).logps, before)


def test_frozen_reference_has_no_dropout_and_no_gradients():
    model = tiny("llama", attention_dropout=0.5).train()
    reference = FrozenReference(copy.deepcopy(model))
    first, second = (reference(small_batch(), BOTH) for _ in range(2))
    assert torch.equal(first.logps, second.logps)
    assert not first.distribution.hidden.requires_grad
    assert not any(p.requires_grad for p in reference.model.parameters())
    assert model.training


def test_column_reference():
    batch = small_batch()
    model = tiny("llama").eval()
    distribution = distribution_of(model, batch)
    stored = batch.with_columns(ref_logps=torch.arange(batch.segments.total) * -0.1, ref_hidden=distribution.hidden)
    assert torch.equal(ColumnReference()(stored, ("logps",)).logps, stored.columns["ref_logps"])
    with pytest.raises(ModelError, match=r"\(TDPO\) needs a live reference"):
        ColumnReference()(stored, BOTH)
    got = ColumnReference(head_of(model))(stored, BOTH).distribution
    assert float(score(model, batch, ("kl",), reference=got).kl.detach().abs().max()) < 1e-12
    with pytest.raises(ModelError, match="no column 'ref_logps'"):
        ColumnReference()(batch, ("logps",))
    with pytest.raises(ModelError, match="unknown reference quantity; got \\['kl'\\]"):
        ColumnReference()(batch, ("kl",))


def test_adapter_off_needs_an_adapter():
    with pytest.raises(ModelError, match="LlamaForCausalLM has no adapter"):
        AdapterOffReference(tiny("llama"))


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_virtual_tokens_run_separately_through_their_own_forward(kind):
    config = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    make = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}[kind]
    torch.manual_seed(0)
    base = tiny("llama").eval()
    model, batch = peft.get_peft_model(copy.deepcopy(base), make(**config)).double().eval(), small_batch()
    assert prepare(model).layout == "separate"
    got = score(model, batch, ("logps", "entropy"))
    for (text, positions), logps in zip(texts(batch), batch.segments.split(got.logps)):
        logits = model(input_ids=text[None], attention_mask=torch.ones_like(text[None])).logits[0, -len(text) :]
        logp = logits.log_softmax(-1)[positions - 1]
        torch.testing.assert_close(logps, logp.gather(1, text[positions][:, None])[:, 0], rtol=0, atol=1e-6)
    got.logps.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    off = AdapterOffReference(model)(batch, BOTH)
    torch.testing.assert_close(off.logps, score(base, batch).logps.detach(), rtol=0, atol=1e-6)
    with pytest.raises(ModelError, match="virtual tokens"):
        prepare(model, layout="shared")
