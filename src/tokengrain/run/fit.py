"""What follows from rows, model and device where a recipe does not say: rate, batch, epochs, warm-up, memory.

docs/fitting.md has the reasons and the sources of the numbers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tokengrain import models
from tokengrain.errors import fingerprint
from tokengrain.recipe.schema import Recipe
from tokengrain.run.build import locate, open_rows
from tokengrain.run.load import resolve_stages
from tokengrain.run.trained import Trained
from tokengrain.scoring.model import positions_of
from tokengrain.specs import DataSpec, ModelSpec
from tokengrain.training.config import check_held_out, check_packages, check_rate, pass_steps, rollout_steps

STEPS = 50  # a stage has at least so many optimiser steps, where its rows allow
EPOCHS = 4  # a small set is gone through at most so often
SEEN = 400  # rows are repeated, at most EPOCHS times, until so many were seen
BATCH = 128  # pairs per step, at most: the batch of most published preference runs
COMPLETIONS = 8, 256  # of a rollout: at least, at most
RATES = {"train": 5e-7, "online": 1e-6, "reward": 5e-6, "sft": 1e-5}  # for all weights of 8 billion parameters
LORA = 10  # times the rate of all weights
LARGEST_RATE = 1e-3
PASS = 512, 16384  # tokens of a forward and backward pass: at least, at most
LENGTH = 2048  # tokens of a prompt with a completion, at most, where the model reads so many


def learning_rate(kind: str, parameters: int, *, lora: bool) -> float:
    """The rate of a kind of stage for a model of so many parameters, to two digits."""
    rate = RATES[kind] * (8e9 / parameters) ** 0.6 * (LORA if lora else 1)
    return float(f"{min(rate, LARGEST_RATE):.1e}")


@dataclass
class Outlook:
    """What a stage that trains will do, as far as it is known before; `chosen`: what was fitted for it, and to what."""

    rows: int | None = None
    held_out: int | None = None
    parameters: int = 0
    trained: int = 0
    added: int = 0  # of an adapter
    gib: float = 0.0  # of weights, gradients and the optimiser's state, and of frozen copies
    config: Any = None  # of the model
    chosen: dict[str, str] = field(default_factory=dict)
    args: Any = None  # the trainer's settings, with everything fitted
    steps: int | None = None

    def __str__(self) -> str:
        """`54 rows, 6 held out; batch 4, 4 epochs: 56 steps, 5 of warm-up; rate 5.8e-06`."""
        args, parts = self.args, []
        if self.rows is not None:
            parts.append(f"{self.rows} rows" + (f", {self.held_out} held out" if self.held_out else ""))
        work = args.batch_in_words
        if self.steps is not None:
            epochs = f", {args.num_train_epochs:g} epochs" if args.max_steps <= 0 and args.num_train_epochs != 1 else ""
            warm = args.get_warmup_steps(self.steps)
            work += f"{epochs}: {self.steps} step{'s' * (self.steps != 1)}" + (f", {warm} of warm-up" if warm else "")
        parts += [work, f"rate {float(args.learning_rate):.2g}"]
        if self.parameters:
            total = self.parameters + self.added
            share = "all" if self.trained == total else f"{models.in_words(self.trained)} of"
            parts.append(f"trains {share} {models.in_words(total)} parameters")
            parts.append(f"about {self.gib:.2g} GiB and the activations of {_pass(args, self.config)}")
        return "; ".join(parts)

    @property
    def reasons(self) -> str:
        """`chosen: batch and epochs for at least 50 steps; rate for all weights of 134.5 M parameters`."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.chosen.items():
            by_reason.setdefault(reason, []).append(name)
        return "; ".join(f"{' and '.join(names)} {reason}" for reason, names in by_reason.items())


def _pass(args: Any, config: Any) -> str:
    """How much is computed at a time, and the memory that its activations take at most."""
    most = args.max_tokens_per_microbatch
    if not most:
        return "a batch"
    gib = most * _kept(args, config) / 2**30
    return f"at most {most:,} tokens" + (f" (up to {gib:.2g} GiB)" if gib else "")


