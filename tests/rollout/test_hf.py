"""Sampling from a model in this process."""

import warnings

import pytest
import torch
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from tests.credit.small import llama, tokenizer
from tests.scoring.models import SHARING, tiny
from tokengrain.errors import ModelError, RecipeError, RolloutError
from tokengrain.methods._clipped import sampler_mismatch
from tokengrain.rollout.local import Drawn, HFContinuous, HFGenerate, Picker, prefill_of
from tokengrain.rollout.sampler import PromptItem, SamplingConfig
from tokengrain.scoring.score import score

TEXTS = ["write about the sea", "write kindly about the sun in the sea :", "sea", "the sun was calm and deep ."]


@pytest.fixture(scope="module")
def tok():
    return tokenizer()


@pytest.fixture(scope="module")
def model():
    return llama().float()


def items(tok, texts=TEXTS):
    return [PromptItem(tok(t)["input_ids"], row=f"r{i}", raw={"prompt": t}) for i, t in enumerate(texts)]


def ids_of(rollouts):
    return {p.row: [c.ids for c in group] for p, group in rollouts}


SAMPLING = SamplingConfig(temperature=0.8, top_p=0.95, max_new_tokens=10, seed=3, stop_ids=(2, 5, 6, 7))


def test_what_comes_back(tok, model):
    rollouts = HFGenerate(model, tok).sample(items(tok), n=3, sampling=SAMPLING)
    assert [len(g) for g in rollouts.groups] == [3] * 4
    assert rollouts.group == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert {c.finish_reason for c in rollouts.completions} == {"stop", "length"}
    for c in rollouts.completions:
        assert len(c.ids) == len(c.sampling_logps) == len(c.raw_logps)
        assert (c.ids[-1] in SAMPLING.stop_ids) == (c.finish_reason == "stop") != c.truncated
        assert not set(c.ids[:-1]) & set(SAMPLING.stop_ids)
        assert len(c.ids) == 10 or not c.truncated
    batch = rollouts.to_batch()
    assert batch.rows == ("r0", "r1", "r2", "r3")
    assert batch.raw[2] == {"prompt": "sea"}
    assert set(batch.columns) == {"sampling_logps", "raw_logps", "truncated"}
    assert (batch.segments.mean(batch.columns["truncated"]) == rollouts.truncated.float()).all()


@pytest.mark.parametrize("kwargs", [{}, {"max_batch_tokens": 40}, {"cache": "static"}])
def test_batches_order_and_cache_do_not_matter(tok, model, kwargs):
    want = ids_of(HFGenerate(model, tok).sample(items(tok), n=4, sampling=SAMPLING))
    got = ids_of(HFGenerate(model, tok, **kwargs).sample(items(tok)[::-1], n=4, sampling=SAMPLING))
    assert got == want
    alone = ids_of(HFGenerate(model, tok, **kwargs).sample(items(tok)[1:2], n=4, sampling=SAMPLING))
    assert alone["r1"] == want["r1"]


def test_the_head_never_reads_a_slice(tok):
    """PyTorch multiplies one row by row where the head is frozen (`contiguous_head`)."""
    model, seen = llama().float().requires_grad_(False), []
    inner = model.lm_head.forward
    model.lm_head.forward = lambda x: seen.append((x.is_contiguous(), len(x))) or inner(x)
    for cache in ("dynamic", "static"):
        HFGenerate(model, tok, cache=cache).sample(items(tok), n=2, sampling=SAMPLING)
    assert all(whole for whole, _ in seen)
    assert max(rows for _, rows in seen) == 8, "also behind a prefill of several prompts"
    assert not model.lm_head._forward_pre_hooks, "and afterwards the model is as it was"


@pytest.mark.parametrize("vocabulary", [40, 256, 1000])
def test_a_draw_in_blocks_is_that_of_all_tokens_added_up(vocabulary):
    torch.manual_seed(0)
    logits = 4 * torch.randn(400, vocabulary)
    logits[:, ::3] = -torch.inf
    logits[0], logits[0, 1] = -torch.inf, 3.0  # one token has it all
    uniform = torch.rand(400, 1, dtype=torch.float64)
    uniform[:6, 0] = torch.tensor([0.3, 0.0, 1 - 2**-53, 0.5, 2**-60, 1 - 2**-30], dtype=torch.float64)
    picker = Picker(SamplingConfig(max_new_tokens=1), uniform, torch.device("cpu"))
    tokens, _, _ = picker(logits, torch.arange(400), 0)
    cumulative = logits.log_softmax(-1).exp().double().cumsum(-1)
    total = cumulative[:, -1:]
    point = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros(1).double()))
    assert (torch.searchsorted(cumulative, point, right=True)[:, 0] == tokens).all()
    assert logits[torch.arange(400), tokens].isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_logits_that_are_not_finite_end_the_rollout(tok, value, cache, temperature):
    model = llama(len(tok))
    model.lm_head.weight.data[3, :] = value
    sampling = SamplingConfig(max_new_tokens=4, temperature=temperature)
    with pytest.raises(RolloutError, match=r"row r0: token 0 of completion 0 has the log-probability NaN: .*logits"):
        HFGenerate(model, tok, cache=cache).sample(items(tok), n=2, sampling=sampling)


