"""The gradient of an online step is that of a GRPO step written by hand; minibatches and their order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.online.tiny import END, make_online, make_prompts, share_of_token
from tests.training.tiny import plain_logps, tiny_llama, weights
from tokengrain.batch import TokenBatch
from tokengrain.method import make_objective
from tokengrain.rollout.local import HFGenerate
from tokengrain.rollout.sampler import Rollouts, SampledCompletion, SamplingConfig
from tokengrain.training.online import OnlineTrainer
from tokengrain.training.rollout import PromptOrder

LR = 0.1
EXACT = {"optim": "sgd", "learning_rate": LR, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 1}


def rollout_by_hand(model: Any, seed: int = 3, index: int = 0, n: int = 3) -> tuple[TokenBatch, torch.Tensor]:
    """The completions of a rollout and their advantages `[C]`: the same prompts, seeds and rewards, nothing else."""
    prompts, order = make_prompts(10), PromptOrder(10, seed)
    chosen = [prompts[order[4 * index + i]] for i in range(4)]
    sampling = SamplingConfig(max_new_tokens=6, stop_ids=(END,), seed=seed).at(index)
    batch = HFGenerate(model).sample(chosen, n=n, sampling=sampling).to_batch()
    rewards = torch.tensor(share_of_token([batch.completion(c).tolist() for c in range(batch.n_completions)]))
    grouped = rewards.view(-1, n)
    advantages = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-6)
    return batch, advantages.flatten()


@pytest.mark.parametrize("max_tokens", [None, 40, 1])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_first_step_is_grpo_by_hand(max_tokens: int | None, beta: float, tmp_path: Path) -> None:
    model = tiny_llama(dtype=torch.float64)
    by_hand, reference = tiny_llama(dtype=torch.float64), tiny_llama(seed=1, dtype=torch.float64)
    batch, advantages = rollout_by_hand(by_hand)
    assert advantages.abs().min(0).values < 2  # a sane scale
    logps, ref = plain_logps(by_hand, batch), plain_logps(reference, batch)
    losses = []
    for own, theirs, advantage in zip(logps, ref, advantages, strict=True):
        d = theirs.detach() - own
        losses.append((-advantage * torch.exp(own - own.detach()) + beta * (d.exp() - d - 1)).mean())
    torch.stack(losses).mean().backward()
    trainer = make_online(
        tmp_path,
        model=model,
        objective=make_objective("grpo", beta=beta),
        reference=reference if beta else None,
        max_tokens_per_microbatch=max_tokens,
        **EXACT,
    )
    trainer.train()
    assert (trainer.reference is not None) == bool(beta)
    assert by_hand.lm_head.weight.grad.abs().max() > 1e-3
    for name, parameter in by_hand.named_parameters():
        expected = parameter.detach() - LR * parameter.grad
        torch.testing.assert_close(model.get_parameter(name), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("normaliser", ["mean", "token_mean", "prompt_mean"])
def test_micro_batches_do_not_matter_off_policy(normaliser: str, tmp_path: Path) -> None:
    """Two epochs of two minibatches, where ratios are not 1 any more."""
    found = []
    for name, max_tokens in (("whole", None), ("cut", 30)):
        model = tiny_llama(dtype=torch.float64)
        settings = {**EXACT, "max_steps": 8, "minibatches": 2, "rollout_epochs": 2, "normaliser": normaliser}
        objective = make_objective("grpo", reduction="sum" if normaliser == "token_mean" else "mean")
        make_online(
            tmp_path / name, model=model, objective=objective, max_tokens_per_microbatch=max_tokens, **settings
        ).train()
        found.append(weights(model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-8, atol=1e-10)
    assert not torch.equal(found[0]["lm_head.weight"], weights(tiny_llama(dtype=torch.float64))["lm_head.weight"])


class Spy(OnlineTrainer):
    """Notes what every optimiser step is made of."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        found = super().get_batch_samples(*args, **kwargs)
        if found[0]:
            self.seen: list[Any] = [*getattr(self, "seen", []), found[0][0].batch]
        return found


