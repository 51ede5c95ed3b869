from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from tests.vectors.layout import from_logits
from tests.vectors.runner import Case, adapter
from tokengrain.batch import Completion, Sample, Segments, TokenBatch
from tokengrain.loss import Counts, make_normaliser
from tokengrain.methods.aligndistil import Strength, aligndistil_loss, teacher_strength
from tokengrain.scoring.head import Distribution, Teacher
from tokengrain.scoring.layouts import RowCosts, plan_rows


@adapter("aligndistil", "aligndistil_loss")
def adaptive(case: Case) -> dict[str, Any]:
    return _loss(case, "reverse_dpo", "adaptive", "r", "epsilon")


@adapter("aligndistil", "constant_contrast_loss")
def constant(case: Case) -> dict[str, Any]:
    return _loss(case, "reverse_dpo", "constant", "beta")


@adapter("aligndistil", "rlhf_distill_loss")
def theorem(case: Case) -> dict[str, Any]:
    return _loss(case, "reference", "theorem1", "beta")


@adapter("aligndistil", "adaptive_interpolation_loss")
def interpolation(case: Case) -> dict[str, Any]:
    return _loss(case, "reference", "interpolation", "r", "epsilon")


def _loss(case: Case, contrast: str, form: Any, *names: str) -> dict[str, Any]:
    settings = case.settings("beta0", "temperature", "length_normalize", *names)
    beta0, temperature = settings["beta0"], settings["temperature"]
    strength = teacher_strength(form, beta0=beta0, **{name: settings[name] for name in names})
    mask = case.inputs["mask"].bool()
    student, segments = Segments.from_padded(case.inputs["student_logits"], mask)
    teacher = _teacher(case.inputs["dpo_logits"][mask], case.inputs[f"{contrast}_logits"][mask], strength, temperature)
    scores = _scores(student, teacher)
    kl, alpha = scores["teacher_kl"], scores["teacher_alpha"]
    hyper = {"beta0": beta0, "length_normalize": settings["length_normalize"]}
    output = aligndistil_loss(scores["logps"], segments, teacher_kl=kl, teacher_alpha=alpha, **hyper)
    # A completion of one token has the loss of that token; with a KL of 1, its weight.
    tokens = Segments.from_lengths([1] * segments.total)
    token_losses, beta_t = (
        aligndistil_loss(scores["logps"], tokens, teacher_kl=x, teacher_alpha=alpha, beta0=beta0).losses
        for x in (kl, torch.ones_like(kl))
    )
    flat = {"token_kl": kl, "token_loss": token_losses, "alpha": alpha, "beta_t": beta_t, "tvd": scores["tvd"]}
    return {
        "loss": make_normaliser("mean")(output, Counts.of(segments, pairs=False)),
        "per_example": output.losses,
        "teacher_logprobs": _padded(_teacher_logprobs(student.detach(), teacher), mask),
        **{name: _padded(values, mask) for name, values in flat.items()},
    }


@adapter("aligndistil", "contrastive_token_reward")
def reward(case: Case) -> dict[str, Any]:
    """The expected reward in a state is a difference of two KL divergences, to the reverse and the DPO model."""
    beta0 = case.settings("beta0")["beta0"]
    mask = case.inputs["mask"].bool()
    student, segments = Segments.from_padded(case.inputs["student_logits"], mask)
    dpo, reverse = (case.inputs[f"{model}_logits"][mask] for model in ("dpo", "reverse_dpo"))
    at_label = _scores(student, _teacher(dpo, reverse), case.inputs["labels"][mask])["teacher_reward"]

    def expected(under: Tensor) -> Tensor:
        to_reverse, to_dpo = (_scores(under, _teacher(model))["teacher_kl"] for model in (reverse, dpo))
        return beta0 * (to_reverse - to_dpo)

    return {
        "token_reward": _padded(beta0 * at_label, mask),
        "token_expected_reward_student": _padded(expected(student), mask),
        "token_expected_reward_dpo": _padded(expected(dpo), mask),
        "sequence_reward_mean": segments.sum(beta0 * at_label).mean(),
        "sequence_expected_reward_mean": segments.sum(expected(student)).mean(),
    }


@adapter("aligndistil", "counted_positions")
def positions(case: Case) -> dict[str, Any]:
    """Where the library reads the predictions of a completion's tokens."""
    rows = []
    for row in case.inputs["rows"]:
        sample = Sample([1] * row["prompt_len"], [Completion([1] * row["response_len"])])
        (plan,) = plan_rows(TokenBatch.from_samples([sample]), "separate", RowCosts(hidden_size=1))
        counted = torch.zeros(row["total_len"])
        counted[row["left_pad"] + plan.source] = 1.0
        rows.append(counted)
    return {"recommended": torch.stack(rows)}


def _teacher(
    target: Tensor, contrast: Tensor | None = None, strength: Strength | None = None, temperature: float = 1.0
) -> Teacher:
    numbers = asdict(strength or teacher_strength("distil"))
    versus = None if contrast is None else Distribution.of_logits(contrast)
    return Teacher(Distribution.of_logits(target), versus, temperature=temperature, **numbers)


def _scores(student: Tensor, teacher: Teacher, labels: Tensor | None = None) -> dict[str, Tensor]:
    labels = torch.zeros(len(student), dtype=torch.long) if labels is None else labels
    return from_logits(student, labels, ("logps", "teacher_kl"), teacher=teacher)


def _teacher_logprobs(student: Tensor, teacher: Teacher) -> Tensor:
    """log q `[N, V]`: the KL from a student that is sure of token v to the teacher is -log q_v."""
    columns = []
    for v in range(min(student.shape[1], teacher.vocab_size)):
        # Tokens that are out for the student are out for the teacher: they stay so.
        sure = torch.where(torch.isneginf(student), student, -1e5)
        sure[:, v] = torch.where(torch.isneginf(student[:, v]), student[:, v], 0.0)
        column = -_scores(sure, teacher)["teacher_kl"]
        columns.append(torch.where(torch.isneginf(student[:, v]), float("-inf"), column))
    return torch.stack(columns, dim=1)


def _padded(flat: Tensor, mask: Tensor) -> Tensor:
    out = flat.new_zeros((*mask.shape, *flat.shape[1:]))
    out[mask] = flat.detach()
    return out
