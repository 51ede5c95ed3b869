"""What online training does: learning, filters and refills, failing rewards, adapters, evaluation, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.online.tiny import WANTED, make_online, make_prompts, online_config, share_of_token
from tests.training.tiny import VOCABULARY, tiny_llama, weights
from tokengrain.errors import DataError, RecipeError, RunError, read_log
from tokengrain.method import Rollout, Stateless, make_objective, make_rollout_credit
from tokengrain.rewards.suite import RewardError, RewardFailure, RewardFunction, RewardSuite
from tokengrain.rollout.local import HFGenerate
from tokengrain.rollout.sampler import PromptItem
from tokengrain.scoring.reference import AdapterOffReference
from tokengrain.training.rollout import PromptDataset, RolloutScorer
from tokengrain.training.rollout_log import RolloutStats


def wanted(completion_ids: list[list[int]]) -> list[float]:
    return [sum(i == WANTED for i in ids) / len(ids) for ids in completion_ids]


LEARN = {"prompts_per_rollout": 8, "num_generations": 8, "minibatches": 2, "lr_scheduler_type": "constant"}


@pytest.mark.parametrize(
    "objective", ["grpo", *(pytest.param(o, marks=pytest.mark.slow) for o in ("dcpo", "reinforce"))]
)
def test_it_learns(objective: str, tmp_path: Path) -> None:
    bound = make_objective(objective, reduction="mean") if objective == "reinforce" else make_objective(objective)
    trainer = make_online(
        tmp_path,
        rewards=wanted,
        objective=bound,
        eval_dataset=make_prompts(20, seed=5),
        eval_generations=4,
        eval_temperature=1.0,
        max_steps=40,
        learning_rate=1e-2,
        **LEARN,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    means = [e["reward/mean"] for e in read_log(tmp_path / "log.jsonl") if "reward/mean" in e]
    assert len(means) == 20
    assert before["eval_reward"] < 0.1
    assert sum(means[-3:]) / 3 > 0.5
    assert after["eval_reward_low"] > before["eval_reward_high"] + 0.2  # on prompts it has not seen
    assert after["eval_reward_low"] <= after["eval_reward"] <= after["eval_reward_high"]


# ---- Filters ----


def odd_rows(number: list[int], completion_ids: list[list[int]]) -> list[float]:
    """Even rows earn the same for all completions."""
    return [float(sum(ids)) % 7 if n % 2 else 1.0 for n, ids in zip(number, completion_ids, strict=True)]


def test_filtered_prompts_are_replaced(tmp_path: Path) -> None:
    credit = [make_rollout_credit("filter_groups", metric="reward"), "group"]
    trainer = make_online(
        tmp_path,
        rewards=odd_rows,
        credit=credit,
        train_dataset=make_prompts(40),
        prompts_per_rollout=8,
        rollout_epochs=2,
    )
    seen = []
    for _ in range(3):
        batch = trainer.rollout().batch
        seen.append(batch.rows)
        assert len(batch.rows) == 8
        assert all(int(str(row)[1:]) % 2 for row in batch.rows)
        signal = batch.segments.max(batch.columns["advantages"].abs()).view(8, 3)
        assert bool((signal.max(1).values > 0).all())  # every group has something to say
    assert trainer.source.drawn > 24 + 12
    assert trainer._window.means()["rollout/refills"] >= 1
    assert trainer._window.means()["rollout/prompts_kept"] == 8
    assert 0.3 < trainer._window.means()["rollout/informative"] < 0.7  # of everything that was sampled


def test_without_refill_the_rollout_is_smaller(tmp_path: Path) -> None:
    credit = [make_rollout_credit("filter_groups", metric="reward", refill=False), "group"]
    trainer = make_online(
        tmp_path, rewards=odd_rows, credit=credit, prompts_per_rollout=10, minibatches=10, max_steps=5
    )
    trainer.train()
    assert trainer.rollouts == 1  # five odd rows of ten: five minibatches, not ten
    assert trainer.state.global_step == 5


def test_a_bounded_number_of_refills_and_of_empty_rollouts(tmp_path: Path) -> None:
    def always(completion_ids: list[list[int]]) -> list[float]:
        return [1.0] * len(completion_ids)

    trainer = make_online(
        tmp_path, rewards=always, credit=["filter_groups", "group"], max_refills=2, max_empty_rollouts=3
    )
    said = r"in 3 rollouts in a row \(max_empty_rollouts; 36 prompts.* (\d+) of \1 completions were correct, \d+ of \1"
    with pytest.warns(UserWarning, match="to train on in rollout 1:"), pytest.raises(RunError, match=said):
        trainer.train()


def test_rewards_that_differ_and_are_never_correct_are_named(tmp_path: Path) -> None:
    def partial(completion_ids: list[list[int]]) -> list[float]:
        return [(ids[0] % 5) / 10 for ids in completion_ids]

    trainer = make_online(
        tmp_path, rewards=partial, credit=["filter_groups", "group"], max_refills=0, max_empty_rollouts=2
    )
    with pytest.raises(RunError, match=r"no completion was correct \(reward above 0.5\).*metric: reward.*correct_from"):
        trainer.train()


def test_rewards_of_which_none_applies_are_named(tmp_path: Path) -> None:
    none = RewardFunction(lambda completion_ids: [None] * len(completion_ids), name="none", on_none="ignore")
    trainer = make_online(
        tmp_path, rewards=none, credit=["filter_groups", "group"], max_refills=0, max_empty_rollouts=2
    )
    with pytest.raises(RunError, match=r"nothing was left .*no reward applied to any completion"):
        trainer.train()


def test_a_row_is_judged_by_the_reward_that_applies_to_it(tmp_path: Path) -> None:
    """Two tasks with a reward each: neither is filtered out, and where none applies nothing is learnt."""
    items = [replace(item, raw={"task": task}) for item, task in zip(make_prompts(6), ("a", "b", "none") * 2)]

    def reward(name: str) -> RewardFunction:
        def own(completion_ids: list[list[int]], task: list[str]) -> list[float | None]:
            ids = zip(completion_ids, task)
            return [float(len(i) % 2 if len(i) > 1 else i[0] % 2) if t == name else None for i, t in ids]

        return RewardFunction(own, name=name, on_none="ignore")

    trainer = make_online(
        tmp_path,
        rewards=[reward("a"), reward("b")],
        credit=[make_rollout_credit("filter_groups", refill=False), "group"],
        train_dataset=items,
        eval_dataset=items,
        prompts_per_rollout=6,
        num_generations=8,
        eval_generations=2,
        eval_temperature=1.0,
    )
    rollout = trainer._sample(RolloutStats())
    kinds = [rollout.batch.raw[g]["task"] for g in range(rollout.batch.n_prompts)]
    assert set(kinds) == {"a", "b"}
    assert not rollout.correct.isnan().any()
    metrics = trainer.evaluate()
    assert metrics["eval_correct"] == pytest.approx(metrics["eval_reward"])
    assert metrics["eval_pass@1"] == pytest.approx(metrics["eval_correct"])


def test_a_prompt_that_comes_twice_gets_other_completions(tmp_path: Path) -> None:
    trainer = make_online(tmp_path, train_dataset=make_prompts(3), prompts_per_rollout=6, max_new_tokens=8)
    batch = trainer.next_minibatch().batch
    assert len(batch.rows) == 6
    assert len(set(batch.rows)) == 3
    texts = [tuple(batch.completion(c).tolist()) for c in range(batch.n_completions)]
    assert len(set(texts)) == len(texts)


# ---- Rewards ----


def test_a_reward_that_fails(tmp_path: Path) -> None:
    def fails(completion_ids: list[list[int]], number: list[int]) -> list[Any]:
        values = share_of_token(completion_ids)
        return [RewardFailure("no answer") if n == 5 else v for n, v in zip(number, values, strict=True)]

    with pytest.raises(RewardError, match="row p5"):
        make_online(tmp_path / "error", rewards=fails, prompts_per_rollout=10).train()
    skipping = RewardFunction(fails, on_error="skip")
    trainer = make_online(tmp_path / "skip", rewards=[skipping], prompts_per_rollout=10, rollout_epochs=2)
    batch = trainer.next_minibatch().batch
    assert batch.n_prompts == 10
    failed = batch.select([batch.rows.index("p5")])
    assert not bool(failed.columns["advantages"].any())
    assert trainer._window.means()["reward/invalid"] == pytest.approx(0.1)
    assert trainer._window.means()["reward/failures"] == 3


def test_an_overlong_buffer_beyond_the_limit_is_refused_before_sampling(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="buffer is 50; expected at most 6, the limit"):
        make_online(tmp_path, credit=[{"name": "overlong", "buffer": 50}])
    with pytest.raises(RecipeError, match="buffer is 50; expected at most 40"):
        make_online(tmp_path, credit=[{"name": "overlong", "buffer": 50, "max_length": 40}])


def test_token_rewards_and_overlong(tmp_path: Path) -> None:
    def per_token(completion_ids: list[list[int]]) -> list[list[float]]:
        return [[float(i < 30) for i in ids] for ids in completion_ids]

    found: list[Rollout] = []

    class Look(Stateless):
        name, phase = "look", "after"

        def __call__(self, step: Rollout) -> None:
            found.append(step)

    credit = [
        {"name": "token_rewards", "source": lambda batch: batch.labels.float() / 100, "scale": 2.0, "clip": 1.5},
        {"name": "overlong", "buffer": 3, "factor": 0.5},
        {"name": "broadcast"},
        Look(),
    ]
    make_online(tmp_path, rewards=[per_token, share_of_token], credit=credit).next_minibatch()
    step = found[0]
    labels = step.batch.labels
    expected = (labels < 30).float() + (labels / 50).clamp(max=1.5)
    assert step.token_rewards is not None
    torch.testing.assert_close(step.token_rewards, expected)
    lengths = step.segments.lengths.float()
    outcome = step.by_name["share_of_token"] + 0.5 * ((6 - 3 - lengths) / 3).clamp(-1, 0)
    torch.testing.assert_close(step.rewards, outcome)
    assert step.advantages is not None
    total = step.segments.sum(expected) + outcome
    torch.testing.assert_close(step.advantages, step.broadcast(total))
    assert step.correct is not None  # by the first reward
    assert step.correct.tolist() == (step.by_name["per_token"] > 0.5).tolist()


# ---- Credit, reference, records ----


def test_importance_weights_reach_the_loss(tmp_path: Path) -> None:
    """A sampler that lies by a factor of two halves every token's loss; with reinforce through the advantages."""

    class Lying(HFGenerate):
        def sample(self, prompts: Any, **kwargs: Any) -> Any:
            from dataclasses import replace

            found = super().sample(prompts, **kwargs)
            groups = tuple(
                tuple(replace(c, raw_logps=[v + 0.6931472 for v in c.raw_logps or []]) for c in g) for g in found.groups
            )
            return replace(found, groups=groups)

    model = tiny_llama()
    lying = make_online(tmp_path / "a", model=model, sampler=Lying(model), credit=["group", "importance"])
    batch = lying.next_minibatch().batch
    torch.testing.assert_close(
        batch.columns["weights"], torch.full_like(batch.columns["weights"], 0.5), rtol=1e-3, atol=0
    )
    assert lying._window.means()["mismatch/mean_abs"] == pytest.approx(0.693, abs=1e-3)
    folded = make_online(
        tmp_path / "b", model=model, sampler=Lying(model), credit=["group", "importance"], objective="reinforce"
    )
    other = folded.next_minibatch().batch
    assert "weights" not in other.columns
    torch.testing.assert_close(other.columns["advantages"], batch.columns["advantages"] * 0.5, rtol=1e-3, atol=1e-6)


