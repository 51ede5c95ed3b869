"""The world `stories` as a whole: address, data, credit, base model, evaluation."""

import json
import math

import pytest
import torch

from tests.worlds.tabular import optimal_model
from tokengrain.batch import Completion, Sample, TokenBatch
from tokengrain.errors import RecipeError
from tokengrain.run.build import open_rows
from tokengrain.specs import DataSpec
from tokengrain.worlds import is_world, load_world, stories
from tokengrain.worlds.base_models import ensure_model
from tokengrain.worlds.stories import Pretraining, StoriesWorld, ensure_base_model, pretrain

SLACK = 1.6
"""Factor on 95 % intervals (about 3 standard errors), so that an unlucky seed does not fail a test."""
TINY = "world://stories?size=one-phrase&pairs=60"


@pytest.fixture(scope="module")
def world() -> StoriesWorld:
    return load_world("world://stories")


@pytest.fixture(scope="module")
def tiny() -> StoriesWorld:
    return load_world(TINY)


# -- address --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("world://storys", "unknown world 'storys'; did you mean 'stories'"),
        ("world://stories?regimes=noisy", "unknown option 'regimes'; did you mean 'regime'"),
        ("world://stories?regime=loud", "regime is 'loud'; expected clean or noisy"),
        ("world://stories?pairs=many", "pairs is 'many'; expected int"),
        ("world://stories?pairs=0", "pairs is 0; expected at least 1"),
        ("world://stories?slope=-1", "slope is -1"),
        ("world://stories?slope=nan", "slope is nan; expected at least 0"),
        ("world://stories?slope=inf", "slope is inf; expected at least 0"),
        ("world://library?noise=7", "noise is 7.0; expected a probability"),
        ("world://library?noise=nan", "noise is nan; expected a probability"),
        ("world://stories?seed=1&seed=2", "option 'seed' is given more than once"),
        ("world://stories?noisy", "cannot read options 'noisy'"),
        ("stories", "expected the address of a world"),
    ],
)
def test_bad_addresses(uri, message):
    with pytest.raises(RecipeError, match=message.replace("?", r"\?")):
        load_world(uri)


def test_what_there_is_not_is_refused_by_name(tiny):
    with pytest.raises(RecipeError, match="split is 'val'; expected train or eval"):
        tiny.pairs("val")
    with pytest.raises(RecipeError, match="n is 0; expected at least 1 sample per prompt"):
        tiny.evaluate(tiny.reference, n=0)
    with pytest.raises(RecipeError, match="world stories has no prompts with checkable answers"):
        open_rows(DataSpec(train=TINY), 0, prompts=True)
    for name, value in (("split", "nonsense"), ("columns", {"prompt": "{question}"})):
        with pytest.raises(RecipeError, match=f"data.{name} is .*; expected none beside world://stories"):
            open_rows(DataSpec(train=TINY, **{name: value}), 0)


def test_one_sample_per_prompt_has_intervals_too(tiny):
    found = tiny.evaluate(tiny.reference, n=1, credit=False)
    for name in ("reward", "share", "win_rate"):
        assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"]
    assert found["reward_low"] < found["reward_high"]


def test_options_and_one_object_per_address(world):
    clean = load_world("world://stories?regime=clean&seed=3&pairs=12")
    assert (clean.slope, clean.n_pairs, clean.options.seed) == (1.0, 12, 3)
    assert (world.slope, world.n_pairs) == (0.3, 1000)
    assert load_world("world://stories?pairs=12&seed=3&regime=clean") is clean
    assert clean.fingerprint != world.fingerprint
    assert is_world("world://stories")
    assert not is_world("data.jsonl")


# -- data -----------------------------------------------------------------------------------------------


def test_rows_are_reproducible_and_splits_differ(world):
    state = torch.get_rng_state()
    rows = world.pairs(n=40)
    assert torch.equal(state, torch.get_rng_state())
    assert rows == world.pairs(n=40)
    assert set(rows[0]) == {"prompt", "chosen", "rejected", "id", "chosen_reward", "rejected_reward"}
    assert len({r["id"] for r in rows}) == 40
    assert {r["prompt"] for r in rows} == set(world.prompts)
    texts = {(r["prompt"], r["chosen"], r["rejected"]) for r in rows}
    for other in (world.pairs(n=40, seed=1), world.pairs("eval", n=40)):
        assert not texts & {(r["prompt"], r["chosen"], r["rejected"]) for r in other}


