"""The world `revision`: references, which of their tokens depend on the reasoning, and DRO's batch."""

import random
from dataclasses import replace

import pytest
import torch

from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.errors import DataError, RecipeError
from tokengrain.evaluation.credit import auc
from tokengrain.methods.dro import R3, variability
from tokengrain.rollout.local import HFGenerate
from tokengrain.rollout.sampler import encode_prompts
from tokengrain.scoring.score import score
from tokengrain.worlds import load_world
from tokengrain.worlds.base_models import small_llama
from tokengrain.worlds.chains import parse_prompt
from tokengrain.worlds.revision import WORDS, write_reference

PROBLEM = parse_prompt("47a+8b-3:")


@pytest.fixture(scope="module")
def world():
    return load_world("world://revision?size=small&filler=3")


@pytest.fixture(scope="module")
def rollouts(world):
    """Whole completions of the base model: chain, `>`, answer."""
    items = encode_prompts(world.prompts("eval", 16), world.tokenizer)
    return HFGenerate(world.reference).sample(items, n=8, sampling=world.sampling(0, whole=True))


@pytest.fixture(scope="module")
def scored(world, rollouts):
    """The references behind the chains, where there is a chain `[C]`, log-probabilities `[N]`, right chains `[C]`."""
    batch, usable = world.with_references(rollouts.to_batch())
    with torch.no_grad():
        logps = score(world.reference, batch).logps
    prompts = [rollouts.prompts[index].raw["prompt"] for index in rollouts.group]
    good = world.reward(prompts, rollouts.texts(world.tokenizer), [c.ids for c in rollouts.completions])
    return batch, usable, logps, torch.tensor(good).bool()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("world://revision?filler=17", "filler is 17; expected 0 to 16"),
        ("world://revision?style=0.5", "style is 0.5"),
        ("world://revision?totals=some", "totals is 'some'; expected all or last"),
        ("world://revision?levels=9", "world revision: levels"),
        ("world://revision?fillers=2", "did you mean 'filler'"),
    ],
)
def test_bad_addresses(uri, message):
    with pytest.raises(RecipeError, match=message):
        load_world(uri)


def test_reference_restates_the_problem_among_filler():
    found = write_reference(PROBLEM, PROBLEM.totals, 2, random.Random(0))
    words = [[w for w in pair if w in found.text] for pair in WORDS[:2]]
    assert all(words)
    plain = found.text
    for pair in WORDS:
        for word in pair:
            plain = plain.replace(word, "_")
    assert plain == " start:47;__,a+8:55;__,b-3:52; end:52"
    of_reasoning = [t for t, role in zip(found.tokens, found.roles) if role == "reasoning"]
    assert of_reasoning == ["5", "5", "5", "2", "5", "2"]
    assert sum(role == "style" for role in found.roles) == 4
    assert len(found.roles) == len(found.tokens)
    short = write_reference(PROBLEM, PROBLEM.totals, 0, random.Random(0), last_only=True)
    assert short.text == " start:47;,a+8;,b-3; end:52"
    assert short.roles.count("reasoning") == 2


def test_words_lean_with_the_separators():
    rng = random.Random(0)

    def share(separators):
        made = [write_reference(PROBLEM, PROBLEM.totals, 4, rng, separators, 0.3).tokens for _ in range(300)]
        firsts = {pair[0] for pair in WORDS}
        return sum(t in firsts for tokens in made for t in tokens) / (300 * 8)

    assert share(";;") == pytest.approx(0.8, abs=0.04)
    assert share(",,") == pytest.approx(0.2, abs=0.04)
    assert share(";,") == pytest.approx(0.5, abs=0.04)
    assert share(None) == pytest.approx(0.5, abs=0.04)


def test_rows_have_one_reference_each_and_it_is_right(world):
    rows = world.prompts("eval", 20)
    assert rows == world.prompts("eval", 20)
    for row in rows:
        totals = [f"{t:02d}" for t in parse_prompt(row["prompt"]).totals]
        ids, roles = world.reference_ids(row["reference"]), world.write_reference(row["prompt"]).roles
        tokens = [world.vocabulary[i] for i in ids]
        assert len(ids) == len(roles)
        digits = "".join(t for t, role in zip(tokens, roles) if role == "reasoning")
        assert digits == "".join([*totals, totals[-1]])
        assert world.tokenizer(row["reference"], add_special_tokens=False)["input_ids"] == ids[:-1]
        assert world.tokenizer.decode(ids, skip_special_tokens=True) == row["reference"]


def test_true_reward_looks_at_the_chain_only(world):
    texts = ["a+855;b-352,> start:47; end:99", "a+855;b-353,> end:52", "a+855;b-352,", "a+855;b-352>"]
    assert world.reward([PROBLEM.text] * 4, texts) == [1, 0, 0, 0]
    found = world.audit(PROBLEM.text, world.encode(texts[1]))
    assert (found.index, found.kind) == (10, "sum")
    assert world.audit(PROBLEM.text, world.encode(texts[3])).kind == "format"


