"""The result of training does not depend on how a step is cut: micro-batches, accumulation, layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.tiny import make_samples, make_trainer, tiny_llama, weights
from tokengrain.errors import read_log
from tokengrain.method import make_objective

CUTS: list[dict[str, Any]] = [
    {"max_tokens_per_microbatch": 60},
    {"max_tokens_per_microbatch": 1},
    {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_tokens_per_microbatch": 40},
    {"layout": "separate"},
    {"layout": "shared", "chunk_tokens": 7},
]
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"sft_weight": 0.3},
    "simpo": {"sft_weight": 0.3},
    "tdpo2": {},
    "tgdpo": {},
    "treg_simpo": {},
    "sft": {},
}


def train(folder: Path, objective: str, **settings: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Three steps of plain SGD over the same 22 rows; the last step has 6."""
    completions = 1 if objective == "sft" else 2
    columns = ("token_rewards",) if objective.startswith(("tgdpo", "treg")) else ()
    trainer = make_trainer(
        folder,
        make_samples(22, completions=completions, columns=columns),
        model=tiny_llama(dtype=torch.float64),
        objective=make_objective(objective, **OBJECTIVES[objective]),
        optim="sgd",
        learning_rate=0.05,
        **{"per_device_train_batch_size": 8, **settings},
    )
    trainer.train()
    return weights(trainer.model), read_log(folder / "log.jsonl")


# transformers computes norms and rotary angles in float32 even in a float64 model.
def assert_same(first: tuple[Any, Any], second: tuple[Any, Any]) -> None:
    for name, value in first[0].items():
        torch.testing.assert_close(second[0][name], value, rtol=1e-6, atol=1e-8)
    keys = ("loss", "grad_norm", "rewards/margins", "lengths/chosen", "num_tokens")
    for ours, theirs in zip(first[1], second[1], strict=True):
        for key in set(keys) & ours.keys():
            assert theirs[key] == pytest.approx(ours[key], rel=1e-5, abs=1e-7), (key, ours, theirs)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_under_every_cut(objective: str, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", objective)
    assert not torch.equal(whole[0]["lm_head.weight"], tiny_llama(dtype=torch.float64).lm_head.weight)
    for index, cut in enumerate(CUTS if objective == "dpo" else CUTS[3:5]):
        assert_same(whole, train(tmp_path / str(index), objective, **cut))


@pytest.mark.parametrize("normaliser", ["token_mean", "constant", "sum"])
def test_every_normaliser_under_a_cut(normaliser: str, tmp_path: Path) -> None:
    settings = {"normaliser": normaliser, "learning_rate": 1e-3}
    settings |= {"normaliser_constant": 16.0} if normaliser == "constant" else {}
    whole = train_with(tmp_path / "whole", settings)
    assert_same(whole, train_with(tmp_path / "cut", settings | CUTS[3]))


def train_with(folder: Path, settings: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    trainer = make_trainer(
        folder,
        make_samples(16),
        model=tiny_llama(dtype=torch.float64),
        objective=make_objective("simpo"),
        optim="sgd",
        **{"per_device_train_batch_size": 8, **settings},
    )
    trainer.train()
    return weights(trainer.model), read_log(folder / "log.jsonl")


def test_the_first_step_is_the_mean_over_pairs_of_the_plain_loss(tmp_path: Path) -> None:
    """Loss and gradient against the formula written with the model's own logits."""
    from tests.training.tiny import plain_logps
    from tokengrain.batch import TokenBatch

    samples = make_samples(6)
    model = tiny_llama(dtype=torch.float64)
    batch = TokenBatch.from_samples(samples)
    logps = [one.mean() for one in plain_logps(model, batch)]
    margins = torch.stack([2.0 * (logps[2 * i] - logps[2 * i + 1]) - 0.5 for i in range(6)])
    expected = torch.nn.functional.softplus(-margins).mean()
    norm = torch.nn.utils.get_total_norm(torch.autograd.grad(expected, list(model.parameters())))

    trainer = make_trainer(
        tmp_path,
        samples,
        model=model,
        objective=make_objective("simpo", beta=2.0, gamma=0.5),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
    )
    trainer.train()
    first = read_log(tmp_path / "log.jsonl")[0]
    assert first["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert first["grad_norm"] == pytest.approx(float(norm), rel=1e-6)
