"""r3: references after chains against plain forward passes; rewards by hand; baselines, filters, ranks, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.training.online.made import close, on_two_ranks, part
from tests.training.tiny import plain_logps, tiny_llama
from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.errors import DataError, RecipeError
from tokengrain.method import RolloutStep, make_rollout_credit
from tokengrain.methods.dro import reference_batch, reference_ranks
from tokengrain.methods.grpo import group_advantages

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


def rollout(model, tokenizer, prompts=range(3), references=REFERENCES) -> RolloutStep:
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
    return RolloutStep(batch, rewards, {}, batch.rows, 0, model=model)


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
    ranks = reference_ranks(model, reference_batch(step.batch, chains, ids), 24).double()
    worst = [r.max() for r in reference_batch(step.batch, chains, ids).segments.split(ranks)]
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
    batch = reference_batch(step.batch, [[2]] * 9, [[3, 4], [5], [6, 7, 8]])
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