# -- appending ------------------------------------------------------------------------------------------


def test_references_take_the_answers_place(world):
    m, a, b = world.marker, world.encode("1+2"), world.encode(" end")
    batch = TokenBatch.from_samples(
        [
            Sample([1], [Completion([5, m, 6, 7]), Completion([5, 5])], row="p", raw={"reference": "1+2"}),
            Sample([1, 1], [Completion([m]), Completion([4, m, m])], row="q", raw={"reference": " end"}),
        ]
    )
    found, usable = world.with_references(batch)
    end = world.eos
    expected = [[5, m, *a, end], [5, 5, *a, end], [m, *b, end], [4, m, *b, end]]
    assert [found.completion(c).tolist() for c in range(4)] == expected
    assert found.labels.tolist() == [*a, end, *a, end, *b, end, *b, end]
    assert usable.tolist() == [True, False, True, True]
    assert (found.rows, found.raw) == (("p", "q"), batch.raw)
    assert torch.equal(found.prompt_ids, batch.prompt_ids)


def test_rows_without_references_are_an_error(world, rollouts):
    batch = rollouts.to_batch()
    with pytest.raises(DataError, match="no reference"):
        world.with_references(replace(batch, raw=()))


def test_only_references_count(world, rollouts, scored):
    batch, usable, logps, _ = scored
    rows = {row["id"]: row for row in world.prompts("eval", 16)}
    expected = [i for p, group in rollouts for _ in group for i in world.reference_ids(rows[p.row]["reference"])]
    assert batch.labels.tolist() == expected
    assert len(logps) == len(expected)
    assert usable.float().mean() > 0.95


@pytest.mark.parametrize("options", ["", "&levels=3&filler=16", "&totals=last&filler=12"])
def test_there_are_positions_for_the_reference_behind_the_longest_chain(options):
    """No model is trained: the probe has the world's positions and as few weights as can be."""
    world = load_world(f"world://revision?size=small{options}")
    tiny = replace(world.warm_start, hidden_size=8, layers=1, heads=1, mlp_size=8)
    model = small_llama(tiny, vocabulary=len(world.vocabulary), positions=tiny.positions, tied=False)
    longest = max(world.prompts("eval", 60), key=lambda row: len(row["prompt"]))
    prompt = world.prompt_ids(longest["prompt"])
    chain = [*[5] * (world.max_new_tokens - 1), world.marker]
    batch = TokenBatch.from_samples([Sample(prompt, [Completion(chain)], row="p", raw=longest)])
    appended, _ = world.with_references(batch)
    length = len(prompt) + len(chain) + len(world.reference_ids(longest["reference"]))
    assert length <= world.tokenizer.model_max_length == model.config.max_position_embeddings
    assert bool(score(model, appended).logps.isfinite().all())


# -- the base model -------------------------------------------------------------------------------------


def test_reasoning_decides_how_likely_the_totals_are(world, scored):
    batch, _, logps, good = scored
    reasoning = world.reasoning_tokens(batch)
    of_good = batch.segments.broadcast(good)
    assert 0.1 < float(good.float().mean()) < 0.9
    assert logps[reasoning & of_good].mean() > logps[reasoning & ~of_good].mean() + 1
    assert abs(logps[~reasoning & of_good].mean() - logps[~reasoning & ~of_good].mean()) < 0.3


def test_deviation_over_chains_finds_the_tokens_that_depend_on_them(world, scored):
    batch, usable, logps, good = scored
    reasoning = world.reasoning_tokens(batch)
    sigma = variability(logps, batch.segments, batch.group, usable=usable)
    assert auc(sigma, reasoning) > 0.75
    assert sigma[reasoning].mean() > 2 * sigma[~reasoning].mean()
    rewards = R3(tokenizer=None).reflect(logps, batch.segments, batch.group, usable=usable).rewards
    ranked = [
        auc(rewards[here], good[here])
        for g in range(batch.n_prompts)
        if 0 < int(good[here := batch.group == g].sum()) < int(here.sum())
    ]
    assert sum(ranked) / len(ranked) > 0.75


def test_evaluation_and_pairs(world):
    found = world.evaluate(world.reference, k=4, prompts=8)
    assert 0.1 < found["accuracy"] < 0.9
    assert found["length"] < 25  # samples end with `>`
    row = world.pairs(n=1)[0]
    assert world.reward([row["prompt"]] * 2, [row["chosen"], row["rejected"]]) == [1, 0]
    assert " end:" in row["chosen"]
    batch, truth, _ = world.credit_truth(4)
    assert batch.segments.sum(truth).tolist() == [0, -1] * 4
