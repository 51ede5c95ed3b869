"""Which settings make a stage another one: those that change what is learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tokengrain.run.folder import make_plan
from tokengrain.run.load import make_recipe


@pytest.mark.parametrize(
    ("training", "decides"),
    [
        ({}, False),
        ({"load_best_model_at_end": True, "save_steps": 4}, True),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, True),
    ],
)
def test_when_evaluation_decides_its_steps_do(training: dict[str, Any], decides: bool, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps({"prompt": "Say", "chosen": " nice", "rejected": " bad"}) + "\n") * 2)
    found = {
        make_plan(
            make_recipe(
                {
                    "method": "dpo",
                    "output_dir": str(tmp_path / "run"),
                    "model": {"config": {"model_type": "llama"}},
                    "data": {"train": str(rows)},
                    "training": {"eval_strategy": "steps", "eval_steps": steps, **training},
                    "stages": {"train": {"kind": "train", "objective": {"name": "dpo"}}},
                }
            )
        )[-1].fingerprint
        for steps in (2, 4)
    }
    assert len(found) == (2 if decides else 1)
