"""`prepare` and `score` on models as people have them: copied, pickled, wrapped, in training mode."""

import copy
import functools
import inspect
import pickle
import types
import warnings

import pytest
import torch

from tests.scoring.models import VOCAB, batch_of, gradients, plain, small_batch, standard_batch, tiny
from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.errors import ModelError
from tokengrain.scoring.model import evaluating
from tokengrain.scoring.prepare import MARK, causal_lm, prepare
from tokengrain.scoring.score import distribution_of, head_of, score

LAYOUTS = ("shared", "separate", "auto")


def logps(model, batch=None, **kwargs) -> torch.Tensor:
    return score(model, batch or small_batch(), **kwargs).logps


def test_prepare_is_idempotent_and_ordinary_calls_stay():
    model = tiny("llama")
    ids = torch.tensor([[5, 6, 7]])
    before, signature = model(input_ids=ids).logits, inspect.signature(model.forward)
    plan = prepare(model)
    forward = model.forward
    assert prepare(model) == plan
    assert model.forward.__func__ is forward.__func__
    assert torch.equal(model(input_ids=ids).logits, before)
    assert inspect.signature(model.forward) == signature
    generated = model.generate(input_ids=ids, max_new_tokens=2, do_sample=False)
    assert generated.shape == (1, 5)


def test_forwards_of_others_around_ours_and_ours_around_theirs():
    """TRL's trainers put a forward around the one they find that looks like the class's: a reference, then theirs."""
    model, ids, calls = tiny("llama"), torch.tensor([[5, 6, 7]]), []
    before, plain = logps(model), model(input_ids=ids).logits

    def wrap(number):
        inner = model.forward

        @functools.wraps(type(model).forward)
        def theirs(self, *args, **kwargs):
            calls.append(number)
            return inner(*args, **kwargs)

        model.forward = types.MethodType(theirs, model)

    for number in (1, 2):
        wrap(number)
        assert torch.equal(logps(model), before)
        assert torch.equal(copy.deepcopy(model)(input_ids=ids).logits, plain)
        calls.clear()
        assert torch.equal(model(input_ids=ids).logits, plain)
        assert calls == list(range(number, 0, -1))


