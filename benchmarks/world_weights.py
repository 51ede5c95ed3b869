"""Make the base models that come with the package: `python -m benchmarks.world_weights` (`make world-weights`).

Trains the base model of every world that a recipe or the demo uses, in an empty cache, and writes it with its config
and report into `src/tokengrain/worlds/weights/`. Says for each whether it is the one that was there, to the bit; on
another processor it is not, and then the tables of the demo and the recipes change with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoConfig

from tokengrain.demo import WORLD
from tokengrain.errors import read_json, write_text
from tokengrain.models import auto_class
from tokengrain.worlds import base_models, is_world, load_world

CONFIG = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
]


def worlds_in_use() -> set[str]:
    """Addresses of the worlds whose base models the recipes and the demo start from."""
    recipes = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(Path("recipes").glob("*.yaml")))
    return {WORLD, *(recipe["model"] for recipe in recipes if is_world(recipe.get("model")))}


def settings_of(config: Any) -> dict[str, Any]:
    """What a config is made from again; of a model that sees, all that differs from the defaults."""
    if not hasattr(config, "vision_config"):
        return {key: getattr(config, key) for key in CONFIG}
    others = ("transformers_version", "architectures", "dtype")
    return {key: value for key, value in config.to_diff_dict().items() if key not in others}


def write_weights(folder: Path, target: Path) -> str:
    """Write the weights in a model's folder, with its config and report, as one file; returns its SHA-256."""
    config = AutoConfig.from_pretrained(folder)
    model = auto_class(config).from_pretrained(folder)
    report = {k: v for k, v in read_json(folder / "pretraining.json").items() if k != "seconds"}
    made = {"config": settings_of(model.config), "report": report}
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    tensors = {name: value.contiguous() for name, value in model.state_dict().items() if name not in tied}
    if all(torch.equal(value, value.half().float()) for value in tensors.values()):  # nothing is lost in half the room
        tensors = {name: value.half() for name, value in tensors.items()}
    save_file(tensors, target, {"made": json.dumps(made)})
    target.chmod(0o644)
    return hashlib.sha256(target.read_bytes()).hexdigest()


def main() -> None:
    """Train and write all of them."""
    before, target = base_models.shipped_weights(), base_models.WEIGHTS
    write_text(target / base_models.SUMS, "")  # so that nothing is taken from there
    digests = {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TOKENGRAIN_CACHE"] = cache
        for folder in sorted({load_world(address).base_model() for address in sorted(worlds_in_use())}):
            name = folder.name
            digests[name] = write_weights(folder, target / f"{name}.safetensors")
            print(f"{name}: {'as before' if digests[name] == before.get(name) else 'new'}")
    for old in set(before) - set(digests):
        (target / f"{old}.safetensors").unlink()
    write_text(target / base_models.SUMS, "".join(f"{d}  {n}.safetensors\n" for n, d in sorted(digests.items())))


if __name__ == "__main__":
    main()