def test_rewards_in_the_rows_are_the_true_ones(world):
    rows = world.pairs(n=30)
    batch = world.token_batch(rows)
    rewards = batch.segments.sum(world.credit("reward")(batch)).tolist()
    assert rewards == [r[k] for r in rows for k in ("chosen_reward", "rejected_reward")]


@pytest.mark.parametrize(("regime", "expected"), [("clean", 0.89), ("noisy", 0.68)])
def test_label_accuracy_of_the_regimes(regime, expected):
    """Share of the pairs that differ whose chosen completion has the higher true reward."""
    rows = load_world(f"world://stories?regime={regime}").pairs(n=4000)
    differing = [r for r in rows if r["chosen_reward"] != r["rejected_reward"]]
    right = sum(r["chosen_reward"] > r["rejected_reward"] for r in differing)
    assert right / len(differing) == pytest.approx(expected, abs=0.025)


# -- credit ---------------------------------------------------------------------------------------------


def test_advantages_telescope_to_reward_minus_value(world):
    rows = world.pairs(n=20)
    batch = world.token_batch(rows)
    values = stories.soft_values(world.grammar, 1.0)
    starts = [world.grammar.parse_prompt(world.grammar.encode(r["prompt"])) for r in rows for _ in range(2)]
    rewards = batch.segments.sum(world.credit("reward")(batch))
    expected = rewards - torch.tensor([float(values[p.table, p.start]) for p in starts])
    torch.testing.assert_close(batch.segments.sum(world.advantages(batch)), expected.float(), atol=1e-4, rtol=0)


def test_credit_of_a_broken_completion_and_of_uncounted_tokens(world):
    grammar = world.grammar
    ids = [*grammar.encode("the sailor kind . very"), grammar.eos]
    prompt = [grammar.bos, *grammar.encode(world.prompts[0])]
    counted = [True, True, True, False, True, True]
    batch = TokenBatch.from_samples([Sample(prompt, [Completion(ids, counted), Completion(ids)])])
    credit = world.advantages(batch)
    assert credit.shape == (11,)
    assert credit[:5].tolist() == [credit[5 + i] for i in (0, 1, 2, 4, 5)]
    assert credit[7] < 0
    assert credit[8:].tolist() == [0, 0, 0]


def test_kinds_of_credit(world):
    found = {k: world.credit_recovery(world.credit(k)) for k in ("advantage", "reward", "worth")}
    assert found["advantage"]["spearman"] > 0.999
    # Worse than the truth and better than nothing; close to what the prototype measured (.56/.81, .12/.57).
    assert found["reward"]["spearman"] == pytest.approx(0.56, abs=0.05)
    assert found["worth"]["auc"] == pytest.approx(0.57, abs=0.03)
    with pytest.raises(RecipeError, match="credit is 'advantages'; expected one of advantage"):
        world.credit("advantages")


def test_contrastive_templates_make_prompts_of_this_world(world):
    templates = world.contrastive_templates
    for prompt in world.prompts:
        for side in ("better", "worse"):
            filled = templates[side].format(prompt=prompt.removeprefix(templates["drop_prefix"]))
            parsed = world.grammar.parse_prompt(world.tokenizer(filled)["input_ids"])
            assert parsed.text == filled


def test_exact_contrast_of_instructions_recovers_credit(world):
    grammar = world.grammar
    logp = grammar.dense(grammar.edge_logp, -100.0)
    n = grammar.n_places

    def contrast(batch):
        out = []
        for c, g in enumerate(batch.group.tolist()):
            prompt = grammar.parse_prompt(batch.prompt(g).tolist())
            ids = batch.completion(c)
            states = grammar.walk([prompt], ids[None]).states[0]
            out.append(logp[prompt.table + n, states, ids] - logp[prompt.table + 2 * n, states, ids])
        return torch.cat(out)

    assert world.credit_recovery(contrast)["auc"] == pytest.approx(0.84, abs=0.03)


# -- base model -----------------------------------------------------------------------------------------


def test_a_training_that_is_killed_leaves_no_folder(tiny, tmp_path):
    def train(progress):
        assert [path.name for path in tmp_path.iterdir()] == ["model-1.lock"]
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        ensure_model(tmp_path / "model-1", train, tiny.tokenizer, "a world", steps=1)


