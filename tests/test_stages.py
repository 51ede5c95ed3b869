"""Running recipes: what is reused, resumed and refused, and what a run leaves behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from tokengrain.cli import main
from tokengrain.errors import DataError, ModelError, NonFiniteLossError, RecipeError, RunError
from tokengrain.models import load_config
from tokengrain.recipe.schema import dump_recipe
from tokengrain.report.html import write_report
from tokengrain.run import folder as run_folder
from tokengrain.run import runner, show, trained
from tokengrain.run.build import length_by_hand
from tokengrain.run.folder import make_plan
from tokengrain.run.load import load_recipe, make_recipe
from tokengrain.run.runner import RunResult, evaluate_run, run_recipe
from tokengrain.runs import read_run
from tokengrain.specs import ModelSpec

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
DPO = {"kind": "train", "objective": {"name": "dpo", "beta": 0.3}}
TGDPO = {
    "sft": {"kind": "sft", "training": {"max_steps": 2}},
    "guide": DPO,
    "credit": {"kind": "annotate", "credit": {"name": "guide", "model": "@guide", "beta": 0.3}},
    "train": {"kind": "train", "data": "@credit", "objective": {"name": "tgdpo", "beta": 0.3, "alpha": 0.5}},
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def write_rows(path: Path, n: int = 12, **extra: Any) -> Path:
    rows = [{"prompt": f"Say {i}.", "chosen": f" nice {i}", "rejected": f" bad {i} oh", **extra} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def values(folder: Path, stage_values: dict[str, Any] | None = None, **over: Any) -> dict[str, Any]:
    rows = folder / "rows.jsonl"
    if not rows.exists():
        write_rows(rows)
    return {
        "method": "test",
        "model": {"config": LLAMA, "tokenizer": {"type": "byte"}},
        "data": {"train": str(rows), "eval_fraction": 0.25},
        "output_dir": str(folder / "run"),
        "training": {
            "per_device_train_batch_size": 3,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_steps": 2,
            "use_cpu": True,
        },
        "stages": stage_values or {"train": DPO},
        **over,
    }


def run(recipe_values: dict[str, Any], **options: Any) -> RunResult:
    return run_recipe(make_recipe(recipe_values), console=Console(quiet=True), **options)


def weights(folder: Path, stage: str = "train") -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / stage / "model" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished TGDPO run; copy it before changing anything."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finished")
    run(values(folder, TGDPO))
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run at `tmp_path / "run"`, with its rows."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


# ---- What a run leaves behind ----


def test_run_folder(finished: Path) -> None:
    found = read_run(finished / "run")
    assert found.status == "done"
    assert [s.name for s in found.stages] == ["init", "sft", "guide", "credit", "train"]
    assert all(s.status == "done" and s.seconds > 0 for s in found.stages)
    assert found.final_stage.name == "train"
    assert [s.name for s in found.credit_stages] == ["credit"]
    assert {"torch", "transformers", "tokengrain"} <= found.info["versions"].keys() | {"tokengrain"}
    for stage in ("sft", "guide", "train"):
        folder = finished / "run" / stage
        assert (folder / "model" / "model.safetensors").is_file()
        assert (folder / "model" / "tokenizer.json").is_file()
        assert (folder / "log.jsonl").is_file()
        assert not list(folder.glob("checkpoint-*"))
        assert not (folder / ".saving").exists()
    assert (finished / "run" / "credit" / "train.parquet").is_file()
    assert (finished / "run" / "credit_samples.json").is_file()


def test_metrics_have_the_interval_before_and_after(finished: Path) -> None:
    metrics = read_run(finished / "run").metrics
    after = metrics["stages"]["train"]["after"]
    assert after["accuracy_low"] <= after["accuracy"] <= after["accuracy_high"]
    assert metrics["stages"]["guide"]["before"]["rewards/margins"] == 0.0
    for stage in ("guide", "train"):  # an exact copy; and stored numbers of the same model, rounding apart
        before = metrics["stages"][stage]["before"]
        assert before["comparison"] == "no difference yet"
        assert [before[f"accuracy{end}"] for end in ("_low", "", "_high")] == [0.0, 0.5, 1.0]
    assert metrics["stages"]["train"]["before"]["rounding"] < 1e-4
    assert "comparison" not in after
    assert "no difference yet" in write_report(finished / "run").read_text()
    assert metrics["final"] == after
    assert metrics["stages"]["credit"]["kind"] == "annotate"
    assert metrics["stages"]["credit"]["rows"] == {"train": 9, "eval": 3}


def test_a_model_folder_loads_in_transformers(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = finished / "run" / "train" / "model"
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    ids = tokenizer("héllo ☃", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "héllo ☃"
    assert model(ids).logits.shape[-1] == len(tokenizer) == 258


def test_bpe_tokenizer_is_trained_on_the_data(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = {"config": LLAMA, "tokenizer": {"type": "bpe", "vocab_size": 270}}
    run(values(tmp_path, {"train": {"kind": "sft", "training": {"max_steps": 1}}}, model=model))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "train" / "model")
    assert len(tokenizer) == 270
    assert len(tokenizer(" nice").input_ids) == 1  # in every row, so it was merged
    assert len(tokenizer(" qqqqq").input_ids) > 3


# ---- Reuse ----


def test_everything_is_reused(copied: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (copied / "run").rglob("*") if p.is_file()}
    result = run(values(copied, TGDPO, output_dir=str(copied / "run")))
    assert result.reused == ["init", "sft", "guide", "credit", "train"]
    assert {p: p.stat().st_mtime_ns for p in (copied / "run").rglob("*") if p.is_file()} == before


def test_the_seconds_are_the_same_when_all_is_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: 0.0))
    monkeypatch.setattr(run_folder, "time", SimpleNamespace(monotonic=lambda: 0.0496))  # 0.050 on disk, 0.0 or 0.1
    recipe = values(tmp_path, {"train": DPO}, training={"max_steps": 1})
    assert run(recipe).metrics == run(recipe).metrics


def test_keys_that_change_no_result_do_not_count(copied: Path) -> None:
    changed = values(copied, TGDPO)
    changed["training"] |= {"logging_steps": 3, "save_steps": 50, "max_tokens_per_microbatch": 64}
    assert all(plan.action == "reuse" for plan in make_plan(make_recipe(changed)))


GONE: dict[str, tuple[Callable[[Path], None], str]] = {
    "removed": (shutil.rmtree, r"model/config.json is not there"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), r"model/model.safetensors is not there"),
    "empty": (lambda m: (m / "model.safetensors").write_bytes(b""), r"model/model.safetensors is damaged"),
    "cut": (lambda m: os.truncate(m / "model.safetensors", 9000), r"model/model.safetensors is damaged or inc"),
    "no config": (lambda m: os.truncate(m / "config.json", 9), r"model/config.json is damaged"),
}


@pytest.mark.parametrize("what", GONE)
def test_a_finished_model_that_is_not_whole_is_no_result(what: str, copied: Path) -> None:
    damage, message = GONE[what]
    folder = copied / "run" / "train"
    before = {name: tensor.clone() for name, tensor in weights(copied).items()}  # of a file that is to be cut
    damage(folder / "model")
    recipe = values(copied, TGDPO, output_dir=str(copied / "run"))
    for dry in (True, False):
        with pytest.raises(RunError, match=rf"^stage 'train' is done, but .*{message}.*; put it back, or remove"):
            run(recipe, dry_run=dry)
    (folder / "stage.json").unlink()  # as the message says
    assert run(recipe).reused == ["init", "sft", "guide", "credit"]
    assert same(weights(copied), before)


def test_a_model_that_nothing_needs_may_be_gone(copied: Path) -> None:
    """To save room, say; but not one that a stage starts from that is yet to run, or an adapter stands on."""
    recipe = values(copied, TGDPO, output_dir=str(copied / "run"))
    shutil.rmtree(copied / "run" / "guide" / "model")
    assert "train" in run(recipe).reused
    (copied / "run" / "train" / "stage.json").unlink()
    assert "train" not in run(recipe).reused  # which takes the guide's tokens from `credit`
    shutil.rmtree(copied / "run" / "credit")
    with pytest.raises(RunError, match=r"^stage 'guide' is done, but its model is not whole"):
        run(recipe)


def test_a_finished_adapter_that_is_not_whole(tmp_path: Path) -> None:
    stages = {"sft": {"kind": "sft", "lora": None, "training": {"max_steps": 1}}, "train": DPO}
    recipe = values(tmp_path, stages, lora={"r": 2})
    run(recipe)
    assert run(recipe).reused == ["init", "sft", "train"]
    (tmp_path / "run" / "sft" / "model" / "model.safetensors").unlink()
    with pytest.raises(RunError, match=r"^stage 'sft' is done, but .*sft/model/model.safetensors is not there"):
        run(recipe)
    (tmp_path / "run" / "train" / "model" / "adapter_model.safetensors").unlink()
    with pytest.raises(RunError, match=r"^stage 'train' is done, but .*/adapter_model.safetensors is not there"):
        run(recipe)
    (tmp_path / "run" / "train" / "model" / "adapter_config.json").unlink()
    with pytest.raises(RunError, match=r"^stage 'train' is done, but .*train/model/"):
        run(recipe)


def test_a_finished_model_in_several_files(copied: Path) -> None:
    folder = copied / "run" / "train" / "model"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(copied / "parts", max_shard_size="8KB")
    parts = sorted((copied / "parts").glob("*.safetensors"))
    assert len(parts) > 1
    (folder / "model.safetensors").unlink()
    shutil.copytree(copied / "parts", folder, dirs_exist_ok=True)
    recipe = values(copied, TGDPO, output_dir=str(copied / "run"))
    assert "train" in run(recipe).reused
    (folder / parts[-1].name).unlink()
    with pytest.raises(RunError, match=rf"{parts[-1].name} is not there"):
        run(recipe)


def changed_stage(name: str, **objective: Any) -> dict[str, Any]:
    stage = TGDPO[name]
    return {**TGDPO, name: {**stage, "objective": {**stage["objective"], **objective}}}


def test_other_settings_are_another_run(copied: Path) -> None:
    before = weights(copied)
    with pytest.raises(RunError, match=r"stage 'train' differs: objective.beta: 0.3 there, 0.7 here.*--overwrite"):
        run(values(copied, changed_stage("train", beta=0.7)))
    assert same(weights(copied), before)
    assert read_run(copied / "run").status == "done"


def test_overwrite_replaces_only_what_differs(copied: Path) -> None:
    before = weights(copied)
    guide = weights(copied, "guide")
    result = run(values(copied, changed_stage("train", beta=0.7)), overwrite=True)
    assert result.reused == ["init", "sft", "guide", "credit"]
    assert same(weights(copied, "guide"), guide)
    assert not same(weights(copied), before)


def test_stages_after_a_changed_one_run_again(copied: Path) -> None:
    plans = make_plan(make_recipe(values(copied, changed_stage("guide", beta=0.7))), overwrite=True)
    assert [p.action for p in plans] == ["reuse", "reuse", "run", "run", "run"]


def test_other_data_are_another_run(copied: Path) -> None:
    write_rows(copied / "rows.jsonl", n=13)
    with pytest.raises(RunError, match="stage 'init' differs: data: other content"):
        run(values(copied, TGDPO))


def test_the_seed_counts(copied: Path) -> None:
    with pytest.raises(RunError, match="seed: 0 there, 1 here"):
        run(values(copied, TGDPO, seed=1))


def test_a_run_can_be_extended(copied: Path) -> None:
    longer = {**TGDPO, "second": {**DPO, "model": "@train", "training": {"max_steps": 1}}}
    assert run(values(copied, longer)).reused == ["init", "sft", "guide", "credit", "train"]
    assert read_run(copied / "run").final_stage.name == "second"


# ---- Folders that are not this run's ----


def test_another_methods_folder_is_refused(copied: Path) -> None:
    with pytest.raises(RunError, match="holds a run of method test, this is other"):
        run(values(copied, TGDPO, method="other"))


def test_a_folder_without_a_stage_of_the_recipe_is_refused(copied: Path) -> None:
    with pytest.raises(RunError, match="it has a stage 'guide', this recipe has none"):
        run(values(copied, {"sft": TGDPO["sft"], "train": DPO}))
    run(values(copied, {"sft": TGDPO["sft"], "train": DPO}), overwrite=True)
    assert not (copied / "run" / "guide").exists()


def test_a_folder_that_is_no_run_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(RunError, match="not empty and not a run of tokengrain"):
            run(values(tmp_path), overwrite=overwrite)
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years of work"


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    run(values(tmp_path), dry_run=True)
    assert not (tmp_path / "run").exists()


def test_evaluation_without_held_out_rows_is_an_error_before_the_run(tmp_path: Path) -> None:
    recipe = values(tmp_path)
    recipe["data"]["eval_fraction"] = 0
    recipe["training"]["eval_strategy"] = "steps"
    with pytest.raises(RecipeError, match=r"^stages.train: eval_strategy is 'steps', and there are no held-out rows"):
        run(recipe, dry_run=True)


# ---- Interrupted and failed runs ----


def at_step(step: int, action: Callable[[], None], monkeypatch: pytest.MonkeyPatch, stage: str = "train") -> None:
    """Let `action` happen at the end of this optimiser step of a stage that trains."""
    original = show.ShowProgress.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        if state.global_step == step and self.name == stage:
            action()

    monkeypatch.setattr(show.ShowProgress, "on_step_end", on_step_end)


def test_ctrl_c_in_the_last_step_of_a_stage_stops_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = {"first": DPO, "train": {**DPO, "model": "@first"}}
    with monkeypatch.context() as patch:
        at_step(4, lambda: os.kill(os.getpid(), signal.SIGINT), patch, "first")
        with pytest.raises(KeyboardInterrupt):
            run(values(tmp_path, stages))
    found = read_run(tmp_path / "run")
    assert {stage.name: stage.status for stage in found.stages}["first"] == "done"
    assert found.status == "interrupted"
    assert not (tmp_path / "run" / "train").exists()
    assert run(values(tmp_path, stages)).reused == ["init", "first"]


def test_ctrl_c_in_the_last_step_of_a_run_lets_it_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(4, lambda: os.kill(os.getpid(), signal.SIGINT), monkeypatch)
    run(values(tmp_path))
    assert read_run(tmp_path / "run").status == "done"


def _fail() -> None:
    raise RuntimeError("the machine caught fire")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights of a run that nothing interrupted."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("undisturbed")
    run(values(folder))
    return weights(folder)


def test_ctrl_c_saves_and_the_run_goes_on(
    tmp_path: Path, undisturbed: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = signal.getsignal(signal.SIGINT)  # a shell's background jobs start with it ignored
    with monkeypatch.context() as patch:
        at_step(3, lambda: os.kill(os.getpid(), signal.SIGINT), patch)
        with pytest.raises(KeyboardInterrupt):
            run(values(tmp_path))
    found = read_run(tmp_path / "run")
    assert found.status == "interrupted"
    assert [s.status for s in found.stages] == ["done", "interrupted"]
    assert (tmp_path / "run" / "train" / "checkpoint-3").is_dir()
    with pytest.raises(RunError, match=r"not finished .*checkpoint at step 3.*to continue: tokengrain train"):
        _ = found.final_stage
    assert [p.action for p in make_plan(make_recipe(values(tmp_path)))] == ["reuse", "resume"]
    assert signal.getsignal(signal.SIGINT) is handler
    run(values(tmp_path))
    assert same(weights(tmp_path), undisturbed)
    assert [row["step"] for row in read_run(tmp_path / "run").stages[1].log() if "learning_rate" in row] == [
        1,
        2,
        3,
        4,
    ]


def test_a_failed_run_goes_on_from_its_checkpoint(
    tmp_path: Path, undisturbed: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        at_step(3, _fail, patch)
        with pytest.raises(RuntimeError, match="fire"):
            run(values(tmp_path))
    assert read_run(tmp_path / "run").status == "failed"
    assert (tmp_path / "run" / "train" / "checkpoint-2").is_dir()
    run(values(tmp_path))
    assert same(weights(tmp_path), undisturbed)


def test_an_unfinished_stage_of_other_settings_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        at_step(3, _fail, patch)
        with pytest.raises(RuntimeError):
            run(values(tmp_path))
    other = values(tmp_path)
    other["training"]["learning_rate"] = 1e-3
    with pytest.raises(RunError, match=r"training.learning_rate: 0.01 there, 0.001 here"):
        run(other)
    run(other, overwrite=True)
    assert read_run(tmp_path / "run").status == "done"


def test_the_stored_recipe_continues_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        at_step(3, _fail, patch)
        with pytest.raises(RuntimeError):
            run(values(tmp_path))
    plans = make_plan(load_recipe(tmp_path / "run" / "recipe.yaml"))
    assert [p.action for p in plans] == ["reuse", "resume"]


def test_a_full_disk_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trained.Train, "run", full)
    with pytest.raises(RunError, match=r"no space left on the device.*What was finished is kept.*tokengrain train"):
        run(values(tmp_path))
    assert [s.status for s in read_run(tmp_path / "run").stages] == ["done", "failed"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    recipe = values(tmp_path)
    recipe["training"] |= {"learning_rate": 1e17, "max_grad_norm": 0.0}
    with pytest.raises(NonFiniteLossError):
        run(recipe)
    assert read_run(tmp_path / "run").status == "failed"


# ---- Bad input, before anything is trained ----


def test_bad_rows_stop_the_run_before_training(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    rows.write_text(rows.read_text() + json.dumps({"prompt": "Say.", "chosen": "same", "rejected": "same"}) + "\n")
    with pytest.raises(DataError, match=r"rows.jsonl: row 12"):
        run(values(tmp_path, TGDPO))
    assert not (tmp_path / "run" / "sft").exists()


def test_missing_data_leave_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing.jsonl"):
        run(values(tmp_path, data={"train": str(tmp_path / "nothing.jsonl")}))
    assert not (tmp_path / "run").exists()


def test_objectives_that_need_token_rewards_must_get_them(tmp_path: Path) -> None:
    stage = {"kind": "train", "objective": "tgdpo"}
    with pytest.raises(DataError, match=r"stage 'train' needs token_rewards.*chosen_token_rewards"):
        run(values(tmp_path, {"train": stage}))
    with pytest.raises(DataError, match="needs ref_logps"):
        run(values(tmp_path, {"train": {**DPO, "reference": "columns"}}, output_dir=str(tmp_path / "other")))


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model at .*nothing; there is no such folder"):
        run(values(tmp_path, model=str(tmp_path / "nothing")))
    assert not (tmp_path / "run").exists()


def test_a_misspelt_model_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"no model at my-modle; there is no .*did you mean 'my-model'\? \("):
        run(values(tmp_path, model="my-modle"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: LlamaConfig())  # as if the hub had it
    with pytest.warns(UserWarning, match="my-modle; there is no such folder, did you mean 'my-model'"):
        load_config(ModelSpec(path="my-modle"), "my-modle")


def test_a_guide_with_another_vocabulary(finished: Path, tmp_path: Path) -> None:
    other = {"config": LLAMA, "tokenizer": {"type": "bpe", "vocab_size": 270}}
    run(values(tmp_path, {"train": {"kind": "sft", "training": {"max_steps": 1}}}, model=other))
    stage = {
        "kind": "train",
        "objective": "tgdpo",
        "credit": {"name": "guide", "model": str(tmp_path / "run" / "train" / "model")},
    }
    recipe = values(tmp_path, {"train": stage}, model=str(finished / "run/sft/model"), output_dir=str(tmp_path / "b"))
    with pytest.raises(ModelError, match=r"258 tokens .*270"):
        run(recipe)


def test_annotation_of_another_start_is_refused(tmp_path: Path) -> None:
    """The stored reference log-probabilities are those of the model that the credit stage names."""
    other_start = {**TGDPO, "train": {**TGDPO["train"], "model": "@guide"}}
    with pytest.raises(RunError, match="annotated with another model"):
        run(values(tmp_path, other_start))


# ---- Other ways to give credit, references, adapters ----


def test_live_credit_and_credit_from_the_data(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "rows.jsonl",
        chosen_token_rewards=[{"start": 0, "end": 5, "reward": 1.0}],
        rejected_token_rewards=[{"start": 0, "end": 4, "reward": -1.0}],
    )
    live = {"kind": "train", "objective": "tgdpo", "credit": {"name": "random", "seed": 3}}
    stored = {"kind": "train", "objective": "tgdpo", "model": "@init"}
    result = run(values(tmp_path, {"live": live, "stored": stored}))
    assert not same(weights(tmp_path, "live"), weights(tmp_path, "stored"))
    assert "accuracy" in result.metrics["final"]


def test_contrastive_credit(tmp_path: Path) -> None:
    credit = {"name": "contrastive", "templates": {"better": "Nice: {prompt}", "worse": "Bad: {prompt}"}}
    treg = {"kind": "train", "data": "@credit", "objective": "treg"}
    result = run(values(tmp_path, {"credit": {"kind": "annotate", "credit": credit}, "train": treg}))
    assert "accuracy" in result.metrics["final"]


def test_lora_trains_an_adapter_and_goes_on_with_it(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    lora = {"r": 2, "alpha": 4}
    two = {"sft": TGDPO["sft"] | {"lora": None}, "first": DPO, "second": {**DPO, "model": "@first"}}
    result = run(values(tmp_path, two, lora=lora))
    for name in ("first", "second"):
        folder = tmp_path / "run" / name / "model"
        assert (folder / "adapter_config.json").is_file()
        assert not (folder / "model.safetensors").exists()
    assert result.metrics["stages"]["second"]["before"]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    adapters = [load_file(tmp_path / "run" / n / "model" / "adapter_model.safetensors") for n in ("first", "second")]
    assert not same(*adapters)
    assert evaluate_run(tmp_path / "run")["held_out"]["accuracy"] == result.metrics["final"]["accuracy"]
    other = {**two, "third": {**DPO, "model": "@first", "lora": {"r": 3}}}
    with pytest.raises(ModelError, match=r"lora.r is 3.*where it is 2"):
        run(values(tmp_path, other, lora=lora))


def test_evaluation_repeats_the_runs_numbers(finished: Path, tmp_path: Path) -> None:
    found = evaluate_run(finished / "run")
    after = read_run(finished / "run").metrics["final"]
    assert found["held_out"]["accuracy"] == after["accuracy"]
    assert found["rows"] == read_run(finished / "run").metrics["stages"]["train"]["held_out"]
    assert found["held_out"]["loss"] == pytest.approx(after["loss"], rel=1e-5)
    assert json.loads((finished / "run" / "evaluation.json").read_text()) == found
    rows = write_rows(tmp_path / "more.jsonl", n=3)
    assert evaluate_run(finished / "run", data=str(rows))["data"] == str(rows)
    with pytest.raises(RunError, match="samples is 4, but nothing is sampled"):
        evaluate_run(finished / "run", samples=4)


def test_evaluation_of_a_folder_whose_name_is_a_number(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished / "run", tmp_path / "2024")
    monkeypatch.chdir(tmp_path)
    assert evaluate_run("2024")["held_out"] == evaluate_run(finished / "run")["held_out"]


def test_an_edited_template_file_is_another_run(tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    recipe = values(tmp_path, data={"train": str(write_rows(tmp_path / "pairs.jsonl")), "chat_template": str(template)})
    marks = []
    for text in ("{% if x %}a{% endif %}", "{% if x %}b{% endif %}"):
        template.write_text(text)
        marks.append([plan.fingerprint for plan in make_plan(make_recipe(recipe))])
    assert not set(marks[0]) & set(marks[1])


def test_a_template_file_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chat.jinja").write_text("{% if x %}a{% endif %}")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    data = {"train": str(write_rows(tmp_path / "pairs.jsonl")), "chat_template": "chat.jinja"}
    recipe = make_recipe(values(tmp_path, data=data))
    Path("saved.yaml").write_text(dump_recipe(recipe, anchored=True))
    here = [plan.fingerprint for plan in make_plan(recipe)]
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert [plan.fingerprint for plan in make_plan(load_recipe(tmp_path / "saved.yaml"))] == here


def test_a_stage_cannot_take_an_option_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"stages.train.shard_rows: unknown key"):
        make_recipe(values(tmp_path, {"train": {**DPO, "shard_rows": 3}}))


def test_adapter_off_is_the_reference_whatever_the_rows_bring(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    n = [len(side.encode()) + 1 for side in (" good", " bad")]  # bytes and EOS
    logps = {"chosen_ref_logps": [-1.0] * n[0], "rejected_ref_logps": [-9.0] * n[1]}
    rows = [{"prompt": f"p{i}", "chosen": " good", "rejected": " bad", **logps} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    margins = {}
    for reference in ("columns", "adapter_off"):
        folder = tmp_path / reference
        stage = {**DPO, "reference": reference, "lora": {"r": 2}}
        recipe = values(tmp_path, {"train": stage})
        result = run({**recipe, "output_dir": str(folder / "run")})
        margins[reference] = result.metrics["stages"]["train"]["before"]["rewards/margins"]
        after = result.metrics["final"]["rewards/margins"]
        assert evaluate_run(folder / "run")["held_out"]["rewards/margins"] == pytest.approx(after, abs=1e-5)
    assert abs(margins["columns"]) > 1
    assert margins["adapter_off"] == pytest.approx(0.0, abs=1e-6)


# ---- Run folders are not trusted, and belong to one process at a time ----


def edited_run(folder: Path, **changes: Any) -> None:
    path = folder / "run" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", ["{other}", "../other", "guide/../../other", "", 3, None, "checkpoint-2", "a\n"])
def test_a_stage_of_a_run_folder_has_a_plain_name(copied: Path, name: Any) -> None:
    victim = copied / "other"
    victim.mkdir()
    (victim / "thesis.tex").write_text("years of work")
    shutil.copy(copied / "run" / "guide" / "stage.json", victim)
    listed = name.format(other=victim) if isinstance(name, str) else name
    edited_run(copied, status="interrupted", stages=[{"name": listed, "kind": "train", "fingerprint": "x"}])
    for overwrite in (False, True):
        with pytest.raises(RunError, match=r"run\.json is damaged: a stage is called .*; expected letters"):
            run(values(copied, changed_stage("train", beta=0.7)), overwrite=overwrite)
    assert (victim / "thesis.tex").read_text() == "years of work"


def test_nothing_is_written_or_removed_behind_a_link(copied: Path) -> None:
    victim = copied / "other"
    shutil.move(copied / "run" / "train", victim)
    (copied / "run" / "train").symlink_to(victim)
    before = sorted(p.name for p in victim.iterdir())
    with pytest.raises(RunError, match=r"run/train links to .*other, outside the run folder; remove it"):
        run(values(copied, changed_stage("train", beta=0.7)), overwrite=True)
    assert sorted(p.name for p in victim.iterdir()) == before


def test_a_run_folder_may_itself_be_a_link(copied: Path) -> None:
    shutil.move(copied / "run", copied / "elsewhere")
    (copied / "run").symlink_to(copied / "elsewhere")
    assert run(values(copied, changed_stage("train", beta=0.7)), overwrite=True).reused == [
        "init",
        "sft",
        "guide",
        "credit",
    ]


def test_a_folder_in_use_is_refused_and_one_of_a_dead_process_is_not(copied: Path) -> None:
    holder = (
        "import sys, time; from pathlib import Path; from tokengrain.run.folder import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", holder, copied / "run"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match=rf"run is in use by process {process.pid} on .*, since 20"):
            run(values(copied, TGDPO))
        run(values(copied, TGDPO), dry_run=True)
        process.kill()
    assert (copied / "run" / ".lock").exists()
    assert len(run(values(copied, TGDPO)).reused) == 5
    assert not (copied / "run" / ".lock").exists()


LOSS = """
from pathlib import Path

