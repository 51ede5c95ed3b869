"""Ray Train and Ray Data around the trainer and a credit source. `make test-ray` installs Ray and runs this."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.credit.annotate_worker import make_rows
from tests.credit.small import llama, tokenizer
from tests.training.tiny import make_samples, make_trainer, tiny_llama
from tokengrain.annotation import annotate
from tokengrain.batch import TokenBatch
from tokengrain.data.dataset import prepare_pairs
from tokengrain.errors import read_log
from tokengrain.method import make_credit

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
STEPS = 3


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    import ray

    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    environment = {"env_vars": {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}}
    ray.init(num_cpus=3, include_dashboard=False, object_store_memory=200 << 20, runtime_env=environment)
    yield ray
    ray.shutdown()


def train(config: dict[str, Any]) -> None:
    """What each worker of Ray Train runs; the trainer joins the process group that Ray has made."""
    torch.set_num_threads(1)
    trainer = make_trainer(
        config["folder"],
        make_samples(8 * STEPS),
        model=tiny_llama(dtype=torch.float64),
        objective="dpo",
        per_device_train_batch_size=8 // config["workers"],
        max_steps=STEPS,
        logging_steps=1,
        train_sampling_strategy="sequential",
    )
    trainer.train()
    assert trainer.accelerator.num_processes == config["workers"]


def test_ray_train_equals_one_process(ray: Any, tmp_path: Path) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    train({"folder": str(tmp_path / "one"), "workers": 1})
    TorchTrainer(
        train,
        train_loop_config={"folder": str(tmp_path / "two"), "workers": 2},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2, use_gpu=False),
        run_config=RunConfig(name="tokengrain", storage_path=str(tmp_path / "ray")),
    ).fit()
    one, two = ([e for e in read_log(tmp_path / name / "log.jsonl") if "grad_norm" in e] for name in ("one", "two"))
    assert len(one) == len(two) == STEPS
    for ours, theirs in zip(two, one, strict=True):
        for name in ("loss", "grad_norm", "num_tokens"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name


def source() -> Any:
    return make_credit("guide", model=llama(seed=1), reference=llama(seed=2))


class Credit:
    """An actor of Ray Data: it holds the models, and adds a column to each batch of rows."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.source, self.tokenizer = source(), tokenizer()

    def __call__(self, table: Any) -> Any:
        import pyarrow

        rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in table.to_pylist()]
        batch = TokenBatch.from_samples(prepare_pairs(rows, self.tokenizer).samples)
        with torch.no_grad():
            values = [part.tolist() for part in batch.segments.split(self.source(batch))]
        table = table.append_column("chosen_token_rewards", pyarrow.array(values[0::2]))
        return table.append_column("rejected_token_rewards", pyarrow.array(values[1::2]))


def test_ray_data_gives_the_credit_of_annotate(ray: Any, tmp_path: Path) -> None:
    import pyarrow.parquet

    rows = [{name: row[name] for name in ("id", "prompt", "chosen", "rejected")} for row in make_rows(24)]
    plain = annotate(
        rows, tokenizer(), None, {"token_rewards": source()}, output=tmp_path / "plain.parquet", progress=False
    )
    want = {row["id"]: row for row in pyarrow.parquet.read_table(plain).to_pylist()}
    made = ray.data.from_items(rows).repartition(4)
    made = made.map_batches(
        Credit, batch_format="pyarrow", batch_size=8, compute=ray.data.ActorPoolStrategy(size=2), num_cpus=0.5
    )
    found = made.take_all()
    assert len(found) == len(want) == 24
    for row in found:
        for name in ("chosen_token_rewards", "rejected_token_rewards"):
            assert list(row[name]) == pytest.approx(want[row["id"]][name], abs=1e-6)