def test_seeds(tok, model):
    sampler = HFGenerate(model, tok)
    draw = lambda s: ids_of(sampler.sample(items(tok), n=4, sampling=s))  # noqa: E731
    assert draw(SAMPLING) == draw(SAMPLING)
    assert draw(SAMPLING.at(1)) != draw(SAMPLING.at(2))
    assert SAMPLING.at(1) == SAMPLING.at(1)
    twice = sampler.sample(items(tok)[:1] * 2, n=4, sampling=SAMPLING)
    assert [c.ids for c in twice.groups[0]] != [c.ids for c in twice.groups[1]]


def small(kind):
    torch.manual_seed(1)
    common = {"vocab_size": 24, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **common)).eval()
    if kind == "mamba":
        return MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, state_size=4, **common)).eval()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MistralConfig(num_key_value_heads=1, sliding_window=5, **sizes, **common)
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["gpt2", "mistral", "mamba"])
def test_log_probabilities_are_the_models(tok, kind):
    """`raw_logps` against scoring; with padding, finished rows, sliding windows, and recurrent states."""
    model = small(kind)
    prompts = items(tok)
    if kind == "mamba":  # padding on the left goes through its state
        prompts = [PromptItem([1, 5 + i, 7], row=i) for i in range(4)]
    sampling = SamplingConfig(max_new_tokens=12, stop_ids=(2, 3, 4))
    rollouts = HFGenerate(model, tok).sample(prompts, n=3, sampling=sampling)
    batch = rollouts.to_batch()
    assert rollouts.metrics == {"rollout/shared_prefill": float(kind != "mamba")}
    layout = "separate" if kind == "mamba" else None
    logps = score(model, batch, layout=layout).logps.detach()
    torch.testing.assert_close(batch.columns["raw_logps"], logps, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(batch.columns["sampling_logps"], batch.columns["raw_logps"])


@pytest.mark.parametrize("family", SHARING)
def test_families_compute_a_prompt_once(family):
    """A probe finds it, so that a new name in transformers could take it away: here it must not."""
    prompts = [PromptItem([5, 6, 7, 8], row=0), PromptItem([9, 10], row=1)]
    sampling = SamplingConfig(max_new_tokens=4, stop_ids=())
    model = tiny(family, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        rollouts = HFGenerate(model).sample(prompts, n=2, sampling=sampling)
    assert rollouts.metrics["rollout/shared_prefill"] == 1
    assert prefill_of(model, model).keep == {"logits_to_keep": 1}
    logps = score(model, rollouts.to_batch(), layout="separate").logps.detach()
    torch.testing.assert_close(rollouts.to_batch().columns["raw_logps"], logps, atol=2e-5, rtol=1e-4)


def test_a_model_that_cannot_share_prompts_says_so_once(tok):
    model, prompts = small("gpt2"), items(tok)
    want = ids_of(HFGenerate(model, tok).sample(prompts, n=2, sampling=SAMPLING))
    other = small("gpt2")
    forward = other.forward
    # The argument has another name, which the model ignores like all that it does not know.
    other.forward = lambda *a, **k: forward(*a, **{n: v for n, v in k.items() if n != "position_ids"})
    sampler = HFGenerate(other, tok)
    with pytest.warns(UserWarning, match="GPT2LMHeadModel computes a prompt anew .*: its logits differ") as caught:
        rollouts = [sampler.sample(prompts, n=2, sampling=SAMPLING) for _ in range(2)][1]
    assert len(caught) == 1
    assert rollouts.metrics == {"rollout/shared_prefill": 0.0}
    assert ids_of(rollouts).keys() == want.keys()


def test_sampling_log_probabilities(tok, model):
    """Against the distribution written out by hand: temperature, then the smallest set with top_p."""
    rollouts = HFGenerate(model, tok).sample(items(tok)[:1], n=3, sampling=SAMPLING)
    for c in rollouts.completions:
        ids = torch.tensor([rollouts.prompts[0].ids + c.ids])
        with torch.no_grad():
            logits = model(ids).logits[0, -len(c.ids) - 1 : -1].double()
        for token, row, found in zip(c.ids, logits, c.sampling_logps):
            p = (row / 0.8).softmax(-1)
            order = p.argsort(descending=True)
            before = p[order].cumsum(0) - p[order]
            kept = order[before < 0.95]
            assert token in kept
            assert found == pytest.approx(float((p[token] / p[kept].sum()).log()), abs=1e-4)


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, -float("inf"), 2.0]])
    u = (torch.arange(20000, dtype=torch.float64) + 0.5)[:, None] / 20000
    picker = Picker(SamplingConfig(max_new_tokens=1), u, torch.device("cpu"))
    tokens, logps, raw = picker(logits.expand(20000, -1), torch.arange(20000), 0)
    share = torch.bincount(tokens, minlength=4) / 20000
    torch.testing.assert_close(share, logits.softmax(-1)[0], atol=1e-4, rtol=0)
    assert torch.equal(logps, raw)
    ends = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64)
    edge = Picker(SamplingConfig(max_new_tokens=1), ends, torch.device("cpu"))
    assert edge(logits[:, [2, 0, 3, 2]].expand(2, -1), torch.arange(2), 0)[0].tolist() == [1, 2]


