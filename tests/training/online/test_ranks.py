"""Two processes (DDP, gloo) do what one does: same completions, same weights, same log, same filters."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.rollout.stub import Served, Tcp, serving
from tests.training.online.tiny import make_online, make_prompts
from tests.training.ranks import on_ranks, sharding_on_cpu
from tests.training.test_ranks import FSDP
from tests.training.tiny import tiny_llama
from tokengrain.batch import TokenBatch
from tokengrain.errors import DataError, RolloutError, RunError, read_log
from tokengrain.method import Rollout, Stateless, make_objective, make_rollout_credit
from tokengrain.rewards.suite import RewardError
from tokengrain.rollout import transfer
from tokengrain.scoring.reference import FrozenReference
from tokengrain.training.critic import Critic
from tokengrain.training.rollout import Ranks

CASES: dict[str, dict[str, Any]] = {
    "minibatches, batch scale": {
        "minibatches": 2,
        "credit": [{"name": "group", "scale": "batch"}],
        "max_steps": 4,
        "normaliser": "token_mean",
    },
    "filter that leaves ranks without prompts": {
        "credit": [make_rollout_credit("filter_groups", metric="share_of_token", refill=False, high=0.3), "group"],
        "max_steps": 3,
    },
}


def run(folder: Path, **settings: Any) -> Any:
    trainer = make_online(
        folder,
        model=tiny_llama(dtype=torch.float64),
        objective=make_objective("grpo", beta=0.1),
        eval_dataset=make_prompts(5, seed=2),
        **{"optim": "sgd", "learning_rate": 0.05, "max_tokens_per_microbatch": 40, **settings},
    )
    trainer.train()
    metrics = trainer.evaluate()
    parts = {n: p.detach().numpy().copy() for n, p in trainer.model.named_parameters()}
    return parts, metrics, trainer.rollout_state(), trainer.state.epoch


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(case: str, tmp_path: Path) -> None:
    one = run(tmp_path / "one", **CASES[case])
    two = on_ranks(2, lambda: run(tmp_path / "two", **CASES[case]))
    for name, value in two[0][0].items():
        assert (value == two[1][0][name]).all(), name  # both ranks, to the bit
        torch.testing.assert_close(torch.from_numpy(value), torch.from_numpy(one[0][name]), rtol=1e-6, atol=1e-8)
    assert two[0][2:] == two[1][2:] == one[2:]
    for name, value in one[1].items():
        if "runtime" not in name and "per_second" not in name:
            assert two[0][1][name] == pytest.approx(value, rel=1e-6), name
    logs = [[e for e in read_log(tmp_path / d / "log.jsonl") if "loss" in e] for d in ("one", "two")]
    assert len(logs[0]) == CASES[case]["max_steps"]
    for ours, theirs in zip(*logs, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            if not name.startswith(("seconds/", "mismatch/")) and "per_second" not in name:
                assert theirs[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_two_ranks_resume_in_the_middle_of_a_rollout(tmp_path: Path) -> None:
    settings = {
        "minibatches": 2,
        "rollout_epochs": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "optim": "adamw_torch",
    }
    settings["lr_scheduler_type"] = "constant"  # the others go by max_steps
    whole = on_ranks(2, lambda: run(tmp_path / "whole", max_steps=6, **settings))
    on_ranks(2, lambda: run(tmp_path / "parts", max_steps=3, **settings) and None)
    parts = on_ranks(2, lambda: resumed(tmp_path / "parts", max_steps=6, **settings))
    for name, value in whole[0][0].items():
        assert (value == parts[0][0][name]).all(), name
    assert whole[0][2:] == parts[0][2:]


def test_a_checkpoint_between_two_entries_of_the_log(tmp_path: Path) -> None:
    """It gathers the metrics on the main process, so ranks no longer hold the same names."""
    settings = {"minibatches": 2, "max_steps": 6, "logging_steps": 2, "save_strategy": "steps", "save_steps": 3}
    one = run(tmp_path / "one", **settings)
    two = on_ranks(2, lambda: run(tmp_path / "two", **settings))
    assert two[0][2:] == two[1][2:] == one[2:]
    ours, theirs = ([e for e in read_log(tmp_path / d / "log.jsonl") if "loss" in e] for d in ("one", "two"))
    assert [e.keys() for e in ours] == [e.keys() for e in theirs]
    for entry, other in zip(ours, theirs, strict=True):
        assert other["reward/mean"] == pytest.approx(entry["reward/mean"], rel=1e-6)
        assert other["loss"] == pytest.approx(entry["loss"], rel=1e-5, abs=1e-7)


def resumed(folder: Path, **settings: Any) -> Any:
    import tests.training.online.test_ranks as here

    original = here.make_online

    def made(*args: Any, **kwargs: Any) -> Any:
        trainer = original(*args, **kwargs)
        train = trainer.train
        trainer.train = lambda: train(resume_from_checkpoint=True)
        return trainer

    here.make_online = made
    return run(folder, **settings)


class Digits:
    """A tokenizer that writes every token as "#", which ends R3's chains at once."""

    def decode(self, ids: Any, **_: Any) -> str:
        return "#" * len(ids)

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [5] * len(text)}


