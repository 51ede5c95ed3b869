"""Log-probabilities that were stored, and those they are compared with: the same numbers, whatever is in a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.tiny import make_samples, make_trainer, tiny_llama
from tokengrain.annotation import annotate, load_annotated
from tokengrain.batch import Completion, Sample
from tokengrain.data.dataset import PairDataset
from tokengrain.scoring.reference import FrozenReference

WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 512}


def long_samples(n: int) -> list[Sample]:
    """Pairs of unequal lengths, in whose long rows attention goes in blocks."""
    samples = []
    for i, sample in enumerate(make_samples(n, columns=("token_rewards",))):
        made = []
        for k, completion in enumerate(sample.completions):
            times = 1 + 5 * (i + k) % 11
            columns = {name: list(values) * times for name, values in completion.columns.items()}
            made.append(Completion(completion.ids * times, columns=columns))
        samples.append(Sample(sample.prompt_ids * (1 + 3 * i % 7), made, i))
    return samples


def annotated(folder: Path, *, autocast: bool, dtype: torch.dtype) -> PairDataset:
    dataset, reference = PairDataset(long_samples(12)), FrozenReference(tiny_llama(dtype=dtype, **WIDE))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        path = annotate(dataset, None, None, {}, reference, folder / "stored.parquet", shard_rows=5, progress=False)
    return load_annotated(path)


@pytest.mark.parametrize("credit_as", [None, {"name": "selection", "share": 0.4}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_policy_that_is_its_reference_is_equal_to_it_in_16_bits(
    dtype: torch.dtype, credit_as: Any, tmp_path: Path
) -> None:
    """With autocast, and with weights of 16 bits; where the loss reads some of the tokens only, too."""
    autocast = dtype == torch.float32
    stored = list(annotated(tmp_path, autocast=autocast, dtype=dtype))
    trainer = make_trainer(
        tmp_path / "run",
        stored,
        model=tiny_llama(dtype=dtype, **WIDE),
        objective="dpo",
        credit_as=credit_as,
        eval_dataset=stored[:5],
        bf16=autocast,
        max_tokens_per_microbatch=300,
        per_device_train_batch_size=6,
        learning_rate=1e-30,  # too small to change a weight
    )
    found = trainer.evaluate()
    assert (trainer.log_ratio_rms, found["eval_rewards/margins"], found["eval_log_ratio"]) == (0.0, 0.0, 0.0)
    trainer.train()
    margins = [e["rewards/margins"] for e in trainer.state.log_history if "rewards/margins" in e]
    assert margins
    assert set(margins) == {0.0}
