"""The head of a live model: its weight, looked up through adapters and shards."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokengrain.scoring.embeddings import output_embeddings
from tokengrain.scoring.head import Head


def live_head(lm: nn.Module, scale: float, softcap: float | None) -> Head | None:
    """The head with its live weight, or None if its module is more than a matrix (adapters, quantisation)."""
    linear = plain_linear(output_embeddings(lm))
    if linear is None:
        return None
    bias = None if linear.bias is None else _whole(linear.bias)
    return Head(_whole(linear.weight), bias, scale, softcap)


def plain_linear(module: Any) -> nn.Linear | None:
    """The `nn.Linear` that `module` amounts to at the moment, looking through PEFT's wrappers."""
    if getattr(module, "disable_adapters", False) and not getattr(module, "merged", False):
        # PEFT: a tuner layer keeps its `base_layer`, a trained copy its `original_module`.
        return plain_linear(getattr(module, "base_layer", None) or getattr(module, "original_module", None))
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        return plain_linear(module.modules_to_save[module.active_adapters[0]]) if module.active_adapters else None
    forward = getattr(type(module), "forward", None)
    if isinstance(module, nn.Linear) and forward is nn.Linear.forward and "forward" not in vars(module):
        return module
    return None


def _whole(parameter: Tensor) -> Tensor:
    """A sharded parameter gathered; its gradient is averaged over ranks, as FSDP does with all the others."""
    from torch.distributed.tensor import DTensor, Partial

    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def raw_logits(lm: nn.Module, hidden: Tensor) -> Tensor:
    """Logits before scaling and capping, `[N, V]`; for the probe."""
    linear = plain_linear(output_embeddings(lm))
    if linear is None:
        return output_embeddings(lm)(hidden)
    bias = None if linear.bias is None else _whole(linear.bias)
    return nn.functional.linear(hidden.to(linear.weight.dtype), _whole(linear.weight), bias)
