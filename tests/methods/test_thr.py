"""THR and NTHR: influence against autograd on the head and plain loops; the credits on a model's own states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.online.made import close, made_batch, made_step, on_two_ranks, part
from tests.training.tiny import tiny_llama
from tokengrain.batch import Segments
from tokengrain.errors import RecipeError, RunError
from tokengrain.method import make_rollout_credit
from tokengrain.methods import thr
from tokengrain.methods.grpo import group_advantages
from tokengrain.methods.thr import (
    correct_influence,
    influence_threshold,
    mixed_groups,
    nthr_eta,
    nthr_weights,
    thr_weights,
    token_hidden_rewards,
)
from tokengrain.scoring.head import Head
from tokengrain.scoring.score import head_of, score

F64 = torch.float64
VOCAB, WIDTH = 23, 5


@dataclass
class Rollouts:
    """Two mixed groups, one that is all wrong and one that is all right, with rows of groups interleaved."""

    segments: Segments
    group: Tensor
    correct: Tensor
    hidden: Tensor
    head: Head
    labels: Tensor

    def influence(self, head: Head | None = None, **settings: Any) -> Tensor:
        head = self.head if head is None else head
        return correct_influence(self.hidden, head, self.labels, *self.where, **settings)

    @property
    def where(self) -> tuple[Segments, Tensor, Tensor]:
        return self.segments, self.group, self.correct

    def thr(self, **settings: Any) -> Tensor:
        return token_hidden_rewards(self.influence(**settings), self.segments, self.correct)

    def logps(self, weight: Tensor) -> Tensor:
        logits = Head(weight, self.head.bias).logits(self.hidden)
        return torch.log_softmax(logits, -1).gather(1, self.labels[:, None]).squeeze(1)

    @property
    def token_group(self) -> Tensor:
        return self.group[self.segments.ids]


@pytest.fixture(params=[False, True], ids=["no bias", "bias"])
def x(request: pytest.FixtureRequest) -> Rollouts:
    generator = torch.Generator().manual_seed(5)
    lengths = [4, 3, 0, 2, 5, 1, 3, 2, 4, 3]
    n = sum(lengths)
    weight = torch.randn(VOCAB, WIDTH, dtype=F64, generator=generator)
    bias = torch.randn(VOCAB, dtype=F64, generator=generator) if request.param else None
    return Rollouts(
        Segments.from_lengths(lengths),
        torch.tensor([0, 1, 0, 1, 0, 0, 1, 2, 2, 3]),
        torch.tensor([1, 0, 1, 1, 1, 0, 0, 0, 0, 1]),
        torch.randn(n, WIDTH, dtype=F64, generator=generator),
        Head(weight, bias),
        torch.randint(VOCAB, (n,), generator=generator),
    )


def _anchored_likelihood(x: Rollouts, weight: Tensor, group: int, normalize: bool = True) -> Tensor:
    """Log-likelihood of the correct completions of a group, the mean (or sum) over tokens of each, summed."""
    logps = x.logps(weight)
    per = x.segments.mean(logps) if normalize else x.segments.sum(logps)
    return per[(x.group == group) & x.correct.bool()].sum()


def _by_autograd(x: Rollouts, normalize: bool = True) -> Tensor:
    """<grad of the correct completions' likelihood, grad of the token's log-probability>, one token at a time."""
    weight = x.head.weight.clone().requires_grad_()
    goals = [torch.autograd.grad(_anchored_likelihood(x, weight, g, normalize), weight)[0] for g in range(4)]
    logps = x.logps(weight)
    grads = [torch.autograd.grad(logp, weight, retain_graph=True)[0] for logp in logps]
    found = [(goals[g] * grad).sum() for g, grad in zip(x.token_group.tolist(), grads, strict=True)]
    return torch.stack(found)


def _by_loops(x: Rollouts, columns: list[int], exclude_self: bool = False) -> Tensor:
    """The definition, pair of tokens by pair of tokens, over the given columns of the vocabulary."""
    e = torch.nn.functional.one_hot(x.labels, VOCAB) - torch.softmax(x.head.logits(x.hidden), -1)
    e, own = e[:, columns], x.segments.ids.tolist()
    values = torch.zeros(len(own), dtype=F64)
    for t, j in enumerate(own):
        for a, i in enumerate(own):
            if x.group[i] != x.group[j] or not x.correct[i] or (exclude_self and i == j):
                continue
            values[t] += (e[a] @ e[t]) * (x.hidden[a] @ x.hidden[t]) / int(x.segments.lengths[i])
    return values


@pytest.mark.parametrize("chunk", [1 << 20, 500, 8])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_equals_autograd_on_the_head(
    x: Rollouts, normalize: bool, known: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thr, "CHUNK_BYTES", chunk)  # one part; several; one column at a time
    logps = x.logps(x.head.weight) if known else None
    values = x.influence(length_normalize=normalize, logps=logps)
    mixed = x.token_group < 2
    torch.testing.assert_close(values[mixed], _by_autograd(x, normalize)[mixed], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("budget", [1, 1 << 20])
def test_the_group_matrix_and_the_inner_products_agree(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thr, "CHUNK_BYTES", budget)  # 1 byte: there is no room for inner products of tokens
    generator = torch.Generator().manual_seed(0)
    for n, m, columns, width in ((9, 4, 50, 40), (30, 12, 200, 2)):
        errors, hidden = (torch.randn(n, k, dtype=F64, generator=generator) for k in (columns, width))
        weights = torch.rand(m, dtype=F64, generator=generator)
        pairs = torch.einsum("tv,av,th,ah,a->t", errors, errors[:m], hidden, hidden[:m], weights)
        torch.testing.assert_close(thr._contract(errors, hidden, weights), pairs)


@pytest.mark.parametrize("exclude_self", [False, True])
def test_equals_the_definition(x: Rollouts, exclude_self: bool) -> None:
    values = x.influence(exclude_self=exclude_self)
    mixed = x.token_group < 2
    torch.testing.assert_close(values[mixed], _by_loops(x, list(range(VOCAB)), exclude_self)[mixed])


@pytest.mark.parametrize("known", [False, True])
def test_restricted_is_the_definition_on_the_columns_of_the_group(x: Rollouts, known: bool) -> None:
    values = x.influence(restricted=True, logps=x.logps(x.head.weight) if known else None)
    for g in (0, 1):
        own = x.token_group == g
        columns = torch.unique(x.labels[own]).tolist()
        assert len(columns) < VOCAB
        torch.testing.assert_close(values[own], _by_loops(x, columns)[own])


def test_scale_and_soft_cap_change_the_distribution(x: Rollouts) -> None:
    head = Head(x.head.weight, x.head.bias, scale=0.5, softcap=1.5)
    values = x.influence(head)
    e = torch.nn.functional.one_hot(x.labels, VOCAB) - torch.softmax(head.logits(x.hidden), -1)
    own = x.token_group == 1
    anchor = own & x.correct.bool()[x.segments.ids]
    M = e[anchor].t() @ x.hidden[anchor] / 2  # the only correct completion has two tokens
    torch.testing.assert_close(values[own], torch.einsum("nv,vh,nh->n", e, M, x.hidden)[own])


def test_unmixed_groups_are_left_out(x: Rollouts) -> None:
    assert mixed_groups(*x.where).tolist() == [True, True, False, False]
    values = x.thr()
    unmixed = x.token_group >= 2
    assert (values[unmixed] == 0).all()
    assert (values[~unmixed] != 0).all()
    tau = influence_threshold(values, *x.where, beta=1.0)
    assert (thr_weights(values, *x.where, tau, p=0.5)[unmixed] == 1).all()
    everything = torch.randn(len(values), dtype=F64)
    assert (thr_weights(everything, *x.where, p=0.5)[unmixed] == 1).all()


def test_groups_and_the_order_of_completions_do_not_matter(x: Rollouts) -> None:
    values = x.thr()
    order = torch.tensor([9, 4, 0, 8, 2, 5, 1, 3, 7, 6])
    tokens = torch.cat([torch.arange(*x.segments.offsets[c : c + 2].tolist()) for c in order.tolist()])
    y = Rollouts(
        Segments.from_lengths(x.segments.lengths[order].tolist()),
        x.group[order],
        x.correct[order],
        x.hidden[tokens],
        x.head,
        x.labels[tokens],
    )
    torch.testing.assert_close(y.thr(), values[tokens])
    tau = influence_threshold(values, *x.where, beta=1.0)
    torch.testing.assert_close(influence_threshold(y.thr(), *y.where, beta=1.0), tau)


def test_threshold_by_hand_and_by_quantile(x: Rollouts) -> None:
    values = x.thr()
    means = x.segments.mean(values)
    tau = influence_threshold(values, *x.where, beta=0.5)
    assert float(tau[0]) == pytest.approx(0.5 * min(float(means[0]), float(means[4])))  # row 2 has no tokens
    assert float(tau[1]) == pytest.approx(0.5 * float(means[3]))
    assert tau[2] == float("-inf")
    half = influence_threshold(values, *x.where, beta=1.0, quantile=0.5)
    for g in (0, 1):
        own = values[x.token_group == g].abs()
        assert float(half[g]) == pytest.approx(float(own.quantile(0.5)))
        assert int((own > half[g]).sum()) == len(own) // 2


def test_weights(x: Rollouts) -> None:
    values = x.thr()
    tau = influence_threshold(values, *x.where, beta=1.0)
    only = thr_weights(values, *x.where, tau)
    assert set(only.tolist()) == {0.0, 1.0}
    up, down = (thr_weights(values, *x.where, tau, p=p) for p in (0.3, -0.3))
    torch.testing.assert_close(up + down, 2 * only + 0 * up)
    assert thr_weights(values, *x.where).tolist() == [1.0] * len(values)  # no threshold, p = 0: the base loss
    mixed, kept = x.token_group < 2, only > 0
    torch.testing.assert_close(up[mixed & kept], 1 + 0.3 * values[mixed & kept].sign())
    # Scaling hidden states (with the logits held fixed) scales both sides of the comparison.
    assert torch.equal(
        thr_weights(9 * values, *x.where, influence_threshold(9 * values, *x.where, beta=1.0), p=0.3), up
    )


def test_confident_and_orthogonal_tokens_have_none(x: Rollouts) -> None:
    sure = Head(torch.cat([x.head.weight, x.head.weight.new_zeros(1, WIDTH)]), x.head.weight.new_zeros(VOCAB + 1))
    assert sure.bias is not None
    sure.bias[-1] = 1000.0  # every token is predicted to be the last one of the vocabulary
    x.labels[:] = VOCAB
    assert float(x.influence(sure).abs().max()) < 1e-12
    right = x.correct.bool()[x.segments.ids]
    x.hidden[right, 2:] = 0
    x.hidden[~right, :2] = 0
    x.labels[:] = 0
    values = x.thr()
    assert float(values[~right].abs().max()) < 1e-12
    assert float(values[right].abs().max()) > 1e-3


@pytest.mark.filterwarnings("ignore:a group of one")
def test_a_step_on_the_head_moves_the_correct_completions_as_predicted(x: Rollouts) -> None:
    A = group_advantages(x.correct.double(), x.group)
    values, token_A = x.thr(), x.segments.broadcast(A)
    slopes = []
    for p in (-0.5, 0.0, 0.5):
        weights = thr_weights(values, *x.where, p=p)
        weight = x.head.weight.clone().requires_grad_()
        moved = 0.0  # summed over groups, each by its own step: they share the head
        for g in (0, 1):
            own = x.token_group == g
            loss = -(weights * token_A * x.logps(weight))[own].sum()
            (step,) = torch.autograd.grad(loss, weight)
            goal = torch.autograd.grad(_anchored_likelihood(x, weight, g), weight)[0]
            moved -= float((goal * step).sum())
        slopes.append(moved)
        assert moved == pytest.approx(float((weights * token_A.abs() * values).sum()))
    gain = float((token_A.abs() * values.abs()).sum())
    assert slopes[1] - slopes[0] == pytest.approx(0.5 * gain)
    assert slopes[2] - slopes[1] == pytest.approx(0.5 * gain)


def test_nthr(x: Rollouts) -> None:
    score = x.influence(length_normalize=False)
    right = x.correct.bool()[x.segments.ids]
    for g in (0, 1):
        weight = x.head.weight.clone().requires_grad_()
        M = torch.autograd.grad(_anchored_likelihood(x, weight, g, normalize=False), weight)[0]
        assert float(score[right & (x.token_group == g)].sum()) == pytest.approx(float(M.square().sum()))
        if g == 1:  # one correct completion, of two tokens
            assert float(influence_threshold(score, *x.where, beta=1.0)[1]) == pytest.approx(
                float(M.square().sum()) / 2
            )
    eta = nthr_eta(x.group, x.correct, F64)
    torch.testing.assert_close(eta, torch.tensor([0.5, 1 / 3, 1.0, 1.0], dtype=F64))
    tau = influence_threshold(score, *x.where, beta=0.0)
    weights = nthr_weights(score, *x.where, tau)
    selected = ~right & (score > 0) & (x.token_group < 2)
    assert 0 < int(selected.sum()) < int((~right & (x.token_group < 2)).sum())
    torch.testing.assert_close(weights, torch.where(selected, eta[x.token_group], 1.0))
    half = nthr_eta(torch.tensor([0, 0]), torch.tensor([1, 0]))
    assert half.tolist() == [0.0]  # at a success rate of one half selected penalties vanish


def test_nothing_carries_gradient_and_float32_is_kept(x: Rollouts) -> None:
    hidden = x.hidden.float().requires_grad_()
    head = Head(x.head.weight.float().requires_grad_(), None if x.head.bias is None else x.head.bias.float())
    found = correct_influence(hidden, head, x.labels, *x.where)
    assert not found.requires_grad
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, x.influence().float(), rtol=1e-4, atol=1e-4)
    low = correct_influence(hidden.bfloat16(), head, x.labels, *x.where)
    assert low.dtype == torch.float32


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


def test_a_completion_that_no_reward_applies_to_is_neither_correct_nor_incorrect() -> None:
    segments, group = Segments.from_lengths([2, 1, 2, 2]), torch.zeros(4, dtype=torch.long)
    correct, values = torch.tensor([1.0, 0.0, torch.nan, torch.nan]), torch.tensor([3.0, 1, 2, 9, 9, 9, 9])
    where = segments, group, correct
    tau = influence_threshold(values, *where, beta=1.0)
    assert tau.tolist() == [2.0]  # the mean of the correct one
    assert token_hidden_rewards(values, segments, correct).tolist() == [3, 1, -2, 9, 9, 9, 9]
    assert thr_weights(values, *where, tau, p=0.5).tolist() == [1.5, 0, 0, 1, 1, 1, 1]
    assert nthr_eta(group, correct).tolist() == [0.0]
    assert nthr_weights(values + 1, *where, tau).tolist() == [1, 1, 0, 1, 1, 1, 1]
    assert not mixed_groups(segments, group, torch.tensor([1.0, torch.nan, 1, torch.nan]))[0]
