"""Credit as reward, weight, selection and span: what it does to the loss, and that what is left out is not scored."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from tests.training.test_trl_oracle import tokenizer
from tests.training.tiny import make_samples, make_trainer, tiny_llama
from tokengrain import tables
from tokengrain.batch import TokenBatch
from tokengrain.errors import RecipeError
from tokengrain.loss import make_role, resolve_role
from tokengrain.method import CREDIT, make_credit, make_objective, why_not
from tokengrain.scoring.reference import FrozenReference
from tokengrain.training.step import CreditUse, Judged, PreferenceLoss
from tokengrain.training.trainer import policy_in


def noise(batch: TokenBatch) -> Tensor:
    """Credit that depends on the token and its place."""
    return torch.sin(batch.labels.double() + 0.1 * batch.segments.positions)


@pytest.fixture(scope="module")
def policy() -> Any:
    return tiny_llama(1, torch.float64)


@pytest.fixture(scope="module")
def batch() -> TokenBatch:
    return TokenBatch.from_samples(make_samples(5))


def judged(policy: Any, batch: TokenBatch, objective: str, role: Any = None, measure: Any = (), **hyper: Any) -> Judged:
    reference = FrozenReference(tiny_llama(2, torch.float64))
    use = CreditUse(make_credit("function", function=noise), role) if role is not None else None
    return PreferenceLoss(make_objective(objective, **hyper), reference, use)(policy, batch, measure=measure)


def gradient(result: Judged, policy: Any) -> Tensor:
    (grad,) = torch.autograd.grad(result.output.losses.mean(), [policy.model.embed_tokens.weight])
    return grad


def same(policy: Any, one: Judged, other: Judged) -> None:
    torch.testing.assert_close(one.output.losses, other.output.losses, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient(one, policy), gradient(other, policy), rtol=1e-9, atol=1e-12)


def test_dpo_with_weights_is_tgdpo(policy: Any, batch: TokenBatch) -> None:
    weighted = judged(policy, batch, "dpo", make_role("weight", alpha=0.4), beta=0.3)
    same(policy, weighted, judged(policy, batch, "tgdpo", make_role("reward"), beta=0.3, alpha=0.4))
    # What is logged are the rewards of unweighted completions.
    plain = judged(policy, batch, "dpo", beta=0.3)
    torch.testing.assert_close(weighted.output.metrics["rewards/margins"], plain.output.metrics["rewards/margins"])


def test_selecting_everything_changes_nothing(policy: Any, batch: TokenBatch) -> None:
    for objective in ("dpo", "simpo"):
        selected = judged(policy, batch, objective, make_role("selection", share=1.0))
        same(policy, selected, judged(policy, batch, objective))


def test_simpo_on_selected_tokens_is_sepo(policy: Any, batch: TokenBatch) -> None:
    role = make_role("selection", chosen=0.5, rejected=0.3)
    sepo = judged(policy, batch, "sepo", role, gamma=2.1, margin=0.2)
    same(policy, sepo, judged(policy, batch, "simpo", role, beta=2.1, gamma=0.2))


@pytest.mark.parametrize("objective", ["sepo", "rrpo"])
def test_scoring_only_what_is_read_equals_scoring_everything(policy: Any, batch: TokenBatch, objective: str) -> None:
    role = make_role("span" if objective == "rrpo" else "selection", share=0.4)
    narrow = judged(policy, batch, objective, role)
    whole = judged(policy, batch, objective, role, measure=("whole", "entropy"))
    same(policy, narrow, whole)
    assert "whole/accuracies" in whole.output.metrics
    assert "whole/accuracies" not in narrow.output.metrics
    assert narrow.segments.total == whole.segments.total < batch.segments.total
    assert whole.entropy is not None
    assert whole.entropy.shape == (batch.segments.total,)


def test_only_selected_tokens_are_scored(policy: Any, batch: TokenBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch is narrowed to the selected tokens, and only once."""
    seen: list[int] = []
    original = TokenBatch.narrow

    def spy(self: TokenBatch, keep: Tensor) -> TokenBatch:
        seen.append(int(keep.sum()))
        return original(self, keep)

    monkeypatch.setattr(TokenBatch, "narrow", spy)
    judged(policy, batch, "sepo", make_role("selection", share=0.2))
    lengths = batch.segments.lengths
    assert seen == [int(torch.clamp((0.2 * lengths + 1e-9).floor(), min=1).sum())]