def test_adapters_are_their_own_reference(tmp_path: Path) -> None:
    from peft import LoraConfig

    model = tiny_llama()
    before = weights(model)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_online(
        tmp_path, model=model, objective=make_objective("grpo", beta=0.1), peft_config=config, max_steps=3
    )
    assert isinstance(trainer.reference, AdapterOffReference)
    trainer.train()
    log = [e for e in trainer.state.log_history if "kl/ref" in e]
    assert log[0]["rollout/kl_ref"] == pytest.approx(0.0, abs=1e-9)
    assert log[2]["rollout/kl_ref"] > 1e-6
    kept = {n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in weights(trainer.model).items()}
    assert all(torch.equal(kept[name], value) for name, value in before.items())
    assert make_online(tmp_path / "none").reference is None  # beta 0: nothing needs one


ONCE: dict[str, dict[str, Any]] = {
    "grpo": {"objective": make_objective("grpo", beta=0.1), "credit": ["group"]},
    "dcpo": {"objective": "dcpo", "credit": ["dcpo"], "log_entropy": False},
    "filtered": {"objective": "gspo", "credit": [make_rollout_credit("filter_groups", metric="reward"), "group"]},
    "reinforce": {"objective": "reinforce", "credit": ["group"]},
    "masked": {"objective": "grpo", "credit": ["group", "mask_truncated"], "max_new_tokens": 4},
    "at the temperature": {"objective": "grpo", "temperature": 0.6, "logps_at_temperature": True},
}


