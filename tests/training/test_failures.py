"""What bad input, a full disk and a loss that is not finite get: a clear error, and nothing lost."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.mounts import may_mount, small_disk
from tests.training.tiny import VOCABULARY, make_samples, make_trainer, tiny_config, tiny_llama
from tokengrain.batch import Completion, Sample, Segments
from tokengrain.errors import DataError, ModelError, NonFiniteLossError, RecipeError, RunError, read_log
from tokengrain.loss import LossOutput
from tokengrain.method import make_credit
from tokengrain.methods.dpo import dpo_loss
from tokengrain.training.checkpoint import JsonlLog, last_complete_checkpoint

# ---- Input that does not fit ----


def test_other_vocabularies_are_named_with_both_sizes(tmp_path: Path) -> None:
    other = tiny_llama(vocab_size=50)
    with pytest.raises(ModelError, match=f"reference has a vocabulary of 50 tokens, the policy of {VOCABULARY}"):
        make_trainer(tmp_path, make_samples(2), objective="dpo", reference=other)
    guide = make_credit("guide", model=other, reference=tiny_llama(), beta=0.1)
    rows = make_samples(2)
    with pytest.raises(ModelError, match=f"guide has a vocabulary of 50 tokens, the policy of {VOCABULARY}"):
        make_trainer(tmp_path, rows, objective="tgdpo", credit=guide)
    with pytest.raises(ModelError, match=f"tokenizer has 200 tokens, the model a vocabulary of {VOCABULARY}"):
        make_trainer(tmp_path, rows, processing_class=range(200))


def test_rows_that_do_not_fit_the_model_are_named_before_training(tmp_path: Path) -> None:
    rows = make_samples(3)
    long = Sample([1] * 40, [Completion([2] * 5), Completion([3] * 30)], row="r7")
    with pytest.raises(DataError, match=r"row r7: field 'rejected': .*70 tokens.*at most 64"):
        make_trainer(tmp_path, [*rows, long])
    with pytest.raises(DataError, match="row r7"):
        make_trainer(tmp_path, rows, eval_dataset=[long])
    foreign = Sample([1], [Completion([2]), Completion([VOCABULARY])], row=9)
    with pytest.raises(DataError, match="row 9: field 'rejected': a token id is outside"):
        make_trainer(tmp_path, [foreign])
    with pytest.raises(DataError, match="dataset is empty"):
        make_trainer(tmp_path, [])
    with pytest.raises(DataError, match="two completions; got 1"):
        make_trainer(tmp_path, make_samples(2, completions=1), objective="dpo")


def test_rows_of_a_stream_are_checked_as_they_come(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[Sample]:
            yield from make_samples(5)
            yield Sample([1] * 40, [Completion([2] * 5), Completion([3] * 30)], row="late")

    trainer = make_trainer(tmp_path, Stream(), objective="dpo", max_steps=4, per_device_train_batch_size=2)
    with pytest.raises(DataError, match="row late"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens_per_microbatch": 0}, "max_tokens_per_microbatch must be a positive integer"),
        ({"layout": "packed"}, "layout must be one of auto, shared, separate, got 'packed'"),
        ({"push_to_hub": True}, "push_to_hub is not supported"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        tiny_config(tmp_path, **settings)


def test_parts_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    rows = make_samples(2)
    with pytest.raises(RecipeError, match="as: weight` or `as: selection"):
        make_trainer(tmp_path, rows, objective="dpo", credit=lambda batch: batch.labels.float())
    with pytest.raises(RecipeError, match=r"unknown normaliser|unknown name"):
        make_trainer(tmp_path, rows, normaliser="median")
    with pytest.raises(RecipeError, match="unknown objective"):
        make_trainer(tmp_path, rows, objective="dop")
    with pytest.raises(DataError, match="tgdpo needs per-token token_rewards, which"):
        make_trainer(tmp_path, rows, objective="tgdpo")
    policy = tiny_llama()
    with pytest.raises(ModelError, match="the reference is the policy itself"):
        make_trainer(tmp_path, rows, model=policy, reference=policy)


# ---- A loss that is not finite ----


def nan_where_spoilt(logps: Tensor, segments: Segments, *, ref_logps: Tensor, token_rewards: Tensor) -> LossOutput:
    """DPO, except that a pair with a token reward above 1 has no finite loss."""
    out = dpo_loss(logps, segments, ref_logps=ref_logps)
    spoilt = segments.max(token_rewards).view(-1, 2).max(1).values > 1
    out.losses = out.losses + torch.where(spoilt, float("nan"), 0.0)
    return out


def test_non_finite_loss_stops_before_the_step_and_saves_the_rows(tmp_path: Path) -> None:
    samples = make_samples(12, columns=("token_rewards",))
    samples[7].completions[0].columns["token_rewards"][0] = 2.0
    trainer = make_trainer(
        tmp_path,
        samples,
        objective=nan_where_spoilt,
        train_sampling_strategy="sequential",
        max_tokens_per_microbatch=30,
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=2,
    )
    states: list[dict[str, Tensor]] = []
    step = trainer.create_optimizer().step

    def recorded(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        states.append({n: p.detach().clone() for n, p in trainer.model.named_parameters()})
        return result

    trainer.optimizer.step = recorded
    with pytest.raises(NonFiniteLossError, match=r"optimiser step 4 is not finite.*row 7"):
        trainer.train()
    saved = json.loads((tmp_path / "nonfinite.json").read_text())
    assert saved["rows"] == [6, 7] or saved["rows"] == [7, 6]
    assert saved["nonfinite_rows"] == [7]
    losses = {e["row"]: e["loss"] for b in saved["micro_batches"] for e in b["losses"]}
    assert losses[7] == "nan"
    assert isinstance(losses[6], float)
    assert len(states) == 3
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, states[-1][name])
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-3"  # the last good state, not only step 2
    assert [e["step"] for e in read_log(tmp_path / "log.jsonl")] == [1, 2, 3]


def test_non_finite_weights_keep_the_last_good_checkpoint(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Spoil(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                kwargs["model"].lm_head.weight.data[5] = float("nan")

    trainer = make_trainer(
        tmp_path,
        make_samples(12),
        objective="dpo",
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=2,
        callbacks=[Spoil()],
    )
    with pytest.raises(NonFiniteLossError, match=r"weights themselves were not finite.*checkpoint-2"):
        trainer.train()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


@pytest.mark.parametrize(
    "saves", [{}, {"save_strategy": "steps", "save_steps": 1}], ids=["no checkpoint", "checkpoints"]
)
def test_weights_of_the_last_step_that_are_not_finite_are_an_error(saves: dict[str, Any], tmp_path: Path) -> None:
    """There is no further loss that would tell."""
    trainer = make_trainer(tmp_path, make_samples(4), objective="dpo", max_steps=1, weight_decay=1e300, **saves)
    with pytest.raises(
        NonFiniteLossError, match=r"after optimiser step 1 the weights themselves were not finite: lm_head"
    ):
        trainer.train()
    assert last_complete_checkpoint(tmp_path) is None
    assert not list(tmp_path.glob("checkpoint-*"))


def finite_loss_nan_gradient(logps: Tensor, segments: Segments) -> LossOutput:
    """sqrt has no finite gradient at 0."""
    return LossOutput((segments.sum(logps) * 0).view(-1, 2).sum(1).sqrt())


def test_non_finite_gradient_stops_too(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_samples(4), objective=finite_loss_nan_gradient)
    before = trainer.model.lm_head.weight.detach().clone()
    with pytest.raises(NonFiniteLossError, match="gradient of optimiser step 1 is not finite"):
        trainer.train()
    assert torch.equal(trainer.model.lm_head.weight, before)
    assert json.loads((tmp_path / "nonfinite.json").read_text())["not_finite"] == "gradient"


# ---- A disk that is full ----


def saving_trainer(folder: Path, **settings: Any) -> Any:
    return make_trainer(
        folder,
        make_samples(8),
        objective="dpo",
        per_device_train_batch_size=2,
        **{"save_strategy": "steps", "save_steps": 1, "optim": "sgd", **settings},
    )


@pytest.mark.parametrize("writer", ["safetensors.torch.save_file", "torch.save"])
def test_disk_full_while_saving(writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name = (torch, "save") if writer == "torch.save" else (__import__("safetensors.torch").torch, "save_file")
    original = getattr(module, name)

    def full(*args: Any, **kwargs: Any) -> Any:
        if (tmp_path / "checkpoint-2").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    monkeypatch.setattr(f"{module.__name__}.{name}", full)
    if name == "save_file":
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    trainer = saving_trainer(tmp_path)
    with pytest.raises(RunError, match=r"could not save checkpoint 3.*no space left.*checkpoint-2 is intact"):
        trainer.train()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert not (tmp_path / ".saving" / "checkpoint-3").exists()
    monkeypatch.undo()
    resumed = saving_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4


@may_mount
def test_a_disk_that_really_is_full(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1024) as disk:
        trainer = saving_trainer(disk)
        size = sum(p.numel() * 4 for p in trainer.model.parameters())
        assert 1_000_000 // 30 < size < 500_000
        with pytest.raises(RunError, match=r"could not save checkpoint \d.*no space left"):
            saving_trainer(disk, num_train_epochs=20).train()
        kept = last_complete_checkpoint(disk)
        assert kept is not None
        assert not (disk / ".saving" / f"checkpoint-{int(kept.name[11:]) + 1}").exists()


def test_failed_save_model_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = saving_trainer(tmp_path, save_strategy="no")
    trainer.save_model(str(tmp_path / "model"))
    before = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("torch.save", full)
    with torch.no_grad():
        trainer.model.lm_head.weight.add_(1)
    with pytest.raises(RunError, match="could not save the model"):
        trainer.save_model(str(tmp_path / "model"))
    assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == before
    monkeypatch.undo()
    trainer.save_model(str(tmp_path / "model"))
    assert (tmp_path / "model" / "model.safetensors").read_bytes() != before["model.safetensors"]


def test_the_log_is_json_for_every_reader(tmp_path: Path) -> None:
    log, state = JsonlLog(tmp_path / "log.jsonl"), SimpleNamespace(is_world_process_zero=True, global_step=3)
    log.on_log(None, state, None, {"reward/a": math.nan, "kl": torch.tensor(math.inf), "loss": 0.1})
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 3, "reward/a": null, "kl": null, "loss": 0.1}\n'
