"""T-REG: the losses, the instructions, and contrastive prompting."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.credit.small import llama, pairs, tokenizer
from tests.methods.examples import F64, Example, example, finite_difference, gradient, mean_loss
from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.errors import DataError, RecipeError
from tokengrain.loss import LossOutput, token_weights
from tokengrain.method import make_credit
from tokengrain.methods.dpo import dpo_loss
from tokengrain.methods.simpo import simpo_loss
from tokengrain.methods.tgdpo import tgdpo_loss
from tokengrain.methods.treg import (
    TEMPLATES,
    ContrastiveTemplates,
    contrastive_token_rewards,
    make_templates,
    treg_loss,
    treg_simpo_loss,
)
from tokengrain.scoring.reference import FrozenReference

BASES = ("dpo", "simpo")


def _treg(base: str, x: Example, logps: Tensor, rewards: Tensor | None = None, **hyper: object) -> LossOutput:
    r = x.token_rewards if rewards is None else rewards
    if base == "dpo":
        return treg_loss(logps, x.segments, ref_logps=x.ref_logps, token_rewards=r, beta=0.3, **hyper)
    return treg_simpo_loss(logps, x.segments, token_rewards=r, beta=2.0, gamma=0.6, **hyper)


def _base(base: str, x: Example, logps: Tensor) -> LossOutput:
    if base == "dpo":
        return dpo_loss(logps, x.segments, ref_logps=x.ref_logps, beta=0.3)
    return simpo_loss(logps, x.segments, beta=2.0, gamma=0.6)


def _scale(base: str, x: Example) -> Tensor:
    """Implicit reward per nat, `[C]`."""
    return torch.full((6,), 0.3, dtype=F64) if base == "dpo" else 2.0 / x.segments.lengths.to(F64)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("case", ["alpha 0", "better equals worse"])
def test_no_credit_is_the_base_method_exactly(base: str, case: str) -> None:
    x = example()
    alpha = 0.0 if case == "alpha 0" else 0.5
    r = x.token_rewards if alpha == 0 else contrastive_token_rewards(x.ref_logps, x.ref_logps)
    treg, plain = _treg(base, x, x.logps, r, alpha=alpha), _base(base, x, x.logps)
    assert torch.equal(treg.losses, plain.losses)
    for key, value in plain.metrics.items():
        assert torch.equal(treg.metrics[key], value), key
    a = gradient(lambda p: mean_loss(_treg(base, x, p, r, alpha=alpha), x.segments), x.logps)
    b = gradient(lambda p: mean_loss(_base(base, x, p), x.segments), x.logps)
    torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("base", BASES)
def test_loss_by_the_formula(base: str) -> None:
    x, alpha = example(), 0.4
    output, plain = _treg(base, x, x.logps, alpha=alpha), _base(base, x, x.logps)
    R = -_scale(base, x) * x.segments.sum(x.token_rewards * x.logps)
    gamma = 0.0 if base == "dpo" else 0.6
    w = torch.sigmoid(gamma - plain.metrics["rewards/margins"])
    torch.testing.assert_close(output.losses, plain.losses + alpha * w * (R[0::2] + R[1::2]))
    torch.testing.assert_close(output.metrics["sequence_weights"], w)
    torch.testing.assert_close(output.metrics["loss/base"], plain.losses)
    torch.testing.assert_close(output.metrics["loss/regulariser"], output.losses - plain.losses)
    torch.testing.assert_close(output.metrics["regulariser/chosen"], R[0::2])


@pytest.mark.parametrize("base", BASES)
def test_gradient_is_the_base_gradient_with_token_weights(base: str) -> None:
    x, alpha = example(), 0.4
    output = _treg(base, x, x.logps, alpha=alpha)
    sign = torch.where(x.segments.is_chosen, 1.0, -1.0).to(F64)
    w = x.segments.broadcast(output.metrics["sequence_weights"].repeat_interleave(2))
    c = x.segments.broadcast(_scale(base, x)) * w / x.pairs
    expected = -c * sign * (1 + alpha * sign * x.token_rewards)
    grad = gradient(lambda p: mean_loss(_treg(base, x, p, alpha=alpha), x.segments), x.logps)
    torch.testing.assert_close(grad, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("base", BASES)
def test_sequence_weight_is_detached(base: str) -> None:
    """Finite differences with w frozen match the gradient, with w moving they must not."""
    x = example()

    def loss(logps: Tensor, w: Tensor | None = None) -> Tensor:
        if w is None:
            return mean_loss(_treg(base, x, logps, alpha=0.5), x.segments)
        # The base with w frozen: base + w * alpha (R_w + R_l), by linearity from static weights of 0 and 1.
        zero, one = (_treg(base, x, logps, alpha=0.5, sequence_weight=s).losses for s in (0.0, 1.0))
        return (zero + w * (one - zero)).mean()

    w = _treg(base, x, x.logps, alpha=0.5).metrics["sequence_weights"]
    grad, at = gradient(loss, x.logps), x.logps.detach()
    torch.testing.assert_close(finite_difference(lambda p: loss(p, w), at), grad, rtol=1e-6, atol=1e-8)
    assert (finite_difference(loss, at) - grad).abs().max() > 1e-3


def test_static_weight() -> None:
    x = example()
    output = _treg("dpo", x, x.logps, alpha=0.5, sequence_weight=0.25)
    assert torch.equal(output.metrics["sequence_weights"], torch.full((3,), 0.25, dtype=F64))
    # At a margin of 0 the dynamic weight is 1/2.
    x.ref_logps = x.logps.detach()
    dynamic = _treg("dpo", x, x.logps)
    assert torch.equal(dynamic.metrics["sequence_weights"], torch.full((3,), 0.5, dtype=F64))
    assert torch.equal(dynamic.losses, _treg("dpo", x, x.logps, sequence_weight=0.5).losses)


def test_gamma_may_be_left_out_of_the_sequence_weight() -> None:
    x = example()
    with_gamma, without = (_treg("simpo", x, x.logps, margin_in_sequence_weight=flag).metrics for flag in (True, False))
    margins = with_gamma["rewards/margins"]
    torch.testing.assert_close(with_gamma["sequence_weights"], torch.sigmoid(0.6 - margins))
    torch.testing.assert_close(without["sequence_weights"], torch.sigmoid(-margins))


def test_extreme_credit_scales_the_gradient_of_dpo() -> None:
    x, alpha = example(), 0.5
    r = torch.where(x.segments.is_chosen, 0.5, -0.5).to(F64)
    grad = gradient(lambda p: mean_loss(_treg("dpo", x, p, r, alpha=alpha), x.segments), x.logps)
    plain = gradient(lambda p: mean_loss(_base("dpo", x, p), x.segments), x.logps)
    torch.testing.assert_close(grad, (1 + alpha / 2) * plain)


def test_treg_and_tgdpo_have_the_same_gradient_but_for_the_margin_in_the_sigmoid() -> None:
    x, alpha, beta = example(), 0.4, 0.3
    treg = gradient(lambda p: mean_loss(_treg("dpo", x, p, alpha=alpha), x.segments), x.logps)
    tgdpo = gradient(
        lambda p: mean_loss(tgdpo_loss(p, x.segments, **x.guided, beta=beta, alpha=alpha), x.segments),
        x.logps,
    )
    f = token_weights(x.token_rewards, x.segments, alpha=alpha)
    # Without their weights both are constant in a completion: only c differs.
    for grad in (treg, tgdpo):
        for part in x.segments.split(grad / f):
            torch.testing.assert_close(part, part[:1].expand_as(part))
    assert (treg - tgdpo).abs().max() > 1e-3


def test_contrastive_rewards_are_odd_bounded_and_shift_invariant() -> None:
    better, worse = torch.randn(2, 1000) * 5
    r = contrastive_token_rewards(better, worse)
    assert torch.equal(contrastive_token_rewards(worse, better), -r)  # float equality
    assert torch.equal(contrastive_token_rewards(better, better), torch.zeros(1000))
    assert (r.abs() <= 0.5).all()
    shift = torch.randn(1000, dtype=F64)
    shifted = contrastive_token_rewards(better.double() + shift, worse.double() + shift)
    torch.testing.assert_close(shifted, contrastive_token_rewards(better.double(), worse.double()))
    torch.testing.assert_close(r, torch.sigmoid(better - worse) - 0.5)
    extreme = contrastive_token_rewards(torch.tensor([0.0, -50.0, 0.0]), torch.tensor([-50.0, 0.0, -1e4]))
    assert extreme.tolist() == [0.5, -0.5, 0.5]


def test_credit_metrics() -> None:
    x = example((2, 1, 1, 2))
    r = torch.tensor([0.4, -0.2, 0.1, 0.0, 0.3, -0.1], dtype=F64)
    m = treg_loss(x.logps, x.segments, ref_logps=x.ref_logps, token_rewards=r).metrics
    torch.testing.assert_close(m["credit/abs_chosen"], torch.tensor([0.3, 0.0], dtype=F64))
    torch.testing.assert_close(m["credit/positive_rejected"], torch.tensor([1.0, 0.5], dtype=F64))


REVISE = ContrastiveTemplates(
    "revise better : {prompt} . {response} :", "revise worse : {prompt} . {response} :", "revise"
)
SWAPPED = ContrastiveTemplates(REVISE.worse, REVISE.better)
KIND = {"better": "write kindly{prompt}", "worse": "write rudely{prompt}", "drop_prefix": "write"}


def _plain(model: nn.Module, context: list[int], ids: list[int], counted: list[bool]) -> Tensor:
    """Log-probabilities of the counted ids after a context, by the model's own forward."""
    with torch.no_grad():
        logits = model(torch.tensor([context + ids])).logits[0]
    logps = torch.log_softmax(logits[len(context) - 1 : -1], -1)
    return logps.gather(1, torch.tensor(ids)[:, None])[:, 0][torch.tensor(counted)]


