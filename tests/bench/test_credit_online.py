"""Credit of the online methods against the first wrong token and the tokens that depend on the reasoning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from tokengrain.batch import Segments
from tokengrain.bench.cli import bench_app
from tokengrain.bench.credit import bench_credit
from tokengrain.bench.questions import ON_CHAINS, ON_REFERENCES, Draw, OnlineCredit, advantages, measure, questions_of
from tokengrain.bench.sources import ONLINE, SOURCES, Bench, chosen_sources, left_out
from tokengrain.errors import RecipeError
from tokengrain.evaluation.credit import CreditTruth, pointing_scores
from tokengrain.methods.dro import r3_weights, variability
from tokengrain.scoring.score import score
from tokengrain.worlds import load_world

ARITHMETIC, REVISION = "world://arithmetic?size=small&pairs=32", "world://revision?size=small"
DRAW = Draw(12, 6)


@pytest.fixture(scope="module")
def world() -> Any:
    return load_world(ARITHMETIC)


@pytest.fixture(scope="module")
def truth(world: Any) -> CreditTruth:
    return ON_CHAINS.draw(world, DRAW)


@pytest.fixture(scope="module")
def revision() -> Any:
    return load_world(REVISION)


@pytest.fixture(scope="module")
def references(revision: Any) -> CreditTruth:
    return ON_REFERENCES.draw(revision, DRAW)


def found(name: str, truth: CreditTruth, world: Any, question: Any = ON_CHAINS, **settings: Any) -> dict[str, Any]:
    return measure(SOURCES[name].build(Bench(world, question=question, **settings)), truth, question)[0]


# -- measures -------------------------------------------------------------------------------------------

SEGMENTS = Segments.from_lengths([4, 2, 3])
MARKED = torch.tensor([0, 0, 1, 0, 0, 0, 1, 1, 0], dtype=torch.bool)
EVERY = torch.ones(9, dtype=torch.bool)


def test_credit_at_the_marked_tokens_scores_perfectly() -> None:
    exact = pointing_scores(-MARKED.float(), MARKED, EVERY, SEGMENTS)
    assert [exact[n] for n in ("auc_inside", "place1", "place3", "share")] == [1, 1, 1, 1]
    assert exact["place1_chance"] == pytest.approx((1 / 4 + 2 / 3) / 2)
    turned = pointing_scores(MARKED.float(), MARKED, EVERY, SEGMENTS)
    assert (turned["auc_inside"], turned["place1"], turned["share"]) == (0, 0, 1)
    assert pointing_scores(MARKED.float(), MARKED, EVERY, SEGMENTS, low=False) == exact


def test_what_is_the_same_for_a_completion_is_at_chance() -> None:
    per_completion = torch.tensor([-3.0, -3, -3, -3, 5, 5, 0, 0, 0])  # the last one has no credit at all
    flat = pointing_scores(per_completion, MARKED, EVERY, SEGMENTS)
    assert flat["auc_inside"] == 0.5
    for name, chance in (("place1", "place1_chance"), ("place3", "place3_chance"), ("share", "place1_chance")):
        assert flat[name] == pytest.approx(flat[chance]), name


def test_places_by_hand() -> None:
    credit = torch.tensor([-4.0, -3.0, -2.0, 1.0, 9.0, 9.0, 0.0, 2.0, 1.0])
    some = torch.tensor([1, 0, 0, 1, 1, 1, 1, 1, 1], dtype=torch.bool)
    got = pointing_scores(credit, MARKED, some, SEGMENTS)
    # First: of -4 and 1 one is above -2. Last: 0 and 2 against 1.
    assert got["auc_inside"] == pytest.approx((0.5 + 0.5) / 2)
    assert got["place1"] == pytest.approx((0 + 1) / 2)
    assert got["place3"] == pytest.approx(1)  # of the last one's three tokens two can be marked, and are
    assert got["share"] == pytest.approx((2 / 10 + 2 / 3) / 2)
    nothing = pointing_scores(credit, torch.zeros(9, dtype=torch.bool), some, SEGMENTS)
    assert all(v != v for v in nothing.values())


# -- what is judged -------------------------------------------------------------------------------------


def test_groups_have_right_and_wrong_chains_and_one_culprit_each(world: Any, truth: CreditTruth) -> None:
    batch = truth.batch
    assert batch.n_prompts == 12
    wrong = batch.segments.sum((truth.advantages < 0).float())
    assert set(wrong.tolist()) == {0, 1}
    firsts = [int((batch.group == g).nonzero()[0]) for g in range(12)]
    assert [wrong[i] for i in firsts] == [0] * 12
    assert [wrong[i + 1] for i in firsts] == [1] * 12
    prompts = [world.decode(batch.prompt(g).tolist()) for g in batch.group.tolist()]
    graded = [world.audit(p, batch.completion(c).tolist()).correct for c, p in enumerate(prompts)]
    assert graded == (wrong == 0).tolist()
    other = ON_CHAINS.draw(world, Draw(12, 6, seed=1))
    assert not torch.equal(other.batch.prompt_ids, batch.prompt_ids)


def test_many_prompts_take_more_rounds(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """How long is searched goes by how many prompts are wanted."""
    monkeypatch.setattr("tokengrain.bench.questions.CHUNK", 4)
    monkeypatch.setattr("tokengrain.bench.questions.ROUNDS", 2)
    assert ON_CHAINS.draw(world, Draw(12, 6)).batch.n_prompts == 12


def test_references_of_a_group_are_the_same_and_know_their_reasoning(revision: Any, references: CreditTruth) -> None:
    batch, values, _ = references
    assert set(values.tolist()) == {-1, 1}
    digits = {revision.encode(d)[0] for d in "0123456789"}
    assert {int(i) for i in batch.labels[values > 0]} <= digits
    assert [q.name for q in questions_of(revision)] == ["chain", "reference"]


# -- sources --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exact", "random", "outcome"])
def test_knowledge_scores_perfectly_and_the_lack_of_it_does_not(name: str, truth: CreditTruth, world: Any) -> None:
    got = found(name, truth, world)
    if name == "exact":
        assert [got[n] for n in ("auc_inside", "auc_harm", "place1", "place3", "share")] == [1] * 5
        return
    assert got["auc_inside"] == pytest.approx(0.5, abs=1e-9 if name == "outcome" else 0.15)
    assert got["place1"] < 0.3
    # The outcome knows which completions are wrong, and no more.
    assert (got["auc_harm"] > 0.65) == (name == "outcome")


def test_the_outcome_is_the_groups_advantage(truth: CreditTruth, world: Any) -> None:
    batch = truth.batch
    credit = SOURCES["outcome"].build(Bench(world))(batch)
    rewards = (batch.segments.sum(truth.advantages) == 0).float()
    for g in range(batch.n_prompts):
        mine = rewards[batch.group == g]
        got = batch.segments.mean(credit)[batch.group == g]
        assert torch.allclose(got, (mine - mine.mean()) / (mine.std() + 1e-6), atol=1e-5)


def test_thr_points_at_the_first_wrong_token_and_the_outcome_alone_does_not(truth: CreditTruth, world: Any) -> None:
    thr, changed = (found(name, truth, world) for name in ("thr", "thr_advantage"))
    assert thr["auc_inside"] > 0.6
    assert changed["auc_inside"] > 0.55
    assert thr["place1"] > 1.5 * thr["place1_chance"]


def test_steps_are_asked_as_training_asks_them(truth: CreditTruth, world: Any) -> None:
    """Window entropies and marks by hand from the model's own entropy; a second call knows nothing of the first."""
    batch = truth.batch
    entropy = score(world.reference, batch, ("entropy",)).entropy
    values = [e.unfold(0, 4, 1).mean(1).tolist() + [0.0] * 3 for e in batch.segments.split(entropy)]
    window = SOURCES["window_entropy"].build(Bench(world))
    expected = -torch.tensor([v for part in values for v in part])
    assert torch.allclose(window(batch), expected, atol=1e-5)
    marks = SOURCES["hwe"].build(Bench(world))
    first = marks(batch)
    assert set(first.tolist()) <= {-1, 0}
    assert torch.equal(first, marks(batch))
    assert float((first * expected).sum()) >= 0


