"""The world `arithmetic`: problems, chains, audit against reward, base model, pairs, credit, evaluation."""

import itertools
import json
import random
from dataclasses import replace

import pytest
import torch

from tokengrain.bench.questions import measure
from tokengrain.errors import DataError, RecipeError, RolloutError
from tokengrain.method import make_credit
from tokengrain.rewards.suite import RewardSuite
from tokengrain.rollout.local import HFGenerate
from tokengrain.rollout.sampler import SampledCompletion, encode_prompts
from tokengrain.worlds import load_world
from tokengrain.worlds.arithmetic import SMALL, WarmStart, parse_levels, warm_start
from tokengrain.worlds.base_models import EOS
from tokengrain.worlds.chains import (
    CHECK,
    SLIP,
    SYMBOLS,
    Problem,
    audit,
    correct,
    is_correct,
    make_problem,
    misconceptions,
    parse_prompt,
    problem_stream,
    shifted,
    stated_answer,
    write_chain,
)

SMALL_WORLD = "world://arithmetic?size=small"
PROBLEM = parse_prompt("47a+8b-3c+9:")  # 55, 52, 61


@pytest.fixture(scope="module")
def world():
    """The small world; its base model is trained once per session, into the session's cache."""
    found = load_world(SMALL_WORLD)
    found.base_model()
    return found


@pytest.fixture(scope="module")
def found(world):
    return world.evaluate(world.reference, k=8, prompts=16)


# -- address, problems, tokens --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("world://arithmetics", "did you mean 'arithmetic'"),
        ("world://arithmetic?level=1", "unknown option 'level'; did you mean 'levels'"),
        ("world://arithmetic?levels=0-3", "levels from 1 to 7"),
        ("world://arithmetic?levels=3-8", "levels from 1 to 7"),
        ("world://arithmetic?levels=hard", "expected levels such as 1-6"),
        ("world://arithmetic?size=huge", "size is 'huge'; expected full or small"),
        ("world://arithmetic?prompts=0", "prompts is 0; expected at least 1"),
        ("world://arithmetic?seed=x", "seed is 'x'; expected int"),
    ],
)
def test_bad_addresses(uri, message):
    with pytest.raises(RecipeError, match=message):
        load_world(uri)


def test_levels_and_options():
    assert parse_levels("1,4-6") == (1, 4, 5, 6)
    full, hard = load_world("world://arithmetic"), load_world("world://arithmetic?levels=3-7&prompts=10")
    assert full.levels == full.trained_levels == (1, 2, 3, 4, 5, 6)
    assert (len(full.prompts()), len(full.prompts("eval"))) == (240, 180)
    assert (hard.levels, hard.trained_levels[-1], len(hard.prompts())) == ((3, 4, 5, 6, 7), 7, 10)
    assert len({w.fingerprint for w in (full, hard, load_world(SMALL_WORLD))}) == 3


@pytest.mark.parametrize("level", [1, 3, 6, 7])
def test_problems_have_the_steps_of_their_level(level):
    rng = random.Random(level)
    for _ in range(50):
        problem = make_problem(level, rng)
        assert problem.level == level
        assert len(problem.steps) == level + 1
        totals = [problem.start]
        for operator, operand in problem.steps:
            totals.append(totals[-1] + operand if operator == "+" else totals[-1] - operand)
        assert problem.totals == tuple(totals[1:])
        assert 0 <= min(totals) <= max(totals) <= 99
        assert parse_prompt(problem.text) == problem


def test_splits_share_no_prompt_and_seeds_change_training_only():
    one, other = load_world(SMALL_WORLD), load_world(SMALL_WORLD + "&seed=1")
    train, held_out = one.prompts(), one.prompts("eval")
    assert len({r["prompt"] for r in train}) == len(train) == 80
    assert len({r["id"] for r in train}) == 80
    assert not {r["prompt"] for w in (one, other) for r in w.prompts(n=300)} & {r["prompt"] for r in held_out}
    assert other.prompts("eval") == held_out
    assert other.prompts() != train
    assert one.prompts(n=7) == train[:7]
    assert set(train[0]) == {"prompt", "answer", "level", "id"}
    assert [r["level"] for r in train[:4]] == [1, 2, 1, 2]
    with pytest.raises(RecipeError, match="split is 'test'"):
        one.prompts("test")


