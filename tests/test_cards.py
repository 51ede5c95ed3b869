"""What a run leaves for others: model cards whose code runs, answers before and after, and an upload to a hub."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from contextlib import chdir
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi, constants

from tests.test_stages import DPO, run, values
from tests.training.tiny import make_samples, make_trainer, tiny_llama
from tokengrain.models import train_tokenizer
from tokengrain.report.html import write_report
from tokengrain.specs import TokenizerSpec
from tokengrain.training.card import _numbers

LORA = {"lora": {"r": 2, "alpha": 4}}
QRM = {"kind": "reward", "objective": {"name": "qrm"}}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def card_of(folder: Path, stage: str = "train") -> tuple[dict[str, Any], str]:
    text = (folder / "run" / stage / "model" / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def loaded_as_it_says(body: str, path: Path) -> Any:
    """Runs the card's own code, in its folder."""
    code = re.findall(r"```python\n(.*?)```", body, re.DOTALL)[0]
    space: dict[str, Any] = {}
    with chdir(path):
        exec(code, space)
    return space["model"]


@pytest.mark.parametrize(
    ("over", "library", "kind"),
    [({}, "transformers", "LlamaForCausalLM"), (LORA, "peft", "PeftModelForCausalLM")],
    ids=["full", "adapter"],
)
def test_a_policys_card(over: dict[str, Any], library: str, kind: str, tmp_path: Path) -> None:
    run(values(tmp_path, {"train": DPO}, method="dpo", **over))
    front, body = card_of(tmp_path)
    assert front == {"library_name": library, "pipeline_tag": "text-generation", "tags": ["tokengrain", "dpo"]}
    assert "language model" in body
    assert "with DPO by tokengrain" in body
    assert "arxiv.org/abs/2305.18290" in body
    assert "eprint = {2305.18290}" in body
    assert "On 3 rows that were not trained on." in body
    assert re.search(r"\| pair accuracy \| no difference yet \| [01]\.\d{3} \(95 % CI", body)
    assert "learning_rate 0.01" in body
    assert "max_steps 4, per_device" in body  # which counts, not the epochs
    assert "4 optimiser steps" in body
    assert ("LoRA: r 2, alpha 4, dropout 0.0, on down_proj gate_proj" in body) == bool(over)
    assert re.search(r"- data: `rows.jsonl`, \d+ rows\n", body)
    assert str(tmp_path) not in body
    assert type(loaded_as_it_says(body, tmp_path / "run" / "train" / "model")).__name__ == kind


def test_a_folder_that_looks_like_a_hub_name_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last part is named; and of an adapter what kind it is, and of what base."""
    monkeypatch.chdir(tmp_path)
    tiny_llama(vocab_size=258, hidden_size=64, intermediate_size=64).save_pretrained("models/base")
    train_tokenizer(TokenizerSpec(type="byte"), ()).save_pretrained("models/base")
    lora = {"r": 2, "use_dora": True, "init_lora_weights": "gaussian", "modules_to_save": ["lm_head"]}
    run(values(tmp_path, {"train": DPO}, model={"path": "models/base", "load_in_4bit": True}, lora=lora))
    front, body = card_of(tmp_path)
    assert "base_model" not in front
    assert "trained from `base` with" in body
    assert "use_dora, init_lora_weights gaussian, on " in body
    assert "trained in full lm_head, over weights in nf4" in body


@pytest.mark.parametrize("over", [{}, LORA], ids=["full", "adapter"])
def test_a_reward_models_card(over: dict[str, Any], tmp_path: Path) -> None:
    run(values(tmp_path, {"train": QRM}, method="qrm", **over))
    front, body = card_of(tmp_path)
    assert front["pipeline_tag"] == "token-classification"
    assert "A token-level reward model" in body
    model = loaded_as_it_says(body, tmp_path / "run" / "train" / "model")
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 1)


def test_answers_before_and_after(tmp_path: Path) -> None:
    """Of the last stage: greedy, those of the model that it started from and of the trained one."""
    run(values(tmp_path, {"guide": DPO, "train": DPO}))
    said = json.loads((tmp_path / "run" / "train" / "answers.json").read_text())
    assert [len(said[name]) for name in ("prompts", "start", "trained")] == [3, 3, 3]
    assert all(prompt.startswith("Say ") for prompt in said["prompts"])
    assert said["start"] != said["trained"]
    assert not (tmp_path / "run" / "guide" / "answers.json").exists()
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "what the model says, before and after" in page
    assert f'<p class="prompt">{said["prompts"][0]}</p>' in page


def test_a_model_that_cannot_be_sampled_from_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no sampling here")

    monkeypatch.setattr("tokengrain.run.trained.answering", fails)
    assert run(values(tmp_path)).metrics["final"]["loss"] < 1
    assert not (tmp_path / "run" / "train" / "answers.json").exists()


def test_an_online_evaluation_stands_in_the_card() -> None:
    """It has no loss."""
    state = SimpleNamespace(log_history=[{"loss": 0.1, "step": 1}, {"eval_reward": 0.5, "eval_correct": 0.25}])
    shown = _numbers(SimpleNamespace(state=state), None)
    assert "| reward | – | 0.500 |" in shown
    assert "| correct, share of completions | – | 0.250 |" in shown


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as an upload of small files needs."""

    files: dict[str, str]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        here = f"http://127.0.0.1:{self.server.server_port}/me/mine"
        answer: dict[str, Any] = {}
        if self.path == "/api/repos/create":
            answer = {"url": here, "id": "me/mine", "name": "me/mine"}
        elif self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"]).decode(
                        errors="replace"
                    )
            answer = {"commitUrl": f"{here}/commit/abc", "commitOid": "abc", "success": True}
        self._answer(answer)

    def do_GET(self) -> None:
        self._answer({"id": "me/mine", "modelId": "me/mine", "sha": "abc", "siblings": [], "private": False})

    def _answer(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    Hub.files = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    api = HfApi(endpoint=f"http://127.0.0.1:{server.server_port}", token="hf_none")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("transformers.trainer.hf_api", lambda *_, **__: api)
    yield Hub.files
    server.shutdown()
    server.server_close()


def test_push_to_hub(hub: dict[str, str], tmp_path: Path) -> None:
    """As a trainer of transformers does it; the card is ours."""
    trainer = make_trainer(tmp_path / "out", make_samples(8), eval_dataset=make_samples(4, 1), max_steps=2)
    trainer.train()
    trainer.evaluate()
    trainer.args.hub_model_id = "me/mine"
    trainer.push_to_hub()
    assert {"README.md", "config.json", "model.safetensors"} <= set(hub)
    assert "# mine" in hub["README.md"]
    assert "with DPO by tokengrain" in hub["README.md"]
    assert 'place = "me/mine"  # this folder' in hub["README.md"]
    assert "| pair accuracy |" in hub["README.md"]