def test_rto_is_the_bounded_log_ratio_of_a_trained_guide(truth: CreditTruth, world: Any) -> None:
    bench = Bench(world, steps=6, question=ON_CHAINS)
    credit = SOURCES["rto"].build(bench)(truth.batch)
    guide, base = (score(m, truth.batch).logps for m in (bench.model("guide"), world.reference))
    assert torch.allclose(credit, 0.05 * (guide - base).clamp(-1, 1), atol=1e-5)
    assert bench.seconds["guide"] > 0


def test_gae_learns_outcomes(truth: CreditTruth, world: Any) -> None:
    bench = Bench(world, steps=40, question=ON_CHAINS, generations=4)
    batch, critic = truth.batch, bench.model("critic")
    gae = {"name": "gae", "lam": 1.0, "use_values": False}
    returns = OnlineCredit(world, lambda: [gae], lambda rollout, steps: rollout.quantity("returns"))(batch)
    assert set(returns.tolist()) == {0, 1}
    values = critic.values(batch)
    # A fresh head knows nothing; this one knows how often chains are right, and a little about which.
    assert float(values.mean()) == pytest.approx(float(returns.mean()), abs=0.2)
    assert torch.corrcoef(torch.stack([values, returns]))[0, 1] > 0.05
    credit = SOURCES["gae"].build(bench)(batch)
    raw = OnlineCredit(world, lambda: [{"name": "gae", "lam": 1.0, "whiten": False}], advantages, critic=critic)(batch)
    assert torch.allclose(raw, returns - values, atol=1e-5)
    assert (float(credit.mean()), float(credit.std())) == (pytest.approx(0, abs=1e-4), pytest.approx(1, abs=0.01))