Path(__file__).with_name("ran").touch()

def loss(logps, segments):
    from tokengrain.methods.dpo import sft_loss

    return sft_loss(logps, segments)
"""


@pytest.mark.parametrize("command", ["evaluate", "bench", "inspect"])
def test_code_that_a_run_folder_names_is_not_run(
    copied: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    code = copied / "run" / "evil.py"
    code.write_text(LOSS)
    path = copied / "run" / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    named = f"{code}:loss"
    if command == "inspect":
        recipe["data"]["spans"] = named
    else:
        recipe["stages"]["train"]["objective"] = {"name": named}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    arguments = {
        "evaluate": ["evaluate", str(copied / "run")],
        "bench": ["bench", "credit", "--data", str(copied / "rows.jsonl"), "--source", str(copied / "run")],
        "inspect": ["inspect", str(copied / "run"), "--column", "spans"],
    }[command]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    message = " ".join(capsys.readouterr().err.split())
    assert stop.value.code == 2
    assert f"{path} names '{named}', which would be used now; read it, then say --trust-run-code" in message
    assert not (copied / "run" / "ran").exists()
    with pytest.raises(SystemExit):
        main([*arguments, "--trust-run-code"])
    assert (copied / "run" / "ran").exists()


def test_a_models_own_code_is_not_run_either(copied: Path) -> None:
    path = copied / "run" / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    recipe["stages"]["guide"]["model"] = {"path": "@sft", "trust_remote_code": True}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    with pytest.raises(RunError, match=r"names trust_remote_code \(recipe\.stages\.guide\.model\)"):
        evaluate_run(copied / "run")


def test_a_world_is_read_no_further_than_its_positions(tmp_path: Path) -> None:
    """The max_length of a recipe is for models that people have: on a world it neither warns nor lifts."""
    for model, data, expected in (
        ("world://stories",) * 2 + (None,),
        ("a/model", str(write_rows(tmp_path / "r.jsonl")), 2048),
    ):
        recipe = load_recipe("dpo", model, data, overrides=["settings=paper", "data.max_length=2048"])
        assert length_by_hand(recipe, recipe.data) == expected
