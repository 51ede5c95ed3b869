"""Online training with its other parts: a critic, a teacher without rewards, a server, branches, a text tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.rollout import stub
from tests.training.online.tiny import make_online, make_prompts
from tests.training.test_resume import KillAt, in_child
from tests.training.tiny import tiny_llama, weights
from tokengrain.errors import DataError, NonFiniteLossError, RolloutError, read_log
from tokengrain.loss import LossOutput
from tokengrain.method import make_objective
from tokengrain.rollout import transfer
from tokengrain.rollout.branching import Branching
from tokengrain.rollout.local import HFGenerate
from tokengrain.runs import ROLLOUT_FILE
from tokengrain.scoring.head import Distribution, Teacher
from tokengrain.scoring.score import head_of, score
from tokengrain.training.checkpoint import last_complete_checkpoint
from tokengrain.training.critic import Critic


def test_ppo_with_a_critic_resumes_exactly(tmp_path: Path) -> None:
    def one(name: str, callbacks: Any = None) -> Any:
        torch.manual_seed(0)
        return make_online(
            tmp_path / name,
            objective="ppo",
            normaliser="token_mean",
            credit=[{"name": "gae", "lam": 0.9}],
            critic=Critic(tiny_llama(seed=4), lr=1e-3),
            minibatches=2,
            rollout_epochs=2,
            max_steps=7,
            save_strategy="steps",
            save_steps=3,
            callbacks=callbacks,
        )

    whole = one("whole")
    before = {n: p.detach().clone() for n, p in whole.critic.model.named_parameters()}
    whole.train()
    after = dict(whole.critic.model.named_parameters())
    assert any(not torch.equal(p, before[n]) for n, p in after.items())
    assert all("critic/loss" in e for e in whole.state.log_history if "loss" in e)
    assert in_child(lambda: one("parts", [KillAt("before the optimiser", 5)]).train() and None) == -9
    parts = one("parts")
    parts.train(resume_from_checkpoint=True)
    for ours, theirs in ((parts.model, whole.model), (parts.critic.model, whole.critic.model)):
        for (name, value), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert torch.equal(value, other), name
    last = last_complete_checkpoint(tmp_path / "parts")
    assert last is not None
    assert (last / "critic").is_dir()


def test_a_teacher_and_no_rewards(tmp_path: Path) -> None:
    """On-policy distillation: the divergence to the teacher falls on the policy's own samples."""
    target = tiny_llama(seed=9).eval()

    def teacher(batch: Any) -> Teacher:
        hidden = score(target, batch, ("hidden",)).hidden
        assert hidden is not None
        return Teacher(Distribution(hidden, head_of(target).detach()), None, slope=0.0, offset=1.0)

    trainer = make_online(
        tmp_path,
        rewards=None,
        objective=make_objective("aligndistil", beta0=1.0),
        teacher=teacher,
        max_steps=25,
        prompts_per_rollout=8,
        lr_scheduler_type="constant",
    )
    trainer.train()
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert not any(name.startswith("reward") for e in trainer.state.log_history for name in e)
    assert "eval_length" in trainer.evaluate(make_prompts(3))


class Served:
    """Stands for a server: knows only what was saved to disk for it."""

    name, how = "served", "checkpoint"

    def __init__(self) -> None:
        self.weights = 0
        self.inner: Any = None

    def refresh(self, path: Any) -> None:
        self.inner = HFGenerate(AutoModelForCausalLM.from_pretrained(path))
        self.weights += 1

    def release(self) -> None:
        self.inner = None

    def sample(self, prompts: Any, **kwargs: Any) -> Any:
        return self.inner.sample(prompts, **kwargs)


def test_a_server_samples_from_the_present_weights(tmp_path: Path) -> None:
    served = Served()
    trainer = make_online(tmp_path / "served", sampler=served, minibatches=2, max_steps=6)
    trainer.train()
    assert served.weights == 3  # one per rollout
    assert served.inner is None
    assert not (tmp_path / "served" / ".sampler").exists()
    direct = make_online(tmp_path / "direct", minibatches=2, max_steps=6)
    direct.train()
    for name, value in weights(direct.model).items():
        torch.testing.assert_close(weights(trainer.model)[name], value, rtol=1e-4, atol=1e-5)