def _expected(model: nn.Module, tok: object, batch: TokenBatch, better: str, worse: str) -> Tensor:
    parts = []
    for c in range(batch.n_completions):
        ids = batch.completion(c).tolist()
        start, end = batch.completion_offsets[c : c + 2].tolist()
        counted = batch.counted[start:end].tolist()
        prompt = tok.decode(batch.prompt(int(batch.group[c])), skip_special_tokens=True)
        response = tok.decode(ids, skip_special_tokens=True)
        sides = []
        for template in (better, worse):
            text = template.replace("{prompt}", prompt).replace("{response}", response)
            context = [i for i in tok(text)["input_ids"] if i != 2]
            sides.append(_plain(model, context, ids, counted))
        parts.append(torch.sigmoid(sides[0] - sides[1]) - 0.5)
    return torch.cat(parts)


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 40, 10_000])
def test_equals_a_plain_computation(chunk_tokens: int, holes: bool, eos: bool) -> None:
    model, tok = llama(), tokenizer(eos=eos)
    tok.add_eos_token = eos
    batch = pairs(tokenizer(), holes=holes)
    source = make_credit("contrastive", model=model, tokenizer=tok, templates=REVISE, chunk_tokens=chunk_tokens)
    credit = source(batch)
    assert not credit.requires_grad
    torch.testing.assert_close(credit, _expected(model, tok, batch, REVISE.better, REVISE.worse))
    assert (source.scored, source.shortened) == (4, 0)