def test_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    world = load_world("world://arithmetic")
    tokenizer, text = world.tokenizer, "a+855;b-352?54,>54"
    assert len(tokenizer) == len(SYMBOLS) == 28
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == world.encode(text)
    assert tokenizer("47a+8:")["input_ids"] == world.prompt_ids("47a+8:")
    assert tokenizer.decode(world.prompt_ids(text), skip_special_tokens=True) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (world.eos, 0)
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]
    with pytest.raises(DataError, match="not a token"):
        world.encode("x")


@pytest.mark.parametrize("text", ["47a+8b-3", "47b+8:", "47a+8a-3:", "4a+8:", "47a+0:", "write:", ""])
def test_foreign_prompts_are_errors(text):
    with pytest.raises(DataError, match="not a prompt of world arithmetic"):
        parse_prompt(text)


# -- chains ---------------------------------------------------------------------------------------------


def test_misconceptions_are_persistent_and_show_at_their_rates():
    beliefs = misconceptions()
    assert len(beliefs) == 90
    assert all(0.15 <= b.rate <= 0.6 for b in beliefs.values())
    belief = beliefs["+", 7, 8]
    problem, rng = Problem(47, (("+", 8),)), random.Random(0)
    chains = [write_chain(problem, rng) for _ in range(4000)]
    stated = [int(c.text[3:5]) for c in chains]
    wrong = [s for s in stated if s != 55]
    expected = belief.rate + SLIP * (1 - belief.rate)
    assert len(wrong) / 4000 == pytest.approx(expected, abs=0.03)
    assert wrong.count(shifted(55, belief.digit, belief.offset)) / len(wrong) > 0.9
    assert sum("?" in c.text for c in chains) / 4000 == pytest.approx(CHECK, abs=0.02)
    assert sum(c.separators == ";" for c in chains) / 4000 == pytest.approx(0.5, abs=0.03)
    easy = [write_chain(Problem(41, (("+", 8),)), rng).totals == (49,) for _ in range(2000)]
    assert sum(easy) / 2000 == pytest.approx(1 - SLIP, abs=0.01)


def test_a_chain_goes_on_from_its_own_totals():
    rng = random.Random(1)
    for problem in itertools.islice(problem_stream((3,), rng, held_out=False), 50):
        chain = write_chain(problem, rng, {})
        before = (problem.start, *chain.totals)
        follow = [(b + d if op == "+" else b - d) % 100 for (op, d), b in zip(problem.steps, before)]
        slipped = [a != b for a, b in zip(follow, chain.totals)]
        assert sum(slipped) <= 2
        assert (chain.totals == problem.totals) or any(slipped)


