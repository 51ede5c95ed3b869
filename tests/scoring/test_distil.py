"""`teacher_kl` of whole models, and adapters of one base as student and teachers, against plain transformers."""

import copy

import pytest
import torch

from tests.scoring.models import gradients, small_batch, standard_batch, texts, tiny
from tests.scoring.test_reference import lora
from tokengrain.errors import ModelError
from tokengrain.scoring.head import Distribution, Teacher
from tokengrain.scoring.reference import AdapterReference, FrozenReference
from tokengrain.scoring.score import distribution_of, score

peft = pytest.importorskip("peft")
FORM = {"slope": 6.0, "offset": 1e-3}
VALUES = ("teacher_kl", "teacher_alpha", "tvd", "teacher_reward")


def moved(model, seed: int):
    """A copy with other weights."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model.eval()


def plain_logits(model, batch) -> torch.Tensor:
    """Each text alone through the model: logits `[N, V]` that predict the counted tokens."""
    return torch.cat([model(input_ids=text[None]).logits[0, positions - 1] for text, positions in texts(batch)])


def plain_kl(model, batch, target, contrast) -> dict[str, torch.Tensor]:
    """Equations 16 and 17 of AlignDistil, temperature 1."""
    logp = plain_logits(model, batch).log_softmax(-1)
    with torch.no_grad():
        log_d, log_r = (plain_logits(m, batch).log_softmax(-1) for m in (target, contrast))
        tvd = (log_d.exp() - log_r.exp()).abs().sum(-1) / 2
        alpha = FORM["slope"] * tvd + FORM["offset"]
        logq = (log_d + alpha[:, None] * (log_d - log_r)).log_softmax(-1)
        reward = (log_d - log_r).gather(1, batch.labels[:, None]).squeeze(1)
    kl = (logp.exp() * (logp - logq)).sum(-1)
    return {"teacher_kl": kl, "teacher_alpha": alpha, "tvd": tvd, "teacher_reward": reward}


def check(model, batch, target, contrast, teacher: Teacher, **options) -> None:
    expected = plain_kl(model, batch, target, contrast)
    expected_grads = gradients(model, {"teacher_kl": expected["teacher_kl"]})
    got = score(model, batch, ("logps", "teacher_kl"), teacher=teacher, **options)
    for name in VALUES:
        torch.testing.assert_close(getattr(got, name), expected[name].detach(), rtol=0, atol=5e-6, check_dtype=False)
        assert getattr(got, name).requires_grad == (name == "teacher_kl")
    grads = gradients(model, {"teacher_kl": got.teacher_kl})
    scale = max(float(g.abs().max()) for g in expected_grads.values())
    for name in expected_grads.keys() | grads.keys():
        zero = torch.zeros_like(dict(model.named_parameters())[name])
        assert float((grads.get(name, zero) - expected_grads.get(name, zero)).abs().max()) < 1e-5 * scale, name


def both(references, batch, **form) -> Teacher:
    target, contrast = (r(batch, ("distribution",)).distribution for r in references)
    return Teacher(target, contrast, **(form or FORM))


@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "granite"])
def test_teacher_kl_of_models(name, layout):
    model, batch = tiny(name).eval(), standard_batch()
    target, contrast = moved(model, 1), moved(model, 2)
    teacher = both([FrozenReference(m) for m in (target, contrast)], batch)
    check(model, batch, target, contrast, teacher, layout=layout)
    check(model, batch, target, contrast, teacher, layout=layout, chunk_tokens=4)


def test_a_model_scored_through_its_own_logits():
    """The head cannot be taken apart: the student's logits are plain, the teacher's still come from hidden states."""
    model, batch = tiny("llama").eval(), standard_batch()
    target, contrast = moved(model, 1), moved(model, 2)
    teacher = both([FrozenReference(m) for m in (target, contrast)], batch)

    class Odd(type(model)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 3 + out.logits.roll(1, -1)
            return out

    model.__class__ = Odd
    with pytest.warns(UserWarning, match="scored through its own full logits"):
        check(model, batch, target, contrast, teacher)


def test_a_head_with_an_adapter():
    """The head's module is more than a matrix: chunks go through it, and gradients reach its adapter."""
    batch = standard_batch()
    model = lora(target_modules=["q_proj", "lm_head"]).eval()
    target, contrast = (moved(tiny("llama"), seed) for seed in (1, 2))
    teacher = both([FrozenReference(m) for m in (target, contrast)], batch)
    for chunk in (None, 4):
        check(model, batch, target, contrast, teacher, chunk_tokens=chunk)
    assert any("lm_head" in n and p.grad is not None and p.grad.any() for n, p in model.named_parameters())


