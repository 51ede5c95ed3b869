"""A run killed at any point and resumed gives the same weights, bit for bit, as one never killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, modeling_utils

from tests.training.tiny import make_samples, make_trainer, tiny_llama
from tokengrain.errors import RunError, read_log
from tokengrain.training import checkpoint
from tokengrain.training.checkpoint import last_complete_checkpoint
from tokengrain.training.trainer import PreferenceTrainer

STEPS = 9  # 12 rows, 2 x 2 per step, 3 epochs
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillAt(TrainerCallback):
    """Kills the process at an event of a step."""

    def __init__(self, event: str, step: int) -> None:
        self.event, self.step = event, step

    def _maybe(self, event: str, state: Any) -> None:
        if event == self.event and state.global_step == self.step:
            die()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._maybe("substep", state)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._maybe("before the optimiser", state)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._maybe("after the optimiser", state)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._maybe("log", state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._maybe("saved", state)


def build(
    folder: Path, kind: str, callbacks: list[TrainerCallback] | None = None, **settings: Any
) -> PreferenceTrainer:
    peft_config = None
    if kind == "lora":
        from peft import LoraConfig

        peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 3,
        "logging_steps": 3,  # not at the steps that save: the window of the log has to be resumed too
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "eval_on_start": True,
        "max_tokens_per_microbatch": 40,
        # LoRA dropout stays on here: the random state has to be resumed too.
        "disable_dropout": kind == "full",
    }
    return make_trainer(
        folder,
        make_samples(12),
        model=tiny_llama(),
        objective="dpo",
        eval_dataset=make_samples(5, seed=1),
        peft_config=peft_config,
        callbacks=callbacks,
        **{**defaults, **settings},
    )


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process; its exit code (-9: killed)."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def final(folder: Path, trainer: PreferenceTrainer) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    log = [
        {k: v for k, v in e.items() if k not in TIMES and "runtime" not in k and "per_second" not in k}
        for e in read_log(folder / "log.jsonl")
    ]
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}, log


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch.set_num_threads(1)
    results = {}
    for kind in ("full", "lora"):
        folder = tmp_path_factory.mktemp(kind)
        trainer = build(folder, kind)
        trainer.train()
        assert trainer.state.global_step == STEPS
        results[kind] = final(folder, trainer)
    return results


def resume_and_compare(folder: Path, kind: str, expected: tuple[Any, Any]) -> None:
    trainer = build(folder, kind)
    trainer.train(resume_from_checkpoint=True)
    parameters, log = final(folder, trainer)
    for name, value in expected[0].items():
        assert torch.equal(parameters[name], value), name
    assert log == expected[1]


slow = pytest.mark.slow
POINTS = [
    pytest.param("full", "substep", 0, marks=slow),
    pytest.param("full", "before the optimiser", 2, marks=slow),
    ("full", "after the optimiser", 4),
    pytest.param("full", "log", 6, marks=slow),
    pytest.param("full", "saved", 8, marks=slow),
    ("lora", "substep", 3),
    pytest.param("lora", "after the optimiser", 5, marks=slow),
]


@pytest.mark.parametrize(("kind", "event", "step"), POINTS)
def test_killed_in_training(kind: str, event: str, step: int, tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    code = in_child(lambda: build(tmp_path, kind, [KillAt(event, step)]).train() and None)
    assert code == -signal.SIGKILL
    resume_and_compare(tmp_path, kind, uninterrupted[kind])


def kill_after(target: Any, name: str, calls: int, part: float = 1.0) -> None:
    """Replace a function: its `calls`-th call ends with SIGKILL, after it has (partly) written its files."""
    original, seen = getattr(target, name), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        seen[0] += 1
        if seen[0] == calls:
            if part < 1.0:
                for file in Path(args[1] if len(args) > 1 else kwargs["filename"]).parent.glob("*"):
                    os.truncate(file, int(file.stat().st_size * part))
            die()
        return result

    setattr(target, name, wrapped)


SAVING: dict[str, Callable[[], None]] = {
    "half of the weights": lambda: kill_after(modeling_utils, "safe_save_file", 2, 0.5),
    "weights only": lambda: kill_after(PreferenceTrainer, "_save", 2),
    "optimiser": lambda: kill_after(PreferenceTrainer, "_save_optimizer_and_scheduler", 2),
    "random state": lambda: kill_after(PreferenceTrainer, "_save_rng_state", 2),
    "all but the state file": lambda: kill_after(PreferenceTrainer, "_get_output_dir", 4),
    "everything but the rename": lambda: kill_after(PreferenceTrainer, "_write_state", 2),
    "after the rename": lambda: kill_after(checkpoint, "publish", 2),
    "in rotation": lambda: kill_after(checkpoint, "remove_folder", 1),
}


FAST = ("half of the weights", "everything but the rename", "in rotation")


@pytest.mark.parametrize("point", [p if p in FAST else pytest.param(p, marks=slow) for p in SAVING])
def test_killed_while_saving(point: str, tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    def work() -> None:
        SAVING[point]()
        build(tmp_path, "full").train()

    assert in_child(work) == -signal.SIGKILL
    found = last_complete_checkpoint(tmp_path)
    assert found is not None
    later = point in ("after the rename", "in rotation")
    assert found.name in (("checkpoint-4", "checkpoint-6") if later else ("checkpoint-2",))
    resume_and_compare(tmp_path, "full", uninterrupted["full"])
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["checkpoint-8", "checkpoint-9"]
    assert not (tmp_path / checkpoint.STAGING).exists()


def test_killed_twice(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    assert in_child(lambda: build(tmp_path, "full", [KillAt("log", 4)]).train() and None) == -signal.SIGKILL

    def again() -> None:
        build(tmp_path, "full", [KillAt("substep", 7)]).train(resume_from_checkpoint=True)

    assert in_child(again) == -signal.SIGKILL
    resume_and_compare(tmp_path, "full", uninterrupted["full"])


@slow
def test_killed_from_outside_at_some_moment_in_a_new_interpreter(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    """A real process, killed by another one when its log shows that it is under way."""
    script = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from tests.training.test_resume import build\n"
        "build(Path(sys.argv[1]), 'full').train()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], env={**os.environ})
    log = tmp_path / "log.jsonl"
    while process.poll() is None and not (log.exists() and '"loss"' in log.read_text()):
        pass
    process.kill()
    process.wait()
    resume_and_compare(tmp_path, "full", uninterrupted["full"])


@slow
def test_resuming_a_finished_run_changes_nothing(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    build(tmp_path, "full").train()
    resume_and_compare(tmp_path, "full", uninterrupted["full"])


def test_another_runs_folder_is_refused(tmp_path: Path) -> None:
    build(tmp_path, "full", max_steps=2).train()
    with pytest.raises(RunError, match="earlier run"):
        build(tmp_path, "full").train()
    with pytest.raises(RunError, match="belongs to another run: seed was 3 there and is 4"):
        build(tmp_path, "full", seed=4, data_seed=3).train(resume_from_checkpoint=True)
    constant = {"normaliser": "constant", "max_steps": 2, "overwrite_output_dir": True}
    build(tmp_path, "full", **constant, normaliser_constant=2.0).train()
    with pytest.raises(RunError, match=r"normaliser_constant was 2\.0 there and is 3\.0"):
        build(tmp_path, "full", **constant, normaliser_constant=3.0).train(resume_from_checkpoint=True)
    build(tmp_path, "full", max_steps=2, overwrite_output_dir=True).train()
    with pytest.raises(RunError, match="not a complete checkpoint"):
        build(tmp_path, "full").train(resume_from_checkpoint=str(tmp_path))


def test_best_checkpoint_is_kept_and_named(tmp_path: Path) -> None:
    trainer = build(
        tmp_path,
        "full",
        save_strategy="steps",
        save_steps=2,
        eval_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        max_steps=6,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / f"checkpoint-{trainer.state.best_global_step}")
    evaluated = {e["step"]: e["eval_loss"] for e in read_log(tmp_path / "log.jsonl") if "eval_loss" in e and e["step"]}
    assert trainer.state.best_global_step == min(evaluated, key=lambda step: evaluated[step])
    assert (Path(best) / "model.safetensors").exists()


def test_a_run_that_has_taken_its_last_step_takes_no_other(tmp_path: Path) -> None:
    steps = {"max_steps": 2, "lr_scheduler_type": "constant", "eval_strategy": "no", "save_total_limit": 9}
    whole = build(tmp_path, "full", **steps)
    whole.train()
    again = build(tmp_path, "full", **steps)
    output = again.train(resume_from_checkpoint=True)  # as after a kill behind checkpoint-2
    assert (output.global_step, again.state.global_step) == (2, 2)
    assert output.training_loss == pytest.approx(whole.state.log_history[-1]["train_loss"])
    for mine, other in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, other)
