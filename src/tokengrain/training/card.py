"""The model card: what a trained model is, from which paper, data and settings, how good it is, how to load it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from tokengrain.method import METHODS, Card
from tokengrain.runs import INPUTS, TITLES, spoken
from tokengrain.scoring.model import is_encoder_decoder, is_token_classifier
from tokengrain.scoring.reference import is_peft

SETTINGS = """
    learning_rate lr_scheduler_type warmup_steps num_train_epochs max_steps per_device_train_batch_size
    gradient_accumulation_steps optim weight_decay max_grad_norm bf16 seed num_generations prompts_per_rollout
    max_new_tokens temperature
"""

LOADING = {
    "model": """
from transformers import AutoModelForCausalLM, AutoTokenizer

place = PLACE
tokenizer = AutoTokenizer.from_pretrained(place)
model = AutoModelForCausalLM.from_pretrained(place)""",
    "adapter": """
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

place = PLACE
tokenizer = AutoTokenizer.from_pretrained(place)
model = AutoPeftModelForCausalLM.from_pretrained(place)  # loads the base model as well""",
    "reward": """
from transformers import AutoModelForTokenClassification, AutoTokenizer

place = PLACE
tokenizer = AutoTokenizer.from_pretrained(place)
model = AutoModelForTokenClassification.from_pretrained(place)  # one score per token""",
    "reward adapter": """
from tokengrain.models import load_trained_reward_model

place = PLACE
model = load_trained_reward_model(place)  # one score per token""",
}


def model_card(
    trainer: Any,
    *,
    name: str,
    base: str | None = None,
    method: str | None = None,
    data: Any = None,
    metrics: Mapping[str, Any] | None = None,
) -> str:
    """The card of a trainer's model as Markdown, with the metadata that the hub reads.

    Args:
        name: of the model.
        base: what training started from; None: what the model says of itself.
        method: a method's name, whose paper is cited; None: the one whose objective was trained.
        data: the name of the rows; None: the data set's own.
        metrics: `before`, `after` and `held_out` of a stage; None: the last evaluation.
    """
    model, objective = trainer.model, trainer.objective
    adapter = is_peft(model)
    whole = model.get_base_model() if adapter else model
    reward, encoder = is_token_classifier(whole), is_encoder_decoder(whole)
    kind = " ".join(["reward"] * reward + ["adapter"] * adapter) or "model"
    card = METHODS.get(method or "") or _trained_with(objective.name)
    title = card.title if card is not None else method or objective.name
    base = _base(model) if base is None else _short(base)
    rows = _short(str(data if data is not None else getattr(trainer.train_dataset, "name", ""))) or "rows in memory"
    place = json.dumps(trainer.hub_model_id or ".") + "  # this folder, or the model's name on a hub"
    task = "token-classification" if reward else "text2text-generation" if encoder else "text-generation"
    parts = [_metadata(base, adapter, task, method or objective.name, rows)]
    what = ("A token-level reward model" if reward else "A language model") + (" (a LoRA adapter)" if adapter else "")
    start = f" from `{base}`" if base else ""
    parts.append(f"# {name}\n\n{what}, trained{start} with {title} by tokengrain {version('tokengrain')}.")
    loading = LOADING[kind].replace("ForCausalLM", "ForSeq2SeqLM") if encoder else LOADING[kind]
    parts.append("## Load it\n\n```python" + loading.replace("PLACE", place) + "\n```")
    parts.append("## How it was trained\n\n" + _settings(trainer, rows, model if adapter else None))
    parts.append("## Held-out numbers\n\n" + _numbers(trainer, metrics))
    parts.append("## Paper\n\n" + _paper(card) if card is not None else "")
    parts.append("Limits and risks were not assessed: what the data teach, the model has learned.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _trained_with(objective: str) -> Card | None:
    named = METHODS.get(objective)
    return named or next((card for card in METHODS.values() if card.objective == objective), None)


def _base(model: Any) -> str:
    """Where the weights came from."""
    place = str(getattr(model, "name_or_path", "") or getattr(getattr(model, "config", None), "_name_or_path", ""))
    return _short(place)


def _short(place: str) -> str:
    """A hub name; the last part of a path; nothing of what was given in memory."""
    if Path(place).parent.name == INPUTS:
        return ""
    return Path(place).name if place.startswith(("/", ".", "~")) or os.path.exists(place) else place


def _metadata(base: str, adapter: bool, task: str, method: str, rows: str) -> str:
    hub = re.compile(r"[\w.-]+/[\w.-]+")
    values: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": task,
        "tags": ["tokengrain", method],
    }
    values |= {"base_model": base} if hub.fullmatch(base) else {}
    values |= {"datasets": [rows]} if hub.fullmatch(rows) else {}
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _settings(trainer: Any, rows: str, adapter: Any) -> str:
    args, described = trainer.args, trainer.objective.describe()
    given = ", ".join(f"{k} {v}" for k, v in described.items() if k != "name" and v is not None)
    count = f", {len(trainer.train_dataset):,} rows" if hasattr(trainer.train_dataset, "__len__") else ""
    lines = [f"- data: `{rows}`{count}", f"- objective: `{described.get('name', trainer.objective.name)}` ({given})"]
    if getattr(trainer, "credit", None) is not None:
        lines.append(f"- token credit: {trainer.credit.describe()}")
    if adapter is not None:
        lines.append(f"- {_adapter(adapter)}")
    idle = "num_train_epochs" if args.max_steps > 0 else "max_steps"
    values = {key: getattr(args, key) for key in SETTINGS.split() if hasattr(args, key) and key != idle}
    lines.append("- " + ", ".join(f"{key} {getattr(value, 'value', value)}" for key, value in values.items()))
    lines.append(f"- {trainer.state.global_step} optimiser steps on {args.world_size} process(es)")
    return "\n".join(lines)