def test_swapped_templates_negate_it_exactly_and_the_prompt_may_come_from_the_ids() -> None:
    model, tok = llama(), tokenizer()
    a = make_credit("contrastive", model=model, tokenizer=tok, templates=REVISE)(pairs(tok))
    b = make_credit("contrastive", model=model, tokenizer=tok, templates=SWAPPED)(pairs(tok, raw=False))
    assert torch.equal(a, -b)
    assert a.abs().max() > 1e-3


def test_an_instruction_may_replace_the_prompts_beginning() -> None:
    model, tok = llama(), tokenizer()
    source = make_credit("contrastive", model=model, tokenizer=tok, templates=KIND)
    batch = pairs(tok)
    better, worse = source.preview("write about the sea :", "")
    assert better == "<s> write kindly about the sea :"
    assert worse == "<s> write rudely about the sea :"
    credit = source(batch)
    for c in (0, 3):
        ids = batch.completion(c).tolist()
        prompt = batch.raw[c // 2]["prompt"].removeprefix("write")
        sides = [
            _plain(model, tok(f"write {how}{prompt}")["input_ids"], ids, [True] * len(ids))
            for how in ("kindly", "rudely")
        ]
        expected = 0.5 * torch.tanh((sides[0] - sides[1]) / 2)
        torch.testing.assert_close(batch.segments.split(credit)[c], expected)
    odd = TokenBatch.from_samples([Sample([4], [Completion([4])], row="r9", raw={"prompt": "about the sea"})])
    with pytest.raises(DataError, match=r"row r9: field 'prompt': .*begins with 'write'"):
        source(odd)


def test_chat_models_get_the_instruction_as_a_message() -> None:
    model, tok = llama(), tokenizer(chat=True)
    source = make_credit("contrastive", model=model, tokenizer=tok, templates=REVISE)
    batch = pairs(tok)
    chat = [f"user : {side} ." for side in (REVISE.better, REVISE.worse)]
    expected = _expected(model, tokenizer(bos=False), batch, *chat)
    torch.testing.assert_close(source(batch), expected)
    plain = make_credit("contrastive", model=model, tokenizer=tok, templates=REVISE, chat=False)
    assert not torch.allclose(plain(batch), source(batch))
    with pytest.raises(RecipeError, match="no chat template"):
        make_credit("contrastive", model=model, tokenizer=tokenizer(), templates=REVISE, chat=True)


def test_a_conversation_is_the_prompt_of_a_multi_turn_row() -> None:
    tok = tokenizer()
    turns = [
        {"role": "user", "content": "write about the sea"},
        {"role": "assistant", "content": [{"type": "text", "text": "the sea was calm"}]},
        {"role": "user", "content": "not calm"},
    ]
    seen: list[str] = []
    source = make_credit("contrastive", model=llama(), tokenizer=tok, templates=REVISE)
    tokenised = source._tokenised
    source._tokenised = lambda text, *more: seen.append(text) or tokenised(text, *more)
    source(TokenBatch.from_samples([Sample([4], [Completion([4])], raw={"prompt": turns})]))
    assert "User: write about the sea\n\nAssistant: the sea was calm\n\nUser: not calm" in seen[0]
    source(TokenBatch.from_samples([Sample([4], [Completion([4])], raw={"prompt": turns[:1]})]))
    assert seen[-2].startswith("revise better : write about the sea . ")


def test_long_contexts_lose_the_copies_never_the_completion() -> None:
    tok = tokenizer()
    batch = pairs(tok)
    lengths = batch.completion_offsets.diff().tolist()  # 8, 6, 7, 10 with EOS
    source = make_credit("contrastive", model=llama(), tokenizer=tok, templates=REVISE, positions=26)
    seen: list[list[int]] = []
    tokenised = source._tokenised

    def watch(text: str, *more: list[int]) -> list[int]:
        seen.append(tokenised(text, *more))
        return seen[-1]

    source._tokenised = watch
    credit = source(batch)
    assert credit.shape == (sum(lengths),)
    assert torch.isfinite(credit).all()
    assert source.scored == 4
    # Instruction: 4 words, <s>, prompt of 8 or 5, ".", ":", copy; with the completion at most 26.
    needed = [
        5 + 8 + 2 + 2 * 8 - 1 - 1,
        5 + 8 + 2 + 2 * 6 - 1 - 1,
        5 + 5 + 2 + 2 * 7 - 2,
        5 + 5 + 2 + 2 * 10 - 2,
    ]
    assert source.shortened == sum(n > 26 for n in needed)
    full = make_credit("contrastive", model=llama(), tokenizer=tok, templates=REVISE)(batch)
    for c, n in enumerate(needed):
        same = torch.equal(batch.segments.split(full)[c], batch.segments.split(credit)[c])
        assert same == (n <= 26)


def test_prompts_are_shortened_next_and_then_it_is_an_error() -> None:
    tok = tokenizer()
    batch = pairs(tok)
    tight = make_credit("contrastive", model=llama(), tokenizer=tok, templates=REVISE, positions=18)
    tight(batch)
    assert tight.shortened == 4
    impossible = make_credit("contrastive", model=llama(), tokenizer=tok, templates=REVISE, positions=12)
    with pytest.raises(DataError, match=r"row r0: the completion leaves no room .*12 positions"):
        impossible(batch)


def test_positions_come_from_the_models_config() -> None:
    tok = tokenizer()
    assert make_credit("contrastive", model=llama(positions=77), tokenizer=tok).positions == 77
    assert make_credit("contrastive", model=FrozenReference(llama(positions=33)), tokenizer=tok).positions == 33


def test_the_scorer_is_left_as_it_was_and_gets_no_gradient() -> None:
    model, tok = llama().train(), tokenizer()
    make_credit("contrastive", model=model, tokenizer=tok, templates=REVISE)(pairs(tok))
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_adapter_off() -> None:
    peft = pytest.importorskip("peft")
    base, tok = llama(), tokenizer()
    plain = make_credit("contrastive", model=llama(), tokenizer=tok, templates=REVISE)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    off = make_credit("contrastive", model=model, tokenizer=tok, templates=REVISE)
    on = make_credit("contrastive", model=model, tokenizer=tok, templates=REVISE, adapter_off=False)
    batch = pairs(tok)
    torch.testing.assert_close(off(batch), plain(batch))
    assert not torch.allclose(on(batch), plain(batch))
    before = off.fingerprint(), on.fingerprint()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_" in n).add_(1.0)
    assert off.fingerprint() == before[0]
    assert on.fingerprint() != before[1]
    with pytest.raises(RecipeError, match="has no adapter"):
        make_credit("contrastive", model=llama(), tokenizer=tok, adapter_off=True)


def test_fingerprints_tell_settings_and_weights_apart() -> None:
    tok = tokenizer()

    def of(seed: int = 0, **kwargs: object) -> str:
        settings = {"templates": REVISE, **kwargs}
        return make_credit("contrastive", model=llama(seed), tokenizer=tok, **settings).fingerprint()

    assert of() == of()
    assert len({of(), of(seed=1), of(templates=SWAPPED), of(positions=50)}) == 4


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_templates_differ_and_fill(name: str) -> None:
    better, worse = TEMPLATES[name].fill("What is {response}?", "It is {prompt}.")
    assert better != worse
    for side in (better, worse):
        assert "What is {response}?" in side  # what a user wrote is not a slot
        if TEMPLATES[name].shows_response:
            assert "It is {prompt}." in side


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ("generel", "unknown templates 'generel'; did you mean 'general'"),
        ({"better": "{prompt}"}, "worse missing"),
        (
            {"better": "a {prompt}", "worse": "b {prompt}", "wrose": ""},
            "unknown key 'wrose'; did you mean 'worse'",
        ),
        ({"better": "a", "worse": "b {prompt}"}, "'better' has no slot {prompt}"),
        ({"better": "{prompt}", "worse": "{prompt}"}, "are equal"),
        ({"better": "{prompt}{response}", "worse": "b {prompt}"}, "in both sides or in neither"),
    ],
)
def test_bad_templates(templates: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_templates(templates)


def test_by_name() -> None:
    tok = tokenizer()
    source = make_credit("contrastive", model=llama(), tokenizer=tok, templates=KIND, scale=-1)
    swapped = {**KIND, "better": KIND["worse"], "worse": KIND["better"]}
    flipped = make_credit("contrastive", model=llama(), tokenizer=tok, templates=swapped)
    batch = pairs(tok)
    assert torch.equal(source(batch), flipped(batch))
