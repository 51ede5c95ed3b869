"""Encoder-decoders: scoring equals the model's own forward, one completion at a time, in value and gradient."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers

from tests.scoring.encdec import FAMILIES, alone, tiny_seq2seq
from tests.scoring.models import VOCAB, batch_of, gradients, joined, small_batch, standard_batch, tiny
from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.errors import ModelError
from tokengrain.method import make_objective
from tokengrain.scoring.encdec import RepeatedStates, encoder_rows
from tokengrain.scoring.layouts import RowCosts
from tokengrain.scoring.prepare import causal_lm, prepare, prompt_role
from tokengrain.scoring.reference import AdapterOffReference
from tokengrain.scoring.score import distribution_of, score
from tokengrain.training.step import PreferenceLoss


@pytest.mark.parametrize("name", FAMILIES)
def test_equal_to_the_models_own_forward(name):
    model, batch = tiny_seq2seq(name), standard_batch()
    if name == "t5gemma":
        model.config.decoder_start_token_id = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = prepare(model)
    assert (plan.kind, plan.head, plan.scale) == ("encoder-decoder", "fused", pytest.approx(FAMILIES[name][2]))
    expected, scores = alone(model, batch), score(model, batch, ("logps", "entropy"))
    got = {"logps": scores.logps, "entropy": scores.entropy}
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], rtol=0, atol=1e-12)
    ours, own = gradients(model, got), gradients(model, expected)
    assert ours.keys() == own.keys()
    scale = max(float(g.abs().max()) for g in own.values())
    worst = max(float((ours[n] - own[n]).abs().max()) / scale for n in own)
    assert worst < (1e-6 if name == "longt5" else 1e-7)  # LongT5 normalises in float32, block by block


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_neither_rectangles_nor_neighbours_change_a_score(name):
    model, batch = tiny_seq2seq(name), standard_batch()
    whole = score(model, batch).logps
    for limit in (1, 8, 30):
        torch.testing.assert_close(score(model, batch, max_row_tokens=limit).logps, whole, rtol=0, atol=1e-12)
    longer = joined(batch, batch_of((40, (20, 1))))
    torch.testing.assert_close(score(model, longer).logps[: len(whole)], whole, rtol=0, atol=1e-12)
    each = torch.cat([score(model, batch.select([g])).logps for g in range(batch.n_prompts)])
    torch.testing.assert_close(each, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["switch", "m2m_100"])
def test_nothing_is_random_once_dropout_is_off(name):
    """A router's noise and skipped layers are random in training too."""
    model, batch = tiny_seq2seq(name, router_jitter_noise=0.5, encoder_layerdrop=0.5), standard_batch()
    in_training = score(model, batch).logps
    torch.testing.assert_close(in_training, score(model.eval(), batch).logps, rtol=0, atol=1e-12)


def test_a_load_balancing_loss_is_refused():
    model = tiny_seq2seq("switch", output_router_logits=True)
    with pytest.raises(ModelError, match="output_router_logits: true, and a load-balancing loss that is not known"):
        PreferenceLoss(make_objective("simpo"), None, None)(model, small_batch())


def test_the_encoder_reads_every_prompt_once():
    model = tiny_seq2seq("t5")
    prepare(model)
    read = []
    model.get_encoder().register_forward_pre_hook(lambda m, a, kw: read.append(kw["input_ids"].shape), with_kwargs=True)
    score(model, batch_of((9, (4, 7, 3, 5)), (9, (2, 2, 2))))
    assert read == [(2, 9)]


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_keys_and_values_are_projected_once_per_prompt(name):
    model, batch = tiny_seq2seq(name), batch_of((9, (4, 7, 3, 5)), (9, (2, 2, 2)))
    prepare(model)
    projected = []
    kind = {"t5": "EncDecAttention.k", "bart": "encoder_attn.k_proj"}[name]
    for key, module in model.named_modules():
        if key.endswith(kind):
            module.register_forward_hook(
                lambda module, args, out: projected.append((type(args[0]), type(out), len(out)))
            )
    torch.testing.assert_close(score(model, batch).logps, alone(model, batch)["logps"], rtol=0, atol=1e-12)
    assert projected[:2] == [(RepeatedStates, torch.Tensor, 7)] * 2