def test_minibatches_and_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.training.online import tiny

    monkeypatch.setattr(tiny, "OnlineTrainer", Spy)
    trainer = make_online(tmp_path, minibatches=2, rollout_epochs=3, max_steps=12, prompts_per_rollout=6)
    trainer.train()
    assert isinstance(trainer, Spy)
    rows = [batch.rows for batch in trainer.seen]
    assert len(rows) == 12
    order, names = PromptOrder(10, 3), [p.row for p in make_prompts(10)]
    expected = [names[order[i]] for i in range(12)]
    assert rows[0] + rows[1] == tuple(expected[:6])  # the first epoch as drawn
    assert rows[6] + rows[7] == tuple(expected[6:])
    epochs = [rows[2 * e] + rows[2 * e + 1] for e in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len(set(epochs)) == 3
    for batch in trainer.seen:
        assert batch.n_prompts == 3
        assert torch.bincount(batch.group).tolist() == [3, 3, 3]  # groups are whole
    # Every pass over the data has each prompt once, in another order.
    assert sorted(expected[:10]) == sorted(names)
    assert [order[i] for i in range(10)] != [order[i] for i in range(10, 20)]
    # Old log-probabilities stay those of the rollout, over its three epochs.
    first, later = trainer.seen[0], trainer.seen[2]
    for row in set(first.rows) & set(later.rows):
        a, b = first.select([first.rows.index(row)]), later.select([later.rows.index(row)])
        assert torch.equal(a.columns["old_logps"], b.columns["old_logps"])
        assert torch.equal(a.completion_ids, b.completion_ids)


def test_scores_are_on_policy_at_the_first_step(tmp_path: Path) -> None:
    trainer = make_online(tmp_path, max_tokens_per_microbatch=25, max_steps=3)
    trainer.train()
    for entry in trainer.state.log_history[:3]:
        assert entry["ratio/mean"] == pytest.approx(1.0, abs=1e-5)
        assert entry["mismatch/max_abs"] < 1e-4
        assert entry["clip/tokens"] == 0


def test_columns_are_scattered_back_in_order(tmp_path: Path) -> None:
    """Micro-batches reorder prompts; scores must not."""
    model = tiny_llama(dtype=torch.float64)
    trainer = make_online(tmp_path, model=model, max_tokens_per_microbatch=20, log_entropy=False, rollout_epochs=2)
    batch = trainer.next_minibatch().batch
    expected = torch.cat(plain_logps(model, batch))
    torch.testing.assert_close(batch.columns["old_logps"], expected.detach(), rtol=1e-9, atol=1e-9)
    assert {"advantages", "old_logps"} == set(batch.columns)  # nothing that the objective does not read


class Fixed:
    """A sampler that gives every prompt the same completions; six tokens without an end are cut off."""

    name = "fixed"

    def __init__(self, completions: list[list[int]]) -> None:
        self.completions = completions

    def sample(self, prompts: Any, *, n: int, sampling: SamplingConfig) -> Rollouts:
        group = tuple(
            SampledCompletion(list(ids), None, None, "stop" if END in ids else "length") for ids in self.completions
        )
        return Rollouts(tuple(prompts), tuple(group for _ in prompts), sampling)

    def refresh(self, model: Any) -> None:
        pass


def masked_gradient(folder: Path, completions: list[list[int]], rewards: list[float], **settings: Any) -> Any:
    """The gradient of one step on a prompt with these completions, all of those cut off masked."""
    model = tiny_llama(dtype=torch.float64)
    before = weights(model)
    make_online(
        folder,
        model=model,
        objective=make_objective("grpo", beta=0.5),
        reference=tiny_llama(seed=1, dtype=torch.float64),
        rewards=lambda completion_ids: list(rewards),
        credit=[{"name": "group", "scale": "none"}, "mask_truncated"],
        sampler=Fixed(completions),
        num_generations=len(completions),
        prompts_per_rollout=1,
        **{**EXACT, **settings},
    ).train()
    return {name: value - before[name] for name, value in weights(model).items()}


@pytest.mark.parametrize("normaliser", ["mean", "token_mean", "prompt_mean"])
def test_masked_completions_are_as_if_not_sampled(normaliser: str, tmp_path: Path) -> None:
    """In normaliser and KL; and where nothing else is left the step changes nothing."""
    right, wrong, cut = [5, 6, END], [8, 9, 3, END], [4] * 6
    found = masked_gradient(tmp_path / "with", [cut, right, wrong], [0.5, 1.0, 0.0], normaliser=normaliser)
    expected = masked_gradient(tmp_path / "without", [right, wrong], [1.0, 0.0], normaliser=normaliser)
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, rtol=1e-9, atol=1e-12)
    assert expected["lm_head.weight"].abs().max() > 1e-3
    record = [json.loads(line) for line in (tmp_path / "with" / "rollouts.jsonl").read_text().splitlines()]
    assert [(entry["completion"], "ratio" in entry) for entry in record] == [(0, False), (1, True), (2, True)]
    nothing = masked_gradient(tmp_path / "all", [cut, cut], [1.0, 0.0], normaliser=normaliser)
    assert not any(change.any() for change in nothing.values())