# -- audit and reward -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chain", "index", "kind"),
    [
        ("a+855;b-352,c+961;>61.", None, None),
        ("a+865?55;b-352,c+961;>61.", None, None),  # corrected
        ("a+865;b-362,c+961;>61.", None, None),  # made up for
        ("a+865;b-362,c+971;>71.", 3, "sum"),
        ("a+854;b-351,c+960;>60.", 4, "sum"),
        ("a+865?65;b-362,c+971;>71.", 6, "sum"),  # the check is in force
        ("a+855?65;b-362,c+971;>71.", 6, "sum"),
        ("a+865?55;b-353,c+962;>62.", 13, "sum"),  # the first error was corrected
        ("a+865;b-352,c+962;>62.", 16, "sum"),  # the first error was made up for
        ("a+653;b-350,c+959;>59.", 2, "copy"),
        ("a+653?55;b-352,c+962;>62.", 19, "sum"),  # a wrong operand that did no harm
        ("a+855;c+964,b-361;>61.", None, None),  # in another order, and right in the end
        ("a+855;c+964,b-360;>60.", 6, "copy"),
        ("a+855;b-352,c+961;>51.", 19, "answer"),
        ("a+855;b-352,c+961;>6.", 20, "format"),
        ("a+855;b-352,c+961;>5.", 19, "answer"),
        ("a+855;b-352,>52.", 12, "format"),
        ("a+855;b-352,c+961;d+162;>62.", 18, "format"),
        ("a+855;b-352,c+961;>61;.", 21, "format"),
        ("a+855;b-352.", 11, "format"),
        ("a+865;b-362.", 3, "sum"),
        ("a+855b-352,c+961;>62.", 5, "format"),
        ("a+855;b-352,c+961;>61", 20, "truncation"),
        ("a+855;b-352,c+9", 14, "truncation"),
        ("a+855;b-352,c+7", 14, "copy"),
        ("a+855?55?55?55", 13, "truncation"),
        ("", None, "truncation"),
        (".", 0, "format"),
    ],
)
def test_the_culprit(chain, index, kind):
    tokens = [EOS if c == "." else c for c in chain]
    found = audit(PROBLEM, tokens)
    assert (found.index, found.kind) == (index, kind)
    assert found.correct == is_correct(PROBLEM, tokens) == (kind is None)


def mutated(tokens, rng):
    """A chain that may be cut short, with up to three tokens replaced, dropped or put in."""
    tokens = list(tokens)[: rng.choice((None, None, None, rng.randint(1, len(tokens))))]
    for _ in range(rng.randint(0, 3)):
        at, how = rng.randrange(len(tokens)), rng.randrange(3)
        tokens[at : at + (how > 0)] = [] if how == 1 else [rng.choice(SYMBOLS)]
        if not tokens:
            break
    return tokens


@pytest.mark.parametrize("ending", ["answer", "marker"])
def test_audit_and_reward_agree_on_every_chain(ending):
    rng = random.Random(0)
    seen = set()
    for problem in itertools.islice(problem_stream((1, 2, 4), rng, held_out=False), 1500):
        chain = write_chain(problem, rng)
        tokens = mutated([*chain.text, ">", *f"{chain.totals[-1]:02d}", EOS], rng)
        found = audit(problem, tokens, ending)
        ids = [SYMBOLS.index(t) for t in tokens]
        assert [float(found.correct)] == correct([problem.text], [""], [ids], ending=ending)
        assert (found.index is None) == (found.correct or not tokens)
        assert (found.kind is None) == found.correct
        assert found.index is None or 0 <= found.index < len(tokens)
        seen.add(found.kind)
    assert seen == {None, "sum", "copy", "format", "truncation"} | ({"answer"} if ending == "answer" else set())


def test_audit_finds_the_one_error_that_was_planted():
    rng = random.Random(2)
    for problem in itertools.islice(problem_stream((2, 5), rng, held_out=False), 300):
        step, digit = rng.randrange(len(problem.steps)), rng.randrange(2)
        total, text = problem.start, ""
        for i, (operator, operand) in enumerate(problem.steps):
            total = (total + operand if operator == "+" else total - operand) % 100
            if i == step:
                total = shifted(total, digit, rng.randint(1, 9))
                planted = len(text) + 3 + digit
            text += f"{'abcdefgh'[i]}{operator}{operand}{total:02d};"
        found = audit(problem, [*text, ">", *f"{total:02d}", EOS])
        assert (found.correct, found.index, found.kind) == (False, planted, "sum")


