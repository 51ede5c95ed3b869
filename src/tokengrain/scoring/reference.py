"""Frozen quantities of a reference: another model, an adapter switched off or for another one, stored columns."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from tokengrain.batch import TokenBatch
from tokengrain.errors import ModelError, fingerprint, require
from tokengrain.scoring.head import Distribution, Head
from tokengrain.scoring.model import evaluating, nested
from tokengrain.scoring.prepare import coarse, prepare, unwrapped
from tokengrain.scoring.score import head_of, score
from tokengrain.scoring.vision import tower

if TYPE_CHECKING:
    from accelerate import Accelerator

WANTED = ("logps", "distribution")


@dataclass
class ReferenceScores:
    """What a reference gave of what was wanted."""

    logps: Tensor | None = None  # [N], nats
    distribution: Distribution | None = None  # at the counted tokens


class Reference(Protocol):
    """Frozen quantities of a batch, of "logps" and "distribution" what is wanted, without gradients and dropout."""

    def __call__(self, batch: TokenBatch, want: Collection[str]) -> ReferenceScores: ...


class LiveReference:
    """A model that is asked.

    Attributes:
        temperature: divides the logits of its log-probabilities.
        stored: its numbers are kept, and compared with those of other batches: see `coarse`.
    """

    model: nn.Module
    temperature = 1.0
    stored = False

    def _scores(self, batch: TokenBatch, want: Collection[str]) -> ReferenceScores:
        most = 1 if self.stored and coarse(self.model) else None
        return _score_frozen(self.model, batch, want, temperature=self.temperature, max_row_tokens=most)


class FrozenReference(LiveReference):
    """Another model, for example a copy of the starting weights. It is put into evaluation mode and frozen for good."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)

    def __call__(self, batch: TokenBatch, want: Collection[str]) -> ReferenceScores:
        return self._scores(batch, want)

    @torch.no_grad()
    def move(self, policy: nn.Module, share: float) -> None:
        """Move the weights this share of the way to the policy's, which has the same parameters."""
        for own, theirs in zip(self.model.parameters(), policy.parameters(), strict=True):
            if own is not theirs:  # what nobody trains may be shared
                own.mul_(1.0 - share).add_(theirs.detach().to(own), alpha=share)


class AdapterOffReference(LiveReference):
    """A PEFT model, maybe wrapped, with its adapter disabled: no second copy of the weights."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        for config in _peft_of(model).peft_config.values():
            start = str(getattr(config, "init_lora_weights", True)).lower()
            what = f"init_lora_weights {start!r} takes a part of the base's weights into the adapter, so that the "
            what += "model with its adapter off is not the one that training starts from; expected the default "
            what += "reference, or copy"
            require(start in ("true", "false", "none", "gaussian", "orthogonal", "eva"), ModelError, what)

    def __call__(self, batch: TokenBatch, want: Collection[str]) -> ReferenceScores:
        peft = _peft_of(self.model)
        with _gradients_required_as_before(peft), peft.disable_adapter():
            return self._scores(batch, want)


class AdapterReference(LiveReference):
    """A PEFT model, maybe wrapped, with another of its adapters active: several models over one set of weights.

    The model that is trained keeps its active adapter, its mode and what requires gradients, on errors too. A
    `Distribution` it gives holds the base model's own head, or that of the adapter if the adapter has one.
    """

    def __init__(self, model: nn.Module, adapter: str) -> None:
        self.model, self.adapter = model, adapter
        names = list(_peft_of(model).peft_config)
        require(adapter in names, ModelError, f"unknown adapter; got {adapter!r}, expected one of {names}")

    def __call__(self, batch: TokenBatch, want: Collection[str]) -> ReferenceScores:
        peft = _peft_of(self.model)
        with _gradients_required_as_before(peft), _adapter_on(peft, self.adapter):
            return self._scores(batch, want)


class ColumnReference:
    """Stored quantities: `batch.columns["ref_logps"]` `[N]` and, with the head, `["ref_hidden"]` `[N, H]`."""

    def __init__(self, head: Head | None = None) -> None:
        self.head = None if head is None else head.detach()

    def __call__(self, batch: TokenBatch, want: Collection[str]) -> ReferenceScores:
        _check(want)
        out = ReferenceScores()
        if "logps" in want:
            out.logps = self._column(batch, "ref_logps")
        if "distribution" in want:
            if self.head is None:
                raise ModelError(
                    "stored log-probabilities are one number per token; a KL over the whole vocabulary "
                    "(TDPO) needs a live reference, or the column 'ref_hidden' and the reference's head"
                )
            out.distribution = Distribution(self._column(batch, "ref_hidden"), self.head)
        return out

    @staticmethod
    def _column(batch: TokenBatch, name: str) -> Tensor:
        message = f"the data have no column {name!r} to take the reference from; got {sorted(batch.columns)}, "
        require(name in batch.columns, ModelError, message + "expected it in every completion")
        return batch.columns[name].detach()


def _check(want: Collection[str]) -> None:
    unknown = sorted(set(want) - set(WANTED))
    require(not unknown, ModelError, f"unknown reference quantity; got {unknown}, expected some of {list(WANTED)}")


def _score_frozen(model: nn.Module, batch: TokenBatch, want: Collection[str], **options: Any) -> ReferenceScores:
    _check(want)
    wanted = [{"logps": "logps", "distribution": "hidden"}[w] for w in WANTED if w in want]
    with evaluating(model):
        scores = score(model, batch, wanted, **options)
        whole = None if scores.hidden is None else Distribution(scores.hidden, head_of(model).detach())
    return ReferenceScores(scores.logps, whole)


def _peft_of(model: nn.Module) -> Any:
    peft = next((m for m in nested(model) if hasattr(m, "disable_adapter")), None)
    require(peft is not None, ModelError, f"{type(model).__name__} has no adapter to switch; expected a PEFT model")
    return peft


@contextmanager
def _gradients_required_as_before(peft: Any) -> Iterator[None]:
    """Afterwards, what required gradients before does so again, and nothing else: PEFT's switches change it."""
    before = [(p, p.requires_grad) for p in peft.parameters()]
    try:
        yield
    finally:
        for parameter, required in before:
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)