def test_base_model_is_cached_whole_and_deterministic(tiny, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny.base_model()
    assert json.loads((folder / "pretraining.json").read_text())["kl_per_token"] < 0.5
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert tiny.base_model() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tiny.grammar.token

    monkeypatch.setenv("TOKENGRAIN_CACHE", str(tmp_path))
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = tiny.base_model()
    assert torch.equal(state, torch.get_rng_state())
    assert again != folder
    models = [AutoModelForCausalLM.from_pretrained(f) for f in (folder, again)]
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        assert torch.equal(a, b)


def test_interrupted_training_leaves_nothing(tiny, tmp_path, monkeypatch):
    from tokengrain.worlds import stories

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setenv("TOKENGRAIN_CACHE", str(tmp_path))
    settings = Pretraining(steps=2, pool=64)
    with monkeypatch.context() as patch:
        patch.setattr(stories, "pretrain", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ensure_base_model(tiny.grammar, settings)
    assert [p.name for p in (tmp_path / "worlds").iterdir() if p.suffix != ".lock"] == []
    assert (ensure_base_model(tiny.grammar, settings) / "config.json").exists()


@pytest.mark.slow
def test_full_base_model_is_close_to_the_grammar(world):
    _, report = pretrain(world.grammar, Pretraining())
    assert report["kl_per_token"] < 0.007


# -- evaluation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.3, 1.0, 3.0])
def test_exact_optimum_lies_on_the_frontier(world, beta):
    base = optimal_model(world, math.inf)
    found = world.evaluate(optimal_model(world, beta), n=40, reference=base)
    truth = stories.evaluate_logp(world.grammar, stories.optimal_logp(world.grammar, beta)).at_prompts(world.grammar)
    for name in ("reward", "kl"):
        half = (found[f"{name}_high"] - found[f"{name}_low"]) / 2 * SLACK
        assert found[name] == pytest.approx(truth[name], abs=half)
    assert found["share_low"] < 1 < found["share_high"] + 0.03
    assert found["share"] == pytest.approx(1, abs=0.1)
    assert found["length"] == pytest.approx(truth["length"], abs=1)
    assert found["entropy"] == pytest.approx(truth["entropy"] / truth["length"], abs=0.05)
    assert found["broken"] == 0
    assert found["win_rate"] > 0.6
    assert found["credit_auc"] > 0.98


def test_base_is_the_origin(world):
    base = optimal_model(world, math.inf)
    found = world.evaluate(base, n=40, reference=base)
    assert (found["kl"], found["share"]) == (0, 0)
    for name, truth in (("reward", 0), ("win_rate", 0.5)):
        half = (found[f"{name}_high"] - found[f"{name}_low"]) / 2 * SLACK
        assert found[name] == pytest.approx(truth, abs=half)
    assert found["credit_spearman"] is None
    json.dumps(found, allow_nan=False)


def test_model_evaluation_is_deterministic_and_leaves_everything_as_it_was(tiny):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.base_model())
    model.train()
    state = torch.get_rng_state()
    first = tiny.evaluate(model, n=20)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert first == tiny.evaluate(model, n=20)
    assert first != tiny.evaluate(model, n=20, seed=1)
    assert first["kl"] == pytest.approx(0, abs=1e-6)


def test_sums_over_the_vocabulary_agree_with_the_sampled_values(tiny):
    """Reward and KL of a flattened base model, from sums and from the sampled tokens."""
    from transformers import AutoModelForCausalLM

    from tokengrain.worlds.stories import completion_logps, rollout

    model = AutoModelForCausalLM.from_pretrained(tiny.base_model())
    with torch.no_grad():
        model.model.norm.weight *= 0.8
    found = tiny.evaluate(model, n=400)
    drawn = rollout(model, tiny.grammar, tiny._eval_prompts(400), seed=0)
    index = drawn.ids[..., None]
    reference = completion_logps(tiny.reference, tiny.grammar, drawn.prompts, drawn.ids)
    ratio = (drawn.logps.gather(-1, index) - reference.gather(-1, index)).squeeze(-1) * drawn.alive
    for name, values in (("kl", ratio.sum(1)), ("reward", drawn.true_rewards)):
        assert found[name] == pytest.approx(float(values.mean()), abs=4 * float(values.std()) / len(values) ** 0.5)
    # The cached, step-by-step pass and one pass over the whole text give the same distributions.
    whole = completion_logps(model, tiny.grammar, drawn.prompts, drawn.ids)
    torch.testing.assert_close(whole[drawn.alive], drawn.logps[drawn.alive], atol=1e-4, rtol=1e-4)


def test_peft_model_with_an_untouched_adapter_is_the_base(tiny):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.base_model())
    plain = tiny.evaluate(model, n=10)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert tiny.evaluate(adapted, n=10)["reward"] == pytest.approx(plain["reward"], abs=1e-6)
