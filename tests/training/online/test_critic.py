"""The critic: values before the action, one exact step per minibatch, a state that goes on where it stopped."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForTokenClassification

from tests.training.online.made import made_batch
from tests.training.ranks import on_ranks
from tests.training.tiny import VOCABULARY, tiny_llama
from tokengrain.errors import ModelError, NonFiniteLossError, RecipeError, RunError
from tokengrain.scoring.token_scores import CompletionStatistics, ScoreStatistics, set_statistics
from tokengrain.training.critic import Critic


def reward_model(dtype=torch.float64) -> LlamaForTokenClassification:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(
        vocab_size=VOCABULARY, num_hidden_layers=1, num_labels=1, classifier_dropout=0.0, initializer_range=0.3, **shape
    )
    torch.manual_seed(7)
    return LlamaForTokenClassification(config).to(dtype)


def minibatch(seed: int = 0):
    batch = made_batch(seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    return batch.with_columns(returns=torch.randn(batch.segments.total, generator=generator))


def plain_values(model, batch) -> list[torch.Tensor]:
    """Per completion, the score at the position before each token."""
    out = []
    for c, g in enumerate(batch.group.tolist()):
        prompt, completion = batch.prompt(g), batch.completion(c)
        out.append(model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1, 0])
    return out


def test_values_are_read_before_the_action_whatever_the_parts():
    source, batch = reward_model(), minibatch()
    critic, small = Critic(source), Critic(source, max_tokens_per_microbatch=25)
    expected = torch.cat(plain_values(source, batch)).detach()
    for one in (critic, small):
        got = one.values(batch)
        assert not got.requires_grad
        torch.testing.assert_close(got, expected, check_dtype=False, rtol=1e-6, atol=1e-6)
    assert critic.model is not source
    assert critic.model.training


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("max_tokens", [None, 30])
def test_a_step_is_adamw_on_the_clipped_loss(reduction, max_tokens):
    source, batch = reward_model(), minibatch()
    settings = {"lr": 1e-3, "clip_range": 0.3, "weight": 0.5, "max_grad_norm": 0.7}
    critic = Critic(source, reduction=reduction, max_tokens_per_microbatch=max_tokens, **settings)
    critic.begin("cpu")
    metrics = critic.update(batch)
    twin = copy.deepcopy(source)
    old, returns = (batch.segments.split(batch.columns[n]) for n in ("values", "returns"))
    errors = []
    for v, v0, r in zip(plain_values(twin, batch), old, returns):
        clipped = v0 + (v - v0).clamp(-0.3, 0.3)
        errors.append(0.5 * torch.maximum((v - r) ** 2, (clipped - r) ** 2))
    loss = torch.stack([e.mean() for e in errors]).mean() if reduction == "mean" else torch.cat(errors).mean()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.7)
    optimizer.step()
    assert metrics["critic/loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
    assert metrics["critic/grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert 0 < metrics["critic/clipped"] < 1
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(critic.model.state_dict()[name], value, rtol=0, atol=1e-6)


def test_the_decoder_of_a_policy_with_a_fresh_head():
    policy = tiny_llama()
    before = {n: p.clone() for n, p in policy.state_dict().items()}
    critic = Critic(policy, lr=1e-2)
    assert critic.statistics is None
    first = critic.update(minibatch())["critic/error"]
    for _ in range(20):
        last = critic.update(minibatch())
    assert last["critic/error"] < 0.7 * first
    assert all(torch.equal(v, before[n]) for n, v in policy.state_dict().items())


def test_values_are_on_the_scale_of_rewards():
    source, batch = reward_model(), minibatch()
    plain = Critic(source).values(batch)
    set_statistics(source, ScoreStatistics(3.0, 2.0))
    torch.testing.assert_close(Critic(source).values(batch), (plain - 3) / 2)
    assert torch.equal(Critic(source, use_statistics=False).values(batch), plain)
    set_statistics(source, CompletionStatistics(1.0, 4.0, "mean"))
    torch.testing.assert_close(Critic(source).values(batch), (plain - 3) / 2)
    set_statistics(source, CompletionStatistics(1.0, 4.0, "last"))  # the others were never trained
    torch.testing.assert_close(Critic(source).values(batch), (plain - 1) / 4)
    torch.manual_seed(1)
    drawn = Critic(source, fresh_head=True)
    assert drawn.statistics is None
    assert not torch.equal(drawn.model.score.weight, source.score.weight)
    assert torch.equal(drawn.model.model.embed_tokens.weight, source.model.embed_tokens.weight)


def make(max_steps=8):
    critic = Critic(reward_model(), lr=1e-2, schedule="cosine", warmup_steps=2)
    critic.begin("cpu", max_steps=max_steps)
    return critic


def test_it_goes_on_exactly_where_it_was_saved(tmp_path):
    whole, first = make(), make()
    rates = []
    for seed in range(6):
        rates.append(whole.lr)
        whole.update(minibatch(seed))
    for seed in range(3):
        first.update(minibatch(seed))
    first.save(tmp_path / "critic")
    second = make()
    second.update(minibatch(9))  # whatever it did before
    second.load(tmp_path / "critic")
    assert second.lr == rates[3]
    for seed in range(3, 6):
        second.update(minibatch(seed))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name
    assert rates[0] == 0
    assert rates[2] == 1e-2
    assert rates[2] > rates[4] > rates[5]


def test_an_adapter_with_its_head(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["score"], task_type="TOKEN_CLS")
    source = peft.get_peft_model(reward_model(), config)
    critic = Critic(source, lr=1e-2)
    frozen = {n: p.clone() for n, p in critic.model.named_parameters() if not p.requires_grad}
    critic.update(minibatch())
    critic.save(tmp_path)
    again = Critic(source, lr=1e-2)
    again.begin()
    again.load(tmp_path)
    assert torch.equal(again.values(minibatch()), critic.values(minibatch()))
    assert not torch.equal(Critic(source).values(minibatch()), critic.values(minibatch()))
    assert all(torch.equal(p, frozen[n]) for n, p in critic.model.named_parameters() if n in frozen)
    with pytest.raises(RecipeError, match="fresh_head"):
        Critic(source, fresh_head=True)


def test_two_ranks_take_the_step_of_one():
    def work():
        import torch.distributed as dist

        dist.init_process_group("gloo")
        rank = dist.get_rank()
        torch.manual_seed(rank)
        critic = Critic(reward_model(), lr=1e-2, fresh_head=True)  # another head on each rank
        critic.begin("cpu")
        batch = minibatch()
        metrics = [critic.update(batch.select([0, 2, 3] if rank == 0 else [1]))]
        # In the second minibatch rank 1 has nothing.
        metrics.append(critic.update(batch.select([2] if rank == 0 else [1]), real=rank == 0))
        state = {n: v.tolist() for n, v in critic.model.state_dict().items()}
        dist.destroy_process_group()
        return metrics, state

    (metrics, state), (others, other) = on_ranks(2, work)
    torch.manual_seed(0)
    alone = Critic(reward_model(), lr=1e-2, fresh_head=True)
    batch = minibatch()
    expected = [alone.update(batch), alone.update(batch.select([2]))]
    for a, b, c in zip(metrics, others, expected):
        assert a == b
        assert a == pytest.approx(c, rel=1e-6)
    assert state == other
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(torch.tensor(state[name]).to(value), value, rtol=0, atol=1e-6)


def test_begin_takes_the_runs_steps_and_token_budget():
    critic = Critic(reward_model(), lr=1e-2, schedule="linear")
    critic.begin("cpu", max_steps=10, max_tokens=40)
    critic.update(minibatch())
    assert critic.lr == pytest.approx(0.9e-2)
    assert critic.max_tokens == 40
    own = Critic(reward_model(), max_tokens_per_microbatch=50)
    own.begin("cpu", max_tokens=40)
    assert own.max_tokens == 50


def test_refusals(tmp_path):
    critic = Critic(reward_model())
    with pytest.raises(RecipeError, match="no `returns`"):
        critic.update(made_batch())
    before = copy.deepcopy(critic.model.state_dict())
    bad = minibatch()
    bad.columns["returns"][3] = float("nan")
    with pytest.raises(NonFiniteLossError, match="row 0"):
        critic.update(bad)
    assert all(torch.equal(v, before[n]) for n, v in critic.model.state_dict().items())
    with pytest.raises(RecipeError, match="needs the number of optimiser steps"):
        Critic(reward_model(), schedule="cosine").begin()
    with pytest.raises(RecipeError, match=r"schedule = 'poly': Input should be 'constant', 'linear', 'cosine'"):
        Critic(reward_model(), schedule="poly")
    with pytest.raises(RecipeError, match="lr = 0: Input should be greater than 0"):
        Critic(reward_model(), lr=0)
    with pytest.raises(RunError, match="holds no critic"):
        critic.load(tmp_path)
    critic.save(tmp_path)
    with pytest.raises(RunError, match="another critic"):
        Critic(tiny_llama()).load(tmp_path)
    with pytest.raises(ModelError, match="Linear has no language-model head"):
        Critic(torch.nn.Linear(2, 2))