def _kept(args: Any, config: Any) -> int:
    """How many bytes a backward pass keeps of a token: of each layer of a decoder like Llama ten hidden states, keys
    and values, and four of the MLP; where layers are computed twice, one hidden state. 0 for other configs.
    """
    twice = getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing
    names = "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"
    numbers: list[Any] = [getattr(config, name, None) for name in names]
    if not all(isinstance(number, int) for number in numbers):
        return 0
    layers, width, inner, heads, shared = numbers
    number = 2 if args.bf16 or args.fp16 else 4
    return number * layers * (width if twice else 10 * width + 2 * width * shared // heads + 4 * inner)


def _fit_pass(found: Outlook, processes: int) -> int:
    """Tokens of a pass: the largest power of 2 whose activations take at most half of the memory that weights leave."""
    least, most = PASS
    shards, there = processes if found.args.fsdp else 1, _memory(processes)
    left = there - found.gib * 2**30 / shards
    size = max(least, _largest(most, lambda size: size * _kept(found.args, found.config) <= left / 2))
    if size < most:
        found.chosen[f"{size:,} tokens at a time"] = f"for {there / 2**30:.3g} GiB of memory"
    return size


def _memory(processes: int) -> float:
    """Bytes that a process has: its GPU's, or its share of the machine's."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    limits = [int(text) for file in _limits() if (text := file.read_text().strip()).isdecimal()]  # "max": none
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *limits]) / processes


def _limits(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[Path]:
    """Files that limit the memory of this process: those of its control groups, as of a container."""
    listed = own.read_text().splitlines() if own.is_file() else []
    places = dict(line.partition(":")[2].split(":", 1) for line in listed if line.count(":") >= 2)
    kinds = ("", groups, "memory.max"), ("memory", groups / "memory", "memory.limit_in_bytes")
    files = [folder / at / name for kind, folder, name in kinds for at in (".", "." + places.get(kind, ""))]
    return [file for file in dict.fromkeys(files) if file.is_file()]


def fit(recipe: Recipe, processes: int = 1) -> tuple[Recipe, dict[str, Outlook]]:
    """`(the recipe with what was fitted, what each stage that trains will do)`.

    A world's recipes are left as they are, and the papers' settings too, but for what a pass takes, which does not
    change the result. Raises `RecipeError` for a stage whose learning rate would be 0 at every step, and what reading
    rows and the model's config raises.
    """
    own = not recipe.model.is_world
    fits = own and recipe.settings == "fitted"
    if fits and not {"bf16", "fp16", "use_cpu"} & set(recipe.training):  # false too: for `evaluate` elsewhere
        recipe = recipe.model_copy(update={"training": {**recipe.training, "bf16": _computes_in_bf16()}})
    if fits and not all(getattr(stage, "samples_rows", False) for stage in resolve_stages(recipe)):
        recipe = recipe.model_copy(update={"data": _cut(recipe)})
    outlooks: dict[str, Outlook] = {}
    stages = dict(recipe.stages)
    counts: dict[str, tuple[int | None, int | None]] = {}
    sizes: dict[str, tuple[int, int, Any]] = {}
    for stage in resolve_stages(recipe):
        if isinstance(stage, Trained):
            found = outlooks[stage.name] = Outlook()
            if own:
                found.parameters, found.trained, found.config = _size(stage, recipe, sizes)
                found.added = found.trained if stage.lora is not None else 0
                found.rows, found.held_out = _count(stage, counts)
            if fits:
                stages[stage.name] = _fitted(stage, found, processes)
    recipe = recipe.model_copy(update={"stages": stages})
    for stage in resolve_stages(recipe):
        if isinstance(stage, Trained):
            found = outlooks[stage.name]
            found.args = stage.args("unused")
            rows = 0 if found.args.max_steps > 0 else found.rows  # which then do not matter
            found.steps = None if rows is None else found.args.steps_for(rows)
            found.gib = _gib(stage, found)
            if own and "max_tokens_per_microbatch" not in stage.training:
                most = found.args.max_tokens_per_microbatch = _fit_pass(found, processes)
                training = {**stage.own.training, "max_tokens_per_microbatch": most}
                stages[stage.name] = stage.own.model_copy(update={"training": training})
            check_packages(found.args)
            if found.rows is not None:
                check_held_out(found.args, found.held_out, f"stages.{stage.name}")
            if found.steps is not None:
                check_rate(found.args, found.steps, f"stages.{stage.name}")
    return recipe.model_copy(update={"stages": stages}), outlooks


def _computes_in_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def _cut(recipe: Recipe) -> DataSpec:
    """The recipe's `data:` with lengths that its rows are cut to, where it gives none."""
    given = recipe.data.tokenize
    path = None if recipe.model.path is None else locate(recipe.model, Path(recipe.output_dir))
    config = models.skeleton(recipe.model, None).config if path is None else models.load_config(recipe.model, path)
    most, prompt = min(LENGTH, positions_of(config) or LENGTH), given.get("max_prompt_length") or 0
    length = given.get("max_length", most if prompt < most else prompt + most // 8)
    made = {"max_length": length, "max_prompt_length": length and length * 225 // 256}
    return DataSpec.model_validate({**recipe.data.model_dump(exclude_unset=True), **made, **given})


def _count(stage: Trained, known: dict[str, tuple[int | None, int | None]]) -> tuple[int | None, int | None]:
    """How many rows there are to train on, and are held out; None where that is not known yet, as of a stream."""
    maker = stage.above.get(str(stage.data.stage))
    if maker is not None and maker.kind != "annotate":  # it makes other rows than it reads
        return None, None
    data = stage.data if maker is None else maker.data
    if (key := fingerprint([data.model_dump(), stage.samples_rows])) not in known:
        rows = open_rows(data, stage.recipe.seed, prompts=stage.samples_rows)
        train, held_out = (len(part) if isinstance(part, Sized) else None for part in rows)
        known[key] = train, held_out
    return known[key]


def _size(stage: Trained, recipe: Recipe, known: dict[str, tuple[int, int, Any]]) -> tuple[int, int, Any]:
    """Parameters of the model that the stage starts from, how many of them (or of its adapter) are trained, and its
    config."""
    spec: ModelSpec = stage.existing.model if stage.existing.model.stage is None else recipe.model
    lora = stage.lora
    key = fingerprint([spec.model_dump(), stage.model.freeze, lora and lora.model_dump()])
    if key not in known:
        model = models.skeleton(spec, None if spec.path is None else locate(spec, Path(recipe.output_dir)))
        if stage.model.freeze is not None and lora is None:
            models.freeze_vision(model)
        count, own = (sum(w.numel() for w in model.parameters() if w.requires_grad or every) for every in (True, False))
        config: Any = model.config
        trained = own if lora is None else models.adapter_size(model, lora)
        known[key] = count, trained, config.get_text_config()
    return known[key]


_STATE = {"sgd": 0, "rmsprop": 4, "adafactor": 0, "lion": 4}  # bytes per trained weight; of AdamW 8


def _gib(stage: Trained, found: Outlook) -> float:
    """Memory of what stays: the policy, what is trained of it, and the frozen models that the stage asks."""
    width = {"bfloat16": 2, "float16": 2}.get(stage.model.dtype, 4)
    optim = str(getattr(found.args.optim, "value", found.args.optim))
    state = 2 if "8bit" in optim else next((n for name, n in _STATE.items() if optim.startswith(name)), 8)
    copies = 1 + len(stage.asks) + (stage.lora is None and stage.has_reference)
    return (copies * found.parameters * width + found.trained * (width + state)) / 2**30


def _fitted(stage: Trained, found: Outlook, processes: int) -> Any:
    """The stage's own settings with those that it lacks."""
    given, lora = stage.training, stage.lora is not None
    made: dict[str, Any] = {}
    if found.rows is not None:
        chosen = fit_rollout if stage.samples_rows else fit_batch
        made |= chosen(given, found, processes)
    if {"fp16", "use_cpu"} & set(stage.own.training) and "bf16" not in stage.own.training:
        made["bf16"] = False
    weights = f"for {'LoRA' if lora else 'all weights'} of {models.in_words(found.parameters)} parameters"
    if "learning_rate" not in given:
        made["learning_rate"] = learning_rate(stage.kind, found.parameters, lora=lora)
        found.chosen["rate"] = weights
    own = stage.own.model_copy(update={"training": {**stage.own.training, **made}})
    if getattr(own, "critic", None) is not None and "lr" not in own.critic:
        rate = learning_rate("reward", found.parameters, lora=False)
        found.chosen[f"the critic's rate {rate:g}"] = weights
        own = own.model_copy(update={"critic": {**own.critic, "lr": rate}})
    return own


def _epochs(given: dict[str, Any], rows: int, made: dict[str, Any], chosen: list[str]) -> float:
    if "num_train_epochs" in given:
        return float(given["num_train_epochs"])
    epochs = min(EPOCHS, max(1, math.ceil(SEEN / rows)))
    if given.get("max_steps", -1) <= 0:
        made["num_train_epochs"] = epochs
        chosen.append("epochs")
    return epochs


def _largest(most: int, enough: Any) -> int:
    """The largest power of 2, at most `most`, that is `enough`; else 1."""
    return next((2**i for i in reversed(range(most.bit_length())) if 2**i <= most and enough(2**i)), 1)


def fit_batch(given: dict[str, Any], found: Outlook, processes: int) -> dict[str, Any]:
    """Batch, epochs and warm-up of a stage that learns from rows."""
    made: dict[str, Any] = {}
    chosen: list[str] = []
    rows, epochs = found.rows or 1, _epochs(given, found.rows or 1, made, chosen)
    device, accumulated = given.get("per_device_train_batch_size"), given.get("gradient_accumulation_steps")
    if device is None:
        pairs = _largest(BATCH, lambda size: epochs * math.ceil(rows / size) >= STEPS)
        share = max(1, pairs // processes // (accumulated or 1))
        device = share if accumulated else min(share, 8)
        made["per_device_train_batch_size"] = device
        if accumulated is None:
            made["gradient_accumulation_steps"] = accumulated = max(1, share // device)
        chosen.insert(0, "batch")
    steps = given.get("max_steps", -1)
    if steps <= 0:
        steps = pass_steps(epochs, rows, device * processes, accumulated or 1)
    return made | _fit_warmup(given, found, chosen, steps, steps // 10)


def fit_rollout(given: dict[str, Any], found: Outlook, processes: int) -> dict[str, Any]:
    """Prompts per rollout, epochs and warm-up of a stage that learns from samples."""
    made: dict[str, Any] = {}
    chosen: list[str] = []
    rows, epochs = found.rows or 1, _epochs(given, found.rows or 1, made, chosen)
    generations, cuts = given.get("num_generations", 8), given.get("minibatches", 1) * processes
    each = given.get("minibatches", 1) * given.get("rollout_epochs", 1)
    prompts = given.get("prompts_per_rollout")
    if prompts is None:
        least, most = (max(1, math.ceil(count / generations)) for count in COMPLETIONS)
        size = _largest(max(most, 1), lambda size: epochs * rows / size * each >= STEPS)
        prompts = made["prompts_per_rollout"] = math.ceil(max(size, least) / cuts) * cuts
        chosen.insert(0, "prompts per rollout")
    steps = given.get("max_steps", -1)
    steps = steps if steps > 0 else rollout_steps(epochs, rows, prompts, each)
    return made | _fit_warmup(given, found, chosen, steps, min(10, steps // 10))


def _fit_warmup(given: dict[str, Any], found: Outlook, chosen: list[str], steps: int, warmup: int) -> dict[str, Any]:
    """Also how often the log gets an entry: a curve has at least 20 points."""
    if chosen:
        enough = f"for at least {STEPS} steps" if steps >= STEPS else "as far as the rows go"
        found.chosen[" and ".join(chosen)] = enough
    fits = {"warmup_steps": warmup, "logging_steps": max(1, min(10, steps // 20))}
    return {name: value for name, value in fits.items() if name not in given}
