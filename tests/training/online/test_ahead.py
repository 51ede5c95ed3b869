"""One rollout ahead: the same as taking turns with weights one rollout old, whatever happens on the way."""

from __future__ import annotations

import copy
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.rollout.stub import Served, serving
from tests.training.online.test_resume import assert_same, build, final, kill_in
from tests.training.online.tiny import WANTED, make_online, make_prompts
from tests.training.ranks import on_ranks
from tests.training.test_resume import in_child
from tests.training.tiny import tiny_llama
from tokengrain.errors import RecipeError, RolloutError, RunError, read_log
from tokengrain.method import Rollout, Stateless, make_objective, make_rollout_credit
from tokengrain.rollout.local import HFGenerate
from tokengrain.rollout.sampler import PromptItem, Rollouts, SampledCompletion, SamplingConfig
from tokengrain.run.load import load_recipe
from tokengrain.runs import ROLLOUT_FILE
from tokengrain.training import checkpoint
from tokengrain.training.buffer import RolloutBuffer
from tokengrain.training.checkpoint import last_complete_checkpoint
from tokengrain.training.critic import Critic
from tokengrain.training.online import FAR, OnlineTrainer
from tokengrain.training.rollout import Ranks, packed_round, unpacked_round

TURNS: dict[str, Any] = {"minibatches": 2, "rollout_epochs": 2, "max_steps": 9}
REFILLED = [make_rollout_credit("filter_groups", metric="share_of_token", high=0.4), "group"]


def entries(folder: Path) -> list[dict[str, Any]]:
    """The training entries of the log, without times."""
    timed = ("seconds/", "per_second", "runtime", "staleness")
    found = [e for e in read_log(folder / "log.jsonl") if "loss" in e]
    return [{k: v for k, v in e.items() if not any(t in k for t in timed)} for e in found]


def weights(trainer: OnlineTrainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def waiting() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "rollout ahead"]


class Behind(HFGenerate):
    """Samples each rollout from the weights before the last rollout's updates, without a thread; others as they are."""

    trainer: Any = None
    older: Any = None
    seen = -1

    def sample(self, prompts: Any, *, n: int, sampling: SamplingConfig) -> Rollouts:
        present, first = self.model, self.trainer.rollouts != self.seen and self.trainer.model.training
        if first:
            self.seen, before = self.trainer.rollouts, self.older
            self.older = copy.deepcopy(present)
            self.refresh(before or present)
        try:
            return super().sample(prompts, n=n, sampling=sampling)
        finally:
            self.refresh(present)


METHODS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": lambda: {"credit": ["group"]},
    "refilled": lambda: {"credit": REFILLED},
    "thr": lambda: {"credit": ["group", "thr"]},
    "aepo": lambda: {
        "objective": make_objective("grpo", beta=0.1),
        "credit": [{"name": "aepo", "triggers": None, "window": 1, "kl": "multiplicative"}, "dcpo"],
    },
    "ppo": lambda: {"objective": "ppo", "credit": ["gae"], "critic": Critic(tiny_llama(seed=4), lr=1e-2)},
    "rto": lambda: {
        "objective": "ppo",
        "credit": [make_rollout_credit("rto", model=tiny_llama(seed=5).eval(), kl_target=0.01), "gae"],
        "critic": Critic(tiny_llama(seed=4), lr=1e-2),
    },
}
QUICK = ("refilled", "ppo")