def _refuses(body: Any) -> Any:
    raise ValueError("No such file or directory")


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "another model that keeps its weights": (
        {"reload": lambda body: {"results": [None]}},
        "expected a server started with",
    ),
    "no such folder, or another architecture": ({"reload": _refuses}, r"status 500: No such file.*, which reads /"),
    "a shorter context": ({"longest": 5}, "longer than the server's max_model_len.*expected at most 5"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_server_that_does_not_fit_is_an_error_before_the_first_step(case: str, tmp_path: Path) -> None:
    changes, message = UNFIT[case]
    served = stub.Served(tiny_llama(seed=99))
    vars(served).update(changes)
    with stub.serving(served) as server, pytest.raises((RolloutError, DataError), match=message):
        train_from(tmp_path, server.url)
    assert not [entry for entry in read_log(tmp_path / "log.jsonl") if "loss" in entry]


def train_from(folder: Path, url: str, resume: bool = False) -> Any:
    sampler = {"name": "server", "url": url, "model": "m", "refresh": "checkpoint", "retries": 1, "backoff": 0.01}
    trainer = make_online(folder, sampler=sampler, save_strategy="steps", save_steps=1, max_steps=2)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_server_that_dies_is_asked_within_a_bound_and_the_run_resumes(tmp_path: Path) -> None:
    served = stub.Served(tiny_llama())
    with stub.serving(served) as server:
        known = server.answer

        def dies(path: str, body: Any) -> Any:
            if served.loaded[1:]:  # in the second rollout
                raise ValueError("EngineDeadError")
            return known(path, body)

        server.answer = dies
        with pytest.raises(RolloutError, match=r"EngineDeadError \(attempts: 2"):
            train_from(tmp_path, server.url)
        server.answer = known
        trainer = train_from(tmp_path, server.url, resume=True)
    assert trainer.state.global_step == 2
    assert len([entry for entry in trainer.state.log_history if "loss" in entry]) == 2


ENGINES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sglang": (stub.ServedBySglang, {"flavour": "sglang", "refresh": "checkpoint"}),
    "sglang, adapter": (stub.ServedBySglang, {"flavour": "sglang", "refresh": "adapter"}),
    "vllm, nccl": (stub.Served, {"refresh": "nccl"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_train_and_resume(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollouts from the present weights; and with another server after a stop, as if there had been none."""
    from peft import LoraConfig

    monkeypatch.setattr(transfer, "Nccl", stub.Tcp)
    kind, given = ENGINES[engine]
    adapted = given["refresh"] == "adapter"

    def train(name: str, steps: int, resume: bool = False) -> Any:
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if adapted else None
        with stub.serving(kind(tiny_llama(seed=0 if adapted else 5 + steps))) as server:
            sampler = {"name": "server", "url": server.url, "model": "m", "timeout": 60, **given}
            settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
            trainer = make_online(tmp_path / name, sampler=sampler, peft_config=config, max_steps=steps, **settings)
            trainer.train(resume_from_checkpoint=resume)
        log = [entry for entry in read_log(tmp_path / name / "log.jsonl") if "loss" in entry]
        assert len(log) == steps
        assert max(entry["mismatch/max_abs"] for entry in log) < 1e-4
        return weights(trainer.model)

    whole = train("whole", 4)
    train("parts", 2)
    parts = train("parts", 4, resume=True)
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


@pytest.mark.slow
def test_training_goes_on_with_the_servers_that_are_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two share the rollouts; the second dies in the second one. The policy is that of one server alone."""
    found = {}
    for name in ("alone", "two"):
        first, second = (stub.Served(tiny_llama(seed=seed)) for seed in (8, 9))
        with stub.serving(first) as one, stub.serving(second) as two:

            def dies(path: str, body: Any, two: Any = two, known: Any = two.answer) -> Any:
                if sum(asked == "/v1/completions" for asked, _ in two.requests) >= 3:
                    two.faults[:] = ["drop"] * 200
                return known(path, body)

            two.answer = dies
            one.delay = two.delay = 0.02
            urls = [one.url] if name == "alone" else [one.url, two.url]
            sampler = {
                "name": "server",
                "url": urls,
                "model": "m",
                "refresh": "checkpoint",
                "retries": 1,
                "backoff": 0.01,
            }
            trainer = make_online(tmp_path / name, sampler=sampler, max_steps=4)
            trainer.train()
            found[name] = weights(trainer.model)
    assert all(torch.equal(value, found["two"][name]) for name, value in found["alone"].items())
    log = [entry for entry in read_log(tmp_path / "two" / "log.jsonl") if "loss" in entry]
    assert "the other servers do its work until the next refresh" in caplog.text
    assert max(entry["mismatch/max_abs"] for entry in log) < 1e-4


def test_branches_join_the_group_and_are_recorded(tmp_path: Path) -> None:
    model = tiny_llama()
    sampler = Branching(HFGenerate(model), model, window=2, quantile=0.6, per_prompt=2)
    trainer = make_online(
        tmp_path, model=model, sampler=sampler, max_steps=2, rollout_samples=8, max_tokens_per_microbatch=40
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["rollout/completions"] > 12
    assert log["rollout/tokens"] < log["rollout/completions"] * log["rollout/length"]
    assert log["ratio/mean"] == pytest.approx(1.0, abs=1e-5)
    entries = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert all(len(e["advantages"]) == len(e["ids"]) == len(e["ratio"]) for e in entries)
    assert len({len(e["prompt_ids"]) for e in entries if e["rollout"] == 0}) > 1  # a branch's context comes before it
    assert trainer.evaluate(make_prompts(4))["eval_length"] > 0


def test_rows_of_text_and_rewards_by_name(tmp_path: Path) -> None:
    from tokengrain.worlds import load_world

    world: Any = load_world("world://stories")
    tokenizer = world.tokenizer
    rows = [{"prompt": tokenizer.decode([5 + i]), "id": i, "answer": "x"} for i in range(6)]
    model = tiny_llama(vocab_size=len(tokenizer))
    trainer = make_online(
        tmp_path,
        model=model,
        train_dataset=rows,
        processing_class=tokenizer,
        rewards=[{"name": "exact", "weight": 0.5}, lambda completions: [float(len(c)) for c in completions]],
        max_steps=2,
        stop_ids=None,
    )
    trainer.train()
    assert trainer.state.log_history[0]["reward/exact/mean"] == 0.0
    first = json.loads((tmp_path / "rollouts.jsonl").read_text().splitlines()[0])
    assert first["text"] == tokenizer.decode(first["ids"])
    assert [len(first["tokens"]), first["rewards"]["<lambda>"] > 0] == [len(first["ids"]), True]


def test_a_loss_that_is_not_finite_stops_and_comes_again(tmp_path: Path) -> None:
    def one(bad: bool) -> Any:
        def loss(logps: Any, segments: Any, *, advantages: torch.Tensor, old_logps: torch.Tensor) -> LossOutput:
            losses = segments.mean(-advantages * torch.exp(logps - old_logps))
            calls.append(1)
            return LossOutput(losses / (0.0 if bad and len(calls) == 4 else 1.0), unit="completions")

        calls: list[int] = []
        return make_online(
            tmp_path / str(bad),
            objective=make_objective(loss, unit="completions"),
            minibatches=2,
            rollout_epochs=2,
            max_steps=6,
            save_strategy="steps",
            save_steps=10,
        )

    with pytest.raises(NonFiniteLossError, match="optimiser step 4"):
        one(True).train()
    found = last_complete_checkpoint(tmp_path / "True")
    assert found is not None
    assert found.name == "checkpoint-3"
    whole = one(False)
    whole.train()
    found.rename(tmp_path / "False" / "checkpoint-3")
    again = one(False)
    again.train(resume_from_checkpoint=str(tmp_path / "False" / "checkpoint-3"))
    for name, value in weights(whole.model).items():
        assert torch.equal(weights(again.model)[name], value), name


def test_a_prompt_that_stands_twice_in_a_rollout_is_recorded_with_its_own_ratios(tmp_path: Path) -> None:
    for seed in range(3):
        trainer = make_online(
            tmp_path / str(seed),
            train_dataset=make_prompts(2),
            num_generations=2,
            minibatches=4,
            rollout_epochs=2,
            max_steps=16,
            stop_ids=list(range(30)),
            seed=seed,
        )
        trainer.train()
        entries = read_log(tmp_path / str(seed) / ROLLOUT_FILE)
        assert [len(e["ratio"]) for e in entries] == [len(e["ids"]) for e in entries]
        assert len({len(e["ids"]) for e in entries}) > 1