ACCEPTED = [(objective, role) for objective in sorted(tables.objectives()) for role in make_objective(objective).roles]


@pytest.mark.parametrize(("objective", "role"), ACCEPTED, ids=lambda value: str(value))
def test_every_accepted_combination_trains(objective: str, role: str, tmp_path: Path) -> None:
    def credit(batch: TokenBatch) -> Tensor:
        values = noise(batch).float()
        return values.abs() if objective == "ti_dpo" else values  # it weighs by importance, which is at least 0

    trainer = make_trainer(tmp_path, make_samples(8), objective=objective, credit=credit, credit_as=role)
    trainer.train()
    assert trainer.state.global_step == 2
    metrics = trainer.evaluate(make_samples(4, seed=1))
    assert 0 <= metrics["eval_accuracy"] <= 1


def test_an_sft_term_does_not_go_with_a_selection(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="sft_weight"):
        make_trainer(
            tmp_path,
            make_samples(4),
            objective=make_objective("dpo", sft_weight=0.1),
            credit=lambda b: noise(b).float(),
            credit_as="selection",
        )


@pytest.mark.parametrize("setting", [{"above": 0.2}, {"share": 0.5}])
def test_the_first_token_can_be_left_out_of_every_selection(setting: Any, batch: TokenBatch) -> None:
    values, segments = noise(batch), batch.segments
    every, rest = (make_role("selection", score_first_token=f, **setting)(values, segments) for f in (True, False))
    first = segments.positions == 0
    assert bool(every[first].any())
    assert not rest[first].any()
    assert bool(rest.any())


def test_a_selection_that_leaves_one_side_of_every_pair_empty_is_said(tmp_path: Path) -> None:
    """Credit that is never below 0, and a threshold: no rejected token is worse than it."""
    above: dict[str, Any] = {
        "credit": lambda batch: noise(batch).abs() + 0.1,
        "credit_as": {"name": "selection", "above": 0},
    }
    trainer = make_trainer(tmp_path, make_samples(5), objective="simpo", max_steps=2, **above)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    with pytest.warns(UserWarning, match="nothing was learned: the gradient was 0 at every step"):
        trainer.train()
    assert all(torch.equal(before[name], value) for name, value in trainer.model.named_parameters())


@pytest.mark.parametrize(
    ("source", "objective", "role", "what"),
    [
        ({"name": "gradient_attribution"}, "dpo", "weight", "how much a token matters, not whether it is good"),
        ({"name": "gradient_attribution"}, "sepo", None, "how much a token matters, not whether it is good"),
        ({"name": "random"}, "ti_dpo", None, "its numbers can be below 0, and the objective takes how much"),
        ({"name": "random", "low": 0.0}, "ti_dpo", None, ""),
        ({"name": "gradient_attribution"}, "ti_dpo", None, ""),
    ],
)
def test_importance_is_for_the_objective_that_takes_it(
    source: dict[str, Any], objective: str, role: str | None, what: str
) -> None:
    bound, kind = make_objective(objective), CREDIT.find(source["name"])
    settings = kind.settings({k: v for k, v in source.items() if k != "name"})
    found = why_not(kind.values_with(settings), resolve_role(role, bound.roles, objective).uses)
    assert what in found
    assert bool(found) == bool(what)


def test_credit_that_asks_the_policy_itself_is_said(tmp_path: Path) -> None:
    policy, guide = tiny_llama(1), tiny_llama(2)
    made = {"model": policy, "objective": "tgdpo", "max_steps": 1}
    with pytest.warns(UserWarning, match="the credit asks the policy itself"):
        make_trainer(tmp_path, make_samples(4), credit=make_credit("guide", model=guide, reference=policy), **made)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        source = make_credit("guide", model=guide, reference=tiny_llama(1))
        adapted: Any = get_peft_model(tiny_llama(1), LoraConfig(r=2, target_modules=["q_proj"]))
        assert not policy_in(make_credit("contrastive", model=adapted, tokenizer=tokenizer()), adapted)
        assert policy_in(make_credit("surprise", model=adapted), adapted)
        make_trainer(tmp_path, make_samples(4), credit=source, **made)
