"""The experiments behind the claims: their parts against brute force, quick runs of all, and (slow) what is robust."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from experiments.claims import aligndistil, markov, qrm, rrpo, sepo, stories, tiny_lm
from experiments.claims.framework import Claim, Finding
from experiments.claims.groups import GROUPS
from experiments.claims.markov import MarkovPolicy, Pairs, Space
from experiments.claims.markov_training import logps_of
from experiments.claims.runner import judge_all, run_claims
from rich.console import Console

from tokengrain.batch import TokenBatch
from tokengrain.scoring.score import score

QUIET = Console(quiet=True)
SMALL = Space(prompts=2, length=3, vocabulary=4)


def everything(space: Space) -> tuple[torch.Tensor, torch.Tensor]:
    """All completions of all prompts."""
    words = torch.tensor(list(itertools.product(range(space.vocabulary), repeat=space.length)))
    prompts = torch.arange(space.prompts).repeat_interleave(len(words))
    return prompts, words.repeat(space.prompts, 1)


def test_exact_reward_and_divergence_equal_sums_over_all_completions() -> None:
    policy, other = MarkovPolicy(SMALL, 5, seed=0), MarkovPolicy(SMALL, 5, seed=1)
    prompts, tokens = everything(SMALL)
    with torch.no_grad():
        logp, logq = (
            p_logps.view(tokens.shape).double().sum(1)
            for p_logps in (logps_of(policy, prompts, tokens), logps_of(other, prompts, tokens))
        )
    rewards = torch.randn(2, 1, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    totals = markov.total(rewards, policy.table().shape, prompts, tokens)
    probability = logp.exp() / SMALL.prompts
    assert float(probability.sum()) == pytest.approx(1, abs=1e-5)
    assert markov.expected(policy.table(), rewards) == pytest.approx(float((probability * totals).sum()), abs=1e-5)
    kl = float((probability * (logp - logq)).sum())
    assert markov.divergence(policy.table(), other.table()) == pytest.approx(kl, abs=1e-5)


def test_samples_follow_the_table() -> None:
    policy = MarkovPolicy(SMALL, 5, seed=0)
    prompts = torch.zeros(20000, dtype=torch.long)
    drawn = markov.sample(policy.table(), prompts, torch.Generator().manual_seed(0))
    seen = torch.bincount(drawn[:, 2], minlength=4) / len(drawn)
    at_last = markov.occupancy(policy.table())[0, 2]
    expected = (at_last[:, None] * policy.table()[0, 2].exp()).sum(0)
    assert torch.allclose(seen.double(), expected, atol=0.015)


def test_labels_prefer_the_higher_reward() -> None:
    table = MarkovPolicy(SMALL, 5, seed=0).table()
    rewards = torch.zeros(1, 1, 5, 4, dtype=torch.float64)
    rewards[..., 1] = 100.0  # every token 1 is worth more than any doubt
    pairs = markov.draw_pairs(table, rewards, 200, torch.Generator().manual_seed(0))
    ones = (pairs.completions == 1).sum(-1)
    assert bool((ones[:, 0] >= ones[:, 1]).all())
    assert bool((ones[:, 0] > ones[:, 1]).any())


def test_recall_counts_good_of_chosen_and_bad_of_rejected() -> None:
    worth = torch.tensor([[1.0, -1.0, 0.0]])
    pairs = Pairs(torch.tensor([0]), torch.tensor([[[0, 1, 0], [1, 1, 2]]]))
    selected = torch.tensor([1.0, 1, 0, 0, 1, 1])
    found = sepo.recall(worth, pairs, selected)
    assert found == {"recall_good": 0.5, "recall_bad": 0.5, "recall": 0.5, "bad_in_chosen": 1.0}


def test_rrpo_pairs_differ_in_the_marked_slots_and_in_style_alone() -> None:
    scale = rrpo.Scale(steps=1, batch=300)
    (batch,) = rrpo.pair_batches(scale, torch.Generator().manual_seed(0))
    tokens = batch.completion_ids.view(300, 2, rrpo.LENGTH)
    spans = batch.columns["spans"].view(300, 2, rrpo.LENGTH) > 0
    facts = batch.prompt_ids.view(300, -1)[:, 1:4]
    differs = tokens[:, 0] != tokens[:, 1]
    assert torch.equal(differs[:, rrpo.SLOT_AT], spans[:, 0][:, rrpo.SLOT_AT])
    assert torch.equal(spans[:, 0], spans[:, 1])
    assert not spans[:, :, rrpo.STYLE_AT].any()
    assert bool(spans[:, 0].any(1).all())
    assert torch.equal(tokens[:, 0][:, rrpo.SLOT_AT], facts)
    style = tokens[:, :, rrpo.STYLE_AT] - rrpo.STYLE - 2 * torch.arange(9)
    assert set(style.unique().tolist()) == {0, 1}
    share_of_a = (style == 0).float().mean((0, 2))
    assert share_of_a.tolist() == pytest.approx([0.7, 0.3], abs=0.04)
    assert bool((tokens[:, :, -1] == rrpo.EOS).all())


def test_batches_from_tensors_score_like_the_model_itself() -> None:
    model = tiny_lm.tiny_llama(11, 12, seed=0)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(11, (3, 2), generator=generator)
    completions = torch.randint(11, (3, 2, 4), generator=generator)
    batch = tiny_lm.token_batch(prompts, completions)
    rows = torch.cat([prompts[:, None].expand(3, 2, 2), completions], -1).flatten(0, 1)
    with torch.no_grad():
        logp = model(input_ids=rows).logits[:, 1:-1].log_softmax(-1)
        expected = logp.gather(2, rows[:, 2:, None]).flatten()
        found = score(model, batch).logps
    assert found is not None
    assert torch.allclose(found, expected, atol=1e-5)


def test_qrm_behaviour_is_right_with_probability_055() -> None:
    batch = qrm.draw_pairs(3000, torch.Generator().manual_seed(0))
    right = qrm.is_right(batch).float()
    assert float(right.mean()) == pytest.approx(0.55, abs=0.01)
    chosen, rejected = batch.segments.pairs(batch.segments.sum(right))
    assert float(chosen.mean()) > float(rejected.mean()) + 1


def test_reinforce_with_perfect_scores_needs_few_steps_and_with_noise_many() -> None:
    context = qrm.Context(0, qrm.Scale(reinforce_steps=100), None, qrm.draw_pairs(2, torch.Generator()))

    def perfect(batch: TokenBatch) -> torch.Tensor:
        return qrm.is_right(batch).float()

    noise = torch.Generator().manual_seed(0)
    steps = qrm.reinforce(context, perfect)
    assert 0 < steps < 50
    assert qrm.reinforce(context, lambda batch: torch.rand(batch.segments.total, generator=noise)) == 100


def test_quick_runs_of_the_small_tasks(tmp_path: Path) -> None:
    groups = [GROUPS[name] for name in ("rrpo", "sepo", "aligndistil", "qrm")]
    results = run_claims(groups, [0, 1], tmp_path, quick=True, console=QUIET)
    assert len(results) == 2 * sum(len(group.arms) for group in groups)
    for row in results:
        assert all(math.isfinite(v) for v in row["measures"].values() if v is not None), row
    findings = judge_all(groups, results)
    assert len(findings) == sum(len(group.claims) for group in groups)
    one = {r["arm"]: r["measures"] for r in results if r["group"] == "rrpo" and r["seed"] == 0}
    assert one["SFT"]["kl"] == pytest.approx(0, abs=1e-6)
    assert one["DPO"]["kl"] > 1e-5
    again = {r["arm"]: r["measures"] for r in run_claims(groups[:1], [0], tmp_path / "b", quick=True, console=QUIET)}
    assert again == one  # a run is a function of its seed


def test_an_arm_does_not_depend_on_the_arms_before_it(tmp_path: Path) -> None:
    whole = run_claims([sepo.GROUP], [0], tmp_path, quick=True, console=QUIET)
    context = sepo.prepare(0, sepo.GROUP.scales[True])
    last = sepo.GROUP.arms[-1]
    assert sepo.run(context, last) == next(r["measures"] for r in whole if r["arm"] == last.name)


def test_distilling_without_extrapolation_ignores_the_reverse_model() -> None:
    context = aligndistil.prepare(0, aligndistil.Scale(pairs=64, held_out=8, steps=3, batch=8))
    arm = next(a for a in aligndistil.ARMS if a.settings.get("form") == "distil")
    before = aligndistil.run(context, arm)
    context.trained[aligndistil.MILD, True] = MarkovPolicy(aligndistil.SPACE, aligndistil.HIDDEN, seed=99)
    assert aligndistil.run(context, arm) == before


@pytest.mark.parametrize("name", ["DPO β 0.3", "SePO k 0.3 γ 2", "AlignDistil β₀ 0.3 r 4", "T-REG β 0.3 α 0.25"])
def test_quick_run_on_stories(name: str) -> None:
    group = stories.NOISY
    context = stories.prepare(0, group.scales[True])
    found = stories.run(context, next(arm for arm in group.arms if arm.name == name))
    assert found["reward"] is not None
    assert math.isfinite(found["reward"])
    assert len(stories.remarks([{"measures": found}])) == 2


# -- what the specifications hold for robust ----------------------------------------------------------------------

SEEDS = {"rrpo": [0, 1], "sepo": [0, 1], "aligndistil": [0, 1], "qrm": [0, 1]}
STORIES_METHODS = ["aligndistil", "sepo", "tdpo", "tgdpo", "treg"]


def robust(name: str, tmp_path: Path, seeds: list[int], methods: list[str] | None = None) -> list[Finding]:
    """Findings of the robust claims of a group; only the arms that they compare are run."""
    group = GROUPS[name]
    claims = tuple(c for c in group.claims if c.robust and (methods is None or c.method in methods))
    compared = {arm for c in claims for arm in (c.first, c.second)}
    part = type(group)(
        **{**vars(group), "claims": claims, "arms": tuple(arm for arm in group.arms if arm.name in compared)}
    )
    return judge_all([part], run_claims([part], seeds, tmp_path, console=QUIET))


def held(finding: Finding) -> bool:
    """Every seed, where the claim says so; else the mean: two seeds make no interval worth the name."""
    claim: Claim = finding.claim
    if claim.judged == "every seed":
        return finding.verdict == "seen"
    assert finding.value is not None
    return claim.holds(finding.value.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SEEDS))
def test_robust_claims_of_the_small_tasks(name: str, tmp_path: Path) -> None:
    findings = robust(name, tmp_path, SEEDS[name])
    assert findings
    assert not [f.as_dict() for f in findings if not held(f)]


@pytest.mark.slow
@pytest.mark.parametrize("regime", ["noisy", "clean"])
@pytest.mark.parametrize("method", STORIES_METHODS)
def test_robust_claims_on_stories(method: str, regime: str, tmp_path: Path) -> None:
    findings = robust(f"stories-{regime}", tmp_path, [0, 1], [method])
    assert findings
    assert not [f.as_dict() for f in findings if not held(f)]
