"""Base models of the worlds: small models, shipped or trained once per machine, and kept in a cache.

The weights of the worlds that recipes and the demo use come with the package (`weights/`), so that everybody starts
from the same ones: trained anew, they would differ with the processor's rounding.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load_model
from tokenizers import processors
from torch import Tensor, nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tokengrain.errors import ModelError, RecipeError, require, write_json
from tokengrain.models import auto_class
from tokengrain.screen import progress_bar

PAD, BOS, EOS = "<pad>", "<s>", "<end>"  # the first three tokens of every world, in this order


def check_option(world: str, name: str, value: object, allowed: Collection[str]) -> None:
    expected = " or ".join(allowed) if len(allowed) == 2 else f"one of {', '.join(allowed)}"
    require(value in allowed, RecipeError, f"world {world}: {name} is {value!r}; expected {expected}")


def check_least(world: str, options: object, least: Mapping[str, float]) -> None:
    """Raise a RecipeError if an option is below its least value, or infinite; None, the default, is allowed."""
    for name, bound in least.items():
        value = getattr(options, name)
        fits = value is None or bound <= value < math.inf
        require(fits, RecipeError, f"world {world}: {name} is {value}; expected at least {bound}")


def fast_tokenizer(core: Any, *, positions: int, **special: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of the library `tokenizers` for transformers; it puts `<s>` in front and never appends `<end>`."""
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=positions,
        **special,
    )


@dataclass(frozen=True)
class Training:
    """Size of a base model, and its training: the rate rises for `warmup` steps, and falls linearly towards 0."""

    hidden_size: int
    mlp_size: int
    steps: int
    learning_rate: float
    warmup: int
    layers: int = 3
    heads: int = 4
    batch_size: int = 64
    seed: int = 0


Progress = Callable[[int, int], None]  # called with (done, of how many)
Trained = tuple[Any, dict[str, Any]]  # a base model in evaluation mode, and a report of its training


def small_llama(settings: Training, *, vocabulary: int, positions: int, tied: bool) -> LlamaForCausalLM:
    """The untrained model; its weights depend on `settings.seed` and not on torch's global state."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.mlp_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return LlamaForCausalLM(config).float()


def muon_and_adamw(model: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, an output head of its own, and norms."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        inside = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (matrices if inside else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def descend(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    losses: Iterable[Tensor],
    settings: Training,
    progress: Progress | None,
) -> list[float]:
    """Take one step for each loss, made from the weights of its step, with gradients clipped to norm 1; the losses."""
    found = []
    for step, loss in enumerate(losses):
        rate = min((step + 1) / settings.warmup, 1.0) * (settings.steps - step) / settings.steps
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * rate
            optimizer.step()
        found.append(float(loss.detach()))
        if progress is not None:
            progress(step + 1, settings.steps)
    return found


@contextmanager
def single_thread() -> Iterator[None]:
    """One torch thread while the block runs: on more, sums in another order would give other weights."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


WEIGHTS = Path(__file__).with_name("weights")
SUMS = "SHA256SUMS"
"""In that folder: a line `<sha256>  <file>` for every file of weights, as `sha256sum -c` reads it."""


def shipped_weights() -> dict[str, str]:
    """SHA-256 of every base model that comes with the package, by `<world>-<size>-<key>`."""
    lines = (WEIGHTS / SUMS).read_text(encoding="utf-8").splitlines()
    return {name.removesuffix(".safetensors"): digest for digest, name in (line.split() for line in lines)}


def load_shipped(name: str, digest: str) -> Trained:
    """A shipped base model and the report of its training; ModelError if the file is not the one that was shipped."""
    file = WEIGHTS / f"{name}.safetensors"
    found = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "no such file"
    message = f"{file} is damaged: its SHA-256 is {found}; expected {digest}. Install tokengrain again"
    require(found == digest, ModelError, message)
    with safe_open(file, "pt") as content:
        made = json.loads(content.metadata()["made"])
    with torch.random.fork_rng(devices=[]):
        model = built(made["config"])
    load_model(model, file)  # weights of 16 bits become those of 32 that they were
    return model.eval(), made["report"]


def built(config: dict[str, Any]) -> Any:
    """An untrained model from the settings of its config; a Llama unless they say otherwise."""
    kind = config.get("model_type", LlamaConfig.model_type)
    made = AutoConfig.for_model(kind, **{k: v for k, v in config.items() if k != "model_type"})
    return auto_class(made).from_config(made).float()


def model_folder(name: str, key: str) -> Path:
    """Where the base model of these settings is or will be; a shipped one has its hash in the name."""
    cache = Path(os.environ.get("TOKENGRAIN_CACHE") or Path.home() / ".cache" / "tokengrain").expanduser()
    digest = shipped_weights().get(f"{name}-{key}")
    return cache / "worlds" / (f"{name}-{key}" + (f"-{digest[:8]}" if digest else ""))


def ensure_model(folder: Path, train: Callable[[Progress], Trained], tokenizer: Any, title: str, steps: int) -> Path:
    """Folder with a base model, its tokenizer and `pretraining.json`; shipped weights are taken, others trained.

    Of several processes that ask at once, one trains and the others wait. An interrupted training leaves nothing.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        name = folder.name.rpartition("-")[0]
        if (digest := shipped_weights().get(name)) is not None and not folder.is_dir():
            _save(folder, *load_shipped(name, digest), tokenizer)
        if not folder.is_dir():
            what = f"base model of {title} (once per machine)"
            with single_thread(), progress_bar(what, steps, stays=True) as update:
                model, report = train(lambda step, _: update(completed=step))
            _save(folder, model, report, tokenizer)
    return folder


def _save(folder: Path, model: Any, report: dict[str, Any], tokenizer: Any) -> None:
    # The temporary folder is made after training, so that a kill in the minutes before leaves nothing.
    temporary = Path(tempfile.mkdtemp(prefix=".training-", dir=folder.parent))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / "pretraining.json", report)
        for path in temporary.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
