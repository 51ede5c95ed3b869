"""Objectives by name: needs, validation, forms."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.examples import example
from tokengrain.batch import Segments
from tokengrain.errors import RecipeError
from tokengrain.loss import LossOutput
from tokengrain.method import OBJECTIVES, Objective, make_objective
from tokengrain.methods.dpo import dpo_loss, sft_loss
from tokengrain.methods.grpo import grpo_loss
from tokengrain.methods.qrm import qrm_loss
from tokengrain.methods.simpo import simpo_loss
from tokengrain.methods.tdpo import tdpo_loss


@pytest.mark.parametrize(
    ("name", "hyper", "needs"),
    [
        ("dpo", {}, {"ref_logps"}),
        ("dpo", {"reference_free": True}, set()),
        ("simpo", {}, set()),
        ("tdpo1", {}, {"ref_logps", "kl"}),
        ("tgdpo", {}, {"ref_logps", "token_rewards"}),
        ("treg", {}, {"ref_logps", "token_rewards"}),
        ("treg_simpo", {}, {"token_rewards"}),
        ("sft", {}, set()),
    ],
)
def test_needs(name: str, hyper: dict[str, Any], needs: set[str]) -> None:
    bound = make_objective(name, **hyper)
    assert bound.needs == needs
    assert bound.unit == ("completions" if name == "sft" else "pairs")


@pytest.mark.parametrize(
    ("name", "hyper", "message"),
    [
        ("ddpo", {}, "unknown objective 'ddpo'; did you mean 'dpo'"),
        ("dpo", {"betta": 0.1}, "unknown setting 'betta'; did you mean 'beta'"),
        ("dpo", {"beta": 0.0}, "beta = 0.0: .*greater than 0"),
        ("dpo", {"beta": -1}, "beta = -1: .*greater than 0"),
        ("dpo", {"beta": float("inf")}, "beta = inf: .*finite"),
        ("dpo", {"beta": "strong"}, "beta = 'strong': .*valid number"),
        ("dpo", {"beta": True}, "beta = True: .*not a bool"),
        ("dpo", {"beta": None}, "beta = None: .*valid number"),
        ("dpo", {"label_smoothing": 0.5}, "label_smoothing = 0.5: .*less than 0.5"),
        ("dpo", {"label_smoothing": -0.1}, "label_smoothing = -0.1"),
        ("dpo", {"loss_type": "sigmoidal"}, "loss_type = 'sigmoidal': .*'sigmoid', 'sigmoid_norm'"),
        ("dpo", {"loss_type": "ipo", "label_smoothing": 0.1}, "'ipo' has no label smoothing"),
        ("dpo", {"ld_alpha": 1.5}, "ld_alpha = 1.5"),
        ("dpo", {"ref_logps": 1.0}, "unknown setting 'ref_logps'"),
        ("simpo", {"gamma": 1, "gamma_beta_ratio": 0.5}, "not both"),
        ("simpo", {"loss_type": "hinge", "label_smoothing": 0.1}, "'hinge' has no label smoothing"),
        ("simpo", {"sft_weight": -0.1}, "sft_weight = -0.1"),
        ("tdpo1", {"variant": "tdpo2"}, "variant = 'tdpo2', but the name means 'tdpo1'"),
        ("treg", {"sequence_weight": "dynamical"}, "sequence_weight = 'dynamical'"),
        ("treg", {"alpha": -0.1}, "alpha = -0.1"),
        ("sft", {"per": "word"}, "per = 'word'"),
    ],
)
def test_bad_settings(name: str, hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_objective(name, **hyper)


def test_settings_are_converted_and_defaults_filled_in() -> None:
    # PyYAML reads 1e-1 (no dot) as a string.
    bound = make_objective("dpo", beta="1e-1")
    assert bound.hyper["beta"] == 0.1
    assert bound.hyper["loss_type"] == "sigmoid"
    assert bound.describe()["name"] == "dpo"
    assert make_objective("treg", sequence_weight=1).hyper["sequence_weight"] == 1.0


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_bound_objectives_compute_and_check_their_quantities(name: str) -> None:
    x, bound = example(), make_objective(name)
    given = {
        "ref_logps": x.ref_logps,
        "token_rewards": x.token_rewards.abs(),  # importance is never negative
        "token_scores": x.logps,
        "kl": x.kl,
        "spans": (x.token_rewards > 0).to(x.kl.dtype),
        "selected": (x.token_rewards > 0).to(x.kl.dtype),
        "old_logps": x.ref_logps,
        "advantages": x.token_rewards,
        "teacher_kl": x.kl,
        "teacher_alpha": x.kl.detach() + 0.1,
    }
    main = {bound.main: x.logps}
    known = {q: given[q] for q in bound.needs}
    output = bound(segments=x.segments, **main, **known)
    assert output.losses.shape == ((6,) if bound.unit == "completions" else (3,))
    assert all(not m.requires_grad for m in output.metrics.values())
    if bound.needs:
        with pytest.raises(ValueError, match=f"objective '{name}' needs {sorted(bound.needs)[0]}"):
            bound(segments=x.segments, **main)
    with pytest.raises(TypeError, match="unheard_of"):
        bound(segments=x.segments, **main, unheard_of=x.logps, **known)


def _own_loss(logps: Tensor, segments: Segments, *, advantages: Tensor, scale: float = 2.0) -> LossOutput:
    return LossOutput(-scale * segments.sum(logps * advantages), unit="completions")


def test_a_loss_of_the_users_own() -> None:
    x, bound = example(), make_objective(_own_loss, unit="completions", scale=3)
    assert (bound.name, bound.needs, bound.unit) == ("_own_loss", {"advantages"}, "completions")
    assert bound.hyper == {"scale": 3.0}
    output = bound(segments=x.segments, logps=x.logps, advantages=torch.ones_like(x.logps))
    torch.testing.assert_close(output.losses, -3 * x.segments.sum(x.logps))
    with pytest.raises(RecipeError, match="unknown setting 'scal'; did you mean 'scale'"):
        make_objective(_own_loss, scal=1)


def test_a_loss_by_import_string(tmp_path: Path) -> None:
    assert make_objective("tokengrain.methods.dpo:dpo_loss", beta=0.5).objective.function is dpo_loss
    file = tmp_path / "mine.py"
    file.write_text(
        "from tokengrain.loss import LossOutput\n"
        "def loss(logps, segments, *, power: int = 2):\n"
        "    return LossOutput(segments.pairs(segments.sum(logps))[0] ** power)\n"
    )
    bound = make_objective(f"{file}:loss", power=3)
    x = example()
    assert torch.equal(bound(segments=x.segments, logps=x.logps).losses, x.segments.sum(x.logps)[0::2] ** 3)
    for reference, message in (
        (f"{file}:los", "no callable 'los'; did you mean 'loss'"),
        (f"{tmp_path}/none.py:loss", "no file"),
        ("no.such.module:loss", "no module 'no.such.module'"),
        ("tokengrain.loss:", "not of the form"),
    ):
        with pytest.raises(RecipeError, match=message):
            make_objective(reference)


def test_importing_objectives_is_light() -> None:
    code = (
        "import sys, tokengrain.loss; "
        "print([m for m in ('transformers', 'datasets', 'peft', 'matplotlib') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_online_objectives_know_what_a_rollout_may_bring() -> None:
    assert {n for n, o in OBJECTIVES.items() if o.online} == {"grpo", "gspo", "dcpo", "ppo", "reinforce"}
    plain, with_kl = make_objective("grpo"), make_objective("grpo", beta=0.1)
    assert plain.needs == {"old_logps", "advantages"}
    assert plain.optional >= {"ref_logps", "weights", "entropy"}
    assert with_kl.needs == {"old_logps", "advantages", "ref_logps"}  # its KL term
    assert with_kl.optional == plain.optional - {"ref_logps"}
    assert make_objective("reinforce").needs == {"advantages"}
    assert make_objective("dpo", reference_free=True).optional == frozenset()  # offline, stored columns are not read


def test_a_loss_type_in_the_place_of_an_objective_says_whose_it_is() -> None:
    with pytest.raises(RecipeError, match=r"unknown objective 'ipo'; it is a loss_type of dpo: \{name: dpo"):
        make_objective("ipo")
    with pytest.raises(RecipeError, match="unknown objective 'smipo'; did you mean 'simpo'"):
        make_objective("smipo")


@pytest.mark.parametrize(
    ("loss", "arguments", "message"),
    [
        (dpo_loss, {"loss_type": "apo_zero"}, "loss_type must be 'sigmoid'"),
        (simpo_loss, {"loss_type": "ipo"}, "loss_type must be 'sigmoid'"),
        (tdpo_loss, {"variant": "TDPO1"}, "variant must be 'tdpo1' or 'tdpo2', got 'TDPO1'"),
        (qrm_loss, {"pooling": "sum"}, "pooling must be 'mean' or 'last'"),
        (sft_loss, {"per": "sentence"}, "per must be 'token' or 'sequence'"),
        (grpo_loss, {"importance": "sentence"}, "importance must be 'token' or 'sequence'"),
        (grpo_loss, {"reduction": "token_mean"}, "reduction must be 'mean', 'sum' or 'constant', got 'token_mean'"),
    ],
)
def test_an_unknown_form_is_refused_by_the_loss_itself(loss: Any, arguments: Any, message: str) -> None:
    """Also where nobody has looked at its annotations: it must not pass for another form."""
    flat = {name: torch.zeros(2) for name in Objective("mine", loss).quantities}
    with pytest.raises(ValueError, match=message):
        loss(torch.zeros(2), Segments.from_lengths([1, 1]), **flat, **arguments)
