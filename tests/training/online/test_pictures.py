"""Pictures stay with their prompts: through filters, refilled rollouts, a resume within a rollout, and ranking."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.test_vision import QWEN, made_by_hand, png, row
from tests.tiny_vlms import picture, tiny_vlm
from tests.training.online.tiny import make_online
from tests.training.tiny import weights
from tokengrain.errors import read_log
from tokengrain.models import reward_model_from
from tokengrain.rank import rank
from tokengrain.rollout.sampler import encode_prompts
from tokengrain.training.online import OnlineTrainer

SIZES = [(32, 32), (32, 48), (16, 32), (48, 48), (32, 64), (64, 64)]


def first_is_even(completion_ids: list[list[int]]) -> list[float]:
    """The same for all completions of a prompt now and then: such groups are filtered."""
    return [float(ids[0] % 2) for ids in completion_ids]


def online(folder: Path, *, resume: bool = False, **settings: Any) -> OnlineTrainer:
    rows: list[Any] = [row(picture(i, size)) for i, size in enumerate(SIZES)]
    rows[3] = {**rows[3], "prompt": "what is this ?", "images": []}
    trainer = make_online(
        folder,
        model=tiny_vlm(QWEN, dtype=torch.float32),
        rewards=first_is_even,
        credit=[{"name": "filter_groups", "metric": "reward"}, {"name": "group"}],
        objective="grpo",
        train_dataset=encode_prompts(rows, made_by_hand(QWEN)),
        processing_class=made_by_hand(QWEN),
        minibatches=2,
        prompts_per_rollout=4,
        num_generations=2,
        max_tokens_per_microbatch=120,
        stop_ids=[3],
        **settings,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_run_resumes_within_a_rollout_that_was_refilled(tmp_path: Path) -> None:
    """Scores of a wrong picture, or of none, would be an error or another gradient."""
    whole = online(tmp_path / "whole")
    online(tmp_path / "part", save_strategy="steps", save_steps=1)
    (tmp_path / "part" / "checkpoint-4").rename(tmp_path / "later")
    again = online(tmp_path / "part", resume=True)
    for name, value in weights(whole.model).items():
        assert torch.equal(weights(again.model)[name], value), name
    log = read_log(tmp_path / "whole" / "log.jsonl")
    assert sum(entry.get("rollout/refills", 0) for entry in log) > 0


def test_ranking_looks_at_pictures(tmp_path: Path) -> None:
    (tmp_path / "seen.png").write_bytes(png(picture(1)))
    (tmp_path / "other.png").write_bytes(png(picture(2)))
    prompt = row(picture(0))["prompt"]
    rows = [{"prompt": prompt, "completions": [" a b", " c"], "images": [name]} for name in ("seen.png", "other.png")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    torch.manual_seed(0)
    scorer = reward_model_from(tiny_vlm(QWEN)).eval()
    rank(tmp_path / "rows.jsonl", scorer, tokenizer=made_by_hand(QWEN), output=tmp_path / "out.jsonl")
    one, two = (json.loads(line)["scores"] for line in (tmp_path / "out.jsonl").read_text().splitlines())
    assert len(one) == 2
    assert one != pytest.approx(two, abs=1e-3)
