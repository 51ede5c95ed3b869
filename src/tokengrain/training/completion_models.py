"""Models that judge whole completions, for the reward `reward_model`."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from tokengrain.errors import ModelError
from tokengrain.recipe.specs import ModelSpec
from tokengrain.scoring.classifier import SUFFIX
from tokengrain.training.models import is_adapter, load_config
from tokengrain.training.reward_models import is_reward_adapter, load_trained_reward_model

SEQUENCE = "ForSequenceClassification"


def load_completion_model(path: str, *, dtype: Any = "auto", trust_remote_code: bool = False) -> nn.Module:
    """A model that judges whole completions, ready to score: in evaluation mode, without gradients.

    Args:
        path: a folder or hub name: what a stage of kind `reward` made (an adapter too), or any sequence classifier of
            transformers with one label.
        dtype: "auto" (as saved), "float32", "bfloat16" or "float16".
        trust_remote_code: run the Python code that a sequence classifier on the hub brings along.

    Raises:
        ModelError: there is no model, it is of another kind, or it has several labels.
    """
    spec = ModelSpec(path=path, dtype=dtype, trust_remote_code=trust_remote_code)
    if check_completion_model(spec, path) == "tokens":
        return load_trained_reward_model(path, dtype=dtype)
    from transformers import AutoModelForSequenceClassification

    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=dtype, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise ModelError(f"no sequence classifier could be loaded from {path}: {first}") from error
    return model.eval().requires_grad_(False)


def check_completion_model(spec: ModelSpec, path: str) -> Literal["tokens", "sequence"]:
    """Whether it gives a score per token or one for the whole text; loads no weights.

    Raises:
        ModelError: there is no model, it is of another kind, or it has several labels.
    """
    config = load_config(spec, path)
    kinds = tuple(config.architectures or ())
    if is_adapter(path):
        tokens, sequence = is_reward_adapter(path), False
    else:
        tokens, sequence = (any(name.endswith(end) for name in kinds) for end in (SUFFIX, SEQUENCE))
    if not tokens and not sequence:
        kind = "an adapter of no reward model" if is_adapter(path) else " or ".join(kinds) or "of an unknown kind"
        raise ModelError(
            f"{path} is {kind}; expected a reward model: a token classifier with one label, such as a stage of kind "
            "`reward` makes, or a sequence classifier with one label"
        )
    if not is_adapter(path) and config.num_labels != 1:
        raise ModelError(f"{path} is a classifier of {config.num_labels} labels; a reward model has one")
    return "tokens" if tokens else "sequence"
