"""R3: formulas, propagation and filters against plain forms; references after chains against plain forward passes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.training.online.made import close, on_two_ranks, part
from tests.training.tiny import plain_logps, tiny_llama
from tokengrain.batch import Completion, Sample, Segments, TokenBatch
from tokengrain.errors import DataError, RecipeError
from tokengrain.method import Rollout, make_rollout_credit
from tokengrain.methods import dro
from tokengrain.methods.dro import (
    R3,
    Reflection,
    filter_prompts,
    length_rewards,
    log_propagation,
    reference_ranks,
    reflective_tokens,
    token_ranks,
    variability,
    worst_ranks,
)
from tokengrain.methods.grpo import group_advantages

F64 = torch.float64
LENGTHS = (7, 4)  # tokens of two references
ROLLOUTS = 5


def _r3(lp: Tensor, segments: Segments, group: Tensor, **given: Any) -> Reflection:
    quantities = {name: given.pop(name) for name in ("usable", "baseline") if name in given}
    return R3(tokenizer=None, **given).reflect(lp, segments, group, **quantities)


def _example(seed: int = 0) -> tuple[Tensor, Segments, Tensor]:
    """Two prompts whose rollouts alternate: group 0, 1, 0, 1, ..."""
    group = torch.arange(2).repeat(ROLLOUTS)
    segments = Segments.from_lengths([LENGTHS[g] for g in group.tolist()])
    lp = -2 * torch.rand(segments.total, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return lp, segments, group


def _grid(values: Tensor, segments: Segments, group: Tensor, prompt: int) -> Tensor:
    """`[G, L]` of one prompt."""
    return torch.stack([r for r, g in zip(segments.split(values), group.tolist(), strict=True) if g == prompt])


def _advantages(rewards: Tensor, group: Tensor) -> Tensor:
    return group_advantages(rewards, group, eps=1e-8, ddof=0)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("normalize", ["sum", "mean", "none"])
def test_equals_the_formulas_prompt_by_prompt(ddof: int, power: float, normalize: Any) -> None:
    lp, segments, group = _example()
    found = _r3(lp, segments, group, power=power, threshold=0.3, normalize=normalize, ddof=ddof)
    for prompt in (0, 1):
        grid = _grid(lp, segments, group, prompt)
        sigma = grid.std(0, correction=ddof)
        w = sigma**power * (sigma >= 0.3)
        w = {"sum": w / w.sum(), "mean": w * len(w) / w.sum(), "none": w}[normalize]
        torch.testing.assert_close(_grid(found.sigma, segments, group, prompt)[0], sigma)
        torch.testing.assert_close(_grid(found.weights, segments, group, prompt), w.expand_as(grid))
        torch.testing.assert_close(_grid(found.tokens, segments, group, prompt), w * grid)
        torch.testing.assert_close(found.rewards[group == prompt], grid @ w)
        effective = w.sum() ** 2 / w.square().sum()
        torch.testing.assert_close(found.metrics["r3/effective_tokens"][prompt], effective)


def test_power_0_is_the_mean_and_so_are_equal_deviations() -> None:
    lp, segments, group = _example()
    torch.testing.assert_close(_r3(lp, segments, group, power=0.0).rewards, segments.mean(lp))
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0], dtype=F64)
    one = Segments.from_lengths([6] * ROLLOUTS)
    noise = torch.cat([s * torch.full((6,), 0.4, dtype=F64) for s in signs]) + torch.arange(6, dtype=F64).repeat(5)
    zeros = torch.zeros(ROLLOUTS, dtype=torch.long)
    torch.testing.assert_close(_r3(noise, one, zeros).rewards, one.mean(noise))


def test_permuting_rollouts_and_shifting_a_token() -> None:
    lp, segments, group = _example()
    plain = _r3(lp, segments, group)
    order = torch.tensor([8, 1, 4, 9, 0, 3, 6, 5, 2, 7])
    parts = segments.split(lp)
    moved = Segments.from_lengths(segments.lengths[order].tolist())
    turned = _r3(torch.cat([parts[i] for i in order]), moved, group[order])
    torch.testing.assert_close(turned.rewards, plain.rewards[order])
    shift = torch.where(segments.positions == 2, 1.7, 0.0)
    shifted = _r3(lp + shift, segments, group)
    torch.testing.assert_close(shifted.weights, plain.weights)
    torch.testing.assert_close(_advantages(shifted.rewards, group), _advantages(plain.rewards, group))


def test_a_baseline_shared_by_the_group_cancels_and_one_per_rollout_does_not() -> None:
    lp, segments, group = _example()
    plain = _r3(lp, segments, group)
    masked = -torch.rand(sum(LENGTHS), dtype=F64, generator=torch.Generator().manual_seed(8))
    baseline = torch.cat([masked.split(LENGTHS)[g] for g in group.tolist()])
    shared = _r3(lp, segments, group, baseline=baseline)
    torch.testing.assert_close(shared.weights, plain.weights)
    assert not torch.allclose(shared.rewards, plain.rewards)
    torch.testing.assert_close(_advantages(shared.rewards, group), _advantages(plain.rewards, group))
    own = _r3(lp, segments, group, baseline=lp.flip(0))
    assert not torch.allclose(_advantages(own.rewards, group), _advantages(plain.rewards, group), atol=0.1)


def test_scaling_weights_changes_no_advantage() -> None:
    lp, segments, group = _example()
    a, b = (_r3(lp, segments, group, normalize=n).rewards for n in ("sum", "mean"))
    torch.testing.assert_close(_advantages(a, group), _advantages(b, group))


@pytest.mark.parametrize("value", [-0.1, -1 / 3, -7.7])
def test_identical_rollouts_have_no_advantage(value: float) -> None:
    segments, group = Segments.from_lengths([3] * 7), torch.zeros(7, dtype=torch.long)
    found = _r3(torch.full((21,), value, dtype=F64), segments, group)
    assert found.sigma.tolist() == [0.0] * 21
    torch.testing.assert_close(found.weights, torch.full((21,), 1 / 3, dtype=F64))  # nothing varies: uniform
    assert _advantages(found.rewards, group).tolist() == [0.0] * 7
    strict = _r3(torch.full((21,), value, dtype=F64), segments, group, min_sigma=1e-6)
    assert strict.rewards.isnan().all()
    alone, first = Segments.from_lengths([3]), torch.zeros(1, dtype=torch.long)
    one = _r3(torch.full((3,), value, dtype=F64), alone, first, ddof=1)
    assert one.sigma.tolist() == [0.0] * 3


def test_rollouts_that_are_not_usable_take_no_part() -> None:
    lp, segments, group = _example()
    usable = torch.ones(10, dtype=torch.bool)
    usable[[2, 5]] = False
    broken = torch.where(segments.broadcast(usable), lp, -torch.inf)
    found = _r3(broken, segments, group, usable=usable)
    assert found.rewards.isnan().tolist() == (~usable).tolist()
    for prompt in (0, 1):
        keep = usable[group == prompt]
        sigma = _grid(lp, segments, group, prompt)[keep].std(0, correction=0)
        torch.testing.assert_close(_grid(found.sigma, segments, group, prompt)[0], sigma)
    advantages = _advantages(found.rewards, group)
    assert (advantages[~usable] == 0).all()
    assert (advantages[usable] != 0).all()


def test_a_floor_tames_a_token_that_was_hardly_seen() -> None:
    segments, group = Segments.from_lengths([2, 2, 2]), torch.zeros(3, dtype=torch.long)
    lp = torch.tensor([-1.0, -0.5, -1.0, -2.5, -50.0, -1.5], dtype=F64)
    free, floored = (_r3(lp, segments, group, floor=f) for f in (None, -3.0))
    assert free.weights[0] > 0.95
    columns = torch.tensor([[-1.0, -1.0, -3.0], [-0.5, -2.5, -1.5]], dtype=F64)
    torch.testing.assert_close(floored.sigma[:2], columns.std(1, correction=0))


def test_references_of_one_prompt_must_be_equally_long() -> None:
    with pytest.raises(ValueError, match="same reference"):
        variability(torch.zeros(5), Segments.from_lengths([2, 3]), torch.zeros(2, dtype=torch.long))


def test_everything_is_data() -> None:
    lp, segments, group = _example()
    found = _r3(lp.requires_grad_(), segments, group, propagation=True)
    assert found.log_propagation is not None
    assert not any(v.requires_grad for v in (found.rewards, found.tokens, found.weights, found.log_propagation))


# Propagation


def _plain_propagation(lp: Tensor, reflective: Tensor, segments: Segments, gamma: float, window: int | None) -> Tensor:
    out = []
    for row, flags in zip(segments.split(lp), segments.split(reflective), strict=True):
        for j in range(len(row)):
            total = 0.0
            for k in range(j):
                d = j - k
                if flags[k] and (window is None or d <= window):
                    total += math.log(1 - (1 - math.exp(float(row[k]))) * math.exp(-gamma * d))
            out.append(total)
    return torch.tensor(out, dtype=F64)


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 3.0])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_propagation_equals_its_plain_form(gamma: float, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    lp, segments, _ = _example()
    reflective = torch.rand(segments.total, generator=torch.Generator().manual_seed(1)) < 0.4
    expected = _plain_propagation(lp, reflective, segments, gamma, window)
    torch.testing.assert_close(log_propagation(lp, reflective, segments, gamma=gamma, span=window), expected)
    monkeypatch.setattr(dro, "CHUNK", 1)  # one reflective token at a time
    torch.testing.assert_close(log_propagation(lp, reflective, segments, gamma=gamma, span=window), expected)


def test_limits_and_signs_of_propagation() -> None:
    lp, segments, group = _example()
    plain = _r3(lp, segments, group)
    found = {g: _r3(lp, segments, group, propagation=True, gamma=g) for g in (0.1, 0.5, 50.0, math.inf)}
    torch.testing.assert_close(found[math.inf].rewards, plain.rewards, rtol=0, atol=0)
    torch.testing.assert_close(found[50.0].rewards, plain.rewards)
    for x in found.values():
        assert x.log_propagation is not None
        assert (x.log_propagation <= 0).all()
        assert (x.rewards <= plain.rewards + 1e-12).all()
    assert (found[0.1].rewards < found[0.5].rewards).all()


def test_propagation_fades_with_distance_and_with_confidence() -> None:
    segments, reflective = Segments.from_lengths([6]), torch.tensor([1, 0, 0, 0, 0, 0]).bool()

    def fading(first: float) -> Tensor:
        return log_propagation(torch.tensor([first, -1, -1, -1, -1, -1], dtype=F64), reflective, segments, gamma=0.5)

    assert (fading(-2.0)[1:].diff() > 0).all()
    assert (fading(-1.0)[1:] > fading(-2.0)[1:]).all()
    spaced = log_propagation(
        torch.full((6,), -1.0, dtype=F64), reflective, segments, gamma=0.5, positions=torch.tensor([0, 2, 4, 6, 8, 10])
    )
    torch.testing.assert_close(
        spaced[1], log_propagation(torch.full((6,), -1.0, dtype=F64), reflective, segments, gamma=0.5)[2]
    )


def test_propagation_keeps_its_digits_where_everything_is_tiny() -> None:
    """P = p + (1 - p) gamma d up to second order: about 1e-20 + 1e-18, where 1 - (1 - p) exp(-gamma d) gives 0.

    And what is lost far away is about (1 - p) exp(-gamma d), where the logarithm of a number rounded to 1 gives 0.
    """
    lp, flags = torch.tensor([math.log(1e-20), 0.0], dtype=F64), torch.tensor([True, False])
    found = log_propagation(lp, flags, Segments.from_lengths([2]), gamma=1e-18)
    assert found[1].item() == pytest.approx(math.log(1.01e-18), rel=1e-12)
    far = log_propagation(torch.tensor([math.log(0.25), 0.0], dtype=F64), flags, Segments.from_lengths([2]), gamma=60.0)
    assert far[1].item() == pytest.approx(-0.75 * math.exp(-60), rel=1e-12, abs=0)


def test_reflective_tokens() -> None:
    sigma = torch.tensor([0.1, 0.5, 0.5, 0.2, 0.3])
    segments = Segments.from_lengths([4, 1])
    assert reflective_tokens(sigma, segments, rule="threshold", share=0.2).tolist() == [False, True, True, True, True]
    assert reflective_tokens(sigma, segments, rule="top", share=0.25).tolist() == [False, True, False, False, True]
    assert reflective_tokens(sigma, segments, rule="top", share=0.3).tolist() == [False, True, True, False, True]
    assert reflective_tokens(sigma, segments, rule="top", share=0.75).tolist() == [False, True, True, True, True]
    for wrong in ({"share": 0.0}, {"share": 1.5}, {"gamma": -1.0}, {"power": -1.0}):
        with pytest.raises(RecipeError, match=f"credit 'r3'.*{next(iter(wrong))}"):
            make_rollout_credit("r3", tokenizer=object(), propagation=True, **wrong)


# Length and filters


def test_length_rewards() -> None:
    reference = torch.tensor([10.0] * 5)
    found = length_rewards(torch.tensor([10.0, 7.0, 13.0, 0.0, 100.0]), reference, slope=0.5)
    assert found.tolist() == pytest.approx([1.0, 0.85, 0.85, 0.5, -3.5])


FILTER = {"rho": 0.1, "top_k": 50, "drop": 0.2, "ddof": 0}


def _ranks(seed: int = 2) -> tuple[Tensor, Tensor, Segments, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    prompts, rollouts = 12, 4
    group = torch.arange(prompts).repeat_interleave(rollouts)
    lengths = torch.randint(3, 12, (prompts,), generator=generator)
    segments = Segments.from_lengths(lengths[group].tolist())
    scale = 10 ** (2 * torch.rand(prompts, generator=generator))
    ranks = (scale[group[segments.ids]] * torch.rand(segments.total, generator=generator)).ceil().clamp(min=1)
    return -torch.rand(segments.total, dtype=F64, generator=generator), ranks, segments, group


def test_worst_ranks() -> None:
    _, ranks, segments, _ = _ranks()
    for rho in (0.1, 0.3, 1.0):
        for row, found in zip(segments.split(ranks), worst_ranks(ranks, segments, rho).tolist(), strict=True):
            count = max(1, math.ceil(rho * len(row) - 1e-9))
            assert found == pytest.approx(float(row.sort(descending=True).values[:count].mean()))
    exact = torch.arange(1, 101).float()  # 0.07 * 100 is 7, not 8
    assert worst_ranks(exact, Segments.from_lengths([100]), 0.07).item() == pytest.approx(97.0)


def test_ranks_count_strictly_larger_logits() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0]]).repeat(4, 1)
    assert token_ranks(logits, torch.arange(4)).tolist() == [4, 1, 2, 2]


def test_reach_grows_with_top_k_and_shrinks_with_rho() -> None:
    lp, ranks, segments, group = _ranks()

    def reachable(**settings: float) -> Tensor:
        return filter_prompts(lp, ranks, segments, group, **{**FILTER, **settings}).reachable

    by_k = [reachable(top_k=k) for k in (2, 5, 20, 200)]
    by_rho = [reachable(rho=r, top_k=10) for r in (1.0, 0.5, 0.1)]
    assert all(bool((a <= b).all()) for a, b in itertools.pairwise(by_k))
    assert all(bool((b <= a).all()) for a, b in itertools.pairwise(by_rho))
    assert int(by_k[0].sum()) < int(by_k[-1].sum()) == 12
    assert filter_prompts(lp, torch.ones_like(ranks), segments, group, **{**FILTER, "top_k": 1}).reachable.all()


def test_the_second_stage_depends_on_the_order_of_spreads_alone() -> None:
    lp, ranks, segments, group = _ranks()
    found = filter_prompts(lp, ranks, segments, group, rho=0.1, top_k=30, drop=0.4, ddof=0)
    survivors = found.reachable.nonzero().flatten().tolist()
    ordered = sorted(survivors, key=lambda g: -float(found.spread[g]))
    assert found.order.tolist() == ordered
    kept = ordered[: len(ordered) - math.floor(0.4 * len(ordered))]
    assert sorted(found.keep.nonzero().flatten().tolist()) == sorted(kept)
    assert torch.equal(
        filter_prompts(3 * lp, ranks, segments, group, rho=0.1, top_k=30, drop=0.4, ddof=0).keep, found.keep
    )
    equal = filter_prompts(
        torch.zeros_like(lp), torch.ones_like(ranks), segments, group, rho=0.1, top_k=50, drop=0.5, ddof=0
    )
    assert equal.keep.tolist() == [True] * 6 + [False] * 6
    sigma = variability(lp, segments, group)
    torch.testing.assert_close(found.spread[3], sigma[segments.broadcast(group) == 3].max())


# Without a model


def _ordered_share(length: int, power: float, trials: int = 150) -> float:
    """Share of pairs of traces that R3 puts in the order of their true quality."""
    generator = torch.Generator().manual_seed(length)
    rollouts = 16
    quality = torch.randn(trials, rollouts, dtype=F64, generator=generator)
    lp = 0.15 * torch.randn(trials, rollouts, length, dtype=F64, generator=generator)
    lp[:, :, :3] += 0.6 * quality[:, :, None]
    segments = Segments.from_lengths([length] * (trials * rollouts))
    group = torch.arange(trials).repeat_interleave(rollouts)
    rewards = _r3(lp.flatten(), segments, group, power=power).rewards.view(trials, rollouts)
    upper = torch.triu_indices(rollouts, rollouts, 1)
    a, b = ((x[:, upper[0]] - x[:, upper[1]]).sign() for x in (rewards, quality))
    return float((a == b).double().mean())


@pytest.mark.parametrize(("length", "expected"), [(20, (0.89, 0.94, 0.96)), (100, (0.78, 0.91, 0.95))])
def test_weights_find_the_tokens_that_reflect_the_reasoning(length: int, expected: tuple[float, ...]) -> None:
    for power, share in zip((0.0, 1.0, 2.0), expected, strict=True):
        assert _ordered_share(length, power) == pytest.approx(share, abs=0.02)


# Chains of three prompts; the last of the second prompt never ends.
COMPLETIONS = (
    ("ab#cde", "b#cd", "aab#e"),
    ("#cc", "ba#ee", "abab"),
    ("cab#d", "ac#de", "bb#ccc"),
)
REFERENCES = ("dec", "cced", "e")
END = 1


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {c: i for i, c in enumerate(["<unk>", "</s>", *"abcde# ?"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


@pytest.fixture(scope="module")
def model():
    return tiny_llama(dtype=torch.float64, vocab_size=12, initializer_range=0.6).eval()


def rollout(model, tokenizer, prompts=range(3), references=REFERENCES) -> Rollout:
    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    samples = []
    for p in prompts:
        made = []
        for text in COMPLETIONS[p]:
            cut = "#" not in text
            tokens = [*ids(text), *([] if cut else [END])]
            made.append(Completion(tokens, columns={"truncated": [float(cut)] * len(tokens)}))
        samples.append(Sample(ids("?a" + "b" * p), made, row=p, raw={"reference": references[p]}))
    batch = TokenBatch.from_samples(samples)
    rewards = torch.zeros(batch.n_completions, dtype=torch.float64)
    return Rollout(batch, rewards, {}, batch.rows, 0, model=model)


def plain(model, tokenizer, chains=None) -> list[list[torch.Tensor]]:
    """Per prompt and completion, log-probabilities of the reference after prompt and chain as one prompt."""
    step = rollout(model, tokenizer)
    samples = []
    for c, g in enumerate(step.group.tolist()):
        text = COMPLETIONS[g][c % 3]
        chain = text[: text.index("#") + 1] if "#" in text else ""
        chain = chain if chains is None else chains(chain)
        ids, reference = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (chain, REFERENCES[g]))
        samples.append(Sample([*step.batch.prompt(g).tolist(), *ids], [Completion([*reference, END])]))
    with torch.no_grad():
        found = plain_logps(model, TokenBatch.from_samples(samples))
    return [found[i : i + 3] for i in range(0, 9, 3)]


def r3(found: list[list[torch.Tensor]], weights_of, values=None) -> torch.Tensor:
    """Sum-normalised rewards `[9]`; the sixth completion has no chain."""
    rewards = []
    for g, rows in enumerate(found):
        lp = torch.stack(rows[:2] if g == 1 else rows)
        w = weights_of(lp.std(0, unbiased=False))
        scored = torch.stack(rows if values is None else values[g])
        rewards.append((w / w.sum() * scored).sum(1))
    out = torch.cat(rewards)
    out[5] = math.nan
    return out


PLAIN = {"baseline": "none", "length_weight": 0.0, "marker": "#"}


@pytest.mark.parametrize("max_tokens", [None, 24])
@pytest.mark.parametrize("power", [0, 1, 2])
def test_rewards_are_the_weighted_log_probabilities_after_each_chain(model, tokenizer, power, max_tokens):
    step = rollout(model, tokenizer)
    step.max_tokens = max_tokens
    make_rollout_credit("r3", tokenizer=tokenizer, power=power, **PLAIN)(step)
    found = plain(model, tokenizer)
    torch.testing.assert_close(step.rewards, r3(found, lambda s: s**power), equal_nan=True)
    assert step.metrics["r3/usable"] == pytest.approx(8 / 9)
    assert not step.rewards.requires_grad


def test_propagation_takes_doubt_along(model, tokenizer):
    step = rollout(model, tokenizer)
    settings = {"gamma": 0.4, "rule": "top", "share": 0.5, "span": 2}
    make_rollout_credit("r3", tokenizer=tokenizer, propagation=True, **settings, **PLAIN)(step)
    found = plain(model, tokenizer)
    spread = []
    for g, rows in enumerate(found):
        sigma = torch.stack(rows[:2] if g == 1 else rows).std(0, unbiased=False)
        reflective = sigma.topk(math.ceil(len(sigma) / 2)).indices.tolist()
        changed = []
        for lp in rows:
            value = lp.clone()
            for j in range(len(lp)):
                for k in [k for k in reflective if 0 < j - k <= 2]:
                    value[j] += math.log(1 - (1 - math.exp(lp[k])) * math.exp(-0.4 * (j - k)))
            changed.append(value)
        spread.append(changed)
    torch.testing.assert_close(step.rewards, r3(found, lambda s: s, spread), equal_nan=True)
    assert step.metrics["r3/propagation"] < 0


def test_a_baseline_that_the_group_shares_changes_no_advantage_and_its_own_does(model, tokenizer):
    # "\0" is no token of the vocabulary: the placeholder is the unknown token.
    masks = {"empty": lambda c: "#", "replaced": lambda c: "\0" * (len(c) - 1) + c[-1:]}
    found, advantages = plain(model, tokenizer), {}
    for baseline in ("none", "empty", "replaced"):
        step = rollout(model, tokenizer)
        make_rollout_credit("r3", tokenizer=tokenizer, **{**PLAIN, "baseline": baseline})(step)
        advantages[baseline] = group_advantages(step.rewards, step.group)
        if baseline in masks:
            masked = plain(model, tokenizer, masks[baseline])
            difference = [[a - b for a, b in zip(x, y)] for x, y in zip(found, masked)]
            torch.testing.assert_close(step.rewards, r3(found, lambda s: s, difference), equal_nan=True)
    close(advantages["empty"], advantages["none"], 1e-4)
    assert not torch.allclose(advantages["replaced"], advantages["none"], atol=1e-2)


def test_the_answer_should_be_as_long_as_the_reference(model, tokenizer):
    step = rollout(model, tokenizer)
    step.rewards += 5
    make_rollout_credit("r3", tokenizer=tokenizer, weight=0, marker="#", length_weight=2, length_slope=0.5)(step)
    answers = torch.tensor([4, 3, 2, 3, 3, 4, 2, 3, 4.0])  # with the end token
    references = torch.tensor([4.0, 5, 2]).repeat_interleave(3)
    expected = 5 + 2 * (1 - 0.5 * (references - answers).abs() / references)
    expected[5] = math.nan
    torch.testing.assert_close(step.rewards, expected.double(), equal_nan=True)
    other = rollout(model, tokenizer)
    other.rewards += 5
    make_rollout_credit("r3", tokenizer=tokenizer, weight=0, marker="#", length_weight=2, combine="replace", end=False)(
        other
    )
    expected = 2 * (1 - 0.5 * (references - answers).abs() / (references - 1))
    known = torch.arange(9) != 5
    torch.testing.assert_close(other.rewards[known], expected.double()[known])


def test_filters_look_at_all_ranks(model, tokenizer):
    step = rollout(model, tokenizer)
    ids = [[*tokenizer(r, add_special_tokens=False)["input_ids"], END] for r in REFERENCES]
    chains = [tokenizer(t.split("#")[0] + "#", add_special_tokens=False)["input_ids"] for g in COMPLETIONS for t in g]
    ranks = reference_ranks(model, step.batch.with_endings(chains, ids), 24).double()
    worst = [r.max() for r in step.batch.with_endings(chains, ids).segments.split(ranks)]
    best = [float(min(w for c, w in enumerate(worst[3 * g : 3 * g + 3]) if 3 * g + c != 5)) for g in range(3)]
    limit = sorted(best)[1]  # one prompt is out of reach
    assert sorted(best)[2] > limit
    settings = {**PLAIN, "filter_top_k": limit, "filter_rho": 0.01, "filter_drop": 0.5}
    shares, _ = on_two_ranks(step, lambda: make_rollout_credit("r3", tokenizer=tokenizer, **settings))
    make_rollout_credit("r3", tokenizer=tokenizer, **settings)(step)
    assert step.metrics["r3/reachable"] == pytest.approx(2 / 3)
    found = [torch.stack(rows[:2] if g == 1 else rows) for g, rows in enumerate(plain(model, tokenizer))]
    spread = [float(lp.std(0, unbiased=False).max()) for lp in found]
    reachable = [g for g in range(3) if best[g] <= limit]
    assert step.keep.nonzero().flatten().tolist() == [max(reachable, key=lambda g: spread[g])]
    assert torch.equal(torch.stack([shares[0].keep[0], shares[1].keep[0], shares[0].keep[1]]), step.keep)
    torch.testing.assert_close(shares[0].rewards, part(step, [0, 2]).rewards)


def test_ranks_count_larger_logits(model, tokenizer):
    step = rollout(model, tokenizer)
    batch = step.batch.with_endings([[2]] * 9, [[3, 4], [5], [6, 7, 8]])
    found = reference_ranks(model, batch).tolist()
    text = torch.tensor([[*step.batch.prompt(0).tolist(), 2, 3, 4]])
    logits = model(input_ids=text).logits[0, -3:-1]
    assert found[:2] == [int((x > x[i]).sum()) + 1 for x, i in zip(logits, (3, 4))]


def test_frozen_model_as_scorer(model, tokenizer):
    other = tiny_llama(seed=4, dtype=torch.float64, vocab_size=12, initializer_range=0.6).eval()
    step, expected = rollout(model, tokenizer), rollout(other, tokenizer)
    make_rollout_credit("r3", tokenizer=tokenizer, scorer="reference", reference=other, **PLAIN)(step)
    make_rollout_credit("r3", tokenizer=tokenizer, **PLAIN)(expected)
    torch.testing.assert_close(step.rewards, expected.rewards, equal_nan=True)


def test_refusals(model, tokenizer):
    with pytest.raises(RecipeError, match="expected one of them"):
        make_rollout_credit("r3", tokenizer=tokenizer, propagation=True, baseline="empty")
    with pytest.raises(RecipeError, match="there is no reference model"):
        make_rollout_credit("r3", tokenizer=tokenizer, scorer="reference")
    with pytest.raises(RecipeError, match="needs tokenizer"):
        make_rollout_credit("r3")
    with pytest.raises(DataError, match=r"row 1: field 'reference': no reference answer; got ''"):
        make_rollout_credit("r3", tokenizer=tokenizer, **PLAIN)(rollout(model, tokenizer, references=("dec", "", "e")))