@contextmanager
def _adapter_on(peft: Any, adapter: str) -> Iterator[None]:
    """Another adapter active. Every layer remembers its own active one, and gets that back."""
    merged = any(vars(m).get("merged_adapters") for m in peft.modules())
    message = "its adapters are merged into the weights, so another cannot be used; unmerge them first"
    require(not merged, ModelError, message)
    names = ("active_adapter", "_active_adapter")
    before = [(m, name, vars(m)[name]) for m in peft.modules() for name in names if name in vars(m)]
    try:
        peft.set_adapter(adapter)
        yield
    finally:
        for module, name, active in before:
            setattr(module, name, active)


# ---- What the policy is compared with: choosing the reference, and switching dropout off.

ADAPTER_OFF = "adapter_off"
"""In place of a reference: the policy without its adapter, whatever `ref_logps` the data have."""


def is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def disable_dropout(model: nn.Module) -> nn.Module:
    """Set to 0 what draws random numbers in training: `nn.Dropout` modules, and the modules' own numbers.

    Those are attention's dropout, layers that are skipped (`layerdrop`) and a router's noise; not the config's.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and any(kind in name for kind in ("dropout", "layerdrop", "jitter")):
                setattr(module, name, 0.0)
    return model


class StartingAdapterReference(LiveReference):
    """The policy as it was when training started, for training that resumes from a trained adapter.

    Holds a copy of what is trained; a call puts it in place and restores the present weights bit for bit, on
    errors too.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    def __call__(self, batch: TokenBatch, want: Collection[str]) -> ReferenceScores:
        with evaluating(self.model), self._swapped():
            return self._scores(batch, want)

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

    So it is with an untrained LoRA as long as nothing else (such as biases) is trained.
    """
    types = {str(getattr(c.peft_type, "value", c.peft_type)) for c in model.peft_config.values()}
    if types != {"LORA"} or any(getattr(c, "modules_to_save", None) for c in model.peft_config.values()):
        return False
    if any(p.requires_grad and "lora_" not in n for n, p in model.named_parameters()):
        return False
    last = [p for n, p in model.named_parameters() if "lora_B" in n or "lora_embedding_B" in n]
    return bool(last) and all(not bool(p.any()) for p in last)


def resolve_reference(reference: Any, model: nn.Module, needs: Collection[str], has_column: bool) -> Reference | None:
    """`reference` as given to the trainer (a model, a `Reference`, `ADAPTER_OFF` or None) as a `Reference` or None.

    Of None: stored `ref_logps` if they are enough; for an adapter the model without it, or a copy of what is trained if
    more than an untrained LoRA is; otherwise a frozen copy of the starting weights.
    """
    if isinstance(reference, str) and reference == ADAPTER_OFF:
        reference, has_column = None, False
    if isinstance(reference, nn.Module):
        itself = reference is model
        require(not itself, ModelError, "the reference is the policy itself; pass a copy, or None for the default")
        return FrozenReference(disable_dropout(reference))
    if reference is not None:
        given = type(reference).__name__
        require(callable(reference), ModelError, f"reference must be a model, a Reference or None, got {given}")
        return cast(Reference, reference)
    if not {"ref_logps", "kl"} & set(needs):
        return None
    if has_column and "kl" not in needs:
        return ColumnReference()
    if is_peft(model):
        return AdapterOffReference(model) if adapter_is_neutral(model) else StartingAdapterReference(model)
    return FrozenReference(disable_dropout(_copied(model)))


def _copied(model: nn.Module) -> nn.Module:
    """A copy. A vision tower that is frozen stays one, so that what it sees is computed once."""
    return copy.deepcopy(model, {id(p): p for p in tower(unwrapped(model))[1] if not p.requires_grad})


def place_reference(reference: Reference | None, accelerator: Accelerator, layout: Any) -> None:
    """Move a frozen model to this rank's device; under FSDP2 shard it like the policy, whose `layout` it gets."""
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


