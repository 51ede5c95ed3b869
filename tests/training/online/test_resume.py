"""An online run killed anywhere and resumed ends with the same weights, state, log and record, bit for bit."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.training.online.made import made_batch
from tests.training.online.tiny import make_online, make_prompts
from tests.training.test_resume import TIMES, KillAt, in_child
from tests.training.tiny import tiny_llama
from tokengrain.errors import RunError, read_log
from tokengrain.method import Rollout, make_objective, make_rollout_credit
from tokengrain.rollout.local import HFGenerate
from tokengrain.runs import ROLLOUT_FILE
from tokengrain.training import checkpoint
from tokengrain.training.buffer import RolloutBuffer
from tokengrain.training.checkpoint import last_complete_checkpoint
from tokengrain.training.online import OnlineTrainer
from tokengrain.training.rollout import RolloutScorer

STEPS = 11  # 4 optimiser steps per rollout: two and three quarters of them


class RunningMean:
    """A step with a state: rewards minus the mean of all earlier ones; and a visit count per prompt."""

    name, phase, needs = "running_mean", "rewards", frozenset({"ref_logps"})

    def __init__(self) -> None:
        self.total, self.count, self.visits = 0.0, 0, dict[str, int]()

    def __call__(self, step: Rollout) -> None:
        rewards = step.gather(step.rewards).double()
        mean = self.total / max(self.count, 1)
        self.total, self.count = self.total + float(rewards.sum()), self.count + len(rewards)
        for ids in step.gather(list(step.prompt_ids)):
            for row in ids:
                self.visits[row] = self.visits.get(row, 0) + 1
        kl = step.segments.mean(step.quantity("old_logps") - step.quantity("ref_logps"))
        step.rewards = step.rewards - mean - 0.01 * kl.to(step.rewards)
        step.metrics["running_mean"] = mean

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "count": self.count, "visits": self.visits}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.total, self.count, self.visits = state["total"], state["count"], dict(state["visits"])


def build(folder: Path, callbacks: list[TrainerCallback] | None = None, **settings: Any) -> OnlineTrainer:
    defaults: dict[str, Any] = {
        "minibatches": 2,
        "rollout_epochs": 2,
        "max_steps": STEPS,
        "logging_steps": 3,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
        "max_tokens_per_microbatch": 40,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "eval_dataset": make_prompts(3, seed=1),
        "objective": make_objective("grpo", beta=0.05),
        "credit": [RunningMean(), {"name": "broadcast", "baseline": "batch"}],
    }
    return make_online(folder, callbacks=callbacks, **{**defaults, **settings})


def final(folder: Path, trainer: OnlineTrainer) -> dict[str, Any]:
    timed = ("seconds/", "runtime", "per_second")
    log = [
        {k: v for k, v in e.items() if k not in TIMES and not any(t in k for t in timed)}
        for e in read_log(folder / "log.jsonl")
    ]
    return {
        "weights": {n: p.detach().clone() for n, p in trainer.model.named_parameters()},
        "optimiser": {
            (i, k): v.clone() for i, s in trainer.optimizer.state_dict()["state"].items() for k, v in s.items()
        },
        "loop": trainer.rollout_state(),
        "log": log,
        "record": [json.loads(line) for line in (folder / ROLLOUT_FILE).read_text().splitlines()],
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    trainer = build(folder)
    trainer.train()
    assert trainer.state.global_step == STEPS
    found = final(folder, trainer)
    assert found["loop"]["index"] == 3
    assert sum(found["loop"]["credit"]["running_mean"]["visits"].values()) == 12
    assert {entry["rollout"] for entry in found["record"]} == {0, 1}  # the third is not used up
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for part in ("weights", "optimiser"):
        assert found[part].keys() == expected[part].keys()
        for name, value in expected[part].items():
            assert torch.equal(found[part][name], value), (part, name)
    for part in ("loop", "log", "record"):
        assert found[part] == expected[part], part


def kill_in(target: Any, name: str, calls: int, *, after: bool = False) -> None:
    """The `calls`-th call of a method ends with SIGKILL, before or after its work."""
    original, seen = getattr(target, name), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        seen[0] += 1
        dies = seen[0] == calls
        if dies and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(target, name, wrapped)


KILLS: dict[str, tuple[Callable[[], Any], int]] = {
    # Sampling for an evaluation counts as well: rollout, evaluation, rollout, ...
    "second rollout": (lambda: kill_in(HFGenerate, "sample", 3, after=True), 4),
    "scoring of the second": (lambda: kill_in(RolloutScorer, "_measure", 6), 4),
    "credit of the second": (lambda: kill_in(RunningMean, "__call__", 2, after=True), 4),
    "between rollout and update": (lambda: kill_in(RolloutBuffer, "__next__", 5), 4),
    "saving the buffer": (lambda: kill_in(RolloutBuffer, "save", 2, after=True), 4),
    "before the state file": (lambda: kill_in(OnlineTrainer, "_write_state", 3), 4),
    "before the rename": (lambda: kill_in(checkpoint, "publish", 3), 4),
}
FAST = ("second rollout", "scoring of the second", "saving the buffer")


@pytest.mark.parametrize("point", [p if p in FAST else pytest.param(p, marks=pytest.mark.slow) for p in KILLS])
def test_killed(point: str, tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    patch, step = KILLS[point]

    def work() -> None:
        patch()
        build(tmp_path).train()

    assert in_child(work) == -signal.SIGKILL
    found = last_complete_checkpoint(tmp_path)
    assert found is not None
    assert found.name == f"checkpoint-{step}"
    resume_and_compare(tmp_path, uninterrupted)


def resume_and_compare(folder: Path, expected: dict[str, Any]) -> None:
    trainer = build(folder)
    trainer.train(resume_from_checkpoint=True)
    assert_same(final(folder, trainer), expected)


UPDATES = [("before the optimiser", 3), ("after the optimiser", 6), ("before the optimiser", 1), ("log", 9)]


@pytest.mark.parametrize(
    ("event", "step"), [u if u[1] == 6 else pytest.param(*u, marks=pytest.mark.slow) for u in UPDATES]
)
def test_killed_in_the_middle_of_a_rollouts_updates(
    event: str, step: int, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    assert in_child(lambda: build(tmp_path, [KillAt(event, step)]).train() and None) == -signal.SIGKILL
    found = last_complete_checkpoint(tmp_path)
    if step == 1:
        assert found is None
    elif step == 6:
        assert found is not None
        assert (found / "rollout" / "rank-0.pt").exists()  # a rollout half used
    resume_and_compare(tmp_path, uninterrupted)


def test_killed_twice_with_filter_and_adapter(tmp_path: Path) -> None:
    """Refills, an adapter with dropout and its own base as reference, killed in two places."""
    from peft import LoraConfig

    def one(name: str, callbacks: list[TrainerCallback] | None = None) -> OnlineTrainer:
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
        return build(
            tmp_path / name,
            callbacks,
            peft_config=config,
            disable_dropout=False,
            credit=[make_rollout_credit("filter_groups", metric="share_of_token", high=0.4), "group"],
            max_steps=8,
            eval_strategy="no",
        )

    whole = one("whole")
    whole.train()
    assert any(e.get("rollout/refills", 0) > 0 for e in whole.state.log_history)
    assert in_child(lambda: one("parts", [KillAt("after the optimiser", 2)]).train() and None) == -signal.SIGKILL

    def again() -> None:
        one("parts", [KillAt("before the optimiser", 5)]).train(resume_from_checkpoint=True)

    assert in_child(again) == -signal.SIGKILL
    parts = one("parts")
    parts.train(resume_from_checkpoint=True)
    assert_same(final(tmp_path / "parts", parts), final(tmp_path / "whole", whole))


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    settings = {"max_steps": 4, "eval_strategy": "no", "logging_steps": 4}
    trainer = build(tmp_path, **settings)
    trainer.train()
    before = final(tmp_path, trainer)
    again = build(tmp_path, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    assert_same(final(tmp_path, again), before)


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    settings = {"max_steps": 2, "eval_strategy": "no"}
    build(tmp_path, **settings).train()
    with pytest.raises(RunError, match="belongs to another run: sampling"):
        build(tmp_path, **settings, temperature=0.7).train(resume_from_checkpoint=True)
    with pytest.raises(RunError, match="correct_from was None there and is 'share_of_token'"):
        build(tmp_path, **settings, correct_from="share_of_token").train(resume_from_checkpoint=True)
    with pytest.raises(RunError, match="belongs to another run: credit"):
        build(tmp_path, **settings, credit=["group"]).train(resume_from_checkpoint=True)
    with pytest.raises(RunError, match="earlier run"):
        build(tmp_path, **settings).train()


def test_a_checkpoint_of_two_ranks_is_taken_up_by_one(tmp_path: Path) -> None:
    """Buffers of all ranks, shared out anew: the same minibatches in the first epoch."""
    trainer = make_online(tmp_path, model=tiny_llama(), minibatches=2, max_steps=2)
    trainer.next_minibatch()
    whole = trainer.buffer
    assert whole is not None
    assert whole.batch is not None
    paths = []
    for rank in range(2):
        own = whole.batch.select(range(rank, 4, 2))
        part = RolloutBuffer(own, whole.stand_in, minibatches=2, epochs=1, seed=whole.seed)
        next(part)
        paths.append(tmp_path / f"rank-{rank}.pt")
        part.save(paths[-1])
    joined = RolloutBuffer.load(paths, 0, 1, {"p1": {"number": 1}})
    ours, theirs = next(joined), next(whole)
    assert ours.batch.rows == theirs.batch.rows
    for name, values in theirs.batch.columns.items():
        assert torch.equal(ours.batch.columns[name], values)
    assert joined.done
    shared = [RolloutBuffer.load([*paths, paths[0]], rank, 2, {}) for rank in range(2)]
    assert [b.batch.n_prompts for b in shared if b.batch is not None] == [3, 3]


@pytest.mark.parametrize(("counts", "epochs", "used"), [((4, 4), 3, 3), ((4, 1), 1, 1), ((0, 3), 2, 1), ((5,), 3, 5)])
def test_other_ranks_go_on_with_the_epoch_under_way(
    counts: tuple[int, ...], epochs: int, used: int, tmp_path: Path
) -> None:
    """Every prompt is used once per epoch, also if two changes come in the same epoch; filters leave ranks unequal."""
    batch, seen = made_batch(sum(counts)), Counter[Any]()
    paths = [tmp_path / f"rank-{rank}.pt" for rank in range(3)]

    def steps(buffers: list[RolloutBuffer], many: int) -> list[Path]:
        for rank, buffer in enumerate(buffers):
            for one in (next(buffer) for _ in range(many)):
                seen.update(one.batch.rows if one.real else ())
            buffer.save(paths[rank])
        return paths[: len(buffers)]

    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    parts = [batch.select(range(end - n, end)) if n else None for n, end in zip(counts, ends, strict=True)]
    stand_in = batch.select([0])
    left = steps([RolloutBuffer(p, stand_in, minibatches=2, epochs=epochs, seed=5) for p in parts], used)
    other = [RolloutBuffer.load(left, rank, 3 - len(counts), {}) for rank in range(3 - len(counts))]
    left = steps(other, 0)
    again = [RolloutBuffer.load(left, rank, 3, {}) for rank in range(3)]
    steps(again, 2 * epochs - used)
    assert all(buffer.done for buffer in again)
    assert set(seen.values()) == {epochs}
    assert len(seen) == sum(counts)
