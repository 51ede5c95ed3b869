"""What the policy is compared with: choosing the reference, and switching dropout off."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tokengrain.batch import TokenBatch
from tokengrain.errors import ModelError
from tokengrain.scoring import Distribution, head_of, prepare, score
from tokengrain.scoring.forward import evaluating
from tokengrain.scoring.reference import (
    AdapterOffReference,
    ColumnReference,
    FrozenReference,
    Reference,
    ReferenceScores,
)

if TYPE_CHECKING:
    from accelerate import Accelerator


ADAPTER_OFF = "adapter_off"
"""In place of a reference: the policy without its adapter, whatever `ref_logps` the data have."""


def is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of `model` to 0: `nn.Dropout` modules and float attributes alike.

    transformers keeps attention dropout as a number on the attention module. The config is left as it is.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def frozen_copy(model: nn.Module) -> FrozenReference:
    """A reference made of a copy of `model`'s present weights."""
    return FrozenReference(disabled(copy.deepcopy(model)))


def disabled(model: nn.Module) -> nn.Module:
    """`model` with dropout off, in eval mode, without gradients."""
    disable_dropout(model)
    return model.eval().requires_grad_(False)


class StartingAdapterReference:
    """The policy as it was when training started, for training that goes on with a trained adapter.

    Holds a copy of the adapter's weights only; a call puts them in place of the present ones and restores
    those afterwards, bit for bit, also when the call fails.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    def __call__(self, batch: TokenBatch, want: Collection[str]) -> ReferenceScores:
        with evaluating(self.model), self._swapped():
            scores = score(self.model, batch, ("logps", "hidden") if "distribution" in want else ("logps",))
            out = ReferenceScores(logps=scores.logps)
            if scores.hidden is not None:
                out.distribution = Distribution(scores.hidden, head_of(self.model).detach())
        return out

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        parameters = {n: p for n, p in self.model.named_parameters() if n in self._start}
        trained = {n: p.detach().clone() for n, p in parameters.items()}
        try:
            for name, parameter in parameters.items():
                self._start[name] = _placed_like(self._start[name], parameter)
                parameter.copy_(self._start[name])
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.copy_(trained[name])


def _placed_like(value: Tensor, parameter: Tensor) -> Tensor:
    """`value` on the device, and sharded over the ranks, like `parameter` (FSDP2 shards after we copied)."""
    value = value.to(parameter.device)
    if not hasattr(parameter, "device_mesh") or hasattr(value, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = parameter
    return distribute_tensor(value, sharded.device_mesh, sharded.placements)


def adapter_is_neutral(model: Any) -> bool:
    """Whether a model whose PEFT adapter is switched off is, and stays, the model as it is now.

    So it is with a LoRA that was not trained yet, as long as nothing else is trained: biases, say, which stay changed
    when the adapter is off.
    """
    types = {str(getattr(c.peft_type, "value", c.peft_type)) for c in model.peft_config.values()}
    if types != {"LORA"} or any(getattr(c, "modules_to_save", None) for c in model.peft_config.values()):
        return False
    if any(p.requires_grad and "lora_" not in n for n, p in model.named_parameters()):
        return False
    last = [p for n, p in model.named_parameters() if "lora_B" in n or "lora_embedding_B" in n]
    return bool(last) and all(not bool(p.any()) for p in last)


def default_reference(model: nn.Module, needs: Collection[str], has_column: bool) -> Reference | None:
    """The reference of an objective that was given none.

    Stored `ref_logps` if the data have them and they are enough; for an adapter the model without it (or a
    copy of what is trained, if the adapter was trained already or not only a LoRA is trained); otherwise a
    frozen copy of the starting weights.
    """
    if not {"ref_logps", "kl"} & set(needs):
        return None
    if has_column and "kl" not in needs:
        return ColumnReference()
    if is_peft(model):
        return AdapterOffReference(model) if adapter_is_neutral(model) else StartingAdapterReference(model)
    return frozen_copy(model)


def resolve_reference(reference: Any, model: nn.Module, needs: Collection[str], has_column: bool) -> Reference | None:
    """`reference` as given to the trainer (a model, a `Reference`, `ADAPTER_OFF` or None) as a `Reference` or None."""
    if isinstance(reference, str) and reference == ADAPTER_OFF:
        reference, has_column = None, False
    if reference is None:
        return default_reference(model, needs, has_column)
    if isinstance(reference, nn.Module):
        if reference is model:
            raise ModelError("the reference is the policy itself; pass a copy, or None for the default")
        return FrozenReference(disabled(reference))
    if not callable(reference):
        raise ModelError(f"reference must be a model, a Reference or None, got {type(reference).__name__}")
    return reference


def place_reference(reference: Reference | None, accelerator: Accelerator, layout: Any) -> None:
    """Move a frozen model to this rank's device; under FSDP2 shard it like the policy.

    Args:
        layout: the policy's; both are scored in the same one.
    """
    if not isinstance(reference, FrozenReference):
        return
    if not accelerator.is_fsdp2:
        reference.model.to(accelerator.device)
    prepare(reference.model, layout=layout)
    if accelerator.is_fsdp2:
        shard(reference.model, accelerator)


def shard(model: nn.Module, accelerator: Accelerator) -> None:
    """Shard a model over the ranks in place (FSDP2), as accelerate does for the one it trains."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    fsdp2_prepare_model(accelerator, model)


def reshard(model: nn.Module) -> None:
    """Put a sharded model's parameters back into shards.

    After a forward pass FSDP2 leaves the last ones (final norm and head) whole. An optimiser made then would
    hold those whole tensors, which never get a gradient.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
