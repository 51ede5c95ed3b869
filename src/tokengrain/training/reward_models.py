"""Token-level reward models: a causal model's decoder with one number per token instead of a vocabulary.

The form on disk is a transformers token-classification model with one label, whole or as a LoRA adapter that
carries its head. The head has no bias to speak of: it stays 0. (Q-RM's loss does not see a constant that is added to
all scores, so a bias would drift on rounding errors.)
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokengrain.batch import Sample, Segments, TokenBatch
from tokengrain.credit.reward_model import (
    CompletionStatistics,
    ScoreStatistics,
    config_of,
    frozen_token_scores,
    set_statistics,
)
from tokengrain.credit.shaping import Moments
from tokengrain.errors import DataError, ModelError
from tokengrain.files import read_json, write_json
from tokengrain.objectives.qrm import Pooling, pooled_scores
from tokengrain.recipe.specs import LoraSpec, ModelSpec
from tokengrain.scoring.embeddings import input_embeddings
from tokengrain.training.models import ADAPTER, base_of_adapter, import_peft, is_adapter, load_config, load_model
from tokengrain.training.reference import disable_dropout, is_peft

HEADS = ("score", "classifier")
STATISTICS = "score_statistics.json"
"""Beside an adapter, which has no config of its own to keep the statistics in."""
_Read = Callable[[Tensor, Segments], Tensor]


def load_reward_model(
    spec: ModelSpec, path: str, *, merge_adapter: bool = False, train_adapter: bool = False
) -> nn.Module:
    """The reward model at `path`, or a new one with the decoder of the causal model at `path` and a fresh head.

    The head's random numbers are torch's; seed them first. Dropout is off.

    Args:
        spec: how to load: dtype, attention implementation, trust in remote code.
        path: a folder or hub name of a causal model, of a reward model (which is gone on with), or of an adapter
            of either.
        merge_adapter: fold an adapter into its base.
        train_adapter: go on training the adapter of a reward model.

    Raises:
        ModelError: there is no model, its architecture has no token-classification form in transformers, or it
            is a classifier with more than one label.
    """
    if is_adapter(path):
        return _adapted(spec, path, merge_adapter, train_adapter)
    config = load_config(spec, path)
    _check_architecture(config)
    fresh = not _is_token_classifier(config)
    if not fresh and config.num_labels != 1:
        raise ModelError(f"{path} is a token classifier of {config.num_labels} labels; a reward model has one")
    config.num_labels, config.classifier_dropout = 1, 0.0
    from transformers import AutoModelForTokenClassification

    try:
        with _quiet(fresh):
            model = AutoModelForTokenClassification.from_pretrained(
                path,
                config=config,
                dtype=spec.dtype,
                attn_implementation=spec.attn_implementation,
                trust_remote_code=spec.trust_remote_code,
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise ModelError(f"no reward model could be made of {path}: {first}") from error
    return _finished(model, fresh=fresh)


def load_trained_reward_model(path: str, *, dtype: Any = "auto", merge: bool = True) -> nn.Module:
    """A reward model that was trained before, ready to score: in evaluation mode, without gradients.

    Args:
        path: a folder with a whole model or with an adapter and its head, or a hub name.
        dtype: "auto" (as saved), "float32", "bfloat16" or "float16".
        merge: fold an adapter into its base.

    Raises:
        ModelError: there is no model, or it is a causal model, whose head would be random.
    """
    spec = ModelSpec(path=path, dtype=dtype)
    trained = is_reward_adapter(path) if is_adapter(path) else _is_token_classifier(load_config(spec, path))
    if not trained:
        raise ModelError(
            f"{path} is not a reward model but a language model; expected a token classifier with one label, such as "
            "a stage of kind `reward` makes"
        )
    return load_reward_model(spec, path, merge_adapter=merge).eval().requires_grad_(False)


def reward_model_from(model: nn.Module, *, share: bool = True) -> nn.Module:
    """A reward model with the decoder of a causal model that is in memory, and a fresh head.

    Args:
        model: a causal language model of transformers (merge an adapter first).
        share: use the decoder itself, so that training one trains both; otherwise a copy of it.

    Raises:
        ModelError: the architecture has no token-classification form, or the model is a PEFT model.
    """
    from transformers import AutoModelForTokenClassification

    if is_peft(model):
        raise ModelError("the model has an adapter; expected a plain model, as merge_and_unload() gives")
    config: Any = copy.deepcopy(model.config)
    _check_architecture(config)
    config.num_labels, config.classifier_dropout = 1, 0.0
    with torch.device("meta"):
        made = AutoModelForTokenClassification.from_config(config)
    decoder: Any = model.base_model
    setattr(made, made.base_model_prefix, decoder if share else copy.deepcopy(decoder))
    like = input_embeddings(model).weight
    name = head_name(made)
    setattr(made, name, getattr(made, name).to_empty(device=like.device).to(like.dtype))
    return _finished(made.train(model.training), fresh=True)


def reward_lora_config(lora: LoraSpec) -> Any:
    """A recipe's `lora:` as peft's configuration for a reward model: the head is trained in full and saved."""
    peft = import_peft()
    return peft.LoraConfig(
        task_type=peft.TaskType.TOKEN_CLS,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        exclude_modules=list(HEADS),  # "all-linear" would put a LoRA on the head, which is trained as it is
        modules_to_save=[*HEADS, *(m for m in lora.modules_to_save or () if m not in HEADS)],
        use_rslora=lora.use_rslora,
    )


def head_name(model: nn.Module) -> str:
    """The attribute of a token classifier that is its head.

    Raises:
        ModelError: it has none of the known ones.
    """
    for name in HEADS:
        if isinstance(getattr(model, name, None), nn.Module):
            return name
    raise ModelError(f"{type(model).__name__} has no head named {' or '.join(HEADS)}; is it a token classifier?")


# ------------------------------------------------------------------------------------------------- statistics


def measure_scores(model: nn.Module, dataset: Any, *, max_rows: int = 512, max_tokens: int = 8192) -> ScoreStatistics:
    """Mean and standard deviation of the scores of a data set's completion tokens; also set on the model's config.

    All tokens are pooled. Of a longer data set `max_rows` rows are taken, evenly spread (of a stream the first ones).
    The raw scale of the scores is arbitrary (the loss pushes pairs gamma/beta apart), so whatever uses them
    needs these two numbers.

    Args:
        model: the trained reward model.
        dataset: a data set or list of samples, or a stream of them.
        max_rows: most rows that are scored.
        max_tokens: token budget of one forward pass.

    Raises:
        DataError: the data set is empty.
    """
    moments = _moments(model, dataset, max_rows, max_tokens, lambda scores, segments: scores)
    statistics = ScoreStatistics(moments.mean, moments.std)
    set_statistics(model, statistics)
    return statistics


def measure_completions(
    model: nn.Module, dataset: Any, *, pooling: Pooling = "mean", max_rows: int = 512, max_tokens: int = 8192
) -> CompletionStatistics:
    """The same of the scores of whole completions, pooled as in the loss that the model was trained with."""

    def pooled(scores: Tensor, segments: Segments) -> Tensor:
        return pooled_scores(scores, segments, pooling)[segments.lengths > 0]

    moments = _moments(model, dataset, max_rows, max_tokens, pooled)
    statistics = CompletionStatistics(moments.mean, moments.std, pooling)
    set_statistics(model, statistics)
    return statistics


def _moments(model: nn.Module, dataset: Any, max_rows: int, max_tokens: int, read: _Read) -> Moments:
    """Mean and spread of what is read from the token scores of a data set's completions."""
    samples = _some(dataset, max_rows)
    if not samples:
        raise DataError("the dataset is empty", file=getattr(dataset, "name", None), expected="at least one row")
    device = next(model.parameters()).device
    parts = TokenBatch.from_samples(samples).split(max_tokens)
    scores = ((frozen_token_scores(model, part.to(device)).cpu(), part.segments) for part in parts)
    return sum((Moments.of(read(values, segments)) for values, segments in scores), Moments())


