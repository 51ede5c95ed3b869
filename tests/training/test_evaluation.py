"""Evaluation against a plain computation over the whole set, however it is cut."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from tests.training.tiny import make_samples, make_trainer, plain_logps, tiny_llama
from tokengrain.batch import TokenBatch
from tokengrain.method import make_objective
from tokengrain.scoring.reference import FrozenReference

CUTS: list[dict[str, Any]] = [
    {"per_device_eval_batch_size": 7},
    {"per_device_eval_batch_size": 2},
    {"per_device_eval_batch_size": 5, "max_tokens_per_microbatch": 30},
]


def evaluate(folder: Path, samples: list[Any], cut: dict[str, Any], **options: Any) -> dict[str, float]:
    trainer = make_trainer(
        folder, make_samples(2), model=tiny_llama(1, torch.float64), eval_dataset=samples, **options, **cut
    )
    return trainer.evaluate()


@pytest.mark.parametrize("cut", CUTS)
def test_dpo_metrics_equal_the_plain_ones(cut: dict[str, Any], tmp_path: Path) -> None:
    samples = make_samples(7)
    batch = TokenBatch.from_samples(samples)
    policy, reference = tiny_llama(1, torch.float64), tiny_llama(0, torch.float64)
    with torch.no_grad():
        ours, theirs = plain_logps(policy, batch), plain_logps(reference, batch)
    rewards = torch.stack([0.3 * (a - b).sum() for a, b in zip(ours, theirs, strict=True)]).view(7, 2)
    margins = rewards[:, 0] - rewards[:, 1]
    correct = int((margins > 0).sum())

    found = evaluate(tmp_path, samples, cut, objective=make_objective("dpo", beta=0.3), reference=reference)
    assert found["eval_loss"] == pytest.approx(float(torch.nn.functional.softplus(-margins).mean()), rel=1e-9)
    assert found["eval_rewards/margins"] == pytest.approx(float(margins.mean()), rel=1e-6)
    assert found["eval_rewards/chosen"] == pytest.approx(float(rewards[:, 0].mean()), rel=1e-6)
    interval = stats.t.interval(0.95, 6, float(margins.mean()), float(margins.std()) / 7**0.5)
    assert [found[f"eval_rewards/margins_{end}"] for end in ("low", "high")] == pytest.approx(interval, rel=1e-6)
    assert found["eval_accuracy"] == found["eval_rewards/accuracies"] == pytest.approx(correct / 7)
    # Wilson's interval solves (p̂ - p)² = z² p (1 - p) / n for p.
    for bound in (found["eval_accuracy_low"], found["eval_accuracy_high"]):
        assert (correct / 7 - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / 7, rel=1e-5, abs=1e-9)
    ratios = torch.cat([a - b for a, b in zip(ours, theirs, strict=True)])
    assert found["eval_log_ratio"] == pytest.approx(float(ratios.mean()), rel=1e-6)
    assert found["eval_lengths/rejected"] == sum(len(s.completions[1].ids) for s in samples) / 7
    entropy, kl = plain_entropy_and_kl(policy, reference, batch)
    assert found["eval_entropy"] == pytest.approx(float(entropy.mean()), rel=1e-6)
    assert found["eval_kl"] == pytest.approx(float(kl.mean()), rel=1e-6)


def plain_entropy_and_kl(
    policy: torch.nn.Module, reference: torch.nn.Module, batch: TokenBatch
) -> tuple[torch.Tensor, torch.Tensor]:
    entropies, kls = [], []
    for index in range(batch.n_completions):
        prompt = batch.prompt(int(batch.group[index]))
        ids = torch.cat([prompt, batch.completion(index)])[None]
        with torch.no_grad():
            p, q = (m(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (policy, reference))
        entropies.append(-(p.exp() * p).sum(-1))
        kls.append((q.exp() * (q - p)).sum(-1))
    return torch.cat(entropies), torch.cat(kls)


def test_simpo_judges_by_its_own_reward_and_has_no_reference(tmp_path: Path) -> None:
    samples = make_samples(9)
    batch = TokenBatch.from_samples(samples)
    with torch.no_grad():
        logps = plain_logps(tiny_llama(1, torch.float64), batch)
    means = torch.stack([one.mean() for one in logps]).view(9, 2)
    found = evaluate(tmp_path, samples, CUTS[1], objective="simpo")
    assert found["eval_accuracy"] == pytest.approx(float((means[:, 0] > means[:, 1]).double().mean()))
    assert "eval_kl" not in found
    assert "eval_log_ratio" not in found


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_sft_reports_perplexity_per_token(per: str, tmp_path: Path) -> None:
    samples = make_samples(5, completions=1)
    with torch.no_grad():
        logps = plain_logps(tiny_llama(1, torch.float64), TokenBatch.from_samples(samples))
    nll = -float(torch.cat(logps).mean())
    found = evaluate(tmp_path, samples, CUTS[1], objective=make_objective("sft", per=per))
    assert found["eval_perplexity"] == pytest.approx(math.exp(nll), rel=1e-9)
    expected = nll if per == "token" else -float(sum(one.sum() for one in logps)) / 5
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-9)
    assert found["eval_lengths/completion"] == sum(len(s.completions[0].ids) for s in samples) / 5


def test_stored_reference_has_no_distribution_to_measure(tmp_path: Path) -> None:
    found = evaluate(tmp_path, make_samples(4, columns=("ref_logps",)), CUTS[0], objective="dpo", reference=None)
    assert "eval_kl" in found  # training rows have no such column: a frozen copy is the reference
    both = make_samples(4, columns=("ref_logps",))
    trainer = make_trainer(tmp_path, both, objective="dpo", eval_dataset=both)
    found = trainer.evaluate()
    assert "eval_kl" not in found
    assert "eval_log_ratio" in found


def test_several_evaluation_sets_and_mode_is_restored(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        make_samples(4),
        objective="dpo",
        eval_dataset={"a": make_samples(3), "b": make_samples(2, seed=5)},
    )
    trainer.model.train()
    found = trainer.evaluate()
    assert {"eval_a_accuracy", "eval_b_accuracy_low"} <= found.keys()
    assert trainer.model.training
    assert isinstance(trainer.reference, FrozenReference)