@pytest.mark.parametrize("method", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_it_equals_taking_turns_with_older_weights(tmp_path: Path, method: str) -> None:
    """Bit for bit; prompts that replace filtered ones are sampled from the present weights."""
    model = tiny_llama()
    model.train()
    sampler, own = Behind(model), METHODS[method]()
    own["credit"] = [*own["credit"], "importance"]
    turns = make_online(tmp_path / "turns", model=model, sampler=sampler, **own, **TURNS)
    sampler.trainer = turns
    turns.train()
    ahead = make_online(tmp_path / "ahead", **METHODS[method](), max_staleness=1, **TURNS)
    ahead.train()
    assert entries(tmp_path / "ahead") == entries(tmp_path / "turns")
    models = [(ahead.model, turns.model)] + ([(ahead.critic.model, turns.critic.model)] if ahead.critic else [])
    for one, other in models:
        assert all(
            torch.equal(value, theirs) for value, theirs in zip(one.parameters(), other.parameters(), strict=True)
        )
    staleness = [e["rollout/staleness"] for e in read_log(tmp_path / "ahead" / "log.jsonl") if "rollout/staleness" in e]
    assert staleness[0] == 0
    assert all(0 < s <= 1 for s in staleness[1:])
    assert (min(staleness[1:]) == 1) == (method != "refilled")
    assert not waiting()


def test_with_weights_that_do_not_move_it_equals_taking_turns(tmp_path: Path) -> None:
    settings = {**TURNS, "optim": "sgd", "learning_rate": 1e-30, "eval_dataset": make_prompts(3, seed=1)}
    settings |= {"eval_strategy": "steps", "eval_steps": 3}
    runs = {}
    for name, staleness in (("turns", 0), ("ahead", 1)):
        credit = ["group", "importance"]
        trainer = make_online(tmp_path / name, credit=credit, max_staleness=staleness, **settings)
        trainer.train()
        runs[name] = trainer.rollout_state(), entries(tmp_path / name), (tmp_path / name / ROLLOUT_FILE).read_text()
    assert runs["ahead"] == runs["turns"]


def test_the_weights_are_ratios_to_the_policy_that_sampled(tmp_path: Path) -> None:
    """Against plain forward passes of the policy before and after the updates between sampling and learning."""
    seen: list[tuple[Rollout, Tensor, Any]] = []

    class Looks(Stateless):
        name, phase = "looks", "after"

        def __call__(self, step: Rollout) -> None:
            seen.append((step, step.weights.clone(), copy.deepcopy(step.model)))

    credit = [make_rollout_credit("group"), make_rollout_credit("importance", cap=1.1), Looks()]
    make_online(tmp_path, credit=credit, max_staleness=1, max_steps=3, learning_rate=0.05).train()

    def logps(model: Any, step: Rollout) -> Tensor:
        found = []
        for c, g in enumerate(step.batch.group.tolist()):
            prompt, ids = step.batch.prompt(g), step.batch.completion(c)
            logits = model(input_ids=torch.cat([prompt, ids])[None]).logits[0, len(prompt) - 1 : -1]
            found.append(logits.log_softmax(-1).gather(1, ids[:, None])[:, 0])
        return torch.cat(found).detach()

    for number in (1, 2):
        step, found, model = seen[number]
        ratio = (logps(model, step) - logps(seen[number - 1][2], step)).exp()
        assert float((ratio - 1).abs().max()) > 0.2  # the updates have moved the policy
        torch.testing.assert_close(found, ratio.clamp(max=1.1), rtol=1e-4, atol=1e-4)
        assert float(found.max()) == pytest.approx(1.1)
    assert "importance/capped" in entries(tmp_path)[1]


# ---- Killed and resumed ----

AHEAD: dict[str, Any] = {"max_staleness": 1}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    trainer = build(folder, **AHEAD)
    trainer.train()
    return final(folder, trainer)


KILLS = {
    # Sampling for an evaluation counts as well: rollout, the next one, evaluation, ...
    "sampling ahead": (lambda: kill_in(HFGenerate, "sample", 2), None),
    "between rollout and update": (lambda: kill_in(RolloutBuffer, "__next__", 5), 4),
    "sampling the third ahead": (lambda: kill_in(HFGenerate, "sample", 4, after=True), 4),
    "before the rename": (lambda: kill_in(checkpoint, "publish", 4), 6),
    "in the second rollout's updates": (lambda: kill_in(OnlineTrainer, "finish_step", 8), 6),
}
FAST = ("in the second rollout's updates",)


@pytest.mark.parametrize("point", [p if p in FAST else pytest.param(p, marks=pytest.mark.slow) for p in KILLS])
def test_killed(point: str, tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    patch, step = KILLS[point]

    def work() -> None:
        patch()
        build(tmp_path, **AHEAD).train()

    assert in_child(work) == -signal.SIGKILL
    found = last_complete_checkpoint(tmp_path)
    assert (found.name if found else None) == (step and f"checkpoint-{step}")
    assert found is None or (found / "ahead" / "rank-0.json").exists()
    trainer = build(tmp_path, **AHEAD)
    trainer.train(resume_from_checkpoint=True)
    assert_same(final(tmp_path, trainer), uninterrupted)


def test_a_checkpoint_belongs_to_one_way(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"credit": ["group", "importance"], "save_strategy": "steps", "save_steps": 1}
    make_online(tmp_path, max_steps=1, **settings).train()
    with pytest.raises(RunError, match="max_staleness was None there and is 1 now"):
        make_online(tmp_path, max_staleness=1, max_steps=2, **settings).train(resume_from_checkpoint=True)


def test_a_round_is_shared_out_to_more_or_fewer_ranks() -> None:
    def drawn(place: int) -> tuple[SampledCompletion, ...]:
        return (SampledCompletion([place, k], [-0.1 * k, -1 / 3], None, "stop", context=1) for k in range(2))

    prompts = [PromptItem([1], row=place) for place in range(8)]
    states = []
    for rank in range(4):
        groups = tuple(tuple(drawn(place)) for place in range(rank, 8, 4))
        states.append(packed_round(Rollouts(tuple(prompts[rank::4]), groups, SamplingConfig(), 2.0, {"m": 1.0}), 5))
    states = json.loads(json.dumps(states))
    for world in (1, 2, 4, 8):
        for rank in range(world):
            own = prompts[rank::world]
            found = unpacked_round(states, own, SamplingConfig(seed=3), Ranks(rank, world))
            assert found.step == 5
            assert found().groups == tuple(tuple(drawn(int(prompt.row))) for prompt in own)
            assert found().prompts == tuple(own)


# ---- Errors, interrupts and what is refused ----


def fail_in_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    original = HFGenerate.sample

    def sample(self: Any, *args: Any, **kwargs: Any) -> Rollouts:
        if threading.current_thread().name == "rollout ahead":
            raise RolloutError("row p7: no such token")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(HFGenerate, "sample", sample)


def test_threads_share_no_casts_of_autocast(tmp_path: Path) -> None:
    """With LoRA in bf16 the thread that was first decided how the other's numbers were rounded."""
    assert make_online(tmp_path / "a", max_staleness=1, max_steps=2).accelerator.autocast_handler.cache_enabled is False
    assert make_online(tmp_path / "b", max_steps=2).accelerator.autocast_handler is None


def test_an_error_ahead_arrives_with_its_message_and_the_run_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"minibatches": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 1, "max_staleness": 1}
    with monkeypatch.context() as patched:
        fail_in_thread(patched)
        with pytest.raises(RolloutError, match="row p7: no such token"):
            make_online(tmp_path, **settings).train()
    last = last_complete_checkpoint(tmp_path)
    assert last is not None
    assert last.name == "checkpoint-2"  # what was learned is kept; the rollout that failed is sampled anew
    assert not (last / "ahead").exists()
    trainer = make_online(tmp_path, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.rollout_state()["drawn"] == 8


def test_an_interrupt_leaves_no_thread(tmp_path: Path) -> None:
    class Interrupts(Stateless):
        name, phase = "interrupts", "after"

        def __call__(self, step: Rollout) -> None:
            assert waiting()  # the next one is under way
            raise KeyboardInterrupt

    settings: dict[str, Any] = {"max_new_tokens": 40, "num_generations": 8, "stop_ids": [WANTED], "max_staleness": 1}
    trainer = make_online(tmp_path, credit=["group", Interrupts()], **settings)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not waiting()
    assert trainer.evaluate(make_prompts(1))["eval_length"] > 0  # the sampler can be used again


def test_what_is_refused_by_name(tmp_path: Path) -> None:
    server = {"name": "server", "url": "http://127.0.0.1:9", "model": "m", "refresh": "checkpoint"}
    for settings, message in (
        ({"max_staleness": 2}, "max_staleness is 2; expected 0 .* or 1"),
        ({"max_staleness": True}, "max_staleness is True"),
        ({"max_staleness": 1, "sampler": "continuous"}, "continuous seeds torch's random numbers"),
        ({"max_staleness": 1, "sampler": {"name": "branching", "sampler": "continuous"}}, "continuous seeds"),
        ({"max_staleness": 1, "sampler": {"name": "branching", "sampler": server}}, "branching on a server reads"),
        ({"max_staleness": 1, "objective": "sft"}, "objective 'sft' takes neither advantages nor weights"),
    ):
        with pytest.raises(RecipeError, match=message):
            make_online(tmp_path, **settings)
    wrong = ["stages.train.training.max_staleness=1", "stages.train.sampler=continuous"]
    with pytest.raises(RecipeError, match=r"stages\.train\.training: max_staleness is 1, and the sampler continuous"):
        load_recipe("grpo", overrides=wrong)


def test_branches_and_adapters_are_sampled_ahead(tmp_path: Path) -> None:
    """The frozen base is shared, and what a rollout is sampled from stays as it was."""
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    sampler = {"name": "branching", "quantile": 0.2}
    trainer = make_online(tmp_path, sampler=sampler, peft_config=config, max_staleness=1, max_new_tokens=12)
    assert trainer._copy is not None
    pairs = list(zip(trainer._copy.model.named_parameters(), trainer.model.parameters(), strict=True))
    assert all((own is theirs) == ("lora" not in name) for (name, own), theirs in pairs)
    trainer.train()
    assert max(e["rollout/completions"] for e in entries(tmp_path)) > 12
    assert [e["rollout/staleness"] for e in read_log(tmp_path / "log.jsonl") if "loss" in e] == [0, 1, 1, 1]


# ---- A server, and two ranks ----


class Watched(Served):
    """Remembers what it was asked, and refuses new weights while a prompt is under way."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.drawing, self.asked = 0, list[str]()

    def __call__(self, path: str, body: Any) -> Any:
        drawing = path == "/v1/completions"
        assert drawing or path != "/collective_rpc" or not self.drawing
        self.drawing += drawing
        if drawing:
            time.sleep(0.3)  # longer than the updates
        try:
            self.asked.append(path)
            return super().__call__(path, body)
        finally:
            self.drawing -= drawing


def from_server(folder: Path, url: str, *, resume: bool = False, **settings: Any) -> OnlineTrainer:
    sampler = {"name": "server", "url": url, "model": "m", "refresh": "checkpoint", "timeout": 60}
    settings = {"eval_dataset": make_prompts(2, seed=2), "eval_strategy": "steps", "eval_steps": 2} | settings
    trainer = make_online(folder, sampler=sampler, max_staleness=1, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_server_is_given_weights_between_rollouts_only(ranks: int, tmp_path: Path) -> None:
    served = Watched(tiny_llama())
    with serving(served) as stub:
        if ranks == 1:
            from_server(tmp_path, stub.url, max_steps=4)
        else:  # one of them has the server load weights that both sample from
            on_ranks(ranks, lambda: from_server(tmp_path, stub.url, max_steps=4) and None)
    loads = [i for i, path in enumerate(served.asked) if path == "/collective_rpc"]
    prompts = [served.asked[a:b].count("/v1/completions") for a, b in zip(loads, [*loads[1:], None], strict=True)]
    # Two rollouts from the first weights; then each time one more. An evaluation asks for its 2 prompts.
    assert prompts == [8, 4, 2, 4, 0, 2]
    log = [e for e in read_log(tmp_path / "log.jsonl") if "loss" in e]
    assert [e["rollout/staleness"] for e in log] == [0, 1, 1, 1]
    assert [e["rollout/weights_version"] for e in log] == [1, 1, 2, 4]  # the third is an evaluation's
    assert max(e["mismatch/max_abs"] for e in log[:1]) < 1e-4
    assert min(e["mismatch/max_abs"] for e in log[1:]) > 1e-3
    versions = {e["rollout"]: e["weights"] for e in map(json.loads, (tmp_path / ROLLOUT_FILE).open())}
    assert versions == {0: 1, 1: 1, 2: 2, 3: 4}


@pytest.mark.slow
def test_a_run_with_a_server_resumes(tmp_path: Path) -> None:
    """Exactly, from a checkpoint that holds the rollout under way; another server samples from then on."""
    settings: dict[str, Any] = {"minibatches": 2, "save_strategy": "steps", "save_steps": 3, "eval_strategy": "no"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with serving(Watched(tiny_llama())) as stub:
        expected = weights(from_server(whole, stub.url, max_steps=7, **settings))

        def work() -> None:
            kill_in(OnlineTrainer, "finish_step", 5)
            from_server(parts, stub.url, max_steps=7, **settings)

        assert in_child(work) == -signal.SIGKILL
    assert (parts / "checkpoint-3" / "ahead" / "rank-0.json").exists()
    with serving(Watched(tiny_llama(seed=9))) as stub:
        found = from_server(parts, stub.url, resume=True, max_steps=7, **settings)
    assert all(torch.equal(value, expected[name]) for name, value in weights(found).items())
    assert entries(parts)[-1]["reward/mean"] == entries(whole)[-1]["reward/mean"]


class Deaf(Served):
    """Says that it has loaded new weights, and keeps those it has."""

    def reload(self, body: Any) -> Any:
        return {"results": [None]}


def test_far_weights_are_no_wrong_server(tmp_path: Path) -> None:
    """A policy that moves far in one rollout is behind itself; the server is compared with the policy as it is now."""
    settings: dict[str, Any] = {"max_steps": 3, "learning_rate": 0.5, "eval_strategy": "no"}
    with serving(Served(tiny_llama())) as stub:
        from_server(tmp_path / "right", stub.url, **settings)
    log = [e for e in read_log(tmp_path / "right" / "log.jsonl") if "loss" in e]
    assert max(e["mismatch/mean_abs"] for e in log) > FAR
    with serving(Deaf(tiny_llama())) as stub, pytest.raises(RolloutError, match="differ from the policy's by"):
        from_server(tmp_path / "deaf", stub.url, **settings)


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.05, "minibatches": 2, "max_steps": 5}
    settings |= {"save_strategy": "steps", "save_steps": 3}

    def run(folder: Path, resume: bool = False) -> Any:
        model = tiny_llama(dtype=torch.float64)
        trainer = make_online(folder, model=model, max_staleness=1, **settings)
        trainer.train(resume_from_checkpoint=resume)
        return {n: p.detach().numpy().copy() for n, p in trainer.model.named_parameters()}, trainer.rollout_state()

    one, state = run(tmp_path / "one")
    two = on_ranks(2, lambda: run(tmp_path / "two"))
    assert (tmp_path / "two" / "checkpoint-3" / "ahead" / "rank-1.json").exists()
    (tmp_path / "two" / "checkpoint-5").rename(tmp_path / "gone")
    found = [*two, *on_ranks(2, lambda: run(tmp_path / "two", resume=True)), run(tmp_path / "two", resume=True)]
    for parts, then in found:
        assert then == state
        for name, value in parts.items():
            torch.testing.assert_close(torch.from_numpy(value), torch.from_numpy(one[name]), rtol=1e-6, atol=1e-8)


def test_an_error_ahead_on_one_rank_ends_both(tmp_path: Path) -> None:
    def work() -> tuple[str, str]:
        with pytest.MonkeyPatch.context() as patched:
            if torch.distributed.get_rank() if torch.distributed.is_initialized() else int(os.environ["RANK"]):
                fail_in_thread(patched)
            with pytest.raises((RolloutError, RunError)) as caught:
                make_online(tmp_path, max_staleness=1).train()
        return type(caught.value).__name__, str(caught.value)

    first, last = on_ranks(2, work, timeout=60)
    assert last == ("RolloutError", "row p7: no such token")
    assert first[0] == "RunError"
    assert "on another rank, rank 1: row p7: no such token" in first[1]
