"""A recipe of every kind of stage on rows with images, then `evaluate` and `generate`, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.data.test_vision import QWEN, SAID, made_by_hand, png
from tests.tiny_vlms import picture, tiny_vlm
from tokengrain.cli import app
from tokengrain.report.pictures import RATED
from tokengrain.report.rows import read_credit_samples

RECIPE = """
method: pictures
model: {{path: {folder}/model}}
data: {{train: {folder}/rows.jsonl, eval_fraction: 0.25, image: {{max_pixels: 2048}}}}
output_dir: {folder}/run
training: {{max_steps: 1, per_device_train_batch_size: 4, learning_rate: 1.0e-3, use_cpu: true}}
stages:
  sft: {{kind: sft}}
  credit: {{kind: annotate, credit: sight}}
  train: {{kind: train, objective: tgdpo, data: '@credit'}}
  reward: {{kind: reward, objective: qrm}}
  online:
    kind: online
    rewards: [{{name: exact, column: answer}}]
    training: {{num_generations: 2, prompts_per_rollout: 2, max_new_tokens: 3}}
  ppo:
    kind: online
    rewards: [{{name: reward_model, model: '@reward', scaling: zscore}}]
    critic: {{model: '@reward'}}
    credit: [{{name: rto, model: '@train'}}, {{name: gae}}]
    objective: ppo
    training: {{num_generations: 2, prompts_per_rollout: 2, max_new_tokens: 3}}
"""


def call(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.output


@pytest.mark.slow
def test_all_stages_on_pictures(tmp_path: Path) -> None:
    tiny_vlm(QWEN, dtype=torch.float32).save_pretrained(tmp_path / "model")
    made_by_hand(QWEN).save_pretrained(tmp_path / "model")
    (tmp_path / "pictures").mkdir()
    rows = []
    for number in range(8):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(png(picture(number, (32, 32 + 16 * (number % 2)))))
        images = [f"pictures/{number}.png"] if number else []
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": "what is this ?"}]
        rows.append({"prompt": [{"role": "user", "content": content}], "images": images, **SAID, "answer": "a b"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path))
    call("train", tmp_path / "recipe.yaml")
    again = call("train", tmp_path / "recipe.yaml")
    assert "online" in again
    samples = read_credit_samples(tmp_path / "run" / "credit_samples.json")
    rated = [sample for sample in samples if sample.source == "credit: sight" and sample.pictures]
    assert rated
    assert all(any(map(any, picture["patches"])) for sample in rated for picture in sample.pictures)
    call("report", tmp_path / "run")
    assert RATED["without"] in (tmp_path / "run" / "report.html").read_text()
    call("evaluate", tmp_path / "run")
    call("generate", tmp_path / "run", tmp_path / "rows.jsonl", "-o", tmp_path / "answers.jsonl", "--max-new-tokens", 2)
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 8
    assert all("completion" in answer for answer in answers)
    call("rank", tmp_path / "rows.jsonl", "--model", tmp_path / "run/reward/model", "-o", tmp_path / "ranked.jsonl")
    assert len((tmp_path / "ranked.jsonl").read_text().splitlines()) == 8
    # Rows that are written elsewhere still find their pictures.
    assert answers[1]["images"][0]["path"] == str(tmp_path / "pictures" / "1.png")