@pytest.mark.parametrize("case", ONCE)
def test_the_only_update_of_a_rollout_scores_it(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, log and record are those of a rollout that was scored before its update, with a pass less."""
    passes: list[str] = []
    measure = RolloutScorer._measure

    def counted(self: RolloutScorer, part: Any, wanted: set[str]) -> Any:
        passes.extend(wanted & {"old_logps"})
        return measure(self, part, wanted)

    monkeypatch.setattr(RolloutScorer, "_measure", counted)
    found = {}
    for name, earlier in (("later", False), ("before", True)):
        settings = {"max_tokens_per_microbatch": 30, "learning_rate": 0.05, "optim": "sgd", "max_steps": 3}
        model = tiny_llama(dtype=torch.float64)
        trainer = make_online(tmp_path / name, model=model, **settings, **ONCE[case])
        trainer._learns_once = trainer._learns_once and not earlier
        passes.clear()
        trainer.train()
        found[name] = dict(model.named_parameters()), len(passes)
    for name, value in found["before"][0].items():
        torch.testing.assert_close(found["later"][0][name], value, rtol=1e-9, atol=1e-12)
    assert (found["later"][1] == 0) == (case != "masked")
    assert found["before"][1] > 0
    for file in ("log.jsonl", "rollouts.jsonl"):
        ours, theirs = (read_log(tmp_path / name / file) for name in ("later", "before"))
        assert len(ours) == len(theirs) > 0
        for one, other in zip(ours, theirs, strict=True):
            assert one.keys() == other.keys()
            for key, value in other.items():
                if not key.startswith(("seconds/", "train_")) and "per_second" not in key:
                    near = pytest.approx(value, rel=1e-6, abs=1e-6) if isinstance(value, int | float | list) else value
                    assert one[key] == near, key


def test_modes_and_columns_on_the_way(tmp_path: Path) -> None:
    trainer = make_online(tmp_path, log_entropy=True, rollout_epochs=2)
    trainer.model.train()
    trainer.next_minibatch()
    assert trainer.model.training
    assert all(m.training for m in trainer.model.modules())
    assert trainer.buffer is not None
    assert set(trainer.buffer.batch.columns) == {"old_logps", "advantages", "entropy"}
    assert trainer._window.means()["rollout/entropy"] > 1
    phases = {n for n in trainer._window.means() if n.startswith("seconds/")}
    assert phases == {f"seconds/{p}" for p in ("rollout", "reward", "scoring", "credit")}


def test_mixed_precision_is_the_same_in_sampling_and_scoring(tmp_path: Path) -> None:
    trainer = make_online(tmp_path, bf16=True, max_steps=2, objective=make_objective("grpo", beta=0.1))
    trainer.train()
    for entry in trainer.state.log_history[:2]:
        assert entry["mismatch/mean_abs"] < 0.03
        assert entry["ratio/mean"] == pytest.approx(1.0, abs=0.02)
    assert trainer.state.log_history[0]["rollout/kl_ref"] < 1e-3


def test_what_is_recorded(tmp_path: Path) -> None:
    trainer = make_online(
        tmp_path, rollout_epochs=2, max_steps=8, rollout_samples=2, rollout_samples_every=2, log_entropy=True
    )
    trainer.train()
    entries = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [e["rollout"] for e in entries] == [0, 0, 2, 2]
    assert [e["step"] for e in entries] == [0, 0, 4, 4]
    for entry in entries:
        for name in ("advantages", "entropy", "old_logps", "sampling_logps", "ratio", "clipped"):
            assert len(entry[name]) == len(entry["ids"]), name
        assert entry["reward"] == pytest.approx(share_of_token([entry["ids"]])[0], abs=1e-4)
        assert any(r != 1.0 for r in entry["ratio"])  # of the second epoch
    best, worst = sorted((e["reward"] for e in entries[:2]), reverse=True)
    assert best > worst


def test_evaluation(tmp_path: Path) -> None:
    trainer = make_online(
        tmp_path,
        eval_dataset={"a": make_prompts(6, seed=8), "b": make_prompts(4, seed=9)},
        rewards=RewardSuite([share_of_token, RewardFunction(wanted, weight=2.0)]),
        eval_generations=2,
        eval_temperature=1.0,
        correct_from="share_of_token",
    )
    metrics = trainer.evaluate()
    assert metrics == {**trainer.evaluate(), **{n: v for n, v in metrics.items() if "runtime" in n or "second" in n}}
    assert metrics["eval_a_reward"] == pytest.approx(
        metrics["eval_a_reward_share_of_token"] + 2 * metrics["eval_a_reward_wanted"]
    )
    for name in ("a", "b"):
        assert metrics[f"eval_{name}_pass@1"] == pytest.approx(metrics[f"eval_{name}_correct"])
        assert metrics[f"eval_{name}_pass@2"] >= metrics[f"eval_{name}_pass@1"]
        assert 1 <= metrics[f"eval_{name}_length"] <= 6
    greedy = make_online(tmp_path / "greedy", eval_dataset=make_prompts(6, seed=8)).evaluate()
    assert greedy["eval_reward_low"] <= greedy["eval_reward"] <= greedy["eval_reward_high"]


# ---- Refusals ----


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "pairs": ({"objective": "dpo"}, "learns from pairs"),
    "reward model": ({"objective": make_objective("qrm")}, "pairs|reward model"),
    "group of one": ({"num_generations": 1}, "'group' compares completions.*num_generations is 1"),
    "uneven shares": ({"prompts_per_rollout": 6, "minibatches": 4}, "4 minibatches do not divide"),
    "two setters": ({"credit": ["group", "broadcast"]}, "both set the advantages"),
    "no advantages taken": ({"credit": ["group"], "objective": "sft"}, "takes no advantages"),
    "no rewards": ({"rewards": None}, "learns from rewards, got none"),
    "only looked at": ({"rewards": RewardFunction(share_of_token, evaluate_only=True)}, "got only rewards of weight 0"),
    "correct_from of evaluation": ({"correct_from": "wanted", "rewards": [share_of_token,
        RewardFunction(wanted, name="wanted", evaluate_only=True)]}, "'wanted', which is evaluate_only"),
    "no reference to sync": ({"sync_ref_model": True}, "weights of its own.*none is asked"),
    "another's temperature": ({"logps_at_temperature": True, "temperature": 0.7, "reference": lambda batch, want: None,
        "objective": make_objective("grpo", beta=0.1)}, "function gives them at 1 alone"),
    "no critic": ({"credit": [type("Step", (Stateless,), {"name": "v", "phase": "advantages", "needs": {"values"},
        "__call__": lambda self, step: None})()]}, "needs values, which a critic gives"),
    "unknown step": ({"credit": ["gruop"]}, "unknown online credit 'gruop'; did you mean 'group'"),
    "unknown setting": ({"credit": [{"name": "group", "scal": "none"}]}, "unknown setting 'scal'; did you mean"),
    "unknown need": ({"credit": [type("Step", (Stateless,), {"name": "v", "phase": "after", "needs": {"hiden"},
        "__call__": lambda self, step: None})()]}, "needs hiden; expected some of"),
    "correct_from": ({"correct_from": "mine"}, "correct_from is 'mine'; known: share_of_token"),
    "text without tokenizer": ({"rewards": lambda completions: []}, "reads text, which needs a tokenizer"),
    "rows without tokenizer": ({"train_dataset": [{"prompt": "a"}]}, "rows of text need a tokenizer"),
    "accumulation": ({"gradient_accumulation_steps": 2}, "a minibatch is an optimiser step"),
    "temperature": ({"temperature": -1.0}, "temperature is -1.0"),
    "stop id": ({"stop_ids": [5, 97]}, r"stop_ids has \[97\], which no token is; expected ids below \d+"),
    "no minibatch": ({"minibatches": 0}, "minibatches must be a whole number, at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    settings, message = REFUSED[case]
    with pytest.raises(RecipeError, match=message):
        make_online(tmp_path, **settings)


def test_prompts_are_checked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row p1.*59 prompt tokens and max_new_tokens 6.*at most 64"):
        make_online(tmp_path, train_dataset=[PromptItem([1] * 59, row="p1")])
    with pytest.raises(DataError, match="outside the model's vocabulary"):
        make_online(tmp_path, train_dataset=[PromptItem([VOCABULARY], row=0)])
    with pytest.raises(DataError, match="no prompts"):
        PromptDataset([])
    with pytest.raises(DataError, match="several prompts have the same id"):
        PromptDataset([PromptItem([1], row="a"), PromptItem([2], row="a")])


def test_steps_from_epochs(tmp_path: Path) -> None:
    trainer = make_online(tmp_path, max_steps=-1, num_train_epochs=2, minibatches=2, rollout_epochs=3)
    assert trainer.args.max_steps == 5 * 6  # 20 prompts are 5 rollouts of 4
    assert online_config(tmp_path).ignore_data_skip


# ---- What is only looked at, by task, and what rewards know of training ----


def test_metrics_by_task_and_rewards_of_evaluation(tmp_path: Path) -> None:
    def rows(n: int, seed: int) -> list[PromptItem]:
        return [replace(p, raw={"task": ("sums", "words", None)[i % 3]}) for i, p in enumerate(make_prompts(n, seed))]

    steps: list[int] = []

    def own(completion_ids: list[list[int]], task: list[str | None], trainer_state: Any) -> list[float | None]:
        steps.append(trainer_state.global_step)
        return [None if t is None else float(t == "sums") for t in task]

    asked: list[int] = []

    def held_out(completion_ids: list[list[int]]) -> list[float]:
        asked.append(len(completion_ids))
        return [5.0] * len(completion_ids)

    trainer = make_online(
        tmp_path,
        rewards=[
            RewardFunction(held_out, name="held_out", evaluate_only=True),
            RewardFunction(own, name="own", on_none="ignore"),
        ],
        train_dataset=rows(12, 0),
        eval_dataset=rows(6, 1),
        task_column="task",
        prompts_per_rollout=6,
        max_steps=3,
        shuffle_prompts=False,
    )
    trainer.train()
    assert (steps, asked) == ([0, 1, 2], [])
    for entry in (e for e in read_log(tmp_path / "log.jsonl") if "reward/mean" in e):
        assert (entry["task/sums/reward"], entry["task/words/reward"]) == (1.0, 0.0)
        assert (entry["task/sums/correct"], entry["task/words/correct"]) == (1.0, 0.0)
        assert entry["task/sums/completions"] == entry["task/None/completions"] == 6.0
        assert "task/None/reward" not in entry
        assert "reward/held_out/mean" not in entry
    found = trainer.evaluate()
    assert asked == [6]
    assert (found["eval_reward"], found["eval_correct"], found["eval_reward_held_out"]) == (0.5, 0.5, 5.0)
    assert (found["eval_task/sums/reward"], found["eval_task/words/correct"]) == (1.0, 0.0)
    assert found["eval_task/sums/correct_low"] <= found["eval_task/sums/correct"]
    assert "eval_task/None/reward" not in found
    with pytest.raises(DataError, match="row p0: field 'task': the column that names tasks is missing"):
        make_online(tmp_path / "b", task_column="task")


def test_log_probabilities_at_the_sampling_temperature(tmp_path: Path) -> None:
    """They are what the sampler drew by: nothing is off-policy at the first update."""
    own: dict[str, Any] = {"temperature": 0.6, "rollout_samples": 0, "num_generations": 2, "rollout_epochs": 2}
    trainer = make_online(tmp_path, logps_at_temperature=True, **own)
    buffer = trainer.rollout()
    assert buffer is not None
    assert buffer.batch is not None
    logps = trainer.judge(trainer.model, buffer.batch).output.tokens["ratio"]
    torch.testing.assert_close(logps, torch.ones_like(logps), atol=1e-5, rtol=0)
    means = trainer._window.means()
    assert means["mismatch/max_abs"] < 1e-4
    plain = make_online(tmp_path / "b", **own)
    plain.rollout()
    assert plain._window.means()["mismatch/max_abs"] < 1e-4
    assert plain._window.means()["rollout/entropy"] > means["rollout/entropy"] + 0.05
