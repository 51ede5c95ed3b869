"""The base models that come with the package: whole, in use, and taken in place of training."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from benchmarks.world_weights import worlds_in_use, write_weights
from transformers import AutoModelForCausalLM

from tokengrain.errors import ModelError
from tokengrain.worlds import base_models, load_world
from tokengrain.worlds.stories import StoriesOptions, StoriesWorld, divergence


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKENGRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "worlds"


def test_files_and_sums_agree_and_fit_a_wheel() -> None:
    files = {path.stem: path.read_bytes() for path in base_models.WEIGHTS.glob("*.safetensors")}
    assert {name: hashlib.sha256(content).hexdigest() for name, content in files.items()} == (
        base_models.shipped_weights()
    )
    assert sum(map(len, files.values())) < 5_000_000


def test_no_recipe_trains_a_base_model(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trains(*_: object, **__: object) -> None:
        raise AssertionError("a base model is trained")

    monkeypatch.setattr(base_models, "small_llama", trains)
    folders = {load_world(address).base_model() for address in worlds_in_use()}
    untrained = {"library"}
    assert {folder.name.rpartition("-")[0] for folder in folders} - untrained == set(base_models.shipped_weights())
    assert {folder.parent for folder in folders} == {cache}


def test_what_is_written_is_what_is_loaded(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of `make world-weights`: train, write, and later take it, to the bit."""
    world = StoriesWorld(StoriesOptions(size="one-phrase"))
    trained = world.base_model()
    shipped = tmp_path / "weights"
    shipped.mkdir()
    digest = write_weights(trained, shipped / f"{trained.name}.safetensors")
    (shipped / base_models.SUMS).write_text(f"{digest}  {trained.name}.safetensors\n")
    monkeypatch.setattr(base_models, "WEIGHTS", shipped)
    state = torch.get_rng_state()
    taken = world.base_model()
    assert taken == cache / f"{trained.name}-{digest[:8]}"
    assert torch.equal(state, torch.get_rng_state())
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (taken / name).read_bytes() == (trained / name).read_bytes()


def test_a_damaged_file_is_an_error(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "weights"
    shutil.copytree(base_models.WEIGHTS, damaged)
    file = next(damaged.glob("stories-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    monkeypatch.setattr(base_models, "WEIGHTS", damaged)
    with pytest.raises(ModelError, match=r"stories-full.*is damaged: its SHA-256 is"):
        StoriesWorld(StoriesOptions()).base_model()
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_the_shipped_model_is_close_to_the_grammar(cache: Path) -> None:
    world = StoriesWorld(StoriesOptions())
    model = AutoModelForCausalLM.from_pretrained(world.base_model()).eval()
    assert divergence(world.grammar, model)["kl_per_token"] < 0.003