def test_rewards_from_ids_and_from_texts():
    world = load_world("world://arithmetic")
    texts = ["a+855;b-352,c+961;>61", "a+855;b-352,c+961;>62", "nothing"]
    prompts = [PROBLEM.text] * 3
    assert correct(prompts, texts) == world.reward(prompts, texts, level=[3] * 3) == [1, 0, 0]
    assert correct(prompts, texts, truncated=[True, False, False]) == [0, 0, 0]
    padded = [*world.encode("a+855;b-352,c+961;>6"), 0, *world.encode("1"), world.eos]
    assert correct(prompts[:1], texts[:1], [padded]) == [0]  # the text does not show the <pad>


# -- base model -----------------------------------------------------------------------------------------


def test_warm_start_is_deterministic_and_leaves_torch_alone():
    world, settings = load_world(SMALL_WORLD), WarmStart(hidden_size=16, layers=1, mlp_size=16, steps=3, batch_size=4)
    models = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        state, rng = torch.get_rng_state(), random.Random(0)
        model, report = warm_start(settings, 28, lambda n, rng=rng: world._examples(n, rng))
        assert torch.equal(state, torch.get_rng_state())
        models.append(model)
    assert report["cross_entropy"] > 0
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters()))


def test_base_model_is_cached_whole(world):
    from transformers import AutoTokenizer

    folder = world.base_model()
    report = json.loads((folder / "pretraining.json").read_text())
    assert (report["steps"], report["threads"]) == (SMALL.steps, 1)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert load_world(SMALL_WORLD + "&seed=4").base_model() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == world.tokenizer.get_vocab()


@pytest.mark.slow
def test_full_base_model_has_the_pass_rates_of_the_design():
    world = load_world("world://arithmetic")
    found = world.evaluate(world.reference)
    for level, rate in enumerate((0.91, 0.55, 0.33, 0.17, 0.16, 0.08), 1):
        assert found[f"accuracy_level_{level}"] == pytest.approx(rate, abs=0.1)


# -- pairs and credit -----------------------------------------------------------------------------------


def test_pairs_are_right_against_wrong(world):
    rows = world.pairs(n=24)
    assert len(rows) == len({r["id"] for r in rows}) == 24
    for row in rows:
        prompt = [row["prompt"]]
        assert world.reward(prompt, [row["chosen"]]) == [row["chosen_reward"]] == [1]
        assert world.reward(prompt, [row["rejected"]]) == [row["rejected_reward"]] == [0]
    assert rows == world.pairs(n=24)
    held_out = world.pairs("eval", n=8)
    assert all(parse_prompt(r["prompt"]).held_out for r in held_out)
    assert not any(parse_prompt(r["prompt"]).held_out for r in rows)
    with pytest.raises(RecipeError, match="slope must be None"):
        world.pairs(slope=1.0)


def test_a_completion_without_text_is_in_no_pair(world, monkeypatch):
    """A model may end at once; the row would be refused when it is read."""
    sample = HFGenerate.sample

    def with_an_empty_one(self, prompts, **kwargs):
        found = sample(self, prompts, **kwargs)
        empty = SampledCompletion([world.eos], None, None, "stop")
        return replace(found, groups=tuple((empty, *group) for group in found.groups))

    monkeypatch.setattr(HFGenerate, "sample", with_an_empty_one)
    assert all(row["chosen"] and row["rejected"] for row in world.pairs(n=24, seed=77))