def test_a_copy_uses_its_own_weights():
    model = tiny("llama")
    before = logps(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert torch.equal(logps(twin), before)
    assert not torch.allclose(logps(model), before)
    logps(twin).sum().backward()
    assert twin.lm_head.weight.grad is not None
    assert model.lm_head.weight.grad is None


def test_pickle_and_save(tmp_path):
    model = tiny("llama")
    before = logps(model)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(logps(twin), before)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(logps(loaded), before)
    assert set(loaded.state_dict()) == set(tiny("llama").state_dict())


def test_probe_leaves_mode_and_random_numbers_alone():
    model = tiny("llama", attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    prepare(model)
    assert torch.equal(torch.rand(4), expected)
    assert [m.training for m in model.modules()] == modes


def test_modes_come_back_after_an_error():
    model = tiny("llama").train()

    def stop() -> None:
        with evaluating(model):
            assert not model.training
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop()
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_and_rows_change_nothing(layout):
    model, batch = tiny("gemma2").eval(), standard_batch()
    want = ("logps", "entropy")
    expected = score(model, batch, want, layout=layout)
    grads = gradients(model, {"logps": expected.logps, "entropy": expected.entropy})
    for chunk_tokens, max_row_tokens in ((1, None), (4, 20), (1000, 1)):
        got = score(model, batch, want, layout=layout, chunk_tokens=chunk_tokens, max_row_tokens=max_row_tokens)
        torch.testing.assert_close(got.logps, expected.logps, rtol=0, atol=1e-6)
        torch.testing.assert_close(got.entropy, expected.entropy, rtol=0, atol=1e-6)
        other = gradients(model, {"logps": got.logps, "entropy": got.entropy})
        scale = max(float(g.abs().max()) for g in grads.values())
        for name in grads:
            assert float((grads[name] - other[name]).abs().max()) < 5e-6 * scale


def test_gradient_checkpointing():
    model, batch = tiny("llama").train(), small_batch()
    expected = gradients(model, {"logps": logps(model, batch)})
    model.gradient_checkpointing_enable()
    got = gradients(model, {"logps": logps(model, batch)})
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_autocast(layout):
    model, batch = tiny("llama", dtype=torch.float32, initializer_range=0.05), small_batch()
    exact = logps(model, batch, layout=layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = logps(model, batch, layout=layout)
    assert mixed.dtype == torch.float32
    assert not torch.equal(mixed, exact)
    torch.testing.assert_close(mixed, exact, rtol=0.02, atol=0.02)
    mixed.sum().backward()
    got = model.lm_head.weight.grad.clone()
    model.zero_grad()
    exact.sum().backward()
    torch.testing.assert_close(got, model.lm_head.weight.grad, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma2"])
def test_bfloat16_weights_share(name):
    model = tiny(name, dtype=torch.bfloat16, initializer_range=0.05).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shared = logps(model, layout="shared")
    assert shared.dtype == torch.float32
    torch.testing.assert_close(shared, logps(model, layout="separate"), rtol=0, atol=0.15)


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps the first settings of a process: other tests made theirs, and will."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("first", ["prepare", "accelerate"])
def test_under_accelerates_mixed_precision(first, fresh_accelerate):
    """Accelerate wraps `forward` in autocast, before or after ours is installed."""
    from accelerate import Accelerator

    model, batch = tiny("llama", dtype=torch.float32, initializer_range=0.05), small_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = logps(copy.deepcopy(model), batch)
    if first == "prepare":
        prepare(model)
    wrapped = Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    got = logps(wrapped, batch)
    assert torch.equal(got, expected)
    assert torch.equal(logps(copy.deepcopy(wrapped), batch), expected)


def test_chosen_layout_is_the_default():
    model = tiny("llama")
    assert prepare(model, layout="separate").layout == "separate"
    assert prepare(model).layout == "separate"
    assert prepare(model, layout="auto").layout == "auto"
    with pytest.raises(ModelError, match="unknown layout; got 'both'"):
        prepare(model, layout="both")


def test_a_head_that_is_not_the_last_word():
    """Unknown arithmetic after the head: its own logits are used, with one message."""
    model = tiny("llama").eval()
    cls = type(model)

    class Odd(cls):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 3 + out.logits.roll(1, -1)
            return out

    model.__class__ = Odd
    batch = standard_batch()
    with pytest.warns(UserWarning, match="Odd is scored through its own full logits: its logits are not"):
        got = score(model, batch, ("logps", "entropy"))
    expected = plain(model, batch)
    torch.testing.assert_close(got.logps, expected["logps"], rtol=0, atol=1e-6)
    torch.testing.assert_close(got.entropy, expected["entropy"], rtol=0, atol=1e-6)
    with pytest.raises(ModelError, match="hidden states of Odd are not available"):
        score(model, batch, ("hidden",))
    with pytest.raises(ModelError, match="cannot share prompts"):
        prepare(model, layout="shared")


@pytest.mark.parametrize("scale", [4.0, 0.25])
def test_scales_are_found_out_not_believed(scale):
    """`logits_scaling` divides in Granite and multiplies in HyperCLOVA: the probe tells which."""
    model = tiny("granite", logits_scaling=scale)
    assert prepare(model).scale == 1 / scale
    multiplying = tiny("cohere", logit_scale=scale)
    assert prepare(multiplying).scale == scale


def test_head_of_and_distribution_of():
    model, batch = tiny("cohere").eval(), small_batch()
    assert head_of(model).weight is model.lm_head.weight
    distribution = distribution_of(model, batch)
    assert not distribution.hidden.requires_grad
    logp = distribution.head.logits(distribution.hidden).log_softmax(-1)
    torch.testing.assert_close(logp.gather(1, batch.labels[:, None])[:, 0], logps(model, batch).detach())
    assert float(score(model, batch, ("kl",), reference=distribution).kl.detach().abs().max()) < 1e-12


def test_no_graph_without_gradients():
    model = tiny("llama")
    with torch.no_grad():
        scores = score(model, small_batch(), ("logps", "entropy", "hidden"))
    assert not any(x.requires_grad for x in (scores.logps, scores.entropy, scores.hidden))


def test_policy_and_reference_agree_to_the_last_bit_while_equal():
    """The margin of the first step is exactly 0: gradients or not, the same rectangles are run."""
    model, batch = tiny("llama", dtype=torch.float32).eval(), standard_batch()
    with torch.no_grad():
        frozen = score(model, batch).logps
    assert torch.equal(score(model, batch).logps.detach(), frozen)


def test_nothing_counts():
    """No tokens is an empty answer that can still be trained on, as a rank's share of a batch may be."""
    model = tiny("llama")
    batch = TokenBatch.from_samples([Sample([5, 6], [Completion([7, 8], [False, False])])])
    scores = score(model, batch, ("logps", "entropy"))
    assert scores.logps.shape == scores.entropy.shape == (0,)
    scores.logps.sum().backward()


def test_errors():
    model = tiny("llama")
    with pytest.raises(ModelError, match=r"row 1: a prompt of 60 and a completion of 5 tokens need 65 positions"):
        score(model, batch_of((3, (4,)), (60, (2, 5))))
    score(model, batch_of((60, (4,))))
    with pytest.raises(ModelError, match="unknown quantity; got \\['logp'\\]"):
        score(model, small_batch(), ("logp",))
    with pytest.raises(ModelError, match="needs the reference's distribution"):
        score(model, small_batch(), ("kl",))
    foreign = small_batch()
    foreign.completion_ids[0] = VOCAB
    with pytest.raises(ModelError, match=f"token id {VOCAB}; expected at least 0 and less than {VOCAB}"):
        score(model, foreign)
    foreign.completion_ids[0] = -100  # what labels have where nothing is to be learnt
    with pytest.raises(ModelError, match="token id -100; expected at least 0"):
        score(model, foreign)
    for setting in ("chunk_tokens", "max_row_tokens"):
        with pytest.raises(ModelError, match=f"{setting} must be at least 1, or None; got -1"):
            score(model, small_batch(), **{setting: -1})
    with pytest.raises(ModelError, match="Linear has no language-model head"):
        causal_lm(torch.nn.Linear(2, 2))


def test_marks_survive_accelerates_wrappers():
    model = tiny("llama")
    prepare(model)
    assert getattr(model.forward, MARK)
