"""Credit steps and the critic in the trainer: whole runs of a few steps, and a run that is resumed."""

from __future__ import annotations

import json

import pytest
import torch

from tests.training.online.tiny import END, make_online, make_prompts
from tests.training.ranks import on_ranks
from tests.training.test_trl_oracle import tokenizer
from tests.training.tiny import tiny_llama, weights
from tokengrain.errors import RecipeError, RunError, read_log
from tokengrain.method import make_objective, make_rollout_credit
from tokengrain.rollout.branching import Branching
from tokengrain.rollout.local import HFGenerate
from tokengrain.rollout.sampler import PromptItem
from tokengrain.training.critic import Critic


def right(completion_ids: list[list[int]]) -> list[float]:
    return [float(sum(ids) % 2) for ids in completion_ids]


def last(folder) -> dict:
    """The last logged value of everything."""
    found: dict = {}
    for line in read_log(folder / "log.jsonl"):
        found |= line
    return found


def rto(folder, steps: int = 6, resume: bool = False, beta1: float = 0.1, **settings):
    torch.manual_seed(0)
    policy = tiny_llama()
    trainer = make_online(
        folder,
        model=policy,
        objective=make_objective("ppo"),
        rewards=right,
        credit=[
            {"name": "normalize"},
            make_rollout_credit("rto", model=tiny_llama(seed=5).eval(), beta1=beta1, kl_target=0.01),
            {"name": "gae"},
        ],
        critic=Critic(policy, lr=1e-2, schedule="cosine", warmup_steps=1),
        minibatches=2,
        max_steps=steps,
        max_tokens_per_microbatch=40,
        **settings,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_rto_resumes_exactly_in_the_middle_of_a_rollout(tmp_path):
    whole = rto(tmp_path / "whole")
    rto(tmp_path / "part", save_strategy="steps", save_steps=3)
    (tmp_path / "part" / "checkpoint-6").rename(tmp_path / "later")
    with pytest.raises(RunError, match=r"'beta1': 0\.1"):
        rto(tmp_path / "part", resume=True, beta1=0.2)
    again = rto(tmp_path / "part", resume=True, save_strategy="no")
    for one, other in ((whole.model, again.model), (whole.critic.model, again.critic.model)):
        for name, value in weights(one).items():
            assert torch.equal(weights(other)[name], value), name
    assert [s.state_dict() for s in whole.rollout_credits] == [s.state_dict() for s in again.rollout_credits]
    assert json.loads(json.dumps(whole.rollout_state())) == json.loads(json.dumps(again.rollout_state()))
    assert whole.groups == again.groups
    assert whole.groups.seen > 6
    found = last(tmp_path / "whole")
    assert found["rto/dense"] != 0
    assert found["critic/error"] > 0
    assert "gae/explained_variance" in found


RUNS = {
    "ppo": ("ppo", [{"name": "kl_penalty", "target": 0.02}, {"name": "gae", "lam": 0.9}], True),
    "no critic": ("ppo", [{"name": "gae", "lam": 1, "use_values": False}], False),
    "reinforce": ("reinforce", [{"name": "reinforce", "scaling": "zscore"}], False),
    "dcpo": ("dcpo", ["dcpo"], False),
    "thr": ("grpo", ["thr"], False),
    "nthr": ("gspo", ["nthr"], False),
}


@pytest.mark.parametrize("run", RUNS)
def test_runs(tmp_path, run):
    objective, credit, critic = RUNS[run]
    policy = tiny_llama()
    made = Critic(policy, lr=1e-2) if critic else None
    trainer = make_online(
        tmp_path, model=policy, objective=objective, rewards=right, credit=credit, critic=made, max_steps=2
    )
    before = weights(policy)
    trainer.train()
    assert any(not torch.equal(v, before[n]) for n, v in weights(trainer.model).items())
    found = last(tmp_path)
    prefix = {"no critic": "gae", "ppo": "kl_penalty"}.get(run, run)
    assert any(name.startswith(f"{prefix}/") for name in found), sorted(found)


def test_aepo_weighs_the_kl(tmp_path):
    credit = {"name": "aepo", "triggers": None, "window": 1, "kl": "multiplicative", "kl_target": 1e-4}
    objective = make_objective("grpo", beta=0.05)
    trainer = make_online(tmp_path, objective=objective, rewards=right, credit=credit, max_steps=3)
    trainer.train()
    assert "kl_weights" in trainer.buffer.batch.columns
    weight = trainer.buffer.batch.columns["kl_weights"]
    assert float((weight - 1).abs().max()) > 1e-3
    assert "aepo/hwe" in last(tmp_path)


def test_r3_learns_from_references(tmp_path):
    class Digits:
        """Tokens are numbers; every 5 closes a chain."""

        eos_token_id = END

        def decode(self, ids, **_):
            return "".join("#" if i % 5 == 0 else "x" for i in ids)

        def __call__(self, text, **_):
            return {"input_ids": [5] * len(text)}

    prompts = [PromptItem(p.ids, row=p.row, raw={"reference": [3, 4 + i]}) for i, p in enumerate(make_prompts(10))]
    credit = make_rollout_credit("r3", tokenizer=Digits(), marker="#", end=False, truncated="keep", filter_drop=0.25)
    trainer = make_online(tmp_path, rewards=None, credit=credit, train_dataset=prompts, num_generations=5, max_steps=2)
    trainer.train()
    found = last(tmp_path)
    assert 0 < found["r3/usable"] < 1
    assert found["rollout/prompts_kept"] == 3
    assert found["r3/reward"] < 0


def test_branches_are_trained_on_from_where_they_leave(tmp_path):
    policy = tiny_llama()
    sampler = Branching(HFGenerate(policy), policy, window=1, quantile=0.5, per_prompt=2)
    trainer = make_online(tmp_path, model=policy, sampler=sampler, rewards=right, credit="thr", max_steps=2)
    trainer.train()
    batch = trainer.buffer.batch
    assert batch.n_completions == 4 * (3 + 2)
    assert 0 < int((~batch.counted).sum()) < batch.counted.numel()


def test_what_does_not_fit_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(RecipeError, match="needs values, which a critic gives"):
        make_online(tmp_path, objective="ppo", credit="gae")
    with pytest.raises(RecipeError, match="no rollout credit gives"):
        make_online(tmp_path, objective="ppo", critic=Critic(tiny_llama()))
    with pytest.raises(RecipeError, match="compares completions"):
        make_online(tmp_path, credit="thr", num_generations=1)
    with pytest.raises(RecipeError, match="a critic does not train in fp16"):
        make_online(tmp_path, objective="ppo", credit="gae", critic=Critic(tiny_llama()), fp16=True)


ON_RANKS = {
    "ppo": ("ppo", {}, ["normalize", {"name": "kl_penalty", "target": 0.02, "horizon": 50}, "gae"]),
    "aepo": ("grpo", {"beta": 0.1}, [{"name": "aepo", "triggers": None, "window": 1, "kl": "multiplicative"}, "dcpo"]),
}


def on_rank(folder, objective: str, settings: dict, credit: list):
    policy = tiny_llama(dtype=torch.float64)
    torch.manual_seed(0)
    trainer = make_online(
        folder,
        model=policy,
        objective=make_objective(objective, **settings),
        rewards=right,
        credit=credit,
        critic=Critic(policy, lr=1e-2) if objective == "ppo" else None,
        minibatches=2,
        max_steps=6,
        optim="sgd",
        learning_rate=0.05,
    )
    trainer.train()
    models = {"policy": trainer.model} | ({"critic": trainer.critic.model} if trainer.critic is not None else {})
    found = {(k, n): p.detach().numpy().copy() for k, m in models.items() for n, p in m.named_parameters()}
    return found, trainer.rollout_state()["credit"]


@pytest.mark.parametrize("case", ["ppo", pytest.param("aepo", marks=pytest.mark.slow)])
def test_two_ranks_equal_one(tmp_path, case):
    one = on_rank(tmp_path / "one", *ON_RANKS[case])
    two = on_ranks(2, lambda: on_rank(tmp_path / "two", *ON_RANKS[case]))
    assert two[0][1] == two[1][1]
    for name, value in two[0][0].items():
        assert (value == two[1][0][name]).all(), name
        torch.testing.assert_close(torch.from_numpy(value), torch.from_numpy(one[0][name]), rtol=1e-5, atol=1e-7)
    for name, state in numbers(one[1]).items():
        assert numbers(two[0][1])[name] == pytest.approx(state, rel=1e-6), name


def numbers(state: dict) -> dict:
    """Every number of a state by its path; of DCPO's lists by prompt."""
    flat: dict = {}
    for key, value in state.items():
        if isinstance(value, dict):
            flat |= {f"{key}/{k}": v for k, v in numbers(value).items()}
        elif isinstance(value, list) and key != "prompts":
            flat |= {f"{key}/{p}": v for p, v in zip(state["prompts"], value, strict=True)}
        elif isinstance(value, (int, float)):
            flat[key] = value
    return flat


def test_credit_by_name_gets_the_trainers_tokenizer(tmp_path):
    credit = {"name": "rto", "model": tiny_llama(seed=5).eval(), "variant": "semi"}
    trainer = make_online(tmp_path, rewards=right, credit=[credit], processing_class=tokenizer())
    assert trainer.rollout_credits[0].tokenizer is not None
