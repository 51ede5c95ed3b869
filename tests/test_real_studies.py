"""The studies on a published model, in small: a random model in its place, made-up dialogues, all that is written."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from benchmarks import real_training
from transformers import LlamaConfig, LlamaForCausalLM

from tokengrain.errors import read_json
from tokengrain.models import train_tokenizer
from tokengrain.specs import TokenizerSpec

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with dialogues; the studies start from a small model and take few of them."""
    tokenizer = train_tokenizer(TokenizerSpec(type="byte"), ())
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=512, **size, **ends)
    start = tmp_path / "start"
    LlamaForCausalLM(config).save_pretrained(start)
    tokenizer.save_pretrained(start)
    rng, said = random.Random(0), ["the sea", "a hill", "no", "yes, of course", "I would not", "ask her"]

    def dialogue(i: int, answer: str) -> str:
        return f"\n\nHuman: what of {i}?\n\nAssistant: {said[i % 6]}\n\nHuman: and then?\n\nAssistant: {answer}"

    rows = [{side: dialogue(i, rng.choice(said) + side[0]) for side in ("chosen", "rejected")} for i in range(60)]
    rows[3]["rejected"] = "\n\nHuman: another\n\nAssistant: invalid"
    (tmp_path / "hh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "results").mkdir()
    for name, span in {"HELD": (0, 12), "CHOICE": (12, 24), "TRAIN": (24, 48), "JUDGE": (48, 60)}.items():
        monkeypatch.setattr(real_training, name, span)
    monkeypatch.setattr(real_training, "START", start)
    return tmp_path


def offline(study: Path, methods: list[str], **more: Any) -> None:
    few = {"seeds": 2, "steps": 1, "prompts": 6, **more}
    real_training.offline(study / "hh.jsonl", study / "results", study / "runs", methods, **few)


def test_offline(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(study, ["dpo", "simpo"])
    found = read_json(study / "results/real_offline.json")["methods"]
    assert [len(one["accuracy"]) for one in found.values()] == [2, 2]
    each = [read_json(file) for file in sorted((study / "runs/measured").glob("dpo-*-6.json"))]
    assert found["dpo"] == {"rate": found["dpo"]["rate"], **real_training.by_seed({"seeds": each})}, "means of seeds"
    assert [len(each[0][key]) for key in real_training.MEASURED] == [11, 11, 6, 6, 6], "an invalid pair is left out"
    assert max(map(abs, each[0]["kl"])) < 1e-3, "one step"
    assert any(margin != 0 for margin in each[0]["margin"])
    page = (study / "results/real_offline.md").read_text()
    assert "| simpo |" in page
    rows = [json.loads(line) for line in (study / "runs/start-6-0.jsonl").read_text().splitlines()]
    assert [m["role"] for m in rows[0]["prompt"]] == ["user", "assistant", "user"], "the whole dialogue is asked"

    def never(*args: Any, **settings: Any) -> None:
        raise AssertionError("what is finished is made again")

    for name in ("generate", "score", "loaded"):
        monkeypatch.setattr(real_training, name, never)
    offline(study, ["dpo", "simpo"])
    assert read_json(study / "results/real_offline.json")["methods"] == found


def test_rates_are_chosen_on_rows_that_are_not_reported(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = real_training.Offline(study / "hh.jsonl", study / "runs", 1, 6)
    asked: list[Path] = []

    def margins(self: Any, model: Path, rows: Path) -> list[float]:
        asked.append(rows)
        return [1.0, -1.0] if "0.0002" in str(model) else [1.0, 1.0]

    monkeypatch.setattr(real_training.Offline, "policy", lambda self, *name: Path("-".join(map(str, name))))
    monkeypatch.setattr(real_training.Offline, "margins", margins)
    assert measured.rate("dpo") == 5e-5
    files = [measured.rows(name, span) for name, span in (("held", (0, 12)), ("choice", (12, 24)), ("pairs", (24, 48)))]
    held, choice, pairs = (set(file.read_text().splitlines()) for file in files)
    assert {path.name for path in asked} == {files[1].name}
    assert len(held | choice | pairs) == len(held) + len(choice) + len(pairs), "no row is in two of them"


@pytest.mark.slow
def test_every_offline_method(study: Path) -> None:
    offline(study, list(real_training.OFFLINE), seeds=1)
    assert (study / "results/real_offline.md").read_text().count("(one seed)") == 5 * len(real_training.OFFLINE)


@pytest.mark.slow
def test_online(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model solves nothing, so what counts as solved is the completion's length."""

    def right(rows: list[dict[str, Any]], target: Path) -> tuple[list[list[int]], list[list[bool]]]:
        texts = [json.loads(line)["completions"] for line in target.read_text().splitlines()]
        return [[len(t) for t in said] for said in texts], [[len(t) % 2 == 0 for t in said] for said in texts]

    monkeypatch.setattr(real_training, "right", right)
    (study / "gsm8k.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "so\n#### 2"}) + "\n")
    methods = [name for name in real_training.ONLINE if name != "aepo"]  # whose trigger words no byte is
    few: dict[str, Any] = {"seeds": 1, "updates": 4, "prompts": 6, "tokens": 6, "gsm8k": study / "gsm8k.jsonl"}
    real_training.online(study / "results", study / "runs", methods[:1], **few, problems=0)
    with monkeypatch.context() as patched:
        patched.setattr(real_training.Online, "solved", lambda *args: pytest.fail("measured again"))
        real_training.online(study / "results", study / "elsewhere", methods[:1], **few, problems=0)
    with pytest.raises(typer.BadParameter, match="was measured with"):
        real_training.online(study / "results", study / "runs", methods, **few, problems=1)
    real_training.online(study / "results", study / "runs", methods, **few, problems=0)
    page = (study / "results/real_online.md").read_text()
    assert page.count("\n| ") == 3 + len(methods) + len(methods)  # grpo is not beside itself; THR stands twice
    assert "<svg" in real_training.maps(study / "runs/grpo-0/train/rollouts.jsonl")