def test_r3_finds_what_depends_on_the_reasoning(revision: Any, references: CreditTruth) -> None:
    batch = references.batch
    credit = SOURCES["r3"].build(Bench(revision, question=ON_REFERENCES))(batch)
    logps = score(revision.reference, batch).logps
    sigma = variability(logps, batch.segments, batch.group)
    assert torch.allclose(credit, r3_weights(sigma, batch.segments), atol=1e-5)
    r3, chance = (found(name, references, revision, ON_REFERENCES) for name in ("r3", "random"))
    assert r3["auc"] > 0.75
    assert r3["share"] > 2 * r3["place1_chance"]
    assert chance["auc"] == pytest.approx(0.5, abs=0.06)
    exact = found("exact", references, revision, ON_REFERENCES)
    assert (exact["auc"], exact["place3"]) == (1, 1)
    variance = found("r3_variance", references, revision, ON_REFERENCES)
    assert variance["share"] > r3["share"]


# -- command --------------------------------------------------------------------------------------------


def test_what_cannot_be_judged_is_refused_or_left_out_with_its_reason(world: Any, revision: Any) -> None:
    with pytest.raises(RecipeError, match=r"'r3' cannot be judged in world 'arithmetic': it needs a reference answer"):
        chosen_sources(["r3"], world)
    with pytest.raises(RecipeError, match=r"'thr' cannot be judged in world 'stories': it needs groups"):
        bench_credit("world://stories?size=one-sentence", sources=["thr"], console=Console(quiet=True))
    with pytest.raises(RecipeError, match="'guide' cannot be judged in world 'library': it trains a causal language"):
        chosen_sources(["guide"], load_world("world://library"))
    with pytest.raises(RecipeError, match="did you mean 'thr'"):
        chosen_sources(["thrr"], world)
    with pytest.raises(RecipeError, match="generations must be at least 2"):
        bench_credit(ARITHMETIC, generations=1, console=Console(quiet=True))
    names = {s.name for s in chosen_sources(None, world)}
    assert {"outcome", "thr", "rto", "gae", "guide", "qrm"} <= names
    assert not {"r3", "worth", "contrastive"} & names
    reasons = {(e["source"], e["question"]): e["reason"] for e in left_out(revision, list(SOURCES.values()))}
    assert "'contrastive_templates'" in reasons["contrastive", "chain"]
    assert "graded chains" in reasons["thr", "reference"]
    assert ("r3", "reference") not in reasons
    assert all(source.name in SOURCES for source in ONLINE)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("online")
    sources = ["exact", "outcome", "thr", "surprise", "r3"]
    console = Console(quiet=True)
    return folder, bench_credit(
        REVISION, sources=sources, seeds=2, prompts=6, generations=4, output=folder, console=console
    )


def test_both_questions_have_tables_and_are_not_asked_twice(
    result: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, first = result
    asked = {q: [e["source"] for e in first["sources"] if e["question"] == q] for q in ("chain", "reference")}
    assert asked["chain"][0] == asked["reference"][0] == "exact"
    assert set(asked["chain"]) == {"exact", "outcome", "thr", "surprise"}
    assert set(asked["reference"]) == {"exact", "surprise", "r3"}
    assert {(e["source"], e["question"]) for e in first["left_out"]} == {
        ("r3", "chain"),
        ("outcome", "reference"),
        ("thr", "reference"),
    }
    page = (folder / "credit.html").read_text()
    for words in ("first wrong token found", "depend on the reasoning", "Left out: r3 (it needs a reference answer"):
        assert words in page
    assert page.count('data-name="thr"') == 2 * 4
    tables = (folder / "credit.md").read_text()
    assert "AUC inside" in tables
    monkeypatch.setattr("tokengrain.bench.credit.run_unit", None)  # nothing is left to run
    console = Console(quiet=True)
    again = bench_credit(
        REVISION,
        sources=["exact", "outcome", "thr", "surprise", "r3"],
        seeds=2,
        prompts=6,
        generations=4,
        output=folder,
        console=console,
    )
    assert again["runs"] == first["runs"]
    with pytest.raises(TypeError):  # other groups are other runs
        bench_credit(REVISION, sources=["exact"], seeds=2, prompts=6, generations=5, output=folder, console=console)


def test_command_line(tmp_path: Path) -> None:
    arguments = ["credit", "--world", ARITHMETIC, "--seeds", "1", "--prompts", "6", "--generations", "4"]
    arguments += ["--source", "thr", "--source", "random", "--output", str(tmp_path)]
    shown = CliRunner().invoke(bench_app, arguments)
    assert shown.exit_code == 0, shown.output
    for word in ("AUC inside", "top-3", "share", "thr", "random"):
        assert word in shown.output
    as_json = json.loads(CliRunner().invoke(bench_app, [*arguments, "--json"]).stdout)
    assert {e["question"] for e in as_json["sources"]} == {"chain"}
    assert as_json["generations"] == 4