def save_statistics(path: str | Path, *statistics: ScoreStatistics | CompletionStatistics) -> None:
    """Write statistics into a saved reward model's folder: its config, or a file beside an adapter."""
    file = Path(path) / (STATISTICS if is_adapter(str(path)) else "config.json")
    kept = read_json(file) if file.exists() else {}
    write_json(file, {k: v for part in (kept, *(one.as_dict() for one in statistics)) for k, v in part.items()})


def _some(dataset: Any, most: int) -> list[Sample]:
    if not hasattr(dataset, "__len__"):
        return list(islice(dataset, most))
    stride = max(1, -(-len(dataset) // most))
    return [dataset[i] for i in range(0, len(dataset), stride)]


# --------------------------------------------------------------------------------------------------- building


def _adapted(spec: ModelSpec, path: str, merge: bool, train: bool) -> nn.Module:
    base = base_of_adapter(path)
    if not is_reward_adapter(path):  # a policy's adapter: its merged model gives the decoder
        return reward_model_from(load_model(spec, path, merge_adapter=True))
    peft = import_peft()
    model = load_reward_model(spec, base)
    try:
        adapted = peft.PeftModel.from_pretrained(model, path, is_trainable=train)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"adapter {path} does not fit its base model: {str(error).splitlines()[0]}") from error
    if (file := Path(path) / STATISTICS).is_file():
        for name, value in read_json(file).items():
            setattr(config_of(adapted), name, value)
    return adapted.merge_and_unload() if merge else adapted


def is_reward_adapter(path: str) -> bool:
    """Whether an adapter folder is a reward model's, with its head, and not a policy's."""
    return bool(read_json(Path(path) / ADAPTER).get("task_type") == "TOKEN_CLS")


def _is_token_classifier(config: Any) -> bool:
    return any(name.endswith("ForTokenClassification") for name in config.architectures or ())


def _check_architecture(config: Any) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING

    if getattr(config, "is_encoder_decoder", False) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"model type {config.model_type!r} is not a causal language model, which a reward model needs")
    if type(config) not in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING:
        raise ModelError(
            f"transformers has no token-classification form of model type {config.model_type!r}; expected one that has "
            "(llama, qwen2, qwen3, mistral, gemma2, gpt2, gpt_neox, ...)"
        )


def reset_head(model: nn.Module) -> None:
    """Draw a token classifier's head anew, with torch's random numbers, its bias 0."""
    head: Any = getattr(model, head_name(model))
    # Scores start with a spread of about 1 (Stiennon et al. 2020): little beside gamma/beta.
    nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
    if head.bias is not None:
        nn.init.zeros_(head.bias)


def _finished(model: Any, *, fresh: bool) -> nn.Module:
    head = getattr(model, head_name(model))
    if fresh:
        reset_head(model)
    if isinstance(head.bias, nn.Parameter):
        value = head.bias.detach().clone()
        del head.bias
        # A buffer is saved under the same name and stays frozen where peft makes whole modules trainable.
        head.register_buffer("bias", value)
    disable_dropout(model)
    return model


@contextlib.contextmanager
def _quiet(fresh: bool) -> Iterator[None]:
    """No report on weights that are missing or left over: with a fresh head both are as they should be."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    try:
        if fresh:
            logging.set_verbosity_error()
        yield
    finally:
        logging.set_verbosity(before)
