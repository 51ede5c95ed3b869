"""Two ranks give the weights, the log and the evaluation of one: DDP and FSDP2, on gloo."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from tests.mounts import make_read_only, may_mount
from tests.training.ranks import on_ranks, sharding_on_cpu
from tests.training.tiny import make_samples, make_trainer, tiny_llama
from tokengrain.errors import NonFiniteLossError, RunError, read_log
from tokengrain.method import make_objective
from tokengrain.methods.aligndistil import ContrastiveTeacher
from tokengrain.models import reward_model_from
from tokengrain.scoring.reference import FrozenReference
from tokengrain.training.checkpoint import last_complete_checkpoint
from tokengrain.training.step import WeightedMeans, all_reduce

FSDP = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}
OBJECTIVES = {"simpo": {"sft_weight": 0.3}, "tdpo2": {}, "dpo": {}, "aligndistil": {}, "qrm": {}}


def run(
    folder: Path,
    objective: str,
    adapter: bool = False,
    resume: bool = False,
    evaluate_first: bool = False,
    **settings: Any,
) -> Any:
    """Weights (whole, on rank 0) and metrics of three steps of 8 pairs each."""
    peft_config = None
    if adapter:
        from peft import LoraConfig

        peft_config = LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=True
        )
    model = tiny_llama(dtype=torch.float64)
    torch.manual_seed(0)  # a reward model's head
    with sharding_on_cpu():
        trainer = make_trainer(
            folder,
            make_samples(24, completions=1 if objective == "aligndistil" else 2),
            model=reward_model_from(model) if objective == "qrm" else model,
            objective=make_objective(objective, **OBJECTIVES[objective]),
            teacher=contrast() if objective == "aligndistil" else None,
            # Rank 0 has a batch more than rank 1.
            eval_dataset=make_samples(9, seed=2, completions=1 if objective == "aligndistil" else 2),
            per_device_eval_batch_size=2,
            peft_config=peft_config,
            **{"optim": "sgd", "learning_rate": 0.05, "logging_steps": 2, **settings},
        )
        if evaluate_first:
            trainer.evaluate()
        trainer.train(resume_from_checkpoint=resume)
        metrics = trainer.evaluate()
        if trainer.accelerator.num_processes > 1:
            sharded = any(isinstance(p, DTensor) for p in trainer.model_wrapped.parameters())
            assert sharded == bool(settings.get("fsdp"))
            assert sharded or isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    parts = {n.replace("module.", ""): v.detach().cpu().clone().numpy() for n, v in state.items()}
    return parts, metrics


def contrast() -> ContrastiveTeacher:
    """Two models whose difference is learned: the policy's weights, each with another head."""
    others = [FrozenReference(tiny_llama(dtype=torch.float64)) for _ in range(2)]
    for seed, other in enumerate(others):
        head = other.model.get_output_embeddings().weight
        noise = torch.randn(head.shape, generator=torch.Generator().manual_seed(seed), dtype=head.dtype)
        head.data += 0.1 * noise
    return ContrastiveTeacher(target=others[0], contrast=others[1], r=2.0)