SHARDED: dict[str, dict[str, Any]] = {
    "weights": {"objective": make_objective("grpo", beta=0.1), "credit": ["group", "thr"], "minibatches": 2},
    "adapter": {"objective": make_objective("grpo", beta=0.1), "adapter": True},
    "ahead": {"objective": make_objective("grpo", beta=0.1), "credit": ["group", "thr"], "max_staleness": 1},
    "critic": {
        "objective": "ppo",
        "credit": ["gae"],
        "critic": Critic(tiny_llama(seed=4, dtype=torch.float64), lr=1e-2),
        "minibatches": 2,
    },
    "r3": {
        "objective": make_objective("grpo", beta=0.1),
        "credit": [
            make_rollout_credit("r3", tokenizer=Digits(), marker="#", end=False, truncated="keep", filter_drop=0.25),
            "group",
        ],
        "train_dataset": [replace(p, raw={**p.raw, "reference": [3, 5]}) for p in make_prompts(12)],
    },
}


def from_server(
    folder: Path, url: str, *, sharded: bool, adapter: bool = False, resume: bool = False, how: str = "", **given: Any
) -> Any:
    """Weights (whole), evaluation and rollouts of training that samples from a stub of a server."""
    how = how or ("adapter" if adapter else "checkpoint")
    sampler = {"name": "server", "url": url, "model": "m", "refresh": how}
    settings: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.05, "max_tokens_per_microbatch": 25, **given}
    if adapter:
        from peft import LoraConfig

        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=True)
        settings["peft_config"] = config
    with sharding_on_cpu():
        trainer = make_online(
            folder,
            model=tiny_llama(dtype=torch.float64),
            eval_dataset=make_prompts(5, seed=2),
            sampler={**sampler, "timeout": 60, "backoff": 0.01},
            **settings,
            **(FSDP if sharded else {}),
        )
        before = trainer.evaluate()  # nothing is sharded yet
        trainer.train(resume_from_checkpoint=resume)
        metrics = trainer.evaluate()
        assert sharded == any(isinstance(p, DTensor) for p in trainer.model.parameters())
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    parts = {n.replace("module.", ""): v.detach().cpu().clone().numpy() for n, v in state.items()}
    return parts, before["eval_reward"], metrics["eval_reward"], trainer.rollout_state()


@pytest.mark.parametrize(
    "case", ["weights", *(pytest.param(case, marks=pytest.mark.slow) for case in ("adapter", "ahead", "critic", "r3"))]
)
def test_a_sharded_policy_samples_from_a_server(case: str, tmp_path: Path) -> None:
    """FSDP2 gives the gradients, weights and evaluation of DDP; the server has what the last step left."""
    found = {}
    for name, sharded in (("ddp", False), ("fsdp2", True)):
        served = Served(tiny_llama(dtype=torch.float64))
        with serving(served) as stub:
            work = partial(from_server, tmp_path / name, stub.url, sharded=sharded, max_steps=3, **SHARDED[case])
            found[name] = on_ranks(2, work)[0]
    for name, value in found["ddp"][0].items():
        torch.testing.assert_close(
            torch.from_numpy(found["fsdp2"][0][name]), torch.from_numpy(value), rtol=1e-6, atol=1e-8
        )
    assert found["fsdp2"][1:] == found["ddp"][1:]
    logs = [[e for e in read_log(tmp_path / d / "log.jsonl") if "loss" in e] for d in ("ddp", "fsdp2")]
    assert len(logs[0]) == len(logs[1]) == 3
    for ours, theirs in zip(*logs, strict=True):
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-6)
        for name in ours:
            if name.startswith("critic/"):
                assert theirs[name] == pytest.approx(ours[name], rel=1e-6), name
        stale = theirs.get("rollout/staleness", 0)  # then the policy has moved since
        assert (theirs.get("mismatch/max_abs", 0.0) < 1e-4) == (not stale)
        assert theirs.keys() == ours.keys()


def test_a_sharded_policy_is_sent_to_its_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "Nccl", Tcp)
    served = Served(tiny_llama(seed=5, dtype=torch.float64))
    with serving(served) as stub:
        found = on_ranks(2, partial(from_server, tmp_path, stub.url, sharded=True, how="nccl", max_steps=2))
    for name, value in served.model.state_dict().items():
        assert (value.numpy() == found[0][0][name]).all(), name
    log = [entry for entry in read_log(tmp_path / "log.jsonl") if "loss" in entry]
    assert len(log) == 2
    assert max(entry["mismatch/max_abs"] for entry in log) < 1e-4
    assert not (tmp_path / ".sampler").exists()


def test_a_rank_without_a_server_ends_both(tmp_path: Path) -> None:
    def work() -> str:
        url = stub.url if torch.distributed.get_rank() == 0 else "http://127.0.0.1:9"
        with pytest.raises((RunError, RolloutError)) as caught:
            from_server(tmp_path, url, sharded=False)
        return str(caught.value)

    with serving(Served(tiny_llama())) as stub:
        found = on_ranks(2, lambda: PartialState(cpu=True) and work())
    assert re.search(r"failed on another rank, rank 1: .*127.0.0.1:9/v1/models: .*refused", found[0])
    assert re.search(r"127.0.0.1:9/v1/models: .*refused.*expected a running vllm server", found[1])


