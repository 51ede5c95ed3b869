"""thr and nthr: on a model's own hidden states, against autograd on its head; identities; refusals."""

from __future__ import annotations

import pytest
import torch

from tests.training.online.made import close, made_batch, made_step, on_two_ranks, part
from tests.training.tiny import tiny_llama
from tokengrain.errors import RecipeError, RunError
from tokengrain.method import make_rollout_credit
from tokengrain.scoring.score import head_of, score

# Groups: mixed, mixed, all wrong, all right.
CORRECT = torch.tensor([1, 0, 1, 0, 0, 1, 0, 0, 0, 1, 1, 1], dtype=torch.bool)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(dtype=torch.float64).eval()


def rollout(model, **changes):
    batch = made_batch()
    with torch.no_grad():
        scores = score(model, batch, ("logps", "hidden", "entropy"))
    batch = batch.with_columns(old_logps=scores.logps, hidden=scores.hidden, entropy=scores.entropy)
    advantages = torch.randn(batch.segments.total, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    settings = {"correct": CORRECT, "rewards": CORRECT.double(), "advantages": advantages, **changes}
    return made_step(batch, head_of=lambda: head_of(model).detach(), **settings)


def influence(model, step, power: int) -> torch.Tensor:
    """<grad_W of sum over correct completions of (mean or sum of) log-probabilities, grad_W of each token's>, `[N]`."""
    weight = head_of(model).weight.detach().clone().requires_grad_(True)
    logps = (step.quantity("hidden") @ weight.t()).log_softmax(-1).gather(1, step.batch.labels[:, None])[:, 0]
    per = [torch.autograd.grad(x, weight, retain_graph=True)[0] for x in logps]
    out = torch.zeros_like(logps)
    for g in range(step.batch.n_prompts):
        members = [c for c in range(12) if step.group[c] == g]
        right = [c for c in members if CORRECT[c]]
        if not right or len(right) == len(members):
            continue
        whole = sum(sum(per[t] for t in tokens(step, c)) / len(tokens(step, c)) ** power for c in right)
        for t in [t for c in members for t in tokens(step, c)]:
            out[t] = (whole * per[t]).sum()
    return out


def tokens(step, completion: int) -> list[int]:
    return (step.segments.ids == completion).nonzero().flatten().tolist()


def test_thr_weighs_advantages_by_the_sign_of_influence(model):
    step = rollout(model)
    before = step.advantages.clone()
    make_rollout_credit("thr", p=0.3, restricted=False)(step)
    right = CORRECT[step.segments.ids]
    thr = influence(model, step, 1) * torch.where(right, 1.0, -1.0)
    mixed = step.segments.ids < 6
    close(step.quantities["thr"][mixed], thr[mixed], 1e-8)
    weights = torch.ones_like(before)
    for g in (0, 1):
        own = step.group[step.segments.ids] == g
        tau = min(float(thr[tokens(step, c)].mean()) for c in range(12) if CORRECT[c] and step.group[c] == g)
        weights[own] = (thr[own].abs() > tau) * (1 + 0.3 * thr[own].sign())
    close(step.advantages, before * weights, 1e-8)
    assert step.metrics["thr/selected"] == pytest.approx(float((weights[mixed] != 0).double().mean()))
    assert step.metrics["thr/mixed"] == 0.5
    assert 0 <= step.metrics["thr/entropy_overlap"] <= 1


def test_thr_without_mask_and_steering_changes_nothing(model):
    step = rollout(model)
    before = step.advantages.clone()
    make_rollout_credit("thr", p=0, mask=False)(step)
    assert torch.equal(step.advantages, before)
    up, down = rollout(model), rollout(model)
    make_rollout_credit("thr", p=0.4, mask=False)(up)
    make_rollout_credit("thr", p=-0.4, mask=False)(down)
    close(up.advantages + down.advantages, 2 * before, 1e-12)
    assert not torch.allclose(up.advantages, before)


def test_nthr_eases_penalties_of_incorrect_completions_only(model):
    step = rollout(model, advantages=torch.ones(made_batch().segments.total, dtype=torch.float64))
    make_rollout_credit("nthr", beta=-0.02, restricted=False)(step)
    values = influence(model, step, 0)
    expected = torch.ones_like(values)
    for g in (0, 1):
        right = [c for c in range(12) if step.group[c] == g and CORRECT[c]]
        tau = -0.02 * min(float(values[tokens(step, c)].mean()) for c in right)
        wrong = (step.group[step.segments.ids] == g) & ~CORRECT[step.segments.ids]
        expected[wrong & (values > tau)] = 2 * abs(0.5 - len(right) / 3)
    close(step.advantages, expected, 1e-8)
    assert 0 < step.metrics["nthr/penalties_eased"] < 1


def test_restricted_and_ranks(model):
    step = rollout(model)
    shares, _ = on_two_ranks(step, lambda: make_rollout_credit("thr"))
    make_rollout_credit("thr")(step)
    for rank, share in enumerate(shares):
        close(share.advantages, part(step, range(rank, 4, 2)).advantages, 1e-10)


def test_refusals(model):
    with pytest.raises(RecipeError, match=r"p = 1\.5"):
        make_rollout_credit("thr", p=1.5)
    for missing, message in (("correct", "rewards that say what is correct"), ("advantages", "needs advantages")):
        with pytest.raises(RunError, match=message):
            make_rollout_credit("thr")(rollout(model, **{missing: None}))
    step = made_step(advantages=torch.zeros(made_batch().segments.total))
    with pytest.raises(RunError, match="has no 'hidden'"):
        make_rollout_credit("nthr")(step)
    assert make_rollout_credit("nthr").needs == {"hidden"}