def test_repeated_states():
    states, prompt = torch.randn(2, 9, 16, requires_grad=True), torch.tensor([0, 0, 1])
    weight, linear = torch.randn(4, 16), torch.nn.functional.linear
    repeated = RepeatedStates.of(states, prompt)
    (grad,) = torch.autograd.grad(linear(repeated, weight).sum(), states)
    (expected,) = torch.autograd.grad(linear(states[prompt], weight).sum(), states)
    torch.testing.assert_close(grad, expected)
    assert type(repeated * 1.0) is torch.Tensor
    with torch.no_grad():  # what is written to no longer stands for the prompts' states
        written = RepeatedStates.of(states.detach().clone(), prompt).add_(1.0)
    torch.testing.assert_close(linear(written, weight), linear(states[prompt] + 1.0, weight))


def test_a_row_ends_with_its_last_counted_token():
    ids = [5, 6, 7, 8]
    samples = [Sample([3, 4], [Completion(ids, [True, False, True, False]), Completion(ids, [False] * 4)])]
    (rows,) = encoder_rows(TokenBatch.from_samples(samples), 9, RowCosts(16), torch.device("cpu"), one_forward=True)
    (part,) = rows.completions
    assert part.input_ids.tolist() == [[9, 5, 6], [9, 9, 9]]
    assert part.source.tolist() == [0, 2]
    assert part.prompt is not None
    assert part.prompt.tolist() == [0, 0]


def test_kl_to_a_reference():
    model, reference, batch = tiny_seq2seq("bart"), tiny_seq2seq("bart", seed=1).eval(), standard_batch()
    got = score(model, batch, ("kl",), reference=distribution_of(reference, batch)).kl
    expected = []
    for lm in (model, reference):
        logits = lm.lm_head(score(lm, batch, ("hidden",)).hidden) + lm.final_logits_bias
        expected.append(logits.log_softmax(-1))
    logp, logq = expected
    torch.testing.assert_close(got, (logq.exp() * (logq - logp)).sum(-1), rtol=0, atol=1e-12)


def test_models_whose_decoder_has_a_head_of_its_own_go_through_their_logits():
    bert = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert |= {"intermediate_size": 24}
    parts = transformers.BertConfig(**bert), transformers.BertConfig(**bert, is_decoder=True, add_cross_attention=True)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*parts, decoder_start_token_id=1)
    model = transformers.EncoderDecoderModel(config).double().eval()
    with pytest.warns(UserWarning, match="EncoderDecoderModel is scored through its own full logits"):
        got = score(model, standard_batch()).logps
    torch.testing.assert_close(got, alone(model, standard_batch())["logps"], rtol=0, atol=1e-12)


def test_layouts():
    model, batch = tiny_seq2seq("t5"), small_batch()
    torch.testing.assert_close(score(model, batch, layout="separate").logps, score(model, batch).logps)
    with pytest.raises(ModelError, match="encodes each prompt once and writes each completion in a row of its own"):
        score(model, batch, layout="shared")


def test_roles_of_prompts():
    samples = [Sample([3, 4, 5], [Completion([6, 7])])]
    assert (prompt_role(tiny_seq2seq("t5")), prompt_role(tiny("llama"))) == ("encoder", "prefix")
    for role in ("prefix", "encoder"):  # an encoder-decoder knows what it is
        score(tiny_seq2seq("t5"), TokenBatch.from_samples(samples, role))
    with pytest.raises(ModelError, match='prompt_role="encoder", and LlamaForCausalLM has no encoder'):
        score(tiny("llama"), TokenBatch.from_samples(samples, "encoder"))


