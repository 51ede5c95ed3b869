"""The policy as it will be trained: with its adapter, without dropout; and which of its adapters are saved."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import set_seed

from tokengrain.training.config import PreferenceConfig
from tokengrain.training.reference import disable_dropout, is_peft


def prepared_policy(model: Any, args: PreferenceConfig, peft_config: Any) -> Any:
    """`model` as it will be trained: with its new adapter, without dropout."""
    if peft_config is not None:
        model = with_adapter(model, args, peft_config)
    if args.disable_dropout:
        disable_dropout(model)
    if is_peft(model) and _checkpoints_activations(args):
        model.enable_input_require_grads()
    return model


def with_adapter(model: Any, args: PreferenceConfig, peft_config: Any) -> Any:
    """`model` with a new adapter, whose random numbers come from `args.seed`."""
    from peft import get_peft_model

    set_seed(args.seed)
    return get_peft_model(model, peft_config)


def save_active_adapter_only(model: Any) -> None:
    """Leave adapters that are only asked (a teacher's) out of what the model saves."""
    model.save_pretrained = partial(model.save_pretrained, selected_adapters=[model.active_adapter])


def _checkpoints_activations(args: PreferenceConfig) -> bool:
    # Newer versions of transformers renamed it.
    return any(getattr(args, name, None) for name in ("activation_checkpointing", "gradient_checkpointing"))