def test_greedy_is_generates(tok, model):
    sampling = SamplingConfig(temperature=0, max_new_tokens=8, stop_ids=(2,))
    prompt = items(tok)[1]
    got = HFGenerate(model, tok).sample(items(tok), n=1, sampling=sampling).groups[1][0]
    config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=0)
    want = model.generate(torch.tensor([prompt.ids]), generation_config=config)[0, len(prompt.ids) :]
    assert got.ids == want.tolist()
    assert got.sampling_logps == [0.0] * len(got.ids)
    assert max(got.raw_logps) < 0


def test_the_models_own_generation_config_does_not_interfere(tok):
    """Nor does its repetition penalty, which no log-probability would know of."""
    plain = llama().float()
    samplers = [HFGenerate(plain, tok, cache="static"), HFGenerate(plain, tok), HFContinuous(plain, tok)]
    want = [ids_of(sampler.sample(items(tok), n=2, sampling=SAMPLING)) for sampler in samplers]
    plain.generation_config.repetition_penalty = 5.0
    plain.generation_config.top_k = 1
    plain.generation_config.min_new_tokens = 9
    assert [ids_of(sampler.sample(items(tok), n=2, sampling=SAMPLING)) for sampler in samplers] == want


def test_stop_strings(tok, model):
    sampling = SamplingConfig(max_new_tokens=24, stop=("sea", "sun the"), stop_ids=(), seed=1)
    dynamic = HFGenerate(model, tok).sample(items(tok), n=4, sampling=sampling)
    static = HFGenerate(model, tok, cache="static").sample(items(tok), n=4, sampling=sampling)
    assert ids_of(dynamic) == ids_of(static)
    assert any(not c.truncated for c in dynamic.completions)
    for c, text in zip(dynamic.completions, dynamic.texts(tok)):
        assert ("sea" in text or "sun the" in text) == (c.finish_reason == "stop")
        assert "sea" not in tok.decode(c.ids[:-1])


def test_mode_and_adapter(tok):
    from peft import LoraConfig, get_peft_model

    base = llama().float()
    before = ids_of(HFGenerate(base, tok).sample(items(tok), n=2, sampling=SAMPLING))
    peft = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.9))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=2.0)
    peft.train()
    sampler = HFGenerate(peft, tok)
    rollouts = sampler.sample(items(tok), n=2, sampling=SAMPLING)
    assert peft.training
    assert ids_of(rollouts) == ids_of(sampler.sample(items(tok), n=2, sampling=SAMPLING)) != before
    batch = rollouts.to_batch()
    with torch.no_grad():
        logps = score(peft.eval(), batch).logps
    assert sampler_mismatch(batch.columns["raw_logps"], logps, batch.segments)["mismatch/max_abs"] < 1e-4