def test_credit_truth_marks_one_token_of_each_wrong_chain(world):
    batch, truth, decided = world.credit_truth(20)
    per_chain = batch.segments.sum(truth)
    assert per_chain.tolist() == [0, -1] * 20
    assert decided[truth < 0].all()
    assert 0.2 < float(decided.float().mean()) < 0.6
    symbols = [SYMBOLS[i] for i in batch.labels.tolist()]
    assert not {s for s, d, t in zip(symbols, decided, truth) if d and t == 0} & {">", EOS, "a", "b", "+", "-"}
    assert torch.equal(world.advantages(batch.select([3])), truth[batch.segments.ids // 2 == 3])


def test_credit_recovery_knows_good_from_bad(world):
    exact = world.credit_recovery(world.advantages)
    assert (exact["spearman"], exact["auc"]) == (pytest.approx(1), 1)
    assert world.credit_recovery(lambda batch: -world.advantages(batch))["auc"] == 0
    assert world.credit_recovery(lambda batch: torch.zeros(batch.segments.total))["auc"] == 0.5
    assert world.credit_recovery(make_credit("surprise", model=world.reference))["auc"] > 0.7


def test_what_bench_credit_measures(world):
    scores, _ = measure(make_credit("surprise", model=world.reference), world.credit_truth(20))
    assert scores["auc_harm"] > 0.7
    assert scores["top1"] > 2 * scores["top1_chance"]
    assert (scores["completions"], scores["harmed"]) == (40, 20)


# -- evaluation -----------------------------------------------------------------------------------------


def test_the_small_base_model_is_sometimes_right(found):
    assert 0.4 < found["accuracy_level_1"] < 0.99
    assert 0.1 < found["accuracy_level_2"] < found["accuracy_level_1"]
    assert found["utilisation"] > 0.6
    assert found["well_formed"] > 0.9
    assert found["culprit_sum"] > 0.8


def test_evaluation_fits_together(found):
    assert found["pass@1"] == pytest.approx(found["accuracy"]) == found["avg@8"]
    assert found["accuracy"] == pytest.approx((found["accuracy_level_1"] + found["accuracy_level_2"]) / 2)
    passes = [found[f"pass@{k}"] for k in (1, 2, 4, 8)]
    assert passes == sorted(passes)
    assert all(found[f"{m}_low"] <= found[m] <= found[f"{m}_high"] for m in ("accuracy", "pass@8", "maj@8"))
    assert sum(found[f"culprit_{k}"] for k in ("sum", "copy", "format", "answer", "truncation")) == pytest.approx(1)
    assert found["length_correct"] < found["length"] < found["length_wrong"]
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("ending", "chain", "answer"),
    [
        ("answer", "a+855;>55.", "55"),
        ("answer", "a+855;>55", None),
        ("answer", "a+855;>5.", None),
        ("answer", "a+855;55.", None),
        ("answer", ">5;5.", None),
        ("marker", "a+855;> end:12.", "55"),
        ("marker", "a+865?55,>", "55"),
        ("marker", "a+855>", None),  # the operand and a digit are no total
        ("marker", "5;>", None),
    ],
)
def test_the_answer_that_a_completion_gives(ending, chain, answer):
    assert stated_answer([EOS if c == "." else c for c in chain], ending) == answer


def test_evaluation_is_deterministic_and_leaves_everything_as_it_was(world, found):
    state = torch.get_rng_state()
    world.reference.train()
    try:
        assert world.evaluate(world.reference, k=8, prompts=16) == found
        assert world.reference.training
    finally:
        world.reference.eval()
    assert torch.equal(state, torch.get_rng_state())
    assert world.evaluate(world.reference, k=8, prompts=16, seed=1) != found
    with pytest.raises(RolloutError, match="n is 0; expected at least 1 completion per prompt"):
        world.evaluate(world.reference, n=0)


def test_rows_rollouts_and_rewards_work_together(world):
    items = encode_prompts(world.prompts(n=4), world.tokenizer)
    assert [i.ids for i in items] == [world.prompt_ids(r["prompt"]) for r in world.prompts(n=4)]
    rollouts = HFGenerate(world.reference).sample(items, n=4, sampling=world.sampling(0))
    suite = RewardSuite([world.reward], tokenizer=world.tokenizer)
    result = suite.score(rollouts)
    audits = [world.audit(p.raw["prompt"], c.ids).correct for p, group in rollouts for c in group]
    assert result.by_name["reward"].bool().tolist() == audits
    assert torch.equal(suite.score(rollouts.to_batch()).by_name["reward"], result.by_name["reward"])
