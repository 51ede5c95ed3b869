"""Branches of completions: where they leave, what they share, what counts."""

from dataclasses import replace

import pytest
import torch

from tests.credit.small import llama, tokenizer
from tokengrain.errors import RecipeError
from tokengrain.methods._entropy_window import batch_threshold, window_means
from tokengrain.rewards.suite import RewardSuite
from tokengrain.rollout.branching import Branching
from tokengrain.rollout.local import HFGenerate
from tokengrain.rollout.sampler import PromptItem, SamplingConfig
from tokengrain.scoring.score import score

LENGTH = 10
TEXTS = ["write about the sea", "write kindly about the sun in the sea :", "sea"]
SAMPLING = SamplingConfig(max_new_tokens=LENGTH, seed=3, stop_ids=(2,))


@pytest.fixture(scope="module")
def tok():
    return tokenizer()


@pytest.fixture(scope="module")
def model():
    return llama().float()


def items(tok):
    return [PromptItem(tok(t)["input_ids"], row=f"r{i}", raw={"prompt": t}) for i, t in enumerate(TEXTS)]


def test_branches_leave_where_windows_are_high(tok, model):
    plain = HFGenerate(model, tok).sample(items(tok), n=3, sampling=SAMPLING)
    settings = {"window": 2, "quantile": 0.6, "per_completion": 2, "per_prompt": 3}
    found = Branching(HFGenerate(model, tok), model, **settings).sample(items(tok), n=3, sampling=SAMPLING)
    batch = plain.to_batch()
    entropy = score(model, batch, ("entropy",)).entropy.detach()
    tau = batch_threshold(entropy, batch.segments, mode="paper", window=2, quantile=0.6)
    means = batch.segments.split(window_means(entropy, batch.segments, window=2, own=True))
    branches = 0
    for g, group in enumerate(found.groups):
        assert group[:3] == plain.groups[g]
        assert len(group) <= 6
        for c in group[3:]:
            branches += 1
            parents = [k for k in range(3) if plain.groups[g][k].ids[: c.context] == c.ids[: c.context]]
            assert c.context > 0
            assert any(len(means[3 * g + k]) > c.context and means[3 * g + k][c.context] >= tau for k in parents)
            assert c.context < len(c.ids) <= LENGTH
            assert (c.ids[-1] == 2) == (c.finish_reason == "stop")
            assert c.truncated == (len(c.ids) == LENGTH and c.ids[-1] != 2)
    assert branches >= 3
    assert sum(len(g) - 3 for g in found.groups) == branches
    again = Branching(HFGenerate(model, tok), model, **settings).sample(items(tok), n=3, sampling=SAMPLING)
    assert again.groups == found.groups


def test_shared_tokens_are_context(tok, model):
    found = Branching(HFGenerate(model, tok), model, window=1, quantile=0.5, per_prompt=2).sample(
        items(tok), n=2, sampling=SAMPLING
    )
    batch = found.to_batch()
    contexts = [c.context for c in found.completions]
    assert max(contexts) > 0
    assert batch.segments.lengths.tolist() == [len(c.ids) - c.context for c in found.completions]
    logps = score(model, batch).logps.detach()
    torch.testing.assert_close(batch.columns["raw_logps"], logps, atol=2e-5, rtol=1e-4)
    # Rewards read the whole text; those per token are over what counts.

    def reward(completion_ids):
        assert completion_ids == [c.ids for c in found.completions]
        return [[1.0] * (len(ids) - context) for ids, context in zip(completion_ids, contexts)]

    result = RewardSuite([reward]).score(found, texts=[""] * len(contexts))
    assert result.token_rewards.shape == (batch.segments.total,)


def test_each_window_once_and_positions(tok, model):
    few = Branching(HFGenerate(model, tok), model, window=1, quantile=0.0).sample(items(tok), n=2, sampling=SAMPLING)
    # Every window fires: they are one stretch of neighbours, whose first token that shares something is the second.
    assert {c.context for c in few.completions} == {0, 1}
    assert [len(g) for g in few.groups] == [4, 4, 4]
    model.config.max_position_embeddings, before = len(items(tok)[1].ids) + LENGTH, model.config.max_position_embeddings
    try:
        tight = Branching(HFGenerate(model, tok), model, window=1, quantile=0.5, per_completion=3, per_prompt=6)
        found = tight.sample(items(tok), n=2, sampling=SAMPLING)
        assert len({c.context for c in found.completions}) > 2
        assert max(len(c.ids) for c in found.completions) <= LENGTH
    finally:
        model.config.max_position_embeddings = before


def test_a_stop_string_may_begin_before_the_branch(tok, model):
    sampler = Branching(HFGenerate(model, tok), model, tok, window=1, quantile=0.3, per_completion=3, per_prompt=12)
    prompts = [PromptItem(items(tok)[0].ids, row=f"r{i}") for i in range(12)]
    free = sampler.sample(prompts, n=4, sampling=SAMPLING)
    seams = [tok.decode(c.ids[c.context - 1 : c.context + 1]) for g in free.groups for c in g if c.context]
    stop = max((s for s in seams if " " in s), key=seams.count)
    found = sampler.sample(prompts, n=4, sampling=replace(SAMPLING, stop=(stop,)))
    branches = [c for group in found.groups for c in group if c.context]
    at_seams = [c for c in branches if tok.decode(c.ids[c.context - 1 : c.context + 1]) == stop]
    assert at_seams
    for c in at_seams:
        assert (len(c.ids), c.finish_reason) == (c.context + 1, "stop")
        assert len(c.raw_logps) == len(c.sampling_logps) == len(c.ids)
    assert all(stop not in tok.decode(c.ids[:-1]) for c in branches)
    with pytest.raises(RecipeError, match="no tokenizer to find strings"):
        Branching(HFGenerate(model, tok), model).sample(prompts, n=1, sampling=replace(SAMPLING, stop=(stop,)))


def test_triggers_refresh_and_refusals(tok, model):
    every = Branching(HFGenerate(model, tok), model, window=1, quantile=0.0, per_completion=9, per_prompt=99)
    words = Branching(
        HFGenerate(model, tok),
        model,
        tok,
        window=1,
        quantile=0.0,
        triggers=("sea", "calm", "deep", "was"),
        per_completion=9,
        per_prompt=99,
    )
    found = words.sample(items(tok), n=3, sampling=SAMPLING)
    plain = every.sampler.sample(items(tok), n=3, sampling=SAMPLING)
    left = 0
    for group, parents in zip(found.groups, plain.groups, strict=True):
        assert group[:3] == parents
        for c in group[3:]:
            # Left before one of the words, which the parent has there.
            starts = [p.ids[c.context] for p in parents if p.ids[: c.context] == c.ids[: c.context]]
            assert {"sea", "calm", "deep", "was"} & set(tok.convert_ids_to_tokens(starts))
            left += 1
    assert left > 0
    other = llama().float()
    words.refresh(other)
    assert words.model is other
    assert words.sampler.model is other
    sampler = HFGenerate(model, tok)
    for settings, message in (
        ({"window": 0}, "window = 0: .* greater than or equal to 1"),
        ({"quantile": 1.5}, "quantile = 1.5"),
        ({"mode": "papers"}, "mode = 'papers'"),
        ({"triggers": ("because",)}, "sampler 'branching' needs a tokenizer"),
    ):
        with pytest.raises(RecipeError, match=message):
            Branching(sampler, model, **settings)
    with pytest.raises(RecipeError, match="sampler 'branching': none of the 1 trigger words"):
        Branching(sampler, model, tok, triggers=("because",))