def assert_equal_runs(one: tuple[Any, Any], two: tuple[Any, Any], folders: list[Path]) -> None:
    assert one[0].keys() == two[0].keys()
    for name, value in one[0].items():
        torch.testing.assert_close(torch.from_numpy(two[0][name]), torch.from_numpy(value), rtol=1e-6, atol=1e-8)
    for name, value in one[1].items():
        if "runtime" not in name and "per_second" not in name:
            assert two[1][name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    logs = [[e for e in read_log(f / "log.jsonl") if "loss" in e] for f in folders]
    for ours, theirs in zip(*logs, strict=True):
        for name, value in ours.items():
            assert theirs[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


CASES = [
    ("simpo", False, {"max_tokens_per_microbatch": 30, "evaluate_first": True}),
    ("tdpo2", True, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
    pytest.param("aligndistil", False, {"max_tokens_per_microbatch": 30}, marks=pytest.mark.slow),
    pytest.param("aligndistil", True, {"max_tokens_per_microbatch": 30}, marks=pytest.mark.slow),
    pytest.param("qrm", False, {"max_tokens_per_microbatch": 30}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("objective", "adapter", "cut"), CASES)
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_ranks_equal_one(objective: str, adapter: bool, cut: dict[str, Any], sharded: bool, tmp_path: Path) -> None:
    one = run(tmp_path / "one", objective, adapter, per_device_train_batch_size=8)
    settings = {"per_device_train_batch_size": 4, **cut, **(FSDP if sharded else {})}
    two = on_ranks(2, lambda: run(tmp_path / "two", objective, adapter, **settings))
    assert_equal_runs(one, two[0], [tmp_path / "one", tmp_path / "two"])


@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["ddp", "fsdp2"])
def test_two_ranks_resume(sharded: bool, tmp_path: Path) -> None:
    """Stopped after two of three steps, then resumed: as if it had never stopped."""
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "optim": "adamw_torch"}
    saving |= FSDP if sharded else {}
    whole = on_ranks(2, lambda: run(tmp_path / "whole", "dpo", **saving))

    def broken() -> None:
        from transformers import TrainerCallback

        class Stop(TrainerCallback):
            def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
                raise AssertionError("not reached without accumulation")

            def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == 2:
                    raise KeyboardInterrupt

        import tests.training.test_ranks as here

        original = here.make_trainer
        here.make_trainer = lambda *a, **k: original(*a, callbacks=[Stop()], **k)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", "dpo", **saving)

    on_ranks(2, broken)
    assert last_complete_checkpoint(tmp_path / "parts") == tmp_path / "parts" / "checkpoint-2"
    parts = on_ranks(2, lambda: run(tmp_path / "parts", "dpo", resume=True, **saving))
    for name, value in whole[0][0].items():
        assert torch.equal(torch.from_numpy(parts[0][0][name]), torch.from_numpy(value)), name
    assert_equal_runs(whole[0], parts[0], [tmp_path / "whole", tmp_path / "parts"])


def test_a_loss_that_is_not_finite_on_one_rank_stops_both(tmp_path: Path) -> None:
    def work() -> str:
        samples = make_samples(8, columns=("token_rewards",))
        samples[5].completions[1].columns["token_rewards"][0] = float("inf")
        trainer = make_trainer(
            tmp_path,
            samples,
            objective="treg_simpo",
            train_sampling_strategy="sequential",
            dataloader_drop_last=False,
        )
        with pytest.raises(NonFiniteLossError) as caught:
            trainer.train()
        return str(caught.value)

    first, second = on_ranks(2, work)
    assert first == second
    saved = json.loads((tmp_path / "nonfinite.json").read_text())
    assert sorted(saved["rows"]) == list(range(8))
    assert saved["nonfinite_rows"] == [5]
    assert {b["rank"] for b in saved["micro_batches"]} == {0, 1}


def test_collectives_leave_their_input_alone() -> None:
    def work() -> tuple[list[float], list[float], list[int]]:
        state = PartialState(cpu=True)
        values, flags = torch.tensor([1.0, 2.0]), torch.tensor([state.process_index])
        total = all_reduce(values, state.device)
        all_reduce(flags, state.device, "max")
        return values.tolist(), total.tolist(), flags.tolist()

    assert on_ranks(2, work) == [([1.0, 2.0], [2.0, 4.0], [rank]) for rank in range(2)]


def test_ranks_that_logged_different_things_still_meet() -> None:
    def work() -> dict[str, float]:
        state, means = PartialState(cpu=True), WeightedMeans()
        means.add("both", 1.0 + state.process_index, 1.0)
        if state.process_index:
            means.add("one", 6.0, 2.0)
        return means.reduced().means()

    assert on_ranks(2, work) == [{"both": 1.5, "one": 3.0}] * 2


@pytest.mark.parametrize("case", ["another folder", pytest.param("not to be written", marks=may_mount)])
def test_a_folder_that_ranks_do_not_share_is_an_error_before_training(case: str, tmp_path: Path) -> None:
    def work() -> str:
        folder, second = tmp_path / "run", int(os.environ["RANK"]) == 1
        if case == "another folder":
            folder = tmp_path / os.environ["RANK"]
        elif second:
            make_read_only(tmp_path)
        trainer = make_trainer(folder, make_samples(8), model=tiny_llama(), objective="dpo", save_strategy="epoch")
        with pytest.raises(RunError) as caught:
            trainer.train()
        assert not trainer.state.global_step
        return str(caught.value)

    found = on_ranks(2, work, timeout=60)
    which = r"rank 0 .* does not see in" if case == "another folder" else r"rank 1 .* cannot write into .*Read-only"
    assert all(re.match(which + ".*; expected a folder that all ranks share", message) for message in found), found
    assert not [p for p in tmp_path.rglob(".*") if p.is_file()]


def test_a_rank_that_is_killed_ends_the_others_and_is_named(tmp_path: Path) -> None:
    class Killed(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if torch.distributed.get_rank() == 1 and state.global_step == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    def work() -> str:
        trainer = make_trainer(
            tmp_path,
            make_samples(24),
            objective="dpo",
            per_device_train_batch_size=2,
            save_strategy="steps",
            save_steps=1,
            callbacks=[Killed()],
        )
        with pytest.raises(RunError) as caught:
            trainer.train()
        return str(caught.value)

    started = time.monotonic()
    found = on_ranks(3, work, timeout=90, killed=[1])
    assert time.monotonic() - started < 60  # most of it to start and to stop three processes
    for message in found:
        assert re.search(r"rank 1 \(process \d+\).* of this run has ended.*resume from the last checkpoint", message)