def test_repeated_states_count_in_the_size_of_a_micro_batch():
    samples = [Sample([3] * 16, [Completion([6] * 4)] * 3)] * 2
    assert len(TokenBatch.from_samples(samples).split(56)) == 1
    assert len(TokenBatch.from_samples(samples, "encoder").split(56)) == 2  # 16 + 12 + 3 * 16 / 8 each


def test_the_start_token_is_asked_for():
    model = tiny_seq2seq("t5gemma")
    with pytest.raises(ModelError, match=r"T5Gemma.* has no decoder_start_token_id.*decoder_start_id"):
        score(model, small_batch())
    model.generation_config.decoder_start_token_id = 1
    score(model, small_batch())


def test_what_needs_a_causal_model_says_why():
    with pytest.raises(ModelError, match=r"T5ForConditionalGeneration is an encoder-decoder; .* for sampling"):
        causal_lm(tiny_seq2seq("t5"), "sampling")


def test_ids_and_positions_are_checked_by_side():
    model = tiny_seq2seq("marian", decoder_vocab_size=VOCAB + 9, share_encoder_decoder_embeddings=False)
    score(model, TokenBatch.from_samples([Sample([VOCAB - 1] * 60, [Completion([VOCAB + 8] * 60)])]))
    with pytest.raises(ModelError, match=f"a prompt has token id {VOCAB}; expected .* less than {VOCAB}"):
        score(model, TokenBatch.from_samples([Sample([VOCAB], [Completion([1])])]))
    with pytest.raises(ModelError, match="a completion of 65 tokens; expected at most 64, the positions of Marian"):
        score(model, TokenBatch.from_samples([Sample([3], [Completion([1] * 65)])]))


@pytest.mark.parametrize("settings", [{}, {"target_modules": ["q", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_lora(settings):
    peft = pytest.importorskip("peft")
    base, batch = tiny_seq2seq("t5"), standard_batch()
    given = {"r": 2, "target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM", **settings}
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**given)).double()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    got, expected = score(model, batch).logps, alone(model.get_base_model(), batch)["logps"]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    ours, own = gradients(model, {"logps": got}), gradients(model, {"logps": expected})
    assert ours.keys() == own.keys()
    assert ours
    scale = max(float(g.abs().max()) for g in own.values())
    assert max(float((ours[n] - own[n]).abs().max()) for n in own) < 1e-5 * scale
    before = AdapterOffReference(model)(batch, ("logps",)).logps
    torch.testing.assert_close(before, alone(base, batch)["logps"], rtol=0, atol=1e-6)


def test_prompt_tuning_goes_through_the_models_logits():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, num_transformer_submodules=1)
    model, batch = peft.get_peft_model(tiny_seq2seq("t5"), config).double(), small_batch()
    got = score(model, batch).logps
    expected = alone_through(model, batch)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    got.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "prompt" in n)


def alone_through(model, batch):
    """As `alone`, through the PEFT model, which asks for masks."""
    found = []
    for c, group in enumerate(batch.group.tolist()):
        prompt, ids = batch.prompt(group)[None], batch.completion(c)
        rows = {"decoder_input_ids": torch.cat([ids.new_tensor([0]), ids[:-1]])[None]}
        logp = model(input_ids=prompt, attention_mask=torch.ones_like(prompt), **rows).logits[0].log_softmax(-1)
        found.append(logp.gather(1, ids[:, None])[:, 0])
    return torch.cat(found)


def test_gradient_checkpointing_and_generation_still_work():
    model, batch = tiny_seq2seq("t5", dtype=torch.float32), standard_batch()
    expected = gradients(model, {"logps": score(model, batch).logps})
    model.gradient_checkpointing_enable()
    got = gradients(model, {"logps": score(model, batch).logps})
    torch.testing.assert_close(got, expected)
    model.gradient_checkpointing_disable()
    ids = model.eval().generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert ids.shape == (1, 5)
    assert ids[0, 1] == model(torch.tensor([[3, 4, 5]]), decoder_input_ids=torch.tensor([[0]])).logits[0, 0].argmax()