def _adapter(model: Any) -> str:
    """An adapter's kind and settings, and how the base was rounded under it."""
    config = model.peft_config[model.active_adapter]
    method = getattr(getattr(model.config, "quantization_config", None), "quantization_method", None)
    targets, whole = config.target_modules, config.modules_to_save
    said = [f"LoRA: r {config.r}, alpha {config.lora_alpha}, dropout {config.lora_dropout}"]
    said += [name for name in ("use_dora", "use_rslora") if getattr(config, name)]
    said += [f"init_lora_weights {start}" for start in [config.init_lora_weights] if isinstance(start, str)]
    names = [targets] if isinstance(targets, str) else sorted({name.rpartition(".")[2] for name in targets})
    said += [f"on {' '.join(names)}"]
    said += [f"trained in full {' '.join(sorted(whole))}"] if whole else []
    said += [f"over weights in {method()}"] if method is not None else []
    return ", ".join(said)


def _numbers(trainer: Any, metrics: Mapping[str, Any] | None) -> str:
    if metrics is None:
        logs = [log for log in trainer.state.log_history if any(key.startswith("eval_") for key in log)]
        metrics = {"after": {key.removeprefix("eval_"): value for key, value in logs[-1].items()}} if logs else {}
    before, after = metrics.get("before") or {}, metrics.get("after") or {}
    rows = [
        f"| {title} | {spoken(before, key) if key in before else '–'} | {spoken(after, key, before)} |"
        for key, title in TITLES.items()
        if key in after
    ]
    if not rows:
        return "None: no rows were held out."
    count = f"On {metrics['held_out']} rows that were not trained on.\n\n" if "held_out" in metrics else ""
    return count + "\n".join(["| | before | after |", "|---|---|---|", *rows])


def _paper(card: Card) -> str:
    bibtex = (
        f"@misc{{arxiv-{card.arxiv},\n  title = {{{card.paper_title}}},\n  eprint = {{{card.arxiv}}},\n"
        f"  archivePrefix = {{arXiv}},\n  year = {{20{card.arxiv[:2]}}},\n  url = {{https://arxiv.org/abs/{card.arxiv}}},\n}}"
    )
    return f"[{card.paper_title}](https://arxiv.org/abs/{card.arxiv}), {card.venue}\n\n```bibtex\n{bibtex}\n```"