def test_refusals(tok, model):
    sampler = HFGenerate(model, tok)
    with pytest.raises(RolloutError, match="128 positions"):
        sampler.sample(items(tok), n=1, sampling=SamplingConfig(max_new_tokens=126))
    with pytest.raises(RolloutError, match="row 7: the prompt has no tokens"):
        sampler.sample([PromptItem([], row=7)], n=1, sampling=SAMPLING)
    with pytest.raises(RolloutError, match="no prompts"):
        sampler.sample([], n=1, sampling=SAMPLING)
    with pytest.raises(RecipeError, match="no tokenizer"):
        HFGenerate(model).sample(items(tok), n=1, sampling=SamplingConfig(stop=("x",)))
    with pytest.raises(RolloutError, match="model in this process"):
        sampler.refresh("folder")
    for wrong in (
        *({"temperature": -1}, {"top_p": 0}, {"top_k": 1.5}, {"min_p": 1.0}, {"max_new_tokens": 0}),
        *(
            {"max_new_tokens": 2.5},
            {"stop": ""},
            {"stop": (1,)},
            {"stop_ids": 5},
            {"stop_ids": ("a",)},
            {"stop_ids": (-1,)},
        ),
    ):
        with pytest.raises(RecipeError, match=next(iter(wrong))):
            SamplingConfig(**wrong)


def test_finished_rows_keep_their_length():
    drawn = Drawn(2, 4, torch.device("cpu"), [9])
    rows = torch.arange(2)
    for step, tokens in enumerate([[1, 9], [2, 3], [9, 4]]):
        drawn.add(rows, step, torch.tensor(tokens), torch.zeros(2), torch.zeros(2))
    assert drawn.lengths.tolist() == [3, 1]
    assert drawn.stopped.tolist() == [True, True]


PAGES = {"page_size": 32, "num_blocks": 64, "max_batch_tokens": 64}


def test_continuous(tok, model):
    sampling = SamplingConfig(max_new_tokens=10, seed=5, stop_ids=(2, 5, 6, 7))
    sampler = HFContinuous(model, tok, settings=PAGES)
    rollouts = sampler.sample(items(tok), n=3, sampling=sampling)
    assert ids_of(rollouts) == ids_of(sampler.sample(items(tok), n=3, sampling=sampling))
    assert {c.finish_reason for c in rollouts.completions} == {"stop", "length"}
    batch = rollouts.to_batch()
    with torch.no_grad():
        logps = score(model, batch).logps
    assert sampler_mismatch(batch.columns["raw_logps"], logps, batch.segments)["mismatch/max_abs"] < 1e-4
    assert model.config._attn_implementation == "sdpa"


def test_continuous_knows_what_it_does_not_know(tok, model):
    sampling = SamplingConfig(temperature=0.7, top_k=5, max_new_tokens=6, stop=("sea",), stop_ids=(2,))
    rollouts = HFContinuous(model, tok, settings=PAGES).sample(items(tok)[:2], n=2, sampling=sampling)
    assert all(c.raw_logps is None for c in rollouts.completions)
    assert set(rollouts.to_batch().columns) == {"sampling_logps", "truncated"}
    for c in rollouts.completions:
        ids = torch.tensor([rollouts.prompts[0 if c in rollouts.groups[0] else 1].ids + c.ids])
        with torch.no_grad():
            logits = model(ids).logits[0, -len(c.ids) - 1 : -1] / 0.7
        least = logits.topk(5).values[:, -1:]
        want = logits.masked_fill(logits < least, -float("inf")).log_softmax(-1)
        torch.testing.assert_close(torch.tensor(c.sampling_logps), want[range(len(c.ids)), c.ids], atol=1e-4, rtol=1e-3)
        assert "sea" not in tok.decode(c.ids[:-1])


def test_continuous_refuses(tok):
    with pytest.raises(ModelError, match="recurrent"):
        HFContinuous(small("mamba"), tok)
    with pytest.raises(RecipeError, match="page_sise"):
        HFContinuous(llama(), tok, settings={"page_sise": 1})
    with pytest.raises(RecipeError, match="unknown setting 'seed'"):  # the sampling has one
        HFContinuous(llama(), tok, settings={"seed": 1})


def test_continuous_failures(tok, monkeypatch):
    sampler = HFContinuous(llama().float(), tok, settings=PAGES)

    def broken(*_, **__):
        sampler.lm.set_attn_implementation("eager")
        raise ValueError("no such kernel")

    monkeypatch.setattr(sampler.lm, "generate_batch", broken)
    with pytest.raises(RolloutError, match=r"does not run here \(ValueError: no such kernel\)"):
        sampler.sample(items(tok), n=1, sampling=SAMPLING)
    assert sampler.lm.config._attn_implementation == "sdpa"
    monkeypatch.setattr(sampler.lm, "generate_batch", lambda *_, **__: {})
    with pytest.raises(RolloutError, match="gave 0 of 8 completions"):
        sampler.sample(items(tok), n=2, sampling=SAMPLING)