def gathered(model: nn.Module, *, trained_only: bool, keep: bool) -> dict[str, Tensor] | None:
    """A sharded model's weights, whole, in host memory; None where they are not to be kept. All ranks call this.

    One tensor is gathered at a time: a rank that keeps none of them never holds more than its shards and one tensor.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = {}
    for name, value in model.state_dict().items():
        if name in trained or not trained_only:
            whole = unsharded(value)
            if keep:
                state[name] = whole.cpu()
    return state if keep else None


def unsharded(value: Any) -> Tensor:
    """The whole of a tensor, gathered if it is sharded."""
    whole: Tensor = value.detach().full_tensor() if hasattr(value, "full_tensor") else value.detach()
    return whole


def reshard(model: nn.Module) -> None:
    """Put a sharded model's parameters back into shards.

    FSDP2 leaves the last ones whole after a forward pass. An optimiser made then would hold tensors that never get a
    gradient.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


# ---- Whoever gives log-probabilities, a model or a reference: what it says, and what identifies it.


def has_adapter(model: nn.Module) -> bool:
    """Whether there is a PEFT model, whose adapter can be switched off, in `model` or its wrapper."""
    return any(is_peft(m) for m in nested(model))


def scorer_logps(scorer: Any, batch: TokenBatch) -> Tensor:
    """Log-probabilities `[N]` under a model in evaluation mode, or under a `Reference`; without gradient."""
    return cast(Tensor, _asked(scorer, batch, "logps"))


def scorer_distribution(scorer: Any, batch: TokenBatch) -> Distribution:
    """What every counted token was drawn from, under a model in evaluation mode or a `Reference`; without gradient."""
    return cast(Distribution, _asked(scorer, batch, "distribution"))


def _asked(scorer: Any, batch: TokenBatch, what: str) -> Any:
    live = isinstance(scorer, nn.Module)
    return getattr(_score_frozen(scorer, batch, {what}) if live else scorer(batch, {what}), what)


def scorer_fingerprint(scorer: Any) -> str:
    """Identifies a model's weights and config, or a reference by its class and its model's weights."""
    if isinstance(scorer, nn.Module):
        return model_fingerprint(scorer)
    kind, model = type(scorer).__name__, getattr(scorer, "model", None)
    # What an adapter that is switched off holds does not change the numbers.
    content = model_fingerprint(model, adapter=kind != "AdapterOffReference") if model is not None else ""
    return fingerprint([kind, content])


def model_fingerprint(model: nn.Module, *, adapter: bool = True) -> str:
    """16 hex digits over names, types and bytes of the weights (LoRA weights if `adapter`), and over the config."""
    digest = hashlib.blake2b()
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_json_string"):
        digest.update(config.to_json_string(use_diff=True).encode())
    for name, value in sorted(model.state_dict().items()):
        if "lora_" in name and not adapter:
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        content = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(content.numpy().data)
    return digest.hexdigest()[:16]