@pytest.mark.slow
def test_a_sharded_policy_resumes(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"minibatches": 2, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}
    settings |= {"lr_scheduler_type": "constant", "sharded": True, "objective": make_objective("grpo", beta=0.1)}
    with serving(Served(tiny_llama(dtype=torch.float64))) as stub:
        whole = on_ranks(2, partial(from_server, tmp_path / "whole", stub.url, max_steps=5, **settings))
        on_ranks(2, partial(from_server, tmp_path / "parts", stub.url, max_steps=3, **settings))
        parts = on_ranks(2, partial(from_server, tmp_path / "parts", stub.url, max_steps=5, resume=True, **settings))
    for name, value in whole[0][0].items():
        assert (value == parts[0][0][name]).all(), name
    assert whole[0][2:] == parts[0][2:]


def test_a_reward_that_fails_on_one_rank_ends_both(tmp_path: Path) -> None:
    def fails(completion_ids: list[list[int]], number: list[int]) -> list[float]:
        if 4 in number:
            raise ValueError("no such answer")
        return [float(len(i)) for i in completion_ids]

    def work() -> tuple[str, str]:
        with pytest.raises((RewardError, RunError)) as caught:
            make_online(tmp_path, rewards=fails, prompts_per_rollout=10, max_steps=1).train()
        return type(caught.value).__name__, str(caught.value)

    found = dict(on_ranks(2, work))
    assert set(found) == {"RewardError", "RunError"}
    assert "no such answer" in found["RewardError"]
    assert "on another rank" in found["RunError"]
    assert "no such answer" in found["RunError"]


def is_last() -> bool:
    return torch.distributed.get_rank() == torch.distributed.get_world_size() - 1


class Gathers(Stateless):
    """Fails on the last rank between two things that ranks exchange."""

    name = "gathers"

    def __init__(self, before: int, phase: str = "after") -> None:
        self.before, self.phase = before, phase

    def __call__(self, step: Rollout) -> None:
        for number in range(4):
            if number == self.before and is_last():
                raise ValueError("no such influence")
            step.gather(number)


def token_rewards(batch: TokenBatch) -> Tensor:
    return torch.full((batch.segments.total,), float("nan") if is_last() else 1.0)


class Reference(FrozenReference):
    def __call__(self, batch: TokenBatch, want: Any) -> Any:
        if is_last():
            raise ValueError("no such reference")
        return super().__call__(batch, want)


FAILING: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    # Rank 0 waits within the step: for the first thing exchanged, or for a later one.
    "first": (lambda: {"credit": ["group", Gathers(0)]}, ValueError, "no such influence"),
    "later": (lambda: {"credit": ["group", Gathers(3)]}, ValueError, "no such influence"),
    "filter": (lambda: {"credit": [Gathers(2, phase="filter"), "group"]}, ValueError, "no such influence"),
    # Here it goes on to the next step.
    "token rewards": (
        lambda: {"credit": [{"name": "token_rewards", "source": token_rewards}, {"name": "group", "scale": "batch"}]},
        DataError,
        "not finite for token 0",
    ),
    "scoring": (
        lambda: {"objective": make_objective("grpo", beta=0.1), "reference": Reference(tiny_llama())},
        ValueError,
        "no such reference",
    ),
}


@pytest.mark.parametrize("case", FAILING)
def test_credit_or_scoring_that_fails_on_one_rank_ends_both(case: str, tmp_path: Path) -> None:
    settings, error, message = FAILING[case]

    def work() -> tuple[str, str]:
        with pytest.raises((error, RunError)) as caught:
            make_online(tmp_path, max_steps=1, **settings()).train()
        return type(caught.value).__name__, str(caught.value)

    first, last = on_ranks(2, work, timeout=60)
    assert last[0] == error.__name__
    assert message in last[1]
    assert first[0] == "RunError"
    assert "on another rank, rank 1" in first[1]
    assert message in first[1]


def test_ranks_meet_again_after_a_failure() -> None:
    def work() -> list[Any]:
        from accelerate import PartialState
        from accelerate.utils import gather_object

        state = PartialState(cpu=True)
        ranks = Ranks(state.process_index, 2, lambda value: list(gather_object([value])))

        def fails() -> None:
            ranks.together(lambda: ranks.exchange("inner"))
            if state.process_index:
                raise KeyError
            ranks.exchange("never heard")

        with pytest.raises((KeyError, RunError)) as caught:
            ranks.together(fails)
        # The next piece of work is not disturbed by what is left of the last one.
        return [type(caught.value).__name__, str(caught.value), ranks.together(lambda: ranks.exchange(ranks.rank))]

    found = on_ranks(2, work, timeout=60)
    assert [f[0] for f in found] == ["RunError", "KeyError"]
    assert "rank 1: KeyError" in found[0][1]
    assert [f[2] for f in found] == [[0, 1], [0, 1]]
