"""aepo: counts, buckets and rewards by hand; lagging threshold; KL weights; ranks, state, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from tests.training.online.made import close, made_batch, made_step, on_two_ranks, part, reloaded
from tokengrain.batch import TokenBatch
from tokengrain.errors import RecipeError, RunError
from tokengrain.method import make_rollout_credit
from tokengrain.methods.aepo import smooth_score

# 4 of 4, 3 of 4, 2 of 4, 1 of 4 right: easy, easy, medium, hard.
CORRECT = torch.tensor([1, 1, 1, 1, 1, 1, 1, 0, 1, 0, 1, 0, 0, 0, 0, 1], dtype=torch.bool)
BUCKETS = ("easy", "easy", "medium", "hard")


def batch(seed: int = 0) -> TokenBatch:
    return made_batch(generations=4, seed=seed, longest=20)


def rollout(seed: int = 0, **changes):
    return made_step(batch(seed), **{"correct": CORRECT, "rewards": CORRECT.float(), **changes})


def windows(step, c: int, size: int) -> list[float]:
    """Mean entropy of the `size` tokens after each token that has so many."""
    h = step.segments.split(step.quantity("entropy"))[c]
    return [float(h[t + 1 : t + 1 + size].mean()) for t in range(len(h) - size)]


def threshold(step, size: int, quantile: float) -> float:
    each = []
    for c in range(len(step.segments)):
        complete = windows(step, c, size)
        n = int(step.segments.lengths[c])
        h = float(step.segments.split(step.quantity("entropy"))[c][0])
        filled = complete + [sum(complete) / len(complete) if complete else h] * (n - len(complete))
        each.append(torch.tensor(filled).quantile(quantile))
    return float(torch.stack(each).quantile(0.5))


SETTINGS = {"triggers": None, "window": 2, "quantile": 0.7, "decay": 0.5, "kl": "none"}


def test_the_first_rollout_is_not_counted_and_the_second_with_its_threshold():
    credit = make_rollout_credit("aepo", **SETTINGS)
    first = rollout()
    credit(first)
    assert torch.equal(first.rewards, CORRECT.float())
    assert "hwe" not in first.quantities
    tau = threshold(first, 2, 0.7)
    assert credit.state_dict()["threshold"]["value"] == pytest.approx(tau)
    step = rollout(seed=1)
    credit(step)
    counts = torch.tensor([sum(w >= tau for w in windows(step, c, 2)) for c in range(16)]).double()
    assert float(counts.max()) > 1
    close(step.segments.sum(step.quantities["hwe"]), counts)
    means = counts.view(4, 4).mean(1)
    target = {name: round(float(means[[i for i in range(4) if BUCKETS[i] == name]].mean())) for name in set(BUCKETS)}
    drift = {n: float(means[[i for i in range(4) if BUCKETS[i] == n]].mean()) - t for n, t in target.items()}
    alpha = {n: 0.5 + 0.05 * (-1 if n == "hard" else 1) * drift[n] for n in target}
    places = torch.tensor([("easy", "medium", "hard").index(b) for b in BUCKETS for _ in range(4)])
    each = {"target": target, "alpha": alpha}
    vectors = {k: torch.tensor([float(v[b]) for b in BUCKETS for _ in range(4)]) for k, v in each.items()}
    close(step.rewards, CORRECT + smooth_score(CORRECT.double(), counts, places, **vectors))
    assert step.metrics["aepo/tau"] == pytest.approx(tau)
    assert step.metrics["aepo/easy"] == 0.5
    assert credit.state_dict()["threshold"]["value"] == pytest.approx(0.5 * tau + 0.5 * threshold(step, 2, 0.7))


def test_state_survives_a_resume_and_another_order_of_prompts():
    make = lambda: make_rollout_credit("aepo", **{**SETTINGS, "kl": "log_ema"})  # noqa: E731
    credit = make()
    for seed in (0, 1):
        credit(rollout(seed))
    plain, again = rollout(2), part(rollout(2), [2, 0, 3, 1])
    fresh = reloaded(credit, make)
    credit(plain)
    fresh(again)
    close(again.rewards, part(plain, [2, 0, 3, 1]).rewards)
    close(again.quantities["kl_weights"], part(plain, [2, 0, 3, 1]).quantities["kl_weights"])


@pytest.mark.parametrize("mode", ["code", "paper", "token_semantic"])
def test_two_ranks_are_one(mode):
    make = lambda: make_rollout_credit("aepo", **{**SETTINGS, "mode": mode, "kl": "multiplicative", "rho": 0.5})  # noqa: E731
    one, credits = make(), [make(), make()]
    for seed in range(3):
        left = iter(credits)
        shares, credits = on_two_ranks(rollout(seed), lambda: reloaded(next(left), make))  # noqa: B023
        step = rollout(seed)
        one(step)
        for rank, share in enumerate(shares):
            own = part(step, range(rank, 4, 2))
            close(share.rewards, own.rewards)
            close(share.quantities["kl_weights"], own.quantities["kl_weights"])
    assert credits[0].state_dict() == credits[1].state_dict()
    found, expected = (c.state_dict()["shaping"]["alpha"] for c in (credits[0], one))
    assert found == pytest.approx(expected)
    assert mode == "code" or one.state_dict()["threshold"]["value"] is None


def test_kl_weights_follow_the_kl_by_difficulty():
    step = rollout()
    lift = torch.tensor([0.0, 0.0, 0.5, 3.0])[step.group][step.segments.ids]
    step.quantities["ref_logps"] = step.quantity("old_logps") - lift
    make_rollout_credit("aepo", **{**SETTINGS, "kl": "multiplicative", "kl_target": 0.1, "kl_step": 0.1})(step)
    k3 = {name: math.exp(-d) + d - 1 for name, d in (("easy", 0.0), ("medium", 0.5), ("hard", 3.0))}
    for place, name in enumerate(BUCKETS):
        weight = 1 + 0.1 * (k3[name] / 0.1 - 1)
        own = step.group[step.segments.ids] == place
        close(step.quantities["kl_weights"][own], torch.full((int(own.sum()),), weight))
    assert step.metrics["aepo/kl_weight_hard"] > 1 > step.metrics["aepo/kl_weight_easy"]


def test_paper_mode_relaxes_the_kl_where_windows_fire():
    step = rollout()
    make_rollout_credit("aepo", mode="paper", window=1, kl="log_ema", kl_interval=100)(step)
    entropy = step.quantity("entropy")
    tau = torch.stack([h.quantile(0.95) for h in step.segments.split(entropy)]).mean()
    fires = entropy >= tau
    assert torch.equal(step.quantities["hwe"] > 0, fires)
    close(step.quantities["kl_weights"], torch.where(fires, 0.5, 1.0))
    assert not torch.equal(step.rewards, CORRECT.float())


def test_triggers_are_words_of_the_vocabulary():
    class Words:
        def __len__(self):
            return 90  # the model has more

        def convert_ids_to_tokens(self, ids):
            return ["\u0120Wait" if i % 5 == 0 else f"w{i}" for i in ids]

    credit = make_rollout_credit("aepo", **{**SETTINGS, "triggers": ["wait"]}, tokenizer=Words())
    credit(rollout())
    step = rollout(1)
    credit(step)
    marked = step.quantities["hwe"] > 0
    assert marked.any()
    assert (step.batch.labels[marked] % 5 == 0).all()
    assert (step.batch.labels[marked] < 90).all()
    with pytest.raises(RecipeError, match="none of the 1 trigger words is a token"):
        make_rollout_credit("aepo", triggers=["however"], tokenizer=Words())
    with pytest.raises(RecipeError, match="needs a tokenizer"):
        make_rollout_credit("aepo")


def test_what_was_not_scored_stays_out():
    step = rollout(rewards=torch.where(torch.arange(16) == 3, torch.nan, CORRECT.float()))
    make_rollout_credit("aepo", mode="paper", kl="none", window=1)(step)
    assert torch.isnan(step.rewards).nonzero().flatten().tolist() == [3]
    assert step.metrics["aepo/easy"] == 0.5


def test_refusals():
    with pytest.raises(RecipeError, match="expected medium < easy"):
        make_rollout_credit("aepo", triggers=None, easy=0.2)
    with pytest.raises(RunError, match="what is correct"):
        make_rollout_credit("aepo", triggers=None)(rollout(correct=None))
    with pytest.raises(RunError, match="another setting of `kl`"):
        reloaded(
            make_rollout_credit("aepo", triggers=None), lambda: make_rollout_credit("aepo", triggers=None, kl="none")
        )
    assert make_rollout_credit("aepo", triggers=None).needs == {"entropy", "ref_logps"}
    assert make_rollout_credit("aepo", triggers=None, kl="none").needs == {"entropy"}
    with pytest.warns(UserWarning, match="plain accuracy"):
        make_rollout_credit("aepo", triggers=None, shape="lagrange")
