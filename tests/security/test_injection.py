"""What rows, templates, models and run folders bring along is shown and read; it never acts."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tests.security.test_faults import Evil, copied, finished
from tests.test_error_messages import tokenizer
from tokengrain.data.config import TokenizeConfig
from tokengrain.data.dataset import prepare_pairs
from tokengrain.errors import DataError, ModelError
from tokengrain.models import load_model, load_tokenizer
from tokengrain.report.html import write_report
from tokengrain.specs import ModelSpec

__all__ = ["copied", "finished"]  # fixtures

SCRIPT = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"' onload='alert(3)"


@pytest.mark.parametrize("place", ["run.json", "train/metrics.json", "credit_samples.json", "train/log.jsonl"])
def test_a_report_shows_scripts_as_text(place: str, copied: Path) -> None:
    path = copied / "run" / place
    text = path.read_text() if path.exists() else "[]"
    for word in sorted(set(re.findall(r'": "([^"]{4,})"', text)), key=len):
        if word not in ("done", "train", "init"):
            text = text.replace(json.dumps(word), json.dumps(SCRIPT))
    path.write_text(text)
    recipe = copied / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("method: test", f"method: {json.dumps(SCRIPT)}"))
    page = write_report(copied / "run").read_text()
    assert place != "run.json" or "alert(1)" in page
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert not re.search(r"<[^>]* onload='alert", page)
    assert not re.search(r"(src|href)=\"?(https?:)?//", page), "a page loads nothing"


TEMPLATES = [
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.mkdir('ran') }}",
    "{{ lipsum.__globals__['os'].mkdir('ran') }}",
    "{% for x in range(10 ** 12) %}{{ x }}{% endfor %}",
    "{% set x = messages.append('more') %}{{ messages }}",
    "{% include '/etc/passwd' %}{{ messages }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_reaches_nothing(template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sides = [[{"role": "user", "content": "the sky"}, {"role": "assistant", "content": c}] for c in ("blue", "red")]
    rows = [{"chosen": sides[0], "rejected": sides[1]}]
    with pytest.raises(DataError, match="chat template"):
        prepare_pairs(rows, tokenizer(chat=True), TokenizeConfig(chat_template=template))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_weights_are_never_unpickled(name: str, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copied)
    path = copied / "run" / "train" / "model"
    (path / "model.safetensors").unlink()
    torch.save({"x": Evil()}, path / name)
    with pytest.raises(ModelError, match="no model could be loaded"):
        load_model(ModelSpec(path=str(path)), str(path))
    assert not (copied / "ran").exists()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ('{"_attn_implementation": "someone/kernel", ', "names a kernel of the hub, someone/kernel, .*which is code"),
        ('{"vocab_size": 5, ', "key 'vocab_size' is given twice"),
    ],
)
def test_what_a_config_may_not_say(said: str, message: str, copied: Path) -> None:
    path = copied / "run" / "train" / "model"
    text = (path / "config.json").read_text()
    (path / "config.json").write_text(text.replace("{", said, 1))
    with pytest.raises(ModelError, match=message):
        load_model(ModelSpec(path=str(path)), str(path))


def test_a_models_own_code_stays_unread(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copied)
    path = copied / "run" / "train" / "model"
    (path / "own.py").write_text("import os\nos.mkdir('ran')\nclass Own: pass\n")
    for file, key in (("config.json", "AutoModelForCausalLM"), ("tokenizer_config.json", "AutoTokenizer")):
        known = json.loads((path / file).read_text())
        (path / file).write_text(json.dumps({**known, "model_type": "own", "auto_map": {key: "own.Own"}}))
    with suppress(ModelError):  # transformers may know the tokenizer without the code
        load_tokenizer(ModelSpec(path=str(path)), str(path))
    with pytest.raises(ModelError):
        load_model(ModelSpec(path=str(path)), str(path))
    assert not (copied / "ran").exists()