def test_vocabularies_padded_to_different_sizes():
    """The same models with more rows in some heads: nothing changes."""
    model, batch = tiny("llama").eval(), small_batch()
    pair = [distribution_of(moved(model, seed), batch) for seed in (1, 2)]
    rows = torch.randn(5, 16, dtype=torch.float64)
    wide = [Distribution(d.hidden, type(d.head)(torch.cat([d.head.weight, rows[:k]]))) for d, k in zip(pair, (5, 3))]
    got = [
        score(model, batch, ("teacher_kl",), teacher=Teacher(*pair_of, **FORM)).teacher_kl for pair_of in (pair, wide)
    ]
    torch.testing.assert_close(*got, rtol=1e-12, atol=1e-12)
    with pytest.raises(ModelError, match="needs the teacher, got none"):
        score(model, batch, ("teacher_kl",))


def three_adapters(base=None, **settings):
    """A base with adapters "default" (active), "dpo" and "reverse", and each of the two alone on its own base."""
    base = base or tiny("llama")
    model = lora(copy.deepcopy(base), **settings)
    alone = []
    for seed, name in ((11, "dpo"), (12, "reverse")):
        one = lora(copy.deepcopy(base), seed=seed, **settings)
        model.add_adapter(name, copy.deepcopy(one.peft_config["default"]))
        weights = {n: p for n, p in one.named_parameters() if ".default." in n}
        with torch.no_grad():
            for n, p in model.named_parameters():
                if f".{name}." in n:
                    p.copy_(weights[n.replace(f".{name}.", ".default.")])
        alone.append(one.eval())
    return model.double(), alone


def state(model) -> list:
    modules = [(vars(m).get("_active_adapter"), vars(m).get("active_adapter"), m.training) for m in model.modules()]
    return [modules, [(n, p.requires_grad) for n, p in model.named_parameters()], model.active_adapters]


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}])
def test_adapters_of_one_base_as_student_and_teachers(settings):
    model, (dpo, reverse) = three_adapters(**settings)
    batch = standard_batch()
    model.train()
    model.base_model.model.model.layers[0].eval()
    for name, parameter in model.named_parameters():
        if "layers.1" in name:
            parameter.requires_grad_(False)
    before, count = state(model), sum(p.numel() for p in model.parameters())
    references = [AdapterReference(model, name) for name in ("dpo", "reverse")]
    for reference, alone in zip(references, (dpo, reverse)):
        got, expected = (r(batch, ("logps", "distribution")) for r in (reference, FrozenReference(alone)))
        torch.testing.assert_close(got.logps, expected.logps, rtol=0, atol=1e-10)
        torch.testing.assert_close(got.distribution.logits(torch.float64), expected.distribution.logits(torch.float64))
        assert not got.logps.requires_grad
        assert state(model) == before
    assert sum(p.numel() for p in model.parameters()) == count
    check(model, batch, dpo, reverse, both(references, batch))


def test_adapter_reference_shares_the_head_and_leaves_training_alone():
    model, _ = three_adapters()
    batch = small_batch()
    expected = gradients(model, {"logps": score(model, batch).logps})
    reference = AdapterReference(model, "dpo")
    out = score(model, batch).logps
    given = reference(batch, ("distribution",)).distribution
    got = gradients(model, {"logps": out})
    assert got.keys() == expected.keys()
    assert all(".default." in name for name in got)
    for name in expected:
        assert torch.equal(got[name], expected[name])
    assert given.head.weight.data_ptr() == model.base_model.model.lm_head.weight.data_ptr()


def test_adapter_reference_restores_everything_even_on_error(monkeypatch):
    model, _ = three_adapters()
    model.train()
    before = state(model)
    reference = AdapterReference(model, "reverse")

    def broken(*args, **kwargs):
        assert model.active_adapters == ["reverse"]
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr("tokengrain.scoring.reference.score", broken)
        with pytest.raises(RuntimeError, match="broken"):
            reference(small_batch(), ("logps",))
    assert state(model) == before


def test_adapter_reference_inside_wrappers():
    model, (dpo, _) = three_adapters()
    batch = small_batch()
    expected = FrozenReference(dpo)(batch, ("logps",)).logps

    class Wrapper(torch.nn.Module):  # as DDP holds its model
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **kwargs):
            return self.module(**kwargs)

    wrapped = torch.compile(Wrapper(model), backend="eager")
    with torch.compiler.set_stance("force_eager"):
        got = AdapterReference(wrapped, "dpo")(batch, ("logps",)).logps
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_adapter_reference_errors():
    model, _ = three_adapters()
    with pytest.raises(ModelError, match=r"unknown adapter; got 'normal', expected one of \['default', 'dpo', 'rev"):
        AdapterReference(model, "normal")
    with pytest.raises(ModelError, match="LlamaForCausalLM has no adapter"):
        AdapterReference(tiny("llama"), "dpo")
    reference = AdapterReference(model, "dpo")
    model.merge_adapter()
    with pytest.raises(ModelError, match="adapters are merged"):
        reference(small_batch(), ("logps",))
